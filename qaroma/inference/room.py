"""A base that is larger than the card's free memory answers all the same: its layers are streamed."""

from __future__ import annotations

import logging
from typing import Any

import torch

from qaroma.config.words import memory_size
from qaroma.engine.placement import move_embeddings_to_host
from qaroma.engine.streaming import stream_layers
from qaroma.model.found import FoundModel
from qaroma.plan.card import RESERVE
from qaroma.plan.shapes import plannable
from qaroma.plan.weightless_model import base_bytes

logger = logging.getLogger(__name__)


def has_room(
    base: FoundModel, device: torch.device, *, dtype: torch.dtype, packed: bool = True, double: bool = True,
    packed_head: bool = False,
) -> bool:  # fmt: skip
    """Whether a device's free memory holds the weights of a causal model.

    Taken for granted of a CPU, whose memory is the host's, and of models that bring code of their own.

    Args:
        base: looked up.
        device: where it is to go.
        dtype, packed, double, packed_head: see :func:`qaroma.plan.weightless_model.base_bytes`.
    """
    if device.type != "cuda" or base.trust_remote_code:
        return True
    needed = base_bytes(plannable(base), dtype=dtype, packed=packed, double=double, packed_head=packed_head)
    return needed + RESERVE < torch.cuda.mem_get_info(device)[0]


def stream_to_answer(model: Any) -> None:
    """Let a base that was loaded to host memory compute, and say what it costs."""
    move_embeddings_to_host(model)
    stream = stream_layers(model)
    logger.warning(
        "The base does not fit the card's free memory: %s of it are copied from host memory for every token of an "
        "answer, which is slow.",
        memory_size(stream.bytes),
    )
