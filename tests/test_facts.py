"""The tables of methods and metrics: whole, true to the classes they name, and readable without torch."""

from __future__ import annotations

import subprocess
import sys
from typing import get_args

import pytest

from qaroma.config.growth_presets import PRESETS
from qaroma.config.methods import METHODS, MethodName
from qaroma.config.metrics import METRICS, LabelMetric, metric_facts, metrics_of
from qaroma.errors import QaromaError
from qaroma.method.base import Method


def test_every_method_is_a_row_and_every_row_a_class() -> None:
    assert list(METHODS) == list(get_args(MethodName))
    for name, row in METHODS.items():
        kind = row.load()
        assert issubclass(kind, Method), name
        assert "build" in vars(kind) or "build" in vars(kind.__mro__[1]), name
    assert [name for name, row in METHODS.items() if row.grows] == ["aroma", "relora"]
    assert "fixed" in PRESETS


def test_a_package_that_is_missing_is_told_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qaroma.config.methods.find_spec", lambda name: None)
    METHODS["lora"].require()
    with pytest.raises(QaromaError, match=r"method adalora needs peft; type: pip install 'qaroma\[bench\]'"):
        METHODS["adalora"].require()


def test_metrics_say_which_way_they_go_and_how_they_are_printed() -> None:
    assert metrics_of("classification") + metrics_of("regression") == get_args(LabelMetric)
    assert metrics_of("causal-lm") == ("loss",)
    assert [name for name, row in METRICS.items() if not row.higher_is_better] == ["loss", "perplexity"]
    loss, accuracy = METRICS["loss"], METRICS["accuracy"]
    assert (loss.better(1.0, 2.0), accuracy.better(1.0, 2.0), loss.better(1.0, 1.0)) == (True, False, False)
    points = [(1, 0.5), (2, 0.9), (3, 0.9), (4, 0.5)]
    assert (loss.best(points), accuracy.best(points)) == ((1, 0.5), (2, 0.9))  # the first of equals
    assert (METRICS["exact_match"].text(0.5), loss.text(0.123456)) == ("50.0 %", "0.1235")
    assert metric_facts("of a newer version").direction == "higher"


def test_the_tables_and_the_reader_of_runs_need_no_torch() -> None:
    code = (
        "import sys, qaroma.runs.figures, qaroma.runs.finding, qaroma.report.run_table, qaroma.report.side_by_side;"
        "assert not {'torch', 'transformers', 'safetensors'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
