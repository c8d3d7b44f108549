"""AROMA with joint components: all of a module's components train, and the run's budget says when new ones begin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Literal

import torch
from torch import nn

from qaroma.method.adapter import Adapter
from qaroma.method.base import MethodState
from qaroma.method.budget import BudgetSettings, BudgetState, allotted
from qaroma.method.growth import GrowthEvent
from qaroma.method.on_adapter import AdapterMethod, FactorTrainer
from qaroma.method.rate import MeasuredRate
from qaroma.method.schedule import cosine, warm_cosine

MEASURED_SHARE = 4  # the rate is measured over the first quarter of a run
REMEMBERED = 0.9  # of a module's credit, from step to step


class JointController(AdapterMethod):
    """Trains an adapter whose components all train together, one call of :meth:`step` after each backward pass.

    Usable in any loop::

        adapter = attach(model)
        growth = JointController(adapter, BudgetSettings(start_rank=8, max_rank=32), learning_rate=1e-3,
                                 total_steps=500)
        for batch in batches:
            mean_loss = loss(model, batch)
            mean_loss.backward()
            growth.step(mean_loss.item())
            if growth.finished:
                break

    A module's learning rate falls with the square root of its rank, so that one rate holds for every rank.

    Args:
        adapter: as :func:`qaroma.attach` returns it, with an inner rank of 1; its first components are begun here.
        settings: of growth.
        learning_rate: peak of a cosine, at the rank that the run begins with; where ``settings.measured_rate``,
            only where the measuring begins.
        total_steps: step budget T.
        optimizer: of the factors, one of :data:`~qaroma.method.optimiser.OPTIMIZERS`.
        weight_decay, max_grad_norm: of the optimiser.
        head: parameters trained in full beside the adapter.
        head_learning_rate: peak of their cosine; None is ``learning_rate``.
    """

    name = "aroma"

    def __init__(
        self,
        adapter: Adapter,
        settings: BudgetSettings,
        *,
        learning_rate: float,
        total_steps: int,
        optimizer: str = "muon",
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        head: Sequence[nn.Parameter] = (),
        head_learning_rate: float | None = None,
    ) -> None:
        self.adapter, self.settings = adapter, settings
        self.head_peak = head_learning_rate or learning_rate
        self.peak, self.total_steps, self.learning_rate = learning_rate, total_steps, 0.0
        self.growth = BudgetState.start(settings, total_steps)
        self.rate = MeasuredRate(total_steps // MEASURED_SHARE if settings.measured_rate else 0)
        self.trainer = FactorTrainer(
            adapter,
            head=head,
            optimizer=optimizer,
            max_grad_norm=max_grad_norm,
            weight_decay=weight_decay,
            max_update=settings.max_update,
            rank=settings.start_rank,
        )
        self._born = {name: [0] for name in adapter.layers}  # step at which each active component began
        self._credit = torch.zeros(len(adapter.layers), device=self.trainer.optimiser.values.device)
        self.trainer.optimiser.keep_updates(self._looks_back())

    @property
    def finished(self) -> bool:
        return self.growth.finished

    @property
    def ending(self) -> Literal["grown", "learnt"]:
        return "learnt"

    def learning_rates(self) -> dict[str, list[float]]:
        """Learning rate of the next update of each active component, by module, oldest first."""
        state, s = self.growth, self.settings
        settled = (
            self.peak
            * self.rate.factor
            * math.sqrt(s.start_rank / state.rank)
            * cosine(state.step, total=self.total_steps, warmup=s.warmup, min_ratio=s.min_lr_ratio)
            * state.rate_factor()
        )
        climb = {b: min(1.0, (state.step - b + 1) / s.warmup) if s.warmup else 1.0 for b in {0, *state.born}}
        return {name: [settled * climb[b] for b in born] for name, born in self._born.items()}

    def _looks_back(self) -> bool:
        """Whether the last update is wanted at the next step: to measure the rate, or to know which modules pay."""
        return self.rate.measuring(self.growth.step) or self.growth.may_still_grow

    def step(self, loss: float | None = None) -> list[GrowthEvent]:
        """Clip, update, zero the gradients; grow where rank is missing.

        While the rate is measured, each step synchronises with the device once.

        Args:
            loss: mean training loss of this step, before its update.

        Returns:
            One event for each module where rank was added, else none.

        Raises:
            ValueError: no loss, by which this method grows.
        """
        if loss is None:
            raise ValueError("growth within a budget follows the training loss: call step(loss)")
        step, optimiser = self.growth.step, self.trainer.optimiser
        if step and optimiser.last_update is not None:
            modules = optimiser.credits()[: len(self._credit)]  # a head's group comes last
            self._credit = REMEMBERED * self._credit + modules
        if step and self.rate.measuring(step):
            self.rate.observe(step, optimiser.agreement().item(), loss)
        rates = self.learning_rates()
        self.learning_rate = max(rate for of_module in rates.values() for rate in of_module)
        of_head = warm_cosine(
            step, total=self.total_steps, warmup=self.settings.warmup, min_ratio=self.settings.min_lr_ratio
        )
        self.trainer.update(rates, self.head_peak * of_head)
        grown = self.growth.observe(loss)
        added = self._grow(grown) if grown else {}
        optimiser.keep_updates(self._looks_back())
        return self._events("commit", list(added))

    def _grow(self, grown: int) -> dict[str, int]:
        """Begin the next component where it pays most; returns its rank, by module."""
        layers, window = self.adapter.layers, self.settings.window
        sizes = {name: layer.in_features + layer.out_features for name, layer in layers.items()}
        added = allotted(grown, dict(zip(layers, self._credit.tolist(), strict=True)), sizes)
        self.trainer.begin(added, window=window, reset="full")
        for name in added:
            born = [*self._born[name], self.growth.step]
            self._born[name] = born if window is None else born[-window:]
        return added

    def validated(self, loss: float, standard_error: float) -> None:
        self.growth.validated(loss, standard_error)

    def finish(self) -> list[GrowthEvent]:
        """Training is over: every component is kept, rounded as the forward pass uses it."""
        names = [name for name, _ in self.adapter.active_layers()]
        events = self._events("keep", names)
        self.trainer.end(dict.fromkeys(names, True))
        return events

    def _events(self, decision: Literal["commit", "keep"], names: list[str]) -> list[GrowthEvent]:
        """``commit`` tells of a module's component that it is not the last any more."""
        components, step = self.components(), self.growth.step
        last = {name: len(components[name]) - (decision == "commit") for name in names}
        return [GrowthEvent(step, name, last[name], None, None, decision) for name in names]

    def state(self) -> MethodState:
        state = self.trainer.state()
        own = {"growth": self.growth.to_json(), "rate": asdict(self.rate), "born": self._born}
        return MethodState({**state.tensors, "credit": self._credit}, {**state.values, **own})

    def load_state(self, state: MethodState) -> None:
        self.growth.load_json(state.values["growth"])
        for key, value in state.values["rate"].items():
            setattr(self.rate, key, value)
        self._born = {name: list(born) for name, born in state.values["born"].items()}
        self.trainer.load_state(state, keeps_updates=self._looks_back())
        self._credit = state.tensors["credit"].to(self.trainer.optimiser.values.device)
