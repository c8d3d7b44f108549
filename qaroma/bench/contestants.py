"""Who is measured: qaroma's training step, and PEFT's on the same frozen weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from qaroma.data.encode import IGNORED, Example
from qaroma.engine.checkpointing import enable_checkpointing
from qaroma.engine.levels import apply_level
from qaroma.engine.placement import compute_device
from qaroma.errors import QaromaError
from qaroma.method.aroma import GrowthController
from qaroma.method.attach import attach
from qaroma.method.growth import GrowthSettings
from qaroma.model.bnb import bnb
from qaroma.model.norms import use_torchs_norms
from qaroma.plan.weightless_model import tensors_of, weightless_model
from qaroma.tasks.causal_lm import CausalLM

Step = Callable[[], None]


def random_base(config: Any, *, dtype: torch.dtype, device: torch.device) -> Any:
    """A 4-bit base of random weights: speed and memory do not depend on their values.

    Made layer by layer on the device, so that no dense copy of the model ever exists.

    Args:
        config: transformers' configuration of a causal language model.
        dtype: compute dtype.
        device: where.
    """
    model = weightless_model(config, dtype=dtype)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            dense = torch.empty(module.out_features, module.in_features, dtype=dtype, device=device).normal_(std=0.02)
            packed = bnb.nn.Params4bit(dense, requires_grad=False, quant_type="nf4", module=module)
            module.weight = packed.to(device)
            module.support_avx512bf16_for_cpu = False
    for module in list(model.modules()):
        if hasattr(module, "inv_freq"):  # computed from the configuration, not learnt
            with torch.device(device):
                module._buffers.update(type(module)(config.get_text_config())._buffers)
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.device.type == "meta":
                value = torch.ones if parameter.ndim == 1 else torch.randn
                filled = value(parameter.shape, dtype=dtype, device=device) * (1 if parameter.ndim == 1 else 0.02)
                setattr(module, name, nn.Parameter(filled, requires_grad=False))
    model.tie_weights()
    return model


def twin(model: Any) -> Any:
    """The same model a second time: other modules, the very same weights and quantisation constants."""
    shared = {id(tensor): tensor for tensor in tensors_of(model)}
    return copy.deepcopy(model, shared)


def examples(vocabulary: int, *, rows: int, length: int) -> list[Example]:
    """Random tokens of which every one is trained but the first: the most work for the loss."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (rows, length), generator=generator).tolist()
    return [Example(row, [IGNORED, *row[1:]]) for row in ids]


def growing(model: Any, *, frozen: int = 0) -> GrowthController:
    """Put qaroma's adapter on a base: growth with a check every 10 steps, none of which ends anything.

    Args:
        model: base.
        frozen: components that each module has already.
    """
    if compute_device(model).type == "cuda":  # as load_base does
        use_torchs_norms(model)
    adapter = attach(model, inner_rank=1, alpha=2.0)
    for layer in adapter.layers.values():
        if frozen:
            A = torch.randn(frozen, layer.in_features, dtype=layer.A.dtype) * 0.01
            B = torch.randn(frozen, layer.out_features, dtype=layer.B.dtype) * 0.01
            layer.load_factors(A, B, [1] * frozen)
    settings = GrowthSettings(t_in=10**9, eps_in=0.0, warmup=1, restart_warmup=1, max_update=1.0)
    return GrowthController(adapter, settings, learning_rate=1e-4, total_steps=1_000_000)


def step_of(model: Any, method: GrowthController, rows: list[Example]) -> Step:
    """A step on one micro-batch: forward, chunked loss, backward, update."""
    task = CausalLM()
    model.train()
    batch = task.collate(rows).to(next(iter(method.adapter.layers.values())).A.device)

    def step() -> None:
        loss, count = task.loss(model, batch)
        (loss / count).backward()  # type: ignore[no-untyped-call]
        method.step()

    return step


def qaroma_step(model: Any, rows: list[Example], *, level: int, frozen: int = 0) -> tuple[Step, GrowthController]:
    """qaroma's step at a memory level, and the method; see :func:`growing` and :func:`step_of`."""
    method = growing(model, frozen=frozen)
    apply_level(model, level)
    return step_of(model, method, rows), method


def peft_step(model: Any, rows: list[Example], *, checkpointing: bool = True) -> Step:
    """PEFT's QLoRA step as its users run it: adapters of rank 8 in fp32 on every linear layer under a Trainer's
    autocast, torch's AdamW, full logits.

    Raises:
        QaromaError: peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise QaromaError("--against peft needs peft; type: pip install 'qaroma[bench]'") from error
    device, dtype = compute_device(model), model.dtype
    if checkpointing:
        enable_checkpointing(model)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, config).train()
    optimiser = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.tensor([row.input_ids for row in rows], device=device)

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = wrapped(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step
