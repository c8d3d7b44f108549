"""``growth.json``: what an adapter remembers beside its factors. Read and written here alone, without torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from qaroma.config.tasks import WRITING, TaskName
from qaroma.errors import QaromaError
from qaroma.runs.directory import CONFIG, GROWTH, WEIGHTS
from qaroma.text.json_text import parse_json

VERSION = 2  # 1: qaroma 0.1.0, which did not say how the base attends and whether it needs code of its own

# What a value of growth.json may be; the file may come from anywhere.
Rank = Annotated[int, Field(ge=0, le=1 << 20)]
Packing = Annotated[str, Field(pattern="^(nf4|fp4|none)$")]
Text = Annotated[str, Field(min_length=1, max_length=4096)]
Figure = Annotated[float, Field(allow_inf_nan=False)]
Revision = Annotated[str, Field(pattern=r"^[\w-][\w.-]*(/[\w-][\w.-]*)*$")]  # never out of the hub's cache


@dataclass(frozen=True)
class BaseInfo:
    """What it takes to open the base again as training saw it.

    Attributes:
        name: built-in name, folder, .gguf file or hub id.
        revision: branch, tag or commit on the hub.
        fingerprint: see :func:`qaroma.model.base.fingerprint`.
        quantization: ``nf4``, ``fp4`` or ``none``.
        double_quantization: whether the constants are quantised too.
        head_quantization: of the output head, ``none`` where it is dense.
        compute_dtype: ``auto``, ``bf16``, ``fp16`` or ``fp32``.
        attention: ``sdpa``, ``eager`` or ``flash_attention_2``.
        needs_remote_code: it runs Python code of its own, which the user must allow each time.
    """

    name: Text
    revision: Revision | None
    fingerprint: str
    quantization: Packing
    double_quantization: bool
    compute_dtype: Annotated[str, Field(pattern="^(auto|bf16|fp16|fp32)$")]
    head_quantization: Packing = "none"
    attention: Annotated[str, Field(pattern="^(sdpa|eager|flash_attention_2)$")] = "sdpa"
    needs_remote_code: bool = False


@dataclass(frozen=True)
class TaskInfo:
    """What an adapter must know of its task to be used again.

    Attributes:
        kind: of :data:`qaroma.config.tasks.TaskName`.
        template: of a language model, see :meth:`qaroma.data.templates.Template.to_json`.
        labels: names of a classifier's classes, in the order of its outputs.
        metric: by which the best adapter was chosen; None is the loss.
        max_length: tokens at which a text is cut.
        head: modules that were trained in full and are saved whole.
        beta: of preferences, see :class:`qaroma.tasks.preference.Preference`.
        start: of preferences, how many of each module's first ranks the model had on that the run started from.
    """

    kind: TaskName = "causal-lm"
    template: Mapping[str, Any] | None = None
    labels: tuple[str, ...] = ()
    metric: str | None = None
    max_length: Annotated[int, Field(ge=1, le=1 << 31)] | None = None
    head: tuple[Text, ...] = ()
    beta: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    start: Mapping[str, Rank] = field(default_factory=dict)

    @property
    def outputs(self) -> int | None:
        """Outputs of the head (1 is a regression); None for a model that writes text."""
        return None if self.kind in WRITING else len(self.labels) or 1


@dataclass(frozen=True)
class AdapterInfo:
    """An adapter but for its numbers.

    Attributes:
        components: inner ranks of each module's components, in order; every target module, in the model's order.
        inner_rank: rank of one component.
        alpha: the update was alpha / inner_rank times B A; the factors in the file hold that already.
        method: that trained it.
        step: optimiser steps it was trained for.
        base: None where a loop of the user's own saved it and did not say.
        task: what it was trained for.
        settings: of its growth, for people.
        validation: its figures on the validation rows, as it stands; empty where it was not measured.
    """

    components: Mapping[str, list[Rank]]
    inner_rank: Rank
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    method: str | None = None
    step: Annotated[int, Field(ge=0, le=1 << 53)] | None = None
    base: BaseInfo | None = None
    task: TaskInfo = field(default_factory=TaskInfo)
    settings: Mapping[str, Any] = field(default_factory=dict)
    validation: Mapping[str, Figure] = field(default_factory=dict)

    def ranks(self) -> dict[str, int]:
        """Rank of each module."""
        return {name: sum(parts) for name, parts in self.components.items()}

    def to_json(self) -> dict[str, Any]:
        """As ``growth.json`` holds it: the task's fields beside the adapter's own."""
        values = asdict(self)
        task = values.pop("task")
        return {"version": VERSION, **values, "task": task.pop("kind"), **task}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> AdapterInfo:
        """What :meth:`to_json` gave, or what 0.1.0 wrote.

        Raises:
            ValueError: a value that is missing, or of another kind.
        """
        task = {name: values[name] for name in TaskInfo.__dataclass_fields__ if name in values}
        # Adapters of language models once left the kind out.
        nested = {**values, "task": {**task, "kind": values.get("task", "causal-lm")}}
        try:
            return _form().validate_python(nested)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None

    def write(self, folder: Path) -> None:
        """Write ``growth.json``, with a digest of the whole adapter, into a folder that holds its other files."""
        values = sealed(self.to_json(), _said_in(folder / CONFIG), folder / WEIGHTS)
        (folder / GROWTH).write_text(json.dumps(values, indent=2), encoding="utf-8")

    @classmethod
    def read(cls, folder: str | Path) -> AdapterInfo:
        """What an adapter folder says of itself.

        Raises:
            QaromaError: not an adapter folder of qaroma, a damaged one, or one of a newer version.
        """
        path = Path(folder) / GROWTH
        if not path.is_file():
            raise QaromaError(
                f"{folder} is no adapter of qaroma (it has no {GROWTH}); give a run directory such as runs/NAME"
            )
        try:
            values = parse_json(path.read_text(encoding="utf-8"))
            version = int(values["version"])
            if version <= VERSION:
                return cls.from_json(values)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise QaromaError(
                f"{path} is damaged ({error}); copy the adapter again, or resume the run that wrote it"
            ) from error
        raise QaromaError(f"{path} has version {version}, this qaroma reads up to {VERSION}; upgrade qaroma")


@cache
def _form() -> TypeAdapter[AdapterInfo]:
    """What reads the nested values of an adapter by the types above."""
    return TypeAdapter(AdapterInfo)


def require_undamaged(folder: Path) -> None:
    """See to it that an adapter folder holds what was written.

    Raises:
        QaromaError: its files do not match the digest in ``growth.json``. Adapters of 0.1.0 have none.
    """
    try:
        values = _said_in(folder / GROWTH)
        whole = "sha256" not in values or values == sealed(values, _said_in(folder / CONFIG), folder / WEIGHTS)
        reason = f"its files are not those that were written, their digest differs from the one in {GROWTH}"
    except (OSError, ValueError, TypeError) as error:
        whole, reason = False, repr(error)
    if not whole:
        raise QaromaError(f"{folder} is damaged ({reason}); copy the adapter again, or resume the run that wrote it")


def _said_in(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file. What cannot be read is an error: it must not count as empty."""
    return dict(parse_json(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def sealed(growth: Mapping[str, Any], config: Mapping[str, Any], weights: Path) -> dict[str, Any]:
    """``growth.json`` with a digest of the whole adapter.

    Args:
        growth: what it says; a digest that it has counts for nothing.
        config: what ``adapter_config.json`` says. Its name of the base does not count: other tools rewrite it.
        weights: the file of the factors.
    """
    said = {key: value for key, value in growth.items() if key != "sha256"}
    digest = hashlib.sha256(weights.read_bytes() if weights.is_file() else b"")
    for values in ({**config, "base_model_name_or_path": None}, json.loads(json.dumps(said))):
        digest.update(json.dumps(values, sort_keys=True, separators=(",", ":")).encode())
    return {**said, "sha256": digest.hexdigest()}


def info_if_any(folder: Path) -> AdapterInfo | None:
    """What an adapter folder says of itself; None where there is none, or no whole one."""
    try:
        return AdapterInfo.read(folder)
    except QaromaError:
        return None
