"""Putting a model into a memory level (:mod:`qaroma.config.levels` says what each switches on)."""

from __future__ import annotations

from typing import Any

from qaroma.config.levels import LEVELS
from qaroma.engine.checkpointing import disable_checkpointing, enable_checkpointing
from qaroma.engine.host import THIS_HOST, Host
from qaroma.engine.placement import move_embeddings_to_host, quantise_head
from qaroma.engine.streaming import stream_layers
from qaroma.engine.tiled import tile_tokenwise, untile
from qaroma.method.pieces import Pieces, every_piece


def apply_level(
    model: Any, level: int, *, quant_type: str = "nf4", double_quantization: bool = True, host: Host = THIS_HOST,
    pieces: Pieces = every_piece,
) -> None:  # fmt: skip
    """Put a model into a memory level; a later call may go further down.

    What a level saves comes at a price in time, and from level 3 on in exactness: the head's logits are
    those of its 4-bit weight.

    Args:
        model: transformers model, with or without an adapter on; changed in place.
        level: index into :data:`qaroma.config.levels.LEVELS`.
        quant_type, double_quantization: of the head from level 3 on.
        host: whose memory levels use from 2 on.
        pieces: which tiles are computed, where a level has them.
    """
    chosen = LEVELS[level]
    if chosen.packed_head:
        quantise_head(model, quant_type, double_quantization=double_quantization)
    if chosen.host_embeddings:
        move_embeddings_to_host(model, host)
    if chosen.streamed:
        stream_layers(model, host)
    if chosen.tiled:
        tile_tokenwise(model, pieces=pieces)
    else:
        untile(model)
    if chosen.checkpointing:
        enable_checkpointing(model, offload=chosen.offload, host=host)
    else:
        disable_checkpointing(model)
