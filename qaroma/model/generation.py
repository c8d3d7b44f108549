"""How a base says that it is to be sampled from."""

from __future__ import annotations

from typing import Any

from qaroma.model.builtin import resolve_model
from qaroma.model.found import loader_keywords


def generation_settings(model: str, *, revision: str | None = None) -> dict[str, Any]:
    """A base's ``generation_config.json``: stop ids, sampling, penalties; what differs from transformers' defaults.

    Args:
        model: 'smollm2-135m', a folder, a .gguf file, or a hub id.
        revision: branch, tag or commit on the hub.

    Returns:
        Its settings by name; empty where it has none that can be read.
    """
    from transformers import GenerationConfig

    place = resolve_model(model)
    if place.gguf_file is not None:
        return {}
    keywords = loader_keywords(place, revision, trust_remote_code=False)
    del keywords["trust_remote_code"]
    try:
        found = GenerationConfig.from_pretrained(place.folder_or_id, **keywords)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}
    settings: dict[str, Any] = found.to_diff_dict()
    return {name: value for name, value in settings.items() if not name.startswith("_")}
