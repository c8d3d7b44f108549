"""The quickstart's task: a request in plain English in, one exact JSON call out.

The schema of the calls stands in no prompt, so that a model cannot know it before training. The
requests of the test split use argument combinations that the training split never has, whatever
the seeds, so that a right answer is not recall.
"""

from __future__ import annotations

import itertools
import json
import random
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

TRAIN_ROWS = 800
TEST_ROWS = 100

_HELD_OUT_EVERY = 5

_ROOMS = (
    "kitchen", "bedroom", "bathroom", "hallway", "garage", "office", "attic", "basement", "library", "nursery",
    "balcony", "studio",
)  # fmt: skip
_NAMES = (
    "Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Julia", "Kevin", "Laura", "Martin",
    "Nora", "Oscar", "Paula", "Robert", "Sarah", "Thomas",
)  # fmt: skip
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_ARTISTS = (
    "Mozart", "Madonna", "Prince", "Adele", "Bach", "Queen", "Abba", "Chopin", "Nirvana", "Radiohead", "Vivaldi",
    "Beethoven", "Metallica", "Coldplay",
)  # fmt: skip
_THINGS = ("pasta", "rice", "tea", "eggs", "pizza", "bread", "laundry", "coffee", "soup", "cake", "nap", "homework")


@dataclass(frozen=True)
class _Call:
    """One kind of call: its arguments' values in the order of the JSON, and ways to ask for it."""

    arguments: Mapping[str, tuple[str | int, ...]]
    requests: tuple[str, ...]


_CALLS: Mapping[str, _Call] = {
    "meet": _Call(
        {"with": _NAMES, "day": _DAYS, "hour": tuple(range(8, 19))},
        (
            "Set up a meeting with {with} on {day} at {hour} o'clock.",
            "I need to see {with} at {hour} on {day}.",
            "Put {with} in my calendar for {day} at {hour}.",
            "Can you find me time with {with}, {day} at {hour}?",
            "{day} at {hour} I am meeting {with}, please note it.",
        ),
    ),
    "light": _Call(
        {"room": _ROOMS, "level": tuple(range(5, 100, 5))},
        (
            "Dim the lights in the {room} to {level} percent.",
            "Set the {room} lights to {level}%.",
            "I want the {room} at {level} percent brightness.",
            "Make it {level}% bright in the {room}, please.",
            "Could you turn the {room} lamp to {level} percent?",
        ),
    ),
    "play": _Call(
        {"artist": _ARTISTS, "room": _ROOMS},
        (
            "Play some {artist} in the {room}.",
            "I'd like to hear {artist} in the {room}.",
            "Put on {artist} in the {room}, please.",
            "Can we have {artist} on the {room} speaker?",
            "Music for the {room}: {artist}.",
        ),
    ),
    "timer": _Call(
        {"for": _THINGS, "minutes": tuple(range(2, 60))},
        (
            "Set a {minutes} minute timer for the {for}.",
            "Tell me when the {for} has had {minutes} minutes.",
            "The {for} needs {minutes} minutes, start a timer.",
            "Remind me about the {for} in {minutes} minutes.",
            "Start {minutes} minutes on the clock for my {for}.",
        ),
    ),
}


def rows(split: Literal["train", "test"], count: int, seed: int) -> list[dict[str, str]]:
    """Rows of the demonstration task in alpaca form, all different.

    The kinds of call come in equal numbers (to one row), in random order. Which argument
    combinations belong to the test split is fixed, so that splits drawn with any two seeds are
    disjoint in (call, arguments).

    Args:
        split: ``train`` or ``test``.
        count: Number of rows.
        seed: The rows are a function of (split, count, seed) alone.

    Returns:
        ``count`` rows with the keys ``instruction`` (the request), ``input`` (empty) and
        ``output`` (the call as JSON, keys in a fixed order).

    Raises:
        ValueError: The split has fewer different rows than ``count``, or the split is unknown.
    """
    if split not in ("train", "test"):
        raise ValueError(f"got split {split!r}; expected 'train' or 'test'")
    generator = random.Random(f"qaroma demo {split} {seed}")
    drawn: list[dict[str, str]] = []
    for index, call in enumerate(_CALLS):
        share = (count + len(_CALLS) - 1 - index) // len(_CALLS)
        candidates = list(_candidates(call, split))
        if share > len(candidates):
            raise ValueError(f"got count={count}; expected at most {len(_CALLS) * len(candidates)} rows for {split!r}")
        drawn.extend(generator.sample(candidates, share))
    generator.shuffle(drawn)
    return drawn


def _candidates(call: str, split: str) -> Iterator[dict[str, str]]:
    """Every (argument combination, phrasing) of one kind of call in one split."""
    kind = _CALLS[call]
    for values in itertools.product(*kind.arguments.values()):
        arguments = dict(zip(kind.arguments, values, strict=True))
        output = json.dumps({"call": call, **arguments})
        # A checksum, unlike hash(), is the same in every process and Python version.
        held_out = zlib.crc32(output.encode("utf-8")) % _HELD_OUT_EVERY == 0
        if held_out == (split == "test"):
            for request in kind.requests:
                yield {"instruction": request.format(**arguments), "input": "", "output": output}
