"""The training loop: steps, growth, validation, checkpoints, and every way a run can end."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NoReturn

import torch

from qaroma.checkpoint import Checkpoint, save_checkpoint
from qaroma.errors import QaromaError
from qaroma.evaluate import evaluate_loss
from qaroma.export.peft import save_adapter
from qaroma.method.base import MethodState
from qaroma.method.growth import GrowthEvent
from qaroma.model.builtin import portable_name
from qaroma.tasks.base import Batch
from qaroma.training.interrupt import StopRequest
from qaroma.training.memory import memory_bytes, relieve
from qaroma.training.progress import ProgressView
from qaroma.training.session import Session

Ending = Literal["grown", "budget", "patience", "interrupted"]


@dataclass
class FitState:
    """Where a run stands; with the method's state and the random states, all that a checkpoint holds."""

    step: int = 0
    best_loss: float | None = None
    best_step: int = 0
    without_gain: int = 0  # validations since the best
    trainable_start: int = 0
    trainable_sum: int = 0  # over steps: its mean is trainable_sum / step
    seconds: float = 0.0


def fit(session: Session, state: FitState, view: ProgressView, stop: StopRequest) -> Ending:
    """Train until every module is done, the step budget is spent, patience ends, or the user stops it.

    Args:
        session: everything built; its method may already have been restored.
        state: changed in place as the run goes.
        view: shown every step.
        stop: set when the user asks to stop; looked at between steps.

    Returns:
        How the run ended. Growth is finished (``method.finish``) unless it was interrupted.

    Raises:
        QaromaError: a loss that is not finite; the state before that step is saved.
    """
    training, method = session.config.training, session.method
    assert training.max_steps is not None
    assert training.evaluate_every is not None
    assert session.config.checkpoint.every is not None
    if state.step == 0:
        state.trainable_start = method.adapter.trainable_parameters()
        _validate(session, state, view)
    ending: Ending = "budget"
    session.model.train()
    while state.step < training.max_steps and not method.finished:
        record = _train_step(session, state, view)
        events = method.step()
        _record_step(session, state, record, events, view)
        last = state.step == training.max_steps or method.finished
        if state.step % training.evaluate_every == 0 or last:
            _validate(session, state, view)
            if training.patience is not None and state.without_gain >= training.patience:
                ending = "patience"
        if state.step % session.config.checkpoint.every == 0 or last or stop.requested or ending == "patience":
            save_state(session, state)
        if stop.requested and not last:
            return "interrupted"
        if ending == "patience":
            break
    ending = "grown" if method.finished else ending
    _log_new(session, method.finish())
    return ending


def _train_step(session: Session, state: FitState, view: ProgressView) -> dict[str, Any]:
    """Forward and backward passes of one step; gradients are left for the method."""
    start = time.perf_counter()
    while True:
        micro_batches = session.plan.step(state.step)
        batches = [session.task.collate([session.train[i] for i in indices]) for indices in micro_batches]
        try:
            loss = accumulate(session, batches)
            break
        except torch.OutOfMemoryError:
            # Outside the except clause the failed step's tensors are gone, and can be given back.
            pass
        session.method.adapter.model.zero_grad(set_to_none=False)
        view.console.print(f"step {state.step + 1}: out of memory; {relieve(session)}", style="yellow")
    if not math.isfinite(loss):
        _stop_on_bad_loss(session, state, loss, [i for indices in micro_batches for i in indices])
    return {"loss": loss, "tokens": sum(b.tokens for b in batches), "start": start}


def _stop_on_bad_loss(session: Session, state: FitState, loss: float, examples: list[int]) -> NoReturn:
    """Save the state before the step and say which rows it had."""
    session.method.adapter.model.zero_grad(set_to_none=False)
    path = save_state(session, state)
    where = ", ".join(session.train[i].origin for i in examples[:8])
    rate = session.config.training.learning_rate or 0.0
    raise QaromaError(
        f"the loss of step {state.step + 1} is {loss} (examples {where}, ...). "
        f"The state before it is saved in {path}; look at these rows, or go on with a smaller rate: "
        f"qaroma finetune --resume --output {session.run.path} --learning-rate {rate / 2:.1e}"
    )


def accumulate(session: Session, batches: Sequence[Batch]) -> float:
    """Gradients of the mean loss over all trained tokens of these micro-batches, however they are cut.

    Returns:
        That mean loss; one synchronisation with the device.
    """
    count = sum(batch.counted for batch in batches)
    total = torch.zeros((), device=session.accelerator.device)
    for batch in batches:
        loss_sum, _ = session.task.loss(session.model, batch.to(session.accelerator.device))
        session.accelerator.backward(loss_sum / count)
        total += loss_sum.detach()
    return total.item() / count


def _record_step(
    session: Session, state: FitState, record: dict[str, Any], events: Sequence[GrowthEvent], view: ProgressView
) -> None:
    """Count the step, log it with its growth events, show it."""
    adapter = session.method.adapter
    seconds = time.perf_counter() - record["start"]
    state.step += 1
    state.seconds += seconds
    trainable = adapter.trainable_parameters()
    state.trainable_sum += trainable
    ranks = adapter.ranks().values()
    line = {
        "step": state.step,
        "loss": record["loss"],
        "learning_rate": session.method.learning_rate,
        "mean_rank": sum(ranks) / len(ranks),
        "active_modules": sum(1 for _ in adapter.active_layers()),
        "trainable_parameters": trainable,
        "tokens_per_second": record["tokens"] / seconds,
        "memory_bytes": memory_bytes(session.accelerator.device),
    }
    session.log.write(line)
    for event in events:
        session.log.write(event.to_json())
    view.step(line, events)


def _log_new(session: Session, events: Sequence[GrowthEvent]) -> None:
    """Log events unless a run that was killed right after them has logged them before."""
    known = session.log.records()[-len(events) :] if events else []
    for event in events:
        if event.to_json() not in known:
            session.log.write(event.to_json())


def _validate(session: Session, state: FitState, view: ProgressView) -> None:
    """Loss on the validation rows; keeps the adapter where it is the best so far."""
    if not session.validation:
        return
    figures = validation_metrics(session)
    session.log.write({"event": "validation", "step": state.step, **figures})
    gained = state.step > 0 and (state.best_loss is None or figures["loss"] < state.best_loss)
    view.validation(state.step, figures["loss"], best=gained)
    if gained:
        state.best_loss, state.best_step, state.without_gain = figures["loss"], state.step, 0
        about = session.describe(state.step)
        save_adapter(session.method.adapter, session.run.adapter, base=portable_name(session.base_name), growth=about)
    elif state.step > 0:
        state.without_gain += 1


def validation_metrics(session: Session) -> dict[str, Any]:
    """The task's metrics over the whole validation set, without gradient and in eval mode."""
    device = session.accelerator.device
    loss = evaluate_loss(
        lambda batch: session.task.loss(session.model, batch.to(device)), session.validation_batches(), session.model
    )
    return dict(session.task.metrics(loss.sum, loss.count))


def save_state(session: Session, state: FitState) -> str:
    """Write a checkpoint of this moment; returns its path."""
    method = session.method.state()
    tensors = {f"method.{name}": tensor for name, tensor in method.tensors.items()}
    tensors["random.cpu"] = torch.get_rng_state()
    if session.accelerator.device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    values = {"fit": asdict(state), "method": {"name": session.method.name, **method.values}}
    checkpoint = Checkpoint(state.step, tensors, values)
    keep = session.config.checkpoint.keep
    return str(save_checkpoint(session.run.checkpoints, checkpoint, fingerprint=session.fingerprint, keep=keep))


def restore_state(session: Session, checkpoint: Checkpoint) -> FitState:
    """Put a checkpoint's state into the session's method and the random generators."""
    prefix = "method."
    tensors = {k.removeprefix(prefix): t for k, t in checkpoint.tensors.items() if k.startswith(prefix)}
    session.method.load_state(MethodState(tensors, checkpoint.values["method"]))
    torch.set_rng_state(checkpoint.tensors["random.cpu"])
    if "random.cuda" in checkpoint.tensors and session.accelerator.device.type == "cuda":
        torch.cuda.set_rng_state(checkpoint.tensors["random.cuda"])
    return FitState(**checkpoint.values["fit"])
