"""Which arithmetic a device and a family take: bf16, or fp16 with a loss scale, or fp32."""

from __future__ import annotations

from typing import Any

import torch

from qaroma.errors import QaromaError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Model types whose activations leave fp16's range of 65,504: those that vLLM refuses in it (vllm/config/model.py).
FP16_OVERFLOWS = ("gemma2", "gemma3", "gemma3_text", "glm4", "plamo2")


def dtype_name(dtype: torch.dtype) -> str:
    """As configurations have it."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def has_bf16(device: torch.device) -> bool:
    """Whether a device is to compute in bf16: a CPU is (it may imitate it), a GPU where its hardware does."""
    if device.type != "cuda":
        return True
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def resolve_dtype(name: str, device: torch.device, config: Any = None) -> torch.dtype:
    """Choose the arithmetic of base and adapter.

    Args:
        name: 'bf16', 'fp16', 'fp32', or 'auto': bf16 where the device has it, else what :func:`in_range` says of fp16.
        device: where it will run.
        config: transformers' configuration of the model; None is any family.

    Raises:
        QaromaError: an unknown name, or bf16 on a GPU whose hardware has none.
    """
    if name == "auto":
        return torch.bfloat16 if has_bf16(device) else in_range(torch.float16, config)
    if name not in DTYPES:
        raise QaromaError(f"got compute dtype '{name}'; expected auto, {', '.join(DTYPES)}")
    if name == "bf16" and not has_bf16(device):
        raise QaromaError(
            f"The GPU {torch.cuda.get_device_name(device)} has no bf16 arithmetic; expected one of the Ampere "
            "generation (RTX 30) or later. Type: --set model.compute_dtype=auto, which takes fp16 here"
        )
    return DTYPES[name]


def in_range(dtype: torch.dtype, config: Any) -> torch.dtype:
    """fp32 in the place of fp16 for a family that is known to overflow in it (:data:`FP16_OVERFLOWS`)."""
    return torch.float32 if dtype == torch.float16 and overflows(config) else dtype


def dtype_note(name: str, device: torch.device, config: Any) -> str | None:
    """A sentence on the arithmetic of a run, where it is not the usual one.

    Args:
        name, device, config: see :func:`resolve_dtype`.
    """
    if name == "fp16" and overflows(config):
        return f"fp16: {config.model_type} is known to overflow in it; --set model.compute_dtype=fp32 is safe"
    if name != "auto" or has_bf16(device):
        return None
    if overflows(config):
        return f"this GPU has no bf16, and {config.model_type} overflows in fp16: arithmetic in fp32, which is slower"
    return "this GPU has no bf16: arithmetic in fp16, the loss scaled so that no gradient vanishes"


def overflows(config: Any) -> bool:
    """Whether a configuration of transformers is of a family that is known to overflow in fp16."""
    if config is None:
        return False
    return bool({config.model_type, config.get_text_config().model_type} & set(FP16_OVERFLOWS))
