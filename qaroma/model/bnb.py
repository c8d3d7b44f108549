"""bitsandbytes, imported without its call to a hub.

On a CPU with AVX512-BF16, importing bitsandbytes asks the package `kernels`, where there is one, to
download a compiled kernel from a hub, and where there is none it logs a warning that tells the
reader to install it. That kernel is only for inference without gradients. Whoever needs bitsandbytes
imports it from here; transformers and peft, which import it themselves, then find it loaded.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def _is_about_other_things(record: logging.LogRecord) -> bool:
    return "kernels-community" not in record.getMessage()


@contextmanager
def no_hub_kernels() -> Iterator[None]:
    """Make `import kernels` fail inside the block, and leave out the warning that this brings.

    A module whose entry in `sys.modules` is None cannot be imported (Python's import protocol), and
    bitsandbytes takes a failed import for "no such kernel". Entry and filter are taken back after.
    """
    missing = object()
    before = sys.modules.get("kernels", missing)
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    sys.modules["kernels"] = None  # type: ignore[assignment]
    logger.addFilter(_is_about_other_things)
    try:
        yield
    finally:
        logger.removeFilter(_is_about_other_things)
        if before is missing:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = before  # type: ignore[assignment]


with no_hub_kernels():
    import bitsandbytes as bnb

__all__ = ["bnb", "no_hub_kernels"]
