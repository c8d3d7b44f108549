"""A base model of the right shapes and no contents, its linear layers in 4 bits.

It is what :func:`qaroma.load_base` would load, without reading or computing anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qaroma.engine.streaming import constants_of
from qaroma.method.dequantise import layer_shape
from qaroma.method.linear import uncalled_layers
from qaroma.method.targets import find_targets
from qaroma.model.bnb import bnb

BLOCK = 64  # weights that share one quantisation constant (QLoRA, section 3)
NESTED_BLOCK = 256  # such constants that share one of their own


def weightless_model(
    config: Any, *, dtype: torch.dtype = torch.bfloat16, packed: bool = True, double: bool = True,
    packed_head: bool = False,
) -> Any:  # fmt: skip
    """The model on device ``meta``, its linear layers replaced by ``Linear4bit``.

    Attention is SDPA where transformers has it for the architecture, else its eager one.

    Args:
        config: transformers' configuration of a causal language model.
        dtype: compute dtype: of embeddings, norms, head and arithmetic.
        packed: whether the linear layers lie in 4 bits.
        double: whether their quantisation constants are quantised too.
        packed_head: put the output head into 4 bits as well, as memory level 3 does.

    Returns:
        The model in eval mode, nothing of it requiring a gradient. Give it to :func:`materialise`.
    """
    with torch.device("meta"):
        model = _from_config(config, dtype)
        head = model.get_output_embeddings()
        uncalled = uncalled_layers(model) if packed else frozenset()
        # As transformers does: neither subclasses of these two are put into 4 bits, nor is what needs its plain weight.
        linear = [(name, module) for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)]
        for name, plain in linear:
            if name in uncalled or not (packed_head if plain is head else packed):
                continue
            parent, _, child = name.rpartition(".")
            (rows, columns), bias = layer_shape(plain) or (0, 0), plain.bias
            layer = bnb.nn.Linear4bit(
                columns, rows, bias is not None,
                compute_dtype=dtype, compress_statistics=double or plain is head, quant_type="nf4",
            )  # fmt: skip
            if bias is not None:
                layer.bias = bias
            setattr(model.get_submodule(parent), child, layer)
    return model.requires_grad_(False).eval()


def _from_config(config: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    except ValueError as error:
        if "does not support an attention implementation" not in str(error):
            raise
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")


def materialise(model: nn.Module) -> None:
    """Give a weightless model new, uninitialised tensors on the default device. Tied parameters stay tied."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    if isinstance(tensor, bnb.nn.Params4bit):
                        made[id(tensor)] = _packed(tensor, module.compute_dtype)
                    else:
                        empty = torch.empty(tuple(tensor.shape), dtype=tensor.dtype)
                        made[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
                table[name] = made[id(tensor)]  # type: ignore[assignment]


def _packed(weight: Any, dtype: Any) -> nn.Parameter:
    """An NF4 weight in the layout of ``quantize_4bit``, as the plain parameter that computing with it needs."""
    blocks = math.ceil(weight.numel() / BLOCK)
    double = weight.compress_statistics
    packed: Any = nn.Parameter(torch.empty(math.ceil(weight.numel() / 2), 1, dtype=torch.uint8), False)
    packed.quant_state = bnb.functional.QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8 if double else torch.float32),
        shape=weight.shape,
        code=torch.empty(16),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=torch.empty(()) if double else None,
        state2=_nested_constants(blocks) if double else None,
    )
    return packed  # type: ignore[no-any-return]


def _nested_constants(blocks: int) -> Any:
    return bnb.functional.QuantState(
        absmax=torch.empty(math.ceil(blocks / NESTED_BLOCK)),
        code=torch.empty(256),
        blocksize=NESTED_BLOCK,
        dtype=torch.float32,
    )


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Every tensor that a module holds, quantisation constants included."""
    for tensor in (*module.parameters(), *module.buffers()):
        yield tensor
        yield from (getattr(*place) for place in constants_of(tensor))


def base_bytes(
    config: Any, *, dtype: torch.dtype = torch.bfloat16, packed: bool = True, double: bool = True,
    packed_head: bool = False,
) -> int:  # fmt: skip
    """What the weights of a base take in memory; the arguments are :func:`weightless_model`'s."""
    model = weightless_model(config, dtype=dtype, packed=packed, double=double, packed_head=packed_head)
    with torch.device("meta"):
        materialise(model)
    return sum(tensor.nbytes for tensor in tensors_of(model))


def adapter_parameters(model: nn.Module, targets: str | tuple[str, ...] = "all-linear") -> int:
    """Parameters of a rank-one component in every layer that has an adapter: the sum of in- and out-features."""
    names = find_targets(model, targets if isinstance(targets, str) else list(targets))
    return sum(sum(layer_shape(model.get_submodule(name)) or ()) for name in names)
