"""Packing: nothing lost, no padding to speak of, and a packed example has the loss it has alone."""

from __future__ import annotations

import pytest
import torch

from qaroma.data.encode import Example
from qaroma.data.packing import pack
from qaroma.tasks.causal_lm import CausalLM


def examples(count: int, longest: int) -> list[Example]:
    generator = torch.Generator().manual_seed(3)
    found = []
    for number in range(count):
        length = int(torch.randint(4, longest, (1,), generator=generator))
        ids = torch.randint(3, 500, (length,), generator=generator).tolist()
        found.append(Example(ids, [-100, -100, *ids[2:]], f"f:{number}"))
    return found


def test_every_example_is_in_one_row_whole() -> None:
    given = examples(500, 120)
    rows = pack(given, 128)
    cut = []
    for row in rows:
        assert sum(row.lengths) == len(row.input_ids) <= 128
        start = 0
        for length in row.lengths:
            cut.append((row.input_ids[start : start + length], row.labels[start : start + length]))
            start += length
    assert sorted(cut) == sorted((e.input_ids, e.labels) for e in given)
    tokens = sum(len(e.input_ids) for e in given)
    assert tokens / (len(rows) * 128) > 0.97
    assert pack(given, 128) == rows


def test_a_packed_example_has_the_loss_it_has_alone(tiny_model) -> None:
    task = CausalLM()
    given = examples(9, 40)
    rows = pack(given, 64)
    assert len(rows) < 9
    alone = [task.loss(tiny_model, task.collate([e])) for e in given]
    packed, count = task.loss(tiny_model, task.collate(rows))
    assert count == sum(c for _, c in alone)
    assert packed.item() == pytest.approx(sum(loss.item() for loss, _ in alone), rel=1e-5)
    # Without the restart of positions the sequences would see each other.
    blind = task.collate(rows)
    blind.position_ids.copy_(torch.arange(blind.input_ids.shape[1]).expand_as(blind.input_ids))
    assert task.loss(tiny_model, blind)[0].item() != pytest.approx(packed.item(), rel=1e-4)
