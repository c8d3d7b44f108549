"""``qaroma finetune``: the whole job, from a configuration to an adapter and a summary."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.console import Console

from qaroma.config.load import dump_config, lies_in, load_config
from qaroma.config.presets import Decision
from qaroma.config.schema import Config
from qaroma.engine.levels import LEVELS
from qaroma.errors import QaromaError
from qaroma.inference.answer_test import Answers, AnswerTest, read_conversations
from qaroma.method.targets import unadaptable
from qaroma.model.builtin import resolve_model
from qaroma.report.keyfigures import ENDINGS
from qaroma.report.summary import BeforeAfter, RunSummary, Score, print_summary
from qaroma.runs.checkpoint import load_newest
from qaroma.runs.directory import RunDirectory
from qaroma.runs.files import write_atomically
from qaroma.runs.stop import StopRequest
from qaroma.training.fit import Ending, FitState, fit, restore_state
from qaroma.training.interruptions import interruptions_told
from qaroma.training.live_page import LivePage
from qaroma.training.prepare import PreparedData, prepare_data
from qaroma.training.progress import ProgressView
from qaroma.training.session import Session
from qaroma.training.setup import build_session
from qaroma.training.trackers import start_trackers

# Settings that may differ when a run goes on; all others would make it another run.
RESUMABLE = ("training.max_steps", "training.learning_rate", "training.evaluate_every", "training.patience",
             "training.device", "training.memory", "training.track", "checkpoint", "evaluation", "output")  # fmt: skip
FIXED = ("evaluation.metric",)  # of those: the best adapter so far was chosen by it


def finetune(config: Config, *, resume: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Fine-tune as a configuration says.

    Args:
        config: of the run; what it leaves open is decided from the data and printed.
        resume: go on from the newest whole checkpoint in ``config.output``.
        console: where progress and the summary go; None is stderr.

    Returns:
        The figures of the run, as ``--json`` prints them.

    Raises:
        QaromaError: anything the user can mend; the run's last good state is saved.
        KeyboardInterrupt: the user stopped the run; its state is saved.
    """
    start = time.perf_counter()
    console = console or Console(file=sys.stderr)
    if resume:
        config = _resumed_config(config)
    data = prepare_data(config)
    _print_decisions(console, data.notes, data.decisions)
    run = _run_directory(data.config, resume)
    data.config.output = str(run.path)
    with interruptions_told(run):
        return _train(data, run, console, resume=resume, start=start)


def _train(data: PreparedData, run: RunDirectory, console: Console, *, resume: bool, start: float) -> dict[str, Any]:
    """From the first weight that is loaded to the summary; ``start`` is when the command began."""
    test = _answer_test(data)
    session = build_session(data, run)
    for note in (f"memory level {session.level}: {LEVELS[session.level].summary}", *unadaptable(session.model)):
        console.print(note, highlight=False, markup=False)
    if not resume:
        run.create(dump_config(data.config))
    state = _restored(session, console) if resume else FitState()
    before = test.run_once(session.model, session.log, "before", 0) if test else None
    start_trackers(session.accelerator, data.config.training.track, run.path, data.config.model_dump())
    page = LivePage(run.path, console, wanted=data.config.evaluation.report)
    try:
        with StopRequest() as stop, ProgressView(console, total=_total(session), done=state.step) as view:
            ending = fit(session, state, view, page, stop)
    finally:
        session.accelerator.end_training()
    if ending == "interrupted":
        console.print(f"saved at step {state.step}; go on with: {run.resume_command}", soft_wrap=True)
        raise KeyboardInterrupt
    _write_adapters(session, state)
    if state.best is not None:
        session.take_best()
    after = test.run_once(session.model, session.log, "after", state.step) if test else None
    figures = _figures(session, state, ending, before, after)
    figures["seconds"] = time.perf_counter() - start
    write_atomically(run.summary, json.dumps(figures, indent=2))
    page.update()
    print_summary(_summary(session, state, figures, before, after), console)
    return figures


def _answer_test(data: PreparedData) -> AnswerTest | None:
    """The generation test that the configuration asks for, None where it asks for none."""
    chosen = data.config.evaluation
    if chosen.data is None or data.template is None:
        return None
    conversations = read_conversations([(chosen.data, 1.0)], rows=chosen.rows, skip_bad=data.config.data.skip_bad_rows)
    return AnswerTest(conversations, data.tokenizer, data.template, chosen.max_new_tokens)


def _resumed_config(given: Config) -> Config:
    """The run's own configuration, with what may change taken from the command line.

    Raises:
        QaromaError: no run there, or settings that would make it another run.
    """
    run = RunDirectory(given.output) if given.output else None
    if run is None or not run.exists():
        where = f"{run.path} holds no run" if run else "no --output given"
        raise QaromaError(f"cannot resume: {where}; type --resume --output runs/NAME (qaroma runs lists them)")
    stored = load_config(run.config, {}, [])
    if stored.model.trust_remote_code and not given.model.trust_remote_code:
        raise QaromaError(
            f"{run.path} was begun with --trust-remote-code, so that its base may run Python code of its own; "
            f"type that again to go on: {run.resume_command} --trust-remote-code"
        )
    ours, theirs = _given(stored), _given(given)
    changed = {key: value for key, value in theirs.items() if value is not None and ours.get(key) != value}
    refused = [
        f"{key} was {ours.get(key)}, now {value}"
        for key, value in changed.items()
        if lies_in(key, FIXED) or not lies_in(key, RESUMABLE)
    ]
    if refused:
        raise QaromaError(
            f"cannot resume {run.path} with other settings: {'; '.join(refused)}. "
            "Leave them as they were, or begin a new run with another --output"
        )
    for key, value in changed.items():
        _set(stored, key, value)
    stored.output = str(run.path)
    return stored


def _given(section: BaseModel, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of all that was set, in a file, by a flag or from the data."""
    given: dict[str, Any] = {}
    dumped = section.model_dump()
    for name in section.model_fields_set:
        value = getattr(section, name)
        given.update(
            _given(value, f"{prefix}{name}.") if isinstance(value, BaseModel) else {f"{prefix}{name}": dumped[name]}
        )
    return given


def _set(config: Config, key: str, value: Any) -> None:
    *sections, name = key.split(".")
    target: Any = config
    for section in sections:
        target = getattr(target, section)
    setattr(target, name, value)


def _run_directory(config: Config, resume: bool) -> RunDirectory:
    if config.output is not None:
        run = RunDirectory(config.output)
        if run.exists() and not resume:
            raise QaromaError(
                f"{run.path} already holds a run; type --resume to go on with it, or choose another --output"
            )
        return run
    model = Path(config.model.name or "model").name
    data = Path(config.data.train[0].path.replace(":", "-")).name.split(".")[0]
    return RunDirectory.unused(f"{model}-{data}")


def _restored(session: Session, console: Console) -> FitState:
    """The state of the newest whole checkpoint; a fresh one where the run was killed before its first."""
    checkpoint, warnings = load_newest(session.run.checkpoints, fingerprint=session.fingerprint)
    for warning in warnings:
        console.print(f"warning: {warning}", style="yellow", highlight=False)
    state = restore_state(session, checkpoint) if checkpoint else FitState()
    session.log.cut_back(state.step or -1)  # what is logged at step 0 is logged anew
    console.print(f"resuming {session.run.path.as_posix()} at step {state.step}", highlight=False)
    return state


def _write_adapters(session: Session, state: FitState) -> None:
    """``adapter_last`` as it stands, and ``adapter`` too where no validation has chosen a best one."""
    session.save_adapter(session.run.adapter_last, state.step)
    if state.best is None:
        session.save_adapter(session.run.adapter, state.step)


def _figures(
    session: Session, state: FitState, ending: Ending, before: Answers | None, after: Answers | None
) -> dict[str, Any]:
    """What ``--json`` prints and ``summary.json`` keeps."""
    records = session.log.records()
    validations = [r for r in records if r.get("event") == "validation"]
    best = next((r for r in validations if r["step"] == state.best_step), None) if state.best is not None else None
    steps = [r for r in records if "event" not in r]
    ranks = session.method.ranks()
    metric = session.task.metric
    return {
        "run": session.run.path.as_posix(),
        "adapter": session.run.adapter.as_posix(),
        "method": session.method.name,
        "steps": state.step,
        "ended": ending,
        "loss": steps[-1]["loss"] if steps else None,
        "validation_loss_before": validations[0]["loss"] if validations else None,
        "validation_loss": best["loss"] if best else None,
        "metric": metric,
        "metric_before": validations[0][metric] if validations else None,
        "metric_best": best[metric] if best else None,
        "metric_last": validations[-1][metric] if validations else None,
        "best_step": state.best_step if best else state.step,
        "exact_match_before": before.exact_match if before else None,
        "exact_match": after.exact_match if after else None,
        "growth_events": sum(r.get("event") == "growth" for r in records),
        "rank_min": min(ranks.values()),
        "rank_mean": sum(ranks.values()) / len(ranks),
        "rank_max": max(ranks.values()),
        "trainable_parameters_start": state.trainable_start,
        "trainable_parameters_mean": state.trainable_sum / max(state.step, 1),
        "trainable_parameters_end": steps[-1]["trainable_parameters"] if steps else 0,
        "memory_bytes": max((r["memory_bytes"] for r in steps), default=0),
        "training_seconds": state.seconds,
    }


def _summary(
    session: Session, state: FitState, figures: Mapping[str, Any], before: Answers | None, after: Answers | None
) -> RunSummary:
    scores = []
    if figures["validation_loss_before"] is not None:
        scores.append(Score("validation loss", figures["validation_loss_before"], figures["validation_loss"]))
        if session.task.metric != "loss":
            scores.append(Score(session.task.metric, figures["metric_before"], figures["metric_best"]))
    if after:
        scores.append(Score("exact match", before.exact_match if before else None, after.exact_match, percent=True))
    shown = session.config.evaluation.show
    base, outputs = resolve_model(session.base_name), session.remember.outputs
    examples = _side_by_side(before, after)[:shown] if after else []
    return RunSummary(
        run=figures["run"],
        adapter=figures["adapter"],
        base=str(base.folder_or_id),
        base_gguf=base.gguf_file,
        steps=state.step,
        seconds=max(figures["seconds"], figures["training_seconds"]),  # a resumed run took longer than this command
        stopped=ENDINGS[figures["ended"]],
        ranks=session.method.ranks(),
        trainable_start=figures["trainable_parameters_start"],
        trainable_mean=figures["trainable_parameters_mean"],
        trainable_end=figures["trainable_parameters_end"],
        scores=scores,
        examples=examples,
        evaluation_data=(session.config.evaluation.data if after else None) or session.config.data.validation,
        outputs=outputs,
    )


def _side_by_side(before: Answers | None, after: Answers) -> list[BeforeAfter]:
    base = before.answers if before else [""] * len(after.answers)
    return [
        BeforeAfter(prompt, expected, first, last)
        for prompt, expected, first, last in zip(after.prompts, after.expected, base, after.answers, strict=True)
    ]


def _print_decisions(console: Console, notes: Sequence[str], decisions: Sequence[Decision]) -> None:
    for note in notes:
        console.print(note, highlight=False, markup=False)
    width = max((len(d.key) for d in decisions), default=0)
    for d in decisions:
        value = f"{d.value:g}" if isinstance(d.value, float) else str(d.value)
        console.print(f"{d.key:<{width}}  {value:<10}  {d.reason}", highlight=False, markup=False, soft_wrap=True)


def _total(session: Session) -> int:
    assert session.config.training.max_steps is not None
    return session.config.training.max_steps
