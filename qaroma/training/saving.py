"""The state of a run: what a checkpoint holds of it, and what is left of a run that cannot go on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from qaroma.errors import QaromaError
from qaroma.runs.checkpoint import Checkpoint, list_checkpoints, save_checkpoint, set_aside, step_of
from qaroma.runs.directory import quoted
from qaroma.runs.lock import locked
from qaroma.training.choice import Choice
from qaroma.training.loss_scale import LossScale
from qaroma.training.ranks import RankLostError, Ranks
from qaroma.training.session import Session

LARGEST_RATE = 1e-2  # of those that the presets choose; from one beyond it, half as much helps nobody
TURN_SECONDS = 0.3  # by which each rank lets the one before it save first


@dataclass
class FitState(Choice):
    """Where a run stands; with the method's state all that a checkpoint holds."""

    step: int = 0
    trainable_start: int = 0
    seconds: float = 0.0


def save_state(session: Session, state: FitState) -> str:
    """Have the first rank write a checkpoint of this moment, with the best adapter until now; returns its path.

    Raises:
        QaromaError: a state that is not finite, or not that of all ranks.
    """
    require_same_state(session, state.step)
    return session.ranks.first(lambda: _write(session, state))


def _write(session: Session, state: FitState) -> str:
    values = {
        "fit": asdict(state),
        "adapter": session.info(state.step).to_json(),
        "data": session.data_fingerprint,
    }
    if session.loss_scale is not None:
        values["loss_scale"] = asdict(session.loss_scale)
    method = session.method
    checkpoint = Checkpoint.of(state.step, method.name, method.state(), values=values)
    ruined = checkpoint.not_finite()
    if ruined is not None:
        _go_back(session, state, f"the state after step {state.step} is not finite ({ruined})")
    session.log.flush()  # a power cut must not leave a checkpoint whose steps the log does not know
    best = session.run.adapter if state.best is not None else None
    return str(save_checkpoint(session.run.checkpoints, checkpoint, fingerprint=session.fingerprint, best=best))


def restore_state(session: Session, checkpoint: Checkpoint) -> FitState:
    """Put a checkpoint's state into the session's method."""
    session.method.load_state(checkpoint.method_state())
    if session.loss_scale is not None and "loss_scale" in checkpoint.values:  # not where another device wrote it
        session.loss_scale = LossScale(**checkpoint.values["loss_scale"])
    fit = checkpoint.values["fit"]
    return FitState(**{"record": fit["best"], **fit})  # of 0.4.0 and before: the chosen one was the best


def require_same_state(session: Session, step: int) -> None:
    """See to it that all ranks have made the same of the run: its factors, its growth, its optimiser's memory.

    Raises:
        QaromaError: names a rank that has not, and the module.
    """

    def held() -> dict[str, Any]:
        state = session.method.state()
        return {**state.tensors, **state.values}

    session.ranks.require_same(held, f"after step {step}", f"Go back with: {session.run.resume_command}")


@contextmanager
def left_behind(session: Session, state: FitState) -> Iterator[None]:
    """Where a rank is lost inside, leave a checkpoint of the state, which must be that after a whole step.

    It is written by the lowest rank that lives: the first one has the run's lock, which the system takes from the
    dead; else whoever gets that in its turn.
    """
    try:
        yield
    except RankLostError:
        lost, session.ranks = session.ranks, Ranks()
        time.sleep(TURN_SECONDS * lost.number)
        if lost.is_first:
            _write(session, state)
        else:
            with suppress(QaromaError), locked(session.run.path):
                if not any(step_of(path) == state.step for path in list_checkpoints(session.run.checkpoints)):
                    _write(session, state)
        raise


def stop_run(session: Session, state: FitState, what: str) -> NoReturn:
    """End a run before a step that would ruin it, and say where it can go on and how; on all ranks alike."""
    session.method.zero_grad()
    session.ranks.first(lambda: _go_back(session, state, what))
    raise AssertionError("a run that is stopped goes on")


def _go_back(session: Session, state: FitState, what: str) -> NoReturn:
    """Leave what is before a step that would ruin a run.

    The state that the step began with is finite, and may yet be what ruins it (at too large a rate the loss
    overflows one step after the update): it is not saved, and a checkpoint of it is set aside.
    """
    examples = [i for indices in session.plan.step(state.step) for i in indices]
    where = ", ".join(session.train[i].origin for i in examples[:8])
    run, known = session.run, list_checkpoints(session.run.checkpoints)
    before = [path for path in known if step_of(path) < state.step]
    if not before:
        raise QaromaError(
            f"{what} (examples {where}, ...). That step was not made, and there is no earlier checkpoint to go back "
            "to. Look at these rows, or begin anew with --set model.compute_dtype=fp32 or a smaller --learning-rate: "
            f"qaroma finetune --config {quoted(run.config.as_posix())} --output OTHER"
        )
    for path in known:
        if path not in before:
            set_aside(path, "diverged")
    raise QaromaError(
        f"{what} (examples {where}, ...). That step was not made. The run goes back to step {step_of(before[-1])}; "
        f"look at these rows, or go on with a smaller rate: {run.resume_command} {_smaller_rates(session)}"
    )


def _smaller_rates(session: Session) -> str:
    """What to type for half the rate, of the head too where one is trained."""
    training = session.config.training
    typed = f"--learning-rate {min(training.learning_rate, LARGEST_RATE) / 2:.1e}"
    if session.head is None:
        return typed
    rate = training.head_learning_rate or training.learning_rate
    return f"{typed} --set training.head_learning_rate={min(rate, LARGEST_RATE) / 2:.1e}"
