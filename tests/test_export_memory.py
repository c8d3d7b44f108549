"""A merge needs the memory of a tensor or two, whatever the size of the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from own_memory import needs_rss_anon, run_measured
from test_model_base import save_random

pytestmark = needs_rss_anon

MEASURE = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import numpy, gguf, transformers.models.llama.modeling_llama, transformers.integrations.bitsandbytes
from export_adapters import random_update
from own_memory import sampled_peak
from qaroma.method.attach import linear_shapes
from qaroma.export.gguf_model import _converted
from qaroma.export.merged import write_merged
from qaroma.export.weights import dequantised_tensors, merged_tensors, original_tensors
from qaroma.model.base import load_base, load_model_config

folder, *wanted = sys.argv[1:]
config = load_model_config(folder)
model = load_base(folder, compute_dtype=torch.bfloat16, device="cpu")
update = random_update(linear_shapes(model))
sources = {"dequantised": dequantised_tensors(model), "original": original_tensors(folder, config)}
types = {name: gguf.GGMLQuantizationType[name.upper()] for name in ("f16", "q8_0", "q4_k")}
torch.addmm(torch.zeros(4, 4), torch.ones(4, 4), torch.ones(4, 4))
for into, kind in (one.split(":") for one in wanted):
    with sampled_peak() as peak:
        if kind == "merged":
            write_merged(Path(folder) / "out", sources[into], update, config, dtype=torch.bfloat16)
        else:
            for tensor in merged_tensors(sources[into], update):
                if len(tensor.shape) == 2:
                    _converted(tensor, types[kind], None)
    print(json.dumps({"into": into, "kind": kind, "peak": peak.bytes}))
"""


def measure(folder: Path, *wanted: str) -> list[dict]:
    (folder / "out").mkdir(exist_ok=True)
    said = run_measured(MEASURE, str(folder), *wanted)
    return [json.loads(line) for line in said.splitlines() if line.startswith("{")]


def check(folder: Path, largest: int, total: int, *wanted: str) -> None:
    """``largest`` and ``total`` are bytes in bf16, of the largest tensor and of the model."""
    told = measure(folder, *wanted)
    assert len(told) == len(wanted)
    for one in told:
        print(f"\n{one}; largest tensor {largest}, model {total}")
        # Beside the tensors there are the blocks of rows in hand, which are of one size for every model.
        allowed = 2 * largest + 64e6
        assert allowed < 0.7 * total  # else this would prove nothing
        assert one["peak"] < allowed, one


def test_a_merge_holds_two_tensors_at_most(tmp_path: Path) -> None:
    total, _ = save_random(
        tmp_path, "50MB", hidden_size=768, intermediate_size=2048, num_hidden_layers=10, num_attention_heads=12,
        num_key_value_heads=12, vocab_size=2048,
    )  # fmt: skip
    check(tmp_path, 2 * 2048 * 768, total, "original:merged", "dequantised:merged")


@pytest.mark.slow
def test_a_gigabyte_is_merged_in_the_memory_of_two_tensors(tmp_path: Path) -> None:
    total, _ = save_random(
        tmp_path, "200MB", hidden_size=2048, intermediate_size=5632, num_hidden_layers=9, num_attention_heads=16,
        num_key_value_heads=16, vocab_size=32000,
    )  # fmt: skip
    wanted = [f"{into}:{kind}" for into in ("original", "dequantised") for kind in ("merged", "f16", "q8_0")]
    wanted.append("original:q4_k")
    check(tmp_path, 2 * 32000 * 2048, total, *wanted)
