"""Beds of real models, through the product's own data path: MiniLM on GLUE, SmolLM2 on short answers."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from qaroma.compare.suite.beds import Bed, Place, minilm
from qaroma.compare.suite.bench import Bench
from qaroma.config.decisions import DataFacts
from qaroma.config.load import read_settings
from qaroma.config.presets import BITS_A_TOKEN
from qaroma.data import demo
from qaroma.data.encode import IGNORED
from qaroma.method.head import head_names, is_inside
from qaroma.method.targets import find_targets
from qaroma.model.base import load_base
from qaroma.model.facts import facts_of_module
from qaroma.runs.files import write_atomically
from qaroma.tasks.base import Task
from qaroma.training.batches import BatchPlan
from qaroma.training.prepare import PreparedData, prepare_data

LONGEST = {"language": 96, "labelled": 128}  # tokens of a row; longer answers are left out, longer texts cut
VALIDATED, SCORED = 64, 200  # rows; of a GLUE task the whole dev set scores


@dataclass(frozen=True)
class _Data:
    """The encoded rows of a bed, and the model as it is loaded."""

    facts: DataFacts
    model: Any
    task: Task
    train: Sequence[Any]
    validation: Sequence[Any]
    test: Sequence[Any]
    head: Sequence[str]


def set_up_model(bed: Bed, place: Place, seed: int) -> Bench:
    """A bed of a real model; validation takes some training rows, so that the test rows decide nothing."""
    data = _prepared(bed, place)
    model = copy.deepcopy(data.model)
    lengths = [len(example.input_ids) for example in data.train]
    plan = BatchPlan(lengths, micro_batch=bed.batch, grad_accum=1, seed=seed)

    def loss(step: int) -> torch.Tensor:
        [rows] = plan.step(step)
        total, count = data.task.loss(model, data.task.collate([data.train[row] for row in rows]))
        return total / count

    def figures(rows: Sequence[Any]) -> Any:
        by_length = sorted(rows, key=lambda example: len(example.input_ids))  # hardly any padding
        batches = (data.task.collate(by_length[i : i + 16]) for i in range(0, len(rows), 16))
        return data.task.evaluate(model, batches, torch.device("cpu"))

    return Bench(
        model,
        replace(data.facts, lengths=lengths),
        loss=loss,
        validate=lambda: figures(data.validation),
        score=lambda: float(figures(data.test)[bed.metric]),
        head=data.head,
        metric=data.task.metric,
    )


@lru_cache(maxsize=1)
def _prepared(bed: Bed, place: Place) -> _Data:
    labelled = bed.kind == "labelled"
    name = str(minilm()) if labelled else "smollm2-135m"
    flags: dict[str, Any] = {
        "model.name": name,
        "model.quantization": "none",
        "task": bed.task,
        "method": "lora",
        "data.train": [str(place.data / bed.source)] if bed.source else [str(_calendar(place.cache))],
        "data.max_length": LONGEST[bed.kind],
        "data.on_too_long": "truncate" if labelled else "drop",
        "data.template": "auto" if labelled else "none",  # a chat template is half of a short row
        "data.validation": str((place.data / bed.source).with_name("dev.jsonl")) if labelled else None,
        "data.validation_share": 0.2,
        "data.validation_max": SCORED,
    }
    data = prepare_data(read_settings(None, flags, []))
    torch.manual_seed(0)  # a new head begins alike in every trial
    model: Any = load_base(
        name,
        quantization="none",
        compute_dtype=torch.bfloat16,  # the product's choice, and half the time
        device="cpu",
        num_labels=data.remember.outputs,
    )
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = [data.train[i] for i in order]
    head = head_names(model, model.new_parameters) if labelled else ()
    return _Data(
        _facts(bed, model, head, shuffled[VALIDATED:], data),
        model,
        data.task,
        shuffled[VALIDATED:],
        shuffled[:VALIDATED],
        data.validation,
        head,
    )


def _facts(bed: Bed, model: Any, head: Sequence[str], train: Sequence[Any], data: PreparedData) -> DataFacts:
    """What the presets are told, as the product tells it."""
    names = [name for name in find_targets(model) if not is_inside(name, head)]
    labels = data.remember.labels
    bits = len(train) * (math.log2(len(labels)) if labels else BITS_A_TOKEN)
    if bed.kind == "language":
        bits = BITS_A_TOKEN * sum(label != IGNORED for example in train for label in example.labels)
    return DataFacts(
        len(train),
        [],
        LONGEST[bed.kind],
        validation_rows=VALIDATED,
        trained_bits=bits,
        model=facts_of_module(model, names),
    )


def _calendar(cache: Path) -> Path:
    """The quickstart's rows as a file."""
    file = cache / "calendar.jsonl"
    if not file.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        rows = demo.rows("train", demo.TRAIN_ROWS + SCORED, 0)
        write_atomically(file, "".join(json.dumps(row) + "\n" for row in rows))
    return file
