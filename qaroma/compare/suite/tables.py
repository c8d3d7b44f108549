"""The tables: which cells each one still wants, and what it says of those that are done."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from qaroma.compare.statistics import mean
from qaroma.compare.suite import ladder, oracle
from qaroma.compare.suite.beds import Bed
from qaroma.compare.suite.cells import Cell, Figures
from qaroma.compare.suite.figures import Deficit, deficit, interval, overall, spearman
from qaroma.compare.suite.view import Rows, Table, View, average, endings, ours_cells, scores

WRONG_RATES = (1 / 3, 3.0)
ONE_AT_A_TIME = "+growth.schedule=lockstep"


def _oracle_arms(view: View, bed: Bed) -> tuple[oracle.Search, dict[str, dict[int, Cell]]]:
    """The search, and the fresh cells of growth, and of the oracle and of rank 8 once they are known."""
    found = oracle.search(bed, view.loss(bed))
    arms = {"ours": ours_cells(view, bed)}
    if found.best is not None:
        for arm, cell in (("oracle", found.best), ("rank 8", found.best_of_rank[oracle.FIRST])):
            arms[arm] = {seed: oracle.fresh(bed, cell, seed) for seed in view.seeds_of(bed)}
    return found, arms


def _plan_oracle(view: View) -> list[Cell]:
    wanted = []
    for bed in view.in_oracle():
        found, arms = _oracle_arms(view, bed)
        wanted += found.wanted
        wanted += [cells[seed] for seed in view.seeds_of(bed) for cells in arms.values()]
    return wanted


def _rows_oracle(view: View) -> Rows:
    head = ["bed", "half", "oracle", "its score", "growth", "deficit", "deficit to r 8", "rank: end", "over steps",
            "parameters / oracle", "time / oracle", "time / r 8", "ended"]  # fmt: skip
    rows, values, halves = [head], [], dict[str, list[Deficit]](choose=[], confirm=[])
    for bed in view.in_oracle():
        found, arms = _oracle_arms(view, bed)
        done = {arm: view.done(cells) for arm, cells in arms.items()}
        if found.best is None or not done["ours"] or not done["oracle"]:
            continue
        short = deficit(bed, scores(done["ours"], "score_best"), scores(done["oracle"]))
        to_eight = deficit(bed, scores(done["ours"], "score_best"), scores(done["rank 8"]))
        if short is None:
            continue
        halves[bed.half].append(short)
        ratios = {
            arm: average(done["ours"], "seconds") / average(done[arm], "seconds") if done[arm] else math.nan
            for arm in ("oracle", "rank 8")
        }
        share = average(done["ours"], "parameters") / average(done["oracle"], "parameters")
        rows.append([
            bed.name, bed.half, f"r {found.best.arm.removeprefix('lora:')} at {found.best.rate:g}",
            _score(done["oracle"], "score"), _score(done["ours"], "score_best"),
            f"{short}{' (too much)' if short.too_much else ''}", str(to_eight or "-"),
            f"{average(done['ours'], 'rank'):.1f}", f"{average(done['ours'], 'rank_over_steps'):.1f}",
            f"{share:.2f}", f"{ratios['oracle']:.2f}", f"{ratios['rank 8']:.2f}", endings(done["ours"]),
        ])  # fmt: skip
        values.append({
            "bed": bed.name, "half": bed.half, "oracle": found.best.to_json(), "deficit": short.mean,
            "error": short.error, "n": short.count, "too_much": short.too_much,
            "deficit_to_rank_8": None if to_eight is None else [to_eight.mean, to_eight.error],
            "last_instead_of_best": _mean_or_none(deficit(bed, scores(done["ours"]), scores(done["oracle"]))),
            "seconds": {arm: average(figures, "seconds") for arm, figures in done.items()},
            "rank_of_best_rate": {str(rank): cell.rate for rank, cell in found.best_of_rank.items()},
        })  # fmt: skip
    said = ["Deficit: how much worse growth is than the oracle on the same fresh seeds, mean ± standard error, in "
            "points of the metric or per cent of the oracle's loss; negative is better."]  # fmt: skip
    both = [*halves["choose"], *halves["confirm"]]
    for name, deficits in (("the beds to choose by", halves["choose"]), ("the others", halves["confirm"]),
                           ("all beds", both)):  # fmt: skip
        whole = overall(deficits)
        if whole is not None:
            said.append(f"Mean over {name} ({whole.count}): {whole}.")
    return rows, said, values


def _mean_or_none(found: Deficit | None) -> float | None:
    return None if found is None else found.mean


def _score(figures: Mapping[int, Figures], key: str) -> str:
    value = average(figures, key)
    return f"{value:.4f}"


def _plan_rate(view: View) -> list[Cell]:
    return [
        cell
        for bed in view.in_oracle()
        for factor in (1.0, *WRONG_RATES)
        for cell in ours_cells(view, bed, factor=factor).values()
    ]


def _rows_rate(view: View) -> Rows:
    rows, values = [["bed", "rate of auto", *(f"deficit at {factor:.2g} x" for factor in WRONG_RATES)]], []
    for bed in view.in_oracle():
        right = view.done(ours_cells(view, bed))
        wrong = [view.done(ours_cells(view, bed, factor=factor)) for factor in WRONG_RATES]
        found = [deficit(bed, scores(part, "score_best"), scores(right, "score_best")) for part in wrong]
        if right and any(found):
            rows.append([bed.name, f"{average(right, 'rate'):.3g}", *(str(d or "-") for d in found)])
            values.append({"bed": bed.name, "deficits": [_mean_or_none(d) for d in found]})
    return rows, ["Deficit to the run at auto's own rate."], values


def _plan_paper(view: View) -> list[Cell]:
    return [
        cell
        for bed in view.in_oracle()
        for more in ("", ONE_AT_A_TIME)
        for cell in ours_cells(view, bed, more=more).values()
    ]


def _rows_paper(view: View) -> Rows:
    rows: list[list[str]] = [["bed", "deficit to auto", "effective rank / rank", "of LoRA r 8's parameters: most",
                              "at the end", "ended"]]  # fmt: skip
    values = []
    for bed in view.in_oracle():
        one, auto = view.done(ours_cells(view, bed, more=ONE_AT_A_TIME)), view.done(ours_cells(view, bed))
        eight = view.done({s: oracle.fresh(bed, c, s) for s in view.seeds_of(bed) for c in _eights(view, bed)})
        if not one:
            continue
        reference = average(eight, "trainable_start")
        shares = [average(one, key) / reference for key in ("trainable_most", "trainable_end")]
        effective = average(one, "effective_share")
        short = deficit(bed, scores(one, "score_best"), scores(auto, "score_best"))
        rows.append([bed.name, str(short or "-"), f"{effective:.2f}", *(f"{s:.3f}" for s in shares), endings(one)])
        values.append({"bed": bed.name, "effective_share": effective, "parameter_shares": shares})
    return rows, ["Inner loops: one component of rank one of each module trains at a time."], values


def _eights(view: View, bed: Bed) -> list[Cell]:
    found = oracle.search(bed, view.loss(bed)).best_of_rank.get(oracle.FIRST)
    return [] if found is None else [found]


def _plan_planted(view: View) -> list[Cell]:
    return [cell for bed in view.of_kind("planted") for cell in ours_cells(view, bed).values()]


def _rows_planted(view: View) -> Rows:
    rows = [["seed", "learnt ranks: correlation", "mean error", "adapter's ranks: correlation", "mean error", "mean",
             "planted, mean"]]  # fmt: skip
    values = []
    for bed in view.of_kind("planted"):
        for seed, found in view.done(ours_cells(view, bed)).items():
            if found["score"] is None:
                continue
            planted, learnt, given = found["planted"], found["learnt"], found["given"]
            figures = [
                figure for ranks in (learnt, given) for figure in (spearman(planted, ranks), _error(planted, ranks))
            ]
            rows.append([str(seed), *(f"{figure:.2f}" for figure in [*figures, mean(given), mean(planted)])])
            values.append({"seed": seed, "correlation": figures[0], "error": figures[1], "given": given,
                           "learnt": learnt, "planted": planted})  # fmt: skip
    said = "Rank correlation (Spearman) and error of the numerical rank of what was learnt, and of the adapter's rank."
    return rows, [said], values


def _error(planted: Sequence[int], ranks: Sequence[int]) -> float:
    return mean([abs(a - b) for a, b in zip(planted, ranks, strict=True)])


def _plan_cost(view: View) -> list[Cell]:
    return [Cell(bed.name, view.ours, 0, cost=True) for bed in view.in_oracle()]


def _rows_cost(view: View) -> Rows:
    rows = [["bed", "step / LoRA's of the same rank", "rank", "ms, growth", "ms, LoRA", "growth's share of a run"]]
    values = []
    for bed in view.in_oracle():
        found = view.results.get(Cell(bed.name, view.ours, 0, cost=True))
        if found is None or not found["ratios"]:
            continue
        ratio, off = interval(found["ratios"])
        share = average(view.done(ours_cells(view, bed)), "growth_share")
        rows.append([bed.name, f"{ratio:.3f} ({ratio / off:.3f} to {ratio * off:.3f})", str(found["rank"]),
                     *(f"{ms:.1f}" for ms in found["milliseconds"]), f"{share:.3f}"])  # fmt: skip
        values.append({"bed": bed.name, "ratio": ratio, "factor": off, "growth_share": share})
    return rows, ["CPU seconds of one thread, turns of ten steps; the interval is two standard errors."], values


TABLES: dict[str, Table] = {  # by the name that --tables takes, in the order of the report
    "oracle": Table("The oracle test", _plan_oracle, _rows_oracle),
    "ladder": Table("The information ladder", ladder.plan, ladder.rows),
    "planted": Table("Planted ranks", _plan_planted, _rows_planted),
    "rate": Table("A wrong rate", _plan_rate, _rows_rate),
    "paper": Table("The paper's claims, one component at a time", _plan_paper, _rows_paper),
    "cost": Table("Cost", _plan_cost, _rows_cost),
}
