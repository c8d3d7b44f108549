"""Using what a run left: its model with the adapter on, answers, and scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qaroma.data.encode import encode_rows
from qaroma.data.forms import Message
from qaroma.data.labelled import encode_labelled, takes_token_types
from qaroma.data.sources import RowSet, read_rows
from qaroma.data.templates import Template
from qaroma.engine.placement import quantise_head
from qaroma.errors import QaromaError
from qaroma.inference.answer_test import AnswerTest, read_conversations
from qaroma.inference.generate import generate
from qaroma.model.base import fingerprint, load_base, load_tokenizer, resolve_device, resolve_dtype
from qaroma.runs.adapter import load_adapter, read_growth
from qaroma.runs.directory import adapter_folder
from qaroma.tasks.base import Task
from qaroma.tasks.causal_lm import CausalLM
from qaroma.tasks.labelled import labelled_task

MICRO_BATCH = 8


@dataclass(frozen=True)
class TunedModel:
    """A base with an adapter on, ready to answer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: Template


def open_run(run: str | Path, *, base: str | None = None, device: str = "auto") -> TunedModel:
    """Load the base that a run names, as it was quantised, with the run's adapter on.

    Args:
        run: run directory or adapter folder.
        base: where the base lies now, if not where it was; None is the name that the run remembers.
        device: ``auto``, ``cuda`` or ``cpu``.

    Raises:
        QaromaError: no adapter, one of a classifier, or a base that is not the one it was trained on.
    """
    folder = adapter_folder(run)
    growth = read_growth(folder)
    if task_of(growth) != "causal-lm":
        raise QaromaError(
            f"{run} was trained for {task_of(growth)} and writes no text; score it with: "
            f"qaroma evaluate {Path(run).as_posix()} --data FILE"
        )
    model, tokenizer = _load(folder, growth, base, device)
    return TunedModel(model, tokenizer, Template.from_json(growth["template"]))


def task_of(growth: dict[str, Any]) -> str:
    """The task in ``growth.json``; adapters of language models once left it out."""
    return str(growth.get("task", "causal-lm"))


def _load(
    folder: Path, growth: dict[str, Any], base: str | None, device: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Base, adapter and head of an adapter folder, and the tokenizer."""
    remembered = growth["base"]
    name = base or remembered["name"]
    target = resolve_device(device)
    model = load_base(
        name,
        quantization=remembered["quantization"],
        double_quantization=remembered["double_quantization"],
        quantize_head=remembered.get("head_quantization", "none") != "none",
        compute_dtype=resolve_dtype(remembered["compute_dtype"], target),
        device=target,
        revision=None if base else remembered["revision"],
        num_labels=None if task_of(growth) == "causal-lm" else len(growth["labels"]) or 1,
    )
    if remembered.get("head_quantization", "none") != "none":
        quantise_head(model, remembered["head_quantization"], double_quantization=remembered["double_quantization"])
    found = fingerprint(model)
    if found != remembered["fingerprint"]:
        raise QaromaError(
            f"{folder} was trained on {remembered['name']} (fingerprint {remembered['fingerprint']}), "
            f"but {name} is another model ({found}); give the right one with --base"
        )
    load_adapter(model, folder)
    return model.eval(), load_tokenizer(name, revision=None if base else remembered["revision"])


def open_base(name: str, *, quantization: str = "nf4", device: str = "auto") -> TunedModel:
    """Load a base as training would, untuned, with the template that training would choose.

    Args:
        name: built-in name, folder, .gguf file or hub id.
        quantization: ``nf4``, ``fp4`` or ``none``.
        device: ``auto``, ``cuda`` or ``cpu``.

    Raises:
        QaromaError: no such model, or one that cannot be read.
    """
    target = resolve_device(device)
    tokenizer = load_tokenizer(name)
    template = Template.choose(tokenizer)
    model = load_base(name, quantization=quantization, compute_dtype=resolve_dtype("auto", target), device=target)
    return TunedModel(model.eval(), tokenizer, template)


def generate_from_run(
    run: str, prompts: Sequence[str], *, max_new_tokens: int, base: str | None = None, device: str = "auto"
) -> list[str]:
    """Greedy answers of a run's model to user prompts, in their order."""
    tuned = open_run(run, base=base, device=device)
    conversations = [[Message("user", prompt)] for prompt in prompts]
    return generate(tuned.model, tuned.tokenizer, tuned.template, conversations, max_new_tokens=max_new_tokens)


def evaluate_run(
    run: str,
    data: Sequence[tuple[str, float]],
    *,
    data_format: str = "auto",
    rows: int | None = None,
    max_new_tokens: int | None = None,
    base: str | None = None,
    device: str = "auto",
    skip_bad: bool = False,
) -> dict[str, Any]:
    """Loss and perplexity on the answers of some data, and how many are given exactly; or a classifier's figures.

    Returns:
        ``rows, tokens, loss, perplexity`` and, unless the data is plain text, ``exact_match``; of a run with
        labels ``rows`` and what its task evaluates.
    """
    folder = adapter_folder(run)
    growth = read_growth(folder)
    read = read_rows(data)
    if rows is not None:
        read = read.head(rows)
    if task_of(growth) != "causal-lm":
        return _evaluate_labelled(folder, growth, read, base, device, skip_bad)
    tuned = open_run(folder, base=base, device=device)
    encoded = encode_rows(read, tuned.tokenizer, tuned.template, form=data_format, skip_bad=skip_bad)
    task = CausalLM(tuned.tokenizer.pad_token_id or 0)
    figures: dict[str, Any] = {"rows": len(encoded.examples)}
    figures.update(task.evaluate(tuned.model, _batches(task, encoded.examples), tuned.model.device))
    if encoded.form != "text":
        conversations = read_conversations(data, form=data_format, rows=rows, skip_bad=skip_bad)
        answers = AnswerTest(conversations, tuned.tokenizer, tuned.template, max_new_tokens).run(tuned.model)
        figures["exact_match"] = answers.exact_match
    return figures


def _evaluate_labelled(
    folder: Path, growth: dict[str, Any], rows: RowSet, base: str | None, device: str, skip_bad: bool
) -> dict[str, Any]:
    """The figures of a classifier or a regression over all rows."""
    model, tokenizer = _load(folder, growth, base, device)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    task = labelled_task(task_of(growth), growth["labels"], growth["metric"], tokenizer.pad_token_id)
    encoded = encode_labelled(
        rows,
        tokenizer,
        growth["task"],
        labels=growth["labels"] or None,
        max_length=growth["max_length"],
        token_types=takes_token_types(model.config),
        skip_bad=skip_bad,
    )
    figures = task.evaluate(model, _batches(task, encoded.examples), model.device)
    return {"rows": len(encoded.examples), **figures}


def _batches(task: Task, examples: Sequence[Any]) -> Iterator[Any]:
    """Micro-batches of examples of similar lengths."""
    ordered = sorted(examples, key=lambda e: len(e.input_ids))
    return (task.collate(ordered[i : i + MICRO_BATCH]) for i in range(0, len(ordered), MICRO_BATCH))
