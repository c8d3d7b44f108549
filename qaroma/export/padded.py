"""The adapter for engines that read one global scale: vLLM, SGLang, Ollama.

They take ``lora_alpha / r`` for every module and ignore ``rank_pattern`` and ``alpha_pattern``, so
every target module is written at one rank, zero-padded, with alpha equal to it: their scale is 1
and ours stands in B. vLLM allocates for one ``--max-lora-rank`` out of a fixed list.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from qaroma.errors import QaromaError
from qaroma.method.factors import Factors, Update
from qaroma.runs.peft_lora import lora_config, write_lora

RANKS = (8, 16, 32, 64, 128, 256)


def padded_rank(largest: int) -> int:
    """The smallest rank of :data:`RANKS` that holds an adapter's largest one.

    Raises:
        QaromaError: no such rank.
    """
    for rank in RANKS:
        if largest <= rank:
            return rank
    raise QaromaError(
        f"the adapter's largest rank is {largest}, the engines that read 'padded' take at most {RANKS[-1]}; "
        "drop redundant directions with --compress 0.01, or export --format merged"
    )


def pad(factors: Factors, rank: int) -> Factors:
    """The same update at a rank that is not smaller, the rest zeros."""
    rows = (0, 0, 0, rank - factors.rank)
    return Factors(F.pad(factors.A, rows), F.pad(factors.B, rows))


def write_padded(
    folder: Path, update: Update, *, linear: Collection[str], base: str | None, dtype: torch.dtype
) -> dict[str, Any]:
    """Write every target module, rank-0 ones too, at one rank.

    Args:
        folder: an existing directory.
        update: the update.
        linear: names of all the model's linear layers.
        base: name of the base model, for the configuration.
        dtype: of the factors.

    Returns:
        ``max_lora_rank``: what the engine is started with.

    Raises:
        QaromaError: a module of too large a rank.
    """
    rank = padded_rank(max(factors.rank for factors in update.values()))
    config = lora_config(dict.fromkeys(update, rank), base)
    config |= {"rank_pattern": {}, "alpha_pattern": {}, "target_modules": target_names(update, linear)}
    write_lora(folder, {name: pad(factors, rank) for name, factors in update.items()}, config, dtype)
    return {"max_lora_rank": rank}


def target_names(update: Update, linear: Collection[str]) -> list[str]:
    """The last parts of the modules' names, which every engine knows, where they mean exactly these modules."""
    ends = sorted({name.rpartition(".")[2] for name in update})
    meant = {name for name in linear if name.rpartition(".")[2] in ends}
    return ends if meant == set(update) else list(update)
