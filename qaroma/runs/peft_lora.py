"""Reading a PEFT LoRA adapter, ours or anybody's, by PEFT's rules and without PEFT."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qaroma.errors import QaromaError
from qaroma.export.delta import Factors, check_shapes, linear_shapes
from qaroma.method.adapter import Adapter
from qaroma.model.base import fingerprint
from qaroma.runs.adapter import read_growth
from qaroma.runs.directory import CONFIG, GROWTH, WEIGHTS

_PREFIX = "base_model.model."
_NAME = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(\.[^.]+)?\.weight")

# Settings that make an adapter something other than W + scale B A, and what they are called.
_OTHER_KINDS = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "fan_in_fan_out": "an adapter of transposed layers (fan_in_fan_out)",
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


def read_lora(folder: str | Path) -> tuple[dict[str, Factors], dict[str, Any]]:
    """The update of a PEFT LoRA, its scale folded into B.

    The scale of a module is alpha / R, or alpha / sqrt(R) with rsLoRA; alpha is the module's in
    ``alpha_pattern``, whose keys are regular expressions for the end of a name, or ``lora_alpha``.

    Args:
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        Module name -> factors (those that the file holds), and the configuration.

    Raises:
        QaromaError: no adapter, one that is not a plain LoRA (named), or damaged files.
    """
    config = read_config(folder)
    tensors = _read_tensors(Path(folder))
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None or tensor.ndim != 2:
            raise QaromaError(f"{folder} holds the tensor {name}; expected only LoRA factors of linear layers")
        pairs.setdefault(match["module"].removeprefix(_PREFIX), {})[match["factor"]] = tensor.float()
    found = {}
    for module, pair in pairs.items():
        if set(pair) != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            raise QaromaError(f"{folder} is damaged: {module} has no A and B that fit; copy the adapter again")
        found[module] = Factors(pair["A"], pair["B"] * scale_of(module, pair["A"].shape[0], config))
    return found, config


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
        growth = read_growth(folder)
        components = growth["components"]
        told = (growth.get("base") or {}).get("fingerprint")
        if told is not None and told != fingerprint(adapter.model):
            raise QaromaError(f"{folder} was trained on {growth['base']['name']}, another model than this --model")
    for name, factors in found.items():
        parts = components.get(name, [factors.rank])
        if not parts:  # written for PEFT's sake, all zeros
            continue
        adapter.layers[name].load_factors(
            factors.A, factors.B.T, parts if sum(parts) == factors.rank else [factors.rank]
        )


def read_config(folder: str | Path) -> dict[str, Any]:
    """``adapter_config.json`` of a plain LoRA.

    Raises:
        QaromaError: there is none, it cannot be read, or it names another kind of adapter.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise QaromaError(f"{folder} holds no PEFT adapter; expected a folder with {CONFIG}")
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise QaromaError(f"{path} cannot be read ({error}); copy the adapter again") from error
    kind = config.get("peft_type")
    if kind != "LORA":
        raise QaromaError(f"{folder} is a PEFT adapter of type {kind}; expected LORA")
    for key, name in _OTHER_KINDS.items():
        if config.get(key):
            raise QaromaError(f"{folder} is {name}; expected a plain LoRA")
    if config.get("bias", "none") != "none":
        raise QaromaError(f"{folder} trains biases (bias: {config['bias']}); expected a plain LoRA")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise QaromaError(f"{folder} was started from {start}, which changes the base; expected a plain LoRA")
    return config


def scale_of(module: str, rank: int, config: Mapping[str, Any]) -> float:
    """The factor of B A for a module, by PEFT's rules."""
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise QaromaError(f"{folder} has no {WEIGHTS}; save the adapter with safetensors (the default of PEFT)")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise QaromaError(f"{path} cannot be read ({error}); copy the adapter again") from error
