"""Every table that waits for a card, filled in one go: ``qaroma bench --sheet FOLDER``.

One base is made and taken down the memory levels, so that its weights are packed once. Each cell is a JSON file,
written as soon as it is measured: a sheet that was cut goes on where it was. So is the plan that all are held against.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qaroma.bench.contestants import Step, examples, growing, peft_step, random_base, step_of, twin
from qaroma.bench.measure import Spread, busy_seconds, peak_bytes, seconds_per_step, synchronise
from qaroma.bench.sheet_table import sheet_table
from qaroma.config.levels import FRAGMENTS, LEVELS
from qaroma.engine.levels import apply_level
from qaroma.engine.no_memory import card_is_full
from qaroma.method.aroma import GrowthController
from qaroma.model.base import device_name, resolve_device
from qaroma.model.precision import resolve_dtype
from qaroma.plan.card import CONTEXT, RESERVE
from qaroma.plan.search import GRAIN, Estimate, Planner
from qaroma.plan.shapes import model_config
from qaroma.plan.trace import StepSettings
from qaroma.plan.weightless_model import tensors_of
from qaroma.runs.files import read_json, write_atomically
from qaroma.training.memory import free_bytes

LENGTHS = (512, 2048, 8192, 32_768)
EMULATED = (6, 8, 12, 16, 24)  # GiB
LONGEST_AT, LONGEST_ON = 3, (6, 8)  # memory level, and GiB of the cards
FROZEN = 64  # ranks beside 1
LONG = 16_384  # tokens from which on a step takes seconds, and only one is timed
GPU_TESTS = Path(__file__).resolve().parents[2] / "tests" / "test_gpu.py"


@dataclass(frozen=True)
class SheetPlan:
    """What the cells are held against.

    Attributes:
        peaks: tokens -> bytes of a step at each level.
        longest: GiB of a card -> the longest context at level :data:`LONGEST_AT`, in tokens, and its bytes.
    """

    peaks: dict[int, list[int]]
    longest: dict[int, tuple[int, int]]

    @classmethod
    def of(
        cls, planner: Planner, dtype: torch.dtype, lengths: tuple[int, ...] = LENGTHS, *, card: bool = True
    ) -> SheetPlan:
        """The plan of a model, which takes half a minute for a deep one; ``card`` as in a step's settings."""

        def settings(level: int, length: int) -> StepSettings:
            return StepSettings(level, length, frozen_rank=0, dtype=dtype, card=card)

        def longest(gib: int) -> Estimate | None:
            return planner.longest_context(settings(LONGEST_AT, GRAIN), gib * 2**30 - RESERVE)

        peaks = {n: [planner.estimate(settings(level, n)).peak for level in range(len(LEVELS))] for n in lengths}
        found = {gib: longest(gib) for gib in LONGEST_ON}
        return cls(peaks, {gib: (step.settings.seq_len, step.peak) for gib, step in found.items() if step})

    @classmethod
    def read(cls, path: Path) -> SheetPlan:
        """A plan that was written as JSON, where numbers cannot be keys."""
        plan = read_json(path)
        peaks = {int(length): found for length, found in plan["peaks"].items()}
        return cls(peaks, {int(gib): (length, peak) for gib, (length, peak) in plan["longest"].items()})


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
        kind: ``level``; ``card``, a card that is emulated; ``longest``, the longest context there; ``frozen``; or
            ``growth``.
        level, length: memory level and tokens.
        planned: peak by :class:`~qaroma.plan.search.Planner`, in bytes.
        gib: of the emulated card.
    """

    kind: str
    level: int
    length: int
    planned: int
    gib: int = 0

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.gib or self.level}-{self.length}"


def cells_of(plan: SheetPlan, room: int) -> list[Cell]:
    """What is measured, from the first level down: every level and length that fits, then what hangs on them.

    Args:
        plan: of the model.
        room: bytes that a step may take.
    """
    cells, usual = [], list(plan.peaks)[1:3]  # a card is emulated at the two in the middle
    for length, peaks in plan.peaks.items():
        cells += [Cell("level", level, length, peak) for level, peak in enumerate(peaks) if peak <= room]
        for gib in EMULATED if length in usual else ():
            held = [n for n, peak in enumerate(peaks) if peak <= min(gib * 2**30 - RESERVE, room)]
            cells += [Cell("card", level, length, peaks[level], gib) for level in held[:1]]
        if length == usual[0] and peaks[1] <= room:
            cells += [Cell(kind, 1, length, peaks[1]) for kind in ("frozen", "growth")]
    for gib, (length, peak) in plan.longest.items():
        cells += [Cell("longest", LONGEST_AT, length, peak, gib)] if peak <= room else []
    return sorted(cells, key=lambda cell: (cell.level, cell.length))


def fill_sheet(
    model: str, folder: Path, *, device: str = "auto", lengths: tuple[int, ...] = LENGTHS,
    tell: Callable[[str], None] = lambda _: None,
) -> str:  # fmt: skip
    """Measure every cell that is not there yet, and write ``table.md``.

    Args:
        model: a built-in shape, or a config.json; its weights are random.
        folder: of the cells' files.
        device: as in a run.
        lengths: tokens.
        tell: called with each cell's name and figures.

    Returns:
        The table, in Markdown.
    """
    target = resolve_device(device)
    config = model_config(model)
    dtype = resolve_dtype("auto", target, config)
    folder.mkdir(parents=True, exist_ok=True)
    planned = folder / "plan.json"
    if not planned.exists():
        plan = SheetPlan.of(Planner(config), dtype, lengths, card=target.type == "cuda")
        write_atomically(planned, json.dumps(asdict(plan)))
    cells = cells_of(SheetPlan.read(planned), free_bytes(target) - FRAGMENTS)
    missing = [cell for cell in cells if not (folder / f"{cell.name}.json").exists()]
    bench: _Bench | None = _Bench(config, target, dtype) if missing else None
    for cell in missing:
        assert bench is not None
        start = time.perf_counter()
        figures = {**asdict(cell), "device": device_name(target), **bench.measured(cell)}
        figures["seconds"] = time.perf_counter() - start
        write_atomically(folder / f"{cell.name}.json", json.dumps(figures, indent=1))
        tell(f"{cell.name}: {figures['outcome']}, {figures['seconds']:.0f} s")
    del bench
    tests = folder / "gpu-tests.json"
    if target.type == "cuda" and GPU_TESTS.exists() and not tests.exists():
        _clean(target)
        write_atomically(tests, json.dumps({"outcome": _gpu_tests()}))
        tell(f"gpu-tests: {read_json(tests)['outcome']}")
    table = sheet_table(model, [read_json(folder / f"{cell.name}.json") for cell in cells])
    write_atomically(folder / "table.md", table)
    return table


class _Bench:
    """A base with random weights, and qaroma's adapter on it, that go down the levels together."""

    def __init__(self, config: Any, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.vocabulary = device, int(config.get_text_config().vocab_size)
        self.base = random_base(config, dtype=dtype, device=device)
        self.plain: Any = twin(self.base)  # the same weights without an adapter, while they lie on the device
        self.method = growing(self.base)
        self.level = -1

    def measured(self, cell: Cell) -> dict[str, Any]:
        """Figures of a cell; where there is no memory for it, that alone."""
        if cell.level != self.level:
            if cell.level >= 2:
                self.plain = None
            apply_level(self.base, cell.level)
            self.level = cell.level
        _clean(self.device)
        with _where_memory_lasts():
            return {"outcome": "ran", **getattr(self, f"_{cell.kind}")(cell)}
        self.base.zero_grad(set_to_none=True)
        return {"outcome": "no memory"}

    def _rows(self, cell: Cell) -> Any:
        return examples(self.vocabulary, rows=1, length=cell.length)

    def _resident(self, model: Any, method: GrowthController | None) -> list[torch.Tensor]:
        return [*tensors_of(model), *(method.trainer.optimiser.buffers().values() if method else ())]

    def _level(self, cell: Cell) -> dict[str, Any]:
        ours = step_of(self.base, self.method, self._rows(cell))
        if cell.length <= LONG:
            ours()  # makes what the others find
        figures = self._where_there_is(cell.planned + FRAGMENTS, ours)
        if not figures:  # more than was planned: how much, and how fast all the same
            _clean(self.device)
            figures = {"beyond": True, **self._peak(ours)}
        steps = {"qaroma": ours}
        if self.plain is not None:
            theirs = twin(self.plain)
            with _where_memory_lasts():
                steps["peft"] = peft_step(theirs, self._rows(cell), checkpointing=LEVELS[cell.level].checkpointing)
                steps["peft"]()
                figures["peft_peak"] = peak_bytes(steps["peft"], self.device, self._resident(theirs, None))
            if "peft_peak" not in figures:
                steps.pop("peft", None)
                del theirs
                _clean(self.device)
        figures["tokens_per_second"] = self._rates(cell, steps)
        if cell.length <= LONG:
            figures["busy"] = {name: busy_seconds(step, self.device) for name, step in steps.items()}
        return figures

    def _where_there_is(self, room: int, step: Step) -> dict[str, Any]:
        """What a step takes on a card of which it may have so much and that has no room to spare; nothing if more."""
        _clean(self.device)  # what torch holds already it would give
        with _where_memory_lasts(), _emulated(self.device, room):
            return self._peak(step)
        self.base.zero_grad(set_to_none=True)
        return {}

    def _peak(self, step: Step) -> dict[str, Any]:
        figures = {"peak": peak_bytes(step, self.device, self._resident(self.base, self.method))}
        if self.device.type == "cuda":
            figures["reserved"] = torch.cuda.max_memory_reserved(self.device)
        return figures

    def _rates(self, cell: Cell, steps: Any, warm: int = 0) -> dict[str, Any]:
        rounds = 1 if cell.length > LONG else 3
        seconds = seconds_per_step(steps, count=1, rounds=rounds, device=self.device, warm=warm)
        return {name: asdict(Spread.of([cell.length / one for one in times])) for name, times in seconds.items()}

    def _card(self, cell: Cell) -> dict[str, Any]:
        step = step_of(self.base, self.method, self._rows(cell))
        figures = self._where_there_is(cell.gib * 2**30 - CONTEXT, step)
        held = bool(figures) and figures["peak"] <= cell.gib * 2**30 - CONTEXT  # a CPU has no limit to run against
        return {**figures, "outcome": "ran" if held else "no memory"}

    _longest = _card

    def _frozen(self, cell: Cell) -> dict[str, Any]:
        other = twin(self.plain)
        method = growing(other, frozen=FROZEN)
        apply_level(other, cell.level)
        rows = self._rows(cell)
        steps = {"1": step_of(self.base, self.method, rows), str(FROZEN): step_of(other, method, rows)}
        return {"tokens_per_second": self._rates(cell, steps, warm=1)}

    def _growth(self, cell: Cell) -> dict[str, Any]:
        """The share of a step that is the method's own: update, checks, growth."""
        whole, own = 0.0, 0.0
        step = step_of(self.base, self.method, self._rows(cell))
        update = self.method.step

        def timed(loss: float | None = None) -> Any:
            nonlocal own
            synchronise(self.device)
            start = time.perf_counter()
            events = update(loss)
            synchronise(self.device)
            own += time.perf_counter() - start
            return events

        self.method.step = timed  # type: ignore[method-assign]
        try:
            for _ in range(10):  # a check is made every ten
                start = time.perf_counter()
                step()
                whole += time.perf_counter() - start
        finally:
            del self.method.step
        return {"share": own / whole}


@contextmanager
def _where_memory_lasts() -> Iterator[None]:
    """Leave the block at an error that means that the card's memory is out."""
    try:
        yield
    except RuntimeError as error:
        if not card_is_full(error):
            raise


@contextmanager
def _emulated(device: torch.device, room: int) -> Iterator[None]:
    """Let torch take no more of a card than ``room`` bytes, as on a smaller one; on a CPU nothing is limited."""
    if device.type != "cuda":
        yield
        return
    whole = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, room / whole), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def _gpu_tests() -> str:
    """The last line of ``pytest -m gpu``."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(GPU_TESTS)]
    done = subprocess.run(command, cwd=GPU_TESTS.parents[1], capture_output=True, text=True, check=False)
    return (done.stdout.strip() or done.stderr.strip()).splitlines()[-1]


def _clean(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
