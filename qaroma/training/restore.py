"""Going on with a run: from its newest whole checkpoint, with the log and the best adapter of that moment."""

from __future__ import annotations

import filecmp
import os
from pathlib import Path

from rich.console import Console

from qaroma.errors import QaromaError
from qaroma.runs.checkpoint import BEST, Checkpoint, list_checkpoints, load_newest, set_aside, step_of
from qaroma.runs.directory import GROWTH, RunDirectory, quoted
from qaroma.runs.files import copy_files, directory_written_aside, heal, read_json, remove_directory, remove_leftovers
from qaroma.training.data_fingerprint import require_same_data
from qaroma.training.reference import add_reference
from qaroma.training.saving import FitState, restore_state
from qaroma.training.session import Session


def restored(session: Session, console: Console) -> FitState:
    """Bring a session, its log and its best adapter back to the newest whole checkpoint.

    What was written after that checkpoint belongs to a future that did not come: the log forgets it, and a
    best adapter of it gives way to the one of the checkpoint.

    Args:
        session: new; nobody else writes into its run.
        console: for warnings about what is damaged.

    Returns:
        The state to go on from; a fresh one where the run was killed before it began.

    Raises:
        QaromaError: no whole checkpoint in a run that has done something, other data, or another base.
    """
    checkpoint = session.ranks.first(lambda: _newest(session, console))
    add_reference(session, console)  # by the model as it starts, before the checkpoint's state is put into it
    state = FitState() if checkpoint is None else restore_state(session, checkpoint)
    session.ranks.first(lambda: _go_back(session, state))
    console.print(f"resuming {session.run.path.as_posix()} at step {state.step}", highlight=False)
    return state


def _newest(session: Session, console: Console) -> Checkpoint | None:
    """The newest whole checkpoint; what a kill has left half done is mended, and what is damaged is set aside."""
    run = session.run
    heal(run.adapter)
    heal(run.adapter_last)
    remove_leftovers(run.path)
    remove_leftovers(run.checkpoints)
    checkpoint, warnings = load_newest(run.checkpoints, fingerprint=session.fingerprint)
    lines = session.log.damaged()
    if lines:
        warnings.append(f"{run.metrics} is damaged at line {', '.join(map(str, lines))}; the other lines are kept")
    for warning in warnings:
        console.print(f"warning: {warning}", style="yellow", highlight=False)
    if checkpoint is None:
        _require_nothing_done(run)
        return None
    require_same_data(checkpoint.values["data"], session.data_fingerprint, run.path.as_posix())
    for path in list_checkpoints(run.checkpoints):
        if step_of(path) > checkpoint.step:
            set_aside(path, "damaged")
    return checkpoint


def _go_back(session: Session, state: FitState) -> None:
    """Make log and best adapter those of a state that was saved."""
    _restore_best(session.run, state)
    session.log.cut_back(state.step or -1)  # what is logged at step 0 is logged anew


def _require_nothing_done(run: RunDirectory) -> None:
    """Where there is no checkpoint, see to it that a beginning at step 0 overwrites nothing.

    Raises:
        QaromaError: names what is there, and the two ways on.
    """
    last = run.last_step()
    found = [f"a log up to step {last}"] if last else []
    for folder in (run.adapter, run.adapter_last):
        if folder.exists():
            found.append(f"{folder.name}/ of step {read_json(folder / GROWTH).get('step', '?')}")
    if run.summary.exists():
        found.append(run.summary.name)
    if found:
        raise QaromaError(
            f"{run.path} has no whole checkpoint to go on from, and holds {', '.join(found)}, over which it would "
            f"begin again at step 0. Either put a checkpoint back into {run.checkpoints} from a copy and type the same "
            "command again, or leave this run as it is and begin a new one: "
            f"qaroma finetune --config {quoted(run.config.as_posix())} --output OTHER"
        )


def _restore_best(run: RunDirectory, state: FitState) -> None:
    """Make ``adapter`` the best one until the checkpoint's step, as it lies with the checkpoint."""
    best = run.checkpoints / f"step-{state.step:08d}" / BEST
    if state.best is None:
        later = read_json(run.adapter / GROWTH).get("step", 0)
        if run.adapter.exists() and later > state.step:
            remove_directory(run.adapter)
    elif not _same_files(best, run.adapter):
        with directory_written_aside(run.adapter) as aside:
            aside.rmdir()
            copy_files(best, aside)


def _same_files(one: Path, other: Path) -> bool:
    names = sorted(os.listdir(one))
    return (
        other.is_dir()
        and names == sorted(os.listdir(other))
        and all(filecmp.cmp(one / name, other / name, shallow=False) for name in names)
    )
