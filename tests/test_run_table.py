"""`runs` and `compare-runs`: what is read from run directories in every state, and how it is shown."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from test_training import make_config

from qaroma.cli import main
from qaroma.errors import QaromaError
from qaroma.method.factors import Factors
from qaroma.report.run_table import state_sentence
from qaroma.report.side_by_side import compare_runs
from qaroma.runs.adapter import read_adapter, write_adapter
from qaroma.runs.adapter_info import AdapterInfo
from qaroma.runs.figures import figures_of
from qaroma.runs.finding import list_runs
from qaroma.runs.lock import LOCK, locked
from qaroma.runs.reading import FRESH_SECONDS, read_run
from qaroma.training.finetune import finetune


def write_run(
    path: Path, *, steps: int = 4, total: int = 8, finished: bool = True, age: float = 1000, answers: str = "right",
    **settings: Any,
) -> Path:  # fmt: skip
    """A run directory as training leaves it, without weights."""
    path.mkdir(parents=True)
    config = {
        "model": {"name": "org/base"}, "data": {"train": [{"path": "a.jsonl", "weight": 1.0}]}, "task": "causal-lm",
        "method": "aroma", "training": {"max_steps": total, "seed": 0}, "output": str(path), **settings,
    }  # fmt: skip
    (path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    prompts = {"prompts": ["p", "q"], "expected": ["right", "fixed"]}
    lines: list[dict[str, Any]] = [
        {"event": "answers", "when": "before", "step": 0, **prompts, "answers": ["x", "x"], "exact_match": 0.0},
        {"event": "validation", "step": 0, "loss": 0.5, "perplexity": 1.6},
    ]
    for step in range(1, steps + 1):
        lines += [{"step": step, "loss": 1 / step, "mean_rank": 1.5, "trainable_parameters": 100 - 10 * step,
                   "seconds": 2.0},
                  {"event": "validation", "step": step, "loss": 1 + abs(step - 2)}]  # fmt: skip
    checkpoint = path / "checkpoints" / f"step-{steps:08d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.safetensors").write_bytes(b"x" * 1000)
    (path / "checkpoints" / f"step-{steps + 1:08d}.part").mkdir()
    if finished:
        lines.append({"event": "answers", "when": "after", "step": steps, **prompts, "answers": [answers, "fixed"],
                      "exact_match": 0.75})  # fmt: skip
        (path / "adapter").mkdir()
        AdapterInfo({"a": [1, 1, 1], "b": [1], "c": []}, inner_rank=1, alpha=1.0, step=2).write(path / "adapter")
        (path / "summary.json").write_text(json.dumps({"steps": steps, "ended": "grown", "seconds": 12.5}))
    metrics = path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    then = time.time() - age
    for file in [metrics, path / "config.yaml", path / "summary.json"]:
        if file.exists():
            os.utime(file, (then, then))
    return path


def test_a_finished_run_gives_its_figures(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "one"))
    figures = figures_of(run)
    assert (run.state, run.step, run.budget, run.ended) == ("finished", 4, 8, "grown")
    assert (figures.seconds, figures.training_seconds) == (12.5, 8.0)
    assert (run.setting("model.name"), run.sources(), run.method, run.task) == (
        "org/base", ["a.jsonl"], "aroma", "causal-lm",
    )  # fmt: skip
    loss = figures.validation[0]
    # The untrained model's 0.5 is no result of the run; the best step is where |step - 2| vanishes.
    assert (loss.name, loss.before, loss.best, loss.best_step, loss.last) == ("loss", 0.5, 1.0, 2, 3.0)
    assert (figures.exact_match_before, figures.exact_match) == (0.0, 0.75)
    assert (figures.rank_min, figures.rank_mean, figures.rank_max) == (0, pytest.approx(4 / 3), 3)
    assert (figures.trainable_start, figures.trainable_mean, figures.trainable_end) == (90, 75, 60)
    assert run.bytes == sum(file.stat().st_size for file in (tmp_path / "one").rglob("*") if file.is_file())
    assert run.resume is None


def test_the_parameters_of_an_adapter_are_the_numbers_that_its_modules_hold(tmp_path: Path) -> None:
    path = write_run(tmp_path / "one")
    assert figures_of(read_run(path)).adapter_parameters is None  # there are no numbers beside what it remembers
    for rank, held in ((3, 3 * (4 + 5)), (0, 0)):
        update = {"a": Factors(torch.ones(rank, 4), torch.ones(rank, 5)), "b": Factors.zero((5, 4))}
        info = AdapterInfo({"a": [1] * rank, "b": []}, inner_rank=1, alpha=1.0)
        write_adapter(path / "adapter", update, info, base=None)
        assert figures_of(read_run(path)).adapter_parameters == held


def test_an_unfinished_run_says_where_it_stands_and_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = read_run(write_run(tmp_path / "s", finished=False))
    assert state_sentence(stopped) == "stopped at step 4 of 8, resumable from 4"
    assert stopped.resume == f"qaroma finetune --resume --output {(tmp_path / 's').as_posix()}"
    figures = figures_of(stopped)
    assert (figures.rank_mean, figures.exact_match, figures.seconds) == (1.5, None, 8.0)
    begun = write_run(tmp_path / "b", finished=False, steps=0)
    (begun / "metrics.jsonl").write_text(json.dumps({"event": "validation", "step": 0, "loss": 0.5}))
    assert main(["runs", str(begun)]) == 0
    assert "loss 0.5 before training" in capsys.readouterr().out


def test_a_run_is_at_work_while_a_process_has_it_and_not_a_moment_longer(tmp_path: Path) -> None:
    path = write_run(tmp_path / "r", finished=False, age=0)
    with locked(path):
        running = read_run(path)
        assert (state_sentence(running), running.resume) == ("running at step 4 of 8", None)
    assert read_run(path).state == "stopped"
    # Of another machine's process nothing is known but when it wrote last.
    (path / LOCK).write_text(json.dumps({"pid": 1, "host": "elsewhere"}), encoding="utf-8")
    assert read_run(path).state == "running"
    then = time.time() - 2 * FRESH_SECONDS
    for name in ("metrics.jsonl", "config.yaml"):
        os.utime(path / name, (then, then))
    assert read_run(path).state == "stopped"


def test_removing_asks_and_takes_whole_runs_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two, kept = (write_run(tmp_path / name) for name in ("one", "two", "kept"))

    def refused(*arguments: str) -> str:
        assert main(["runs", "rm", *arguments]) == 2
        assert one.is_dir()
        return capsys.readouterr().err

    assert "type the same command with --yes" in refused(str(one))
    with locked(two):
        assert "two is in use by process" in refused(str(one), str(two), "--yes")
    (two / "notes.txt").touch()
    assert "two holds what no run writes (notes.txt)" in refused(str(one), str(two), "--yes")
    (two / "notes.txt").unlink()
    assert "is no run" in refused(str(one), str(tmp_path), "--yes")
    project = tmp_path / "project"
    project.mkdir()
    shutil.copy(one / "config.yaml", project)
    assert "project is no whole run" in refused(str(project), "--yes")
    (tmp_path / "link").symlink_to(one)
    assert "link is a link" in refused(str(tmp_path / "link"), "--yes")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("click.termui.visible_prompt_func", lambda _: "n")
    assert main(["runs", "rm", str(one)]) == 130
    assert one.is_dir()
    monkeypatch.setattr("click.termui.visible_prompt_func", lambda _: "y")
    assert main(["runs", "rm", str(one)]) == 0
    assert main(["runs", "rm", str(two), str(two), "--yes"]) == 0
    assert "removed 1 run" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "link", "project"]
    assert kept.is_dir()


def test_a_finished_run_that_was_resumed_with_more_steps_is_not_finished(tmp_path: Path) -> None:
    path = write_run(tmp_path / "s")
    with (path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5, "loss": 1, "mean_rank": 1, "trainable_parameters": 3}) + "\n")
    then = time.time() - 1000
    for name in ("metrics.jsonl", "summary.json", "config.yaml"):
        os.utime(path / name, (then, then))
    assert state_sentence(read_run(path)) == "stopped at step 5 of 8, resumable from 4"


def _without_config(path: Path) -> None:
    (path / "config.yaml").unlink()


def _damaged_config(path: Path) -> None:
    (path / "config.yaml").write_bytes(b"model: {name: [\xff")


def _foreign_config(path: Path) -> None:
    (path / "config.yaml").write_text("- 1\n")


def _damaged_metrics(path: Path) -> None:
    (path / "metrics.jsonl").write_bytes(b"\xff\xfe{}\n")


def _foreign_metrics(path: Path) -> None:
    (path / "metrics.jsonl").write_text("1\n2\n")


def _foreign_events(path: Path) -> None:
    (path / "metrics.jsonl").write_text('{"event": "ranks", "step": "first"}\n')


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (_without_config, "it has no config.yaml"),
        (_damaged_config, "config.yaml cannot be read"),
        (_foreign_config, "config.yaml is no configuration of a run"),
        (_damaged_metrics, "metrics.jsonl holds lines that are no records"),
        (_foreign_metrics, "metrics.jsonl holds lines that are no records"),
        (_foreign_events, "line 1 of metrics.jsonl has no step as a run writes it"),
    ],
)
def test_a_broken_run_is_listed_as_such(
    damage: Any, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "runs" / "good")
    damage(write_run(tmp_path / "runs" / "bad"))
    assert main(["runs", str(tmp_path / "runs")]) == 0
    out = capsys.readouterr().out
    assert f"broken: {problem}" in out
    assert "finished (grown)" in out
    with pytest.raises(QaromaError, match=f"bad is damaged: {problem}; give another run"):
        compare_runs([tmp_path / "runs" / "good", tmp_path / "runs" / "bad"])


def test_a_run_with_half_of_its_files_is_still_listed(tmp_path: Path) -> None:
    path = write_run(tmp_path / "one")
    (path / "metrics.jsonl").unlink()
    (path / "summary.json").write_text("[")
    (path / "adapter" / "growth.json").write_text("{")
    assert read_run(path).step == 0


def test_a_resumed_run_took_the_time_of_all_its_commands(tmp_path: Path) -> None:
    path = write_run(tmp_path / "one")
    (path / "summary.json").write_text(json.dumps({"steps": 4, "seconds": 12.5, "training_seconds": 40.0}))
    assert (figures_of(read_run(path)).seconds, figures_of(read_run(path)).training_seconds) == (40.0, 40.0)


def test_a_classifier_is_listed_by_its_own_metric(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run(tmp_path / "runs" / "one", finished=False, task="classification", evaluation={"metric": "f1"})
    figures = [{"loss": 0.9, "accuracy": 0.5, "f1": 0.4}, {"loss": 0.2, "accuracy": 0.9, "f1": 0.6}]
    figures.append({"loss": 0.3, "accuracy": 0.8, "f1": 0.7})
    lines = [{"event": "validation", "step": step, **found} for step, found in enumerate(figures)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_run(path)
    assert [(one.name, one.before, one.best, one.best_step, one.last) for one in figures_of(run).validation] == [
        ("f1", 0.4, 0.7, 2, 0.7),
        ("loss", 0.9, 0.3, 2, 0.3),  # of the adapter that f1 has chosen, not the lowest
        ("accuracy", 0.5, 0.8, 2, 0.8),
    ]
    assert main(["runs", str(tmp_path / "runs")]) == 0
    assert "f1 0.7 at 2" in capsys.readouterr().out


def test_newest_first_folders_below_and_nothing_else(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    write_run(root / "old", age=3000)
    write_run(root / "new", age=1000)
    write_run(root / "family" / "child", age=2000)
    (root / "notes").mkdir()
    (root / "file.txt").write_text("x")
    assert [run.name for run in list_runs(root)] == ["new", "family/child", "old"]
    assert [run.name for run in list_runs(root / "old")] == ["old"]


def test_the_piped_table_is_narrow_cuts_no_name_and_names_the_command_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "a-run-whose-name-is-rather-longer-than-most-names-of-runs-would-ever-be-in-practice"
    write_run(tmp_path / long, finished=False, model={"name": "org/" + "m" * 90}, data={"train": [{"path": "d" * 90}]})
    assert main(["runs", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.startswith(long))
    assert row.split() == [long, "stopped", "4", "of", "8", "loss", "1", "at", "2", "-", "1.50"]
    assert all(len(line) < 80 + len(long) for line in lines if "go on" not in line)
    assert f"go on with {long}: qaroma finetune --resume --output {(tmp_path / long).as_posix()}" in lines


def test_the_command_to_go_on_has_the_leave_for_the_bases_own_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "own", finished=False, model={"name": "org/own", "trust_remote_code": True})
    assert main(["runs", str(tmp_path)]) == 0
    command = f"qaroma finetune --resume --output {(tmp_path / 'own').as_posix()} --trust-remote-code"
    assert f"go on with own: {command}" in capsys.readouterr().out.splitlines()


def test_runs_as_json_and_where_there_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "runs" / "one")
    assert main(["runs", str(tmp_path / "runs"), "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert (run["name"], run["state"], run["validation"][0]["best"]) == ("one", "finished", 1.0)
    assert "settings" not in run
    (tmp_path / "empty").mkdir()
    assert main(["runs", str(tmp_path / "empty")]) == 0
    assert "no runs in" in capsys.readouterr().out
    assert main(["runs", str(tmp_path / "nowhere")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_compare_shows_differing_settings_figures_and_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = write_run(tmp_path / "one", growth={"t_in": 5, "reset": "prune"})
    two = write_run(tmp_path / "two", growth={"t_in": 9, "reset": "prune"}, answers="wrong", steps=6)
    compared = compare_runs([one, two])
    assert compared.settings == {"growth.t_in": (5, 9)}  # `output` differs too, and says nothing
    assert compared.figures["steps"] == (4, 6)
    assert compared.figures["validation_loss_last"] == (3.0, 5.0)
    assert [(a.prompt, a.answers) for a in compared.answers] == [("p", ("right", "wrong")), ("q", ("fixed", "fixed"))]
    assert main(["compare-runs", str(one), str(two), "--answers", "1"]) == 0
    out = capsys.readouterr().out
    assert "2 prompts in common, 1 answered differently" in out
    assert "growth.t_in" in out
    assert "growth.reset" not in out
    assert "fixed" not in out
    assert main(["compare-runs", str(one), str(two), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["settings"] == {"growth.t_in": [5, 9]}
    assert figures["answers"][0] == {"prompt": "p", "expected": "right", "answers": ["right", "wrong"]}


def test_samples_made_while_training_are_answers_too(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / name, finished=False) for name in ("one", "two")]
    for number, path in enumerate(paths):
        with (path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"event": "samples", "step": 4, "prompts": ["s"], "answers": [f"n{number}"]}) + "\n")
    assert [(a.prompt, a.expected, a.answers) for a in compare_runs(paths).answers] == [("s", None, ("n0", "n1"))]


def test_a_misspelt_run_comes_with_the_nearest_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_run(tmp_path / "quickstart")
    assert main(["compare-runs", str(one), str(tmp_path / "quikstart")]) == 2
    assert f"did you mean {one.as_posix()}?" in capsys.readouterr().err
    assert main(["compare-runs", str(one)]) == 2
    assert "expected two or more" in capsys.readouterr().err


def test_a_real_run_is_read_like_its_own_figures(
    tiny_folder: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "runs" / "real"
    figures = finetune(make_config(tiny_folder, data_file, path, training__max_steps=6), console=Console(quiet=True))
    run = read_run(path)
    found = figures_of(run)
    assert (run.state, run.step) == ("finished", figures["steps"])
    assert (run.metric, found.validation[0].best) == (figures["metric"], figures["metric_best"])
    assert (found.seconds, found.training_seconds) == (figures["seconds"], figures["training_seconds"])
    assert (found.rank_min, found.rank_max) == (figures["rank_min"], figures["rank_max"])
    assert found.trainable_start == figures["trainable_parameters_start"]
    assert found.trainable_mean == figures["trainable_parameters_mean"]
    update = read_adapter(path / "adapter").update.values()
    assert found.adapter_parameters == sum(factors.rank * sum(factors.shape) for factors in update) > 0
    shutil.rmtree(path / "adapter_last")
    (path / "summary.json").unlink(missing_ok=True)
    assert read_run(path).state == "stopped"
