"""The adapter as mlx-lm reads it, on Apple's chips.

mlx-lm has one rank for all layers that it adapts, which are named within a layer and adapted in each: so every pair is
zero-padded to the largest rank, and a module that did not grow in one layer is left out there, where mlx-lm begins
with zeros. It computes ``y + scale * (x lora_a) lora_b``; our scale stands in B, and its is 1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from qaroma.errors import QaromaError
from qaroma.export.padded import pad
from qaroma.method.factors import Factors, Update

FILE, CONFIG = "adapters.safetensors", "adapter_config.json"
# Whose modules mlx-lm calls what transformers does; each is loaded in it by a test.
FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "granite", "smollm3", "olmo2",
    "starcoder2", "cohere",
)  # fmt: skip
_IN_LAYER = re.compile(r"model\.layers\.\d+\.")


def check_family(config: Any) -> None:
    """Refuse a family whose modules mlx-lm may call otherwise.

    Raises:
        QaromaError: it is none of :data:`FAMILIES`.
    """
    if config.model_type not in FAMILIES:
        raise QaromaError(
            f"the base is of the architecture '{config.model_type}', which MLX exports do not cover; expected "
            f"{', '.join(FAMILIES)}. Type: --format merged, which mlx-lm converts"
        )


def write_mlx_adapter(folder: Path, update: Update, config: Any, *, base: str, dtype: torch.dtype) -> None:
    """Write ``adapters.safetensors`` and ``adapter_config.json``.

    Args:
        folder: an existing directory.
        update: the update.
        config: the base's transformers configuration.
        base: name of the base, for the configuration.
        dtype: of the factors.
    """
    from safetensors.torch import save_file

    rank = max(1, *(factors.rank for factors in update.values()))
    tensors: dict[str, torch.Tensor] = {}
    for module, factors in update.items():
        if factors.rank:
            A, B = pad(factors, rank)
            tensors |= {f"{module}.lora_a": A.T.to(dtype).contiguous(), f"{module}.lora_b": B.to(dtype).contiguous()}
    save_file(tensors, folder / FILE)
    keys = sorted({_IN_LAYER.sub("", name.rpartition(".")[0]) for name in tensors})
    settings = {
        "fine_tune_type": "lora",
        "model": base,
        "num_layers": config.num_hidden_layers,
        "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": keys},
    }
    (folder / CONFIG).write_text(json.dumps(settings, indent=2), encoding="utf-8")


def read_mlx_adapter(folder: Path, modules: Iterable[str]) -> dict[str, Factors]:
    """Read an adapter back by mlx-lm's rules.

    Args:
        folder: of the export.
        modules: full names of those that may be in it.
    """
    from safetensors.torch import load_file

    scale = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["lora_parameters"]["scale"]
    tensors = {name: tensor.float() for name, tensor in load_file(folder / FILE).items()}
    held = [module for module in modules if f"{module}.lora_a" in tensors]
    return {m: Factors(tensors[f"{m}.lora_a"].T.contiguous(), tensors[f"{m}.lora_b"] * scale) for m in held}
