"""Whether rows are packed: told to transformers, which would ask the device.

Dimensions: B rows, L tokens of a row.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from qaroma.model.replaced import replaced


def packing_told(packed: bool) -> AbstractContextManager[None]:
    """Inside, a decoder's forward pass knows whether its rows hold several sequences each.

    transformers looks for them in the position ids, and the host waits for the device until it knows.

    Args:
        packed: whether a row holds more than one.
    """
    from transformers import masking_utils

    return replaced(masking_utils, "find_packed_sequence_indices", sequence_indices if packed else _none)


def sequence_indices(position_ids_BL: Tensor) -> Tensor:
    """Which sequence of its row each token belongs to, (B, L) int64: positions that do not go on begin another one."""
    before = position_ids_BL[:, :1] - 1
    return (torch.diff(position_ids_BL, prepend=before, dim=-1) != 1).cumsum(-1)


def _none(_: Tensor) -> None:
    return None
