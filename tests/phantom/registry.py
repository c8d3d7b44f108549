"""The list of scenarios, and what is expected of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from phantom.card import Card


@dataclass(frozen=True)
class Scenario:
    """Something that is run on a phantom card.

    Attributes:
        run: takes the card; asserts what is its own, and returns figures to compare.
        waits: how often the host is to wait for the card, by what makes it; None where that is not looked at.
        result: what ``run`` is to return, figures within 2 %.
        fault: a piece of the race or early free that is to be found, since something was taken out on purpose.
        slow: not in the default suite.
    """

    run: Callable[[Card], Any]
    waits: Mapping[str, int] | None = None
    result: Any = None
    fault: str | None = None
    slow: bool = False


SCENARIOS: dict[str, Scenario] = {}


def scenario(name: str, **expected: Any) -> Callable[[Callable[[Card], Any]], Callable[[Card], Any]]:
    """Enter a function into the list."""

    def enter(run: Callable[[Card], Any]) -> Callable[[Card], Any]:
        assert name not in SCENARIOS
        SCENARIOS[name] = Scenario(run, **expected)
        return run

    return enter
