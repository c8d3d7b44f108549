"""AROMA: the controller that measures, decides and grows after every optimiser step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qaroma.errors import QaromaError
from qaroma.method.adapter import Adapter
from qaroma.method.base import MethodOptions, MethodState
from qaroma.method.budget import BudgetSettings
from qaroma.method.criteria import (
    change_norm_sq,
    dense_inner_product,
    dense_norm_sq,
    inner_product,
    product_norm_sq,
)
from qaroma.method.dequantise import dense_weight
from qaroma.method.growth import GrowthEvent, GrowthSettings, GrowthState, Measurement
from qaroma.method.joint import JointController
from qaroma.method.on_adapter import AdapterMethod, FactorTrainer
from qaroma.method.pieces import Pieces, every_piece
from qaroma.method.probe import GradientProbe
from qaroma.method.schedule import cosine, jagged_cosine, warm_cosine


class GrowthController(AdapterMethod):
    """Trains an adapter by AROMA (Algorithm 1), one call of :meth:`step` after each backward pass.

    Usable in any loop::

        adapter = attach(model)
        growth = GrowthController(adapter, GrowthSettings(t_in=40, ...), learning_rate=1e-2, total_steps=500)
        for batch in batches:
            loss(model, batch).backward()
            events = growth.step()
            if growth.finished:
                break

    With ``init="gradient"`` new components ask for gradients of their own before the step::

        while growth.probing:
            loss(model, batch).backward()
            growth.probe()

    Without criteria (``settings.criteria``) this is ReLoRA.

    Args:
        adapter: as :func:`qaroma.attach` returns it; its first components are begun here.
        settings: of the two loops.
        learning_rate: peak of the jagged cosine.
        total_steps: step budget T.
        optimizer: of the factors, one of :data:`~qaroma.method.optimiser.OPTIMIZERS`.
        weight_decay, max_grad_norm: of the optimiser.
        head: parameters trained in full beside the adapter until the last module is done.
        head_learning_rate: peak of their cosine, which no reinit interrupts; None is ``learning_rate``.
        pieces: which rows of a weight are summed at the beginning, where its norm is asked for.
    """

    def __init__(
        self,
        adapter: Adapter,
        settings: GrowthSettings,
        *,
        learning_rate: float,
        total_steps: int,
        optimizer: str = "adamw",
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        head: Sequence[nn.Parameter] = (),
        head_learning_rate: float | None = None,
        pieces: Pieces = every_piece,
    ) -> None:
        self.adapter, self.settings = adapter, settings
        self.name = "aroma" if settings.criteria else "relora"
        self.head_peak = head_learning_rate or learning_rate
        self.peak, self.total_steps, self.learning_rate = learning_rate, total_steps, 0.0
        self.growth = GrowthState.start(list(adapter.layers), settings, adapter.inner_rank)
        for name, layer in adapter.layers.items():  # what an adapter brought counts towards max_rank
            self.growth.modules[name].frozen_rank = layer.frozen_rank
        self._rows = {name: row for row, name in enumerate(adapter.layers)}
        self._weighs = settings.criteria and settings.outer_criterion == "weight"
        self._weight_norm_sq = self._initial_weight_norms(pieces)
        self._previous: dict[str, tuple[Tensor, Tensor]] = {}  # factors at the last check, criterion "product"
        self.trainer = FactorTrainer(
            adapter,
            head=head,
            optimizer=optimizer,
            max_grad_norm=max_grad_norm,
            weight_decay=weight_decay,
            max_update=settings.max_update,
        )

        self._probe = GradientProbe(adapter)
        self._begun(list(adapter.layers))

    @classmethod
    def build(cls, attached: Adapter, options: MethodOptions, head: Sequence[nn.Parameter] = ()) -> AdapterMethod:
        if isinstance(options.growth, BudgetSettings):
            return JointController(attached, options.growth, head=head, **options.of_factors())
        if options.growth is None:
            raise ValueError("got no growth settings; expected GrowthSettings for a method that grows")
        return cls(attached, options.growth, head=head, **options.of_factors())

    @property
    def finished(self) -> bool:
        return self.growth.finished

    @property
    def probing(self) -> bool:
        """Whether components have begun whose A the next gradients are to choose (``init="gradient"``)."""
        return self._probe.pending

    def probe(self) -> None:
        """Use one backward pass to choose where new components begin; zeroes all gradients.

        The model's output, the other factors and the optimiser's moments stay as they are.
        """
        self._probe.advance()
        self.zero_grad()

    def learning_rates(self) -> dict[str, list[float]]:
        """Learning rate of each active component's next update, by module, oldest first."""
        s = self.settings
        settled = self.peak * cosine(
            self.growth.step, total=self.total_steps, warmup=s.warmup, min_ratio=s.min_lr_ratio
        )
        rates = {}
        for name in self.growth.active():
            module = self.growth.modules[name]
            newest = self.peak * jagged_cosine(
                self.growth.step,
                module.age,
                first=module.component == 1,
                total=self.total_steps,
                warmup=s.warmup,
                restart_warmup=s.restart_warmup,
                min_ratio=s.min_lr_ratio,
            )
            # An older component has had its warm-up: an inner loop is longer than that.
            rates[name] = [settled] * (len(self.adapter.layers[name].active_components) - 1) + [newest]
        return rates

    def step(self, loss: float | None = None) -> list[GrowthEvent]:
        """Clip, update, zero the gradients; check and grow where that is due.

        A check synchronises with the device once, for all modules together.

        Returns:
            The growth events of this step, often none.

        Raises:
            RuntimeError: components that wait for :meth:`probe`.
        """
        if self.probing:
            raise RuntimeError("new components wait for their direction: call probe() after a backward pass, twice")
        rates = self.learning_rates()
        self.learning_rate = max((rate for of_module in rates.values() for rate in of_module), default=0.0)
        s = self.settings
        of_head = warm_cosine(self.growth.step, total=self.total_steps, warmup=s.warmup, min_ratio=s.min_lr_ratio)
        self.trainer.update(rates, self.head_peak * of_head)
        due = self.growth.tick()
        if not due or self.growth.step >= self.total_steps:  # a component begun now would never train
            return []
        events = self.growth.observe(self._measure(due)) if self.settings.criteria else self.growth.advance(due)
        self._carry_out(events)
        return events

    def finish(self) -> list[GrowthEvent]:
        """The step budget is spent: keep every active component, rounded as the forward pass uses it."""
        events = self.growth.finish()
        self._carry_out(events)
        return events

    def _initial_weight_norms(self, pieces: Pieces) -> Tensor:
        """``||W0 + frozen||_F^2`` of every layer, fp64 on the device, as the compute dtype holds it.

        Zeros where no criterion asks for it.
        """
        norms = []
        for layer in self.adapter.layers.values():
            if not self._weighs:
                norms.append(torch.zeros((), dtype=torch.float64, device=layer.A.device))
                continue
            W_MN = dense_weight(layer.base, layer.A.dtype)
            A, B = layer.frozen_factors()
            norm = dense_norm_sq(W_MN, pieces)
            if len(A):
                norm = norm + 2 * dense_inner_product(W_MN, A, B, pieces) + product_norm_sq(A, B)
            norms.append(norm)
        return torch.stack(norms)

    @torch.no_grad()
    def _measure(self, names: list[str]) -> dict[str, Measurement]:
        """Both criteria's norms of these modules, with a single copy to the host."""
        squares = []
        for name in names:
            layer = self.adapter.layers[name]
            A, B = layer.newest_factors()
            change = torch.full((), torch.nan, dtype=torch.float64, device=A.device)
            if self.settings.inner_criterion == "product":
                if name in self._previous:
                    change = change_norm_sq(A, B, *self._previous[name])
                self._previous[name] = (A.clone(), B.clone())
            squares += [product_norm_sq(A, B), self._beside(name), change]
        # Rounding can leave the running square of a weight that its update cancels just below zero.
        values = torch.stack(squares).clamp_min(0.0).sqrt().view(-1, 3).tolist()
        for name, (norm, beside, _) in zip(names, values, strict=True):
            if not math.isfinite(norm + beside):
                raise QaromaError(
                    f"the components of {name} are no longer finite numbers (size {norm}, beside {beside}); "
                    "go on from the checkpoint before with a smaller --learning-rate"
                )
        return {
            name: Measurement(norm, beside, None if change != change else change)
            for name, (norm, beside, change) in zip(names, values, strict=True)
        }

    def _beside(self, name: str) -> Tensor:
        """The square of what the outer criterion compares a module's newest component with."""
        layer = self.adapter.layers[name]
        if not self._weighs:
            return product_norm_sq(*layer.earlier_factors())
        frozen = self._weight_norm_sq[self._rows[name]]
        start = layer.frozen_rank
        A, B = (factor[start:] for factor in layer.earlier_factors())
        return frozen + self._norm_sq_gain(name, A, B) if len(A) else frozen

    @torch.no_grad()
    def _carry_out(self, events: list[GrowthEvent]) -> None:
        """Merge, reinit and reset where a component was committed; give back where a module is done."""
        committed = [e.module for e in events if e.decision == "commit"]
        if self._weighs:
            for name in committed:
                self._weight_norm_sq[self._rows[name]] += self._freezing_gain(name)
        self.trainer.begin(
            dict.fromkeys(committed, self.adapter.inner_rank), window=self.settings.window, reset=self.settings.reset
        )
        for event in events:
            self._previous.pop(event.module, None)
        self.trainer.end({e.module: e.decision == "keep" for e in events if e.decision != "commit"})
        self._begun(committed)

    def _begun(self, names: list[str]) -> None:
        if self.settings.init == "gradient":
            self._probe.begin(names)

    def _freezing_gain(self, name: str) -> Tensor | float:
        """What the components that freeze as the next one begins add to a module's ``||W||^2``."""
        layer = self.adapter.layers[name]
        rows = sum(layer.active_components[: layer.freezing(self.settings.window)])
        A, B = (factor[:rows] for factor in layer.active_factors())
        return self._norm_sq_gain(name, A, B) if rows else 0.0

    def _norm_sq_gain(self, name: str, A: Tensor, B: Tensor) -> Tensor:
        """``||W + B A||^2 - ||W||^2`` with W the base and its frozen components; W0 goes through the quantised weight.

        Args:
            name: of the module.
            A, B: (K, N) and (K, M) factors of components that are not frozen, the scale folded into B.
        """
        layer = self.adapter.layers[name]
        cross = dense_inner_product(dense_weight(layer.base, layer.A.dtype), A, B)
        return 2 * (cross + inner_product(A, B, *layer.frozen_factors())) + product_norm_sq(A, B)

    def state(self) -> MethodState:
        """What a checkpoint must hold; a probe that is half done begins again."""
        self._probe.rewind()
        state = self.trainer.state()
        tensors = {**state.tensors, "weight_norm_sq": self._weight_norm_sq}
        for name, (A, B) in self._previous.items():
            tensors[f"previous.{name}.A"], tensors[f"previous.{name}.B"] = A, B
        return MethodState(tensors, {**state.values, "growth": self.growth.to_json(), "probing": self._probe.names})

    def load_state(self, state: MethodState) -> None:
        self.trainer.load_state(state)
        self.growth.load_json(state.values["growth"])
        self._probe.begin(state.values["probing"])
        self._weight_norm_sq.copy_(state.tensors["weight_norm_sq"])
        self._previous = {
            name: (state.tensors[f"previous.{name}.A"].to(layer.A), state.tensors[f"previous.{name}.B"].to(layer.A))
            for name, layer in self.adapter.layers.items()
            if f"previous.{name}.A" in state.tensors
        }
