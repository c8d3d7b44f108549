"""TensorBoard and Weights & Biases, through accelerate's trackers."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from qaroma.config.load import flattened
from qaroma.errors import QaromaError

_SERVICES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}


def require_trackers(names: Sequence[str]) -> None:
    """Tell before anything is loaded what is not installed.

    Raises:
        QaromaError: The packages that are missing, and how to get them.
    """
    missing = [name for name in dict.fromkeys(names) if not any(map(importlib.util.find_spec, _SERVICES[name]))]
    if missing:
        raise QaromaError(
            f"--track {' and '.join(missing)} needs a package that is not installed; type: pip install "
            f"{' '.join(missing)}"
        )


def start_trackers(accelerator: Accelerator, names: Sequence[str], run: Path, settings: Mapping[str, Any]) -> None:
    """Begin a log of this run with each service.

    TensorBoard's lies in ``RUN/tensorboard``, or in ``RUN/qaroma`` where W&B is told too.

    Args:
        accelerator: made with ``log_with`` these names.
        names: of the services; none is fine.
        run: the run directory, whose name is the run's there too.
        settings: the resolved configuration, nested.
    """
    if not names:
        return
    shown = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in flattened(settings).items()}
    options = {"wandb": {"name": run.name, "dir": str(run)}} if "wandb" in names else {}
    accelerator.init_trackers("tensorboard" if set(names) == {"tensorboard"} else "qaroma", shown, options)


def track(accelerator: Accelerator, record: Mapping[str, Any], prefix: str = "") -> None:
    """Log the numbers of one line of ``metrics.jsonl``; nothing without trackers."""
    numbers = {
        f"{prefix}{key}": value for key, value in record.items() if isinstance(value, (int, float)) and key != "step"
    }
    accelerator.log(numbers, step=record["step"])
