"""The claims that AROMA makes, held against a comparison's figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qaroma.compare.collect import REFERENCE_RANK, MethodFigures
from qaroma.compare.statistics import difference
from qaroma.config.metrics import metric_facts

MOST_SHARE, MEAN_SHARE = 1 / 8, 1 / 16  # of LoRA's trainable parameters: at every moment, on average
EFFECTIVE_SHARE = 0.9


@dataclass(frozen=True)
class Claim:
    """One claim about one method.

    Attributes:
        key: a, b or c.
        method: label of the method that it is about.
        held: whether the figures bear it out; None where they do not tell.
        text: the claim and the numbers, one sentence.
    """

    key: str
    method: str
    held: bool | None
    text: str

    @property
    def outcome(self) -> str:
        return {True: "held", False: "not held", None: "left open"}[self.held]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def verdict(methods: Sequence[MethodFigures]) -> list[Claim]:
    """The three claims for every variant of AROMA that was run.

    (a) its metric is LoRA's and AdaLoRA's of rank 8 within noise: the difference of the means is at least
    minus one standard error; (b) it trains at most 1/8 of that LoRA's parameters at every moment and 1/16
    on average; (c) its effective rank is at least 0.9 of its rank. Where several variants of a baseline
    were run, (a) is against the best of them. Claims whose methods are missing are left open, saying so.
    """
    done = [m for m in methods if m.runs]
    ours = [m for m in done if m.family == "aroma"]
    if not ours:
        return [Claim(key, "aroma", None, "aroma was not run; add it to --methods") for key in "abc"]
    loras = [m for m in done if m.family == "lora" and m.spec.rank == REFERENCE_RANK]
    adaloras = [m for m in done if m.family == "adalora" and m.spec.rank == REFERENCE_RANK]
    claims = []
    for method in ours:
        claims += [_metric(method, "lora", loras), _metric(method, "adalora", adaloras)]
        claims += [_parameters(method, loras), _effective(method, adaloras)]
    return claims


def _metric(ours: MethodFigures, family: str, others: Sequence[MethodFigures]) -> Claim:
    values, label = ours.by_seed("last"), ours.spec.label
    scored = [m for m in others if m.by_seed("last")]
    if not values:
        return Claim("a", label, None, "no validation data: there is no metric to compare")
    if not scored:
        return Claim("a", label, None, f"{family}:{REFERENCE_RANK} was not run; add it to --methods")
    metric = ours.runs[0].metric
    facts = metric_facts(metric)
    sign = 1.0 if facts.higher_is_better else -1.0
    best = max(scored, key=lambda m: sign * (m.mean("last") or 0.0))
    found = difference(values, best.by_seed("last"))
    how = "paired by seed" if found.paired else "not paired"
    numbers = f"{metric} {number(ours.mean('last'))} against {number(best.mean('last'))} of {best.spec.label}"
    if found.error is None:
        return Claim("a", label, None, f"{numbers}: one run of each cannot tell a difference from noise")
    numbers += f": difference {found.mean:+.4g}, standard error {found.error:.2g} ({how}, n = {found.count})"
    return Claim("a", label, sign * found.mean >= -found.error, f"{numbers}; {facts.direction} is better")


def _parameters(ours: MethodFigures, loras: Sequence[MethodFigures]) -> Claim:
    label = ours.spec.label
    if not loras:
        return Claim("b", label, None, f"lora:{REFERENCE_RANK} was not run; add it to --methods")
    most, average = ours.most_against(loras[0]), ours.ratio("parameters_mean", loras[0])
    assert most is not None
    assert average is not None
    text = (
        f"trainable parameters are at most {share(most)} of {loras[0].spec.label}'s at any moment (claim: 1/8) "
        f"and {share(average)} on average (claim: 1/16)"
    )
    return Claim("b", label, most <= MOST_SHARE and average <= MEAN_SHARE, text)


def _effective(ours: MethodFigures, adaloras: Sequence[MethodFigures]) -> Claim:
    value = ours.mean("effective_share")
    theirs = adaloras[0].mean("effective_share") if adaloras else None
    beside = f"; {adaloras[0].spec.label}'s is {theirs:.3f}" if theirs is not None else "; no AdaLoRA beside it"
    if value is None:
        return Claim("c", ours.spec.label, None, f"no component was kept: there is no rank to divide by{beside}")
    text = f"effective rank / rank is {value:.3f} (claim: at least {EFFECTIVE_SHARE}){beside}"
    return Claim("c", ours.spec.label, value >= EFFECTIVE_SHARE, text)


def number(value: float | None) -> str:
    """Four significant digits, or a dash."""
    return "-" if value is None else f"{value:.4g}"


def share(value: float) -> str:
    """A share as a fraction of one, where it is one."""
    return f"{value:.3f} (1/{1 / value:.1f})" if 0 < value <= 1 else f"{value:.3f}"
