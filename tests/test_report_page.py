"""The HTML page: safe, self-contained, following a run, and looked at in a browser where there is one."""

from __future__ import annotations

import json
import re
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from headless import NAMES, Browser, Seen, find_browser
from test_report import MODULES, STEPS, make_run, ranks_events, step_line

from qaroma.report.answers import Answer, Answered, answered_test, answered_while_training
from qaroma.report.page import CARD, REFRESH_SECONDS, write_page
from qaroma.report.write import write_report
from qaroma.runs.reading import read_run

EVIL = "<script>document.title = 'taken'</script><img src=x onerror=alert(1)> & 'quoted'"
HEADLINE = "13.5\u00a0% to 44.9\u00a0% sure of the next token in 65 seconds"
CARDS = [HEADLINE, "✓It was at its best when it ended", "Details"]
DETAILS = ["Key figures", "Training", "Growth", "Effective ranks", "Answers before and after", "Samples over time",
           "Validations", "Settings"]  # fmt: skip
_HEADINGS = ("h1", "h2", "h3")


class Page(HTMLParser):
    """The elements of a page, with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.headings: list[str] = []
        self.text = ""
        self._heading = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag in _HEADINGS:
            self._heading = True
            self.headings.append("")

    def handle_endtag(self, tag: str) -> None:
        self._heading = self._heading and tag not in _HEADINGS

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._heading:
            self.headings[-1] += data

    def values(self, name: str) -> list[str]:
        return [attributes[name] for _, attributes in self.elements if name in attributes]


def lines(steps: int = STEPS) -> list[dict[str, Any]]:
    """A log with everything that a page shows, and with text that means harm."""
    answers = {"event": "answers", "prompts": ["Dim it.", EVIL], "expected": ["{}", EVIL], "exact_match": 0.5}
    return [
        {**answers, "when": "before", "step": 0, "answers": ["No.", "what?"]},
        *ranks_events(),
        *(step_line(step) for step in range(1, steps + 1)),
        *({"event": "samples", "step": s, "prompts": ["Say it."], "answers": [f"{s} {EVIL}"]} for s in range(steps)),
        *({"event": "validation", "step": s, "loss": 2.0 - s / 10} for s in (0, steps)),
        {**answers, "when": "after", "step": steps, "answers": ["{}", EVIL]},
    ]


def page_of(run: Path) -> Page:
    return Page(write_page(run).read_text(encoding="utf-8"))


def test_the_page_of_a_finished_run_shows_everything(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "my run", lines=lines()))
    assert page.headings == [*CARDS, *DETAILS]
    assert "Finished after 12 steps: every module has the rank it needs" in page.text
    assert "950 at first, 675 on average, 400 at the end" in page.text
    pictures = [a["aria-label"] for _, a in page.elements if a.get("role") == "img"]
    assert (
        "Loss over 12 steps: validation goes from 2 to 0.8, training goes from 3 to 0.25; the adapter is of step 12."
        in pictures
    )
    assert "Rank 0 to 3, 1.83 on average; most in v_proj (2.5), least in up_proj (1)." in pictures
    assert pictures.count("right") == pictures.count("not right") == 4  # two answers twice: first, and under Details
    assert sum(tag == "details" for tag, _ in page.elements) == len(DETAILS)
    assert len(page.values("id")) > 50
    assert "reset: prune" in page.text  # the configuration stands at the end, whole


def test_the_page_asks_for_nothing(tmp_path: Path) -> None:
    """No address but fragments of itself: nothing is loaded, run, or sent."""
    run = make_run(tmp_path / "run", lines=lines())
    for file in (write_page(run), write_report([run], formats=["html"]).files[0]):
        text = file.read_text(encoding="utf-8")
        page = Page(text)
        for name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
            assert all(value.startswith("#") or value == "data:," for value in page.values(name)), name
        assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
        assert "@import" not in text
        policies = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
        assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
        # Names of vocabularies are no addresses that anybody visits.
        assert set(re.findall(r"https?://[^\s\"'<]+", text)) <= {
            "http://www.w3.org/2000/svg",
            "http://www.w3.org/1999/xlink",
        }


def test_what_models_and_data_say_is_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", lines=lines(), model={"name": EVIL}, data={"train": [{"path": EVIL}]})
    page = page_of(run)
    assert not {tag for tag, _ in page.elements} & {"script", "img", "iframe", "object", "embed", "form"}
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert page.text.count(EVIL) >= 5  # as prompt, as answer, in samples, in settings


def test_a_page_to_be_shown_names_runs_and_files_and_not_where_they_lie(tmp_path: Path) -> None:
    private = tmp_path / "of anna" / ("long " * 30).strip()
    private.mkdir(parents=True)
    run = make_run(
        private / "mine", lines=lines(6), finished=False, adapter=False, output=str(private / "mine"),
        model={"name": str(private / "base")}, data={"train": [{"path": str(private / "mine" / "rows.jsonl")}]},
        evaluation={"data": "C:\\Users\\anna\\test.csv"},
    )  # fmt: skip
    text = write_page(run).read_text(encoding="utf-8")
    assert "anna" not in text
    assert "long" not in text.replace("longest", "")
    assert "qaroma finetune --resume --output mine" in text.replace("&#34;", "")
    page = Page(text)
    for left in ("path: rows.jsonl", "data: test.csv", "output: mine", "name: base", "Base modelbase"):
        assert left in page.text, left


def test_names_within_figures_are_unique(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run", lines=lines()))
    ids = page.values("id")
    assert len(ids) == len(set(ids)) > 50
    assert {value[1:] for value in page.values("xlink:href")} <= set(ids)


def test_an_unfinished_run_is_followed_and_a_finished_one_is_not(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", lines=lines(6), finished=False, adapter=False)
    refresh = [a["content"] for _, a in page_of(run).elements if a.get("http-equiv") == "refresh"]
    assert refresh == [str(REFRESH_SECONDS)]
    page = page_of(run)
    assert "Not finished: step 6 of 12" in page.text
    assert [a["value"] for tag, a in page.elements if tag == "progress"] == ["6"]
    assert "Effective rank" not in page.text
    (run / "summary.json").write_text(json.dumps({"ended": "budget"}), encoding="utf-8")
    assert not any(a.get("http-equiv") == "refresh" for _, a in page_of(run).elements)


def test_a_run_without_a_step_has_a_page(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run", lines=[], finished=False, adapter=False))
    assert page.headings == ["Nothing is learned yet", "!It stopped before its end", "Details", "Settings"]
    assert "No step has been logged." in page.text


def test_the_page_without_matplotlib_has_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = page_of(make_run(tmp_path / "run", lines=lines()))
    assert page.headings == [*CARDS, "Key figures", *DETAILS[3:]]
    assert "pip install 'qaroma[report]'" in page.text
    assert re.search(r"layer\s*q\s*v\s*up\s*0\s*2\s*3\s*2\s*1\s*2\s*2\s*0\s", page.text)
    assert not (tmp_path / "run" / CARD).exists()


def test_samples_are_the_log_evenly_chosen(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", lines=lines(40)))
    (sample,) = answered_while_training(run)
    assert (sample.prompt, sample.expected, sample.missed, len(sample.answers)) == ("Say it.", None, None, 10)
    assert (sample.answers[0].label, sample.answers[-1]) == ("step 0", Answer("step 39", f"39 {EVIL}"))


def test_answers_stand_before_beside_after(tmp_path: Path) -> None:
    rows = answered_test(read_run(make_run(tmp_path / "run", lines=lines())))
    assert rows[0] == Answered("Dim it.", (Answer("before", "No.", False), Answer("after", "{}", True)), "{}")
    assert [row.missed for row in rows] == [None, None]


def test_answers_of_another_form_are_left_out(tmp_path: Path) -> None:
    odd = [{"event": "answers", "when": "after", "step": 1, "prompts": p, "expected": e, "answers": a} for p, e, a in (
        ([{}], ["x"], ["x"]), (["x"], [1], ["x"]), (["x"], ["x"], [None]), (["x"], None, ["x"]))]  # fmt: skip
    page = page_of(make_run(tmp_path / "run", lines=[*odd, step_line(1)]))
    assert "Answers before and after" not in page.headings


def test_a_large_run_is_written_fast(tmp_path: Path) -> None:
    """224 modules and 5,000 steps, as at every validation of a large model; measured in time of the processor."""
    modules = [f"model.layers.{layer}.{kind}" for layer in range(32) for kind in "qkvogud"]
    ranks = [
        {"event": "ranks", "step": s, "ranks": {m: 1 + (i + s) % 5 for i, m in enumerate(modules)}} for s in range(99)
    ]
    log = [*ranks, *(step_line(step) for step in range(1, 5001))]
    run = make_run(tmp_path / "run", lines=log, finished=False, adapter=False)
    write_page(run)
    start = time.process_time()
    page = write_page(run)
    assert time.process_time() - start < 2.0
    assert page.stat().st_size < 250_000


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory):
    program = find_browser()
    if program is None:
        pytest.skip(f"no headless browser found (looked for {', '.join(NAMES)}, and for playwright's)")
    with Browser(program, tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, True)])
def test_a_browser_shows_the_page(tmp_path: Path, browser: Browser, width: int, dark: bool) -> None:
    page = write_page(make_run(tmp_path / "run", lines=lines()))
    seen: Seen = browser.look(page, width=width, dark=dark)
    assert seen.headings == CARDS
    assert seen.errors == []
    assert [url for url in seen.requests if not url.startswith("data:,")] == [page.resolve().as_uri()]
    assert seen.width <= width  # nothing sticks out: no sideways scrolling, on a phone either
    (wide, _), (narrow, _), *others = seen.figures
    assert (wide > 600, narrow > 300) == (width == 1200, width == 390)  # the curve for a screen, or for a phone
    assert all(shown[0] > 300 and shown[1] > 200 for shown in others)
    assert seen.smallest >= 11
    assert EVIL in seen.text
    assert f"{MODULES[0]}" not in seen.text


def test_a_browser_shows_several_runs(tmp_path: Path, browser: Browser) -> None:
    runs = [make_run(tmp_path / name, lines=lines()) for name in ("with-reset", "without-reset")]
    (page,) = write_report(runs, output=tmp_path / "both", formats=["html"]).files
    seen = browser.look(page, width=390, dark=False)
    assert seen.headings == ["2 runs compared", "Details"]
    assert "Ranks of without-reset" in seen.text
    assert seen.errors == []
    assert seen.width <= 390
