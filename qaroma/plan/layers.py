"""Which layers of a deep model are traced: the others are like them, and add what they do."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from qaroma.model.layers import decoder_layers


def with_layers(config: Any, chosen: Sequence[int]) -> Any:
    """The same architecture with some of its decoder layers.

    Args:
        config: transformers' configuration of a causal language model.
        chosen: numbers of the layers, in the order that they get.
    """
    changed = copy.deepcopy(config)
    text = changed.get_text_config()
    for name, said in _said_of_each(config).items():
        setattr(text, name, [said[number] for number in chosen])
    text.num_hidden_layers = len(chosen)
    return changed


def as_built(model: nn.Module) -> list[Hashable]:
    """Of each decoder layer the classes of its modules and the shapes of its parameters."""
    return [
        (tuple(type(module).__name__ for module in layer.modules()), tuple(tuple(p.shape) for p in layer.parameters()))
        for layer in decoder_layers(model)
    ]


def layer_kinds(config: Any, model: nn.Module) -> list[Hashable]:
    """Of each decoder layer all that may set it apart: how it is built, and what the configuration says of it.

    Args:
        config: as above.
        model: of that configuration.
    """
    said = _said_of_each(config).values()
    return [(built, *(repr(one[number]) for one in said)) for number, built in enumerate(as_built(model))]


def _said_of_each(config: Any) -> dict[str, list[Any]]:
    """The lists of a configuration that have an entry for each layer."""
    text = config.get_text_config()
    layers = text.num_hidden_layers
    return {name: said for name, said in vars(text).items() if isinstance(said, list) and len(said) == layers}


@dataclass(frozen=True)
class Sample:
    """Layers that tell of a deep model: each figure of it is that of ``few``, and that of a layer for each other one.

    Attributes:
        few: numbers of some with all kinds among them, the last one of the kind that the deep model ends with, where
            the most activations are alive.
        others: numbers of the rest, those of a kind together.
    """

    few: tuple[int, ...]
    others: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, kinds: Sequence[Hashable]) -> Sample:
        """Of layers of these kinds, at least two."""
        few = sorted({kinds.index(kind) for kind in kinds})
        if len(few) == 1 or kinds[few[-1]] != kinds[-1]:
            few.append(len(kinds) - 1)
        others: dict[Hashable, list[int]] = {}
        for number, kind in enumerate(kinds):
            if number not in few:
                others.setdefault(kind, []).append(number)
        return cls(tuple(few), tuple(map(tuple, others.values())))

    @property
    def models(self) -> list[tuple[int, ...]]:
        """Layers of the models to trace: the few, and with them one of each kind of the others."""
        *first, last = self.few
        return [self.few, *((*sorted([*first, kind[0]]), last) for kind in self.others)]

    def line(self, figures: Sequence[int]) -> int:
        """A figure of the deep model, by those of :attr:`models`."""
        few, *more = figures
        return few + sum(len(kind) * (figure - few) for kind, figure in zip(self.others, more, strict=True))
