"""What can happen to a run from outside, as one sentence: what is safe, and how to go on."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qaroma.config.words import memory_size
from qaroma.engine.no_memory import card_is_full, host_is_full
from qaroma.errors import QaromaError
from qaroma.runs.checkpoint import list_checkpoints, step_of
from qaroma.runs.directory import RunDirectory
from qaroma.runs.files import disk_full, system_error
from qaroma.training.ranks import RankLostError

_HELD = re.compile(r"busy or unavailable")
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO}


@contextmanager
def interruptions_told(run: RunDirectory) -> Iterator[None]:
    """Raise :class:`QaromaError` where the disk is full, the run cannot be written, or memory is taken.

    Args:
        run: whose checkpoints say what is safe.

    Raises:
        QaromaError: says so; other exceptions pass unchanged.
    """
    try:
        yield
    except RankLostError as error:
        raise QaromaError(f"{error} {_safe(run)} With any number of processes {_on(run)}") from error
    except QaromaError:
        raise
    except Exception as error:
        told = explain_interruption(error, run)
        if told is None:
            raise
        raise told from error


def explain_interruption(error: Exception, run: RunDirectory) -> QaromaError | None:
    """The error to raise instead, or None where it is not one from outside."""
    what = " ".join(str(error).split())[:200]
    if disk_full(error):
        return QaromaError(
            f"the disk is full: cannot write to {run.path} ({what}). {_safe(run)} Make room, then {_on(run)}"
        )
    if card_is_full(error) or _HELD.search(what):
        return QaromaError(
            f"the GPU has no memory left ({what}). {card_words()} {_safe(run)} Close what else holds the card, then "
            f"{_on(run)}"
        )
    if host_is_full(error):
        return QaromaError(
            f"the computer has no memory left ({what}). {_safe(run)} Close other programs, then {_on(run)}"
        )
    ours = isinstance(error, OSError) and str(error.filename).startswith(str(run.path))
    if ours or system_error(error) in _REFUSED:
        return QaromaError(f"cannot write to {run.path} ({what}). {_safe(run)} Mend that, then {_on(run)}")
    return None


def card_words() -> str:
    """How much of the card is free, and how to see who holds the rest; empty where there is no card."""
    try:
        free, total = torch.cuda.mem_get_info()
    except (RuntimeError, AssertionError):  # no card, or one so full that it cannot be asked
        return "See which programs hold the card with: nvidia-smi."
    room = f"{memory_size(free, 1)} of {memory_size(total, 1)} are free"
    return f"{room}; see which programs hold the rest with: nvidia-smi."


def _safe(run: RunDirectory) -> str:
    if not run.exists():
        return "Nothing was begun, so nothing is lost."
    saved = list_checkpoints(run.checkpoints)
    if not saved:
        return "No checkpoint is saved yet; the run begins anew."
    return f"The run is safe up to step {step_of(saved[-1])}."


def _on(run: RunDirectory) -> str:
    if not run.exists():
        return "type the same command again"
    return f"go on with: {run.resume_command}"
