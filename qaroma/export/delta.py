"""What an adapter adds to each weight, as plain factors: the one form that every export starts from.

Dimensions: N in_features, M out_features, R rank of a module. The weight becomes W + B A.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qaroma.errors import QaromaError
from qaroma.method.adapter import AdaptedLinear, Adapter


@dataclass(frozen=True)
class Factors:
    """One module's update B A, all its components together; the scale stands in B.

    Attributes:
        A: (R, N), fp32 on the CPU.
        B: (M, R), fp32 on the CPU.
    """

    A: Tensor
    B: Tensor

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(M, N) of the weight."""
        return self.B.shape[0], self.A.shape[1]

    @classmethod
    def zero(cls, shape: tuple[int, int]) -> Factors:
        """The update of rank 0 of a weight (M, N)."""
        return cls(torch.zeros(0, shape[1]), torch.zeros(shape[0], 0))


# Full module name -> its update, every target module, those of rank 0 included, in the model's order.
Delta = Mapping[str, Factors]


def delta_of(adapter: Adapter) -> dict[str, Factors]:
    """The update of an adapter as it stands, active components included."""
    found = {}
    for name, layer in adapter.layers.items():
        A_RN, B_RM = (factor.detach().float().cpu() for factor in layer.factors())
        found[name] = Factors(A_RN.contiguous(), B_RM.T.contiguous())
    return found


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(M, N) of every linear layer of a model, by its full name.

    Args:
        model: dense or in 4 bits, on any device, with an adapter on it or not.
    """
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, AdaptedLinear))
    }


def check_shapes(delta: Delta, shapes: Mapping[str, tuple[int, int]], where: str) -> None:
    """Refuse an adapter that is not this model's.

    Args:
        delta: the adapter's update.
        shapes: as :func:`linear_shapes` gives them for the model.
        where: the adapter's folder, for the message.

    Raises:
        QaromaError: a module that the model lacks, or one of another shape.
    """
    for name, factors in delta.items():
        if name not in shapes:
            raise QaromaError(f"{where} adapts {name}, which this model does not have; give the base it was trained on")
        if factors.shape != shapes[name]:
            ours, theirs = (f"{rows} x {columns}" for rows, columns in (factors.shape, shapes[name]))
            raise QaromaError(
                f"{where} has {name} of {ours}, this model's is {theirs}; give the base it was trained on"
            )


def attach_delta(model: nn.Module, delta: Delta) -> Adapter:
    """Put an update on a model as an adapter of frozen components.

    Args:
        model: its own, without an adapter; changed in place.
        delta: the update; modules of rank 0 are adapted too.
    """
    adapter = Adapter(model, delta)
    for name, factors in delta.items():
        adapter.layers[name].load_factors(factors.A, factors.B.T, [factors.rank] if factors.rank else [])
    return adapter


def detach(adapter: Adapter) -> None:
    """Take an adapter off its model: the layers are its base's again."""
    model: Any = adapter.model
    for name, layer in adapter.layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base)
