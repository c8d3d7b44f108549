"""From prepared data to a session: the base, the adapter on it, and the method that trains it."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from qaroma.config.growth_settings import growth_settings
from qaroma.config.levels import LEVELS
from qaroma.config.methods import METHODS
from qaroma.config.resolved import ResolvedConfig
from qaroma.config.tasks import PREFERENCE
from qaroma.errors import QaromaError
from qaroma.method.base import Method, MethodOptions
from qaroma.method.head import TrainedHead, head_names, is_inside
from qaroma.method.on_adapter import AdapterMethod
from qaroma.method.targets import find_targets, unadaptable
from qaroma.model.base import fingerprint, load_base
from qaroma.model.precision import dtype_note, resolve_dtype
from qaroma.runs.adapter import continue_from
from qaroma.runs.directory import RunDirectory
from qaroma.runs.log import MetricsLog
from qaroma.runs.peft_limits import told_of_peft
from qaroma.tasks.causal_lm import require_apart, require_known_head
from qaroma.training.arithmetic import settle_arithmetic
from qaroma.training.batches import BatchPlan
from qaroma.training.loss_scale import LossScale
from qaroma.training.memory import choose_level, enter_level, forbid_spilling
from qaroma.training.prepare import PreparedData
from qaroma.training.ranks import Ranks
from qaroma.training.samples import Sampler
from qaroma.training.session import Session
from qaroma.training.trackers import require_trackers

logger = logging.getLogger(__name__)


def build_session(
    data: PreparedData, run: RunDirectory, level: int | None = None, ranks: Ranks | None = None
) -> Session:
    """Load the base, attach the adapter, choose the method.

    Args:
        data, run: of the session.
        level: memory level; None chooses it.
        ranks: that train together; None is this process alone.

    Raises:
        QaromaError: a model that cannot be loaded or adapted, or a device that is not there.
    """
    config, ranks = data.config, ranks or Ranks()
    METHODS[config.method].require()
    torch.manual_seed(config.training.seed)
    accelerator = _accelerator(config, run)
    forbid_spilling(accelerator.device)
    level = choose_level(config, data.base, accelerator.device) if level is None else level
    dtype = resolve_dtype(config.model.compute_dtype, accelerator.device, data.base.config)
    settle_arithmetic(dtype, deterministic=config.training.deterministic)
    model = _load(data, level, dtype, accelerator.device)
    identity = fingerprint(model)
    names = head_names(model, model.new_parameters) if data.template is None else []
    if names:
        model.config.pad_token_id = data.tokenizer.pad_token_id  # decoders look for the last token before it
    note = dtype_note(config.model.compute_dtype, accelerator.device, data.base.config)
    notes = [*([note] if note else []), *unadaptable(model)]
    told = told_of_peft(model.config, find_targets(model, config.growth.target_modules))
    if told is not None:
        logger.warning(told)
    enter_level(model, level, config)  # before the adapter, which goes where the weights are
    method, head = build_method(config, model, names)
    require_known_head(model)
    if config.data.packing:
        require_apart(model)
    return Session(
        config=config,
        run=run,
        log=MetricsLog(run.metrics if ranks.is_first else Path(os.devnull)),
        model=model,
        base_name=config.model.name,
        fingerprint=identity,
        remember=replace(data.remember, start=_start(method)) if config.task == PREFERENCE else data.remember,
        task=data.task,
        method=method,
        head=head,
        train=data.train,
        validation=data.validation,
        plan=_plan(data),
        accelerator=accelerator,
        sampler=_sampler(data),
        level=level,
        notes=notes,
        loss_scale=LossScale() if dtype == torch.float16 else None,
        ranks=ranks,
    )


def _plan(data: PreparedData) -> BatchPlan:
    training, lengths = data.config.training, [example.tokens for example in data.train]
    return BatchPlan(lengths, micro_batch=training.micro_batch, grad_accum=training.grad_accum, seed=training.seed)


def _start(method: Method) -> dict[str, int]:
    """How many ranks of each module a method that has not begun goes on from; empty where it begins with nothing."""
    if not isinstance(method, AdapterMethod):
        return {}
    frozen = {name: len(layer.frozen_factors()[0]) for name, layer in method.adapter.layers.items()}
    return {name: rank for name, rank in frozen.items() if rank}


def _accelerator(config: ResolvedConfig, run: RunDirectory) -> Accelerator:
    """The device and the trackers.

    Raises:
        QaromaError: a device that is not there, or a tracker that is not installed.
    """
    require_trackers(config.training.track)
    accelerator = Accelerator(
        cpu=config.training.device == "cpu",
        mixed_precision="no",  # whatever its launcher was set up for: the base has a dtype of its own
        log_with=list(config.training.track) or None,
        project_dir=run.path,
    )
    if config.training.device == "cuda" and accelerator.device.type != "cuda":
        raise QaromaError(
            "device is cuda, but torch sees no CUDA device; type --device cpu, or install a CUDA build of torch"
        )
    return accelerator


def _load(data: PreparedData, level: int, dtype: torch.dtype, device: torch.device) -> Any:
    """The base, as its task and its memory level want it."""
    model = data.config.model
    return load_base(
        data.base,
        quantization=model.quantization,
        double_quantization=model.double_quantization,
        quantize_head=LEVELS[level].packed_head,
        compute_dtype=dtype,
        device=device,
        attention=model.attention,
        num_labels=data.remember.outputs,
        host_embeddings=LEVELS[level].host_embeddings,
        host_layers=LEVELS[level].streamed,
    )


def _sampler(data: PreparedData) -> Sampler | None:
    chosen = data.config.evaluation
    if not chosen.prompts or data.template is None:
        return None
    return Sampler(chosen.prompts, data.tokenizer, data.template, chosen.max_new_tokens)


def build_method(config: ResolvedConfig, model: Any, head: Sequence[str] = ()) -> tuple[Method, TrainedHead | None]:
    """Attach the adapter and make the method that trains it, and the head where one is trained.

    Args:
        config: resolved.
        model: the base; changed in place.
        head: modules to train in full.
    """
    kind: type[Method] = METHODS[config.method].load()
    options = _method_options(config)
    targets = find_targets(model, config.growth.target_modules)
    attached = kind.attach(model, [name for name in targets if not is_inside(name, head)], options)
    if config.model.adapter is not None:
        continue_from(attached, config.model.adapter)
    trained = TrainedHead(model, head) if head else None  # attaching froze it
    return kind.build(attached, options, trained.parameters() if trained else ()), trained


def _method_options(config: ResolvedConfig) -> MethodOptions:
    """What the method is asked for, as plain values."""
    growth, training = config.growth, config.training
    return MethodOptions(
        rank=config.component_rank,
        alpha=growth.alpha,
        dropout=growth.dropout,
        seed=training.seed,
        learning_rate=training.learning_rate,
        head_learning_rate=training.head_learning_rate,
        total_steps=training.max_steps,
        warmup=growth.warmup,
        min_lr_ratio=growth.min_lr_ratio,
        optimizer=training.optimizer,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        growth=growth_settings(growth),
    )
