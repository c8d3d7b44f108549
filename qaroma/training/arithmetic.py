"""What torch is told of a run's arithmetic, for the whole process, before anything is computed."""

from __future__ import annotations

import os

import torch


def settle_arithmetic(dtype: torch.dtype, *, deterministic: bool) -> None:
    """Tell torch how a run is to compute; on a CPU none of it changes anything.

    Args:
        dtype: of the run. Products in fp16 keep their partial sums in fp32, since they would overflow else.
        deterministic: sums are made in the same order every time, so that a run gives the same bytes twice on one card
            with one version of torch; an operation that cannot do so is an error. Flash and memory-efficient attention
            have such a form (attention_backward.cu), cuDNN's has none and is not taken.
    """
    if dtype == torch.float16:
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it first multiplies
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cuda.enable_cudnn_sdp(False)
