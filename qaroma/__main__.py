"""``python -m qaroma`` is the console script ``qaroma``."""

from __future__ import annotations

import sys

from qaroma.cli import main

if __name__ == "__main__":
    sys.exit(main())
