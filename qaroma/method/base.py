"""What the training loop asks of a method: AROMA, plain LoRA, and others that join for comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from qaroma.method.adapter import Adapter
from qaroma.method.growth import GrowthEvent
from qaroma.method.optimiser import FlatAdamW


@dataclass(frozen=True)
class MethodState:
    """A method's state for a checkpoint: tensors for safetensors, the rest as JSON values."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


class Method(Protocol):
    """A way of adapting a model; owns its trainable parameters and their optimiser.

    The loop runs forward and backward passes; ``step`` does everything else. Gradients accumulate
    until then.
    """

    name: str
    adapter: Adapter

    @property
    def finished(self) -> bool:
        """Whether nothing is left to train."""
        ...

    @property
    def learning_rate(self) -> float:
        """Learning rate of the last update (the largest where modules differ)."""
        ...

    def step(self) -> list[GrowthEvent]:
        """Clip, update, zero the gradients and grow; returns what grew."""
        ...

    def finish(self) -> list[GrowthEvent]:
        """The step budget is spent; what is active is kept."""
        ...

    def state(self) -> MethodState:
        """What a checkpoint must hold to go on bit for bit."""
        ...

    def load_state(self, state: MethodState) -> None:
        """Go on from such a state, on a model whose adapter is new."""
        ...


class FactorTrainer:
    """The active factors of an adapter and their optimiser: what AROMA and plain LoRA share.

    Args:
        adapter: layers without an active component; each is given its first one here.
        max_grad_norm: gradients are clipped to this joint norm before an update.
        weight_decay, max_update: see :class:`FlatAdamW`.
    """

    def __init__(
        self, adapter: Adapter, *, max_grad_norm: float, weight_decay: float, max_update: float | None
    ) -> None:
        self.adapter, self.max_grad_norm = adapter, max_grad_norm
        self._options = {"weight_decay": weight_decay, "max_update": max_update}
        for layer in adapter.layers.values():
            layer.start_component(adapter.initial_A(layer))
        self._build_optimiser()

    def _build_optimiser(self) -> None:
        groups = {name: list(layer.parameters(recurse=False)) for name, layer in self.adapter.active_layers()}
        self.optimiser = FlatAdamW(groups, **self._options)  # type: ignore[arg-type]

    def update(self, learning_rates: Mapping[str, float]) -> None:
        """Clip the gradients, update the fp32 factors, refresh the compute copies, zero the gradients."""
        self.optimiser.clip(self.max_grad_norm)
        self.optimiser.step(learning_rates)
        self.optimiser.zero_grad()
        self.adapter.refresh()

    def end(self, names: Mapping[str, bool]) -> None:
        """Stop training these layers; the value says whether the active component is kept."""
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
        return MethodState(tensors, {"components": components, "steps": dict(self.optimiser.steps)})

    def load_state(self, state: MethodState) -> None:
        active = state.values["steps"]
        for name, layer in self.adapter.layers.items():
            layer.active_A = layer.active_B = None
            components = state.values["components"][name]
            if components:
                layer.load_factors(state.tensors[f"frozen.{name}.A"], state.tensors[f"frozen.{name}.B"], components)
            else:
                layer.load_factors(layer.A[:0], layer.B[:0], [])
            if name in active:
                layer.start_component(layer.A.new_zeros(self.adapter.inner_rank, layer.in_features))
        self._build_optimiser()
        prefix = "optimiser."
        tensors = {k.removeprefix(prefix): t for k, t in state.tensors.items() if k.startswith(prefix)}
        self.optimiser.load_state(tensors, active)
        self.adapter.refresh()
        self.adapter.generator.set_state(state.tensors["generator"])
