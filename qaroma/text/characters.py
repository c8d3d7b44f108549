"""Text that can be written to a file."""

from __future__ import annotations


def is_unicode(text: str) -> bool:
    """Whether a text is whole: half a surrogate pair, as of a file name in another encoding, has no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
