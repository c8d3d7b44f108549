"""What scenarios are made of: small models without weights on the phantom card, batches, steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import transformers
from conftest import tiny_config
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from phantom.card import CARD, Card, place, real_zeros
from qaroma.config.levels import LEVELS
from qaroma.data.encode import Example
from qaroma.engine.levels import apply_level
from qaroma.method.aroma import GrowthController
from qaroma.method.attach import attach
from qaroma.method.base import MethodState
from qaroma.method.factors import Factors
from qaroma.method.growth import GrowthEvent, GrowthSettings
from qaroma.model.bnb import bnb
from qaroma.model.norms import use_torchs_norms
from qaroma.plan.weightless_model import materialise, weightless_model
from qaroma.runs import checkpoint, peft_lora
from qaroma.tasks.causal_lm import CausalLM, TokenBatch
from qaroma.training import finetune, fit
from qaroma.training.batches import BatchPlan
from qaroma.training.loss_scale import LossScale
from qaroma.training.ranks import Ranks

CONFIG = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "tie_word_embeddings": False}


def for_real(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the host that needs values, in the middle of fake tensors."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return run


def base(level: int = 1, dtype: torch.dtype = torch.bfloat16, **sizes: Any) -> Any:
    """A frozen base in NF4, as it is loaded for a level."""
    build = for_real(weightless_model)
    model = build(tiny_config(**{**CONFIG, **sizes}), dtype=dtype, packed_head=LEVELS[level].packed_head)
    with CARD:
        materialise(model)
    use_torchs_norms(model)
    return model


def growing(model: Any, targets: Any = "all-linear", steps: int = 100, **settings: Any) -> GrowthController:
    """AROMA by two loops on a base."""
    growth = GrowthSettings(**{"t_in": 1000, **settings})
    return GrowthController(attach(model, targets), growth, learning_rate=1e-3, total_steps=steps)


def trained(level: int, *, targets: Any = "all-linear", sizes: Any = None, **settings: Any) -> tuple[Any, Any]:
    """A base at a level with AROMA on it."""
    model = base(level, **(sizes or {}))
    method = growing(model, targets, **settings)
    apply_level(model, level)
    return model.train(), method


@for_real
def batch(rows: int = 2, length: int = 64, lengths: tuple[int, ...] = ()) -> TokenBatch:
    """A micro-batch on the host; ``lengths`` of the examples that are packed into each row."""
    example = Example([3] * length, [-100] + [3] * (length - 1), lengths=lengths)
    return CausalLM().collate([example] * rows)


def gradients(
    model: Any, method: Any, batches: Sequence[Any], task: Any = None, loss_scale: LossScale | None = None
) -> float:
    """The gradients of a step, as the loop makes them; returns the loss."""
    accelerator = SimpleNamespace(device=CARD, backward=lambda loss: loss.backward())
    session: Any = SimpleNamespace(
        task=task or CausalLM(),
        model=model,
        method=method,
        accelerator=accelerator,
        loss_scale=loss_scale,
        ranks=Ranks(),
        plan=BatchPlan([], micro_batch=1, grad_accum=1, seed=0),
    )
    return fit.accumulate(session, batches)[0]["loss"]


def step(model: Any, method: Any, batches: Sequence[Any], task: Any = None) -> list[GrowthEvent]:
    """One step of the loop: gradients, the look at them, the update, growth."""
    return method.step(gradients(model, method, batches, task))


def on_host(method: Any) -> dict[str, Factors]:
    """A method's factors as an adapter's folder gives them back."""
    return {name: Factors(A.cpu(), B.cpu()) for name, (A, B) in method.factors().items()}


def as_saved(state: MethodState) -> MethodState:
    """A state as a checkpoint gives it back: on the host, and real."""
    real = {name: real_zeros(t.shape, t.dtype) for name, t in state.tensors.items() if name != "generator"}
    return MethodState({**real, "generator": state.tensors["generator"]}, state.values)


# Where transformers asks whether an answer has ended.
_END_CHECKS = ("_sample", "__call__", "_has_unfinished_sequences")


def answers(card: Card, tokens: int) -> None:
    """Let generation end after so many tokens; all numbers are finite, and nothing else is true."""
    asked = 0

    def scalar(dtype: torch.dtype) -> Any:
        nonlocal asked
        if dtype is not torch.bool:
            return 1
        asker = place()
        ends = asker.endswith(tuple(f"utils.{name})" for name in _END_CHECKS))
        asked += ends
        return asked >= tokens if ends else asker.startswith(("checkpoint.", "linear.", "peft_lora."))

    card.scalar = scalar


class _Unpacked:
    """Dense values that become 4-bit ones as they reach a device, as bitsandbytes' parameter does."""

    def __init__(self, data: Tensor, quant_type: str, compress_statistics: bool) -> None:
        self.data, self.quant_type, self.compress_statistics = data, quant_type, compress_statistics

    def to(self, device: torch.device) -> nn.Parameter:
        packed, state = bnb.functional.quantize_4bit(
            self.data.to(device), quant_type=self.quant_type, compress_statistics=self.compress_statistics
        )
        parameter: Any = nn.Parameter(packed, False)
        parameter.quant_state, parameter.bnb_quantized = state, True
        return parameter


class Params4bit(nn.Parameter):
    """In the place of bitsandbytes' parameter, a subclass of tensor that cannot hold a fake one."""

    def __new__(
        cls, data: Any = None, requires_grad: bool = False, quant_type: str = "nf4", compress_statistics: bool = True,
        **_: Any,
    ) -> Any:  # fmt: skip
        if data is None or data.device.type != "meta":
            return _Unpacked(data, quant_type, compress_statistics)
        parameter: Any = nn.Parameter(data, False)
        parameter.quant_type, parameter.quant_state = quant_type, None
        return parameter


def _saved(tensors: dict[str, Tensor], path: Any, *args: Any, **kwargs: Any) -> None:
    from safetensors.torch import save_file

    with _disable_current_modes():
        real = {name: real_zeros(t.shape, t.dtype) for name, t in tensors.items()}
        for name in real:
            if name.endswith(".generator"):
                real[name] = torch.Generator().get_state()
        save_file(real, path, *args, **kwargs)


@contextmanager
def whole_program(card: Card) -> Iterator[None]:
    """What else a run from the command to the adapter needs: files that hold zeros, and rows that are real."""
    load_file = for_real(checkpoint.load_file)

    def piece(stored: Any, device: Any = None, dtype: Any = None) -> Tensor:
        with _disable_current_modes():
            values = stored[...]
        return card.mode.from_tensor(values).to(device=device, dtype=dtype)

    with ExitStack() as stack:
        for target, name, stand_in in (
            (bnb.nn, "Params4bit", Params4bit),
            (bnb.nn.modules, "Params4bit", Params4bit),
            (transformers.integrations, "validate_bnb_backend_availability", lambda **_: None),
            (transformers.core_model_loading, "_materialize_copy", piece),
            (checkpoint, "save_file", _saved),
            (checkpoint, "load_file", load_file),
            (peft_lora, "save_file", _saved),
            (peft_lora, "_read_tensors", for_real(peft_lora._read_tensors)),
            (finetune, "prepare_data", for_real(finetune.prepare_data)),
            (BatchPlan, "_plan_epoch", for_real(BatchPlan._plan_epoch)),
            (CausalLM, "collate", for_real(CausalLM.collate)),
        ):
            stack.enter_context(mock.patch.object(target, name, stand_in))
        yield
    for copied in [copy for copy in card.pageable if "hostmemory." in copy]:
        del card.pageable[copied]  # while a model is loaded nothing runs that a wait would hold up
