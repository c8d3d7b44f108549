"""The growth state machine: when to check, when to commit, when to stop.

Takes numbers and gives decisions; it knows no tensor and no model, so that its rules can be tested
by themselves. The controller (:mod:`qaroma.method.aroma`) measures and carries out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Decision = Literal["commit", "done", "keep"]


@dataclass(frozen=True, kw_only=True)
class GrowthSettings:
    """Every choice of the two loops, resolved (``qaroma.config.schema.GrowthSection`` explains each).

    ``inner_criterion`` ``fixed`` lets every inner loop last ``t_in`` steps, as all of the reference's did.
    ``window`` is how many of a module's newest components train: 1 is the paper's, None is all of them.
    ``criteria`` False is ReLoRA (Lialin et al., 2023): nothing is measured, and every component
    commits after exactly ``t_in`` steps.

    Raises:
        ValueError: a value outside its range, or a warm-up that leaves no step before ``t_in``.
    """

    t_in: int
    check_every: int = 10
    eps_in: float = 0.1
    eps_out: float = 1e-3
    inner_criterion: Literal["norm", "product", "fixed"] = "norm"
    outer_criterion: Literal["weight", "update"] = "weight"
    criteria: bool = True
    init: Literal["kaiming", "gradient"] = "kaiming"
    schedule: Literal["lockstep", "independent"] = "lockstep"
    on_converged: Literal["discard", "keep"] = "discard"
    reset: Literal["prune", "full", "none"] = "prune"
    check_first: bool = True
    max_rank: int | None = None
    window: int | None = 1
    warmup: int = 100
    restart_warmup: int = 50
    min_lr_ratio: float = 0.1
    max_update: float | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"at least one component trains, got a window of {self.window}")
        if self.t_in < 1 or self.check_every < 1:
            raise ValueError(f"t_in and check_every must be at least 1, got {self.t_in} and {self.check_every}")
        if max(self.warmup, self.restart_warmup) >= self.t_in:
            raise ValueError(
                f"an inner loop of t_in = {self.t_in} steps must be longer than its warm-ups "
                f"(warmup {self.warmup}, restart_warmup {self.restart_warmup})"
            )


@dataclass(frozen=True)
class Measurement:
    """What a check needs to know of one module.

    ``norm`` is ||s B_p A_p||. ``beside`` is what the outer criterion compares it with:
    ||W0 + s sum_{q<p} B_q A_q|| (``weight``) or ||s sum_{q<p} B_q A_q|| (``update``). ``change`` is the
    norm of the product's change since the last check (criterion ``product``; None at the first check).
    """

    norm: float
    beside: float
    change: float | None = None


@dataclass(frozen=True)
class GrowthEvent:
    """The end of one component's inner loop.

    ``inner`` and ``outer`` are the left-hand sides of eq. 5 and eq. 6; None where nothing was there to
    compare with, or nothing was measured. ``decision``: ``commit`` the
    component froze and the next one began; ``done`` it was discarded and the module trains no more;
    ``keep`` it stays as the module's last one.
    """

    step: int
    module: str
    component: int
    inner: float | None
    outer: float | None
    decision: Decision

    def to_json(self) -> dict[str, Any]:
        return {"event": "growth", **asdict(self)}


@dataclass
class ModuleState:
    """Where one module stands. ``component`` counts from 1; ``age`` is steps since it began."""

    component: int = 1
    frozen_rank: int = 0
    age: int = 0
    converged: bool = False
    done: bool = False
    reference: float | None = None  # norm at the last check
    inner: float | None = None
    outer: float | None = None


@dataclass
class GrowthState:
    """All modules of a run (Algorithm 1 of the paper).

    Args:
        settings: the choices.
        inner_rank: rank r of a component.
        modules: name -> state, in model order.
    """

    settings: GrowthSettings
    inner_rank: int
    modules: dict[str, ModuleState] = field(default_factory=dict)
    step: int = 0

    @classmethod
    def start(cls, names: Sequence[str], settings: GrowthSettings, inner_rank: int) -> GrowthState:
        return cls(settings, inner_rank, {name: ModuleState() for name in names})

    @property
    def finished(self) -> bool:
        """Whether every module is done."""
        return all(m.done for m in self.modules.values())

    @property
    def _checks_inner(self) -> bool:
        return self.settings.criteria and self.settings.inner_criterion != "fixed"

    def active(self) -> list[str]:
        return [name for name, m in self.modules.items() if not m.done]

    def tick(self) -> list[str]:
        """Count one optimiser step; returns the modules whose check is due now.

        A check is due every ``check_every`` steps of a component after its warm-up, and at ``t_in``;
        without an inner criterion at ``t_in`` alone.
        """
        self.step += 1
        due = []
        for name in self.active():
            module = self.modules[name]
            module.age += 1
            warm = module.age > (self.settings.warmup if module.component == 1 else self.settings.restart_warmup)
            between = self._checks_inner and warm and module.age % self.settings.check_every == 0
            if between or module.age >= self.settings.t_in:
                due.append(name)
        return due

    def observe(self, measured: Mapping[str, Measurement]) -> list[GrowthEvent]:
        """Take one check's measurements; returns the decisions that follow from them.

        In ``lockstep`` nothing is decided until the inner loop of every active module has ended;
        a module that converged earlier goes on training and stays converged.
        """
        for name, measurement in measured.items():
            self._check_inner(self.modules[name], measurement)
        ready = {name for name in measured if self._inner_ended(self.modules[name])}
        if self.settings.schedule == "lockstep" and len(ready) < len(self.active()):
            return []
        return [self._decide(name, self.modules[name]) for name in self.active() if name in ready]

    def advance(self, due: Sequence[str]) -> list[GrowthEvent]:
        """Without criteria: the next component of these modules begins, whatever became of the last."""
        return [self._proceed(name, self.modules[name]) for name in due]

    def finish(self) -> list[GrowthEvent]:
        """The step budget is spent: every active component is kept, but for one that has not had a step."""
        return [
            self._end(name, self.modules[name], "keep" if self.modules[name].age else "done") for name in self.active()
        ]

    def _check_inner(self, module: ModuleState, measured: Measurement) -> None:
        """Eq. 5 (or its ``product`` form); the first check of a component only records the norm."""
        before, module.reference = module.reference, measured.norm
        # Beside nothing every size is without measure, but no size at all is small.
        module.outer = _ratio(measured.norm, measured.beside) if measured.beside or not measured.norm else None
        if before is None or not self._checks_inner:
            return
        if self.settings.inner_criterion == "product":
            assert measured.change is not None
            module.inner = _ratio(measured.change, before)
        else:
            module.inner = _ratio(measured.norm - before, before)
        module.converged = module.converged or module.inner < self.settings.eps_in

    def _inner_ended(self, module: ModuleState) -> bool:
        return module.converged or module.age >= self.settings.t_in

    def _decide(self, name: str, module: ModuleState) -> GrowthEvent:
        """Eq. 6: a component that is small beside its weight, or its update, ends its module's growth.

        Beside others that train with it a component is not discarded: they have learnt to rely on it.
        """
        checked = self.settings.check_first or module.component > 1
        if checked and module.outer is not None and module.outer < self.settings.eps_out:
            discarded = self.settings.on_converged == "discard" and self.settings.window == 1
            return self._end(name, module, "done" if discarded else "keep")
        return self._proceed(name, module)

    def _proceed(self, name: str, module: ModuleState) -> GrowthEvent:
        """Commit, unless the next component would not fit ``max_rank``."""
        limit = self.settings.max_rank
        if limit is not None and module.frozen_rank + 2 * self.inner_rank > limit:
            return self._end(name, module, "keep")
        event = self._event(name, module, "commit")
        self.modules[name] = ModuleState(module.component + 1, module.frozen_rank + self.inner_rank)
        return event

    def _end(self, name: str, module: ModuleState, decision: Decision) -> GrowthEvent:
        module.done = True
        if decision == "keep":
            module.frozen_rank += self.inner_rank
        return self._event(name, module, decision)

    def _event(self, name: str, module: ModuleState, decision: Decision) -> GrowthEvent:
        return GrowthEvent(self.step, name, module.component, module.inner, module.outer, decision)

    def to_json(self) -> dict[str, Any]:
        """Everything but the settings, as JSON values; floats survive exactly."""
        return {"step": self.step, "modules": {name: asdict(m) for name, m in self.modules.items()}}

    def load_json(self, state: Mapping[str, Any]) -> None:
        self.step = state["step"]
        self.modules = {name: ModuleState(**m) for name, m in state["modules"].items()}


def _ratio(numerator: float, denominator: float) -> float:
    """numerator / denominator, where 0 / 0 (a layer that no token has reached) counts as no change."""
    if denominator:
        return numerator / denominator
    return math.copysign(math.inf, numerator) if numerator else 0.0
