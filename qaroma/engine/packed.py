"""Whether rows are packed: told to transformers, which would ask the device.

Dimensions: B rows, L tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from qaroma.model.documents import documents_told, knows_documents
from qaroma.model.replaced import replaced


@contextmanager
def packing_told(model: Any, documents: Sequence[int]) -> Iterator[None]:
    """Inside, a decoder's forward pass knows whether its rows hold several sequences each.

    transformers looks for them in the position ids, and the host waits for the device until it knows. Where it finds
    some, its mask keeps them apart; a model that knows documents needs none.

    Args:
        model: whose forward pass it is.
        documents: lengths of the sequences of all rows, padding included; empty where each is alone in its row.
    """
    from transformers import masking_utils

    knows = knows_documents(model)
    indices = sequence_indices if documents and not knows else _none
    told = documents_told(documents) if documents and knows else nullcontext()
    with replaced(masking_utils, "find_packed_sequence_indices", indices), told:
        yield


def sequence_indices(position_ids_BL: Tensor) -> Tensor:
    """Which sequence of its row each token belongs to, (B, L) int64: positions that do not go on begin another one."""
    before = position_ids_BL[:, :1] - 1
    return (torch.diff(position_ids_BL, prepend=before, dim=-1) != 1).cumsum(-1)


def _none(_: Tensor) -> None:
    return None
