"""A model's decoder layers, and which of their tensors are the base's bulk."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that a model is a stack of, first to last: its list of modules that holds the most parameters.

    Args:
        model: of transformers, or with code of its own; an encoder's layers count likewise.
    """
    stacks = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return list(max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()), default=()))


def layer_matrices(layer: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Where a layer's frozen matrices are: module and name of each, experts fused into one tensor among them.

    Vectors (norms, biases) are too small to gain by being elsewhere, and what trains stays where it is.

    Args:
        layer: one of :func:`decoder_layers`, with or without an adapter on.
    """
    for module in layer.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim >= 2 and not parameter.requires_grad:
                yield module, name


def with_data(parameter: Tensor, data: Tensor) -> Tensor:
    """A parameter of the same class, with the same notes on it, and other data.

    Assigning to ``.data`` does not lead from every kind of device to every other.

    Args:
        parameter: such as bitsandbytes' 4-bit one, whose notes are its quantisation.
        data: of the same shape and dtype.
    """
    other = Tensor._make_subclass(type(parameter), data, parameter.requires_grad)
    other.__dict__.update({**parameter.__dict__, **data.__dict__})
    return other
