"""``python -m qaroma.compare.attached ...``: the command line of qaroma, which stops when its parent is gone.

However the parent ends, the system closes its end of this process's standard input.
"""

from __future__ import annotations

import _thread
import os
import sys
import threading

from qaroma.cli import main


def _stop_at_the_end_of_input() -> None:
    while os.read(0, 1):  # sys.stdin has a lock, which a thread that waits must not hold when the process ends
        pass
    _thread.interrupt_main()  # as Ctrl-C: the run saves its state first


if __name__ == "__main__":
    threading.Thread(target=_stop_at_the_end_of_input, daemon=True).start()
    sys.exit(main())
