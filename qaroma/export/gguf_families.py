"""What llama.cpp must be told of each family of models, and what of a configuration it computes otherwise.

Beside its converter (convert_hf_to_gguf.py), whose classes are named here, the model files of llama.cpp itself
(src/models/) say what a value that a file leaves out is taken for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's architectures.

    Attributes:
        name: as ``general.architecture`` has it.
        interleaved: whether rows of q and k are stored as neighbouring pairs.
        norm_offset: what is added to the weights of norms, for those that multiply by 1 + w.
        slides: whether llama.cpp has the family's sliding windows.
        settings: writes what only this family has: (gguf's writer, the configuration).
        unlike: says what of a configuration llama.cpp computes otherwise; None where nothing.
    """

    name: str
    interleaved: bool = False
    norm_offset: float = 0.0
    slides: bool = False
    settings: Callable[[Any, Any], None] = lambda writer, config: None
    unlike: Callable[[Any], str | None] = lambda config: None


def rope_of(config: Any) -> dict[str, Any]:
    """How a model turns positions into angles; where layers differ, how those do that see all tokens."""
    rope: dict[str, Any] = config.rope_parameters.get("full_attention", config.rope_parameters)
    return rope


def head_width(config: Any) -> int:
    """Columns of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _gemma2_settings(writer: Any, config: Any) -> None:
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_sliding_window(config.sliding_window)


def _gemma2_unlike(config: Any) -> str | None:
    if config.attn_logit_softcapping is None or config.final_logit_softcapping is None:
        return "logits without a soft cap"
    return _attention_scale_unlike(config, layers_of_27b=46) or _windows_unlike(config, every=2)


def _gemma3_settings(writer: Any, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)
    writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])


def _gemma3_unlike(config: Any) -> str | None:
    if getattr(config, "use_bidirectional_attention", False):
        return "attention in both directions"
    if config.attn_logit_softcapping is not None or config.final_logit_softcapping is not None:
        return "logits with a soft cap"
    return _attention_scale_unlike(config, layers_of_27b=62) or _windows_unlike(config, every=6)


def _attention_scale_unlike(config: Any, *, layers_of_27b: int) -> str | None:
    """llama.cpp divides by the square root of a head's width, but for the 27B models."""
    of_27b = config.num_hidden_layers == layers_of_27b
    width = config.hidden_size / config.num_attention_heads if of_27b else head_width(config)
    scalar = config.query_pre_attn_scalar
    return None if scalar == width else f"attention scaled by {scalar} (query_pre_attn_scalar; expected {width:g})"


def _windows_unlike(config: Any, *, every: int) -> str | None:
    kinds = [("sliding" if (layer + 1) % every else "full") + "_attention" for layer in range(config.num_hidden_layers)]
    return None if list(config.layer_types) == kinds else f"full attention in other layers than one of {every}"


def _phi3_settings(writer: Any, config: Any) -> None:
    writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    writer.add_sliding_window(config.sliding_window or 0)


def _granite_settings(writer: Any, config: Any) -> None:
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)


def _smollm3_unlike(config: Any) -> str | None:
    rotated = [int((layer + 1) % 4 != 0) for layer in range(config.num_hidden_layers)]
    return None if list(config.no_rope_layers) == rotated else "positions left out of other layers than one of 4"


def _qwen3_moe_settings(writer: Any, config: Any) -> None:
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def _qwen3_moe_unlike(config: Any) -> str | None:
    if not config.norm_topk_prob:
        return "weights of experts that do not sum to 1 (norm_topk_prob)"
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        return "layers without experts"
    return None


# model_type of transformers -> llama.cpp's architecture.
ARCHITECTURES = {
    "llama": Architecture("llama", interleaved=True),  # LlamaModel
    "mistral": Architecture("llama", interleaved=True),
    "qwen2": Architecture("qwen2"),  # Qwen2Model
    "qwen3": Architecture("qwen3"),  # Qwen3Model
    "qwen3_moe": Architecture("qwen3moe", settings=_qwen3_moe_settings, unlike=_qwen3_moe_unlike),  # Qwen3MoeModel
    "gemma": Architecture("gemma", norm_offset=1.0),  # GemmaModel
    "gemma2": Architecture(
        "gemma2", norm_offset=1.0, slides=True, settings=_gemma2_settings, unlike=_gemma2_unlike
    ),  # Gemma2Model
    "gemma3_text": Architecture(
        "gemma3", norm_offset=1.0, slides=True, settings=_gemma3_settings, unlike=_gemma3_unlike
    ),  # Gemma3Model
    "phi3": Architecture("phi3", settings=_phi3_settings),  # Phi3MiniModel
    "granite": Architecture("granite", interleaved=True, settings=_granite_settings),  # GraniteModel
    "smollm3": Architecture("smollm3", interleaved=True, unlike=_smollm3_unlike),  # SmolLM3Model
    "olmo2": Architecture("olmo2"),  # Olmo2Model
}
