"""A head that is trained in full: the few layers of a classifier that no checkpoint brings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qaroma.errors import QaromaError


def backbone(model: Any) -> Any:
    """A model without its output head: what makes its hidden states.

    Args:
        model: a transformers model with a head; Llama 4's text model does not know its own by ``base_model``.
    """
    return getattr(model, "model", model) if model.base_model is model else model.base_model


def head_names(model: Any, missing: Iterable[str] = ()) -> list[str]:
    """The modules of a classifier that lie outside its backbone, and those of the backbone that are new.

    Args:
        model: a transformers model for sequence classification.
        missing: names of parameters that the checkpoint did not bring (a pooler, for instance).

    Returns:
        Module names in the model's order; none lies inside another.
    """
    outside = [
        name
        for name, child in model.named_children()
        if child is not model.base_model and any(True for _ in child.parameters())
    ]
    new = dict.fromkeys(name.rpartition(".")[0] for name in missing)
    return [*(name for name in new if not is_inside(name, outside)), *outside]


def is_inside(name: str, modules: Sequence[str]) -> bool:
    """Whether a name is one of these modules, or belongs to one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def classifier_head(config: Any) -> list[str]:
    """The modules that a classifier of this configuration would have outside its backbone."""
    from transformers import AutoModelForSequenceClassification

    with torch.device("meta"):
        return head_names(AutoModelForSequenceClassification.from_config(config))


def may_be_new(model: Any, parameter: str) -> bool:
    """Whether a classifier's checkpoint may lack a parameter, which is then trained from a random start."""
    return is_inside(parameter, head_names(model)) or "pooler" in parameter.split(".")


def classifier_around(causal: Any, config: Any, device: torch.device) -> Any:
    """A classifier with the backbone of a causal model, for files that hold nothing else."""
    from transformers import AutoModelForSequenceClassification

    with torch.device("meta"):
        network = AutoModelForSequenceClassification.from_config(config)
    setattr(network, network.base_model_prefix, causal.base_model)
    for name in head_names(network):
        for module in network.get_submodule(name).to_empty(device=device).modules():
            network._init_weights(module)
    return network


@contextmanager
def unsaid_about_the_head(wanted: bool) -> Iterator[None]:
    """Keep transformers from warning that a classifier's head is new: it always is, and is trained."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    if wanted:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


class TrainedHead:
    """Modules that train in full, in fp32 whatever the base computes in.

    Args:
        model: changed in place: these modules become fp32 and trainable, and cast what they are given.
        names: as :func:`head_names` returns them; made after the adapter is attached, which freezes all.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.names = list(names)
        self.modules = {name: model.get_submodule(name) for name in names}
        for module in self.modules.values():
            module.float().requires_grad_(True)
            module.register_forward_pre_hook(_cast_to_fp32)

    def parameters(self) -> list[nn.Parameter]:
        return [p for module in self.modules.values() for p in module.parameters()]

    def tensors(self) -> dict[str, Tensor]:
        """Every parameter and buffer by its full name, fp32 on the CPU."""
        return {
            f"{name}.{key}": tensor.detach().cpu().clone()
            for name, module in self.modules.items()
            for key, tensor in module.state_dict().items()
        }

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take saved values.

        Raises:
            QaromaError: one is missing or of another shape.
        """
        for name, module in self.modules.items():
            for key, tensor in module.state_dict().items():
                saved = tensors.get(f"{name}.{key}")
                if saved is None or saved.shape != tensor.shape:
                    found = "nothing" if saved is None else f"shape {tuple(saved.shape)}"
                    raise QaromaError(
                        f"got {found} for the head's {name}.{key}; expected shape {tuple(tensor.shape)}. "
                        "Give the base and the number of labels that it was trained with"
                    )
                tensor.copy_(saved)


def _cast_to_fp32(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
