"""What a run tells torch of its arithmetic; in a process of its own, since that holds for all of one."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import os, torch
from qaroma.training.arithmetic import settle_arithmetic
for dtype, deterministic in ((torch.bfloat16, False), (torch.float16, True)):
    settle_arithmetic(dtype, deterministic=deterministic)
    print(torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
          os.environ.get("CUBLAS_WORKSPACE_CONFIG"), torch.backends.cuda.cudnn_sdp_enabled(),
          torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction)
"""


def test_torch_is_told_what_was_asked_for_and_nothing_else() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["False False None True True", "True False :4096:8 False False"]
