"""A LoRA adapter's files by PEFT's rules, ours or anybody's, read and written without PEFT.

The file holds B as (M, R). It is turned here, on its way in and out, and is (R, M) everywhere else.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qaroma.errors import QaromaError
from qaroma.method.factors import Factors, Update
from qaroma.method.head import is_inside
from qaroma.runs.directory import CONFIG, WEIGHTS
from qaroma.text.json_text import parse_json
from qaroma.text.patterns import Patterns

_PREFIX = "base_model.model."
_PLAIN = re.compile(r"[\w-]+(\.[\w-]+)*")
_NAME = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(\.[^.]+)?\.weight")

# Settings that make an adapter something other than W + scale B A, and what they are called.
_OTHER_KINDS = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "lora_bias": "LoRA with biases (lora_bias)",
    "modules_to_save": "an adapter that replaces whole modules (modules_to_save)",
    "layer_replication": "an adapter that repeats layers (layer_replication)",
    "trainable_token_indices": "an adapter that trains token embeddings (trainable_token_indices)",
    "target_parameters": "LoRA on bare parameters (target_parameters)",
    "alora_invocation_tokens": "an activated LoRA (alora_invocation_tokens)",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
    "use_bdlora": "block-diagonal LoRA (use_bdlora)",
    "megatron_config": "an adapter of Megatron layers",
    "arrow_config": "a routed mixture of adapters (Arrow)",
}

# Ways to start a LoRA that take a part out of the base's weights, so that the factors alone are not the update.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read_lora(folder: str | Path, *, whole: Sequence[str] = ()) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """The update of a PEFT LoRA, its scale folded into B, and the modules that it holds whole.

    The scale of a module is alpha / R, or alpha / sqrt(R) with rsLoRA; alpha is the module's in
    ``alpha_pattern``, whose keys are regular expressions for the end of a name, or ``lora_alpha``.

    Args:
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        whole: names of modules that may have been trained in full.

    Returns:
        Module name -> factors in fp32 (those that the file holds), and full parameter name -> tensor of
        the modules in ``whole``.

    Raises:
        QaromaError: no adapter, one that is not a plain LoRA (named), or damaged files.
    """
    config = read_config(folder, whole=whole)
    pairs: dict[str, dict[str, Tensor]] = {}
    others = {}
    for name, tensor in _read_tensors(Path(folder)).items():
        if not bool(tensor.isfinite().all()):
            raise QaromaError(
                f"{folder} is of no use: {name} holds numbers that are not finite; copy the adapter again, or train it "
                "again at a smaller rate"
            )
        match = _NAME.fullmatch(name)
        if match is None and is_inside(name.removeprefix(_PREFIX), whole):
            others[name.removeprefix(_PREFIX)] = tensor
            continue
        if match is None or tensor.ndim != 2:
            raise QaromaError(f"{folder} holds the tensor {name}; expected only LoRA factors of linear layers")
        pairs.setdefault(match["module"].removeprefix(_PREFIX), {})[match["factor"]] = tensor.float()
    for module, pair in pairs.items():
        if set(pair) != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1] or not pair["A"].shape[0]:
            raise QaromaError(f"{folder} is damaged: {module} has no A and B that fit; copy the adapter again")
    scale = scales({module: pair["A"].shape[0] for module, pair in pairs.items()}, config, str(Path(folder) / CONFIG))
    return {module: Factors(pair["A"], pair["B"].T * scale[module]) for module, pair in pairs.items()}, others


def write_lora(
    folder: Path,
    update: Update,
    config: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    *,
    whole: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the two files of a PEFT LoRA.

    Args:
        folder: an existing directory.
        update: the modules that the file is to hold.
        config: what ``adapter_config.json`` says.
        dtype: of the factors in the file.
        whole: full parameter name -> tensor of modules that are saved whole.

    Raises:
        QaromaError: numbers that are not finite.
    """
    weights = {f"{_PREFIX}{name}": tensor for name, tensor in (whole or {}).items()}
    for name, factors in update.items():
        A, B = factors.on_host()
        weights[f"{_PREFIX}{name}.lora_A.weight"] = A.to(dtype).contiguous()
        weights[f"{_PREFIX}{name}.lora_B.weight"] = B.T.to(dtype).contiguous()
    ruined = next((name for name, tensor in weights.items() if not bool(tensor.isfinite().all())), None)
    if ruined is not None:
        raise QaromaError(f"{ruined} holds numbers that are not finite; the adapter is not saved")
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")


def lora_config(ranks: Mapping[str, int], base: str | None, whole: Sequence[str] = ()) -> dict[str, Any]:
    """``adapter_config.json`` for modules of these ranks, the scale folded in.

    Args:
        ranks: of the modules that the file holds.
        base: name of the base model.
        whole: modules of a classifier that are saved whole.
    """
    largest = max(ranks.values())
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if whole else "CAUSAL_LM",
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
        "modules_to_save": list(whole) or None,
        "target_modules": list(ranks),
        "rank_pattern": dict(ranks),
        "alpha_pattern": dict(ranks),
    }


def read_config(folder: str | Path, *, whole: Sequence[str] = ()) -> dict[str, Any]:
    """``adapter_config.json`` of a plain LoRA.

    Args:
        folder: of the adapter.
        whole: modules that may be saved whole.

    Raises:
        QaromaError: there is none, it cannot be read, or it names another kind of adapter.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise QaromaError(f"{folder} holds no PEFT adapter; expected a folder with {CONFIG}")
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
        _check_form(config)
    except (OSError, ValueError) as error:
        raise QaromaError(f"{path} cannot be read ({error}); copy the adapter again") from error
    kind = config.get("peft_type")
    if kind != "LORA":
        raise QaromaError(f"{folder} is a PEFT adapter of type {kind}; expected LORA")
    for key, name in _OTHER_KINDS.items():
        if config.get(key) and not (key == "modules_to_save" and set(config[key]) <= set(whole)):
            raise QaromaError(f"{folder} is {name}; expected a plain LoRA")
    if config.get("bias", "none") != "none":
        raise QaromaError(f"{folder} trains biases (bias: {config['bias']}); expected a plain LoRA")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise QaromaError(f"{folder} was started from {start}, which changes the base; expected a plain LoRA")
    return dict(config)


def _check_form(config: Any) -> None:
    """See to it that the settings which are read here are of their kind.

    Raises:
        ValueError: one that is not.
    """
    if not isinstance(config, dict):
        raise ValueError("it holds no JSON object")
    if config.get("peft_type") != "LORA":  # what else it must hold is another kind's matter
        return
    alphas = config.get("alpha_pattern") or {}
    if not isinstance(alphas, dict):
        raise ValueError("alpha_pattern is no object of names and numbers")
    for alpha in (config.get("lora_alpha"), *alphas.values()):
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) < 1e9:
            raise ValueError(f"got the alpha {str(alpha)[:40]}; expected a number")
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise ValueError("modules_to_save is no list of names")


def scales(ranks: Mapping[str, int], config: Mapping[str, Any], source: str) -> dict[str, float]:
    """The factor of B A for each module, by PEFT's rules: the first expression in ``alpha_pattern`` that matches the
    end of a name decides.

    Args:
        ranks: of the modules.
        config: as :func:`read_config` gives it.
        source: where that stands, for messages.

    Raises:
        QaromaError: an expression that is none, or takes too long.
    """
    alphas: dict[str, float] = config.get("alpha_pattern") or {}
    patterns = Patterns(source)
    # Names that no expression could mean otherwise are looked up: an adapter of ours has one for each module.
    plain = {name: alpha for name, alpha in alphas.items() if _PLAIN.fullmatch(name)}
    others = [name for name in alphas if name not in plain]
    order = {name: place for place, name in enumerate(alphas)}
    found = {}
    for module, rank in ranks.items():
        parts = module.split(".")
        matching = [end for at in range(len(parts)) if (end := ".".join(parts[at:])) in plain]
        matching += [name for name in others if patterns.fullmatch(rf"(.*\.)?({name})", module)]
        alpha = alphas[min(matching, key=order.__getitem__)] if matching else config["lora_alpha"]
        found[module] = float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return found


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise QaromaError(f"{folder} has no {WEIGHTS}; save the adapter with safetensors (the default of PEFT)")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise QaromaError(f"{path} cannot be read ({error}); copy the adapter again") from error
