"""Running scenarios, each on a new phantom card, and saying what was seen."""

from __future__ import annotations

import gc
import json
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phantom.card import Card
from phantom.scenarios import SCENARIOS


def run(names: Sequence[str]) -> None:
    """Print a line of JSON for each of these scenarios."""
    warnings.filterwarnings("ignore")
    gc.freeze()  # what was imported is not looked through by each collection from here on
    for name in names or SCENARIOS:
        print(json.dumps(seen(name)), flush=True)


def seen(name: str) -> dict[str, Any]:
    """What a scenario did to a card."""
    start, error, result = time.process_time(), None, None
    with Card() as card:
        try:
            result = SCENARIOS[name].run(card)
        except Exception as raised:
            error = _told(raised)
    return {
        "name": name,
        "error": error,
        "mixes": card.mixes,
        "races": card.order.races,
        "freed_early": card.order.freed_early,
        "waits": card.waits,
        "pageable": card.pageable,
        "kernels": card.kernels,
        "attention": card.attention,
        "result": result,
        "seconds": round(time.process_time() - start, 2),
    }


def _told(error: Exception) -> str:
    """What was raised and where, without torch's own frames."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename]
    places = [f"{Path(f.filename).stem}.{f.name}:{f.lineno}" for f in frames]
    return f"{type(error).__name__}: {str(error)[:400]} at {' > '.join(places[-10:])}"
