"""Which layers are linear. Their classes are not asked: a call of one is compared with the product that it should be.

Dimensions: M out-features, N in-features of a layer, y = x W^T + b with W (M, N).
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qaroma.method.dequantise import dense_weight, layer_shape
from qaroma.method.head import backbone

TOLERANCE = 0.05  # of the norm of an answer: 4-bit kernels sum in 16 bits
_TOKENS = 8
# What a configuration holds beside the architecture; a model that was loaded has more of it.
_NO_ARCHITECTURE = ("quantization_config", "dtype", "_name_or_path", "transformers_version", "use_cache")


def has_matrix(layer: nn.Module) -> bool:
    """Whether a layer keeps what a linear one does: sizes, a weight, at most a bias, and nothing inside."""
    kept = dict(layer.named_parameters())
    return layer_shape(layer) is not None and "weight" in kept and not kept.keys() - {"weight", "bias"}


@torch.no_grad()
def is_linear(layer: nn.Module) -> bool:
    """Whether calling a layer gives x W^T + b: one call, compared.

    A router that is a subclass of ``nn.Linear`` and returns scores is none; one that keeps its weight the
    other way round (GPT-2's ``Conv1D``) is. On device ``meta`` only the shape of the answer can be compared.

    Args:
        layer: any module, dense or in 4 bits, on any device.
    """
    shape = layer_shape(layer)
    if shape is None or not has_matrix(layer):
        return False
    weight: Any = layer.weight
    dtype: Any = weight.dtype if weight.is_floating_point() else layer.compute_dtype or torch.bfloat16
    if weight.is_meta and not weight.is_floating_point():
        return True  # 4 bits without contents: they were made of a linear layer, and kernels want the contents
    x_1N = torch.arange(1, shape[1] + 1, device=weight.device).cos().to(dtype)[None]
    x_1N.requires_grad_()  # or bitsandbytes repacks the weight on some CPUs, for good
    try:
        answer = layer(x_1N)
    except Exception:  # whatever it needs that a linear layer does not
        return False
    if not isinstance(answer, Tensor) or answer.shape != (1, shape[0]):
        return False
    if answer.is_meta:
        return True
    bias: Any = layer.bias
    expected = F.linear(x_1N, dense_weight(layer, dtype), None if bias is None else bias.to(dtype))
    differs = (answer - expected).float().norm() > TOLERANCE * expected.float().norm()
    # What is not a number is no difference: the loss of the first step will stop the run and say why.
    return bool(differs.logical_not())


def uncalled_layers(model: Any) -> frozenset[str]:
    """Layers that the code around them reads the weight of, or never uses: an adapter there would not be run.

    Mamba, Falcon Mamba and Jamba multiply by ``dt_proj.weight`` themselves. Found by running the model's
    configuration on tensors without contents: a layer was not called, though what it lies in was.

    Args:
        model: a transformers model, with weights or without; anything else has no such layers.
    """
    kind: Any = type(model)
    if not hasattr(kind, "_from_config"):
        return frozenset()
    config_kind: Any = type(model.config)
    said = {name: value for name, value in model.config.to_dict().items() if name not in _NO_ARCHITECTURE}
    return _uncalled(kind, config_kind, json.dumps(said, default=str, sort_keys=True))


@lru_cache(maxsize=64)
def _uncalled(kind: Any, config_kind: Any, said: str) -> frozenset[str]:
    layers: list[str] = []
    called: set[str] = set()
    try:
        with torch.device("meta"), torch.no_grad(), _ConditionsHold():
            model = kind._from_config(config_kind.from_dict(json.loads(said)), dtype=torch.bfloat16).train()
            layers = [name for name, module in model.named_modules() if has_matrix(module)]
            for name, module in model.named_modules():  # a hook that knew the model would keep it alive
                module.register_forward_hook(lambda *_, name=name: called.add(name))
            backbone(model)(input_ids=torch.ones(1, _TOKENS, dtype=torch.int64))
    except Exception:  # a step that depends on values ends here: what ran until then is judged
        pass
    return frozenset(name for name in layers if name not in called and name.rpartition(".")[0] in called)


class _ConditionsHold(TorchFunctionMode):
    """Conditions on values, which tensors on ``meta`` do not have, are taken to hold."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__bool__ and args[0].is_meta:
            return True
        return func(*args, **(kwargs or {}))
