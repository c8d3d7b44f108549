"""What the methods on our own adapter share: the factors that train, their optimiser, and their state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from qaroma.method.adapter import Adapter
from qaroma.method.base import Method, MethodOptions, MethodState
from qaroma.method.factors import Factors, Update
from qaroma.method.optimiser import OPTIMIZERS, FlatAdamW

HEAD = "(head)"  # the optimiser's group of a head that is trained in full; no module has such a name


class FactorTrainer:
    """The active factors of an adapter, the head if one is trained, and their optimiser.

    Args:
        adapter: layers without an active component; each is given its first one here.
        head: fp32 parameters that are trained in full beside the adapter.
        optimizer: one of :data:`~qaroma.method.optimiser.OPTIMIZERS`.
        max_grad_norm: gradients are clipped to this joint norm before an update.
        weight_decay, max_update: see :class:`FlatAdamW`.
        rank: of the first components; None is the adapter's inner rank.
    """

    def __init__(
        self,
        adapter: Adapter,
        *,
        head: Sequence[nn.Parameter] = (),
        optimizer: str,
        max_grad_norm: float,
        weight_decay: float,
        max_update: float | None,
        rank: int | None = None,
    ) -> None:
        self.adapter, self.head, self.max_grad_norm = adapter, list(head), max_grad_norm
        self._kind = OPTIMIZERS[optimizer]
        self._options = {"weight_decay": weight_decay, "max_update": max_update}
        for layer in adapter.layers.values():
            layer.start_component(adapter.initial_A(layer, rank))
        self._build_optimiser()

    def _trained(self) -> dict[str, dict[str, nn.Parameter]]:
        """The optimiser's groups: module (or :data:`HEAD`) -> name in a checkpoint -> parameter."""
        groups = {
            name: dict(zip("AB", layer.parameters(recurse=False), strict=True))
            for name, layer in self.adapter.active_layers()
        }
        if self.head:
            groups[HEAD] = {str(place): parameter for place, parameter in enumerate(self.head)}
        return groups

    def _build_optimiser(self) -> None:
        groups = {name: list(parameters.values()) for name, parameters in self._trained().items()}
        parts = {name: layer.active_components for name, layer in self.adapter.active_layers()}
        self.optimiser: FlatAdamW = self._kind(groups, parts=parts, **self._options)  # type: ignore[arg-type]

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
                trained, and has its size (:meth:`FlatAdamW.reset`); else it begins without moments.
        """
        if not ranks:
            return
        layers = {name: self.adapter.layers[name] for name in ranks}
        fresh = {name: self.adapter.initial_A(layer, ranks[name]) for name, layer in layers.items()}
        if window == 1 and all(len(fresh[name]) == layer.active_rank for name, layer in layers.items()):
            for name, layer in layers.items():
                layer.restart_component(fresh[name])
            self.optimiser.reset(list(ranks), reset, self.adapter.generator)
            return
        gone = {name: layer.freezing(window) for name, layer in layers.items()}
        rows = {name: (A, torch.zeros(len(A), layers[name].out_features)) for name, A in fresh.items()}
        self.optimiser.grow(rows, gone=gone)
        for name, layer in layers.items():
            layer.extended(self.optimiser.groups[name], len(fresh[name]), frozen=gone[name])

    def end(self, names: Mapping[str, bool]) -> None:
        """Stop training these layers; the value says whether the newest component is kept, like those before it."""
        if not names:
            return
        self.optimiser.drop(list(names))
        for name, keep in names.items():
            self.adapter.layers[name].end(keep=keep)

    def state(self) -> MethodState:
        tensors = {"generator": self.adapter.generator.get_state()}
        for name, layer in self.adapter.layers.items():
            tensors[f"frozen.{name}.A"], tensors[f"frozen.{name}.B"] = layer.frozen_factors()
        for key, tensor in self._trained_tensors():
            tensors[key] = tensor
        steps = dict(self.optimiser.steps)
        values = {
            "components": {name: layer.components for name, layer in self.adapter.layers.items()},
            "active": {name: layer.active_components for name, layer in self.adapter.active_layers()},
            "scale": self.adapter.scale,
            "head_steps": steps.pop(HEAD, [0]),
            "steps": steps,
        }
        return MethodState(tensors, values)

    def load_state(self, state: MethodState, *, keeps_updates: bool = False) -> None:
        """Go on from such a state.

        Args:
            state: as :meth:`state` gave it.
            keeps_updates: whether the optimiser keeps its updates at this moment.
        """
        active = state.values["active"]
        for name, layer in self.adapter.layers.items():
            layer.active_A = layer.active_B = None
            layer.active_components = []
            frozen = state.tensors[f"frozen.{name}.A"], state.tensors[f"frozen.{name}.B"]
            layer.load_factors(*frozen, state.values["components"][name])
            if name in active:
                layer.start_component(layer.A.new_zeros(sum(active[name]), layer.in_features), active[name])
        self._build_optimiser()
        self.optimiser.keep_updates(keeps_updates)
        self.optimiser.steps.update(state.values["steps"])
        if self.head:
            self.optimiser.steps[HEAD] = state.values["head_steps"]
        for key, tensor in self._trained_tensors():
            tensor.copy_(state.tensors[key])
        self.adapter.refresh()
        self.adapter.generator.set_state(state.tensors["generator"])

    def _trained_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What trains and what the optimiser keeps beside it, by name; views that can be written into."""
        for group, parameters in self._trained().items():
            for (key, parameter), beside in zip(parameters.items(), self.optimiser.beside(group), strict=True):
                yield f"active.{group}.{key}", parameter.detach()
                for kind, tensor in beside.items():
                    yield f"{kind}.{group}.{key}", tensor


def factors_in(state: MethodState) -> dict[str, Factors]:
    """The update in the state of a method on our own adapter, as the forward pass has it.

    Frozen factors stand as they are; active ones are scaled and rounded to the dtype of the frozen ones,
    as :meth:`~qaroma.method.adapter.AdaptedLinear.place_active` does it.

    Raises:
        KeyError: the state of another kind of method.
    """
    found = {}
    for name in state.values["components"]:
        A, B = state.tensors[f"frozen.{name}.A"], state.tensors[f"frozen.{name}.B"]
        if name in state.values["steps"]:
            active_A, active_B = state.tensors[f"active.{name}.A"], state.tensors[f"active.{name}.B"]
            A = torch.cat([A, active_A.to(A)])
            B = torch.cat([B, (active_B * state.values["scale"]).to(B)])
        found[name] = Factors(A, B)
    return found


class AdapterMethod(Method):
    """What methods on our own adapter answer alike."""

    adapter: Adapter
    trainer: FactorTrainer

    @classmethod
    def attach(cls, model: nn.Module, names: Sequence[str], options: MethodOptions) -> Adapter:
        return Adapter(
            model,
            names,
            inner_rank=options.rank,
            alpha=options.alpha,
            dropout=options.dropout,
            seed=options.seed,
        )

    def gradients(self) -> list[Tensor]:
        return [self.trainer.optimiser.gradients]

    def gradient_norm(self) -> Tensor:
        return torch.linalg.vector_norm(self.trainer.optimiser.gradients)  # type: ignore[no-any-return]

    def multiply_gradients(self, factor: float) -> None:
        self.trainer.optimiser.gradients.mul_(factor)

    def zero_grad(self) -> None:
        self.trainer.optimiser.zero_grad()

    def ranks(self) -> dict[str, int]:
        return self.adapter.ranks()

    def components(self) -> dict[str, list[int]]:
        return self.adapter.components()

    def factors(self) -> dict[str, Factors]:
        return self.adapter.factors()

    def load_factors(self, update: Update, components: Mapping[str, list[int]]) -> None:
        for name, layer in self.adapter.layers.items():
            A, B = update.get(name, (layer.A[:0], layer.B[:0]))
            layer.load_factors(A, B, components[name])

    def active_modules(self) -> int:
        return sum(1 for _ in self.adapter.active_layers())

    def trainable_parameters(self) -> int:
        return self.adapter.trainable_parameters()
