"""`qaroma page` as a person has it: a real server and browser, from a file to an answer, the page closed between."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from headless import NAMES, find_browser

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="there is no playwright; type pip install -c configs/constraints.txt playwright"
)
pytestmark = pytest.mark.slow
SECONDS = 120
MOST_CLICKS = 6


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a page that works in a folder."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    command = [sys.executable, "-m", "qaroma", "page", "--no-browser"]
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            found = re.search(r"http://127\.0\.0\.1:\d+/[\w-]{32}/", server.stdout.readline())
            assert found is not None
            yield found[0]
        finally:
            server.terminate()
            server.wait(timeout=30)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = find_browser()
    if program is None:
        pytest.skip(f"no headless browser found (looked for {', '.join(NAMES)}, and for playwright's)")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield found
        found.close()


class Person:
    """A tab, what goes wrong in it, and the clicks."""

    def __init__(self, browser: Any, address: str) -> None:
        self.tab, self.clicks = browser.new_page(viewport={"width": 390, "height": 800}), 0
        self.tab.set_default_timeout(SECONDS * 1000)
        self.elsewhere: list[str] = []
        self.errors: list[str] = []
        self.tab.on("request", lambda request: self.elsewhere.append(request.url))
        self.tab.on("pageerror", lambda error: self.errors.append(str(error)))
        self.tab.goto(address)
        self.address = address

    def click(self, text: str) -> None:
        self.tab.locator("main").locator("a, button, .button").filter(has_text=text).first.click()
        self.clicks += 1

    def sees(self, text: str) -> None:
        self.tab.locator("main").get_by_text(text, exact=False).first.wait_for()
        assert self.tab.evaluate("document.documentElement.scrollWidth") <= 390, text

    def asked_nothing_elsewhere(self) -> None:
        assert [url for url in self.elsewhere if not url.startswith((self.address, "data:"))] == []
        assert self.errors == []


def test_from_a_file_to_an_answer(browser: Any, tiny_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    with file.open("w", newline="", encoding="utf-8") as opened:
        csv.writer(opened).writerows([("asked", "said"), *((f"count {n}", f"it is {n % 5}") for n in range(600))])
    folder = tmp_path / "work"
    folder.mkdir()
    with served(folder) as address:
        one = Person(browser, address)
        with one.tab.expect_file_chooser() as chooser:
            one.tab.locator(".drop").click()
            one.clicks += 1
        chooser.value.set_files(file)
        one.sees("How the model reads the first rows")
        assert one.tab.locator("mark").all_inner_texts()[1:] == [f"it is {n}<|im_end|>" for n in range(3)]
        one.click("Go on")
        one.tab.get_by_text("Another model").click()  # in the place of the built-in model, which takes minutes
        one.tab.locator("input[name=other]").fill(str(tiny_folder))
        one.click("Go on")
        one.sees("learns from")
        one.click("Start")
        one.sees("It is learning")
        one.asked_nothing_elsewhere()
    with served(folder) as address:  # the first page is gone
        other = Person(browser, address)
        other.tab.get_by_text("tiny-llama-mine").click()  # these three are of the detour
        other.sees("It is learning")
        bar = other.tab.frame_locator("iframe").locator("progress")
        bar.wait_for(state="attached")
        assert not bar.is_visible()  # the page's own moves
        other.tab.get_by_text("Stop;").click()
        other.sees("Stopped at step")
        other.tab.get_by_role("button", name="Go on").click()
        other.sees("It is done")
        other.click("Chat with it")
        other.tab.locator("textarea").fill("count 3")
        other.click("Send")
        answers = other.tab.locator(".answer.whole, .answer.cut")
        answers.nth(1).wait_for()
        assert one.clicks + other.clicks <= MOST_CLICKS
        assert answers.nth(0).inner_text() != answers.nth(1).inner_text()
        other.click("Export it")
        other.tab.locator(".export", has_text="vLLM, SGLang").get_by_role("button").click()
        other.sees("Written")
        other.asked_nothing_elsewhere()
    run = folder / "runs" / "tiny-llama-mine"
    assert (run / "export" / "padded" / "adapter_model.safetensors").is_file()
    assert sorted(path.name for path in folder.iterdir()) == ["qaroma-page", "runs"]


def test_a_file_that_cannot_be_read_is_told_as_the_command_tells_it(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "odd.json").write_text("{", encoding="utf-8")
    with served(tmp_path) as address:
        one = Person(browser, address)
        one.tab.set_input_files("input[type=file]", tmp_path / "odd.json")
        one.sees("odd.json")
        assert "is not" in one.tab.locator(".error:visible").inner_text()
