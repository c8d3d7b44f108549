"""Reads the configuration: a YAML file, overridden by flags, overridden by ``--set``.

Every problem of all three is reported at once, each with its place, what was got and what was
expected; an unknown key comes with the nearest known one. The settings themselves are declared in
:mod:`qaroma.config.schema` alone.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from qaroma.config.schema import Config
from qaroma.errors import QaromaError
from qaroma.text.paths import local_path
from qaroma.text.yaml_text import read_yaml

_PACKAGE = Path(__file__).resolve().parents[1]
_YAML_SUFFIXES = (".yaml", ".yml")
_WEIGHT = re.compile(r"(?P<path>.+):(?P<weight>[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?)")
_SETTING = re.compile(r"(?P<indent>(  )?)(?P<name>\w+):")
_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text (in quotes if it looks like a number)",
    "list": "a list",
    "model": "a section: keys with values",
    "dict": "a section: keys with values",
}
_BOUNDS = {"greater_than": ("above", "gt"), "greater_than_equal": ("at least", "ge"),
           "less_than": ("below", "lt"), "less_than_equal": ("at most", "le")}  # fmt: skip

Location = tuple[str | int, ...]

_OPTION = "option"  # the origin of what was typed as an option
# An option is called as its key's last name where none is given here.
_OPTIONS = {
    "model.name": "--model",
    "data.train": "--data",
    "data.format": "--data-format",
    "evaluation.prompts": "--prompt",
}


def read_settings(path: str | Path | None, flags: Mapping[str, Any], sets: Sequence[str]) -> Config:
    """The validated configuration of a run.

    Args:
        path: YAML file, or the name of a shipped one (``quickstart``); None starts from the defaults.
        flags: dotted key to value, as ``{"training.learning_rate": 1e-3}``; None means not given.
        sets: ``key=value`` texts with any dotted key; the value is read as YAML.

    Returns:
        The configuration: defaults, overridden by the file, the flags and the sets, in this order.

    Raises:
        QaromaError: All problems at once, one a line.
    """
    layers = _Layers()
    if path is not None:
        file = find_config(path)
        layers.add_file(file)
    for key, value in flags.items():
        if value is not None:
            layers.put(tuple(key.split(".")), value, _OPTION)
    for text in sets:
        layers.add_set(text)
    _normalise(layers.values)
    try:
        config = Config.model_validate(layers.values)
    except ValidationError as error:
        raise _report([*layers.problems, *_describe(error, layers)]) from None
    if layers.problems:
        raise _report(layers.problems)
    return config


def dump_config(config: Config, reasons: Mapping[str, str] | None = None) -> str:
    """The configuration as YAML, every setting written out; :func:`read_settings` reads it back equal.

    Args:
        config: what is written.
        reasons: dotted key to why it is so, a comment at the end of its line; of values on one line alone.
    """
    values = config.model_dump(mode="json")
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)
    section, lines = "", []
    for line in text.splitlines():
        found = _SETTING.match(line)
        section = section if found is None or found["indent"] else f"{found['name']}."
        reason = (reasons or {}).get(f"{section}{found['name']}") if found and found["indent"] else None
        lines.append(f"{line}  # {reason}" if reason else line)
    return "\n".join(lines) + "\n"


def require_model_and_data(config: Config) -> str:
    """The name of the model; a run needs that and data, all else has a default.

    Raises:
        QaromaError: one of the two is missing, or both.
    """
    missing = {}
    if config.model.name is None:
        missing["no model"] = "--model FOLDER_OR_HUB_ID (smollm2-135m is built in)"
    if not config.data.train:
        missing["no data"] = "--data FILE"
    if config.model.name is None or missing:
        raise QaromaError(
            f"got {' and '.join(missing)}; expected {' and '.join(missing.values())}; "
            "to see a whole run first, type qaroma demo"
        )
    return config.model.name


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted key -> value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flattened(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def lies_in(key: str, names: Iterable[str]) -> bool:
    """Whether a dotted key is one of these settings, or a setting of one of these sections."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def find_config(path: str | Path) -> Path:
    """The YAML file that ``path`` means: itself, or a shipped one by name or as ``configs/<name>.yaml``.

    Raises:
        QaromaError: There is none; near names and the shipped ones are named.
    """
    asked = local_path(path)
    if not asked.name or asked.is_dir():
        raise QaromaError(f"got the folder {asked} as configuration; expected a YAML file")
    names = [asked] if asked.suffix in _YAML_SUFFIXES else [asked, asked.with_name(asked.name + ".yaml")]
    inside = [Path(*name.parts[1:]) if name.parts[:1] == ("configs",) else name for name in names]
    for candidate in [*names, *(shipped_folder() / name for name in inside)]:
        if candidate.is_file():
            return candidate
    shipped = shipped_configs()
    siblings = [file for suffix in _YAML_SUFFIXES for file in sorted(asked.parent.glob(f"*{suffix}"))]
    near = [str(file) for file in siblings if _close(asked.stem, [file.stem])]
    near += [name for name in shipped if _close(asked.stem, [Path(name).name])]
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise QaromaError(
        f"got {asked}; there is no such configuration; {hint}expected a YAML file or one that comes with qaroma: "
        f"{', '.join(shipped) or 'none'}"
    )


def shipped_folder() -> Path:
    """The folder of what comes with qaroma: inside the installed package, or beside it in a checkout."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def shipped_configs() -> list[str]:
    """Names of the configurations that come with qaroma, as ``--config`` takes them."""
    folder = shipped_folder()
    return [file.relative_to(folder).with_suffix("").as_posix() for file in sorted(folder.rglob("*.yaml"))]


def parse_source(text: str) -> tuple[str, float]:
    """A data source typed as ``path`` or ``path:weight``.

    The drive letter of a Windows path and names such as ``demo:calendar`` are part of the path.

    Returns:
        The path and the weight (1 where none is given); the weight is not validated here.
    """
    match = _WEIGHT.fullmatch(text)
    if match is None or re.fullmatch(r"[A-Za-z]", match["path"]):
        return text, 1.0
    return match["path"], float(match["weight"])


def option_name(key: str) -> str:
    """The command-line option of a setting, as ``--micro-batch`` of ``training.micro_batch``."""
    return _OPTIONS.get(key, "--" + key.rsplit(".", 1)[-1].replace("_", "-"))


def config_fields() -> dict[str, FieldInfo]:
    """Every setting by its dotted key, in the order of declaration (a list of sections is one setting)."""
    return dict(_walk(Config, ""))


def _walk(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in section.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is None or get_args(field.annotation):
            yield prefix + name, field
        else:
            yield from _walk(inner, f"{prefix}{name}.")


class _Layers:
    """The values collected so far, where each came from, and what was wrong."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.origins: dict[Location, str] = {}
        self.problems: list[str] = []

    def add_file(self, file: Path) -> None:
        try:
            values, node = read_yaml(file.read_text(encoding="utf-8-sig"))
        except yaml.MarkedYAMLError as error:
            line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
            raise QaromaError(f"{file}{line}: not YAML: {error.problem}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise QaromaError(f"{file}: not YAML text in UTF-8: {error}") from None
        except OSError as error:
            raise QaromaError(f"{file}: cannot be read: {error.strerror}") from None
        if values is None:
            return
        if not isinstance(values, dict):
            raise QaromaError(f"{file}: got {_show(values)}; expected keys with values, as 'model:' and 'data:'")
        self._note_lines(node, (), str(file))
        self.values = _with_text_keys(values)

    def add_set(self, text: str) -> None:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key:
            self.problems.append(f"--set: got {text!r}; expected key=value, as growth.eps_out=1e-3")
            return
        try:
            parsed, _ = read_yaml(value)
        except yaml.YAMLError:
            self.problems.append(f"--set {key}: got {value!r}; expected a YAML value")
            return
        self.put(tuple(key.split(".")), parsed, "--set")

    def put(self, key: tuple[str, ...], value: Any, origin: str) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                self.put((*key, str(name)), inner, origin)
            return
        section = self.values
        for name in key[:-1]:
            section[name] = inner = {} if section.get(name) is None else section[name]
            if not isinstance(inner, dict):
                self.problems.append(f"{origin} {'.'.join(key)}: {name} has no keys of its own; set {name} as a whole")
                return
            section = inner
        if key == ("training", "epochs") and self.origins.get(("training", "max_steps")) != origin:
            # max_steps wins within one layer; a later layer's epochs would otherwise do nothing.
            section.pop("max_steps", None)
        section[key[-1]] = value
        self.origins[key] = origin

    def place(self, location: Location) -> str:
        """Where the value at ``location`` came from, and its dotted key."""
        key = ".".join(str(part) for part in location)
        for length in range(len(location), 0, -1):
            if (origin := self.origins.get(location[:length])) is not None:
                at = ".".join(str(part) for part in location[:length])
                return option_name(at) if origin == _OPTION else f"{origin} {key}"
        # A --set below the key, as model.name.x=1, where model.name is a text.
        below = (origin for put, origin in self.origins.items() if put[: len(location)] == location)
        return f"{next(below, '')} {key}".strip()

    def _note_lines(self, node: yaml.Node | None, at: Location, file: str) -> None:
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                location = (*at, index)
                self.origins[location] = f"{file} line {item.start_mark.line + 1}:"
                self._note_lines(item, location, file)
        if not isinstance(node, yaml.MappingNode):
            return
        for key_node, value_node in node.value:
            key = (*at, str(key_node.value))
            origin = f"{file} line {key_node.start_mark.line + 1}:"
            if key in self.origins and key[-1] != "<<":
                self.problems.append(f"{origin} {'.'.join(map(str, key))}: given twice; keep one of the two")
            self.origins[key] = origin
            self._note_lines(value_node, key, file)


def _with_text_keys(values: Any) -> Any:
    """The same values with every key a text, so that a key such as ``1`` or ``on`` is reported as unknown."""
    if isinstance(values, dict):
        return {str(key): _with_text_keys(value) for key, value in values.items()}
    return [_with_text_keys(value) for value in values] if isinstance(values, list) else values


def _normalise(values: dict[str, Any]) -> None:
    """Brings the short ways of writing to the full one.

    A section without any key (its lines commented out, say) is null in YAML and means its defaults.
    ``data.train`` may be a text, a mapping, or a list of either.
    """
    for name, field in Config.model_fields.items():
        if _section_of(field.annotation) and name in values and values[name] is None:
            del values[name]
    data = values.get("data")
    if not isinstance(data, dict) or data.get("train") is None:
        return
    train = data["train"]
    sources = list(train) if isinstance(train, (list, tuple)) else [train]
    for index, source in enumerate(sources):
        if isinstance(source, str):
            path, weight = parse_source(source)
            sources[index] = {"path": path, "weight": weight}
    data["train"] = sources


def _describe(error: ValidationError, layers: _Layers) -> list[str]:
    """One line for each key in trouble, in the order of the file."""
    unknown: list[str] = []
    expected: dict[Location, list[str]] = {}
    got: dict[Location, Any] = {}
    for item in error.errors(include_url=False):
        location = _real_location(item["loc"])
        if item["type"] == "extra_forbidden":
            unknown.append(f"{layers.place(location)}: unknown key; {_suggest(location)}")
            continue
        expected.setdefault(location, []).append(_expectation(item))
        got[location] = None if item["type"] == "missing" else item["input"]
    lines = []
    for location, wanted in expected.items():
        wants = " or ".join(dict.fromkeys(wanted))
        lines.append(f"{layers.place(location)}: got {_show(got[location])}; expected {wants}")
    return unknown + lines


def _expectation(item: Any) -> str:
    kind, context = item["type"], item.get("ctx", {})
    if kind in _BOUNDS:
        word, key = _BOUNDS[kind]
        return f"a number {word} {context[key]:g}"
    if kind == "literal_error":
        return str(context["expected"])
    return _EXPECTED.get(kind.split("_")[0], str(item["msg"]))


def _real_location(location: Location) -> Location:
    """``location`` without the names that pydantic adds for the members of a union."""
    real: list[str | int] = []
    section: type[BaseModel] | None = Config
    for part in location:
        if section is None:
            if isinstance(part, int):
                real.append(part)
            continue
        real.append(part)
        if isinstance(part, str):
            field = section.model_fields.get(part)
            section = _section_of(field.annotation) if field else None
    return tuple(real)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class that an annotation is, or is a list of; None for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for argument in get_args(annotation) if (found := _section_of(argument))), None)


def _suggest(location: Location) -> str:
    """What to write instead of the unknown key at ``location``: a near name here, the same or a near one elsewhere."""
    section: type[BaseModel] = Config
    for part in location[:-1]:
        field = section.model_fields.get(str(part))
        section = (_section_of(field.annotation) if field else None) or section
    name = str(location[-1]).rsplit(".", 1)[-1]
    ends = {key.rsplit(".", 1)[-1]: key for key in reversed(config_fields())}
    if name in ends:
        return f"did you mean {ends[name]}?"
    here = {key: ".".join(str(part) for part in (*location[:-1], key)) for key in section.model_fields}
    near = [here[key] for key in _close(name, here)] or [ends[key] for key in _close(name, ends)]
    return f"did you mean {near[0]}?" if near else f"known here: {', '.join(here)}"


def _close(word: str, known: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(word.lower().replace("-", "_"), list(known), n=3, cutoff=0.7)


def _show(value: Any) -> str:
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _report(problems: Sequence[str]) -> QaromaError:
    if len(problems) == 1:
        return QaromaError(problems[0])
    lines = [f"{len(problems)} problems in the configuration:", *(f"  {problem}" for problem in problems)]
    return QaromaError("\n".join(lines))
