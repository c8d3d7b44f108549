"""Damaged input of every kind ends in a sentence, soon: a sample here, 20,000 cases with ``-m slow``."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzzing import KINDS, fault

# Cases of each kind, of 2,500 in the slow test, so that the sample takes a few seconds in all.
SAMPLE = {
    "configuration": 250, "rows": 250, "run_directory": 25, "adapter": 100, "checkpoint": 100, "base_model": 80,
    "gguf": 80, "command_line": 150,
}  # fmt: skip
LONGEST = 5.0  # seconds of one case, of this process alone: the tests' machine may have others


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def run_cases(kind: str, seeds: range, folder: Path) -> None:
    """Run cases of one kind; each must end in time and without a traceback."""
    faults = []
    for seed in seeds:
        began = time.process_time()
        found = fault(kind, seed, folder / "case")
        seconds = time.process_time() - began
        if found is not None:
            faults.append(f"{kind} {seed}: {found}")
        if seconds > LONGEST:
            faults.append(f"{kind} {seed}: took {seconds:.1f} s")
    assert not faults, f"{len(faults)} of {len(seeds)} cases failed, the first:\n{faults[0]}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_input_ends_in_a_sentence(kind: str, tmp_path: Path) -> None:
    fault(kind, 0, tmp_path / "case")  # what is imported for the first time counts for no case
    run_cases(kind, range(SAMPLE[kind]), tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_2500_damaged_inputs_of_each_kind_end_in_a_sentence(kind: str, tmp_path: Path) -> None:
    fault(kind, 0, tmp_path / "case")
    run_cases(kind, range(2500), tmp_path)
