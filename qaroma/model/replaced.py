"""A function of a library, replaced for as long as a block runs: for what the library has no switch for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(module: Any, name: str, stand_in: Callable[..., Any]) -> Iterator[None]:
    """Let ``module.name`` be another function inside the block."""
    before = getattr(module, name)
    setattr(module, name, stand_in)
    try:
        yield
    finally:
        setattr(module, name, before)
