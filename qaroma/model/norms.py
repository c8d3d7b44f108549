"""RMSNorm by torch's one kernel a pass, in the place of a model's own, which takes some eight forward and twelve back.

On a card, where kernels cost: by arithmetic a tenth of a step (``qaroma plan --card``), more with tiles. On a CPU torch
has no such kernel.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def use_torchs_norms(model: Any) -> None:
    """Replace every norm that computes as Llama's does by torch's, which rounds once where Llama's rounds twice.

    Norms that do otherwise (Gemma adds one to its weight) stay, as does one whose weight has another dtype than the
    model: there torch has no single kernel.

    Args:
        model: a transformers model; changed in place, its parameters and their names as they were.
    """
    for name, module in list(model.named_modules()):
        if _is_llamas(type(module)) and module.weight.dtype == model.dtype:
            norm = nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon, device="meta")
            norm.weight = module.weight
            model.set_submodule(name, norm.train(module.training))


def _is_llamas(kind: type[nn.Module]) -> bool:
    """Whether a class of norms has the code of Llama's, which transformers copies from family to family."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    code, llamas = (getattr(one.forward, "__code__", None) for one in (kind, LlamaRMSNorm))
    parts = ("co_code", "co_names", "co_consts")
    return kind.__name__.endswith("RMSNorm") and all(getattr(code, p, None) == getattr(llamas, p) for p in parts)
