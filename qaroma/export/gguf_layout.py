"""A base's tensors as GGUF holds them: its names, its order of rows, experts in one tensor for each projection.

Dimensions: E experts, I intermediate size, D hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qaroma.export.gguf_names import GgufNames
from qaroma.export.weights import StoredTensor

_EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<index>\d+)\.(?P<projection>\w+)\.weight")


class Placed(NamedTuple):
    """A tensor under GGUF's name.

    Attributes:
        tensor: its rows in transformers' order.
        order: which of them stands in each row of the file; None where the order is the same.
    """

    tensor: StoredTensor
    order: Tensor | None


def gguf_layout(tensors: Sequence[StoredTensor], names: GgufNames) -> list[Placed]:
    """Every tensor of a model as its file holds it.

    Args:
        tensors: of the model, under transformers' names: fused experts, or each its own as checkpoints have them.
        names: of the model's architecture.

    Raises:
        QaromaError: a tensor that GGUF has no name for.
    """
    offset = names.architecture.norm_offset
    placed = []
    for tensor in _experts_together(tensors):
        order = names.row_order(tensor.name, tensor.shape[0])
        if offset and tensor.name.endswith("norm.weight"):
            tensor = replace(tensor, rows=partial(_plus, tensor, offset))
        placed.append(Placed(replace(tensor, name=names.tensor(tensor.name)), order))
    return placed


def read_linears(path: Path, config: Any, modules: Iterable[str]) -> list[StoredTensor]:
    """The weights of some linear layers of a GGUF model, dequantised to fp32, under transformers' names.

    Args:
        path: the .gguf file.
        config: the transformers configuration of the model in it.
        modules: full names of the layers.
    """
    from gguf import GGUFReader, dequantize

    names, stored = GgufNames(config), {tensor.name: tensor for tensor in GGUFReader(path).tensors}

    def rows(module: str, start: int, stop: int) -> Tensor:
        tensor = stored[names.tensor(f"{module}.weight")]
        whole = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        order = names.row_order(f"{module}.weight", len(whole))
        return whole[start:stop] if order is None else whole[order.argsort()[start:stop]]

    shapes = {module: stored[names.tensor(f"{module}.weight")].shape for module in modules}
    return [
        StoredTensor(f"{module}.weight", tuple(int(n) for n in shape[::-1]), torch.float32, partial(rows, module))
        for module, shape in shapes.items()
    ]


def _plus(tensor: StoredTensor, offset: float, start: int, stop: int) -> Tensor:
    return tensor.rows(start, stop).float() + offset


def _experts_together(tensors: Sequence[StoredTensor]) -> list[StoredTensor]:
    """The same tensors with one (E, I, D) for each projection of the experts, in the place of what they came as."""
    found: list[StoredTensor] = []
    single: dict[str, list[StoredTensor]] = {}
    for tensor in tensors:
        match = _EXPERT.fullmatch(tensor.name)
        if match:
            single.setdefault(f"{match['experts']}.{match['projection']}", []).append(tensor)
        elif tensor.name.endswith(".experts.gate_up_proj"):
            found += _halves(tensor)
        elif tensor.name.endswith(".experts.down_proj"):
            found.append(replace(tensor, name=f"{tensor.name}.weight"))
        else:
            found.append(tensor)
    for name, experts in single.items():
        experts.sort(key=lambda one: int(_EXPERT.fullmatch(one.name)["index"]))  # type: ignore[index]
        shape = (len(experts), *experts[0].shape)
        found.append(StoredTensor(f"{name}.weight", shape, experts[0].dtype, partial(_stacked, experts)))
    return found


def _halves(fused: StoredTensor) -> list[StoredTensor]:
    """Gate and up of (E, 2 I, D), which transformers keeps one after the other."""
    experts, both, width = fused.shape
    stem, half = fused.name.removesuffix("gate_up_proj"), both // 2

    def rows(first: int, start: int, stop: int) -> Tensor:
        return fused.rows(start, stop)[:, first : first + half]

    return [
        StoredTensor(f"{stem}{name}.weight", (experts, half, width), fused.dtype, partial(rows, first))
        for name, first in (("gate_proj", 0), ("up_proj", half))
    ]


def _stacked(experts: Sequence[StoredTensor], start: int, stop: int) -> Tensor:
    return torch.stack([one.rows(0, one.shape[0]) for one in experts[start:stop]])
