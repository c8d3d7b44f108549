"""Causal language modelling: the loss is the model's own, whatever the padding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config

from qaroma.data.encode import IGNORED, Example
from qaroma.data.packing import pack
from qaroma.engine.levels import apply_level
from qaroma.errors import QaromaError
from qaroma.model.base import load_base
from qaroma.tasks.causal_lm import CausalLM, require_known_head


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


_SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "eos_token_id", "bos_token_id", "pad_token_id",
)  # fmt: skip


def model_of(family: str, **changes):
    """A tiny random model of a family, with what its configuration does to the logits."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {k: v for k, v in tiny_config().to_dict().items() if k in _SHARED}
    extra = {
        "gemma2": {"head_dim": 16, "final_logit_softcapping": 3.0},
        "gemma3_text": {"head_dim": 16},
        "qwen3": {"head_dim": 16},
        "granite": {"logits_scaling": 4.0},
        "cohere": {"logit_scale": 0.25},
    }
    config = AutoConfig.for_model(family, **{**sizes, **extra.get(family, {}), **changes})
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere"])
def test_what_a_family_does_to_its_logits_is_kept(family: str) -> None:
    """Soft capping and logit scaling sit in model.forward, which training does not call."""
    model, e, task = model_of(family), example(20, 5), CausalLM()
    loss, count = task.loss(model, task.collate([e]))
    logits = model(input_ids=torch.tensor([e.input_ids])).logits[0, 4:-1].float()
    own = F.cross_entropy(logits, torch.tensor(e.input_ids[5:]), reduction="sum")
    assert count == 15
    assert loss.item() == pytest.approx(own.item(), rel=1e-4)


FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "phi", "gpt_neox", "gemma2", "gemma3_text", "granite", "cohere"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_whose_head_is_known_pass(family: str, dtype: torch.dtype) -> None:
    require_known_head(model_of(family).to(dtype))
    if family == "gemma2":  # as it is published
        require_known_head(model_of(family, final_logit_softcapping=30.0).to(dtype))


class Unknown(torch.nn.Module):
    """A head that does something to its logits which no configuration says."""

    def __init__(self, model, change) -> None:
        super().__init__()
        self.model, self.change, self.config = model, change, model.config
        self.base_model, self.get_output_embeddings = model.base_model, model.get_output_embeddings

    def forward(self, **inputs):
        output = self.model(**inputs)
        output.logits = self.change(output.logits)
        return output


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits * 1.1,
        lambda logits: torch.tanh(logits / 100) * 100,  # far above the logits of a tiny model
        lambda logits: logits + torch.arange(512) / 50,
        lambda logits: logits[..., :500],
    ],
    ids=["scale", "cap", "bias", "padded"],
)
def test_a_head_that_does_something_unknown_is_refused(tiny_model, change) -> None:
    require_known_head(Unknown(tiny_model, lambda logits: logits))
    with pytest.raises(QaromaError, match=r"family llama, which does something to its logits .*--model"):
        require_known_head(Unknown(tiny_model, change))
    assert not tiny_model.lm_head._forward_pre_hooks


def test_a_family_that_caps_its_logits_under_another_name_is_refused() -> None:
    with pytest.raises(QaromaError, match="family recurrent_gemma"):
        require_known_head(model_of("recurrent_gemma", lru_width=64, head_dim=16))


@pytest.mark.parametrize("level", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_is_known_with_embeddings_on_the_host_and_in_four_bits(tmp_path, level: int, dtype) -> None:
    from transformers import LlamaForCausalLM

    LlamaForCausalLM(tiny_config(tie_word_embeddings=False)).save_pretrained(tmp_path)
    model = load_base(tmp_path, compute_dtype=dtype, device="cpu")
    apply_level(model, level)
    state = torch.get_rng_state()
    require_known_head(model)
    assert torch.equal(torch.get_rng_state(), state)  # a resumed run goes on as it would have


def test_a_tokens_weight_multiplies_its_loss(tiny_model) -> None:
    plain, task = [example(9, 4), example(6, 2)], CausalLM()
    weights = tuple([1.0] * 6 + [0.5] * 3)
    weighted = [replace(plain[0], loss_weights=weights), plain[1]]
    loss, count = task.loss(tiny_model, task.collate(weighted))
    expected = 0.0
    for e in weighted:
        logits = tiny_model(input_ids=torch.tensor([e.input_ids])).logits[0, :-1].float()
        each = F.cross_entropy(logits, torch.tensor(e.labels[1:]), reduction="none", ignore_index=IGNORED)
        expected += (each * torch.tensor(e.loss_weights[1:] or [1.0] * len(each))).sum().item()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert count == task.collate(plain).counted, "a weight scales the loss, it does not count fewer tokens"
    packed, _ = task.loss(tiny_model, task.collate(pack(weighted, 16)))
    assert packed.item() == pytest.approx(loss.item(), rel=1e-5)
