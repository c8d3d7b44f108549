"""``python -m qaroma.cli.attached ...``: the command line of qaroma, which stops when its parent is gone.

However the parent ends, the system closes its end of this process's standard input.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading

from qaroma.cli import main


def attach() -> None:
    """From now on this process stops at the end of its standard input, as at Ctrl-C."""
    # A shell that starts a comparison in the background has it, and what it starts, ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_stop_at_the_end_of_input, daemon=True).start()


def _stop_at_the_end_of_input() -> None:
    while os.read(0, 1):  # sys.stdin has a lock, which a thread that waits must not hold when the process ends
        pass
    # The run saves its state first.
    if hasattr(signal, "pthread_kill"):  # also wakes a main thread that waits for the system
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    else:
        _thread.interrupt_main()


if __name__ == "__main__":
    attach()
    sys.exit(main())
