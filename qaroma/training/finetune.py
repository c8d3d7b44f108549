"""``qaroma finetune``: the whole job, from a configuration to an adapter and a summary."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, cast

from rich.console import Console

from qaroma.config.gpus import micro_batches_each
from qaroma.config.load import dump_config
from qaroma.config.metrics import metrics_of
from qaroma.config.schema import Config
from qaroma.config.tasks import PREFERENCE
from qaroma.export.gguf_families import ARCHITECTURES
from qaroma.inference.answer_test import Answers, AnswerTest, read_conversations
from qaroma.model.base import device_name
from qaroma.report.outcome import outcome
from qaroma.report.page import PAGE
from qaroma.report.summary import BeforeAfter, RunSummary, Score, print_summary
from qaroma.runs.checkpoint import list_checkpoints
from qaroma.runs.directory import RunDirectory
from qaroma.runs.figures import Figures, figures_of
from qaroma.runs.files import write_atomically
from qaroma.runs.lock import locked
from qaroma.runs.reading import read_run
from qaroma.runs.stop import StopRequest
from qaroma.training.fit import Ending, fit
from qaroma.training.forecast import forecast, tell
from qaroma.training.interruptions import interruptions_told
from qaroma.training.live_page import LivePage
from qaroma.training.memory import with_relief
from qaroma.training.prepare import PreparedData, prepare_data
from qaroma.training.progress import ProgressView
from qaroma.training.ranks import Ranks, joined
from qaroma.training.reference import add_reference
from qaroma.training.restore import restored
from qaroma.training.resume import resumed_config
from qaroma.training.saving import FitState, save_state
from qaroma.training.session import Session
from qaroma.training.setup import build_session
from qaroma.training.trackers import start_trackers
from qaroma.training.trimming import trim_adapter


def finetune(
    config: Config, *, resume: bool = False, verbose: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Fine-tune as a configuration says.

    Args:
        config: of the run; what it leaves open is decided from the data.
        resume: go on from the newest whole checkpoint in ``config.output``.
        verbose: print every setting that was decided, with its reason.
        console: where progress and the summary go; None is stderr.

    Returns:
        The figures of the run, as ``--json`` prints them; nothing on a rank that is not the first.

    Raises:
        QaromaError: anything the user can mend; the run's last good state is saved.
        KeyboardInterrupt: the user stopped the run; its state is saved.
    """
    start = time.perf_counter()
    if resume:
        config = resumed_config(config)
    training = config.training
    with joined(training.device, training.reduce, deterministic=training.deterministic) as ranks:
        if console is None or not ranks.is_first:
            console = Console(file=sys.stderr, quiet=not ranks.is_first)
        data = ranks.together(lambda: _prepared(config, ranks))
        run = ranks.first(lambda: _directory(data, resume=resume))
        told = ranks.together(lambda: forecast(data))
        tell(console, data, told, run, verbose=verbose)
        data.config = data.config.model_copy(update={"output": str(run.path)})
        with interruptions_told(run), ExitStack() as held:
            if resume:
                ranks.first(lambda: held.enter_context(locked(run.path)))
            level = ranks.most(told.level)
            test = ranks.together(lambda: _answer_test(data))
            session = ranks.together(lambda: build_session(data, run, level, ranks))
            return _train(session, data, test, console, held, resume=resume, start=start)


def _prepared(config: Config, ranks: Ranks) -> PreparedData:
    data = prepare_data(config)
    micro_batches_each(data.config.training.grad_accum, ranks.count)  # refused where they are not whole
    return data


def _directory(data: PreparedData, *, resume: bool) -> RunDirectory:
    run = RunDirectory.of(data.config)
    if not resume:
        run.require_unused()
    return run


def _train(
    session: Session,
    data: PreparedData,
    test: AnswerTest | None,
    console: Console,
    held: ExitStack,
    *,
    resume: bool,
    start: float,
) -> dict[str, Any]:
    """From a session to the summary.

    Args:
        session, data, test, console: of the run.
        held: keeps the run's lock to the end; a new run takes it here, once nothing else can fail.
        resume: go on from the newest checkpoint.
        start: when the command began.
    """
    ranks, run = session.ranks, session.run
    for note in session.notes:
        console.print(note, highlight=False, markup=False)
    ranks.require_same(lambda: _common(session), "at the start", "Give all of them the same files and settings")
    if not resume:
        ranks.first(lambda: _begin(data, run, held))
        add_reference(session, console)
    state = restored(session, console) if resume else FitState()
    if not ranks.first(lambda: bool(list_checkpoints(run.checkpoints))):
        save_state(session, state)  # there is one from the first moment on: what has none lost it
    before = _tested(test, session, "before", 0, console)
    page = LivePage(run.path, console, wanted=data.config.evaluation.report and ranks.is_first)
    ending = _fitted(session, state, page, console)
    if ending == "interrupted":
        page.update(stopped=True)
        console.print(f"saved at step {state.step}; go on with: {run.resume_command}", soft_wrap=True)
        raise KeyboardInterrupt
    session.ranks = Ranks()  # what is left is one process's work
    if not ranks.is_first:
        return {}
    _write_adapters(session, state)
    if state.best is not None:
        session.take_best()
    trim_adapter(session, state, console)
    after = _tested(test, session, "after", state.step, console)
    figures = _figures(session, state, ending, time.perf_counter() - start)
    write_atomically(run.summary, json.dumps(figures, indent=2))
    page.update()
    print_summary(_summary(session, figures, before, after), console)
    return figures


def _common(session: Session) -> dict[str, Any]:
    """What all processes of a run must have been given alike."""
    settings = session.config.model_dump(mode="json", exclude={"output"})
    return {"base": session.fingerprint, **session.data_fingerprint, **settings}


def _begin(data: PreparedData, run: RunDirectory, held: ExitStack) -> None:
    """Make the directory of a new run, and keep others out of it."""
    held.enter_context(locked(run.path))
    run.create(dump_config(data.config, {decision.key: decision.reason for decision in data.decisions}))


def _fitted(session: Session, state: FitState, page: LivePage, console: Console) -> Ending:
    """Train, with all that follows a run while it does."""
    config, run = session.config, session.run
    if session.ranks.is_first:
        start_trackers(session.accelerator, config.training.track, run.path, config.model_dump())
    if page.wanted:
        console.print(f"follow it in {(run.path / PAGE).as_posix()}", soft_wrap=True, highlight=False, markup=False)
    try:
        with (
            StopRequest() as stop,
            ProgressView(console, total=config.training.max_steps, done=state.step) as view,
        ):
            return fit(session, state, view, page, stop)
    finally:
        session.accelerator.end_training()


def _answer_test(data: PreparedData) -> AnswerTest | None:
    """The generation test that the configuration asks for, None where it asks for none."""
    chosen = data.config.evaluation
    if chosen.data is None or data.template is None:
        return None
    reading = data.config.data
    conversations = read_conversations(
        [(chosen.data, 1.0)],
        columns=reading.columns,
        feedback="good" if data.config.task == PREFERENCE else reading.feedback,
        rows=chosen.rows,
        skip_bad=reading.skip_bad_rows,
    )
    return AnswerTest(conversations, data.tokenizer, data.template, chosen.max_new_tokens)


def _tested(test: AnswerTest | None, session: Session, when: str, step: int, console: Console) -> Answers | None:
    """The generation test's answers, where there is a test; memory is saved where it does not suffice."""
    if test is None:
        return None

    def answers() -> Answers:
        return session.ranks.first(lambda: test.run_once(session.model, session.log, when, step))

    return with_relief(session, answers, f"the test {when} training", console)


def _write_adapters(session: Session, state: FitState) -> None:
    """``adapter_last`` as it stands, and ``adapter`` too where no validation has chosen a best one."""
    session.save_adapter(session.run.adapter_last, state.step)
    if state.best is None:
        session.save_adapter(session.run.adapter, state.step)


def _figures(session: Session, state: FitState, ending: Ending, elapsed: float) -> dict[str, Any]:
    """What ``--json`` prints and ``summary.json`` keeps.

    Args:
        session, state, ending: of the run.
        elapsed: seconds of this command; a run that was resumed took longer, one that was over took what it said.
    """
    run, metric = read_run(session.run.path), session.task.metric
    figures = figures_of(run)
    loss, judged = figures.of("loss"), figures.of(metric)
    training_loss = run.series("loss").values
    said = run.summary.get("seconds") if run.summary.get("steps") == state.step else None
    return {
        "run": session.run.path.as_posix(),
        "adapter": session.run.adapter.as_posix(),
        "method": session.method.name,
        "steps": state.step,
        "epochs": state.step / session.plan.steps_per_epoch,
        "ended": ending,
        "loss": training_loss[-1] if training_loss else None,
        "validation_loss_before": loss.before if loss else None,
        "validation_loss": loss.after if loss else None,
        "metric": metric,
        "metric_before": judged.before if judged else None,
        "metric_best": judged.after if judged else None,
        "metric_last": judged.last if judged else None,
        "best_step": state.best_step if state.best is not None else state.step,
        "exact_match_before": figures.exact_match_before,
        "exact_match": figures.exact_match,
        "growth_events": figures.growth_events,
        "rank_min": figures.rank_min,
        "rank_mean": figures.rank_mean,
        "rank_max": figures.rank_max,
        "trainable_parameters_start": state.trainable_start,
        "trainable_parameters_mean": figures.trainable_mean or 0.0,
        "trainable_parameters_end": figures.trainable_end or 0,
        "device": device_name(session.accelerator.device),
        "memory_bytes": figures.memory_bytes or 0,
        "training_seconds": state.seconds,
        "seconds": max(elapsed, state.seconds, said or 0.0),
    }


def _summary(session: Session, figures: Mapping[str, Any], before: Answers | None, after: Answers | None) -> RunSummary:
    """What is printed of a run whose ``summary.json`` is written."""
    run, base = read_run(session.run.path), cast(Any, session.model).config
    scores = _validated(session, figures_of(run))
    if after:
        scores.append(Score("exact match", before.exact_match if before else None, after.exact_match, "exact_match"))
    shown = session.config.evaluation.show
    examples = _side_by_side(before, after)[:shown] if after else []
    return RunSummary(
        run=figures["run"],
        adapter=figures["adapter"],
        steps=run.step,
        ended=outcome(run),
        ranks=run.adapter_ranks(),
        figures=figures_of(run),
        scores=scores,
        examples=examples,
        evaluation_data=(session.config.evaluation.data if after else None) or session.config.data.validation,
        outputs=session.remember.outputs,
        in_gguf=base.model_type in ARCHITECTURES,
    )


def _validated(session: Session, figures: Figures) -> list[Score]:
    """The adapter's scores on the validation rows; none where there are no such rows."""
    of_pairs = metrics_of(PREFERENCE) if session.task.name == PREFERENCE else ()
    found = [figures.of(name) for name in dict.fromkeys(("loss", session.task.metric, *of_pairs))]
    return [
        Score("validation loss" if one.name == "loss" else one.name, one.before, one.after, one.name)
        for one in found
        if one is not None
    ]


def _side_by_side(before: Answers | None, after: Answers) -> list[BeforeAfter]:
    base = before.answers if before else [""] * len(after.answers)
    return [
        BeforeAfter(prompt, expected, first, last)
        for prompt, expected, first, last in zip(after.prompts, after.expected, base, after.answers, strict=True)
    ]
