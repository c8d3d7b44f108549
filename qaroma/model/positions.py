"""Models that have learnt a vector for each position, and have none for the positions beyond."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from qaroma.errors import QaromaError

SPARE = 8  # rows of a table that may stand for no position; OPT's begins with two


def learnt_positions(network: Any) -> int | None:
    """Tokens of the longest input that a model has positions for; None where they are computed.

    Args:
        network: transformers model, on any device.
    """
    return next((positions for _, positions in _tables(network)), None)


def refuse_longer(model: str, network: Any) -> None:
    """Let a model whose positions are learnt say which inputs are too long; what it would else do ends a CUDA process.

    Args:
        model: its name, for the sentence.
        network: transformers model; changed in place.
    """
    for owner, positions in _tables(network):
        owner.register_forward_pre_hook(partial(_check, model, positions), with_kwargs=True)


def _tables(network: Any) -> Iterator[tuple[nn.Module, int]]:
    """The modules that look positions up, each with how many it has."""
    longest = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    words = network.get_input_embeddings()
    for owner in network.modules():
        for table in owner.children():
            if not isinstance(table, nn.Embedding) or table is words or longest is None:
                continue
            if longest <= table.num_embeddings <= longest + SPARE:
                # RoBERTa's positions begin behind the one of padding.
                yield owner, longest if table.padding_idx is None else table.num_embeddings - table.padding_idx - 1


def _check(model: str, positions: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = [args[0] if args else kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
    tokens = max((tensor.shape[1] for tensor in given if tensor is not None), default=0)
    if tokens > positions:
        raise QaromaError(
            f"got an input of {tokens} tokens; '{model}' has {positions} positions. Type a shorter one, or leave such "
            "rows out"
        )
