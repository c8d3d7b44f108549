"""The table of a comparison, as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from qaroma.compare.collect import MethodFigures
from qaroma.compare.verdict import Claim, number
from qaroma.config.metrics import metric_facts


def markdown(
    methods: Sequence[MethodFigures],
    reference: MethodFigures | None,
    claims: Sequence[Claim],
    *,
    command: str,
    machines: Sequence[str],
) -> str:
    """Table, verdict, and how it was measured.

    Args:
        methods: in the order of the rows.
        reference: what ratios are to; None leaves them out.
        claims: the verdict.
        command: what was typed.
        machines: a line about each machine that runs were measured on.
    """
    metric = next((run.metric for method in methods for run in method.runs), "metric")
    to = reference.spec.label if reference else "LoRA"
    scored = any(method.by_seed("exact_match") for method in methods)
    columns = ["method", "n", f"{metric}, last step", f"{metric}, best", *(["exact match"] if scored else []),
               "parameters: start", "mean", "end", f"most / {to}", f"mean / {to}", "rank, total", "effective rank",
               "effective / rank", "steps", "ended", f"time / {to}", f"memory / {to}"]  # fmt: skip
    rows = [_row(method, reference, scored) for method in methods]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    text = [
        *lines,
        "",
        f"{metric}: {metric_facts(metric).direction} is better; mean ± standard deviation over n seeds, on the whole "
        "validation set, after the last step and at the best checkpoint. Parameters are the trainable ones of the "
        "adapter, a head left out; most / and mean / are the largest number at any moment and the mean over the run's "
        f"steps, beside {to}'s. Ranks are sums over the modules of the best adapter. Time is the median step times the "
        "steps.",
        "",
        "Claims that the paper makes of its method (aroma+preset=paper), held against every aroma here:",
        "",
        *(f"- ({claim.key}) {claim.method}: **{claim.outcome}**: {claim.text}" for claim in claims),
        "",
    ]
    lacking = [f"- {m.spec.label}, seed {seed}: {why}" for m in methods for seed, why in m.failed.items()]
    if lacking:
        text += ["Missing", "", *lacking, ""]
    text += ["Measured on", "", *(f"- {machine}" for machine in machines), ""] if machines else []
    text += ["```", command, "```", ""]
    return "\n".join(text)


def _row(method: MethodFigures, reference: MethodFigures | None, scored: bool) -> list[str]:
    ended = Counter(run.ended for run in method.runs)
    return [
        method.spec.label,
        str(len(method.runs)),
        _spread(method, "last"),
        _spread(method, "best"),
        *([_spread(method, "exact_match")] if scored else []),
        *(_count(method.mean(f"parameters_{when}")) for when in ("start", "mean", "end")),
        _ratio(method.most_against(reference)),
        _ratio(method.ratio("parameters_mean", reference)),
        _amount(method.mean("rank")),
        _amount(method.mean("effective_rank")),
        _ratio(method.mean("effective_share")),
        _amount(method.mean("steps")),
        ", ".join(f"{how} x {count}" if count > 1 else how for how, count in ended.items()) or "-",
        _ratio(method.ratio("seconds", reference)),
        _ratio(method.ratio("memory_bytes", reference)),
    ]


def _spread(method: MethodFigures, key: str) -> str:
    spread = method.deviation(key)
    return number(method.mean(key)) + (f" ± {spread:.2g}" if spread is not None else "")


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _amount(value: float | None) -> str:
    return number(value) if value is None or value < 1000 else _count(value)


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
