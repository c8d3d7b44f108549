"""`qaroma compare --suite growth`: the oracle's choice, the tables' arithmetic, and cells that go on after a kill."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qaroma.compare.suite import bytemodel, oracle, tables
from qaroma.compare.suite.beds import CHOOSING_SEEDS, Bed, Place, all_beds, choose_beds
from qaroma.compare.suite.bytebeds import random_pairs
from qaroma.compare.suite.cells import Cell, Results
from qaroma.compare.suite.cost import measure
from qaroma.compare.suite.figures import Deficit, deficit, interval, overall, spearman
from qaroma.compare.suite.ladder import smallest
from qaroma.compare.suite.planted import learnt_ranks, planted_ranks
from qaroma.compare.suite.pool import Pool
from qaroma.compare.suite.suite import run_suite, wanted, write_tables
from qaroma.compare.suite.trial import carry_out
from qaroma.compare.suite.view import View
from qaroma.errors import QaromaError


def bed(name: str = "planted") -> Bed:
    return next(b for b in all_beds() if b.name == name)


TEXT = bed("text-siqa-240")


def bowl(best_rank: int, best_rate: float):
    """Losses with one valley in (log rank, log rate), and some noise that the seed decides."""

    def loss(cell: Cell) -> float:
        assert cell.rate is not None
        rank = int(cell.arm.removeprefix("lora:"))
        return 2 + 0.1 * abs(math.log2(rank / best_rank)) + 0.1 * abs(math.log2(cell.rate / best_rate))

    return loss


# The oracle.


@pytest.mark.parametrize(("rank", "rate"), [(8, 8e-3), (1, 2e-3), (32, 3.2e-2), (16, 4e-3)])
def test_the_oracle_finds_the_valley_in_few_runs_wherever_it_lies(rank: int, rate: float) -> None:
    known: dict[Cell, float] = {}
    while (found := oracle.search(TEXT, known.get)).best is None:
        assert found.wanted
        known.update({cell: bowl(rank, rate)(cell) for cell in found.wanted})
    assert (found.best.arm, found.best.rate) == (f"lora:{rank}", pytest.approx(rate))
    assert len(known) <= 30
    assert {cell.seed for cell in known} == set(CHOOSING_SEEDS)
    assert not set(CHOOSING_SEEDS) & set(TEXT.fresh_seeds)


def test_a_dear_bed_searches_the_rates_of_three_ranks_alone() -> None:
    dear, known = bed("minilm-mrpc"), {}
    while (found := oracle.search(dear, known.get)).best is None:
        known.update({cell: bowl(4, 1e-3)(cell) for cell in found.wanted})
    assert found.best.arm == "lora:4"
    assert len({cell.rate for cell in known if cell.arm == "lora:32"}) == 1


def test_a_rate_that_diverges_is_not_chosen() -> None:
    known: dict[Cell, float] = {}
    while (found := oracle.search(TEXT, known.get)).best is None:
        known.update({c: math.inf if (c.rate or 0) > 5e-3 else bowl(8, 8e-3)(c) for c in found.wanted})
    assert found.best.rate == pytest.approx(4e-3)


def test_the_smallest_rank_is_found_by_halving(tmp_path: Path) -> None:
    results, rung = Results(tmp_path), bed("ladder-256")
    while (found := smallest(rung, results)).wanted:
        for cell in found.wanted:
            results.put(cell, {"score": 1.0 if int(cell.arm.removeprefix("lora:")) >= 4 else 0.8})
    assert found.cell is not None
    assert found.cell.arm == "lora:4"
    assert len(list(tmp_path.rglob("*.json"))) == 4  # 8, 2 at two rates, 4


# Arithmetic.


def test_deficits_are_paired_and_in_one_unit() -> None:
    worse = deficit(TEXT, {0: 1.02, 1: 2.02, 7: 9.0}, {0: 1.0, 1: 2.0, 2: 5.0})
    assert worse is not None
    assert (worse.mean, worse.count) == (pytest.approx(1.5), 2)
    assert worse.error == pytest.approx(0.5)
    points = deficit(bed("minilm-mrpc"), {0: 0.70}, {0: 0.72})
    assert points == Deficit(pytest.approx(2.0), None, 1)
    assert deficit(TEXT, {0: 1.0}, {1: 1.0}) is None


def test_too_much_is_a_point_and_two_standard_errors() -> None:
    assert Deficit(1.2, 0.5, 3).too_much
    assert not Deficit(1.2, 0.7, 3).too_much
    assert not Deficit(0.9, 0.1, 3).too_much


def test_every_bed_counts_once_in_the_mean() -> None:
    whole = overall([Deficit(1.0, 0.3, 5), Deficit(-0.5, 0.4, 3)])
    assert whole is not None
    assert (whole.mean, whole.error) == (0.25, pytest.approx(0.25))


def test_rank_correlation_and_the_interval_of_ratios() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 1, 2, 2], [1, 1, 5, 5]) == pytest.approx(1)
    assert spearman([1, 2, 3], [5, 5, 5]) == 0
    assert interval([1.1, 1.1]) == (pytest.approx(1.1), pytest.approx(1.0))


# Beds and cells.


def test_a_beginning_names_several_beds_and_what_is_not_there_is_said(tmp_path: Path) -> None:
    there, lacking = choose_beds("planted,text", tmp_path)
    assert [b.name for b in there] == ["planted"]
    assert len(lacking) == 6
    assert "name the folder that holds it with --data" in lacking[0]
    with pytest.raises(QaromaError, match=r"got the bed 'text-'; expected some of text-siqa-240"):
        choose_beds("text-", tmp_path)


def test_cells_have_files_of_their_own() -> None:
    cells = [Cell("b", "lora:8", 0, 1e-3), Cell("b", "lora:8", 0, 2e-3), Cell("b", "lora:8", 1, 1e-3),
             Cell("b", "aroma", 0), Cell("b", "aroma", 0, factor=3.0), Cell("b", "aroma", 0, cost=True),
             Cell("b", "aroma+growth.init=gradient", 0)]  # fmt: skip
    assert len({cell.file() for cell in cells}) == len(cells)


def test_random_pairs_differ_in_every_question() -> None:
    pairs = random_pairs(300, 3)
    assert pairs.shape == (300, 13)
    assert len(torch.unique(pairs[:, :8], dim=0)) == 300
    assert torch.equal(pairs, random_pairs(300, 3))


def test_learnt_ranks_count_directions_of_the_planted_size() -> None:
    assert sorted(set(planted_ranks(0))) == list(range(9))
    A, B = 2 * torch.eye(3, 64), torch.eye(3, 64)
    found = learnt_ranks({"a": (A, B), "b": (A[:0], B[:0]), "c": (0.1 * A, B)}, [3, 0, 1])
    assert (found["learnt"], found["given"]) == ([3, 0, 0], [3, 0, 3])


@pytest.fixture
def place(tmp_path: Path) -> Place:
    rows = [{"instruction": f"What is {n} and {n}?", "output": f"It is {2 * n}."} for n in range(2000)]
    for file in ("instruct/lima.json", "commonsense/social_i_qa/train_1k.json"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(json.dumps(rows))
    return Place(tmp_path, tmp_path / "cache")


@pytest.mark.parametrize("arm", ["lora:4", "aroma"])
@pytest.mark.parametrize("name", ["text-siqa-240", "ladder-64", "planted"])
def test_a_cell_trains_and_is_scored_alike_each_time(
    place: Place, name: str, arm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(bytemodel._PRETRAINING, "steps", 2)
    short = replace(bed(name), steps=8)
    cell = Cell(name, arm, 0, 1e-2 if arm == "lora:4" else None)
    figures = carry_out(cell, short, place)
    assert figures["steps"] == 8
    assert math.isfinite(figures["score"])
    assert (len(figures["validations"]) > 0) == cell.grows
    assert carry_out(cell, short, place)["score"] == figures["score"]
    json.dumps(figures)


def test_the_cost_is_measured_in_turns(place: Place) -> None:
    figures = measure(Cell("planted", "aroma", 0, cost=True), replace(bed(), steps=50), place)
    assert len(figures["ratios"]) == 2
    assert all(ratio > 0 for ratio in figures["ratios"])


# The whole.


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    view = View([bed()], Results(tmp_path), "aroma", (0, 1))
    chosen = {"planted": tables.TABLES["planted"]}
    cells = wanted(view, list(chosen.values()))
    assert [(cell.arm, cell.seed) for cell in cells] == [("aroma", 0), ("aroma", 1)]
    planted, learnt = [0, 4, 8], [0, 4, 7]
    view.results.put(cells[0], {"score": 0.1, "planted": planted, "learnt": learnt, "given": learnt})
    again = View([bed()], Results(tmp_path), "aroma", (0, 1))
    assert wanted(again, list(chosen.values())) == [cells[1]]
    written = write_tables(again, chosen, [], "qaroma compare --suite growth")
    assert "| 0 | 1.00 | 0.33 | 1.00 |" in written["table"]
    assert (tmp_path / "table.md").is_file()


def test_a_suite_wants_a_folder(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("{}")
    for data in ("data.jsonl", "missing"):
        with pytest.raises(QaromaError, match="there is no folder"):
            run_suite(folder=str(tmp_path / "out"), data=str(tmp_path / data), command="qaroma compare")
    assert not (tmp_path / "out").exists()


def test_a_worker_ends_with_its_input_in_the_midst_of_a_cell(tmp_path: Path) -> None:
    cell = json.dumps(Cell("planted", "aroma", 0).to_json()) + "\n"
    command = [sys.executable, "-m", "qaroma.compare.suite.worker", str(tmp_path), str(tmp_path)]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    said, _ = worker.communicate(cell, timeout=60)
    assert (said, worker.returncode) == ("", 0)
    assert Results(tmp_path).get(Cell("planted", "aroma", 0)) is None


def test_the_oracle_table_pairs_fresh_seeds(tmp_path: Path) -> None:
    results = Results(tmp_path)
    view = View([TEXT], results, "aroma", (0, 1, 2))
    table = tables.TABLES["oracle"]
    figures = {"ended": "budget", "rank": 8.0, "rank_over_steps": 8.0, "parameters": 100, "seconds": 2.0}
    while cells := wanted(view, [table]):
        for cell in cells:
            score = 2.2 if cell.grows else bowl(16, 8e-3)(cell)
            results.put(cell, {**figures, "score": score, "score_best": score})
    rows, said, values = table.rows(view)
    assert rows[1][:3] == ["text-siqa-240", "choose", "r 16 at 0.008"]
    assert rows[1][5] == "+10.00 ± 0.00 (too much)"
    assert values[0]["deficit_to_rank_8"][0] == pytest.approx(100 * 0.1 / 2.1)
    assert said[-1] == "Mean over all beds (1): +10.00 ± 0.00."


def test_a_failing_cell_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    results, said = Results(tmp_path), []
    cells = [Cell("nowhere", "lora:4", 0, 1e-3), Cell("nowhere", "aroma", 0)]
    failed = Pool(tmp_path, tmp_path, lambda: [c for c in cells if results.get(c) is None], said.append).run(1)
    assert set(failed) == set(cells)
    assert "KeyError: 'nowhere'" in failed[cells[0]]
    assert len(said) == 2
