"""The first card of a report: what it says was learned, its map of ranks, and the image of it."""

from __future__ import annotations

import re
import struct
import warnings
from pathlib import Path
from typing import Any

import pytest
from test_report import COMPONENTS, MODULES, make_run, ranks_events, step_line

from qaroma import report
from qaroma.config.words import percent, rough_time
from qaroma.report.answers import first_answers
from qaroma.report.finding import finding
from qaroma.report.page import CARD, write_page
from qaroma.report.panels import learning_panel
from qaroma.report.rank_map import INKS, SHADES, map_of_ranks, rank_map
from qaroma.runs.reading import Run, read_run

NAMES = ("s1", "s2", "s3", "s4", "s5", "s6", "low", "high")


def a_run(*losses: float, exact: tuple[float | None, float] | None = None, **changes: Any) -> Run:
    """Three minutes on a CPU, with a validation at every tenth step and shares of exact answers before and after."""
    validations = [{"event": "validation", "step": 10 * place, "loss": loss} for place, loss in enumerate(losses)]
    given = [] if exact is None else [("before", exact[0]), ("after", exact[1])]
    answers = [
        {
            "when": when,
            "step": 0,
            "prompts": ["Hi"] * 8,
            "expected": ["yes"] * 8,
            "answers": ["no"] * 8,
            "exact_match": e,
        }
        for when, e in given
        if e is not None
    ]
    values: dict[str, Any] = {
        "state": "finished", "summary": {"ended": "learnt", "seconds": 184.0, "device": "cpu"}, "answers": answers,
        "steps": [{"step": 1, "loss": 3.0}, {"step": 20, "loss": 0.5}], "validations": validations,
        "config": {"evaluation": {"data": "demo:calendar-test"}},
    }  # fmt: skip
    return Run(Path("runs/x"), "x", **{**values, **changes})


@pytest.mark.parametrize(
    ("run", "headline", "better"),
    [
        (a_run(2.0, 1.0, exact=(0.0, 1.0)), "0 % to 100 % right in 3 minutes on a CPU", True),
        (a_run(2.0, 1.0, exact=(0.5, 0.25)), "50 % to 25 % right after 3 minutes on a CPU", False),
        (a_run(2.0, 1.0, exact=(None, 0.5)), "50 % right after 3 minutes on a CPU", None),
        (a_run(2.0, 1.0), "13.5 % to 36.8 % sure of the next token in 3 minutes on a CPU", True),
        (a_run(1.0, 1.2), "No better than the base after 3 minutes on a CPU", False),
        (a_run(), "Training loss 3 to 0.5 after 3 minutes on a CPU", None),
        (a_run(2.0, 1.0, state="stopped"), "13.5 % to 36.8 % sure of the next token at step 20", True),
        (a_run(2.0, 1.0, summary={"seconds": 9000, "device": "Tesla T4"}),
         "13.5 % to 36.8 % sure of the next token in 2.5 hours on a GPU", True),
        (a_run(steps=(), state="running"), "Nothing is learned yet", None),
    ],
)  # fmt: skip
def test_what_was_learned_is_one_line(run: Run, headline: str, better: bool | None) -> None:
    found = finding(run)
    assert (found.headline.replace("\u00a0", " "), found.better) == (headline, better)


def test_other_tasks_are_told_in_their_own_words() -> None:
    points = [{"step": s, "loss": 0.7 - s / 50, "accuracy": 0.5 + s / 50, "f1": s / 25} for s in (0, 10)]
    labels = a_run(validations=points, config={"task": "classification"})
    assert finding(labels).headline.startswith("50\u00a0% to 70\u00a0% of labels right")
    f1 = a_run(validations=points, config={"task": "classification", "evaluation": {"metric": "f1"}})
    assert finding(f1).headline.startswith("F1 0 to 0.4 in")
    pairs = a_run(validations=points, config={"task": "preference"})
    assert finding(pairs).headline.startswith("70\u00a0% of pairs the right way round")


def test_a_test_that_came_out_as_before_is_told_beside_the_loss() -> None:
    found = finding(a_run(2.0, 1.0, exact=(0.0, 0.0)))
    assert "sure of the next token" in found.headline
    assert found.note.replace("\u00a0", " ").endswith("Exactly the expected answer: 0 % of requests, before and after.")


def test_shares_and_times_are_said_as_one_says_them() -> None:
    shares = [percent(share).replace("\u00a0", " ") for share in (0.0, 0.125, 0.99999, 1.0)]
    assert shares == ["0 %", "12.5 %", "99.9 %", "100 %"]
    times = [rough_time(seconds) for seconds in (1, 65, 184, 3600, 5400, 10_000, 400_000)]
    assert times == ["1 second", "65 seconds", "3 minutes", "60 minutes", "90 minutes", "2.8 hours", "111 hours"]


def test_a_map_shades_ranks_by_the_largest_and_says_what_it_shows() -> None:
    found = rank_map(COMPONENTS)
    assert found.kinds == ["q", "v", "up"]
    cells = [[(cell.text, cell.shade) for cell in cells if cell] for _, cells in found.layers]
    assert cells == [[("2", 4), ("3", 6), ("2", 4)], [("2", 4), ("2", 4), ("0", 0)]]
    assert found.finding == "Rank 0 to 3, 1.83 on average; most in v_proj (2.5), least in up_proj (1)."


def test_a_map_of_equal_ranks_is_of_one_middle_shade() -> None:
    found = rank_map(dict.fromkeys(MODULES, 8))
    assert {(cell.text, cell.shade) for _, cells in found.layers for cell in cells if cell} == {("8", 4)}
    assert found.finding == "Rank 8 in each of 6 modules."


def test_every_number_can_be_read_on_its_shade() -> None:
    """In the image, and on the page by day and by night."""
    css = (Path(report.__file__).parent / "templates" / "page.css").read_text(encoding="utf-8")
    day, night = ([re.findall(rf"--{name}: (#\w+)", css)[part] for name in NAMES] for part in (0, 1))
    assert tuple(day[:6]) == SHADES[1:]
    for *shades, low, high in (day, night):
        inks = [low] * 3 + [high] * 3
        assert min(map(contrast, shades, inks)) >= 4.5
        brightness = [contrast(shade, "#000000") for shade in shades]
        assert brightness == sorted(brightness, reverse=shades == day[:6])
    assert min(map(contrast, SHADES, INKS)) >= 4.5


def contrast(one: str, other: str) -> float:
    """WCAG's ratio of two colours."""

    def luminance(colour: str) -> float:
        parts = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_a_rank_that_was_chosen_is_no_map(tmp_path: Path) -> None:
    even = [{"event": "ranks", "step": 0, "ranks": dict.fromkeys(MODULES, 8)}, step_line(1)]
    assert map_of_ranks(read_run(make_run(tmp_path / "lora", lines=even, adapter=False, method="lora"))) is None
    assert map_of_ranks(read_run(make_run(tmp_path / "aroma", lines=even, adapter=False))) is not None


def test_the_curve_marks_what_was_kept_and_has_a_time_beside_each_step(tmp_path: Path) -> None:
    validations = [{"event": "validation", "step": s, "loss": loss} for s, loss in ((0, 2.0), (6, 1.0), (12, 1.5))]
    lines = [*(step_line(s) for s in range(1, 13)), *validations]
    run = read_run(make_run(tmp_path / "run", lines=lines, adapter=False))
    panel = learning_panel(run)
    assert panel.kept == (6, 1.0)
    assert panel.seconds.points[5] == (6, 3.0)
    assert panel.finding.endswith("the adapter is of step 6.")
    partly = read_run(make_run(tmp_path / "partly", lines=[step_line(1), {"step": 2, "loss": 1.0}]))
    assert len(learning_panel(partly).seconds) == 0


def test_a_finished_run_has_an_image_of_its_card(tmp_path: Path) -> None:
    """1920 x 1008 pixels below 200 KB, with letters that the font lacks, a text without end, and no answer at all."""
    prompts, expected = ["翻訳してください", "x" * 5000, "Dim it."], ["a", "b", "c"]
    lines = [
        {"event": "answers", "when": when, "step": 0, "prompts": prompts, "expected": expected, "answers": answers,
         "exact_match": 0.0} for when, answers in (("before", ["", "y" * 900, "$x_1$"]), ("after", ["a", "b", "no"]))
    ]  # fmt: skip
    run = make_run(tmp_path / "run", lines=[*lines, *ranks_events(), *(step_line(s) for s in range(1, 13))])
    assert [row.answers[0].text for row in first_answers(read_run(run))][::2] == ["(nothing)", "$x_1$"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_page(run)
    image = (run / CARD).read_bytes()
    assert struct.unpack(">II", image[16:24]) == (1920, 1008)
    assert len(image) < 200_000
