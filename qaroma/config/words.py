"""Values as they are printed: sizes, long texts, what there is none of."""

from __future__ import annotations


def memory_size(count: float, digits: int = 2) -> str:
    """Bytes of memory: in GiB, small amounts in MiB."""
    return f"{count / 2**30:.{digits}f} GiB" if count >= 2**30 / 100 or not count else f"{count / 2**20:.1f} MiB"


def file_size(count: float) -> str:
    """Bytes of files, in MB as file managers have them."""
    return f"{count / 1e6:,.1f} MB"


def duration(seconds: float) -> str:
    """Seconds in minutes, or in hours where there are many."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def rough_time(seconds: float) -> str:
    """Seconds as one says them: ``40 seconds``, ``3 minutes``, ``2.5 hours``."""
    for size, name in ((1, "second"), (60, "minute")):
        count = round(seconds / size)
        if count < 100:
            return f"{count} {name}" + ("" if count == 1 else "s")
    return f"{seconds / 3600:.2g} hours" if seconds < 360_000 else f"{seconds / 3600:,.0f} hours"


def percent(share: float) -> str:
    """A share from 0 to 1 in per cent, to a tenth; what is not whole is never called 100 %."""
    return f"{min(round(100 * share, 1), 100 if share == 1 else 99.9):g}\u00a0%"


def shortened(text: str, most: int) -> str:
    """A text without the space around it, cut to at most so many characters."""
    text = text.strip()
    return text if len(text) <= most else text[:most] + " ..."


def shown(value: object) -> str:
    """A value as a cell of a table; ``-`` where there is none."""
    return "-" if value is None else str(value)
