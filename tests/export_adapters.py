"""Adapters for the tests of qaroma.export: random factors of unequal ranks, some zero, as a run leaves them."""

from __future__ import annotations

from pathlib import Path

import torch

from qaroma.data.templates import Template
from qaroma.method.attach import attach_update, detach, linear_shapes
from qaroma.method.factors import Factors
from qaroma.model.base import fingerprint, load_base, load_tokenizer
from qaroma.runs.adapter import save_adapter
from qaroma.runs.adapter_info import AdapterInfo, BaseInfo, TaskInfo


def random_update(shapes: dict[str, tuple[int, int]], *, size: float = 0.05, ranks=range(5)) -> dict[str, Factors]:
    """Factors for every module but the head, ranks going round; of about ``size`` times a unit weight's effect."""
    generator = torch.Generator().manual_seed(7)
    found = {}
    for index, (name, (rows, columns)) in enumerate(n for n in shapes.items() if n[0] != "lm_head"):
        rank = ranks[index % len(ranks)]
        A = torch.randn(rank, columns, generator=generator) / columns**0.5
        found[name] = Factors(A, torch.randn(rows, rank, generator=generator).T.contiguous() * size)
    return found


def save_random_adapter(
    base: str | Path, folder: Path, *, quantization: str = "nf4", size: float = 0.5, ranks=range(5)
) -> dict[str, Factors]:
    """Write an adapter of a base as a run would; returns its update."""
    model = load_base(base, quantization=quantization, compute_dtype=torch.float32, device="cpu")
    update = random_update(linear_shapes(model), size=size, ranks=ranks)
    adapter = attach_update(model, update)
    held = BaseInfo(
        name=str(base),
        revision=None,
        fingerprint=fingerprint(model),
        quantization=quantization,
        double_quantization=True,
        compute_dtype="fp32",
    )
    task = TaskInfo(template=Template.choose(load_tokenizer(base)).to_json())
    info = AdapterInfo({}, adapter.inner_rank, adapter.alpha, method="aroma", step=1, base=held, task=task)
    save_adapter(adapter, folder, base=str(base), info=info)
    detach(adapter)
    return update
