"""The eight tasks of GLUE by name: which files or hub splits, which kind, which figure counts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qaroma.data.labelled import Kind
from qaroma.data.sources import Row, RowSet, read_rows
from qaroma.errors import QaromaError

HUB_ID = "nyu-mll/glue"


@dataclass(frozen=True)
class GlueTask:
    """One task.

    Attributes:
        name: As the hub spells it.
        metric: The published figure of merit, as :mod:`qaroma.tasks.metrics` names it.
        kind: Classification or regression.
        dev: Name of the dev split on the hub.
    """

    name: str
    metric: str = "accuracy"
    kind: Kind = "classification"
    dev: str = "validation"


GLUE = {
    task.name: task
    for task in (
        GlueTask("cola", "matthews"),
        GlueTask("sst2"),
        GlueTask("mrpc"),
        GlueTask("stsb", "pearson", "regression"),
        GlueTask("qqp"),
        GlueTask("mnli", dev="validation_matched"),
        GlueTask("qnli"),
        GlueTask("rte"),
    )
}


def glue_task(source: str) -> GlueTask | None:
    """The task of ``glue:NAME``, or of a folder or file of that name (``glue/MRPC``, ``glue/SST-2/train.jsonl``).

    Raises:
        QaromaError: ``glue:`` with a name that is none of the eight.
    """
    if source.startswith("glue:"):
        name = _normal(source.removeprefix("glue:"))
        if name not in GLUE:
            raise QaromaError(f"got '{source}'; expected glue: and one of {', '.join(GLUE)}")
        return GLUE[name]
    path = Path(source)
    return next((GLUE[name] for name in map(_normal, (path.name, path.parent.name)) if name in GLUE), None)


def read_glue(source: str) -> tuple[RowSet, RowSet]:
    """Training rows and dev rows of ``glue:NAME`` from the hub.

    Raises:
        QaromaError: The hub cannot be reached.
    """
    task = glue_task(source)
    assert task is not None
    try:
        import datasets

        table = datasets.load_dataset(HUB_ID, task.name)
    except Exception as error:  # the library raises a dozen kinds, its own and those of its HTTP clients
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise QaromaError(
            f"{source} could not be loaded from the hub ({reason}). Without network, name a folder that holds "
            "train.jsonl and dev.jsonl with --data"
        ) from error
    train, dev = (
        RowSet([Row(dict(v), f"{source}/{split}", number, 1.0) for number, v in enumerate(table[split], start=1)])
        for split in ("train", task.dev)
    )
    return train, dev


def dev_file(source: str) -> str | None:
    """The one dev file of a folder that also holds training files; None where there is none or more."""
    folder = Path(source)
    found = sorted(file for file in folder.glob("*") if file.name.lower().startswith(("dev.", "validation.")))
    return str(found[0]) if len(found) == 1 else None


def read_train(source: str) -> RowSet:
    """Training rows of a file or folder; of a folder, ``train.*`` alone where it stands beside samples of it."""
    folder = Path(source)
    whole = sorted(folder.glob("train.*")) if folder.is_dir() else []
    return read_rows([(str(whole[0]) if whole else source, 1.0)])


def _normal(name: str) -> str:
    return name.split(".")[0].lower().replace("-", "").replace("_", "")
