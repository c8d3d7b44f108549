"""Plain LoRA (Hu et al., 2021) through the same adapter, optimiser and loop: growth off."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from qaroma.method.adapter import Adapter
from qaroma.method.base import MethodOptions, MethodState
from qaroma.method.growth import GrowthEvent
from qaroma.method.on_adapter import AdapterMethod, FactorTrainer
from qaroma.method.schedule import warm_cosine


class PlainLora(AdapterMethod):
    """One component of fixed rank per layer, trained to the end of the step budget.

    Args:
        adapter: its ``inner_rank`` is LoRA's rank.
        learning_rate: peak of a cosine with one warm-up.
        total_steps: step budget.
        warmup: steps of the warm-up.
        min_lr_ratio: where the cosine ends.
        optimizer: of the factors, one of :data:`~qaroma.method.optimiser.OPTIMIZERS`.
        weight_decay, max_grad_norm: of the optimiser.
        head: parameters trained in full beside the adapter, with the same schedule.
        head_learning_rate: their peak; None is ``learning_rate``.
    """

    name = "lora"

    def __init__(
        self,
        adapter: Adapter,
        *,
        learning_rate: float,
        total_steps: int,
        warmup: int = 0,
        min_lr_ratio: float = 0.1,
        optimizer: str = "adamw",
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        head: Sequence[nn.Parameter] = (),
        head_learning_rate: float | None = None,
    ) -> None:
        self.adapter, self.peak, self.total_steps, self.learning_rate = adapter, learning_rate, total_steps, 0.0
        self.head_peak = head_learning_rate or learning_rate
        self.warmup, self.min_lr_ratio, self.steps_done = warmup, min_lr_ratio, 0
        self.trainer = FactorTrainer(
            adapter,
            head=head,
            optimizer=optimizer,
            max_grad_norm=max_grad_norm,
            weight_decay=weight_decay,
            max_update=None,
        )

    @classmethod
    def build(cls, attached: Adapter, options: MethodOptions, head: Sequence[nn.Parameter] = ()) -> PlainLora:
        return cls(attached, head=head, **options.of_factors(), **options.cosine())

    def step(self, loss: float | None = None) -> list[GrowthEvent]:
        """Clip, update, zero the gradients. LoRA grows nothing."""
        factor = warm_cosine(self.steps_done, total=self.total_steps, warmup=self.warmup, min_ratio=self.min_lr_ratio)
        self.learning_rate = self.peak * factor
        self.trainer.update({name: [self.learning_rate] for name in self.adapter.layers}, self.head_peak * factor)
        self.steps_done += 1
        return []

    def finish(self) -> list[GrowthEvent]:
        """Nothing to decide: the component stays."""
        self.trainer.end(dict.fromkeys([name for name, _ in self.adapter.active_layers()], True))
        return []

    def state(self) -> MethodState:
        state = self.trainer.state()
        return MethodState(state.tensors, {**state.values, "steps_done": self.steps_done})

    def load_state(self, state: MethodState) -> None:
        self.trainer.load_state(state)
        self.steps_done = state.values["steps_done"]
