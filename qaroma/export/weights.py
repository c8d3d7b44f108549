"""The tensors of a base, a block of rows at a time: as published, or as 4 bits give them back.

A merge never holds the model: it asks for some rows of one tensor, adds to them, and writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qaroma.errors import QaromaError
from qaroma.method.adapter import AdaptedLinear
from qaroma.method.dequantise import dense_rows, dense_weight, is_stored_transposed
from qaroma.method.factors import Update
from qaroma.model.builtin import resolve_model
from qaroma.model.weight_files import weight_files

BLOCK_ELEMENTS = 1 << 22
_ROWS = 64  # a block begins where a block of 4-bit values begins, whatever its width
_DEQUANTISED = "type --merge-into dequantised"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a base, read in slices along its first dimension.

    Attributes:
        name: as a checkpoint of transformers has it.
        shape: of the whole tensor.
        dtype: as it is stored.
        rows: ``rows(start, stop)`` reads some rows; for a tensor without dimensions, all of it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Callable[[int, int], Tensor]

    @property
    def elements(self) -> int:
        return torch.Size(self.shape).numel()

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """All rows in blocks of about :data:`BLOCK_ELEMENTS`: the first row's index, and the block."""
        if not self.shape:
            yield 0, self.rows(0, 1)
            return
        step = max(_ROWS, BLOCK_ELEMENTS // max(1, self.elements // self.shape[0]) // _ROWS * _ROWS)
        for start in range(0, self.shape[0], step):
            yield start, self.rows(start, min(start + step, self.shape[0]))


def merged_tensors(tensors: list[StoredTensor], update: Update) -> list[StoredTensor]:
    """The same tensors with an adapter's update added, in fp32, to those that it adapts.

    Args:
        tensors: all of a base's.
        update: the update, A and B changed over for weights that are stored as (N, M).

    Raises:
        QaromaError: a module whose weight is not among the tensors, or is of another shape.
    """
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    for module, factors in update.items():
        shape = shapes.get(f"{module}.weight")
        if factors.rank and shape != factors.shape:
            what = "does not have" if shape is None else f"has as {' x '.join(map(str, shape))}"
            raise QaromaError(f"the adapter adapts {module}, which the base's checkpoint {what}; {_DEQUANTISED}")
    return [_merged(tensor, update) for tensor in tensors]


def _merged(tensor: StoredTensor, update: Update) -> StoredTensor:
    factors = update.get(tensor.name.removesuffix(".weight")) if tensor.name.endswith(".weight") else None
    if factors is None or factors.rank == 0:
        return tensor

    def rows(start: int, stop: int) -> Tensor:
        # Not in place: what safetensors gives may be the mapped file itself.
        return torch.addmm(tensor.rows(start, stop).float(), factors.B[:, start:stop].T, factors.A)

    return StoredTensor(tensor.name, tensor.shape, tensor.dtype, rows)


def dequantised_tensors(model: nn.Module) -> list[StoredTensor]:
    """The tensors of a loaded base, 4-bit weights as they are multiplied by: what training saw.

    Args:
        model: from :func:`qaroma.load_base`, with an adapter on it (which is left out) or not.
    """
    adapted = {name for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}
    seen: set[int] = set()
    found = []
    for path, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            continue
        parent, _, last = path.rpartition(".")
        name = parent if last == "base" and parent in adapted else path
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:  # a head tied to the embeddings is not stored twice
                seen.add(id(parameter))
                found.append(_of_parameter(f"{name}.{key}", key, module, parameter))
    return found


def _of_parameter(name: str, key: str, module: nn.Module, parameter: Tensor) -> StoredTensor:
    if key == "weight" and getattr(parameter, "quant_state", None) is not None:
        shape: tuple[int, ...] = (module.out_features, module.in_features)  # type: ignore[assignment]
        if is_stored_transposed(module):
            turned = shape[::-1]
            return StoredTensor(
                name, turned, torch.float32, lambda a, b: dense_weight(module, torch.float32).T[a:b].cpu()
            )
        return StoredTensor(name, shape, torch.float32, lambda a, b: dense_rows(module, a, b, torch.float32).cpu())
    if not parameter.shape:
        return StoredTensor(name, (), parameter.dtype, lambda a, b: parameter.detach().cpu())
    return StoredTensor(
        name, tuple(parameter.shape), parameter.dtype, lambda a, b: parameter.detach()[a:b].cpu().clone()
    )


def original_tensors(model: str | Path, config: Any, *, revision: str | None = None) -> list[StoredTensor]:
    """The tensors of a base as it is published: from its safetensors files, mapped, or its GGUF file.

    Args:
        model: name of the base as the user gave it.
        config: its transformers configuration.
        revision: branch, tag or commit on the hub.

    Raises:
        QaromaError: the base is published in 4 bits, or not as safetensors.
    """
    place = resolve_model(model)
    if place.gguf_file is not None:
        return gguf_tensors(Path(place.folder_or_id) / place.gguf_file, config)
    settings = getattr(config, "quantization_config", None)
    if settings is not None:
        raise QaromaError(f"'{model}' is published quantised, there is no original to merge into; {_DEQUANTISED}")
    folder = Path(place.folder_or_id)
    if not folder.is_dir():
        folder = _snapshot(place.folder_or_id, revision, place.offline)
    files = weight_files(folder)
    if not files:
        raise QaromaError(f"'{model}' has no safetensors files; {_DEQUANTISED}")
    tied = config.get_text_config().tie_word_embeddings  # some checkpoints hold the shared table twice
    return [t for file in files for t in file_tensors(file) if not (tied and t.name == "lm_head.weight")]


def _snapshot(model_id: str, revision: str | None, offline: bool) -> Path:
    from huggingface_hub import snapshot_download

    from qaroma.model.failures import explained

    with explained(model_id, gguf=False):
        patterns = ["*.safetensors", "*.json"]
        return Path(snapshot_download(model_id, revision=revision, allow_patterns=patterns, local_files_only=offline))


def checkpoint_tensors(folder: Path) -> list[StoredTensor]:
    """The tensors of a folder with safetensors files, one or several."""
    return [tensor for file in weight_files(folder) for tensor in file_tensors(file)]


def file_tensors(path: Path) -> list[StoredTensor]:
    """The tensors of one safetensors file, mapped."""
    from safetensors import safe_open

    file: Any = safe_open(path, framework="pt")
    found = []
    for name in file.keys():  # noqa: SIM118
        part = file.get_slice(name)
        shape = tuple(part.get_shape())
        dtype = file.get_tensor(name).dtype if not shape else part[:1].dtype

        def rows(start: int, stop: int, name: str = name, whole: bool = not shape) -> Tensor:
            read: Tensor = file.get_tensor(name) if whole else file.get_slice(name)[start:stop]
            return read

        found.append(StoredTensor(name, shape, dtype, rows))
    return found


def gguf_tensors(path: Path, config: Any) -> list[StoredTensor]:
    """The tensors of a GGUF model under transformers' names, dequantised to fp32.

    Args:
        path: the .gguf file.
        config: the transformers configuration of the model in it.

    Raises:
        QaromaError: an architecture that is not read tensor by tensor.
    """
    import transformers

    from qaroma.model.gguf import lazy_state_dict

    kind = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    lazy = lazy_state_dict(path, kind, config, torch.float32)
    if lazy is None:
        raise QaromaError(f"'{path}' is of an architecture that is not read tensor by tensor; {_DEQUANTISED}")
    whole: dict[str, Tensor] = {}  # the last tensor read: gguf's blocks are dequantised all at once

    def rows(name: str, start: int, stop: int) -> Tensor:
        if name not in whole:
            whole.clear()
            whole[name] = lazy[name][:]
        return whole[name][start:stop]

    return [StoredTensor(name, t.shape, torch.float32, partial(rows, name)) for name, t in lazy.items()]
