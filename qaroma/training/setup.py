"""From prepared data to a session: the base, the adapter on it, and the method that trains it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator

from qaroma.config.presets import growth_settings
from qaroma.config.schema import PEFT_METHODS, Config
from qaroma.engine.levels import LEVELS
from qaroma.errors import QaromaError
from qaroma.method.adapter import Adapter
from qaroma.method.aroma import GrowthController
from qaroma.method.base import Method
from qaroma.method.head import TrainedHead, head_names, is_inside
from qaroma.method.lora import PlainLora
from qaroma.method.peft_lora import AdaLora, PeftLora, PeftMethod, inject_adalora, inject_lora, require_peft
from qaroma.method.targets import find_targets
from qaroma.model.base import fingerprint, load_base, resolve_dtype
from qaroma.runs.directory import RunDirectory
from qaroma.runs.log import MetricsLog
from qaroma.runs.peft_lora import continue_from
from qaroma.tasks.causal_lm import require_known_head
from qaroma.tasks.labelled import outputs_of
from qaroma.training.batches import BatchPlan
from qaroma.training.memory import choose_level, enter_level
from qaroma.training.prepare import PreparedData
from qaroma.training.samples import Sampler
from qaroma.training.session import Session
from qaroma.training.trackers import require_trackers

_OF_PEFT: dict[str, type[PeftMethod]] = {"peft-lora": PeftLora, "adalora": AdaLora}


def build_session(data: PreparedData, run: RunDirectory) -> Session:
    """Load the base, attach the adapter, choose the method.

    Raises:
        QaromaError: a model that cannot be loaded or adapted, or a device that is not there.
    """
    config = data.config
    assert config.model.name is not None
    if config.method in PEFT_METHODS:
        require_peft(config.method)
    torch.manual_seed(config.training.seed)
    accelerator = _accelerator(config, run)
    level = choose_level(config, accelerator.device)
    model = _load(data, level, accelerator.device)
    identity = fingerprint(model)
    names = head_names(model, model.new_parameters) if data.template is None else []
    if names:
        model.config.pad_token_id = data.tokenizer.pad_token_id  # decoders look for the last token before it
    method, head = build_method(config, model, names)
    enter_level(model, level, config)
    require_known_head(model)
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
        remember=data.remember,
        task=data.task,
        method=method,
        head=head,
        train=data.train,
        validation=data.validation,
        plan=plan,
        accelerator=accelerator,
        sampler=_sampler(data),
        level=level,
    )


def _accelerator(config: Config, run: RunDirectory) -> Accelerator:
    """The device and the trackers.

    Raises:
        QaromaError: a device that is not there, or a tracker that is not installed.
    """
    require_trackers(config.training.track)
    accelerator = Accelerator(
        cpu=config.training.device == "cpu", log_with=list(config.training.track) or None, project_dir=run.path
    )
    if config.training.device == "cuda" and accelerator.device.type != "cuda":
        raise QaromaError(
            "device is cuda, but torch sees no CUDA device; type --device cpu, or install a CUDA build of torch"
        )
    return accelerator


def _load(data: PreparedData, level: int, device: torch.device) -> Any:
    """The base, as its task and its memory level want it."""
    model = data.config.model
    assert model.name is not None
    return load_base(
        model.name,
        quantization=model.quantization,
        double_quantization=model.double_quantization,
        quantize_head=LEVELS[level].packed_head,
        compute_dtype=resolve_dtype(model.compute_dtype, device),
        device=device,
        attention=model.attention,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        num_labels=outputs_of(data.remember),
        host_embeddings=LEVELS[level].host_embeddings,
    )


def _sampler(data: PreparedData) -> Sampler | None:
    chosen = data.config.evaluation
    if not chosen.prompts:
        return None
    assert data.template is not None
    return Sampler(chosen.prompts, data.tokenizer, data.template, chosen.max_new_tokens)


def build_method(config: Config, model: Any, head: Sequence[str] = ()) -> tuple[Method, TrainedHead | None]:
    """Attach the adapter and make the method that trains it, and the head where one is trained.

    Args:
        config: resolved.
        model: the base; changed in place.
        head: modules to train in full.
    """
    growth, training = config.growth, config.training
    common: dict[str, Any] = {
        "learning_rate": training.learning_rate,
        "total_steps": training.max_steps,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "head_learning_rate": training.head_learning_rate,
    }
    fixed: dict[str, Any] = {"warmup": growth.warmup or 0, "min_lr_ratio": growth.min_lr_ratio or 0.0}
    targets = [n for n in find_targets(model, growth.target_modules or "all-linear") if not is_inside(n, head)]
    carrier = (_inject if config.method in PEFT_METHODS else _attach)(config, model, targets)
    trained = TrainedHead(model, head) if head else None  # attaching froze it
    common["head"] = trained.parameters() if trained else ()
    if config.method in PEFT_METHODS:
        return _OF_PEFT[config.method](carrier, **fixed, **common), trained
    if config.method == "lora":
        return PlainLora(carrier, **fixed, **common), trained
    return GrowthController(carrier, growth_settings(growth, config.method), **common), trained


def _attach(config: Config, model: Any, targets: Sequence[str]) -> Adapter:
    """Our own adapter, with what another one brings where the run goes on from it."""
    options: dict[str, Any] = {
        "alpha": config.growth.alpha,
        "dropout": config.growth.dropout,
        "seed": config.training.seed,
    }
    adapter = Adapter(model, targets, inner_rank=config.component_rank, **options)
    if config.model.adapter is not None:
        continue_from(adapter, config.model.adapter)
    return adapter


def _inject(config: Config, model: Any, targets: Sequence[str]) -> Any:
    """PEFT's adapter for the methods that are PEFT's."""
    options: dict[str, Any] = {
        "rank": config.rank,
        "alpha": config.growth.alpha,
        "dropout": config.growth.dropout or 0.0,
        "seed": config.training.seed,
    }
    if config.method == "adalora":
        return inject_adalora(model, targets, total_steps=config.training.max_steps or 1, **options)
    return inject_lora(model, targets, **options)
