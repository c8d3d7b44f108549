"""The fine-tuned model as an ordinary checkpoint: the update added to the weights, never requantised."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qaroma.export.shards import MAX_SHARD_BYTES, write_shards
from qaroma.export.weights import StoredTensor, merged_tensors
from qaroma.method.factors import Update
from qaroma.model.builtin import resolve_model


def write_merged(
    folder: Path,
    tensors: list[StoredTensor],
    update: Update,
    config: Any,
    *,
    dtype: torch.dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, Any]:
    """Write ``config.json`` and safetensors shards, one block of rows after another.

    Args:
        folder: an existing directory.
        tensors: the base's, from :mod:`qaroma.export.weights`.
        update: the update.
        config: the base's transformers configuration.
        dtype: bf16, fp16 or fp32, of every weight.
        max_shard_bytes: of one file.

    Returns:
        ``bytes`` of the weights.

    Raises:
        QaromaError: the update does not fit the tensors, or a value the dtype cannot hold.
    """
    total = write_shards(folder, merged_tensors(tensors, update), dtype, max_shard_bytes=max_shard_bytes)
    plain = plain_config(config, dtype)
    # A head that was held in 4 bits apart from the embeddings is a tensor of its own from then on.
    plain.tie_word_embeddings = plain.tie_word_embeddings and all(t.name != "lm_head.weight" for t in tensors)
    plain.save_pretrained(folder)
    _add_older_names(folder / "config.json")
    return {"bytes": total}


def _add_older_names(path: Path) -> None:
    """Say what ``rope_parameters`` holds under the names that it had before transformers 5, too.

    mlx-lm and engines with an older transformers know no others: without them they take their own default for the base
    of the positions' angles, and answer otherwise.
    """
    settings = json.loads(path.read_text(encoding="utf-8"))
    kinds = settings.get("rope_parameters") or {}
    rope = kinds.get("full_attention", kinds)
    older = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    if rope.get("rope_type", "default") != "default":
        older["rope_scaling"] = {name: value for name, value in rope.items() if name not in older}
    if "sliding_attention" in kinds:
        older["rope_local_base_freq"] = kinds["sliding_attention"]["rope_theta"]
    path.write_text(json.dumps({**settings, **older}, indent=2), encoding="utf-8")


def plain_config(config: Any, dtype: torch.dtype) -> Any:
    """A copy of a configuration that says nothing of quantisation."""
    plain = copy.deepcopy(config)
    for part in (plain, plain.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
        part.dtype = dtype
        part.use_cache = True
    return plain


def write_generation_settings(folder: Path, tokenizer: Any, stops: list[int], base: Mapping[str, Any]) -> None:
    """Write ``generation_config.json``: the base's own settings, with what ends an answer added.

    Args:
        folder: an existing directory.
        tokenizer: of the base.
        stops: ids of the tokens at which generation ends.
        base: the base's settings; empty where it has none.
    """
    given = base.get("eos_token_id")
    own = given if isinstance(given, list) else [] if given is None else [given]
    ids = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    settings = {**{name: value for name, value in ids.items() if value is not None}, **base}
    settings["eos_token_id"] = sorted({*own, *stops})
    # Not by save_pretrained, which refuses settings that many published models have (a temperature of greedy answers).
    (folder / "generation_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


def copy_code(base: str, folder: Path) -> None:
    """Copy the Python files that a local base brings; a configuration from the hub says where they are.

    Args:
        base: name of the base as the user gave it.
        folder: of the merged checkpoint.
    """
    place = Path(resolve_model(base).folder_or_id)
    for file in place.glob("*.py") if place.is_dir() else ():
        shutil.copy(file, folder)
