"""One benchmark from its files to its figures."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel

from qaroma.benchmarks.commonsense import MAX_NEW_TOKENS, NAME, TaskSet, read_tasks
from qaroma.benchmarks.progress import ScoreFile
from qaroma.benchmarks.results import summarise
from qaroma.benchmarks.scorers import Generation, Item, Likelihood, Scorer
from qaroma.errors import QaromaError
from qaroma.inference.open import TunedModel, open_base, open_run
from qaroma.model.base import fingerprint
from qaroma.runs.directory import WEIGHTS, adapter_folder
from qaroma.runs.files import write_atomically

SCORES, RESULTS = "scores.jsonl", "results.json"
VERSION = 1  # of what a scorer does: scores of two versions are never mixed


def run_commonsense(
    data: str | Path,
    *,
    run: str | None = None,
    base: str | None = None,
    quantization: str = "nf4",
    tasks: Sequence[str],
    scorer: str = "generation",
    rows: int | None = None,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    device: str = "auto",
    output: str | Path | None = None,
    console: Console | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Score a model on the commonsense tasks, going on from what an earlier call scored.

    Args:
        data: Folder of the test sets, see :func:`qaroma.benchmarks.commonsense.read_tasks`.
        run: Run directory or adapter folder; None scores the base as it is.
        base: Model; with ``run`` where its base lies now, if not where it was.
        quantization: nf4, fp4 or none, of a base without a run; a run remembers its own.
        tasks: Names of tasks.
        scorer: ``generation`` or ``likelihood``.
        rows: At most so many questions of each task.
        batch_size: Questions in one forward pass.
        max_new_tokens: Longest generated answer; None is LLM-Adapters' 32.
        device: ``auto``, ``cuda`` or ``cpu``.
        output: Folder of scores and results, or a .json file for the results; None lies in the run.
        console: Where progress is shown; None is stderr.
        trust_remote_code: Run Python code that comes with the base.

    Returns:
        What :func:`qaroma.benchmarks.results.summarise` gives, with ``benchmark``, ``scorer``, ``model``,
        ``quantization`` and ``output``.

    Raises:
        QaromaError: Missing test sets, no such model, or an output folder that has scores of another one.
    """
    sets = read_tasks(data, tasks, rows=rows)
    tuned = _open(run, base, quantization, device, trust_remote_code)
    scores, results = _places(run or base or "", run is not None, scorer, output)
    longest = max_new_tokens or MAX_NEW_TOKENS
    header = {"version": VERSION, "benchmark": NAME, "scorer": scorer, **_identity(tuned, run)}
    how: Scorer
    if scorer == "generation":
        header["max_new_tokens"] = longest
        how = Generation(tuned.model, tuned.tokenizer, tuned.template, max_new_tokens=longest)
    else:
        how = Likelihood(tuned.model, tuned.tokenizer, tuned.template)
    file = ScoreFile(scores, header)
    for task in sets:
        file.begin(task.name, task.digest)
    _score(sets, how, file, batch_size, console or Console(stderr=True))
    figures = {
        "benchmark": NAME,
        "scorer": scorer,
        "model": run or base,
        "quantization": header["quantization"],
        **summarise(sets, file.scored, scorer),
        "output": results.as_posix(),
    }
    write_atomically(results, json.dumps(figures, indent=2) + "\n")
    return figures


def _open(run: str | None, base: str | None, quantization: str, device: str, trust_remote_code: bool) -> TunedModel:
    if run is not None:
        return open_run(run, base=base, device=device, trust_remote_code=trust_remote_code)
    if base is None:
        raise QaromaError("got neither a run nor a base; expected a run directory, or --base MODEL")
    return open_base(base, quantization=quantization, device=device, trust_remote_code=trust_remote_code)


def _identity(tuned: TunedModel, run: str | None) -> dict[str, Any]:
    """What makes two models give different scores, as short texts."""
    adapter = None
    if run is not None:
        adapter = hashlib.sha256((adapter_folder(run) / WEIGHTS).read_bytes()).hexdigest()[:32]
    template = json.dumps(tuned.template.to_json(), sort_keys=True)
    return {
        "base": fingerprint(tuned.model),
        "adapter": adapter,
        "quantization": _quantization(tuned.model),
        "template": f"{tuned.template.kind}-{hashlib.sha256(template.encode()).hexdigest()[:16]}",
    }


def _quantization(model: PreTrainedModel) -> str:
    """How the linear layers lie in memory, as nf4-double."""
    states = (getattr(getattr(module, "weight", None), "quant_state", None) for module in model.modules())
    kinds = {f"{state.quant_type}{'-double' if state.nested else ''}" for state in states if state is not None}
    return "+".join(sorted(kinds)) or "none"


def _places(model: str, is_run: bool, scorer: str, output: str | Path | None) -> tuple[Path, Path]:
    """The files of scores and of results."""
    if output is not None and Path(output).suffix.lower() == ".json":
        results = Path(output)
        return results.with_suffix(".jsonl"), results
    if output is not None:
        folder = Path(output)
    elif is_run:
        folder = Path(model) / "benchmarks" / f"{NAME}-{scorer}"
    else:
        folder = Path("benchmarks") / _folder_name(model) / f"{NAME}-{scorer}"
    return folder / SCORES, folder / RESULTS


def _folder_name(model: str) -> str:
    """The name of a model as a folder: of a local path its last part, of a hub id the whole."""
    name = Path(model).expanduser().resolve().name if Path(model).expanduser().exists() else model
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"


def _score(sets: Sequence[TaskSet], scorer: Scorer, file: ScoreFile, batch_size: int, console: Console) -> None:
    """Score what the file lacks, task by task, the longest questions of a task first."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with bar:
        for task in sets:
            left = [question for question in task.questions if (task.name, question.row) not in file.scored]
            known = len(task.questions) - len(left)
            shown = bar.add_task(task.name, total=len(task.questions), completed=known)
            items = sorted((scorer.prepare(question) for question in left), key=lambda item: -item.choice.length)
            for start in range(0, len(items), batch_size):
                batch = items[start : start + batch_size]
                file.add(_scored(scorer, task.name, batch))
                bar.advance(shown, len(batch))
            if not console.is_terminal:
                again = f", {known} of them before" if known else ""
                console.print(f"{task.name}: {len(task.questions)} questions scored{again}", highlight=False)


def _scored(scorer: Scorer, task: str, batch: Sequence[Item]) -> list[dict[str, Any]]:
    try:
        return scorer.score(task, batch)
    except torch.OutOfMemoryError as error:
        raise QaromaError(
            f"{len(batch)} questions at a time do not fit the GPU's memory; type --batch-size {max(1, len(batch) // 2)}"
        ) from error
