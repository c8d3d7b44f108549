"""What a report reads from runs of all kinds, and the files that it writes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
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
from qaroma.report.keyfigures import key_figures, settings, state
from qaroma.report.names import module_labels
from qaroma.report.panels import Line, Panel, choose_modules, growth_panels, running_mean, thinned, training_panels
from qaroma.report.spectra import component_similarity, read_spectra, similar_modules
from qaroma.report.write import write_report
from qaroma.runs.adapter import write_adapter_files
from qaroma.runs.adapter_info import AdapterInfo, TaskInfo
from qaroma.runs.figures import validation_of
from qaroma.runs.finding import open_run, open_runs
from qaroma.runs.reading import Series, read_run
from qaroma.training.finetune import finetune

QUERY, VALUE, UP = (f"model.layers.{{}}.{kind}" for kind in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"))
MODULES = [kind.format(layer) for layer in range(2) for kind in (QUERY, VALUE, UP)]
# Components of each module at the end of the run below: one grew twice, one ended at once.
COMPONENTS = dict.fromkeys(MODULES, 2) | {MODULES[1]: 3, MODULES[5]: 0}
T_IN, STEPS = 4, 12


def growth_events() -> list[dict[str, Any]]:
    """Lockstep growth to ``COMPONENTS``: discarded where a module is done, kept at the step budget."""
    events = []
    for round_ in (1, 2, 3):
        for module, last in COMPONENTS.items():
            if round_ <= last + 1:
                decision = "keep" if round_ == last == 3 else "commit" if round_ <= last else "done"
                event = {"module": module, "component": round_, "inner": None, "outer": 0.01, "decision": decision}
                events.append({"event": "growth", "step": round_ * T_IN, **event})
    return events


def ranks_events(inner_rank: int = 1) -> list[dict[str, Any]]:
    """What the log says of the same growth, an active component counted."""
    found = [(0, dict.fromkeys(MODULES, 1))]
    for round_ in (1, 2):
        found.append((round_ * T_IN, {m: round_ + 1 if n else 0 for m, n in COMPONENTS.items()}))
    found.append((3 * T_IN, COMPONENTS))
    return [
        {"event": "ranks", "step": step, "ranks": {m: inner_rank * n for m, n in ranks.items()}}
        for step, ranks in found
    ]


def step_line(step: int, **changes: Any) -> dict[str, Any]:
    line = {"step": step, "loss": 3.0 / step, "learning_rate": 1e-3 * step, "mean_rank": 1.0, "active_modules": 6,
            "trainable_parameters": 1000 - 50 * step, "tokens_per_second": 100.0 + step, "seconds": 0.5,
            "memory_bytes": 2**30 + step}  # fmt: skip
    return {**line, **changes}


def write_adapter(folder: Path, components: dict[str, int], inner_rank: int = 1) -> None:
    """A classifier's adapter whose module ``MODULES[1]`` repeats one direction, and whose others never do."""
    update = {}
    for module, count in components.items():
        rank = count * inner_rank
        A, B = torch.eye(rank, 8), torch.eye(rank, 12)
        if module == MODULES[1]:
            A, B = A[:1].repeat(rank, 1), B[:1].repeat(rank, 1)
        update[module] = Factors(A, B)
    info = AdapterInfo(
        {module: [inner_rank] * count for module, count in components.items()}, inner_rank, alpha=2.0, step=STEPS,
        task=TaskInfo(kind="classification", labels=("no", "yes"), head=("classifier",)),
    )  # fmt: skip
    folder.mkdir()
    write_adapter_files(folder, update, info, base="tiny", head={"classifier.weight": torch.zeros(2, 8)})


def make_run(
    folder: Path,
    *,
    lines: Sequence[dict[str, Any]] | None = None,
    finished: bool = True,
    adapter: bool = True,
    inner_rank: int = 1,
    **config: Any,
) -> Path:
    """A run directory as training leaves it; ``lines`` replaces its log, ``config`` adds to its configuration."""
    folder.mkdir()
    growth = {"inner_rank": inner_rank, "t_in": T_IN, "reset": "prune", **config.pop("growth", {})}
    values = {"model": {"name": "tiny"}, "data": {"train": [{"path": "data/rows.jsonl"}]}, "growth": growth,
              "training": {"max_steps": STEPS, "learning_rate": 1e-3}, **config}  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    if lines is None:
        validations = [{"event": "validation", "step": s, "loss": 2.0 - s / 10, "perplexity": 7.0} for s in (0, 6, 12)]
        steps = [step_line(step) for step in range(1, STEPS + 1)]
        lines = [*ranks_events(inner_rank), *steps, *growth_events(), *validations]
    log = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(log, encoding="utf-8")
    if adapter:
        write_adapter(folder / "adapter", COMPONENTS, inner_rank)
    if finished:
        (folder / "summary.json").write_text(json.dumps({"ended": "grown", "seconds": 65.4}), encoding="utf-8")
    return folder


def without(run: Path, event: str) -> Path:
    """The same run with one kind of line gone, as an older version wrote it."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if json.loads(line).get("event") != event]
    (run / "metrics.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")
    return run


def test_a_finished_run_that_was_resumed_is_not_finished(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", finished=False)
    (folder / "summary.json").write_text(json.dumps({"ended": "grown", "steps": STEPS}), encoding="utf-8")
    assert read_run(folder).finished
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as log:
        log.write(json.dumps(step_line(STEPS + 1)) + "\n")
    assert not read_run(folder).finished


def test_the_time_is_of_all_commands_of_an_interrupted_run(tmp_path: Path) -> None:
    lines = [step_line(step, seconds=60.0) for step in range(1, STEPS + 1)]
    assert key_figures(read_run(make_run(tmp_path / "run", lines=lines)))["Time"] == "12 min 00 s"


@pytest.mark.parametrize("log", [b"\xff\xfe\n", b"1\n2\n"])
def test_a_damaged_log_is_told_by_the_runs_name(log: bytes, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "metrics.jsonl").write_bytes(log)
    with pytest.raises(QaromaError, match=r"run is damaged: metrics\.jsonl holds lines"):
        open_run(folder)


def test_series_are_the_log(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run"))
    assert run.series("loss") == Series(list(range(1, 13)), [3.0 / step for step in range(1, 13)])
    assert run.series("trainable_parameters").values == [1000 - 50 * step for step in range(1, 13)]
    assert run.validation("loss") == Series([0, 6, 12], [2.0, 1.4, 0.8])
    assert run.metrics() == ["loss", "perplexity"]
    assert run.total_rank() == Series([0, 4, 8, 12], [6, 10, 15, 11])
    assert run.module_rank(MODULES[5]).values == [1, 0, 0, 0]


def test_what_is_no_number_and_a_line_cut_short_are_left_out(tmp_path: Path) -> None:
    lines = [step_line(1), step_line(2, loss=math.nan), step_line(3, loss=None), step_line(4)]
    run = make_run(tmp_path / "run", lines=lines)
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 5, "lo')
    assert read_run(run).series("loss").steps == [1, 4]
    assert read_run(run).step == 4


@pytest.mark.parametrize("inner_rank", [1, 2])
@pytest.mark.parametrize("adapter", [True, False])
def test_ranks_are_reconstructed_from_growth_as_they_would_have_been_logged(
    tmp_path: Path, inner_rank: int, adapter: bool
) -> None:
    logged = read_run(make_run(tmp_path / "new", inner_rank=inner_rank, adapter=adapter))
    older = read_run(without(make_run(tmp_path / "old", inner_rank=inner_rank, adapter=adapter), "ranks"))
    assert older.ranks == logged.ranks
    assert logged.ranks[-1][1] == {m: inner_rank * n for m, n in COMPONENTS.items()}


def test_ranks_of_an_older_lora_run_are_the_adapters(tmp_path: Path) -> None:
    run = without(without(make_run(tmp_path / "run", method="lora"), "ranks"), "growth")
    assert read_run(run).ranks == [(0, COMPONENTS)]


def test_a_run_is_finished_when_it_says_so_or_when_its_last_adapter_is_of_its_last_step(tmp_path: Path) -> None:
    assert state(read_run(make_run(tmp_path / "a"))) == (
        "Finished after 12 steps: every module has the rank it needs; the adapter is of step 12, the best by validation"
    )
    running = make_run(tmp_path / "b", lines=[step_line(1)], finished=False)
    assert state(read_run(running)) == "Not finished: step 1 of 12"
    older = make_run(tmp_path / "c", finished=False)
    assert not read_run(older).finished
    write_adapter(older / "adapter_last", COMPONENTS)
    assert state(read_run(older)).startswith("Finished after 12 steps: ")


def test_what_is_no_run_is_refused_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "is no run (no config.yaml, no metrics.jsonl); give a run directory" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "nowhere is not there; give a run directory" in capsys.readouterr().err
    run = make_run(tmp_path / "run")
    assert main(["report", str(run), str(run)]) == 2
    assert "was given twice" in capsys.readouterr().err


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for folder in ("mrpc", "rte"):
        (tmp_path / folder).mkdir()
        make_run(tmp_path / folder / "aroma")
    names = [run.name for run in open_runs([tmp_path / "mrpc" / "aroma", tmp_path / "rte" / "aroma"])]
    assert names == ["mrpc/aroma", "rte/aroma"]


def test_the_first_figure_shows_parameters_ranks_and_the_tasks_metric(tmp_path: Path) -> None:
    validations = [{"event": "validation", "step": s, "loss": 1.0, "accuracy": s / 20, "f1": 0.1} for s in (0, 6, 12)]
    lines = [*ranks_events(), *(step_line(s) for s in range(1, STEPS + 1)), *validations]
    run = read_run(make_run(tmp_path / "run", lines=lines, task="classification"))
    panels = {panel.key: panel for panel in growth_panels([run], choose_modules(run), run.metric)}
    assert list(panels) == ["trainable", "rank", "modules", "metric"]
    assert panels["metric"].title == "Validation accuracy"
    assert panels["metric"].lines[0].series == Series([0, 6, 12], [0.0, 0.3, 0.6])
    assert panels["trainable"].lines[0].series == run.series("trainable_parameters")
    assert panels["rank"].lines[0].series == Series([0, 4, 8, 12], [6, 10, 15, 11])
    # One module for each way that ranks went, the highest first.
    assert [line.series.values for line in panels["modules"].lines] == [[1, 2, 3, 3], [1, 2, 3, 2], [1, 0, 0, 0]]
    assert [line.label for line in panels["modules"].lines] == ["v_proj 0", "q_proj 1 and 3 alike", "up_proj 1"]
    bests = {name: validation_of(run, name) for name in ("accuracy", "loss")}
    assert {name: best and (best.best_step, best.best) for name, best in bests.items()} == {
        "accuracy": (12, 0.6),
        "loss": (12, 1.0),  # of the same adapter
    }
    (run.path / "summary.json").write_text('{"metric": "f1"}', encoding="utf-8")
    assert read_run(run.path).metric == "f1"


def test_what_a_run_lacks_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", lines=[step_line(1), step_line(2)], adapter=False, finished=False)
    read = read_run(run)
    assert [panel.key for panel in growth_panels([read], choose_modules(read), "loss")] == ["trainable"]
    report = write_report([run])
    assert {file.name for file in report.files if file.suffix != ".svg"} == {
        "growth.png",
        "training.png",
        "report.png",
        "report.html",
    }
    assert report.missing == ["ranks of run: it has no adapter yet"]
    empty = make_run(tmp_path / "empty", lines=[], adapter=False, finished=False)
    assert [file.name for file in write_report([empty]).files] == ["report.html"]


def test_several_runs_are_lines_with_names(tmp_path: Path) -> None:
    runs = open_runs([make_run(tmp_path / "with"), make_run(tmp_path / "none", growth={"reset": "none"})])
    for panel in [*growth_panels(runs, [MODULES[1]], "loss"), *training_panels(runs)]:
        assert [line.label.removeprefix("v_proj 0, ") for line in panel.lines] == ["with", "none"], panel.key
        assert len({(line.colour, line.style) for line in panel.lines}) == 2


def test_thinning_keeps_the_ends_and_every_peak() -> None:
    values = [math.sin(step / 50) for step in range(10_000)]
    values[4321], values[8765] = 9.0, -9.0
    thin = thinned(Series(range(10_000), values), most=400)
    assert len(thin) <= 402
    assert (thin.steps[0], thin.steps[-1]) == (0, 9999)
    assert max(thin.values) == 9.0
    assert min(thin.values) == -9.0
    assert list(thin.steps) == sorted(set(thin.steps))


def test_a_running_mean_changes_no_straight_line() -> None:
    line = Series(range(100), [3.0 * step for step in range(100)])
    assert running_mean(line).values == pytest.approx(line.values)
    assert running_mean(Series([1], [2.0])).values == [2.0]


def test_effective_ranks_and_cosines_are_the_adapters(tmp_path: Path) -> None:
    spectra = read_spectra(read_run(make_run(tmp_path / "run")))
    assert spectra is not None
    assert spectra.ranks == COMPONENTS
    # Orthogonal components of one size count in full, a repeated one once, none as nothing.
    expected = {module: 1.0 if module == MODULES[1] else float(n) for module, n in COMPONENTS.items()}
    assert spectra.effective == pytest.approx(expected)
    assert spectra.ratio == pytest.approx(9 / 11)
    cosines = component_similarity(spectra, [MODULES[0], MODULES[1], MODULES[5]])
    assert list(cosines) == MODULES[:2]
    assert torch.allclose(cosines[MODULES[0]], torch.eye(2, dtype=torch.float64))
    assert torch.allclose(cosines[MODULES[1]], torch.ones(3, 3, dtype=torch.float64))
    assert similar_modules([spectra])[0] == MODULES[1]


def test_components_of_adalora_are_single_ranks(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", method="adalora", adapter=False)
    write_adapter(run / "adapter", dict.fromkeys(MODULES, 1), inner_rank=4)
    spectra = read_spectra(read_run(run))
    assert spectra is not None
    assert spectra.components == {module: [1, 1, 1, 1] for module in MODULES}
    assert spectra.effective[MODULES[0]] == pytest.approx(4.0)


def test_an_adapter_of_rank_zero_has_no_ratio(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    growth = json.loads((run / "adapter" / "growth.json").read_text(encoding="utf-8"))
    growth["components"] = {module: [] for module in MODULES}
    (run / "adapter" / "growth.json").write_text(json.dumps(growth), encoding="utf-8")
    spectra = read_spectra(read_run(run))
    assert spectra is not None
    assert spectra.ratio is None
    assert write_report([run], formats=["png"]).ratios == {}


def test_key_figures_and_settings_are_the_runs(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run"))
    assert key_figures(run, read_spectra(run)) == {
        "Validation loss": "0.8 at step 12",
        "Rank of the best adapter": "1.83 on average, 0 to 3",
        "Effective rank": "1.50 on average, 81.8 % of the rank",
        # Eleven directions of an 8 x 12 module each, and a head of 2 x 8.
        "Trainable parameters": "950 at first, 675 on average, 400 at the end; 236 in the adapter",
        "Time": "1 min 05 s",
        "Speed": "106 tokens a second",
        "Most memory": "1.00 GiB",
    }
    assert settings(run)["Reset"] == "prune"
    lora = settings(read_run(make_run(tmp_path / "lora", method="lora", rank=8)))
    assert lora["Rank"] == "8"
    flat = [step_line(1, trainable_parameters=7), step_line(2, trainable_parameters=7)]
    even = [{"event": "ranks", "step": 0, "ranks": dict.fromkeys(MODULES, 8)}]
    figures = key_figures(read_run(make_run(tmp_path / "even", lines=[*even, *flat], adapter=False)))
    assert figures["Rank"] == "8 in every module"
    assert figures["Trainable parameters"] == "7 throughout"
    assert "Reset" not in lora


def test_labels_of_modules_are_short_where_that_is_clear() -> None:
    assert module_labels([MODULES[0], MODULES[5]], MODULES) == ["q_proj 0", "up_proj 1"]
    stacks = ["encoder.block.0.q", "decoder.block.0.q"]
    assert module_labels(stacks, stacks) == stacks
    assert module_labels(["proj"], ["proj"]) == ["proj"]


def test_the_command_writes_every_format_and_says_the_ratio(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    assert main(["report", str(run)]) == 0
    out = capsys.readouterr().out
    assert "run: effective rank 1.50 of rank 1.83 (81.8 %)" in out
    figures = [f"{name}.{fmt}" for name in ("growth", "training", "ranks", "cosines") for fmt in ("png", "svg")]
    assert {file.name for file in (run / "report").iterdir()} == {*figures, "report.html", "report.png"}
    assert all((run / "report" / name).as_posix() in out for name in figures)
    assert (run / "report" / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_several_runs_go_into_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [make_run(tmp_path / "with"), make_run(tmp_path / "none", growth={"reset": "none"})]
    report = write_report(runs, formats=["svg"])
    assert [file.as_posix() for file in report.files] == [
        f"report/{name}.svg" for name in ("growth", "training", "ranks-with", "ranks-none", "cosines")
    ]
    drawn = Path("report/cosines.svg").read_text(encoding="utf-8")
    assert "with, reset: prune" in drawn
    assert "none, without reset" in drawn


def test_modules_and_metric_can_be_chosen(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_report([run], formats=["svg"], modules=["1.mlp.up_proj"], metric="perplexity")
    drawn = (run / "report" / "growth.svg").read_text(encoding="utf-8")
    assert "up_proj 1" in drawn
    assert "v_proj 0" not in drawn
    assert "Validation perplexity" in drawn
    with pytest.raises(QaromaError, match="no module of these runs ends so; expected a name, for instance model"):
        write_report([run], modules=["j_proj"])
    with pytest.raises(QaromaError, match="no validation measured it; expected one of: loss, perplexity"):
        write_report([run], metric="bleu")


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    first, second = (write_report([run], output=tmp_path / name).files for name in "ab")
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]
    assert all("<dc:date>" not in f.read_text(encoding="utf-8") for f in first if f.suffix == ".svg")


def test_unknown_formats_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path), "--format", "png,pdf"]) == 2
    assert "got pdf; expected some of png,svg,html" in capsys.readouterr().err


def test_figures_without_matplotlib_are_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(run)]) == 2
    assert "pip install 'qaroma[report]'" in capsys.readouterr().err
    assert main(["report", str(run), "--format", "html"]) == 0


def test_drawing_leaves_matplotlibs_settings_and_pyplot_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", adapter=False)
    code = (
        "import sys, matplotlib; before = matplotlib.rcParams.copy(); from qaroma.report.write import write_report;"
        f"write_report([{str(run)!r}], formats=['png']); assert matplotlib.rcParams.copy() == before;"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_a_panel_of_many_lines_names_them_all() -> None:
    from qaroma.report.drawings import panels_figure

    lines = [Line(f"run {place}", Series([0, 5], [1.0, place]), place, place % 4) for place in range(12)]
    figure = panels_figure([Panel("a", "A", lines[:1], 5), Panel("b", "B", lines, 5)])
    assert [len(axes.lines) for axes in figure.axes] == [1, 12]
    assert [line.get_ydata()[1] for line in figure.axes[1].lines] == list(range(12))
    legend = figure.axes[1].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [f"run {place}" for place in range(12)]


def test_a_real_run_is_read_as_it_was(tiny_folder: Path, data_file: Path, tmp_path: Path) -> None:
    config = make_config(tiny_folder, data_file, tmp_path / "run", growth__eps_out=0.05, training__max_steps=18)
    figures = finetune(config, console=Console(quiet=True))
    run = read_run(tmp_path / "run")
    spectra = read_spectra(run)
    assert run.finished
    assert run.step == figures["steps"]
    assert run.series("trainable_parameters").values[0] == figures["trainable_parameters_start"]
    assert run.total_rank().values[0] == len(run.modules()) == 14
    logged = {line["step"]: line["mean_rank"] for line in run.steps}
    for step, ranks in run.ranks[1:]:
        if step in logged and step < run.step:
            assert sum(ranks.values()) / 14 == pytest.approx(logged[step])
    assert spectra is not None
    assert all(spectra.effective[module] <= rank + 1e-9 for module, rank in spectra.ranks.items())
    assert len(write_report([tmp_path / "run"]).files) >= 7
