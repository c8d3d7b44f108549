"""What a run answered: the generation test before and after training, and samples while it trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qaroma.config.words import shortened
from qaroma.runs.reading import Run

_MOST_SAMPLES = 10  # steps shown of one prompt
_LONGEST_SHOWN = 1500
_NOTHING = "(nothing)"


@dataclass(frozen=True)
class Answer:
    """What was answered, under what it is called; whether it is exactly what was expected, where that is known."""

    label: str
    text: str
    right: bool | None = None


@dataclass(frozen=True)
class Answered:
    """One prompt with its answers in the order of training, and the expected one where it is known."""

    prompt: str
    answers: tuple[Answer, ...]
    expected: str | None = None

    @property
    def missed(self) -> str | None:
        """The expected answer where the last one is another."""
        return self.expected if self.answers and self.answers[-1].right is False else None

    def shortened(self, most: int) -> Answered:
        """With texts of at most so many characters, and a word where nothing was answered."""
        answers = tuple(replace(one, text=shortened(one.text, most) or _NOTHING) for one in self.answers)
        expected = None if self.expected is None else shortened(self.expected, most)
        return Answered(shortened(self.prompt, most), answers, expected)


def answered_test(run: Run) -> list[Answered]:
    """The generation test: every prompt with its answers before and after training."""
    found: dict[str, Answered] = {}
    for line in run.answers:
        for prompt, expected, text in zip(line["prompts"], line.get("expected", ()), line["answers"], strict=False):
            row = found.get(prompt, Answered(prompt, (), expected))
            given = {one.label: one for one in row.answers}
            when = str(line.get("when"))
            given[when] = Answer(when, text, text.strip() == expected.strip())
            found[prompt] = replace(row, answers=tuple(given.values()))
    return [row.shortened(_LONGEST_SHOWN) for row in found.values()]


def answered_while_training(run: Run, most: int = _MOST_SAMPLES) -> list[Answered]:
    """Each chosen prompt with at most so many of its answers while training, evenly chosen."""
    by_prompt: dict[str, dict[int, str]] = {}
    for line in run.samples:
        for prompt, answer in zip(line["prompts"], line["answers"], strict=False):
            by_prompt.setdefault(prompt, {})[int(line["step"])] = answer
    return [
        Answered(prompt, tuple(Answer(f"step {step:,}", answers[step]) for step in evenly(list(answers), most)))
        .shortened(_LONGEST_SHOWN)
        for prompt, answers in by_prompt.items()
    ]  # fmt: skip


def first_answers(run: Run, count: int = 3, longest: int = 140) -> list[Answered]:
    """What is shown first: the test's first prompts; without a test, the first chosen ones, at first and at last.

    Args:
        run: as read.
        count: of the prompts, at most.
        longest: characters of each text.
    """
    found = answered_test(run) or answered_while_training(run, most=2)
    return [row.shortened(longest) for row in found[:count]]


def evenly(items: Sequence[int], most: int) -> list[int]:
    """At most ``most`` of the items, evenly spread, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]
