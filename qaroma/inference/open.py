"""Using what a run left: its base, its model with the adapter on, answers, and scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qaroma.config.metrics import metrics_of
from qaroma.data.encode import encode_rows
from qaroma.data.forms import Message, holds_pairs
from qaroma.data.labelled import Kind, encode_labelled, takes_token_types
from qaroma.data.sources import RowSet, read_rows
from qaroma.data.templates import Template
from qaroma.engine.placement import compute_device, quantise_head
from qaroma.errors import QaromaError
from qaroma.inference.answer_test import AnswerTest, read_conversations
from qaroma.inference.generate import generate
from qaroma.inference.room import has_room, stream_to_answer
from qaroma.method.attach import attach_update, detach
from qaroma.method.factors import Factors
from qaroma.model.base import fingerprint, load_base, load_model_config, load_tokenizer, resolve_device
from qaroma.model.found import find_model
from qaroma.model.generation import generation_settings
from qaroma.model.precision import resolve_dtype
from qaroma.runs.adapter import load_adapter, read_adapter
from qaroma.runs.adapter_info import AdapterInfo, BaseInfo, TaskInfo
from qaroma.runs.directory import adapter_folder
from qaroma.tasks.base import Task
from qaroma.tasks.causal_lm import CausalLM
from qaroma.tasks.labelled import labelled_task
from qaroma.tasks.preference import Preference, answer_log_probabilities

MICRO_BATCH = 8


@dataclass(frozen=True)
class TunedModel:
    """A base with an adapter on, ready to answer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: Template


@dataclass(frozen=True)
class RememberedBase:
    """The base that an adapter was trained on, and where it lies now.

    Attributes:
        info: what the adapter remembers of it.
        task: of the adapter: whether the base is a classifier, and of how many outputs.
        adapter: the adapter's folder, for messages.
        name: where it lies; ``revision`` on the hub.
        trust_remote_code: the user has allowed its own Python code, in this command.
    """

    info: BaseInfo
    task: TaskInfo
    adapter: Path
    name: str
    revision: str | None
    trust_remote_code: bool

    def config(self) -> Any:
        """transformers' configuration; no weight is read."""
        return load_model_config(self.name, revision=self.revision, trust_remote_code=self.trust_remote_code)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        return load_tokenizer(self.name, revision=self.revision, trust_remote_code=self.trust_remote_code)

    def generation_settings(self) -> dict[str, Any]:
        """Its ``generation_config.json``; empty where it has none."""
        return generation_settings(self.name, revision=self.revision)

    def model(
        self, device: torch.device, *, dtype: torch.dtype | None = None, quantization: str | None = None
    ) -> PreTrainedModel:
        """Its weights as training held them, without the adapter; streamed where the device has no room for them.

        Args:
            device: where they go.
            dtype: of the arithmetic; None is training's.
            quantization: None for the one that training saw, head included; ``none`` for dense weights.

        Raises:
            QaromaError: another model than the one that the adapter was trained on.
        """
        info = self.info
        packed = info.head_quantization if quantization is None else "none"
        kind = quantization or info.quantization
        found = find_model(self.name, revision=self.revision, trust_remote_code=self.trust_remote_code)
        dtype = dtype or resolve_dtype(info.compute_dtype, device, found.config)
        streamed = self.task.outputs is None and not has_room(
            found, device, dtype=dtype, packed=kind != "none", double=info.double_quantization,
            packed_head=packed != "none",
        )  # fmt: skip
        model = load_base(
            found,
            quantization=kind,
            double_quantization=info.double_quantization,
            quantize_head=packed != "none",
            compute_dtype=dtype,
            device=device,
            # Flash attention saves training's memory; it may be missing here, and gives what SDPA gives.
            attention="eager" if info.attention == "eager" else "sdpa",
            num_labels=self.task.outputs,
            host_embeddings=streamed,
            host_layers=streamed,
        )
        if packed != "none":
            quantise_head(model, packed, double_quantization=info.double_quantization)
        if streamed:
            stream_to_answer(model)
        identity = fingerprint(model)
        if identity != info.fingerprint:
            raise QaromaError(
                f"{self.adapter} was trained on {info.name} (fingerprint {info.fingerprint}), "
                f"but {self.name} is another model ({identity}); give the right one with --base"
            )
        return model


def remembered_base(
    info: AdapterInfo, adapter: str | Path, *, base: str | None = None, trust_remote_code: bool = False
) -> RememberedBase:
    """Find the base of an adapter. Nothing is loaded yet.

    Args:
        info: what the adapter remembers.
        adapter: its folder, for messages.
        base: where the base lies now, if not where it was.
        trust_remote_code: run Python code that comes with it. What the adapter or its run says of that is no
            consent: they may be anybody's.

    Raises:
        QaromaError: the adapter names no base, or one that needs code of its own, which was not allowed.
    """
    held = info.base
    if held is None:
        raise QaromaError(
            f"{adapter} does not say what its base is, since a loop of its own saved it; "
            "load the base and give it to qaroma.load_adapter"
        )
    if held.needs_remote_code and not trust_remote_code:
        raise QaromaError(
            f"the base of {adapter}, '{base or held.name}', brings Python code of its own, which is not run unless "
            "you say so. Read that code, then add: --trust-remote-code"
        )
    revision = None if base else held.revision
    return RememberedBase(held, info.task, Path(adapter), base or held.name, revision, trust_remote_code)


def open_run(
    run: str | Path, *, base: str | None = None, device: str = "auto", trust_remote_code: bool = False
) -> TunedModel:
    """Load the base that a run names, as it was quantised, with the run's adapter on.

    Args:
        run: run directory or adapter folder.
        base: where the base lies now, if not where it was; None is the name that the run remembers.
        device: ``auto``, ``cuda`` or ``cpu``.
        trust_remote_code: run Python code that comes with the base.

    Raises:
        QaromaError: no adapter, one of a classifier, or a base that is not the one it was trained on.
    """
    folder = adapter_folder(run)
    info = AdapterInfo.read(folder)
    if info.task.outputs is not None:
        raise QaromaError(
            f"{run} was trained for {info.task.kind} and writes no text; score it with: "
            f"qaroma evaluate {Path(run).as_posix()} --data FILE"
        )
    remembered = remembered_base(info, folder, base=base, trust_remote_code=trust_remote_code)
    model, tokenizer = _with_adapter(remembered, device)
    return TunedModel(model, tokenizer, template_of(info.task, tokenizer))


def template_of(task: TaskInfo, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template that a run rendered its conversations with; where it does not say, the base's own."""
    return Template.choose(tokenizer) if task.template is None else Template.from_json(dict(task.template))


def _with_adapter(remembered: RememberedBase, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Base, adapter and head of an adapter folder, and the tokenizer."""
    model = remembered.model(resolve_device(device))
    load_adapter(model, remembered.adapter)
    return model.eval(), remembered.tokenizer()


def open_base(
    name: str, *, quantization: str = "nf4", device: str = "auto", trust_remote_code: bool = False
) -> TunedModel:
    """Load a base as training would, untuned, with the template that training would choose.

    It is streamed where the device has no room for it.

    Args:
        name: built-in name, folder, .gguf file or hub id.
        quantization: ``nf4``, ``fp4`` or ``none``.
        device: ``auto``, ``cuda`` or ``cpu``.
        trust_remote_code: run Python code that comes with it.

    Raises:
        QaromaError: no such model, or one that cannot be read.
    """
    target = resolve_device(device)
    found = find_model(name, trust_remote_code=trust_remote_code)
    dtype = resolve_dtype("auto", target, found.config)
    tokenizer = load_tokenizer(found)
    template = Template.choose(tokenizer)
    streamed = not has_room(found, target, dtype=dtype, packed=quantization != "none")
    model = load_base(
        found,
        quantization=quantization,
        compute_dtype=dtype,
        device=target,
        host_embeddings=streamed,
        host_layers=streamed,
    )
    if streamed:
        stream_to_answer(model)
    return TunedModel(model.eval(), tokenizer, template)


def generate_from_run(
    run: str,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    base: str | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> list[str]:
    """Greedy answers of a run's model to user prompts, in their order."""
    tuned = open_run(run, base=base, device=device, trust_remote_code=trust_remote_code)
    conversations = [[Message("user", prompt)] for prompt in prompts]
    return generate(tuned.model, tuned.tokenizer, tuned.template, conversations, max_new_tokens=max_new_tokens)


def evaluate_run(
    run: str,
    data: Sequence[tuple[str, float]],
    *,
    data_format: str = "auto",
    columns: Mapping[str, str] | None = None,
    feedback: str = "refuse",
    rows: int | None = None,
    max_new_tokens: int | None = None,
    base: str | None = None,
    device: str = "auto",
    skip_bad: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Loss and perplexity on the answers of some data, and how many are given exactly; or a classifier's figures.

    Returns:
        ``rows, tokens, loss, perplexity`` and, unless the data is plain text, ``exact_match``; of a run with
        labels, and of one of preferences on such rows, ``rows`` and what its task evaluates.
    """
    folder = adapter_folder(run)
    info = AdapterInfo.read(folder)
    remembered = remembered_base(info, folder, base=base, trust_remote_code=trust_remote_code)
    read = read_rows(data)
    if rows is not None:
        read = read.head(rows)
    if info.task.outputs is not None:
        return _evaluate_labelled(remembered, read, device, skip_bad)
    reading: dict[str, Any] = {"form": data_format, "columns": columns, "feedback": feedback, "skip_bad": skip_bad}
    if info.task.beta is not None and feedback == "refuse" and holds_pairs(read.rows, columns):
        return _evaluate_pairs(remembered, read, device, info.task.beta, reading)
    tuned = open_run(folder, base=base, device=device, trust_remote_code=trust_remote_code)
    encoded = encode_rows(read, tuned.tokenizer, tuned.template, **reading)
    task = CausalLM(tuned.tokenizer.pad_token_id or 0)
    figures: dict[str, Any] = {"rows": len(encoded.examples)}
    figures.update(task.evaluate(tuned.model, _batches(task, encoded.examples), compute_device(tuned.model)))
    if encoded.form != "text":
        conversations = read_conversations(data, rows=rows, **reading)
        answers = AnswerTest(conversations, tuned.tokenizer, tuned.template, max_new_tokens).run(tuned.model)
        figures["exact_match"] = answers.exact_match
    return figures


def _evaluate_pairs(
    remembered: RememberedBase, rows: RowSet, device: str, beta: float, reading: Mapping[str, Any]
) -> dict[str, Any]:
    """The figures of preferences, beside the model that the run started from."""
    tokenizer, model = remembered.tokenizer(), remembered.model(resolve_device(device)).eval()
    encoded = encode_rows(rows, tokenizer, template_of(remembered.task, tokenizer), pairs=True, **reading)
    task = Preference(beta, tokenizer.pad_token_id or 0)
    saved = read_adapter(remembered.adapter)
    start = {
        name: Factors(*(factor[: remembered.task.start[name]] for factor in factors))
        for name, factors in saved.update.items()
        if name in remembered.task.start
    }
    adapter = attach_update(model, start)
    ordered = sorted(encoded.examples, key=lambda pair: pair.tokens)
    known = answer_log_probabilities(task, model, ordered, model.device, batch=MICRO_BATCH)
    pairs = [replace(pair, reference=value) for pair, value in zip(ordered, chain.from_iterable(known), strict=True)]
    detach(adapter)
    load_adapter(model, remembered.adapter)
    figures = task.evaluate(model.eval(), _batches(task, pairs), model.device)
    return {"rows": len(pairs), **figures}


def _evaluate_labelled(remembered: RememberedBase, rows: RowSet, device: str, skip_bad: bool) -> dict[str, Any]:
    """The figures of a classifier or a regression over all rows."""
    model, tokenizer = _with_adapter(remembered, device)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    about = remembered.task
    task = labelled_task(about.kind, about.labels, about.metric or metrics_of(about.kind)[0], tokenizer.pad_token_id)
    encoded = encode_labelled(
        rows,
        tokenizer,
        cast(Kind, about.kind),
        labels=about.labels or None,
        max_length=about.max_length,
        token_types=takes_token_types(model.config),
        skip_bad=skip_bad,
    )
    figures = task.evaluate(model, _batches(task, encoded.examples), compute_device(model))
    return {"rows": len(encoded.examples), **figures}


def _batches(task: Task, examples: Sequence[Any]) -> Iterator[Any]:
    """Micro-batches of examples of similar lengths."""
    ordered = sorted(examples, key=lambda e: e.tokens)
    return (task.collate(ordered[i : i + MICRO_BATCH]) for i in range(0, len(ordered), MICRO_BATCH))
