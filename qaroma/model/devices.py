"""Which part of a model is loaded to which device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from qaroma.model.replaced import replaced
from qaroma.model.skeleton import skeleton


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
