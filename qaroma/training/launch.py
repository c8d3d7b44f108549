"""``qaroma finetune --gpus N``: one process a card, started and watched by torchrun's own agent."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from uuid import uuid4

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from qaroma.errors import QaromaError

GRACE_SECONDS = 300  # in which a run that is stopped may end its step and save, before its processes are killed


def launch(gpus: int, arguments: Sequence[str], device: str) -> int:
    """Run a command of qaroma on so many cards of this machine.

    Args:
        gpus: how many.
        arguments: what follows ``qaroma``.
        device: as ``training.device`` has it.

    Returns:
        The exit code: that of the process that failed first, where one did.

    Raises:
        QaromaError: there are fewer cards.
    """
    cards = 0 if device == "cpu" else torch.cuda.device_count()
    if cards < gpus:
        raise QaromaError(
            f"got --gpus {gpus}, but there are {cards} CUDA cards to train on. On a CPU one process is as fast as "
            f"several; to try {gpus} all the same: torchrun --nproc-per-node {gpus} -m qaroma finetune --device cpu ..."
        )
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(GRACE_SECONDS))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=gpus,
        run_id=uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "qaroma", *arguments)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code  # a signal, as a shell tells of it
    except SignalException as error:
        return 128 + error.sigval
    return 0
