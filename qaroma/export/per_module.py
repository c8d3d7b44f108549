"""The adapter with a rank of each module's own, for PEFT and transformers, and for qaroma itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qaroma.export.delta import Delta
from qaroma.runs.adapter import peft_config, write_lora
from qaroma.runs.directory import GROWTH


def write_per_module(
    folder: Path, delta: Delta, *, base: str | None, dtype: torch.dtype, growth: Mapping[str, Any]
) -> None:
    """Write the modules of rank above 0 with their ranks in ``rank_pattern``, alpha equal to the rank.

    Where every module has rank 0, one zero pair is written, since PEFT refuses an adapter without any.

    Args:
        folder: an existing directory.
        delta: the update.
        base: name of the base model, for PEFT's configuration.
        dtype: of the factors.
        growth: the adapter's ``growth.json``; its components are replaced where the ranks are others.
    """
    pairs = {name: (factors.A, factors.B) for name, factors in delta.items() if factors.rank}
    if not pairs:
        name, factors = next(iter(delta.items()))
        rows, columns = factors.shape
        pairs = {name: (torch.zeros(1, columns), torch.zeros(rows, 1))}
    config = peft_config({name: A.shape[0] for name, (A, _) in pairs.items()}, base)
    write_lora(folder, pairs, config, dtype)
    components = dict(growth["components"])
    for name, factors in delta.items():
        if sum(components.get(name, [])) != factors.rank:
            components[name] = [factors.rank] if factors.rank else []
    text = json.dumps({**growth, "components": components}, indent=2)
    (folder / GROWTH).write_text(text, encoding="utf-8")
