"""The data of a run: read, encoded, split, and the settings that follow from it. No weight is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from qaroma.config.decisions import DataFacts, Decision
from qaroma.config.load import require_model_and_data
from qaroma.config.metrics import metrics_of
from qaroma.config.presets import BITS_A_TOKEN, resolve, validation_notes, warm_up_notes
from qaroma.config.resolved import ResolvedConfig
from qaroma.config.schema import Config
from qaroma.config.tasks import PREFERENCE
from qaroma.data.encode import Encoded, limit_length
from qaroma.data.glue import dev_file, glue_task, read_glue, read_train
from qaroma.data.labelled import Kind, LabelledSet, encode_labelled, split_labelled, takes_token_types
from qaroma.data.packing import pack
from qaroma.data.sources import RowSet, read_rows
from qaroma.data.split import split_validation
from qaroma.data.templates import Template
from qaroma.errors import QaromaError
from qaroma.model.base import load_tokenizer
from qaroma.model.found import FoundModel, find_model
from qaroma.model.positions import learnt_positions
from qaroma.model.skeleton import skeleton
from qaroma.plan.facts import conversation_facts, encoded_as_asked, model_facts
from qaroma.runs.adapter_info import TaskInfo
from qaroma.tasks.base import Task
from qaroma.tasks.causal_lm import CausalLM
from qaroma.tasks.labelled import labelled_task
from qaroma.tasks.preference import Preference

_NO_LIMIT = 2**31


@dataclass
class PreparedData:
    """The data as the model will see it, and what was decided from it.

    Attributes:
        config: of the run.
        base: what its model was found to be.
        decisions: what was decided, to print.
        notes: sentences to print: the form that was recognised, rows left out.
        tokenizer: of the base.
        task: what is trained.
        train, validation: encoded examples of that task.
        template: how conversations are rendered; None for tasks with labels.
        remember: what an adapter must know of the task to be used again.
    """

    config: ResolvedConfig
    base: FoundModel
    decisions: list[Decision]
    notes: list[str]
    tokenizer: PreTrainedTokenizerBase
    task: Task
    train: list[Any]
    validation: list[Any]
    template: Template | None = None
    remember: TaskInfo = field(default_factory=TaskInfo)


def prepare_data(config: Config) -> PreparedData:
    """Read, render and encode the data, and resolve the configuration by it.

    Raises:
        QaromaError: no model or data named; unreadable rows; nothing to train on.
    """
    name = require_model_and_data(config)
    base = find_model(name, revision=config.model.revision, trust_remote_code=config.model.trust_remote_code)
    prepare = _prepare_conversations if config.writes_text else _prepare_labelled
    data = prepare(config, base, load_tokenizer(base))
    data.notes += [*validation_notes(len(data.validation)), *warm_up_notes(data.config)]
    return data


def _prepare_conversations(config: Config, base: FoundModel, tokenizer: PreTrainedTokenizerBase) -> PreparedData:
    named = next((s.path for s in config.data.train if s.path.startswith("glue:")), None)
    if named is not None:
        task = glue_task(named)
        raise QaromaError(f"{named} has labels, not answers; type --task {task.kind if task else 'classification'}")
    if config.evaluation.metric is not None:
        raise QaromaError("evaluation.metric is for --task classification and regression; leave it out")
    if config.data.packing and config.task == PREFERENCE:
        raise QaromaError("data.packing joins answers in one row, which pairs cannot be; leave it out")
    template = Template.choose(tokenizer, config.data.template, config.data.tools)
    rows = read_rows([(s.path, s.weight) for s in config.data.train], seed=config.training.seed)
    encoded = encoded_as_asked(config, rows, base, tokenizer, template, max_length=config.data.max_length)
    validation = None
    beside = rows.validation if config.data.validation_share else []
    held_out_sources = beside if config.data.validation is None else [config.data.validation]
    if held_out_sources:
        rows = read_rows([(source, 1.0) for source in held_out_sources], seed=config.training.seed)
        validation = encoded_as_asked(
            config, rows, base, tokenizer, encoded.template, max_length=config.data.max_length
        )
    share = 0.0 if validation is not None else config.data.validation_share
    train, held_out = _split(config, encoded, share)
    facts = conversation_facts(
        config, base, lengths=encoded.lengths, train=train, validation_rows=len((validation or held_out).examples)
    )
    resolved, decisions = resolve(config, facts)
    notes = [f"data: {encoded.form}, {len(encoded.examples)} examples"]
    notes += dict.fromkeys([*encoded.notes, *(validation.notes if validation else [])])
    limit = (resolved.data.max_length, resolved.data.on_too_long)
    limited = limit_length(encoded, *limit)
    notes += _left_out(limited)
    train, held_out = _split(config, limited, share)
    if validation is not None:
        held_out = limit_length(validation, *limit)
    lengths = limited.lengths + (held_out.lengths if validation is not None else [])
    notes += _beyond_positions(config, base, base.longest_input or _NO_LIMIT, lengths)
    examples = train.examples
    if resolved.data.packing:
        examples = pack(examples, resolved.data.max_length)
        notes.append(f"{len(train.examples)} examples packed into {len(examples)} rows")
    return PreparedData(
        resolved,
        base,
        decisions,
        notes,
        tokenizer,
        _writing_task(resolved, tokenizer.pad_token_id or 0),
        examples,
        held_out.examples,
        encoded.template,
        TaskInfo(
            config.task,
            template=encoded.template.to_json(),
            beta=resolved.training.beta if config.task == PREFERENCE else None,
        ),
    )


def _writing_task(config: ResolvedConfig, pad_token_id: int) -> Task:
    if config.task == PREFERENCE:
        return Preference(config.training.beta, pad_token_id)
    return CausalLM(pad_token_id)


def _prepare_labelled(config: Config, base: FoundModel, tokenizer: PreTrainedTokenizerBase) -> PreparedData:
    kind = cast(Kind, config.task)
    if config.evaluation.prompts:
        raise QaromaError(f"evaluation.prompts is for --task causal-lm, a {kind} model writes no text; leave it out")
    train_rows, dev_rows = _labelled_rows(config)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # attention does not look at it
    options: dict[str, Any] = {
        "token_types": takes_token_types(base.config),
        "skip_bad": config.data.skip_bad_rows,
    }
    whole, train, held_out = _encode_labelled(config, kind, train_rows, dev_rows, tokenizer, None, **options)
    lengths = [*whole.lengths, *(held_out.lengths if dev_rows is not None else [])]
    longest = min(base.longest_input or _NO_LIMIT, tokenizer.model_max_length)
    facts = DataFacts(
        len(train.examples),
        lengths,
        longest,
        validation_rows=len(held_out.examples),
        trained_bits=len(train.examples) * (math.log2(len(whole.labels)) if whole.labels else BITS_A_TOKEN),
        model=model_facts(config, base),
    )
    resolved, decisions = resolve(config, facts)
    notes = [f"data: {kind} of {' and '.join(whole.fields)}, {len(whole.examples)} examples", *whole.notes]
    limit = resolved.data.max_length
    long = sum(length > limit for length in lengths)
    if long and config.data.on_too_long == "error":
        raise QaromaError(
            f"{long} texts are longer than {limit} tokens; type a greater --max-length, or --on-too-long truncate"
        )
    notes += _beyond_positions(config, base, longest, [min(length, limit) for length in lengths])
    if long:
        notes.append(f"{long} texts cut at data.max_length ({limit} tokens)")
        _, train, held_out = _encode_labelled(config, kind, train_rows, dev_rows, tokenizer, limit, **options)
    if whole.bad:
        notes.append(f"{len(whole.bad)} bad rows left out")
    task = _labelled_task(config, kind, whole.labels, tokenizer.pad_token_id or 0)
    remember = TaskInfo(kind, labels=tuple(whole.labels), metric=task.metric, max_length=limit)
    return PreparedData(
        resolved, base, decisions, notes, tokenizer, task, train.examples, held_out.examples, remember=remember
    )


def _beyond_positions(config: Config, base: FoundModel, longest: int, lengths: Sequence[int]) -> list[str]:
    """A sentence, where examples are longer than the model was made for.

    Raises:
        QaromaError: it has learnt its positions one by one.
    """
    if max(lengths, default=0) <= longest:
        return []
    network = skeleton(base.config, trust_remote_code=base.trust_remote_code, classifier=not config.writes_text)
    learnt = learnt_positions(network)
    beyond = sum(length > (learnt or longest) for length in lengths)
    if learnt is not None and beyond:
        raise QaromaError(
            f"{beyond} examples have more tokens than the {learnt} positions of '{base.name}'; type --max-length "
            f"{learnt}, and --on-too-long truncate to keep them"
        )
    return [f"{beyond} examples have more tokens than the {longest:,} that the model was made for"]


def _labelled_rows(config: Config) -> tuple[RowSet, RowSet | None]:
    """Training rows, and the dev rows that were named or lie beside them (GLUE by name or by folder)."""
    sources, validation = config.data.train, config.data.validation
    first = sources[0].path
    named = glue_task(first)
    if named is not None and named.kind != config.task:
        raise QaromaError(f"{first} is a {named.kind} task; type --task {named.kind}")
    if first.startswith("glue:"):
        train, dev = read_glue(first)
        return train, dev if validation is None else read_rows([(validation, 1.0)])
    if len(sources) == 1 and sources[0].weight == 1.0:
        validation = validation or dev_file(first)
        rows = read_train(first)
    else:
        rows = read_rows([(s.path, s.weight) for s in sources], seed=config.training.seed)
    held_out = rows.validation if validation is None else [validation]
    return rows, read_rows([(source, 1.0) for source in held_out]) if held_out else None


def _encode_labelled(
    config: Config,
    kind: Kind,
    train_rows: RowSet,
    dev_rows: RowSet | None,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    **options: Any,
) -> tuple[LabelledSet, LabelledSet, LabelledSet]:
    """All training rows, those that are trained on, and those to validate on."""
    whole = encode_labelled(train_rows, tokenizer, kind, max_length=max_length, **options)
    if dev_rows is not None:
        dev = encode_labelled(dev_rows, tokenizer, kind, labels=whole.labels, max_length=max_length, **options)
        return whole, whole, dev
    data = config.data
    train, held_out = split_labelled(
        whole, share=data.validation_share, at_most=data.validation_max, seed=config.training.seed
    )
    return whole, train, held_out


def _labelled_task(config: Config, kind: Kind, labels: Sequence[str], pad_token_id: int) -> Task:
    """The task, with the figure that chooses the best adapter: the one asked for, GLUE's, or the usual one."""
    known = glue_task(config.data.train[0].path)
    metric = config.evaluation.metric or (known.metric if known else metrics_of(kind)[0])
    return labelled_task(kind, labels, metric, pad_token_id)


def _split(config: Config, encoded: Encoded[Any], share: float) -> tuple[Encoded[Any], Encoded[Any]]:
    return split_validation(encoded, share=share, at_most=config.data.validation_max, seed=config.training.seed)


def _left_out(encoded: Encoded[Any]) -> list[str]:
    """Sentences about examples that are not trained on, or not whole."""
    counts = {
        "bad rows left out": len(encoded.bad),
        "examples left out, longer than data.max_length": encoded.dropped_too_long,
        "examples cut at data.max_length": encoded.truncated,
    }
    return [f"{count} {what}" for what, count in counts.items() if count]
