"""The adapter folder: a PEFT LoRA as it stands, with ``growth.json`` beside it.

Each module has its own rank, so ``rank_pattern`` and ``alpha_pattern`` name every one, with alpha
equal to the rank: PEFT's factor alpha / r is 1 and our scale stands folded into B.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from qaroma.errors import QaromaError
from qaroma.method.adapter import Adapter
from qaroma.method.attach import check_shapes, linear_shapes
from qaroma.method.factors import Factors, Update
from qaroma.method.head import TrainedHead
from qaroma.model.base import fingerprint
from qaroma.runs.adapter_info import AdapterInfo, require_undamaged
from qaroma.runs.directory import GROWTH
from qaroma.runs.files import directory_written_aside
from qaroma.runs.peft_lora import lora_config, read_lora, write_lora


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter folder, read.

    Attributes:
        info: what ``growth.json`` says; its components fit the factors.
        update: modules that have a rank, fp32 on the CPU.
        head: full parameter name -> tensor of what was trained in full; empty for language models.
    """

    info: AdapterInfo
    update: dict[str, Factors]
    head: dict[str, Tensor]


def save_adapter(
    adapter: Adapter, folder: str | Path, *, base: str | None = None, info: AdapterInfo | None = None
) -> Path:
    """Write an adapter that ``PeftModel.from_pretrained(model, folder)`` loads.

    Args:
        adapter: active components count as they stand.
        folder: replaced where it holds an adapter.
        base: name of the base model, for PEFT's config.
        info: what it is to remember beside its components and their scale.

    Returns:
        The folder.
    """
    told = AdapterInfo(adapter.components(), adapter.inner_rank, adapter.alpha)
    if info is not None:
        told = replace(info, components=told.components, inner_rank=told.inner_rank, alpha=told.alpha)
    return write_adapter(folder, adapter.factors(), told, base=base)


def write_adapter(
    folder: str | Path,
    update: Update,
    info: AdapterInfo,
    *,
    base: str | None,
    head: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write an adapter folder, which appears whole or not at all.

    Args:
        folder: replaced where it holds an adapter.
        update: every target module.
        info: what ``growth.json`` says.
        base: name of the base model, for PEFT's config.
        head: full parameter name -> tensor of the modules ``info.task.head``.

    Returns:
        The folder.

    Raises:
        QaromaError: numbers that are not finite, or a folder that holds something else.
    """
    known = Path(folder) / GROWTH
    if Path(folder).is_dir() and any(Path(folder).iterdir()) and not known.is_file():
        raise QaromaError(f"{folder} holds other things and no adapter of qaroma; name a folder of its own")
    with directory_written_aside(Path(folder)) as aside:
        write_adapter_files(aside, update, info, base=base, head=head)
    return Path(folder)


def write_adapter_files(
    folder: Path,
    update: Update,
    info: AdapterInfo,
    *,
    base: str | None,
    dtype: torch.dtype = torch.float32,
    head: Mapping[str, Tensor] | None = None,
) -> None:
    """:func:`write_adapter` into an existing directory.

    Modules of rank 0 are left out; where all are 0, one zero pair is written, since PEFT refuses an
    adapter without any.
    """
    held = {name: factors for name, factors in update.items() if factors.rank}
    if not held:
        name, factors = next(iter(update.items()))
        held = {name: Factors.zero(factors.shape, rank=1)}
    whole = info.task.head if head else ()
    ranks = {name: factors.rank for name, factors in held.items()}
    write_lora(folder, held, lora_config(ranks, base, whole), dtype, whole=head)
    info.write(folder)


def read_adapter(folder: str | Path) -> SavedAdapter:
    """Read an adapter folder of qaroma.

    Raises:
        QaromaError: none, one of a newer version, or a damaged one.
    """
    info = AdapterInfo.read(folder)
    require_undamaged(Path(folder))
    found, head = read_lora(folder, whole=info.task.head)
    update = {}
    for name, parts in info.components.items():
        if not sum(parts):  # what the file may hold of it was written for PEFT's sake, all zeros
            continue
        if name not in found or found[name].rank != sum(parts):
            rank = found[name].rank if name in found else 0
            raise QaromaError(
                f"{folder} is damaged: {name} has rank {rank}, {GROWTH} says {sum(parts)}; copy the adapter again"
            )
        update[name] = found[name]
    return SavedAdapter(info, update, head)


def load_adapter(model: torch.nn.Module, folder: str | Path) -> Adapter:
    """Attach a saved adapter to its base model, all components frozen.

    Args:
        model: as :func:`qaroma.load_base` returns it; changed in place.
        folder: as :func:`save_adapter` wrote it.

    Raises:
        QaromaError: no adapter there, or one of another model.
    """
    saved = read_adapter(folder)
    info, shapes = saved.info, linear_shapes(model)
    missing = [name for name in info.components if name not in shapes]
    if missing:
        raise QaromaError(
            f"{folder} adapts {missing[0]}, which this model does not have; give the base it was trained on"
        )
    check_shapes(saved.update, shapes, str(folder))
    adapter = Adapter(model, info.components, inner_rank=info.inner_rank, alpha=info.alpha)
    for name, factors in saved.update.items():
        adapter.layers[name].load_factors(*factors, info.components[name])
    if info.task.head:
        TrainedHead(model, info.task.head).load(saved.head)
        model.requires_grad_(False)
    return adapter


def continue_from(adapter: Adapter, folder: str | Path) -> None:
    """Make a saved adapter the first frozen components of one that will grow on.

    Args:
        adapter: new, without any component; its scale has no part in what is loaded.
        folder: a PEFT LoRA, ours or not.

    Raises:
        QaromaError: no plain LoRA, one of another base, or one of modules that are not adapted here.
    """
    found, _ = read_lora(folder)
    check_shapes(found, linear_shapes(adapter.model), str(folder))
    left_out = [name for name in found if name not in adapter.layers]
    if left_out:
        raise QaromaError(
            f"{folder} adapts {left_out[0]}{' and others' if len(left_out) > 1 else ''}, which is not among the target "
            "modules of this run; type --set growth.target_modules=all-linear, or name them too"
        )
    components: Mapping[str, list[int]] = {}
    if (Path(folder) / GROWTH).is_file():
        info = AdapterInfo.read(folder)
        require_undamaged(Path(folder))
        components = info.components
        if info.base is not None and info.base.fingerprint != fingerprint(adapter.model):
            raise QaromaError(f"{folder} was trained on {info.base.name}, another model than this --model")
    for name, factors in found.items():
        parts = components.get(name, [factors.rank])
        if parts:  # a module without any was written for PEFT's sake, all zeros
            whole = sum(parts) == factors.rank  # else somebody changed the file since
            adapter.layers[name].load_factors(*factors, parts if whole else [factors.rank])
