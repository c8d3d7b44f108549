"""The adapter folder: a PEFT LoRA as it stands, with ``growth.json`` beside it.

Each module has its own rank, so ``rank_pattern`` and ``alpha_pattern`` name every one, with alpha
equal to the rank: PEFT's factor alpha / r is 1 and our scale stands folded into B.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qaroma.errors import QaromaError
from qaroma.method.adapter import Adapter
from qaroma.method.head import TrainedHead
from qaroma.runs.directory import CONFIG, GROWTH, WEIGHTS
from qaroma.runs.files import directory_written_aside

VERSION = 1
_PREFIX = "base_model.model."


def save_adapter(
    adapter: Adapter, folder: str | Path, *, base: str | None = None, growth: Mapping[str, Any] | None = None
) -> Path:
    """Write an adapter that ``PeftModel.from_pretrained(model, folder)`` loads.

    Args:
        adapter: active components count as they stand.
        folder: replaced where it exists.
        base: name of the base model, for PEFT's config.
        growth: what else ``growth.json`` says (base, template, settings).

    Returns:
        The folder.
    """
    about = {"inner_rank": adapter.inner_rank, "alpha": adapter.alpha, **(growth or {})}
    return save_factors(folder, adapter.factors(), adapter.components(), base=base, growth=about)


def save_factors(
    folder: str | Path,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    components: Mapping[str, list[int]],
    *,
    base: str | None,
    growth: Mapping[str, Any],
    head: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write factors, and a head that was trained in full, as a PEFT LoRA.

    Modules of rank 0 are left out; where all are 0, one zero pair is written, since PEFT refuses an
    adapter without any. The folder appears whole or not at all.

    Args:
        folder: replaced where it exists.
        factors: A (R, N) and B (R, M) of each module, the scale folded into B.
        components: inner ranks of each module, in order.
        base: name of the base model, for PEFT's config.
        growth: the rest of ``growth.json``; its ``head`` names the modules that ``head`` belongs to.
        head: full parameter name -> tensor.

    Returns:
        The folder.
    """
    pairs = {
        name: (A.detach().float().cpu().contiguous(), B.detach().float().cpu().T.contiguous())
        for name, (A, B) in factors.items()
        if len(A)
    }
    if not pairs:
        name, (A, B) = next(iter(factors.items()))
        pairs = {name: (torch.zeros(1, A.shape[1]), torch.zeros(B.shape[1], 1))}
    config = peft_config({name: A.shape[0] for name, (A, _) in pairs.items()}, base)
    if head:
        config.update(task_type="SEQ_CLS", modules_to_save=list(growth["head"]))
    info = {"version": VERSION, "components": dict(components), **growth}
    with directory_written_aside(Path(folder)) as aside:
        write_lora(aside, pairs, config, head=head)
        (aside / GROWTH).write_text(json.dumps(info, indent=2), encoding="utf-8")
    return Path(folder)


def write_lora(
    folder: Path,
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    config: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    *,
    head: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the two files of a PEFT LoRA.

    Args:
        folder: an existing directory.
        pairs: module name -> A (R, N) and B (M, R).
        config: what ``adapter_config.json`` says.
        dtype: of the factors in the file.
        head: full name -> tensor of modules that are saved whole.
    """
    weights = {f"{_PREFIX}{name}": tensor for name, tensor in (head or {}).items()}
    for name, (A, B) in pairs.items():
        weights[f"{_PREFIX}{name}.lora_A.weight"] = A.to(dtype).contiguous()
        weights[f"{_PREFIX}{name}.lora_B.weight"] = B.to(dtype).contiguous()
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")


def peft_config(ranks: Mapping[str, int], base: str | None) -> dict[str, Any]:
    """``adapter_config.json`` for modules of these ranks, the scale folded in."""
    largest = max(ranks.values())
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": list(ranks),
        "rank_pattern": dict(ranks),
        "alpha_pattern": dict(ranks),
    }


def read_growth(folder: str | Path) -> dict[str, Any]:
    """``growth.json`` of an adapter folder.

    Raises:
        QaromaError: not an adapter folder of qaroma, or one of a newer version.
    """
    path = Path(folder) / GROWTH
    if not path.is_file():
        raise QaromaError(
            f"{folder} is no adapter of qaroma (it has no {GROWTH}); give a run directory such as runs/NAME"
        )
    growth: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if growth["version"] > VERSION:
        raise QaromaError(f"{path} has version {growth['version']}, this qaroma reads up to {VERSION}; upgrade qaroma")
    return growth


def load_adapter(model: torch.nn.Module, folder: str | Path) -> Adapter:
    """Attach a saved adapter to its base model, all components frozen.

    Args:
        model: as :func:`qaroma.load_base` returns it; changed in place.
        folder: as :func:`save_adapter` wrote it.

    Raises:
        QaromaError: no adapter there, or one of another model.
    """
    growth = read_growth(folder)
    components: dict[str, list[int]] = growth["components"]
    modules = dict(model.named_modules())
    missing = [name for name in components if name not in modules]
    if missing:
        raise QaromaError(
            f"{folder} adapts {missing[0]}, which this model does not have; give the base it was trained on"
        )
    adapter = Adapter(model, components, inner_rank=growth["inner_rank"], alpha=growth["alpha"])
    factors = read_factors(folder)
    for name, layer in adapter.layers.items():
        A, B = factors.get(name, (layer.A[:0], layer.B[:0]))
        if A.shape[1] != layer.in_features or B.shape[1] != layer.out_features:
            raise QaromaError(
                f"{folder} has {name} of {B.shape[1]} x {A.shape[1]}, this model's is "
                f"{layer.out_features} x {layer.in_features}; give the base it was trained on"
            )
        layer.load_factors(A, B, components[name])
    if growth.get("head"):
        TrainedHead(model, growth["head"]).load(read_head(folder))
        model.requires_grad_(False)
    return adapter


def read_factors(folder: str | Path) -> dict[str, tuple[Tensor, Tensor]]:
    """A (R, N) and B (R, M) of every module of an adapter folder that has a rank."""
    components: dict[str, list[int]] = read_growth(folder)["components"]
    weights = load_file(Path(folder) / WEIGHTS)
    return {
        name: (weights[f"{_PREFIX}{name}.lora_A.weight"], weights[f"{_PREFIX}{name}.lora_B.weight"].T)
        for name, ranks in components.items()
        if sum(ranks)
    }


def read_head(folder: str | Path) -> dict[str, Tensor]:
    """The head of an adapter folder: full parameter name -> tensor; empty where none was trained."""
    weights = load_file(Path(folder) / WEIGHTS)
    return {name.removeprefix(_PREFIX): tensor for name, tensor in weights.items() if ".lora_" not in name}
