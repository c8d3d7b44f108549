"""Which model is meant: a built-in shape, a config.json, a folder, or a hub id."""

from __future__ import annotations

import copy
import difflib
from pathlib import Path
from typing import Any

from qaroma.errors import QaromaError
from qaroma.model.builtin import require_model
from qaroma.model.failures import explained
from qaroma.model.found import FoundModel, find_model, stored_quantization

_LLAMA3 = {
    "model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "bos_token_id": 128000, "eos_token_id": 128001, "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}  # fmt: skip
_LLAMA3_8B = {
    **_LLAMA3, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "tie_word_embeddings": False,
}  # fmt: skip
_LLAMA3_70B = {
    **_LLAMA3, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "tie_word_embeddings": False,
}  # fmt: skip
_QWEN2 = {
    "model_type": "qwen2", "vocab_size": 151936, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "tie_word_embeddings": True,
}  # fmt: skip
_QWEN2_LARGE = {**_QWEN2, "vocab_size": 152064, "tie_word_embeddings": False, "max_position_embeddings": 131072}
_QWEN3 = {
    "model_type": "qwen3", "vocab_size": 151936, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "head_dim": 128, "num_key_value_heads": 8, "tie_word_embeddings": True,
}  # fmt: skip
_GEMMA2 = {
    "model_type": "gemma2", "vocab_size": 256000, "max_position_embeddings": 8192, "head_dim": 256,
    "query_pre_attn_scalar": 256, "sliding_window": 4096,
}  # fmt: skip

# What decides shapes, of the published config.json; "sizes" below are hidden, intermediate, layers, heads, key heads.
_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def _sized(common: dict[str, Any], *sizes: int) -> dict[str, Any]:
    return {**common, **dict(zip(_FIELDS, sizes, strict=True))}


SHAPES: dict[str, dict[str, Any]] = {
    "llama3-8b": {**_LLAMA3_8B, "max_position_embeddings": 8192},
    "llama3-70b": {**_LLAMA3_70B, "max_position_embeddings": 8192},
    "llama3.1-8b": _LLAMA3_8B,
    "llama3.1-70b": _LLAMA3_70B,
    "llama3.2-1b": {**_sized(_LLAMA3, 2048, 8192, 16, 32, 8), "head_dim": 64},
    "llama3.2-3b": {**_sized(_LLAMA3, 3072, 8192, 28, 24, 8), "head_dim": 128},
    "mistral-7b": {
        **_sized({"model_type": "mistral", "vocab_size": 32768}, 4096, 14336, 32, 32, 8),
        "max_position_embeddings": 32768, "sliding_window": None, "rope_theta": 1000000.0, "head_dim": 128,
    },  # v0.3; v0.1 had a sliding window
    "qwen2.5-0.5b": _sized(_QWEN2, 896, 4864, 24, 14, 2),
    "qwen2.5-1.5b": _sized(_QWEN2, 1536, 8960, 28, 12, 2),
    "qwen2.5-3b": _sized(_QWEN2, 2048, 11008, 36, 16, 2),
    "qwen2.5-7b": _sized(_QWEN2_LARGE, 3584, 18944, 28, 28, 4),
    "qwen2.5-14b": _sized(_QWEN2_LARGE, 5120, 13824, 48, 40, 8),
    "qwen3-0.6b": _sized(_QWEN3, 1024, 3072, 28, 16, 8),
    "qwen3-1.7b": _sized(_QWEN3, 2048, 6144, 28, 16, 8),
    "qwen3-4b": _sized(_QWEN3, 2560, 9728, 36, 32, 8),
    "qwen3-8b": {**_sized(_QWEN3, 4096, 12288, 36, 32, 8), "tie_word_embeddings": False},
    "gemma-2-2b": _sized(_GEMMA2, 2304, 9216, 26, 8, 4),
    "gemma-2-9b": _sized(_GEMMA2, 3584, 14336, 42, 16, 8),
    "phi-3-mini": {
        **_sized({"model_type": "phi3", "vocab_size": 32064}, 3072, 8192, 32, 32, 32),
        "max_position_embeddings": 4096, "sliding_window": 2047,
    },
    "smollm2-135m": {
        **_sized({"model_type": "llama", "vocab_size": 49152}, 576, 1536, 30, 9, 3),
        "max_position_embeddings": 8192, "rope_theta": 100000.0, "tie_word_embeddings": True,
    },
}  # fmt: skip


def model_config(model: str, *, trust_remote_code: bool = False) -> Any:
    """The configuration of a model; nothing else of it is read or fetched.

    Args:
        model: a name in :data:`SHAPES` in any case, a config.json, a folder, a .gguf file, or a hub id.
        trust_remote_code: run Python code that comes with the model.

    Returns:
        transformers' configuration of a causal language model.

    Raises:
        QaromaError: no such model; built-in names that are near are said. Or one that is quantised
            already in a way that takes no adapter here.
    """
    from transformers import AutoConfig

    shape = SHAPES.get(model.lower())
    if shape is not None:
        values = dict(shape)
        return AutoConfig.for_model(values.pop("model_type"), **values)
    path = Path(model)
    if path.suffix == ".json" and path.is_file():
        model = str(path.parent)
        if path.name != "config.json":
            with explained(str(path)):
                config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
                return _unquantised(config, str(path))
    require_shape(model)
    return plannable(find_model(model, trust_remote_code=trust_remote_code))


def plannable(base: FoundModel) -> Any:
    """The configuration of a model that was found, as a planner builds it."""
    return _unquantised(copy.deepcopy(base.config), base.name)


def require_shape(model: str) -> None:
    """See to it that a name can be a model's, without a look at it; the hub is not asked.

    Raises:
        QaromaError: a name that is neither built in nor here; built-in names that are near are said.
    """
    path = Path(model)
    if model.lower() in SHAPES or (path.suffix == ".json" and path.is_file()):
        return
    if not path.exists() and "/" not in model:
        _refuse_typo(model)
    require_model(model)


def _refuse_typo(model: str) -> None:
    """A bare name that is not here would be asked for on the hub; one like a built-in name is a slip."""
    near = difflib.get_close_matches(model.lower(), SHAPES, n=3, cutoff=0.6)
    expected = f"near it are {', '.join(near)}" if near else f"built in are {', '.join(SHAPES)}"
    raise QaromaError(
        f"got model '{model}', which is neither built in nor here; {expected}. "
        f"Type: qaroma plan --model {near[0] if near else 'OWNER/NAME, for one on the hub'}"
    )


def _unquantised(config: Any, model: str) -> Any:
    """A checkpoint in bitsandbytes' 4 bits has the same shapes; its setting would stop a model from being built."""
    if stored_quantization(config, model) is not None or hasattr(config, "quantization_config"):
        del config.quantization_config
    return config
