"""Progress in a pipe: some twenty lines, whatever the length of the run."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from qaroma.method.growth import GrowthEvent
from qaroma.training.progress import ProgressView, TimeLeft, curve

RECORD = {
    "loss": 1.5, "learning_rate": 1e-3, "mean_rank": 2.0, "active_modules": 3, "trainable_parameters": 1234,
    "tokens_per_second": 99.0, "memory_bytes": 2**30,
}  # fmt: skip


@pytest.mark.parametrize(("total", "lines"), [(7, 7), (400, 21), (405, 22)])
def test_lines_in_a_pipe(total: int, lines: int) -> None:
    out = io.StringIO()
    with ProgressView(Console(file=out), total=total) as view:
        for step in range(1, total + 1):
            view.step({**RECORD, "step": step}, [])
    said = out.getvalue().splitlines()
    assert len(said) == lines
    assert (
        said[-1]
        == f"step {total}/{total}  loss 1.500  lr 1.0e-03  rank 2.00  active 3  params 1,234  99 tok/s  1.00 GiB"
    )


def test_growth_and_validation_are_said_when_they_happen() -> None:
    out = io.StringIO()
    view = ProgressView(Console(file=out, width=200), total=400)
    events = [
        GrowthEvent(3, name, 1, 0.1, 0.2, decision)
        for name, decision in (("a", "commit"), ("b", "commit"), ("c", "done"))
    ]
    view.step({**RECORD, "step": 3}, events)
    view.validation(3, {"loss": 0.5}, "loss", best=True)
    view.validation(6, {"loss": 0.75, "f1": 0.25}, "f1", best=False)
    assert out.getvalue().splitlines() == [
        "step 3: 2 modules grew by a component, 1 modules are done",
        "step 3: validation loss 0.5000 (best so far)",
        "step 6: validation loss 0.7500, f1 0.2500",
    ]


def test_the_time_left_is_known_from_the_second_step_however_long_a_step_takes() -> None:
    left = TimeLeft(total=12)
    left.step(1, now=100.0)
    assert left.words(now=150.0) == ""
    left.step(2, now=190.0)  # a step of 90 seconds; ten are to come
    assert left.seconds(now=190.0) == 900.0
    assert left.words(now=220.0) == "at most 14 min 30 s left"
    left.step(12, now=2000.0)
    assert left.words(now=2001.0) == ""


def test_the_second_step_says_the_time_left_in_a_pipe() -> None:
    out = io.StringIO()
    view = ProgressView(Console(file=out), total=400)
    for step in (1, 2, 3):
        view.step({**RECORD, "step": step}, [])
    assert out.getvalue() == "step 2/400  at most 0 min 00 s left\n"


def test_a_long_step_and_a_validation_show_how_far_they_are() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    with ProgressView(console, total=9) as view:
        for _ in view.counted(["a", "b"], "step 3"):
            console.print(view.panel())
    for done in (0, 1):
        assert f"step 3, {done} of 2 batches done" in out.getvalue()


def test_a_narrow_panel_leaves_figures_out_and_cuts_none() -> None:
    out = io.StringIO()
    view = ProgressView(Console(file=out, width=40), total=9)
    view.step({**RECORD, "step": 1}, [])
    view.console.print(view.panel())
    assert "1.500" in out.getvalue()
    assert "…" not in out.getvalue()
    assert "GiB" not in out.getvalue().partition("step 1/9")[2].partition("\n")[2]


def test_a_curve_has_its_lowest_value_lowest() -> None:
    assert curve([3.0, 2.0, 1.0]) == "█▅▁"
    assert curve([2.0, 2.0]) == "▁▁"
    assert curve([]) == ""
