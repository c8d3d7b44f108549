"""The quickstart's task: seeded, exact, and split by argument combinations."""

from __future__ import annotations

import json
from collections import Counter
from typing import Literal

import pytest

from qaroma.data.demo import TEST_ROWS, TRAIN_ROWS, rows

Split = Literal["train", "test"]


@pytest.mark.parametrize("split", ["train", "test"])
def test_rows_are_a_function_of_split_count_and_seed(split: Split) -> None:
    assert rows(split, 60, 3) == rows(split, 60, 3)
    assert rows(split, 60, 3) != rows(split, 60, 4)


def test_first_rows_are_pinned() -> None:
    """A change of the generator would silently change every published quickstart figure."""
    assert [row["output"] for row in rows("test", 100, 0)[:3]] == [
        '{"call": "timer", "for": "homework", "minutes": 35}',
        '{"call": "timer", "for": "cake", "minutes": 5}',
        '{"call": "meet", "with": "Nora", "day": "Monday", "hour": 15}',
    ]


@pytest.mark.parametrize(("split", "count"), [("train", TRAIN_ROWS), ("test", TEST_ROWS)])
def test_rows_are_alpaca_all_different_and_balanced(split: Split, count: int) -> None:
    drawn = rows(split, count, 0)
    assert len(drawn) == count
    assert {tuple(row) for row in drawn} == {("instruction", "input", "output")}
    assert len({row["instruction"] for row in drawn}) == count
    calls = Counter(json.loads(row["output"])["call"] for row in drawn)
    assert len(calls) == 4
    assert max(calls.values()) - min(calls.values()) <= 1


@pytest.mark.parametrize("seeds", [(0, 0), (0, 1), (5, 2)])
def test_no_argument_combination_of_the_test_occurs_in_training(seeds: tuple[int, int]) -> None:
    train = {row["output"] for row in rows("train", 2000, seeds[0])}
    test = {row["output"] for row in rows("test", 500, seeds[1])}
    assert len(test) > 100
    assert not train & test
    # Not vacuous: two draws of one split with these sizes do overlap.
    assert train & {row["output"] for row in rows("train", 500, seeds[1] + 1)}


def test_each_single_value_of_the_test_is_trained() -> None:
    """Only combinations are held out; a value never seen would ask for more than composition."""

    def values(split: Split, count: int) -> set[tuple[str, str]]:
        calls = [json.loads(row["output"]) for row in rows(split, count, 0)]
        return {(call["call"] + "." + key, str(value)) for call in calls for key, value in call.items()}

    assert values("test", 400) <= values("train", 2500)


def test_every_argument_stands_in_the_request() -> None:
    for row in rows("train", 400, 1):
        call = json.loads(row["output"])
        assert json.dumps(call) == row["output"]
        for key, value in call.items():
            if key != "call":
                assert str(value) in row["instruction"]


def test_an_unknown_split_and_too_many_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 'train' or 'test'"):
        rows("valid", 3, 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected at most"):
        rows("test", 100_000, 0)
