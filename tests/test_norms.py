"""Norms by torch's own kernel: as exact as the model's, and only where they compute the same."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qaroma.model.norms import use_torchs_norms

SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip


def causal(family: str):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES))
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_torchs_norms_are_as_exact_as_the_models(family: str, dtype: torch.dtype) -> None:
    def outcome(kind: torch.dtype, *, fused: bool = False) -> list[torch.Tensor]:
        model = causal(family).to(kind)
        if fused:
            names = list(model.state_dict())
            use_torchs_norms(model)
            assert list(model.state_dict()) == names
            assert not [m for m in model.modules() if type(m).__name__ in ("LlamaRMSNorm", "Qwen3RMSNorm")]
        logits = model(input_ids=torch.arange(3, 60)[None], use_cache=False).logits
        logits.square().mean().backward()
        return [logits.detach(), model.get_input_embeddings().weight.grad]

    truth, naive, ours = outcome(torch.float64), outcome(dtype), outcome(dtype, fused=True)
    for found, other, true in zip(ours, naive, truth, strict=True):
        assert (found - true).norm() <= 1.2 * (other - true).norm() + 1e-6 * true.norm()


def test_a_norm_that_computes_otherwise_stays() -> None:
    model = causal("gemma3_text")
    kinds = [type(module) for module in model.modules()]
    use_torchs_norms(model)
    assert [type(module) for module in model.modules()] == kinds
