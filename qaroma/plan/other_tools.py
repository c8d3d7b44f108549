"""Configurations of Axolotl and LLaMA-Factory: what they say that can be done here, and the names of the rest.

Learning rates, ranks, batch sizes and lengths are not taken: growth asks for a rate of its own, and the rest
follows from the card and the data. Nor is ``trust_remote_code``: consent is typed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qaroma.errors import QaromaError
from qaroma.text.json_text import parse_json
from qaroma.text.paths import local_path
from qaroma.text.yaml_text import read_yaml

_AXOLOTL = {
    "base_model": "model.name",
    "revision_of_model": "model.revision",
    "num_epochs": "training.epochs",
    "max_steps": "training.max_steps",
    "seed": "training.seed",
    "weight_decay": "training.weight_decay",
    "max_grad_norm": "training.max_grad_norm",
    "sample_packing": "data.packing",
}
_LLAMA_FACTORY = {
    "model_name_or_path": "model.name",
    "model_revision": "model.revision",
    "num_train_epochs": "training.epochs",
    "max_steps": "training.max_steps",
    "seed": "training.seed",
    "weight_decay": "training.weight_decay",
    "max_grad_norm": "training.max_grad_norm",
    "packing": "data.packing",
}
_COLUMNS = {
    "prompt": "prompt", "query": "context", "response": "completion", "system": "system", "history": "history",
    "tools": "tools", "messages": "messages",
}  # fmt: skip
_FIELDS = {
    "field_instruction": "prompt", "field_input": "context", "field_output": "completion", "field_system": "system",
    "field_messages": "messages", "field": "text",
}  # fmt: skip
# What rows are asked for anyway.
_KNOWN = {"prompt": "instruction", "context": "input", "completion": "output", "system": "system", "history": "history",
          "tools": "tools", "text": "text"}  # fmt: skip
_KNOWN_MESSAGES = ("messages", "conversations")
_TRAINED_PLAINLY = ("sft", "pt")


@dataclass
class Foreign:
    """A configuration of another tool.

    Attributes:
        tool: its name.
        settings: dotted keys of qaroma's and their values.
        left: the keys that were not taken.
    """

    tool: str
    settings: dict[str, Any] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)


def read_foreign(path: str | Path) -> Foreign:
    """Translate a configuration of Axolotl or LLaMA-Factory.

    Args:
        path: its YAML file.

    Raises:
        QaromaError: it is neither, trains something else than text, or names data that cannot be found.
    """
    try:
        given, _ = read_yaml(local_path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise QaromaError(f"{path} cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise QaromaError(f"{path} is not YAML text: {str(error).splitlines()[0]}") from error
    if isinstance(given, dict) and "base_model" in given:
        return _axolotl(given, str(path))
    if isinstance(given, dict) and "model_name_or_path" in given:
        return _llama_factory(given, str(path))
    raise QaromaError(f"{path} is no configuration of Axolotl (base_model) or LLaMA-Factory (model_name_or_path)")


def _axolotl(given: dict[str, Any], path: str) -> Foreign:
    if given.get("rl"):
        raise QaromaError(f"{path} asks for rl: {given['rl']}; expected plain training on answers")
    found, taken = _taken("Axolotl", given, _AXOLOTL)
    sources, columns = [], []
    for entry in _listed(given.get("datasets"), path, "datasets"):
        sources.append(_axolotl_source(entry))
        kind = entry.get("type")
        fields = entry | kind if isinstance(kind, dict) else entry
        columns.append({ours: str(fields[theirs]) for theirs, ours in _FIELDS.items() if fields.get(theirs)})
        known = {"path", "data_files", "name", "split", "ds_type", "type", *_FIELDS}
        found.left += [f"datasets: {key}" for key in fields if key not in known]
    _set_data(found, sources, columns)
    tests = [_axolotl_source(entry) for entry in given.get("test_datasets") or []]
    if len(tests) == 1:
        found.settings["data.validation"] = tests[0]
        taken.add("test_datasets")
    _set_share(found, taken, given, "val_set_size")
    if given.get("train_on_inputs"):
        found.settings["data.train_on"] = "all"
    if given.get("wandb_project"):
        found.settings["training.track"] = ["wandb"]
    taken |= {"datasets", "train_on_inputs", "wandb_project"}
    found.left += [key for key, value in given.items() if key not in taken and value not in (None, False, "", [])]
    return found


def _axolotl_source(entry: Mapping[str, Any]) -> str:
    files = entry.get("data_files")
    if files:
        return str(files[0] if isinstance(files, list) else files)
    return _named(str(entry.get("path")), entry.get("name"), entry.get("split"))


def _llama_factory(given: dict[str, Any], path: str) -> Foreign:
    stage = given.get("stage", "sft")
    if stage not in _TRAINED_PLAINLY:
        raise QaromaError(f"{path} asks for stage: {stage}; expected {' or '.join(_TRAINED_PLAINLY)}")
    found, taken = _taken("LLaMA-Factory", given, _LLAMA_FACTORY)
    folder = Path(given.get("dataset_dir") or "data")
    names = given.get("dataset") or ""
    wanted = names if isinstance(names, list) else [name.strip() for name in str(names).split(",") if name.strip()]
    described = _dataset_info(folder / "dataset_info.json") if wanted else {}
    sources, columns = [], []
    for name in wanted:
        entry = described.get(name)
        if not isinstance(entry, dict):
            raise QaromaError(f"{folder / 'dataset_info.json'} has no data set '{name}', which {path} names")
        if entry.get("ranking"):
            raise QaromaError(f"the data set '{name}' of {path} holds preferences; expected answers")
        hub = entry.get("hf_hub_url")
        local = str(folder / str(entry.get("file_name")))
        sources.append(_named(str(hub), entry.get("subset"), entry.get("split")) if hub else local)
        named = entry.get("columns") or {}
        columns.append({ours: str(named[theirs]) for theirs, ours in _COLUMNS.items() if named.get(theirs)})
        known = {"file_name", "hf_hub_url", "subset", "split", "columns", "formatting", "ranking", "tags"}
        found.left += [f"{name}: {key}" for key in entry if key not in known]
    _set_data(found, sources, columns)
    _set_share(found, taken, given, "val_size")
    if given.get("train_on_prompt"):
        found.settings["data.train_on"] = "all"
    track = [one for one in ("tensorboard", "wandb") if one in str(given.get("report_to"))]
    if track:
        found.settings["training.track"] = track
    taken |= {"dataset", "dataset_dir", "stage", "do_train", "train_on_prompt", "report_to"}
    found.left += [key for key, value in given.items() if key not in taken and value not in (None, False, "", [])]
    return found


def _taken(tool: str, given: Mapping[str, Any], names: Mapping[str, str]) -> tuple[Foreign, set[str]]:
    """The settings that are only named otherwise."""
    settings = {ours: given[theirs] for theirs, ours in names.items() if given.get(theirs) not in (None, "", False)}
    steps = settings.get("training.max_steps", 1)
    if isinstance(steps, int) and steps < 1:  # their way to say that epochs count
        del settings["training.max_steps"]
    return Foreign(tool, settings), set(names)


def _listed(value: Any, path: str, key: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(entry, dict) for entry in value):
        raise QaromaError(f"{path} has no list of {key} with a path each")
    return value


def _dataset_info(file: Path) -> dict[str, Any]:
    try:
        value = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise QaromaError(f"{file}, which says what the data sets are, cannot be read ({error})") from error
    return value if isinstance(value, dict) else {}


def _named(name: str, config: Any, split: Any) -> str:
    """A hub data set as ``name:config@split``; train is read anyway."""
    return name + (f":{config}" if config else "") + (f"@{split}" if split and split != "train" else "")


def _set_data(found: Foreign, sources: list[str], columns: list[dict[str, str]]) -> None:
    """The sources, and the columns that all of them have where they are not what rows are asked for anyway."""
    found.settings["data.train"] = sources
    first = columns[0] if columns else {}
    if any(other != first for other in columns):
        found.left.append("columns, which differ from data set to data set")
    elif any(_KNOWN.get(key) != name for key, name in first.items() if key != "messages") or (
        first.get("messages", "messages") not in _KNOWN_MESSAGES
    ):
        found.settings["data.columns"] = first


def _set_share(found: Foreign, taken: set[str], given: Mapping[str, Any], key: str) -> None:
    share = given.get(key)
    if isinstance(share, float) and 0 < share <= 0.5:
        found.settings["data.validation_share"] = share
        taken.add(key)
