"""What is compared: method specs as they are typed, and the configuration of each run."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qaroma.config.load import config_fields, lies_in
from qaroma.config.methods import METHODS
from qaroma.config.schema import Config
from qaroma.errors import QaromaError

MakeConfig = Callable[[Sequence[str]], Config]  # from additional key=value texts

# What must be the same in every run: without it there is nothing to compare.
SHARED = ("task", "output", "data", "evaluation", "checkpoint", "model.name", "model.revision", "training.seed",
          "training.max_steps", "training.epochs", "training.micro_batch", "training.grad_accum",
          "training.evaluate_every", "training.patience", "training.device")  # fmt: skip
_SPEC = re.compile(r"(?P<method>[^:+]+)(:(?P<rank>[^+]*))?(?P<settings>\+.*)?", re.DOTALL)
_SETTING = re.compile(r"\+(?=[A-Za-z_.]+=)")  # not the plus of 1e+3
_OUTSIDE_BRACKETS = re.compile(r",(?![^\[\]]*\])")
_LONGEST_NAME = 120


@dataclass(frozen=True)
class MethodSpec:
    """One method of a comparison.

    Attributes:
        label: as it stands in the table: ``lora:8``, ``aroma+reset=none``.
        method: the configuration's name.
        rank: of a method of fixed rank; None where ranks grow.
        sets: ``key=value`` texts that make a configuration one of this method.
    """

    label: str
    method: str
    rank: int | None
    sets: tuple[str, ...]

    def folder(self, seed: int) -> str:
        """Name of the run directory of a seed: what every file system takes."""
        slug = re.sub(r"[^A-Za-z0-9._+=-]+", "-", self.label).strip("-.")
        if len(slug) > _LONGEST_NAME:
            slug = f"{slug[:_LONGEST_NAME]}-{hashlib.sha256(self.label.encode()).hexdigest()[:8]}"
        return f"{slug}-s{seed}"


@dataclass(frozen=True)
class PlannedRun:
    """One method with one seed."""

    spec: MethodSpec
    seed: int
    name: str
    config: Config


def plan_runs(make_config: MakeConfig, methods: str, seeds: str, folder: str) -> list[PlannedRun]:
    """The runs of a comparison: every method of the first seed, then of the second, and so on.

    Args:
        make_config: the configuration that all share, with ``key=value`` texts on top.
        methods: ``name[:rank][+key=value]...``, separated by commas.
        seeds: whole numbers, separated by commas.
        folder: where the run directories lie.

    Raises:
        QaromaError: all problems of all methods and seeds at once.
    """
    base = make_config([])
    numbers, problems = _seeds(seeds)
    specs: list[MethodSpec] = []
    for text in _OUTSIDE_BRACKETS.split(methods):
        try:
            spec = parse_spec(text.strip(), base.rank)
            if any(spec.folder(0).lower() == other.folder(0).lower() for other in specs):
                raise QaromaError(f"{spec.label}: given twice; name each method once")
            make_config(spec.sets)
        except QaromaError as error:
            problems += _about(text.strip(), str(error))
            continue
        specs.append(spec)
    if problems:
        raise report(problems)
    runs = []
    for seed in numbers:
        for spec in specs:
            config = make_config([*spec.sets, f"training.seed={seed}"])
            config.output = f"{folder}/{spec.folder(seed)}"
            if config.training.patience is None:  # equal steps, unless it is asked for
                config.training.patience = 0
            config.evaluation.report = False  # drawn at every validation, beside the runs that are measured
            runs.append(PlannedRun(spec, seed, spec.folder(seed), config))
    return runs


def parse_spec(text: str, default_rank: int) -> MethodSpec:
    """One method as it was typed.

    Args:
        text: ``name[:rank][+key=value]...``; a key without a dot may be one of ``growth``.
        default_rank: of a method of fixed rank that names none.

    Raises:
        QaromaError: all that is wrong with it.
    """
    match = _SPEC.fullmatch(text)
    if match is None:
        raise QaromaError(f"got {text!r}; expected a method, as aroma, lora:8 or aroma+reset=none")
    method, rank, problems = match["method"].strip(), match["rank"], []
    if method not in METHODS:
        near = difflib.get_close_matches(method, METHODS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(METHODS)}"
        raise QaromaError(f"{text}: no such method: {method!r}; {hint}")
    fixed = not METHODS[method].grows
    if rank is not None and not fixed:
        problems.append(f"{method} finds its ranks; leave out :{rank}, or set a component's with {method}+inner_rank=2")
    elif rank is not None and not (rank.isdecimal() and int(rank) > 0):
        problems.append(f"got the rank {rank!r}; expected a whole number, as {method}:8")
    settings = [part for part in _SETTING.split(match["settings"] or "") if part]
    sets = []
    for setting in settings:
        key, equals, value = setting.lstrip("+").partition("=")
        if not equals:
            problems.append(f"got {setting!r}; expected +key=value, as +reset=none")
            continue
        key = f"growth.{key}" if f"growth.{key}" in config_fields() else key
        if lies_in(key, SHARED):
            problems.append(f"{key} is the same for all methods; type --set {key}={value}")
        elif key in ("method", "rank"):
            problems.append(f"{key} stands before the settings; type {method}:8")
        else:
            sets.append(f"{key}={value}")
    if problems:
        raise report([f"{text}: {problem}" for problem in problems])
    number = (int(rank) if rank is not None else default_rank) if fixed else None
    label = "+".join([method if number is None else f"{method}:{number}", *(s.lstrip("+") for s in settings)])
    own = [f"method={method}", f"rank={number or Config.model_fields['rank'].default}"]
    return MethodSpec(label, method, number, (*own, *sets))


def shared_settings(base: Config) -> list[str]:
    """Settings of the configuration whose preset differs between methods, and that now hold for all."""
    keys = ("growth.alpha", "growth.warmup", "growth.dropout", "training.learning_rate", "training.head_learning_rate")
    found = []
    for key in keys:
        section, _, name = key.partition(".")
        value = getattr(getattr(base, section), name)
        if value is not None:
            found.append(f"{key}={value:g}")
    return found


def report(problems: Sequence[str]) -> QaromaError:
    """All problems as one error."""
    if len(problems) == 1:
        return QaromaError(problems[0])
    return QaromaError("\n".join([f"{len(problems)} problems:", *(f"  {problem}" for problem in problems)]))


def parse_seeds(text: str) -> list[int]:
    """Whole numbers, separated by commas.

    Raises:
        QaromaError: anything else, or a seed given twice.
    """
    numbers, problems = _seeds(text)
    if problems:
        raise report(problems)
    return numbers


def _seeds(text: str) -> tuple[list[int], list[str]]:
    parts = [part.strip() for part in text.split(",")]
    wrong = [part for part in parts if not part.isdecimal()]
    if wrong:
        return [], [f"--seeds: got {wrong[0]!r}; expected whole numbers separated by commas, as 0,1,2"]
    numbers = [int(part) for part in parts]
    if len(set(numbers)) < len(numbers):
        return [], [f"--seeds: got {text}; expected each seed once"]
    return numbers, []


def _about(label: str, text: str) -> list[str]:
    """The lines of an error, each of which names the method."""
    lines = [line.strip() for line in text.splitlines()]
    lines = lines[1:] if len(lines) > 1 else lines
    return [line if line.startswith(label) else f"{label}: {line.removeprefix('--set ')}" for line in lines]
