"""Causal language modelling: the loss is the model's own, whatever the padding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config

from qaroma.data.encode import Example
from qaroma.tasks.base import IGNORED
from qaroma.tasks.causal_lm import CausalLM


def example(length: int, trained_from: int) -> Example:
    ids = torch.randint(3, 500, (length,)).tolist()
    return Example(ids, [IGNORED] * trained_from + ids[trained_from:])


def test_collate_pads_on_the_right_and_counts_targets() -> None:
    batch = CausalLM(pad_token_id=2).collate([example(5, 3), example(8, 0)])
    assert batch.input_ids.shape == batch.labels.shape == batch.position_ids.shape == (2, 8)
    assert batch.input_ids[0, 5:].tolist() == [2, 2, 2]
    assert batch.lengths == ((5,), (8,))
    assert batch.tokens == 13
    assert batch.counted == 2 + 7  # nothing predicts the first token of a sequence
    assert batch.labels[:, 0].tolist() == [IGNORED, IGNORED]


def test_loss_is_the_models_own_and_padding_changes_nothing(tiny_model) -> None:
    task, examples = CausalLM(), [example(9, 4), example(30, 10), example(17, 1)]
    together, count = task.loss(tiny_model, task.collate(examples))
    alone = [task.loss(tiny_model, task.collate([e])) for e in examples]
    assert count == sum(c for _, c in alone)
    assert together.item() == pytest.approx(sum(loss.item() for loss, _ in alone), rel=1e-5)
    for e, (loss, counted) in zip(examples, alone, strict=True):
        own = tiny_model(input_ids=torch.tensor([e.input_ids]), labels=torch.tensor([e.labels])).loss
        assert loss.item() / counted == pytest.approx(own.item(), rel=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere"])
def test_what_a_family_does_to_its_logits_is_kept(family: str) -> None:
    """Soft capping and logit scaling sit in model.forward, which training does not call."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {k: v for k, v in tiny_config().to_dict().items() if k in _SHARED}
    extra = {"gemma2": {"head_dim": 16, "final_logit_softcapping": 3.0}, "granite": {"logits_scaling": 4.0}}
    config = AutoConfig.for_model(family, **sizes, **extra.get(family, {"logit_scale": 0.25}))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    e = example(20, 5)
    task = CausalLM()
    loss, count = task.loss(model, task.collate([e]))
    logits = model(input_ids=torch.tensor([e.input_ids])).logits[0, 4:-1].float()
    own = F.cross_entropy(logits, torch.tensor(e.input_ids[5:]), reduction="sum")
    assert count == 15
    assert loss.item() == pytest.approx(own.item(), rel=1e-4)


_SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "eos_token_id", "bos_token_id", "pad_token_id",
)  # fmt: skip
