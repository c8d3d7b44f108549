"""Keys that are repeated for SDPA's fused kernels: the same attention, with packed rows and while it answers."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_config

from qaroma.model import attention
from qaroma.model.attention import REPEATED, repeat_keys, wants_repeated_keys

CUDA = torch.device("cuda")


@pytest.fixture
def pair():
    """A tiny Llama with four query heads and two key heads, and a twin that repeats its keys."""
    from transformers import LlamaForCausalLM

    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(LlamaForCausalLM._from_config(tiny_config(), attn_implementation="sdpa"))
    repeat_keys(models[1])
    return models


@pytest.mark.parametrize("packed", [False, True])
def test_repeated_keys_compute_the_same_attention(pair, packed: bool) -> None:
    ids = torch.arange(3, 43)[None]
    positions = torch.cat([torch.arange(24), torch.arange(16)])[None] if packed else None
    found = []
    for model in pair:
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        logits.square().mean().backward()
        found.append((logits.detach(), model.model.layers[0].self_attn.k_proj.weight.grad))
    assert pair[1].config._attn_implementation == REPEATED
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_repeated_keys_answer_alike(pair) -> None:
    ids = torch.arange(3, 20)[None]
    answers = [model.eval().generate(ids, max_new_tokens=6, do_sample=False) for model in pair]
    assert torch.equal(*answers)


def test_keys_are_repeated_where_no_fused_kernel_takes_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    grouped, plain = tiny_config(), tiny_config(num_key_value_heads=4)
    asked = []
    monkeypatch.setattr(attention, "fused_for_groups", lambda device, dtype, size: asked.append((dtype, size)))
    assert wants_repeated_keys(grouped, CUDA, torch.float32)
    assert not wants_repeated_keys(plain, CUDA, torch.float32)
    assert not wants_repeated_keys(grouped, torch.device("cpu"), torch.float32)
    assert asked == [(torch.float32, 16)]
    monkeypatch.setattr(attention, "fused_for_groups", lambda device, dtype, size: True)
    assert not wants_repeated_keys(grouped, CUDA, torch.bfloat16)
