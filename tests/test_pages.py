"""README and the pages of examples/: links lead somewhere, commands are such as qaroma takes, pictures are there."""

from __future__ import annotations

import re
import runpy
import shlex
from importlib.metadata import metadata
from pathlib import Path

import click
import pytest

from qaroma.cli import root
from qaroma.config.load import read_settings

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "examples").rglob("*.md"))]
LONGEST_README = 200  # lines
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_SHELL_WORDS = ("|", ";", "<", ">", "&", "&&", "2>&1")


def typed_lines(page: Path) -> list[str]:
    """The indented lines of a page that begin with ``qaroma`` or ``pip install``, without prompt and comment."""
    text = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))
    found = re.findall(r"^    (?:\$ )?((?:qaroma|pip install) .*)$", text, re.MULTILINE)
    return [line.partition("  #")[0].strip() for line in found]


def commands_of(page: Path) -> list[str]:
    """Those lines and the commands that its sentences name, whole ones."""
    inline = re.findall(r"`((?:qaroma|pip install) [^`]+)`", page.read_text(encoding="utf-8").replace("\n", " "))
    return [line for line in (*typed_lines(page), *inline) if "..." not in line]


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def parse(line: str) -> None:
    """See to it that the command line takes a line: its commands, options and choices, and the keys of its settings."""
    words: list[str] = []
    for word in shlex.split(line):
        if word in _SHELL_WORDS:
            break
        words.append(word)
    group: click.Command = root
    context, words = click.Context(root), words[1:]
    while isinstance(group, click.Group) and words and not words[0].startswith("-"):
        name, group, words = group.resolve_command(context, words)  # type: ignore[assignment]
        context = click.Context(group, info_name=name)
    if words and "--help" not in words and not isinstance(group, click.Group):
        made = group.make_context(group.name, words)
        sets = [text for text in made.params.get("sets") or () if not text.endswith("=")]
        read_settings(None, {}, sets)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_to_a_file_and_a_heading_that_is_there(page: Path) -> None:
    for link in _LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name != "peers.md"], ids=lambda page: page.relative_to(ROOT).as_posix()
)  # which cites files of others
def test_every_file_of_ours_that_is_named_is_there(page: Path) -> None:
    named = re.findall(
        r"\b((?:configs|examples|qaroma|tests)/[\w./-]+\.(?:md|png|py|txt|yaml))\b", page.read_text("utf-8")
    )
    assert not [
        name for name in named if not any((ROOT / one).exists() for one in (name, name.removeprefix("qaroma/")))
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_command_is_one_that_qaroma_takes(page: Path) -> None:
    for line in commands_of(page):
        if line.startswith("qaroma"):
            try:
                parse(line)
            except click.MissingParameter:
                assert line not in typed_lines(page), line  # a sentence may name a command without all that it needs
            except (click.ClickException, ValueError) as error:
                pytest.fail(f"{line}\n{error}")


def test_what_pip_is_told_to_install_is_there() -> None:
    extras = set(metadata("qaroma").get_all("Provides-Extra") or ())
    lines = [line for page in PAGES for line in commands_of(page) if line.startswith("pip install")]
    assert {"dev", "report"} <= {name for line in lines for name in re.findall(r"\.\[([\w,]+)\]", line)}
    for line in lines:
        assert {name for found in re.findall(r"\.\[([\w,]+)\]", line) for name in found.split(",")} <= extras, line
        for file in re.findall(r"-c (\S+)", line):
            assert (ROOT / file.removeprefix("qaroma/")).is_file(), line


def test_readme_is_short_and_every_page_is_linked_from_it() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) < LONGEST_README
    for page in (ROOT / "examples").glob("*.md"):
        assert f"(examples/{page.name}" in text, page.name


def test_the_day_was_recorded_by_its_script() -> None:
    recorded = (ROOT / "examples" / "day.md").read_text(encoding="utf-8")
    steps = runpy.run_path(str(ROOT / "examples" / "record_day.py"))["STEPS"]
    for title, _, commands in steps:
        assert f"## {title}\n" in recorded
        for command in commands:
            assert f"    $ {command.line}\n" in recorded
