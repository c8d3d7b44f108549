"""Telling a full disk from other failures, whichever library meets it."""

from __future__ import annotations

import errno
import re

_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
_FULL_ON_WINDOWS = {39, 112}


def disk_full(error: BaseException) -> bool:
    """Whether something could not be written because there is no room left, or no more is allowed.

    safetensors has no OSError for it: the system's number stands in the text of its own exception.
    """
    if isinstance(error, OSError):
        return error.errno in _FULL or getattr(error, "winerror", None) in _FULL_ON_WINDOWS
    number = re.search(r"\(os error (\d+)\)", str(error))
    return number is not None and int(number[1]) in _FULL | _FULL_ON_WINDOWS
