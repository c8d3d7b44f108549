"""What PEFT does not load, whoever wrote it, told before a run is spent on it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

# PEFT takes these for projections of experts, which transformers 5 fuses, and looks for them among the fused ones
# (huggingface/peft#3711): dense layers and shared experts with the same names are then left without their update.
_TAKEN_FOR_EXPERTS = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}

# Whose kernels on a GPU multiply by out_proj's weight themselves; PEFT therefore takes no adapter of it.
_STATE_SPACE = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")


def lost_in_peft(config: Any, modules: Iterable[str]) -> list[str]:
    """The modules whose update PEFT leaves out when it loads an adapter of them.

    Args:
        config: the base's transformers configuration.
        modules: full names.
    """
    from transformers import conversion_mapping

    # The families by whose names transformers converts a checkpoint; PEFT goes by the same table.
    families = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
    endings = _TAKEN_FOR_EXPERTS.get(families.get(config.model_type, ""), ())
    return [name for name in modules if name.rpartition(".")[2] in endings]


def refused_by_peft(config: Any, modules: Iterable[str]) -> list[str]:
    """The modules because of which PEFT refuses to load an adapter of them.

    Args:
        config: the base's transformers configuration.
        modules: full names.
    """
    refused = config.model_type in _STATE_SPACE
    return [name for name in modules if refused and name.rpartition(".")[2] == "out_proj"]


def told_of_peft(config: Any, modules: Iterable[str]) -> str | None:
    """A sentence on what PEFT leaves out or refuses; None where it loads all.

    Args:
        config: the base's transformers configuration.
        modules: full names.
    """
    every = list(modules)
    refused = refused_by_peft(config, every)
    if refused:
        return (
            f"PEFT refuses an adapter of this base: it takes no out_proj of the family {config.model_type} "
            f"({len(refused)} of {len(every)} modules). qaroma itself and --format merged take it; "
            "for PEFT, leave them out with --set growth.target_modules"
        )
    lost = lost_in_peft(config, every)
    if not lost:
        return None
    kinds = ", ".join(sorted({name.rpartition(".")[2] for name in lost}))
    return (
        f"PEFT does not load an adapter of this base whole: it leaves out {len(lost)} of {len(every)} modules ({kinds} "
        f"of dense layers and shared experts, as {lost[0]}), and so do engines that load through it. qaroma itself and "
        "--format merged hold all; for PEFT, leave them out with --set growth.target_modules"
    )
