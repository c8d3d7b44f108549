"""How several GPUs share a step: each takes as many of its micro-batches."""

from __future__ import annotations

from qaroma.errors import QaromaError


def micro_batches_each(grad_accum: int, gpus: int) -> int:
    """The micro-batches that each GPU takes of a step, whose batch stays what it is on one.

    Args:
        grad_accum: micro-batches of a step.
        gpus: that share them, on one machine or several.

    Raises:
        QaromaError: they cannot take equally many; the nearest ``grad_accum`` with which they could is named.
    """
    each, rest = divmod(grad_accum, gpus)
    if not rest:
        return each
    near = gpus * max(1, (grad_accum + gpus // 2) // gpus)
    fewer = max(count for count in range(1, gpus) if grad_accum % count == 0)
    keeps = f", or take {fewer} GPUs, which keeps the batch" if fewer > 1 else ""
    raise QaromaError(
        f"got grad_accum {grad_accum} on {gpus} GPUs; expected a multiple of {gpus}: each takes as many micro-batches "
        f"of a step. Type: --grad-accum {near}{keeps}"
    )
