"""From a configuration to a session: data first, so that bad data fails before any weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from qaroma.config import Config
from qaroma.data.encode import Encoded, Example, encode_rows, limit_length, split_validation
from qaroma.data.packing import pack
from qaroma.data.sources import read_rows
from qaroma.data.templates import Template
from qaroma.engine.levels import LEVELS
from qaroma.errors import QaromaError
from qaroma.export.foreign import continue_from
from qaroma.method.aroma import GrowthController
from qaroma.method.base import Method
from qaroma.method.lora import PlainLora
from qaroma.model.attach import attach
from qaroma.model.base import fingerprint, load_base, load_config, load_tokenizer, resolve_dtype
from qaroma.presets import DataFacts, Decision, growth_settings, resolve
from qaroma.runs import MetricsLog, RunDirectory
from qaroma.tasks.causal_lm import CausalLM
from qaroma.training.batches import BatchPlan
from qaroma.training.memory import choose_level, enter_level
from qaroma.training.session import Session


@dataclass
class PreparedData:
    """The data as the model will see it, and what was decided from it.

    ``notes`` are sentences to print: the form that was recognised, rows left out.
    """

    config: Config
    decisions: list[Decision]
    notes: list[str]
    tokenizer: PreTrainedTokenizerBase
    template: Template
    train: list[Example]
    validation: list[Example]


def prepare_data(config: Config) -> PreparedData:
    """Read, render and encode the data, and resolve the configuration by it.

    Raises:
        QaromaError: no model or data named; unreadable rows; no trained token at all.
    """
    if config.model.name is None:
        raise QaromaError("no base model given; type --model FOLDER_OR_HUB_ID (for a first try: --model smollm2-135m)")
    if not config.data.train:
        raise QaromaError("no training data given; type --data FILE (.jsonl, .json, .csv, .parquet or .txt)")
    options: dict[str, Any] = {"revision": config.model.revision, "trust_remote_code": config.model.trust_remote_code}
    tokenizer = load_tokenizer(config.model.name, **options)
    template = Template.choose(tokenizer, config.data.template)
    encoded = _encode(config, [(s.path, s.weight) for s in config.data.train], tokenizer, template)
    validation = None
    if config.data.validation is not None:
        validation = _encode(config, [(config.data.validation, 1.0)], tokenizer, encoded.template)
    longest = getattr(load_config(config.model.name, **options), "max_position_embeddings", None)
    share = 0.0 if validation is not None else config.data.validation_share
    train, held_out = _split(config, encoded, share)
    facts = DataFacts(len(train.examples), encoded.lengths, longest, len((validation or held_out).examples))
    resolved, decisions = resolve(config, facts)
    notes = [f"data: {encoded.form}, {len(encoded.examples)} examples", *encoded.notes]
    limit = (resolved.data.max_length, resolved.data.on_too_long)
    limited = limit_length(encoded, *limit)
    notes += _left_out(limited)
    train, held_out = _split(config, limited, share)
    if validation is not None:
        held_out = limit_length(validation, *limit)
    examples = train.examples
    if resolved.data.packing:
        examples = pack(examples, resolved.data.max_length or max(train.lengths))
        notes.append(f"{len(train.examples)} examples packed into {len(examples)} rows")
    notes.append(f"{len(train.examples)} examples to train on, {len(held_out.examples)} to validate on")
    return PreparedData(resolved, decisions, notes, tokenizer, encoded.template, examples, held_out.examples)


def _split(config: Config, encoded: Encoded, share: float) -> tuple[Encoded, Encoded]:
    return split_validation(encoded, share=share, at_most=config.data.validation_max, seed=config.training.seed)


def _left_out(encoded: Encoded) -> list[str]:
    """Sentences about examples that are not trained on, or not whole."""
    counts = {
        "bad rows left out": len(encoded.bad),
        "examples left out, longer than data.max_length": encoded.dropped_too_long,
        "examples cut at data.max_length": encoded.truncated,
    }
    return [f"{count} {what}" for what, count in counts.items() if count]


def _encode(
    config: Config, sources: list[tuple[str, float]], tokenizer: PreTrainedTokenizerBase, template: Template
) -> Encoded:
    data = config.data
    return encode_rows(
        read_rows(sources, seed=config.training.seed),
        tokenizer,
        template,
        form=data.format,
        train_on=data.train_on,
        max_length=data.max_length,
        on_too_long=data.on_too_long,
        skip_bad=data.skip_bad_rows,
    )


def build_session(data: PreparedData, run: RunDirectory) -> Session:
    """Load the base, attach the adapter, choose the method.

    Raises:
        QaromaError: a model that cannot be loaded or adapted, or a device that is not there.
    """
    config = data.config
    assert config.model.name is not None
    torch.manual_seed(config.training.seed)
    accelerator = Accelerator(cpu=config.training.device == "cpu")
    if config.training.device == "cuda" and accelerator.device.type != "cuda":
        raise QaromaError(
            "device is cuda, but torch sees no CUDA device; type --device cpu, or install a CUDA build of torch"
        )
    level = choose_level(config, accelerator.device)
    model = load_base(
        config.model.name,
        quantization=config.model.quantization,
        double_quantization=config.model.double_quantization,
        quantize_head=LEVELS[level].packed_head,
        compute_dtype=resolve_dtype(config.model.compute_dtype, accelerator.device),
        device=accelerator.device,
        attention=config.model.attention,
        revision=config.model.revision,
        trust_remote_code=config.model.trust_remote_code,
    )
    identity = fingerprint(model)
    method = build_method(config, model)
    enter_level(model, level, config)
    training = config.training
    plan = BatchPlan(
        [len(e.input_ids) for e in data.train],
        micro_batch=training.micro_batch,
        grad_accum=training.grad_accum,
        seed=training.seed,
    )
    return Session(
        config=config,
        run=run,
        log=MetricsLog(run.metrics),
        model=model,
        base_name=config.model.name,
        fingerprint=identity,
        template=data.template.to_json(),
        task=CausalLM(data.tokenizer.pad_token_id or 0),
        method=method,
        train=data.train,
        validation=data.validation,
        plan=plan,
        accelerator=accelerator,
        level=level,
    )


def build_method(config: Config, model: nn.Module) -> Method:
    """Attach the adapter and make the method that trains it."""
    growth, training = config.growth, config.training
    rank = config.rank if config.method == "lora" else growth.inner_rank
    options: dict[str, Any] = {"alpha": growth.alpha, "dropout": growth.dropout, "seed": training.seed}
    adapter = attach(model, growth.target_modules or "all-linear", inner_rank=rank or 1, **options)
    if config.model.adapter is not None:
        continue_from(adapter, config.model.adapter)
    common: dict[str, Any] = {
        "learning_rate": training.learning_rate,
        "total_steps": training.max_steps,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
    }
    if config.method == "lora":
        return PlainLora(adapter, warmup=growth.warmup or 0, min_lr_ratio=growth.min_lr_ratio or 0.0, **common)
    return GrowthController(adapter, growth_settings(growth), **common)
