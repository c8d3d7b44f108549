"""The one exception that the command line turns into a sentence and exit code 2."""

from __future__ import annotations


class QaromaError(Exception):
    """A problem that the user can mend.

    Its text says what was got, what was expected, and what to type next. The command line prints
    it without a traceback and exits with code 2; library users catch it like any exception.
    """


class ToldElsewhereError(QaromaError):
    """A problem of which another process of the same run says what it is; this one ends without a word."""

    def __init__(self) -> None:
        super().__init__("another process of this run says what is wrong")
