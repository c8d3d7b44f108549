"""Packing: nothing lost, no padding to speak of, and a packed example has the loss it has alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qaroma.data.encode import Example
from qaroma.data.packing import pack
from qaroma.engine.levels import apply_level
from qaroma.errors import QaromaError
from qaroma.model.attention import repeat_keys
from qaroma.model.documents import knows_documents
from qaroma.tasks.causal_lm import CausalLM, require_apart


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


SIZES = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
WINDOWS = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 16}


def causal(family: str, **sizes: Any) -> Any:
    """A tiny random model whose attention has something to tell."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SIZES, **sizes}))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def outcome(model: Any, dtype: torch.dtype, level: int = 0) -> list[torch.Tensor]:
    """Loss and gradients of the first layer's products, of two packed rows, the shorter one padded."""
    model.to(dtype).zero_grad()
    apply_level(model.train(), level)
    task = CausalLM()
    rows = sorted(pack(examples(12, 40), 96), key=lambda row: -len(row.lengths))[:2]
    loss, count = task.loss(model, task.collate(rows))
    (loss / count).backward()
    layer = model.model.layers[0].self_attn
    return [loss.detach(), *(p.weight.grad for p in (layer.q_proj, layer.k_proj, layer.v_proj))]


def apart(family: str, **sizes: Any) -> Any:
    model = causal(family, **sizes)
    require_apart(model)
    assert knows_documents(model)
    return model


def repeated(family: str, **sizes: Any) -> Any:
    model = causal(family, **sizes)
    repeat_keys(model)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("made", "family", "sizes", "level"),
    [(apart, "llama", {}, 0), (apart, "llama", {}, 1), (repeated, "llama", {}, 0), (apart, "gemma3_text", WINDOWS, 0)],
)
def test_sequences_read_alone_are_as_exact_as_under_a_mask(made, family: str, sizes, level: int, dtype) -> None:
    truth = outcome(causal(family, **sizes), torch.float64)
    naive = outcome(causal(family, **sizes), dtype)
    ours = outcome(made(family, **sizes), dtype, level)

    def error(found: list[torch.Tensor]) -> list[float]:
        return [float((one - true).norm() / true.norm()) for one, true in zip(found, truth, strict=True)]

    for ours_off, naive_off in zip(error(ours), error(naive), strict=True):
        assert ours_off <= 1.5 * naive_off + 1e-6


def test_no_mask_of_a_whole_row_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import sdpa_attention

    seen = []

    def attended(query, key, value, attn_mask=None, **options):
        seen.append((query.shape[2], attn_mask if attn_mask is None else tuple(attn_mask.shape)))
        return plain(query, key, value, attn_mask=attn_mask, **options)

    model, rows, task = apart("gemma3_text", **WINDOWS), pack(examples(9, 40), 96), CausalLM()
    plain = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(sdpa_attention.torch.nn.functional, "scaled_dot_product_attention", attended)
    task.loss(model, task.collate(rows[:1]))
    full = [(length, None) for length in rows[0].lengths]
    windowed = [(length, (1, 1, length, length) if length > 16 else None) for length in rows[0].lengths]
    assert seen == [*windowed, *full]


@pytest.mark.parametrize("family", ["bloom", "gpt_oss"])
def test_a_family_that_mixes_sequences_is_refused(family: str) -> None:
    """Bloom counts positions from the row's beginning; gpt-oss asks for its masks without positions."""
    few = {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 16} if family == "gpt_oss" else {}
    with pytest.raises(QaromaError, match=f"data.packing for a model of family {family}, .* Leave data.packing out"):
        require_apart(causal(family, **few))
