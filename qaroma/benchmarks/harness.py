"""One call of lm-evaluation-harness from the names of tasks to figures, going on where an earlier call stopped."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import CachingLM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel

from qaroma.benchmarks.model import HarnessModel
from qaroma.benchmarks.results import summarise
from qaroma.errors import QaromaError
from qaroma.inference.open import TunedModel, open_base, open_run
from qaroma.model.base import fingerprint
from qaroma.runs.directory import WEIGHTS, adapter_folder
from qaroma.runs.files import write_atomically
from qaroma.text.paths import local_path

OURS = Path(__file__).parent / "tasks"
VERSION = 2  # of how a request becomes an answer: answers of two versions are never mixed
_BULKY = ("doc", "arguments", "doc_hash", "prompt_hash", "target_hash")  # of a sample: its records are at hand
SEED = 1234  # of the examples before a question, the harness's own


def run_benchmark(
    tasks: Sequence[str],
    *,
    run: str | None = None,
    base: str | None = None,
    quantization: str = "nf4",
    data: str | None = None,
    rows: int | None = None,
    examples: int | None = None,
    template: bool = True,
    max_new_tokens: int | None = None,
    batch_size: int = 16,
    device: str = "auto",
    output: str | Path | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Score a model on tasks of the harness, going on from the requests that an earlier call answered.

    Args:
        tasks: names of tasks and groups, see ``lm-eval ls tasks``; also ``commonsense``, ``commonsense_likelihood``
            and the tasks of these groups.
        run: run directory or adapter folder; None scores the base as it is.
        base: model; with ``run`` where its base lies now, if not where it was.
        quantization: nf4, fp4 or none, of a base without a run; a run remembers its own.
        data: LLM-Adapters' ``dataset`` folder, for the commonsense tasks.
        rows: at most so many questions of each task.
        examples: solved ones before each question; None is what the task says.
        template: give questions in the template that the model was trained with.
        max_new_tokens: longest generated answer; None is what the task says.
        batch_size: requests in one forward pass.
        device: ``auto``, ``cuda`` or ``cpu``.
        output: folder of answers and results, or a .json file for the results; None lies in the run.
        trust_remote_code: run Python code that comes with the base.

    Returns:
        What :func:`qaroma.benchmarks.results.summarise` gives, with ``model``, ``quantization``, ``template``
        and ``output``; what each question was answered lies beside that file, as .jsonl.

    Raises:
        QaromaError: no such task, its records cannot be had, no such model, or too little memory.
    """
    with _quiet():
        chosen = _load_tasks(tasks, data)
        _configure(chosen["tasks"].values(), examples, max_new_tokens)
        tuned = _open(run, base, quantization, device, trust_remote_code)
        identity = _identity(tuned, run)
        place, results = _places(run or base or "", run is not None, tasks, output)
        asked = _answers(tuned, chosen, place / f"answers-{_digest(identity)}", batch_size, rows, template)
    figures = {
        "model": run or base,
        "quantization": identity["quantization"],
        "template": tuned.template.kind if template else "none",
        **summarise(asked, chosen["group_map"]),
        "output": results.as_posix(),
    }
    _write(results, figures, asked["samples"])
    return figures


def _write(results: Path, figures: Mapping[str, Any], samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """The figures, and beside them what each question was answered."""
    lines = [
        json.dumps({"task": task, **{key: sample[key] for key in sample if key not in _BULKY}}) + "\n"
        for task, answered in samples.items()
        for sample in answered
    ]
    write_atomically(results.with_suffix(".jsonl"), "".join(lines))
    write_atomically(results, json.dumps(figures, indent=2) + "\n")


def _load_tasks(names: Sequence[str], data: str | None) -> dict[str, Any]:
    """The harness's tasks by name; its own index of thousands of files is read only where it is needed."""
    metadata = {} if data is None else {"data": data}
    manager = TaskManager(include_path=OURS, include_defaults=False, metadata=metadata)
    if any(name not in manager.all_tasks for name in names):
        manager = TaskManager(include_path=OURS, metadata=metadata)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        near = difflib.get_close_matches(unknown[0], manager.all_tasks, n=4)
        raise QaromaError(
            f"got the task '{unknown[0]}', which lm-evaluation-harness does not have; "
            f"{'did you mean ' + ', '.join(near) + '? ' if near else ''}To list all names, type: lm-eval ls tasks"
        )
    try:
        loaded: dict[str, Any] = manager.load(list(names))
    except ImportError as error:
        raise QaromaError(f"{', '.join(names)} need a package that is not installed: {_first_line(error)}") from error
    except (OSError, ValueError) as error:  # of the hub and of what loads its records
        raise QaromaError(
            f"{', '.join(names)} cannot be loaded ({_first_line(error)}). The harness fetches its tasks' records from "
            "the hub: check the network and HF_HUB_OFFLINE"
        ) from error
    unsafe = [name for name, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]
    if unsafe:
        raise QaromaError(
            f"{', '.join(unsafe)} would run code that the model writes, which qaroma does not do. Leave it out, or "
            "export the run and score that with lm-eval itself: qaroma export RUN --format merged"
        )
    return loaded


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _configure(tasks: Iterable[Any], examples: int | None, max_new_tokens: int | None) -> None:
    """Set what was typed; a task that says none of its questions has solved ones before it stays so."""
    for task in tasks:
        if examples is not None and task.get_config("num_fewshot") != 0:
            task.set_config("num_fewshot", examples)
        elif task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        if max_new_tokens is not None and task.get_config("output_type") == "generate_until":
            task.set_config("generation_kwargs", {"max_gen_toks": max_new_tokens}, update=True)
        task.set_fewshot_seed(SEED)


def _answers(
    tuned: TunedModel, chosen: dict[str, Any], store: Path, batch_size: int, rows: int | None, template: bool
) -> dict[str, Any]:
    """What the harness found; every answer is kept in a database beside ``store`` as soon as it is there."""
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        model = CachingLM(HarnessModel(tuned, batch_size=batch_size), f"{store}.db")
    except OSError as error:
        raise QaromaError(f"cannot write to {store.parent} ({error.strerror}); choose another --output") from error
    try:
        found: dict[str, Any] = evaluate(
            model,
            chosen,
            limit=rows,
            bootstrap_iters=1000,
            apply_chat_template=template,
            fewshot_as_multiturn=template,
        )
    except torch.OutOfMemoryError as error:
        raise QaromaError(
            f"{batch_size} requests at a time do not fit the GPU's memory; type --batch-size {max(1, batch_size // 2)}"
        ) from error
    finally:
        model.dbdict.close()
    return found


def _open(run: str | None, base: str | None, quantization: str, device: str, trust_remote_code: bool) -> TunedModel:
    if run is not None:
        return open_run(run, base=base, device=device, trust_remote_code=trust_remote_code)
    if base is None:
        raise QaromaError("got neither a run nor a base; expected a run directory, or --base MODEL")
    return open_base(base, quantization=quantization, device=device, trust_remote_code=trust_remote_code)


def _identity(tuned: TunedModel, run: str | None) -> dict[str, Any]:
    """What makes two models give different answers, as plain values."""
    adapter = None
    if run is not None:
        adapter = hashlib.sha256((adapter_folder(run) / WEIGHTS).read_bytes()).hexdigest()
    return {
        "version": VERSION,
        "base": fingerprint(tuned.model),
        "adapter": adapter,
        "quantization": _quantization(tuned.model),
        "template": tuned.template.to_json(),
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _quantization(model: PreTrainedModel) -> str:
    """How the linear layers lie in memory, as nf4-double."""
    states = (getattr(getattr(module, "weight", None), "quant_state", None) for module in model.modules())
    kinds = {f"{state.quant_type}{'-double' if state.nested else ''}" for state in states if state is not None}
    return "+".join(sorted(kinds)) or "none"


def _places(model: str, is_run: bool, tasks: Sequence[str], output: str | Path | None) -> tuple[Path, Path]:
    """The folder of answers, which all tasks share, and the file of results."""
    if output is not None and Path(output).suffix.lower() == ".json":
        return Path(output).parent, Path(output)
    if output is not None:
        folder = Path(output)
    else:
        folder = Path(model) / "benchmarks" if is_run else Path("benchmarks") / _folder_name(model)
    name = "+".join(tasks)
    return folder, folder / f"{name if len(name) <= 80 else f'{name[:63]}-{_digest(name)}'}.json"


def _folder_name(model: str) -> str:
    """The name of a model as a folder: of a local path its last part, of a hub id the whole."""
    name = local_path(model).resolve().name if local_path(model).exists() else model
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness's log without what it says of every run; its progress bars stay."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
