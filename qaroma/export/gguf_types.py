"""Which of ggml's types each tensor of a GGUF model gets, and its numbers in that type.

The mixes are those of llama-quantize without an importance matrix (llama.cpp, src/llama-quant.cpp), so that a file
called q4_k_m is what its readers take it for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qaroma.errors import QaromaError
from qaroma.export import kquants
from qaroma.export.format_facts import OUTTYPES

_LAYER_PART = re.compile(r"blk\.(\d+)\.(attn_v|attn_qkv|ffn_down)\w*\.weight")
_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}  # for rows that are no whole number of 256
_BITS = {"Q4_K": 4, "Q5_K": 5, "Q6_K": 6}


def check_outtype(outtype: str) -> None:
    """Refuse what is no outtype.

    Raises:
        QaromaError: it is none of :data:`OUTTYPES`.
    """
    if outtype not in OUTTYPES:
        raise QaromaError(f"got the outtype '{outtype}'; expected {', '.join(OUTTYPES)}")


def file_type(outtype: str) -> int:
    """The number that ``general.file_type`` has for an outtype."""
    from gguf import LlamaFileType

    return int(LlamaFileType[OUTTYPES[outtype].file])


def kinds_of(shapes: Mapping[str, tuple[int, ...]], outtype: str, *, layers: int, grouped: bool) -> dict[str, Any]:
    """gguf's type of every tensor.

    Args:
        shapes: of a model's tensors, under GGUF's names.
        outtype: one of :data:`OUTTYPES`.
        layers: how many the model has.
        grouped: whether several heads share the same keys and values.
    """
    from gguf import GGML_QUANT_SIZES
    from gguf import GGMLQuantizationType as Kind

    head = "output.weight" if "output.weight" in shapes else "token_embd.weight"
    found = {}
    for name, shape in shapes.items():
        if len(shape) < 2 or ".ffn_gate_inp." in name:  # vectors, and the router of experts
            found[name] = Kind.F32
            continue
        wanted = _wanted(name, outtype, head=name == head, layers=layers, grouped=grouped)
        choices = [Kind[kind] for kind in (wanted, _FALLBACK.get(wanted, wanted), "F16")]
        found[name] = next(kind for kind in choices if shape[-1] % GGML_QUANT_SIZES[kind][0] == 0)
    return found


def _wanted(name: str, outtype: str, *, head: bool, layers: int, grouped: bool) -> str:
    """The type of a matrix whose rows are whole blocks of it: what matters most gets more bits."""
    kind = OUTTYPES[outtype].kind
    if head and kind in ("Q4_0", "Q4_K", "Q5_K"):
        return "Q6_K"
    match = _LAYER_PART.fullmatch(name)
    if match is None or not outtype.endswith("_m"):  # llama.cpp's medium mixes
        return kind
    layer, eighth = int(match[1]), layers // 8
    if layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2:
        return "Q6_K"
    # 70B models: eight heads share these values, so that more bits cost next to nothing.
    return "Q5_K" if layers == 80 and grouped and match[2] != "ffn_down" else kind


def converted(values: Tensor, kind: Any, name: str) -> np.ndarray[Any, Any]:
    """Numbers in one of gguf's types.

    Args:
        values: (..., N), fp32.
        kind: gguf's type.
        name: of the tensor, for the error.

    Returns:
        (..., N) in a floating-point type, or (..., bytes of a row).

    Raises:
        QaromaError: a value that the type cannot hold.
    """
    from gguf import quantize

    # A block's scale is held in fp16, too.
    largest = torch.finfo(torch.float32 if kind.name in ("F32", "BF16") else torch.float16).max
    if not bool(values.abs().amax() <= largest):
        raise QaromaError(f"{name} has values that {kind.name.lower()} cannot hold; type --outtype bf16")
    if kind.name in _BITS:
        return kquants.quantise(values, _BITS[kind.name])
    stored: np.ndarray[Any, Any] = quantize(np.ascontiguousarray(values.numpy()), kind)
    return stored
