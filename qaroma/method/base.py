"""What the training loop asks of a method: AROMA, plain LoRA, and others that join for comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qaroma.method.adapter import Adapter
from qaroma.method.growth import GrowthEvent
from qaroma.method.optimiser import FlatAdamW

HEAD = "(head)"  # the optimiser's group of a head that is trained in full; no module has such a name


@dataclass(frozen=True)
class MethodState:
    """A method's state for a checkpoint: tensors for safetensors, the rest as JSON values."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


class Method(Protocol):
    """A way of adapting a model; owns its trainable parameters and their optimiser.

    The loop runs forward and backward passes; ``step`` does everything else. Gradients accumulate
    until then. Ranks and parameters are the adapter's: a head that is trained in full counts to neither.
    """

    name: str

    @property
    def finished(self) -> bool:
        """Whether nothing is left to train."""
        ...

    @property
    def learning_rate(self) -> float:
        """Learning rate of the adapter's last update (the largest where modules differ)."""
        ...

    @property
    def probing(self) -> bool:
        """Whether the next gradients are to be given to :meth:`probe` instead of :meth:`step`."""
        ...

    def probe(self) -> None:
        """Take gradients that choose where new components begin; zeroes them. No update."""
        ...

    def penalty(self) -> Tensor | None:
        """A scalar to add to every step's loss; None adds nothing."""
        ...

    def step(self) -> list[GrowthEvent]:
        """Clip, update, zero the gradients and grow; returns what grew."""
        ...

    def zero_grad(self) -> None:
        """Throw away what has accumulated."""
        ...

    def finish(self) -> list[GrowthEvent]:
        """The step budget is spent; what is active is kept."""
        ...

    def ranks(self) -> dict[str, int]:
        """Rank of each module."""
        ...

    def components(self) -> dict[str, list[int]]:
        """Inner ranks of each module's components, in order."""
        ...

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A (R, N) and B (R, M) of each module, the scale folded into B."""
        ...

    def load_factors(self, factors: Mapping[str, tuple[Tensor, Tensor]], components: Mapping[str, list[int]]) -> None:
        """After ``finish``: put saved factors in the place of the present ones; a module that has none is absent."""
        ...

    def active_modules(self) -> int:
        """How many modules train."""
        ...

    def trainable_parameters(self) -> int:
        """How many numbers of the adapter train."""
        ...

    def state(self) -> MethodState:
        """What a checkpoint must hold to go on bit for bit."""
        ...

    def load_state(self, state: MethodState) -> None:
        """Go on from such a state, on a model whose adapter is new."""
        ...


class FactorTrainer:
    """The active factors of an adapter, the head if one is trained, and their optimiser.

    Args:
        adapter: layers without an active component; each is given its first one here.
        head: fp32 parameters that are trained in full beside the adapter.
        max_grad_norm: gradients are clipped to this joint norm before an update.
        weight_decay, max_update: see :class:`FlatAdamW`.
    """

    def __init__(
        self,
        adapter: Adapter,
        *,
        head: Sequence[nn.Parameter] = (),
        max_grad_norm: float,
        weight_decay: float,
        max_update: float | None,
    ) -> None:
        self.adapter, self.head, self.max_grad_norm = adapter, list(head), max_grad_norm
        self._options = {"weight_decay": weight_decay, "max_update": max_update}
        for layer in adapter.layers.values():
            layer.start_component(adapter.initial_A(layer, adapter.inner_rank))
        self._build_optimiser()

    def _build_optimiser(self) -> None:
        groups = {name: list(layer.parameters(recurse=False)) for name, layer in self.adapter.active_layers()}
        parts = {name: layer.active_components for name, layer in self.adapter.active_layers()}
        if self.head:
            groups[HEAD] = self.head
        self.optimiser = FlatAdamW(groups, parts=parts, **self._options)  # type: ignore[arg-type]

    def update(self, learning_rates: Mapping[str, Sequence[float]], head_learning_rate: float = 0.0) -> None:
        """Clip the gradients, update the fp32 factors, refresh the compute copies, zero the gradients.

        Args:
            learning_rates: of each active component of each active module, oldest first.
            head_learning_rate: of the head.
        """
        self.optimiser.clip(self.max_grad_norm)
        self.optimiser.step({**learning_rates, HEAD: [head_learning_rate]})
        self.optimiser.zero_grad()
        self.adapter.refresh()

    def begin(self, ranks: Mapping[str, int], *, window: int | None, reset: str) -> None:
        """Begin the next component of some layers; the oldest one freezes where more than a window's would train.

        Args:
            ranks: name of a layer that trains -> inner rank of its new component.
            window: how many of a layer's newest components train; None is all of them.
            reset: what becomes of the moments where the new component takes the place of the only one that
                trained (:meth:`FlatAdamW.reset`); beside others it begins without moments.
        """
        if not ranks:
            return
        layers = {name: self.adapter.layers[name] for name in ranks}
        fresh = {name: self.adapter.initial_A(layer, ranks[name]) for name, layer in layers.items()}
        if window == 1:
            for name, layer in layers.items():
                layer.restart_component(fresh[name])
            self.optimiser.reset(list(ranks), reset, self.adapter.generator)
            return
        gone = {
            name: 0 if window is None else max(0, len(layer.active_components) + 1 - window)
            for name, layer in layers.items()
        }
        rows = {name: (A, torch.zeros(len(A), layers[name].out_features)) for name, A in fresh.items()}
        self.optimiser.grow(rows, gone=gone)
        for name, layer in layers.items():
            layer.extended(len(fresh[name]), frozen=gone[name])

    def end(self, names: Mapping[str, bool]) -> None:
        """Stop training these layers; the value says whether the newest component is kept, like those before it."""
        if not names:
            return
        self.optimiser.drop(list(names))
        for name, keep in names.items():
            self.adapter.layers[name].end(keep=keep)

    def state(self) -> MethodState:
        tensors = {f"optimiser.{k}": t for k, t in self.optimiser.state_tensors().items()}
        tensors["generator"] = self.adapter.generator.get_state()
        components = {}
        for name, layer in self.adapter.layers.items():
            components[name] = layer.components
            if layer.components:
                tensors[f"frozen.{name}.A"], tensors[f"frozen.{name}.B"] = layer.frozen_factors()
        steps = dict(self.optimiser.steps)
        head_steps = steps.pop(HEAD, [0])
        active = {name: layer.active_components for name, layer in self.adapter.active_layers()}
        return MethodState(
            tensors, {"components": components, "active": active, "head_steps": head_steps, "steps": steps}
        )

    def load_state(self, state: MethodState) -> None:
        active = state.values["active"]
        for name, layer in self.adapter.layers.items():
            layer.active_A = layer.active_B = None
            layer.active_components = []
            components = state.values["components"][name]
            if components:
                layer.load_factors(state.tensors[f"frozen.{name}.A"], state.tensors[f"frozen.{name}.B"], components)
            else:
                layer.load_factors(layer.A[:0], layer.B[:0], [])
            if name in active:
                layer.start_component(layer.A.new_zeros(sum(active[name]), layer.in_features), active[name])
        self._build_optimiser()
        prefix = "optimiser."
        tensors = {k.removeprefix(prefix): t for k, t in state.tensors.items() if k.startswith(prefix)}
        self.optimiser.load_state(tensors, {**state.values["steps"], HEAD: state.values["head_steps"]})
        self.adapter.refresh()
        self.adapter.generator.set_state(state.tensors["generator"])


class AdapterMethod:
    """What methods on our own adapter answer alike."""

    adapter: Adapter
    trainer: FactorTrainer
    probing = False

    def probe(self) -> None:
        raise AssertionError("nothing to probe")

    def penalty(self) -> Tensor | None:
        return None

    def zero_grad(self) -> None:
        self.trainer.optimiser.zero_grad()

    def ranks(self) -> dict[str, int]:
        return self.adapter.ranks()

    def components(self) -> dict[str, list[int]]:
        return self.adapter.components()

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        return self.adapter.factors()

    def load_factors(self, factors: Mapping[str, tuple[Tensor, Tensor]], components: Mapping[str, list[int]]) -> None:
        for name, layer in self.adapter.layers.items():
            A, B = factors.get(name, (layer.A[:0], layer.B[:0]))
            layer.load_factors(A, B, components[name])

    def active_modules(self) -> int:
        return sum(1 for _ in self.adapter.active_layers())

    def trainable_parameters(self) -> int:
        return self.adapter.trainable_parameters()
