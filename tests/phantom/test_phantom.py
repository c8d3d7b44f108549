"""The GPU path on a card that is not there (see the package's docstring): nothing mixed, no race, and known waits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from phantom import guard
from phantom.scenarios import SCENARIOS

TESTS = Path(__file__).resolve().parents[1]
pytestmark = [
    pytest.mark.phantom,
    pytest.mark.skipif(guard.missing() is not None, reason=str(guard.missing())),
]


@cache
def seen(slow: bool) -> dict[str, dict[str, Any]]:
    """What all scenarios of a kind did, each by its name: one process for them all."""
    names = [name for name, scenario in SCENARIOS.items() if scenario.slow == slow]
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    command = [sys.executable, "-m", "phantom", *names]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    found = {name: {"error": f"the process ended before it: {done.stderr[-3000:]}"} for name in names}
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {**found, **{line["name"]: line for line in lines}}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if s.slow else [], id=name) for name, s in SCENARIOS.items()],
)
def test_on_a_phantom_card(name: str) -> None:
    expected = SCENARIOS[name]
    found = seen(expected.slow)[name]
    assert found["error"] is None
    faults = {kind: found[kind] for kind in ("mixes", "races", "freed_early", "pageable") if found[kind]}
    if expected.fault is not None:
        assert expected.fault in str(faults)
        return
    assert not faults
    if expected.waits is not None:
        assert found["waits"] == expected.waits
    if expected.result is not None:
        assert found["result"] == pytest.approx(expected.result, rel=0.02)
