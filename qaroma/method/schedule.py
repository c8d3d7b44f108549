"""The jagged cosine: one cosine over the run, and a short climb after every new component."""

from __future__ import annotations

import math


def cosine(step: int, *, total: int, warmup: int, min_ratio: float) -> float:
    """Cosine from 1 at the end of the first warm-up to ``min_ratio`` at the step budget.

    Args:
        step: optimiser steps already done.
        total: step budget T.
        warmup: steps of the first warm-up.
        min_ratio: value at T.

    Returns:
        Factor of the peak learning rate, in [min_ratio, 1].
    """
    progress = min(max(step - warmup, 0) / max(total - warmup, 1), 1.0)
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def jagged_cosine(
    step: int, age: int, *, first: bool, total: int, warmup: int, restart_warmup: int, min_ratio: float
) -> float:
    """Factor of the peak learning rate for the next update (METHOD, "Published hyper-parameters").

    During a warm-up the factor climbs linearly towards the cosine's value at the same step, which
    the last update of the warm-up reaches; the climb starts from 0, where no update happens.

    Args:
        step: optimiser steps already done.
        age: steps done since the active component began.
        first: whether that component is the module's first.
        total, warmup, min_ratio: see :func:`cosine`.
        restart_warmup: steps of the climb after a reinit.

    Returns:
        Factor in (0, 1].
    """
    climb = warmup if first else restart_warmup
    share = min((age + 1) / climb, 1.0) if climb else 1.0
    return share * cosine(step, total=total, warmup=warmup, min_ratio=min_ratio)


def warm_cosine(step: int, *, total: int, warmup: int, min_ratio: float) -> float:
    """Factor of the peak for what never begins anew: one climb over the warm-up, then the cosine.

    Args:
        step, total, warmup, min_ratio: see :func:`cosine`.

    Returns:
        Factor in (0, 1].
    """
    return jagged_cosine(step, step, first=True, total=total, warmup=warmup, restart_warmup=0, min_ratio=min_ratio)
