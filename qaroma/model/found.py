"""A base model looked up once: where it lies and what its configuration says, before any weight is read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qaroma.errors import QaromaError
from qaroma.model.builtin import ResolvedModel, resolve_model
from qaroma.model.failures import readable

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# A name that stays in the hub's cache, where it becomes a path.
_REVISION = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)*")


@dataclass(frozen=True)
class FoundModel:
    """A base that was looked up; everything that needs to know of it is handed this instead of its name.

    Attributes:
        name: as the user gave it.
        place: where it is loaded from.
        config: transformers' configuration; whoever changes it changes a copy.
        revision: branch, tag or commit on the hub; None is the newest.
        trust_remote_code: whether Python code that comes with the model may run.
    """

    name: str
    place: ResolvedModel
    config: PretrainedConfig
    revision: str | None = None
    trust_remote_code: bool = False

    @property
    def longest_input(self) -> int | None:
        """Tokens that the model was made for; None where its configuration does not say."""
        longest: int | None = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return longest

    @property
    def vocabulary(self) -> int | None:
        """Rows of its embedding; None where its configuration does not say."""
        rows: int | None = getattr(self.config.get_text_config(), "vocab_size", None)
        return rows

    def keywords(self) -> dict[str, Any]:
        """The keywords that every transformers loader takes."""
        return loader_keywords(self.place, self.revision, self.trust_remote_code)


def find_model(model: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> FoundModel:
    """Look a model up: its place, and its configuration from there.

    Args:
        model: 'smollm2-135m', a folder, a .gguf file, or a hub id.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        QaromaError: no such model, no network, or one that cannot be read; the sentence says what to do.
    """
    from transformers import AutoConfig

    place = resolve_model(model)
    with readable(str(model), "configuration", gguf=place.gguf_file is not None):
        keywords = loader_keywords(place, revision, trust_remote_code)
        config = AutoConfig.from_pretrained(place.folder_or_id, **keywords)
    return FoundModel(str(model), place, config, revision, trust_remote_code)


def loader_keywords(place: ResolvedModel, revision: str | None, trust_remote_code: bool) -> dict[str, Any]:
    """The keywords that every transformers loader takes. `trust_remote_code` is never None, which would ask."""
    if revision is not None and not _REVISION.fullmatch(revision):
        raise QaromaError(f"got the revision '{revision[:80]}'; expected a branch, tag or commit of the hub")
    keywords: dict[str, Any] = {"trust_remote_code": bool(trust_remote_code)}
    if place.gguf_file is not None:
        keywords["gguf_file"] = place.gguf_file
    if place.offline:
        keywords["local_files_only"] = True
    if revision is not None:
        keywords["revision"] = revision
    return keywords


def stored_quantization(config: Any, model: str) -> dict[str, Any] | None:
    """Tell how a checkpoint is quantised already.

    Args:
        config: the model's configuration.
        model: the name that the user gave.

    Returns:
        Its bitsandbytes 4-bit settings, or None for a plain checkpoint.

    Raises:
        QaromaError: quantised in any other way; its weights cannot carry an adapter here.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        stored = getattr(config.get_text_config(), "quantization_config", None)
    if stored is None:
        return None
    settings: dict[str, Any] = stored if isinstance(stored, dict) else stored.to_dict()
    if settings.get("quant_method") == "gguf":
        return None
    if settings.get("load_in_4bit") or settings.get("_load_in_4bit"):
        return settings
    kind = "bitsandbytes 8-bit" if settings.get("load_in_8bit") else str(settings.get("quant_method"))
    raise QaromaError(
        f"'{model}' is quantised already ({kind}); expected plain weights or bitsandbytes 4-bit ones. "
        "Give --model the original model: qaroma quantises it while loading"
    )
