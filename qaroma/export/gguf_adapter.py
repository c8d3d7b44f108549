"""The adapter as llama.cpp reads it.

llama.cpp multiplies B A by ``adapter.lora.alpha`` over that pair's own rank, and by 1 where alpha is 0
(``llama_adapter_lora_weight::get_scale``). So alpha is 0: every pair has the rank that it grew, and its scale stands in
B. The file holds B as (M, R); it is turned here.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qaroma.export.gguf_names import GgufNames
from qaroma.method.factors import Factors, Update

FILE = "adapter.gguf"


def write_gguf_adapter(folder: Path, update: Update, config: Any, *, name: str, dtype: torch.dtype) -> None:
    """Write ``adapter.gguf``; modules of rank 0 are left out.

    Args:
        folder: an existing directory.
        update: the update.
        config: the base's transformers configuration.
        name: what the adapter is called in the file.
        dtype: fp32, fp16 or bf16, of the factors.

    Raises:
        QaromaError: an architecture or a module that GGUF has no name for.
    """
    from gguf import GGUFType, GGUFWriter, Keys

    names = GgufNames(config)
    pairs = {module: factors for module, factors in update.items() if factors.rank}
    if not pairs:  # a file without tensors is none to some readers
        pairs = {module: Factors.zero(factors.shape, 1) for module, factors in list(update.items())[:1]}
    writer = GGUFWriter(folder / FILE, names.architecture.name)
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, 0.0)
    writer.add_name(name)
    for module, (A, B) in pairs.items():
        order = names.row_order(f"{module}.weight", B.shape[1])
        tensor = names.tensor(f"{module}.weight")
        for suffix, values in (("lora_a", A), ("lora_b", B.T if order is None else B.T[order])):
            data, kind = _stored(values, dtype)
            writer.add_tensor(f"{tensor}.{suffix}", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf_adapter(path: Path, config: Any, modules: Iterable[str]) -> dict[str, Factors]:
    """Read an adapter back by llama.cpp's rules: alpha over each pair's rank or 1, rows put in transformers' order.

    Args:
        path: the file.
        config: the base's transformers configuration.
        modules: full names of those that may be in it.
    """
    from gguf import GGUFReader, Keys, dequantize

    names = GgufNames(config)
    reader = GGUFReader(path)
    alpha = float(reader.fields[Keys.Adapter.LORA_ALPHA].contents())
    tensors = {t.name: torch.from_numpy(dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    found = {}
    for module in modules:
        stored = names.tensor(f"{module}.weight")
        if f"{stored}.lora_a" not in tensors:
            continue
        A, B = tensors[f"{stored}.lora_a"], tensors[f"{stored}.lora_b"]
        order = names.row_order(f"{module}.weight", B.shape[0])
        if order is not None:
            B = B[order.argsort()]
        found[module] = Factors(A, B.T * (alpha / len(A) if alpha else 1.0))
    return found


def _stored(values: torch.Tensor, dtype: torch.dtype) -> tuple[np.ndarray[Any, Any], Any]:
    """A matrix as gguf's writer takes it, and its type."""
    from gguf import GGMLQuantizationType as Kind
    from gguf import quantize

    kind = {torch.float32: Kind.F32, torch.float16: Kind.F16, torch.bfloat16: Kind.BF16}[dtype]
    return quantize(np.ascontiguousarray(values.numpy()), kind), kind
