"""Which part of a model is loaded to which device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qaroma.model.layers import decoder_layers, layer_matrices, with_data
from qaroma.model.replaced import replaced
from qaroma.model.skeleton import skeleton


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on a device, for which the host does not wait: it goes by way of pinned memory."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def device_map(config: Any, device: torch.device, *, host_embeddings: bool, trust_remote_code: bool) -> dict[str, Any]:
    """Where transformers is to load the parts of a causal model.

    Args:
        config: its configuration.
        device: where the model computes.
        host_embeddings: leave the input embeddings in host memory, unless the head shares their table.
        trust_remote_code: build models whose code comes with them.

    Returns:
        Module names and devices; the empty name is the model itself.
    """
    from transformers import modeling_utils

    apart = host_embeddings and device.type != "cpu" and not config.get_text_config().tie_word_embeddings
    if not apart or not hasattr(modeling_utils, "accelerate_dispatch"):  # see without_hooks
        return {"": device}
    return {"": device, _embeddings_name(config, trust_remote_code): "cpu"}


def _embeddings_name(config: Any, trust_remote_code: bool) -> str:
    network = skeleton(config, trust_remote_code=trust_remote_code)
    table = network.get_input_embeddings()
    return next(str(name) for name, module in network.named_modules() if module is table)


@contextmanager
def without_hooks(devices: dict[str, Any]) -> Iterator[None]:
    """Load a model to two devices without what transformers hangs on such: hooks that copy a whole table
    to the device for every lookup. :class:`qaroma.engine.placement.HostEmbedding` copies the rows alone.

    transformers has no switch for it.
    """
    if len(devices) == 1:
        yield
        return
    from transformers import modeling_utils

    with replaced(modeling_utils, "accelerate_dispatch", lambda *_, **__: None):
        yield


@contextmanager
def layers_go_to_host(device: torch.device) -> Iterator[None]:
    """While transformers loads a model inside, each matrix of its layers goes to host memory once it is quantised.

    So the device, which quantises as it does for a model that stays there, holds one of them at a time. On a
    CPU nothing is to be done. transformers has no switch for it, so two functions of its loader are replaced
    while the block runs: the one that gives a module a tensor, and the one that reserves the whole model's size.
    """
    if device.type == "cpu":
        yield
        return
    from transformers import core_model_loading, modeling_utils

    give: Any = core_model_loading.set_param_for_module
    inside: dict[int, nn.Module] = {}

    def give_and_send(model: Any, target: str, *rest: Any, **named: Any) -> None:
        give(model, target, *rest, **named)
        if not inside:
            inside.update((id(module), module) for layer in decoder_layers(model) for module in layer.modules())
        path, _, name = target.rpartition(".")
        module = model.get_submodule(path)
        if id(module) in inside:
            matrix_to_host(module, name)

    with (
        replaced(core_model_loading, "set_param_for_module", give_and_send),
        replaced(modeling_utils, "caching_allocator_warmup", lambda *_, **__: None),
    ):
        yield


def matrix_to_host(module: nn.Module, name: str) -> None:
    """Bring a parameter to host memory, with its quantisation constants; a vector stays where it is."""
    parameter = getattr(module, name)
    if parameter.ndim < 2:
        return
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        state.to(torch.device("cpu"))
    setattr(module, name, with_data(parameter, parameter.detach().cpu()))


def move_all_but_layers(model: nn.Module, device: torch.device) -> None:
    """Move a frozen model to a device, and leave the matrices of its layers where they are."""
    left = [(*place, getattr(*place)) for layer in decoder_layers(model) for place in layer_matrices(layer)]
    for module, name, _ in left:
        setattr(module, name, None)
    model.to(device)
    for module, name, parameter in left:
        setattr(module, name, parameter)
