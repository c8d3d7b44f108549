"""``python -m phantom NAME...``: run scenarios, all of them where none is named; one line of JSON for each."""

from __future__ import annotations

import os
import sys

from phantom import guard


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    guard.arm()
    from phantom.run import run

    run(sys.argv[1:])


main()
