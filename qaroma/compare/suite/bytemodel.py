"""A language model of bytes, small enough to train a thousand steps in seconds, and the texts for it.

Dimensions: B windows, L length of a window.
"""

from __future__ import annotations

import copy
import gzip
import hashlib
import json
import math
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

LENGTH = 64  # bytes of a window
_SIZES = {"hidden_size": 64, "intermediate_size": 168, "num_hidden_layers": 3}  # 146k weights in 21 linear layers
_PRETRAINING = {"steps": 1500, "batch": 32, "rate": 4e-3, "version": 1}


def pretrained(text: Path, cache: Path) -> Any:
    """A Llama of bytes that has read a text; trained once for each text, then read from the cache.

    Args:
        text: a file that :func:`read_text` takes.
        cache: folder of the weights, whose name tells text and recipe apart.

    Returns:
        A fresh ``LlamaForCausalLM`` in fp32.
    """
    return copy.deepcopy(_pretrained(text, cache))


@lru_cache(maxsize=1)
def _pretrained(text: Path, cache: Path) -> Any:
    recipe = json.dumps({**_SIZES, **_PRETRAINING}, sort_keys=True).encode()
    name = hashlib.sha256(recipe + text.read_bytes()).hexdigest()[:12]
    file = cache / f"byte-model-{name}.safetensors"
    model = _new_model()
    if not file.is_file():
        _pretrain(model, read_text(text))
        cache.mkdir(parents=True, exist_ok=True)
        aside = file.with_suffix(f".{os.getpid()}")
        save_file({n: p.detach().contiguous() for n, p in model.named_parameters()}, aside)
        os.replace(aside, file)
    model.load_state_dict(load_file(file), strict=False)  # the head shares the embeddings' table
    return model


def _new_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=2 * LENGTH,
            tie_word_embeddings=True, **_SIZES,
        )
    )  # fmt: skip


def _pretrain(model: nn.Module, tokens: Tensor) -> None:
    """AdamW on everything, with a warm-up of 50 steps and a cosine to 2 %."""
    rate, steps, parameters = _PRETRAINING["rate"], int(_PRETRAINING["steps"]), list(model.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 50) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
        optimiser.zero_grad()
        next_byte_loss(model, windows(tokens, int(_PRETRAINING["batch"]), generator)).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()


def next_byte_logits(model: Any, bytes_BL: Tensor) -> Tensor:
    """(B, L, 256)."""
    positions = torch.arange(bytes_BL.shape[1]).expand_as(bytes_BL)
    hidden = model.model(input_ids=bytes_BL, position_ids=positions, use_cache=False).last_hidden_state
    return model.lm_head(hidden)  # type: ignore[no-any-return]


def next_byte_loss(model: nn.Module, windows_BL: Tensor) -> Tensor:
    """Mean cross-entropy of every byte but the first of each window."""
    logits = next_byte_logits(model, windows_BL[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), windows_BL[:, 1:].flatten())


def windows(tokens: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(B, L + 1) windows from random places of a text."""
    starts = torch.randint(0, len(tokens) - LENGTH - 1, (count, 1), generator=generator)
    return tokens[starts + torch.arange(LENGTH + 1)]


def read_text(file: Path) -> Tensor:
    """The bytes of a data file's rows, one after the other.

    Args:
        file: rows in alpaca form or with a ``sentence``, as ``.json`` or ``.jsonl``, also ``.gz``.
    """
    raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    content = raw.decode("utf-8")
    rows = json.loads(content) if content.lstrip().startswith("[") else map(json.loads, content.splitlines())
    text = "\n\n".join(_rendered(row) for row in rows)
    return torch.tensor(list(text.encode("utf-8")), dtype=torch.long)


def _rendered(row: dict[str, Any]) -> str:
    if "sentence" in row:
        return str(row["sentence"]).strip()
    asked = "\n".join(part for part in (row["instruction"], row.get("input") or "") if part)
    return f"{asked}\n{row['output']}"
