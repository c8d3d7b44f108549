"""``qaroma push``: an adapter on the Hugging Face hub, in one commit, with nothing that is this machine's alone.

What is sent is listed, not filtered: the two files of the PEFT adapter, ``growth.json``, a model card
with its picture and, where asked for, the adapter as GGUF. Checkpoints, metrics and paths stay here.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Any

from qaroma import __version__
from qaroma.errors import QaromaError
from qaroma.export import card
from qaroma.export.hub_failures import TOKENS_PAGE, explained
from qaroma.export.rank_map import rank_map_svg
from qaroma.export.subject import records_about, run_of, settings_of
from qaroma.model.builtin import portable_name
from qaroma.runs.adapter_info import AdapterInfo, require_undamaged, sealed
from qaroma.runs.directory import CONFIG, GROWTH, WEIGHTS, RunDirectory, adapter_folder
from qaroma.runs.figures import adapter_parameters
from qaroma.runs.peft_lora import read_config
from qaroma.text.paths import local_path

GGUF = "adapter.gguf"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_CACHE_FOLDER = re.compile(r"models--([\w.-]+?)--([\w.-]+)")


@dataclass(frozen=True)
class Pushed:
    """A commit on the hub.

    Attributes:
        url: page of the repository.
        repo_id: ``NAMESPACE/NAME``.
        private: who can see it.
        revision: branch.
        commit: its hash; empty where nothing was sent.
        files: what was sent.
        bytes: of all files.
        base: the base's id on the hub, None where it is not known.
        loading: Python lines that load it in PEFT.
    """

    url: str
    repo_id: str
    private: bool
    revision: str
    commit: str
    files: tuple[str, ...]
    bytes: int
    base: str | None
    loading: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def push(
    run: str | Path,
    repo_id: str,
    *,
    public: bool = False,
    revision: str | None = None,
    message: str | None = None,
    base: str | None = None,
    include_gguf: bool = False,
    dry_run: bool = False,
    endpoint: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Pushed:
    """Send a run's adapter to the hub.

    Args:
        run: run directory or adapter folder.
        repo_id: ``NAMESPACE/NAME``, or ``NAME`` in the account's own namespace; made where it is missing.
        public: who may see a repository that is made; one that exists must agree.
        revision: branch, made where it is missing; None is ``main``.
        message: of the commit.
        base: id of the base on the hub, where the run remembers a local folder.
        include_gguf: send the adapter of ``qaroma export RUN --format gguf-adapter`` too.
        dry_run: send nothing, and ask the hub for nothing.
        endpoint: of the hub; None is the one that huggingface_hub uses.
        say: takes a line for people.

    Raises:
        QaromaError: no adapter, no login, no right to write, a name that is not valid, a repository that is
            seen by others than asked for, or a hub that does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    folder = adapter_folder(run)
    info = AdapterInfo.read(folder)
    gguf = _gguf(folder) if include_gguf else None
    known = _base_on_hub(info, base)
    with explained(repo_id):
        validate_repo_id(repo_id)
        if dry_run:
            return _rehearsed(repo_id, folder, info, known, gguf, private=not public, revision=revision)
        api = HfApi(endpoint=endpoint, library_name="qaroma", library_version=__version__)
        full = _full_name(api, repo_id)
        existing = _visible(api, full, public)
        files = _files(folder, info, full, known, _licence(api, known, say))
        if gguf is not None:
            files[GGUF] = gguf
        if not existing:
            api.create_repo(full, private=not public)
    told = message or f"Upload {_name(folder)}, fine-tuned with qaroma {__version__}"
    with explained(full, created=not existing), _told_warnings(say):
        commit = _committed(api, full, files, revision, told)
    return Pushed(
        url=f"{api.endpoint}/{full}",
        repo_id=full,
        private=not public,
        revision=revision or "main",
        commit=commit,
        files=tuple(files),
        bytes=_size(files),
        base=known,
        loading=tuple(card.lines_for_peft(info, known or "BASE", full, revision)),
    )


def _rehearsed(
    repo_id: str,
    folder: Path,
    info: AdapterInfo,
    base: str | None,
    gguf: Path | None,
    *,
    private: bool,
    revision: str | None,
) -> Pushed:
    """What would be sent; of the model card, its licence aside, which the hub knows."""
    files = _files(folder, info, repo_id, base, card.UNKNOWN) | ({} if gguf is None else {GGUF: gguf})
    return Pushed(
        url=repo_id,
        repo_id=repo_id,
        private=private,
        revision=revision or "main",
        commit="",
        files=tuple(files),
        bytes=_size(files),
        base=base,
        loading=tuple(card.lines_for_peft(info, base or "BASE", repo_id, revision)),
    )


def _size(files: Mapping[str, Path | bytes]) -> int:
    return sum(len(content) if isinstance(content, bytes) else content.stat().st_size for content in files.values())


def _committed(api: Any, repo_id: str, files: Mapping[str, Path | bytes], branch: str | None, message: str) -> str:
    """Send all files in one commit; returns its hash."""
    from huggingface_hub import CommitOperationAdd

    if branch is not None:
        api.create_branch(repo_id, branch=branch, exist_ok=True)
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    return str(api.create_commit(repo_id, operations, commit_message=message, revision=branch).oid)


def public_base(name: str) -> str | None:
    """The id by which others find a base on the hub; None for one that only this machine has.

    Args:
        name: as the run remembers it: built-in name, hub id, or a folder. A folder of the hub's own
            cache says which model it is.
    """
    cached = _CACHE_FOLDER.search(name)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    portable = portable_name(name.strip())
    local = local_path(name).exists() or name.lower().endswith(".gguf") or name.startswith((".", "~"))
    return None if local or not _HUB_ID.fullmatch(portable) else portable


def public_path(path: str) -> str:
    """A data source as the world may read it: a hub id or a demo as it is, a file by its name alone."""
    if path.startswith("demo:") or (_HUB_ID.fullmatch(path) and not Path(path).exists() and not Path(path).suffix):
        return path
    return PureWindowsPath(path).name or path


def _base_on_hub(info: AdapterInfo, given: str | None) -> str | None:
    if given is not None and public_base(given) is None:
        raise QaromaError(f"got --base {given}, which lies on this machine; expected the base's id on the hub")
    name = given or (info.base.name if info.base else None)
    return None if name is None else public_base(name)


def _name(folder: Path) -> str:
    """A name for people: the run's, or the folder's."""
    resolved = folder.resolve()
    return resolved.parent.name if RunDirectory(resolved.parent).exists() else resolved.name


def _gguf(folder: Path) -> Path:
    exported = [place / "export" / "gguf-adapter" / GGUF for place in (folder.resolve().parent, folder.resolve())]
    found = next((file for file in exported if file.is_file()), None)
    if found is None:
        raise QaromaError(
            f"--include-gguf finds no {exported[0].as_posix()}; "
            f"write it first: qaroma export {folder.parent.as_posix()} --format gguf-adapter"
        )
    return found


def _full_name(api: Any, repo_id: str) -> str:
    """The name with its namespace; asks who is logged in, so that this is told first."""
    from huggingface_hub import constants, get_token

    if constants.is_offline_mode():
        raise QaromaError("HF_HUB_OFFLINE is set, so nothing can be sent to the hub; unset it")
    if get_token() is None:
        raise QaromaError(
            f"nobody is logged in to the hub; type: hf auth login (a token with write access: {TOKENS_PAGE}), "
            "or set HF_TOKEN"
        )
    account = api.whoami()
    return repo_id if "/" in repo_id else f"{account['name']}/{repo_id}"


def _visible(api: Any, repo_id: str, public: bool) -> bool:
    """Whether the repository exists; one that others see than was asked for is refused."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        private = bool(api.model_info(repo_id).private)
    except RepositoryNotFoundError:
        return False
    if not private and not public:
        raise QaromaError(
            f"{repo_id} exists and is public: all could see what is pushed there. Type --public if they may, "
            "or choose another name"
        )
    if private and public:
        raise QaromaError(
            f"{repo_id} exists and is private; --public does not change that. Leave it out, or make the "
            f"repository public at {api.endpoint}/{repo_id}/settings first"
        )
    return True


def _licence(api: Any, base: str | None, say: Callable[[str], None]) -> str:
    """The base's licence; says what whoever loads the adapter must know of the base."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    gated = f"warning: the base '{base}' is gated: whoever loads this adapter must have accepted its terms"
    if base is None:
        say(
            "warning: the base is a folder of this machine: others cannot find it. "
            "If it came from the hub, say from where: --base NAMESPACE/NAME"
        )
        return card.UNKNOWN
    try:
        info = api.model_info(base)
    except GatedRepoError:
        say(gated)
    except RepositoryNotFoundError:
        say(f"warning: the base '{base}' is not on the hub, or not for all to see; name it with --base")
    except HfHubHTTPError:
        pass  # the push itself will say what is wrong with the hub
    else:
        if info.gated:
            say(gated)
        return str((info.card_data or {}).get("license") or card.UNKNOWN)
    return card.UNKNOWN


def _files(folder: Path, info: AdapterInfo, repo_id: str, base: str | None, licence: str) -> dict[str, Path | bytes]:
    """Name in the repository -> what is sent: no path of this machine in any of it."""
    require_undamaged(folder)
    held = info.base
    shown = base or (PureWindowsPath(held.name).name if held else card.UNKNOWN)
    public = replace(info, base=replace(held, name=shown)) if held else info
    config = read_config(folder, whole=info.task.head)
    config["base_model_name_or_path"] = base
    facts = card.CardFacts(
        name=_name(folder),
        info=public,
        base=shown,
        ranks=info.ranks(),
        licence=licence,
        data=[
            card.source_text(public_path(path), weight)
            for path, weight in card.data_sources(settings_of(run_of(folder)))
        ],
        parameters=adapter_parameters(folder, info),
        records=records_about(folder, info),
        template=str(info.task.template["kind"]) if info.task.template else "none",  # a classifier sees its texts bare
        base_on_hub=base is not None,
        repo=repo_id,
    )
    return {
        WEIGHTS: folder / WEIGHTS,
        CONFIG: _json(config),
        GROWTH: _json(sealed(public.to_json(), config, folder / WEIGHTS)),
        card.RANK_MAP: rank_map_svg(facts.ranks).encode(),
        "README.md": card.model_card(facts, "peft").encode(),
    }


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


@contextmanager
def _told_warnings(say: Callable[[str], None]) -> Iterator[None]:
    """What huggingface_hub warns of, as lines for people."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for one in caught:
        if issubclass(one.category, UserWarning):
            say(f"warning: {' '.join(str(one.message).split())}")
