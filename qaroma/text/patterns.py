"""Regular expressions with an end: Python's own has none, and takes ages for ``(a+)+$`` on all systems."""

from __future__ import annotations

import time

import regex

from qaroma.errors import QaromaError

_SECONDS = 5.0


class Patterns:
    """Regular expressions of one file, which all together may take a few seconds.

    Args:
        source: what they stand in, for messages.
        seconds: that all matching may take.
    """

    def __init__(self, source: str, *, seconds: float = _SECONDS) -> None:
        self._source, self._left = source, seconds
        self._compiled: dict[str, regex.Pattern[str]] = {}

    def fullmatch(self, expression: str, text: str) -> bool:
        """Whether an expression matches the whole of a text.

        Raises:
            QaromaError: no regular expression, or one that takes too long.
        """
        begin = time.monotonic()
        try:
            pattern = self._compiled.get(expression)
            if pattern is None:
                pattern = self._compiled[expression] = regex.compile(expression)
            return pattern.fullmatch(text, timeout=max(self._left, 1e-3)) is not None
        except TimeoutError:
            raise QaromaError(
                f"{self._source} has the regular expression {_shown(expression)}, which takes too long to match; "
                "write out the names of the modules instead"
            ) from None
        except (regex.error, ValueError, RecursionError, OverflowError, MemoryError) as error:
            raise QaromaError(
                f"{self._source} has {_shown(expression)}, which is neither a name nor a regular expression ({error})"
            ) from None
        finally:
            self._left -= time.monotonic() - begin


def _shown(expression: str) -> str:
    return f"'{expression}'" if len(expression) <= 80 else f"'{expression[:77]}...'"
