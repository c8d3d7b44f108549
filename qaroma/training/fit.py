"""The training loop: steps, growth, validation, checkpoints, and every way a run can end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch

from qaroma.method.growth import GrowthEvent
from qaroma.runs.checkpoint import keep_newest
from qaroma.runs.stop import StopRequest
from qaroma.tasks.base import Batch
from qaroma.training.live_page import LivePage
from qaroma.training.loss_scale import LossScale
from qaroma.training.memory import memory_figures, runs_out_of_memory, with_relief
from qaroma.training.progress import ProgressView
from qaroma.training.ranks import StepSum
from qaroma.training.saving import FitState, left_behind, require_same_state, save_state, stop_run
from qaroma.training.session import Session
from qaroma.training.trackers import track

Placed = tuple[int, Batch]  # a micro-batch, and which one of its step it is
Ending = Literal["grown", "learnt", "budget", "patience", "interrupted"]


def fit(session: Session, state: FitState, view: ProgressView, page: LivePage, stop: StopRequest) -> Ending:
    """Train until every module is done, the step budget is spent, patience ends, or the user stops it.

    Args:
        session: everything built; its method may already have been restored.
        state: changed in place as the run goes.
        view: shown every step.
        page: written anew at every validation and sample.
        stop: set when the user asks to stop; looked at between steps.

    Returns:
        How the run ended. Growth is finished (``method.finish``) unless it was interrupted.

    Raises:
        QaromaError: a loss, a gradient or a state that is not finite; it is neither stepped with nor saved.
    """
    training, method = session.config.training, session.method
    ranks = method.ranks()
    if state.step == 0:
        _look_at_the_start(session, state, view, page)
    ending: Ending = "budget"
    saved = False
    session.model.train()
    while state.step < training.max_steps and not method.finished:
        with left_behind(session, state):
            if session.ranks.any(stop.requested):
                if not saved:
                    save_state(session, state)
                return "interrupted"
            record = _train_step(session, state, view)
        if saved:  # that checkpoint has gone on well, so that older ones are not needed to go back to
            _forget_older(session)
        events = method.step(record["figures"]["loss"])
        if events:
            require_same_state(session, state.step + 1)
        _record_step(session, state, record, events, view)
        ranks = _log_ranks(session, state, ranks)
        _probe(session, state, view)
        last = state.step == training.max_steps or method.finished
        validated = state.step % training.evaluate_every == 0 or last
        if validated:
            _validate(session, state, view)
            if training.patience and state.without_gain >= training.patience:
                ending = "patience"
        every = session.config.evaluation.sample_every
        sampled = last or (validated if every is None else state.step % every == 0)
        if sampled:
            _sample(session, state, view)
        if validated or (sampled and session.sampler):
            page.update()
        saved = state.step % session.config.checkpoint.every == 0 or last or ending == "patience"
        if saved:
            save_state(session, state)
        if ending == "patience":
            break
    if method.finished:
        ending = method.ending
    session.log.write_new([event.to_json() for event in method.finish()])
    _log_ranks(session, state, ranks)
    _forget_older(session)
    return ending


def _look_at_the_start(session: Session, state: FitState, view: ProgressView, page: LivePage) -> None:
    state.trainable_start = session.method.trainable_parameters()
    _log_ranks(session, state, {})
    _validate(session, state, view)
    _sample(session, state, view)
    page.update()
    _probe(session, state, view)


def _forget_older(session: Session) -> None:
    if session.ranks.is_first:
        keep_newest(session.run.checkpoints, session.config.checkpoint.keep)


def _train_step(session: Session, state: FitState, view: ProgressView) -> dict[str, Any]:
    """Forward and backward passes of one step; gradients are left for the method."""
    start = time.perf_counter()
    figures, tokens = _gradients(session, state, view)
    if session.loss_scale is not None:
        session.loss_scale.step_made()
    return {"figures": figures, "tokens": tokens, "start": start}


def _probe(session: Session, state: FitState, view: ProgressView) -> None:
    """Give the method the gradients from which its new components begin: those of the step to come."""
    start = time.perf_counter()
    while session.method.probing and state.step < session.config.training.max_steps:
        _gradients(session, state, view)
        session.method.probe()
    state.seconds += time.perf_counter() - start


def _gradients(session: Session, state: FitState, view: ProgressView) -> tuple[dict[str, float], int]:
    """Figures and tokens of the next step's examples; saves memory and tries again where it does not suffice.

    Raises:
        QaromaError: the loss or the gradient is not finite, in fp16 without a loss scale too.
    """

    def gradients() -> tuple[dict[str, float], float, int]:
        micro_batches = session.plan.step(state.step)
        batches = [session.task.collate([session.train[i] for i in indices]) for indices in micro_batches]
        found = accumulate(session, batches, state.step, lambda all_: view.counted(all_, f"step {state.step + 1}"))
        return *found, sum(batch.tokens for batch in batches)

    step, scale = state.step + 1, session.loss_scale
    while True:
        figures, norm, tokens = with_relief(session, gradients, f"step {step}", view.console)
        if not math.isfinite(figures["loss"]):
            stop_run(session, state, f"the loss of step {step} is {figures['loss']}")
        if math.isfinite(norm):
            return figures, tokens
        if scale is None or not scale.halve():
            stop_run(session, state, f"the gradient of step {step} is not finite")
        session.method.zero_grad()
        view.console.print(f"step {step}: overflow in fp16; again at a loss scale of {scale.scale:g}", highlight=False)


def accumulate(
    session: Session,
    batches: Sequence[Batch],
    step: int = 0,
    shown: Callable[[Sequence[Placed]], Iterable[Placed]] = iter,
) -> tuple[dict[str, float], float]:
    """Gradients of the mean loss over all that these micro-batches count, however they are cut.

    Each rank makes the passes of its share; the sums that follow are those of all ranks.

    Args:
        session: whose model they are of.
        batches: the micro-batches of all ranks.
        step: that they make, counted from 0; what is drawn in a pass depends on it.
        shown: goes through this rank's, and shows how far it came.

    Returns:
        That mean loss first, and the means of what else the task tells of a step; and the gradients' joint norm. A step
        waits for the device once, for these.

    Raises:
        torch.OutOfMemoryError: on all ranks, where one of them has no memory for its passes.
    """
    count = sum(batch.counted for batch in batches)
    scale = session.loss_scale.scale if session.loss_scale is not None else 1.0
    names = ("loss", *session.task.told)
    totals = torch.zeros(len(names), device=session.accelerator.device)
    sums = StepSum(session.ranks, [*session.method.gradients(), totals])

    def passes() -> None:
        for place, batch in shown(session.ranks.share(list(enumerate(batches)))):
            _draw_from(session.plan.draws(step, place), session.accelerator.device)
            loss_sum, told = session.task.step(session.model, batch.to(session.accelerator.device))
            session.accelerator.backward(loss_sum / (count / scale))
            totals.add_(torch.stack([loss_sum.detach(), *(told[name] for name in session.task.told)]))
            sums.micro_batch_done()
        sums.share_done()

    if session.ranks.any(runs_out_of_memory(passes)):
        raise torch.OutOfMemoryError("no memory for a step")
    sums.over_all_ranks()
    penalty = session.method.penalty()
    if penalty is not None:
        session.accelerator.backward(penalty * scale)
    if session.loss_scale is not None:
        session.method.multiply_gradients(1 / scale)
    *found, norm = torch.cat([totals, session.method.gradient_norm()[None]]).tolist()
    return {name: value / count for name, value in zip(names, found, strict=True)}, norm


def _draw_from(seed: int, device: torch.device) -> None:
    """Begin what is drawn anew; ``torch.manual_seed`` looks for devices of every kind, which takes a millisecond."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _record_step(
    session: Session, state: FitState, record: dict[str, Any], events: Sequence[GrowthEvent], view: ProgressView
) -> None:
    """Count the step, log it with its growth events, show it."""
    method = session.method
    seconds = time.perf_counter() - record["start"]
    state.step += 1
    state.seconds += seconds
    trainable = method.trainable_parameters()
    ranks = method.ranks().values()
    line = {
        "step": state.step,
        **record["figures"],
        "learning_rate": method.learning_rate,
        "mean_rank": sum(ranks) / len(ranks),
        "active_modules": method.active_modules(),
        "trainable_parameters": trainable,
        "tokens_per_second": record["tokens"] / seconds,
        "seconds": seconds,
        **_scale_figures(session.loss_scale),
        **memory_figures(session.accelerator.device),
    }
    session.log.write(line)
    track(session.accelerator, line)
    for event in events:
        session.log.write(event.to_json())
    view.step(line, events)


def _scale_figures(scale: LossScale | None) -> dict[str, float]:
    """What the log keeps of a run in fp16: its loss scale, and how often gradients have overflowed."""
    return {} if scale is None else {"loss_scale": scale.scale, "overflows": scale.overflows}


def _log_ranks(session: Session, state: FitState, before: Mapping[str, int]) -> dict[str, int]:
    """Log the ranks of all modules where one changed; returns them."""
    ranks = session.method.ranks()
    if ranks != before:
        session.log.write({"event": "ranks", "step": state.step, "ranks": ranks})
    return ranks


def _validate(session: Session, state: FitState, view: ProgressView) -> None:
    """The task's figures on the validation rows; keeps the adapter where it is the best so far."""
    if not session.validation:
        return

    def measure() -> dict[str, Any]:
        return session.ranks.first(lambda: validation_metrics(session, lambda all_: view.counted(all_, "validation")))

    figures = with_relief(session, measure, "validation", view.console)
    session.method.validated(figures["loss"], figures["loss_error"])
    done = state.step / session.config.training.max_steps
    chosen = state.step > 0 and state.observe(session.task.metric, figures, step=state.step, done=done)
    record = {"event": "validation", "step": state.step, **figures, "chosen": chosen}
    session.log.write(record)
    track(session.accelerator, record, "validation/")
    view.validation(state.step, figures, session.task.metric, best=chosen)
    if chosen:
        session.ranks.first(lambda: session.save_adapter(session.run.adapter, state.step, figures))


def _sample(session: Session, state: FitState, view: ProgressView) -> None:
    """Answer the chosen prompts, where there are any."""
    sampler = session.sampler
    if sampler is not None:

        def answers() -> dict[str, Any]:
            return session.ranks.first(lambda: sampler.record(session.model, state.step))

        record = with_relief(session, answers, "samples", view.console)
        session.log.write(record)


def validation_metrics(session: Session, shown: Callable[[Sequence[Batch]], Iterable[Batch]] = iter) -> dict[str, Any]:
    """The task's figures over the whole validation set, without gradient and in eval mode."""
    batches = shown(session.validation_batches())
    return dict(session.task.evaluate(session.model, batches, session.accelerator.device))
