"""Writing safetensors shards without holding one: the header is known beforehand, the rest is streamed."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qaroma.errors import QaromaError
from qaroma.export.weights import StoredTensor

MAX_SHARD_BYTES = 5 * 10**9
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def write_shards(
    folder: Path, tensors: Sequence[StoredTensor], dtype: torch.dtype, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> int:
    """Write tensors as ``model.safetensors``, or as shards with an index, in their order.

    Args:
        folder: an existing directory.
        tensors: read a block of rows at a time.
        dtype: of every floating-point tensor in the files.
        max_shard_bytes: of one file, unless a single tensor is larger.

    Returns:
        Bytes of all tensors.

    Raises:
        QaromaError: a value that the dtype cannot hold.
    """
    shards: list[list[StoredTensor]] = [[]]
    filled = total = 0
    for tensor in tensors:
        size = _bytes(tensor, dtype)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled, total = filled + size, total + size
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, shard, dtype)
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return total


def _write_file(path: Path, tensors: Sequence[StoredTensor], dtype: torch.dtype) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + _bytes(tensor, dtype)
        kind = _DTYPES[_stored_dtype(tensor, dtype)]
        header[tensor.name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            for _, block in tensor.blocks():
                file.write(_raw(tensor.name, block, _stored_dtype(tensor, dtype)))


def _raw(name: str, block: Tensor, dtype: torch.dtype) -> Any:
    converted = block.to(dtype).contiguous()
    if dtype.is_floating_point and not bool(converted.isfinite().all()):
        raise QaromaError(f"{name} has values that {dtype} cannot hold; type --dtype bf16 or --dtype fp32")
    return converted.reshape(-1).view(torch.uint8).numpy().data


def _stored_dtype(tensor: StoredTensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if tensor.dtype.is_floating_point else tensor.dtype


def _bytes(tensor: StoredTensor, dtype: torch.dtype) -> int:
    return tensor.elements * _stored_dtype(tensor, dtype).itemsize
