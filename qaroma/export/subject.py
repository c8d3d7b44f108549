"""What is exported: a run's adapter, an adapter folder, or a checkpoint, with all that belongs to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from qaroma.data.templates import Template
from qaroma.errors import QaromaError
from qaroma.inference.open import RememberedBase, remembered_base, template_of
from qaroma.method.attach import check_shapes, linear_shapes
from qaroma.method.dequantise import is_transposed
from qaroma.method.factors import Factors
from qaroma.model.builtin import SMOLLM2_HUB_ID
from qaroma.model.skeleton import skeleton
from qaroma.runs.adapter import read_adapter
from qaroma.runs.adapter_info import AdapterInfo
from qaroma.runs.checkpoint import adapter_in
from qaroma.runs.directory import GROWTH, STATE, RunDirectory
from qaroma.runs.log import read_records
from qaroma.runs.reading import read_settings


@dataclass(frozen=True)
class Subject:
    """An adapter and what it was trained with.

    Attributes:
        folder: where the factors lie.
        run: its run directory, where it lies in one.
        info: what the adapter remembers.
        update: every target module, those of rank 0 included, fp32 on the CPU.
        base: the base, not loaded.
        config, tokenizer, template: of the base and the run.
        shapes: (M, N) of each of the base's linear layers.
        transposed: those whose weight a checkpoint holds as (N, M).
    """

    folder: Path
    run: RunDirectory | None
    info: AdapterInfo
    update: dict[str, Factors]
    base: RememberedBase
    config: Any
    tokenizer: PreTrainedTokenizerBase
    template: Template
    shapes: dict[str, tuple[int, int]]
    transposed: frozenset[str]

    @property
    def name(self) -> str:
        """A name for people: the run's, or the folder's."""
        return (self.run.path if self.run else self.folder).resolve().name

    @property
    def public_base(self) -> str:
        """The base as other tools find it: the built-in one by its id on the hub."""
        return SMOLLM2_HUB_ID if self.base.name.strip().lower() == "smollm2-135m" else self.base.name


def open_subject(path: str | Path, *, base: str | None = None, trust_remote_code: bool = False) -> Subject:
    """Read an adapter and find what belongs to it.

    Args:
        path: a run directory, a checkpoint in one, or an adapter folder of qaroma.
        base: where the base lies now, if not where it was.
        trust_remote_code: run Python code that comes with the base.

    Raises:
        QaromaError: nothing of these, or an adapter that is not the base's.
    """
    folder, info, update = _adapter_at(Path(path))
    if info.task.outputs is not None:
        raise QaromaError(
            f"{path} is a {info.task.kind} run, which these forms cannot hold; its adapter folder loads in PEFT"
        )
    remembered = remembered_base(info, folder, base=base, trust_remote_code=trust_remote_code)
    config = remembered.config()
    network = _network(config, remembered)
    shapes = linear_shapes(network)
    for name in info.components:
        if name not in shapes:
            raise QaromaError(
                f"{folder} adapts {name}, which this model does not have; give the base it was trained on"
            )
    whole = {name: update.get(name) or Factors.zero(shapes[name]) for name in info.components}
    check_shapes(whole, shapes, str(path))
    tokenizer = remembered.tokenizer()
    template = template_of(info.task, tokenizer)
    transposed = frozenset(name for name in shapes if is_transposed(network.get_submodule(name)))
    return Subject(folder, run_of(folder), info, whole, remembered, config, tokenizer, template, shapes, transposed)


def _adapter_at(path: Path) -> tuple[Path, AdapterInfo, dict[str, Factors]]:
    """The adapter that a path means: where it lies, what it remembers, and its factors."""
    run = RunDirectory(path)
    for folder in (path, run.adapter):
        if (folder / GROWTH).is_file():
            saved = read_adapter(folder)
            return folder, saved.info, saved.update
    if (path / STATE).is_file():
        info, update = adapter_in(path)
        return path, info, {name: factors.on_host() for name, factors in update.items()}
    if run.exists():
        raise QaromaError(f"{path} has no adapter yet; finish it with: {run.resume_command}")
    raise QaromaError(
        f"{path} is neither a run, nor a checkpoint in one, nor an adapter folder of qaroma; "
        "give a run directory such as runs/NAME"
    )


def run_of(folder: Path) -> RunDirectory | None:
    """The run that a folder is, or lies in."""
    resolved = folder.resolve()
    return next((RunDirectory(p) for p in (resolved, *list(resolved.parents)[:2]) if RunDirectory(p).exists()), None)


def settings_of(run: RunDirectory | None) -> dict[str, Any]:
    """A run's resolved configuration as plain values; empty outside a run, or where it cannot be read."""
    try:
        return read_settings(run) if run else {}
    except QaromaError:  # the adapter is whole: what it was trained on is then not known
        return {}


def records_of(run: RunDirectory | None) -> list[dict[str, Any]]:
    """A run's metrics log; empty outside a run."""
    return read_records(run) if run else []


def records_about(folder: Path, info: AdapterInfo) -> list[dict[str, Any]]:
    """The metrics log of the run that an adapter lies in, without what it says of other adapters than this one.

    Of another one than the run's own (a checkpoint, the last one) that is what came after its step, and the answers
    of the end.

    Args:
        folder: of the adapter.
        info: what it remembers.
    """
    run = run_of(folder)
    records = records_of(run)
    if run is None or info.step is None or run.adapter.resolve() == folder.resolve():
        return records
    return [r for r in records if r.get("step", 0) <= info.step and r.get("when") != "after"]


def _network(config: Any, base: RememberedBase) -> Any:
    """The model that a configuration describes; no weight is read or made."""
    try:
        return skeleton(config, trust_remote_code=base.trust_remote_code)
    except ValueError as error:
        raise QaromaError(f"'{base.name}' is no causal language model that transformers knows ({error})") from error
