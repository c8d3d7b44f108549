"""`qaroma compare`: what is asked, how runs are carried out, and what the figures say."""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics as reference
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from qaroma.cli import main
from qaroma.compare.collect import MethodFigures, RunFigures, collect, reference_of
from qaroma.compare.machine import one_card_each
from qaroma.compare.processes import Folder, carry_out
from qaroma.compare.specs import PlannedRun, parse_spec, plan_runs, shared_settings
from qaroma.compare.statistics import deviation, difference, mean
from qaroma.compare.table import markdown
from qaroma.compare.verdict import verdict
from qaroma.config.load import dump_config, read_settings
from qaroma.config.schema import Config
from qaroma.errors import QaromaError
from qaroma.method.factors import Factors
from qaroma.runs.adapter import write_adapter
from qaroma.runs.adapter_info import AdapterInfo
from qaroma.runs.directory import RunDirectory
from qaroma.runs.reading import read_run
from qaroma.runs.stop import StopRequest

QUIET = Console(quiet=True)


def from_sets(sets: Sequence[str]) -> Config:
    return read_settings(None, {"model.name": "m", "data.train": ["d.jsonl"]}, list(sets))


# What is asked.


def test_a_method_is_read_with_its_rank_and_its_settings() -> None:
    assert parse_spec("aroma", 8).sets == ("method=aroma", "rank=8")
    lora = parse_spec("lora", 8)
    assert (lora.label, lora.rank, lora.sets) == ("lora:8", 8, ("method=lora", "rank=8"))
    spec = parse_spec("aroma+init=gradient+outer_criterion=update+eps_out=1e+1", 8)
    assert spec.label == "aroma+init=gradient+outer_criterion=update+eps_out=1e+1"
    assert spec.sets[2:] == ("growth.init=gradient", "growth.outer_criterion=update", "growth.eps_out=1e+1")
    assert parse_spec("lora:4+training.learning_rate=1e-3", 8).sets[1:] == ("rank=4", "training.learning_rate=1e-3")
    assert ":" not in parse_spec("lora:4+target_modules=[q_proj, v_proj]", 8).folder(0)
    assert parse_spec("lora:4", 8).folder(3) == "lora-4-s3"


def test_each_run_has_its_own_seed_and_the_rest_in_common() -> None:
    runs = plan_runs(from_sets, "aroma+reset=none,lora:4+target_modules=[q_proj,v_proj],adalora", "0,7", "out")
    assert [(run.spec.label.split("+")[0], run.seed) for run in runs] == [
        ("aroma", 0), ("lora:4", 0), ("adalora:8", 0), ("aroma", 7), ("lora:4", 7), ("adalora:8", 7),
    ]  # fmt: skip
    assert runs[0].config.growth.reset == "none"
    assert runs[1].config.growth.reset is None
    assert runs[1].config.growth.target_modules == ["q_proj", "v_proj"]
    assert (runs[1].config.rank, runs[2].config.rank, runs[3].config.training.seed) == (4, 8, 7)
    assert len({run.config.output for run in runs}) == 6
    assert len({dump_config(run.config.model_copy(update={"output": None})) for run in runs}) == 6


def test_all_problems_are_said_before_anything_runs() -> None:
    methods = (
        "aorma,aroma:4,lora:x,lora+data.max_length=3+training.seed=1+rank=4,aroma+rest=none+eps_out=small,lora,lora:8"
    )
    with pytest.raises(QaromaError) as caught:
        plan_runs(from_sets, methods, "0,one", "out")
    text = str(caught.value)
    for expected in (
        "--seeds: got 'one'",
        "no such method: 'aorma'; did you mean aroma?",
        "aroma finds its ranks; leave out :4",
        "got the rank 'x'",
        "data.max_length is the same for all methods; type --set data.max_length=3",
        "training.seed is the same for all methods",
        "rank stands before the settings",
        "aroma+rest=none+eps_out=small: rest: unknown key; did you mean growth.reset?",
        "growth.eps_out: got 'small'; expected a number",
        "lora:8: given twice",
    ):
        assert expected in text
    assert text.startswith("10 problems:")
    with pytest.raises(QaromaError, match="each seed once"):
        plan_runs(from_sets, "aroma", "1,1", "out")


def test_settings_that_silently_hold_for_all_are_named() -> None:
    assert shared_settings(from_sets(["growth.alpha=4", "training.learning_rate=1e-3"])) == [
        "growth.alpha=4", "training.learning_rate=0.001",
    ]  # fmt: skip
    runs = plan_runs(lambda more: from_sets(["growth.alpha=4", *more]), "aroma,lora:8+alpha=null", "0", "out")
    assert [run.config.growth.alpha for run in runs] == [4, None]


def test_runs_have_equal_steps_unless_patience_is_asked_for() -> None:
    assert [run.config.training.patience for run in plan_runs(from_sets, "aroma,lora:8", "0", "out")] == [0, 0]
    asked = plan_runs(lambda more: from_sets(["training.patience=4", *more]), "aroma", "0", "out")
    assert asked[0].config.training.patience == 4


# Statistics and verdict.


def test_statistics_equal_the_standard_librarys() -> None:
    values = torch.randn(7, dtype=torch.float64).tolist()
    assert mean(values) == pytest.approx(reference.mean(values))
    assert deviation(values) == pytest.approx(reference.stdev(values))
    assert deviation([1.0]) is None


def test_a_difference_is_paired_where_seeds_are_the_same() -> None:
    ours, theirs = {0: 0.8, 1: 0.6, 2: 0.7}, {0: 0.79, 1: 0.58, 2: 0.7, 9: 0.1}
    found = difference(ours, theirs)
    assert (found.paired, found.count) == (True, 3)
    assert found.mean == pytest.approx(0.01)
    assert found.error == pytest.approx(reference.stdev([0.01, 0.02, 0.0]) / math.sqrt(3))
    apart = difference(ours, {5: 0.7, 6: 0.9})
    assert not apart.paired
    assert apart.mean == pytest.approx(-0.1)
    assert apart.error == pytest.approx(math.sqrt(0.1**2 / 3 + reference.stdev([0.7, 0.9]) ** 2 / 2))
    assert difference({0: 1.0}, {0: 0.5}).error is None


def figures(seed: int, last: float | None, *, metric: str = "accuracy", **changes: Any) -> RunFigures:
    values: dict[str, Any] = {
        "seed": seed, "run": f"r{seed}", "metric": metric, "last": last, "best": last, "exact_match": None,
        "parameters_start": 800, "parameters_mean": 800.0, "parameters_end": 800, "parameters_most": 800,
        "modules": 4, "rank": 32, "effective_rank": 16.0, "steps": 100, "ended": "budget", "step_seconds": 0.1,
        "seconds": 10.0, "memory_bytes": 1000,
    }  # fmt: skip
    return RunFigures(**{**values, **changes})


def method(name: str, lasts: Sequence[float | None], **changes: Any) -> MethodFigures:
    runs = [figures(seed, last, **changes) for seed, last in enumerate(lasts)]
    return MethodFigures(parse_spec(name, 8), runs, {})


SMALL = {"parameters_start": 100, "parameters_mean": 40.0, "parameters_end": 0, "parameters_most": 100,
         "rank": 10, "effective_rank": 9.5, "ended": "grown"}  # fmt: skip


def outcomes(methods: Sequence[MethodFigures]) -> list[tuple[str, bool | None]]:
    return [(claim.key, claim.held) for claim in verdict(methods)]


def test_the_claims_hold_where_the_figures_bear_them_out() -> None:
    lora, adalora = method("lora:8", [0.80, 0.82, 0.81]), method("adalora:8", [0.7, 0.7, 0.7])
    # one standard error of paired differences -0.01, +0.01, -0.015 is 0.0076: 0.005 below is within noise
    near = method("aroma", [0.79, 0.83, 0.795], **SMALL)
    assert outcomes([near, lora, adalora]) == [("a", True), ("a", True), ("b", True), ("c", True)]
    worse = method("aroma", [0.79, 0.81, 0.80], **SMALL)  # 0.01 below each time: no noise at all
    assert outcomes([worse, lora, adalora])[:2] == [("a", False), ("a", True)]
    stronger = method("lora:8+training.learning_rate=1e-3", [0.9, 0.9, 0.9])
    assert outcomes([near, lora, stronger, adalora])[0] == ("a", False)  # against the best LoRA of rank 8


def test_less_is_better_for_a_loss() -> None:
    lora, adalora = method("lora:8", [1.0, 1.1], metric="loss"), method("adalora:8", [1.0, 1.1], metric="loss")
    assert outcomes([method("aroma", [0.8, 0.9], metric="loss", **SMALL), lora, adalora])[0] == ("a", True)
    assert outcomes([method("aroma", [1.2, 1.3], metric="loss", **SMALL), lora, adalora])[0] == ("a", False)


@pytest.mark.parametrize(
    ("changes", "held"),
    [
        ({}, True),
        ({"parameters_most": 101}, False),  # more than 1/8 at one moment
        ({"parameters_mean": 51.0}, False),  # more than 1/16 on average
    ],
)
def test_parameters_are_judged_at_every_moment_and_on_average(changes: dict[str, Any], held: bool) -> None:
    methods = [method("aroma", [0.8, 0.8], **{**SMALL, **changes}), method("peft-lora:8", [0.8, 0.8])]
    assert [claim.held for claim in verdict(methods) if claim.key == "b"] == [held]


def test_claims_that_cannot_be_judged_are_left_open() -> None:
    one = verdict([method("aroma", [0.8], **SMALL), method("lora:8", [0.7]), method("adalora:8", [0.7])])
    assert [claim.held for claim in one] == [None, None, True, True]
    assert "one run of each cannot tell a difference from noise" in one[0].text
    alone = verdict([method("aroma", [0.8, 0.9], **SMALL), method("lora:4", [0.7, 0.7])])
    assert [claim.held for claim in alone] == [None, None, None, True]
    assert "lora:8 was not run" in alone[0].text
    assert [claim.held for claim in verdict([method("lora:8", [0.7, 0.8])])] == [None] * 3
    unscored = verdict([method("aroma", [None, None], **SMALL), method("lora:8", [None, None])])
    assert "no validation data" in unscored[0].text
    empty = {**SMALL, "rank": 0, "effective_rank": 0.0}
    assert verdict([method("aroma", [0.8, 0.9], **empty)])[-1].held is None


def test_the_table_divides_by_the_lora_of_rank_8() -> None:
    methods = [method("lora:4", [0.7, 0.8], seconds=5.0), method("lora:8", [0.8, 0.9]),
               method("aroma", [0.85, 0.95], seconds=15.0, memory_bytes=500, steps=35_000, **SMALL)]  # fmt: skip
    assert reference_of(methods) is methods[1]
    assert reference_of(methods[:1]) is methods[0]
    assert reference_of(methods[2:]) is None
    text = markdown(methods, methods[1], verdict(methods), command="qaroma compare ...", machines=["a machine"])
    row = next(line for line in text.splitlines() if line.startswith("| aroma"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["aroma", "2", "0.9 ± 0.071", "0.9 ± 0.071", "100", "40", "0", "0.125", "0.050", "10", "9.5",
                     "0.950", "35,000", "grown x 2", "1.500", "0.500"]  # fmt: skip
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    assert "Claims that the paper makes of its method (aroma+preset=paper), held against every aroma here:" in text
    without = markdown(methods[2:], None, [], command="", machines=[])
    assert "| - |" in without


# Runs.


def write_run(folder: Path, *, steps: int = 4) -> None:
    """A finished run, as the loop leaves it."""
    run = RunDirectory(folder)
    run.create("model: {name: m}\nmethod: aroma\ntask: classification\n")
    lines = [{"step": s, "loss": 1.0, "trainable_parameters": 90 - 10 * s, "seconds": 9.0 if s == 2 else 1.0,
              "memory_bytes": 7} for s in range(1, steps + 1)]  # fmt: skip
    lines += [{"event": "validation", "step": s, "accuracy": a} for s, a in ((0, 0.1), (2, 0.75), (4, 0.5))]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    summary = {"metric": "accuracy", "steps": steps, "trainable_parameters_start": 90, "ended": "grown",
               "training_seconds": 14.0}  # fmt: skip
    A, B = torch.eye(8)[:2], torch.eye(6)[:2]
    update = {"m.a": Factors(A, B), "m.b": Factors(A[:0], B[:0])}
    write_adapter(run.adapter, update, AdapterInfo({"m.a": [1, 1], "m.b": []}, 1, 1.0), base="b")
    last = {**update, "m.a": Factors(torch.eye(8)[:3], torch.eye(6)[:3])}
    write_adapter(run.adapter_last, last, AdapterInfo({"m.a": [1, 1, 1], "m.b": []}, 1, 1.0), base="b")
    run.summary.write_text(json.dumps(summary), encoding="utf-8")


def test_figures_of_a_run_are_read_from_its_directory(tmp_path: Path) -> None:
    write_run(tmp_path / "aroma-s3")
    found = collect(read_run(tmp_path / "aroma-s3"), 3)
    assert (found.last, found.best, found.metric) == (0.5, 0.75, "accuracy")
    assert (found.parameters_start, found.parameters_mean, found.parameters_most) == (90, 65.0, 90)
    assert (found.rank, found.modules) == (2, 2)  # of the best adapter, not of the last one
    assert found.effective_rank == pytest.approx(2.0)  # two equal singular values
    assert found.step_seconds == 1.0  # the step that waited for others does not count
    assert found.seconds == pytest.approx(4 * 1.0 + 2.0)  # 14 seconds in all, 12 in steps: 2 beside them


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What is run in the place of Python; its arguments are those of the real command."""
    if os.name == "nt":
        pytest.skip("the stand-in is a shell script")

    def use(script: str, interpreter: str = "/bin/sh") -> None:
        path = tmp_path / "stand-in"
        path.write_text(f"#!{interpreter}\n{script}\n", encoding="utf-8")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return use


def carried_out(
    folder: Path, cards: Sequence[str | None] = (None,), *, seeds: str = "0", stop: StopRequest | None = None
) -> dict[str, str | None]:
    """What became of each run that ended, and whether all were stopped."""
    ended: dict[str, str | None] = {}

    def note(planned: PlannedRun, reason: str | None) -> None:
        ended[planned.name] = reason

    runs = plan_runs(from_sets, "lora:8", seeds, str(folder))
    try:
        carry_out(runs, Folder(folder), QUIET, stop or StopRequest(), note, cards)
    except KeyboardInterrupt:
        ended["stopped"] = None
    return ended


def test_a_run_that_fails_costs_only_itself(tmp_path: Path, stand_in: Any) -> None:
    stand_in('echo "$@"; echo error: no such model; exit 2')
    assert carried_out(tmp_path) == {"lora-8-s0": "error: no such model"}
    planned, folder = plan_runs(from_sets, "lora:8", "0", str(tmp_path))[0], Folder(tmp_path)
    printed = folder.log(planned).read_text(encoding="utf-8")
    assert "-m qaroma.cli.attached finetune --config" in printed
    assert "--resume" not in printed
    assert read_settings(folder.asked(planned), {}, []) == planned.config
    RunDirectory(tmp_path / "lora-8-s0").create("method: lora\n")  # it began, this time
    carried_out(tmp_path)
    assert "--resume" in folder.log(planned).read_text(encoding="utf-8")


def test_runs_side_by_side_have_a_card_each(tmp_path: Path, stand_in: Any) -> None:
    # Each of the first two waits for the other; the third takes the card that is free.
    both_began = "for i in $(seq 200); do [ $(ls began-* | wc -l) -ge 2 ] && break; sleep 0.05; done"
    stand_in(f"cd {tmp_path}; touch began-$$; {both_began}; echo card $CUDA_VISIBLE_DEVICES; exit 2")
    ended = carried_out(tmp_path, ["2", "GPU-7"], seeds="0,1,2")
    assert {ended["lora-8-s0"], ended["lora-8-s1"]} == {"card 2", "card GPU-7"}
    assert ended["lora-8-s2"] in {"card 2", "card GPU-7"}
    assert len(list(tmp_path.glob("began-*"))) == 3
    assert set(json.loads((tmp_path / "hardware.json").read_text(encoding="utf-8"))) == set(ended)


def test_the_cards_of_the_children_are_those_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(QaromaError, match=r"got --gpus 1, but torch sees no GPU here\. Leave it out"):
        one_card_each(1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert one_card_each(2) == ["0", "1"]
    with pytest.raises(QaromaError, match=r"got --gpus 3, but torch sees 2 GPUs here\. Type: --gpus 2"):
        one_card_each(3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-7,-1,0")  # CUDA takes nothing behind what it does not know
    assert one_card_each(2) == ["3", "GPU-7"]
    assert one_card_each(1) == ["3"]


def test_gpus_are_refused_where_they_are_of_no_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rest = ["compare", "--data", str(tmp_path), "--output", str(tmp_path / "out"), "--gpus", "2"]
    assert main([*rest, "--suite", "growth"]) == 2
    assert "a suite runs on the CPU. Type: --jobs 2" in capsys.readouterr().err
    assert main([*rest, "--model", "smollm2-135m", "--methods", "aroma", "--device", "cpu"]) == 2
    assert "got --gpus 2 with device cpu" in capsys.readouterr().err


def test_a_request_to_stop_is_passed_on_and_waited_for(tmp_path: Path, stand_in: Any) -> None:
    # Python, not a shell: a shell that was started in the background can't trap the signal.
    script = (
        "import os, pathlib, signal, sys, time\n"
        "def stop(*_):\n"
        f"    (pathlib.Path({str(tmp_path)!r}) / ('saved-' + os.environ['CUDA_VISIBLE_DEVICES'])).touch()\n"
        "    sys.exit(130)\n"
        "signal.signal(signal.SIGINT, stop)\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)"
    )
    stand_in(script, sys.executable)

    class Later(StopRequest):
        @property
        def requested(self) -> bool:
            return sum("ready" in log.read_text(encoding="utf-8") for log in tmp_path.glob("logs/*.log")) == 2

        @requested.setter
        def requested(self, value: bool) -> None: ...

    assert carried_out(tmp_path, ["0", "1"], seeds="0,1,2", stop=Later()) == {"stopped": None}
    assert {file.name for file in tmp_path.glob("saved-*")} == {"saved-0", "saved-1"}


def test_no_run_outlives_a_comparison_that_is_killed(tmp_path: Path) -> None:
    """Each waits for the end of its input, which comes with the end of the process that began it."""
    if os.name == "nt":
        pytest.skip("the stand-in is a shell script")
    run = tmp_path / "stand-in"
    run.write_text(f"#!/bin/sh\ncd {tmp_path}\ntouch began-$$\ncat\ntouch gone-$$\n", encoding="utf-8")
    run.chmod(0o755)
    script = (
        "import sys\n"
        "from rich.console import Console\n"
        "from qaroma.compare.processes import Folder, carry_out\n"
        "from qaroma.compare.specs import plan_runs\n"
        "from qaroma.config.load import read_settings\n"
        "from qaroma.runs.stop import StopRequest\n"
        f"folder, sys.executable = {str(tmp_path)!r}, {str(run)!r}\n"
        "config = lambda sets: read_settings(None, {}, ['training.device=cpu', *sets])\n"
        "runs = plan_runs(config, 'lora', '0,1', folder)\n"
        "carry_out(runs, Folder(folder), Console(quiet=True), StopRequest(), print, ['0', '1'])\n"
    )
    with subprocess.Popen([sys.executable, "-c", script]) as comparison:
        wait_until(lambda: len(list(tmp_path.glob("began-*"))) == 2)
        comparison.kill()
    wait_until(lambda: len(list(tmp_path.glob("gone-*"))) == 2)


def wait_until(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture(scope="module")
def compared(tiny_folder: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """A comparison in processes of their own, as a user types it."""
    folder = tmp_path_factory.mktemp("compare")
    config = folder / "tiny.yaml"
    config.write_text(
        f"model: {{name: {json.dumps(str(tiny_folder))}, compute_dtype: fp32}}\n"
        f"data: {{train: {json.dumps(str(data_file))}, validation: {json.dumps(str(data_file))}}}\n"
        "growth: {t_in: 3, check_every: 1, warmup: 1, restart_warmup: 1}\n"
        "training: {max_steps: 9, micro_batch: 4, grad_accum: 2, device: cpu, learning_rate: 5.0e-3}\n"
        "checkpoint: {every: 4}\n",
        encoding="utf-8",
    )
    command = ["compare", "--config", str(config), "--methods", "aroma,adalora:8", "--seeds", "0,1",
               "--output", str(folder / "out"), "--json"]  # fmt: skip
    assert main(command) == 0
    return command, folder / "out"


def test_a_small_comparison_from_beginning_to_end(
    compared: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command, out = compared
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert [(m["method"], m["n"], m["failed"]) for m in results["methods"]] == [("aroma", 2, {}), ("adalora:8", 2, {})]
    aroma, adalora = results["methods"]
    assert aroma["mean"]["parameters_start"] * 12 < adalora["mean"]["parameters_start"] + 12 * 14  # 12 and its E
    assert adalora["mean"]["rank"] == 8 * 14
    assert all(run["steps"] <= 9 for m in results["methods"] for run in m["runs"])
    assert results["metric"] == "loss"
    assert len({run["last"] for m in results["methods"] for run in m["runs"]}) == 4
    table = (out / "table.md").read_text(encoding="utf-8")
    assert "qaroma compare --config" in table
    assert "torch" in table
    assert "(c) aroma" in table
    assert (out / "plot.png").is_file()
    assert (out / "plot.svg").is_file()
    # All runs are finished: the table is made again, and nothing is run.
    (out / "table.md").unlink()
    assert main([*command, "--table-only"]) == 0
    assert json.loads(capsys.readouterr().out)["methods"] == results["methods"]
    assert (out / "table.md").read_text(encoding="utf-8") == table


def test_what_is_missing_is_run_and_the_rest_is_left_alone(
    compared: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, whole = compared
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    command = [*command[:-2], str(out), "--json"]
    run = RunDirectory(out / "adalora-8-s1")
    run.summary.unlink()
    shutil.rmtree(run.adapter_last)
    shutil.rmtree(sorted(run.checkpoints.iterdir())[-1])  # back to the checkpoint before
    others = {p: p.stat().st_mtime_ns for p in out.glob("a*/**/*") if p.is_file() and run.path not in p.parents}
    assert main([*command, "--table-only"]) == 0
    partial = json.loads(capsys.readouterr().out)
    assert [(m["n"], m["failed"]) for m in partial["methods"]] == [(2, {}), (1, {"1": "not finished"})]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert "1/1  adalora-8-s1" in captured.err
    again, before = json.loads(captured.out), json.loads((whole / "results.json").read_text(encoding="utf-8"))
    for now, then in zip(again["methods"], before["methods"], strict=True):
        for key in ("last", "best", "rank", "effective_rank", "parameters_mean"):
            assert [r[key] for r in now["runs"]] == [r[key] for r in then["runs"]]
    assert "resuming" in Folder(out).path.joinpath("logs", "adalora-8-s1.log").read_text(encoding="utf-8")
    assert {p: p.stat().st_mtime_ns for p in others} == others


def test_other_settings_are_refused_before_anything_runs(
    compared: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command, _ = compared
    assert main([*command, "--set", "growth.t_in=4", "--set", "growth.warmup=null"]) == 2
    text = capsys.readouterr().err
    for name in ("aroma-s0", "adalora-8-s1"):
        assert f"{name}: growth.t_in was 3, now 4" in text
        assert f"{name}: growth.warmup was 1, now None" in text
    assert "choose another --output" in text
    assert main([*command, "--max-steps", "10"]) == 2
    assert "training.max_steps was 9, now 10" in capsys.readouterr().err


def test_settings_that_do_not_go_together_are_refused_before_anything_runs(
    compared: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, _ = compared
    methods = ["--methods", "aroma+max_rank=1+inner_rank=2,aroma+warmup=5,lora:2", "--output", str(tmp_path / "out")]
    assert main([*command, *methods]) == 2
    text = capsys.readouterr().err
    assert "aroma+max_rank=1+inner_rank=2: max_rank 1 holds no component" in text
    assert "aroma+warmup=5: " in text
    assert not list((tmp_path / "out").glob("*/config.yaml"))
    assert main([*command[:-2], str(tmp_path / "none"), "--table-only"]) == 2
    assert "not finished" in capsys.readouterr().err


def test_a_method_that_is_not_compared_is_not_judged(tiny_folder: Path, data_file: Path, tmp_path: Path) -> None:
    """Inner loops would refuse this warm-up; LoRA takes it, and nothing else is asked for."""
    from qaroma.compare.compare import _prepare

    def make(sets: Sequence[str]) -> Config:
        values = [f"model.name={tiny_folder}", f"data.train={data_file}", "growth.warmup=5", "training.max_steps=9"]
        return read_settings(None, {}, [*values, *sets])

    for methods in ("lora:2", "aroma+schedule=lockstep+warmup=1+restart_warmup=1"):
        runs = plan_runs(make, methods, "0", str(tmp_path))
        _prepare(make, runs, runs, QUIET)
    runs = plan_runs(make, "aroma+schedule=lockstep", "0", str(tmp_path))
    with pytest.raises(QaromaError, match=r"^aroma\+schedule=lockstep: an inner loop of t_in = 2 steps must be longer"):
        _prepare(make, runs, runs, QUIET)


@pytest.mark.parametrize(("methods", "seeds"), [("lora:²", "0"), ("lora:8", "²")])
def test_a_digit_that_is_no_number_is_no_number(methods: str, seeds: str) -> None:
    with pytest.raises(QaromaError, match=r"expected (a whole number|whole numbers)"):
        plan_runs(from_sets, methods, seeds, "out")
