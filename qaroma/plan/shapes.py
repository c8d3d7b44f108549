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
_GEMMA3 = {
    "model_type": "gemma3_text", "vocab_size": 262208, "max_position_embeddings": 131072, "head_dim": 256,
    "query_pre_attn_scalar": 256, "sliding_window": 1024, "tie_word_embeddings": True,
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
    "llama3.3-70b": _LLAMA3_70B,
    "llama3.2-1b": {**_sized(_LLAMA3, 2048, 8192, 16, 32, 8), "head_dim": 64},
    "llama3.2-3b": {**_sized(_LLAMA3, 3072, 8192, 28, 24, 8), "head_dim": 128},
    "mistral-7b": {
        **_sized({"model_type": "mistral", "vocab_size": 32768}, 4096, 14336, 32, 32, 8),
        "max_position_embeddings": 32768, "sliding_window": None, "rope_theta": 1000000.0, "head_dim": 128,
    },  # v0.3; v0.1 had a sliding window
    "mistral-nemo-12b": {
        **_sized({"model_type": "mistral", "vocab_size": 131072}, 5120, 14336, 40, 32, 8),
        "max_position_embeddings": 131072, "sliding_window": None, "rope_theta": 1000000.0, "head_dim": 128,
    },
    "mistral-small-24b": {
        **_sized({"model_type": "mistral", "vocab_size": 131072}, 5120, 32768, 40, 32, 8),
        "max_position_embeddings": 32768, "sliding_window": None, "rope_theta": 100000000.0, "head_dim": 128,
    },
    "qwen2.5-0.5b": _sized(_QWEN2, 896, 4864, 24, 14, 2),
    "qwen2.5-1.5b": _sized(_QWEN2, 1536, 8960, 28, 12, 2),
    "qwen2.5-3b": _sized(_QWEN2, 2048, 11008, 36, 16, 2),
    "qwen2.5-7b": _sized(_QWEN2_LARGE, 3584, 18944, 28, 28, 4),
    "qwen2.5-14b": _sized(_QWEN2_LARGE, 5120, 13824, 48, 40, 8),
    "qwen2.5-32b": _sized(_QWEN2_LARGE, 5120, 27648, 64, 40, 8),
    "qwen2.5-72b": _sized(_QWEN2_LARGE, 8192, 29568, 80, 64, 8),
    "qwen3-0.6b": _sized(_QWEN3, 1024, 3072, 28, 16, 8),
    "qwen3-1.7b": _sized(_QWEN3, 2048, 6144, 28, 16, 8),
    "qwen3-4b": _sized(_QWEN3, 2560, 9728, 36, 32, 8),
    "qwen3-8b": {**_sized(_QWEN3, 4096, 12288, 36, 32, 8), "tie_word_embeddings": False},
    "qwen3-14b": {**_sized(_QWEN3, 5120, 17408, 40, 40, 8), "tie_word_embeddings": False},
    "qwen3-32b": {**_sized(_QWEN3, 5120, 25600, 64, 64, 8), "tie_word_embeddings": False},
    "gemma-3-1b": {
        **_sized(_GEMMA3, 1152, 6912, 26, 4, 1), "vocab_size": 262144, "max_position_embeddings": 32768,
        "sliding_window": 512,
    },
    "gemma-3-4b": _sized(_GEMMA3, 2560, 10240, 34, 8, 4),
    "gemma-3-12b": _sized(_GEMMA3, 3840, 15360, 48, 16, 8),
    "gemma-3-27b": {**_sized(_GEMMA3, 5376, 21504, 62, 32, 16), "head_dim": 128, "query_pre_attn_scalar": 168},
    "gemma-2-2b": _sized(_GEMMA2, 2304, 9216, 26, 8, 4),
    "gemma-2-9b": _sized(_GEMMA2, 3584, 14336, 42, 16, 8),
    "phi-3-mini": {
        **_sized({"model_type": "phi3", "vocab_size": 32064}, 3072, 8192, 32, 32, 32),
        "max_position_embeddings": 4096, "sliding_window": 2047,
    },
    "phi-3.5-mini": {
        **_sized({"model_type": "phi3", "vocab_size": 32064}, 3072, 8192, 32, 32, 32),
        "max_position_embeddings": 131072, "sliding_window": 262144,
    },
    "phi-4": {
        **_sized({"model_type": "phi3", "vocab_size": 100352}, 5120, 17920, 40, 40, 10),
        "max_position_embeddings": 16384, "rope_theta": 250000.0, "sliding_window": None, "pad_token_id": 100349,
    },
    "smollm3-3b": {
        **_sized({"model_type": "smollm3", "vocab_size": 128256}, 2048, 11008, 36, 16, 4),
        "max_position_embeddings": 65536, "rope_theta": 5000000.0, "tie_word_embeddings": True,
    },
    "smollm2-360m": {
        **_sized({"model_type": "llama", "vocab_size": 49152}, 960, 2560, 32, 15, 5),
        "max_position_embeddings": 8192, "rope_theta": 100000.0, "tie_word_embeddings": True,
    },
    "smollm2-1.7b": {
        **_sized({"model_type": "llama", "vocab_size": 49152}, 2048, 8192, 24, 32, 32),
        "max_position_embeddings": 8192, "rope_theta": 130000.0, "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        **_sized({"model_type": "llama", "vocab_size": 49152}, 576, 1536, 30, 9, 3),
        "max_position_embeddings": 8192, "rope_theta": 100000.0, "tie_word_embeddings": True,
    },
}  # fmt: skip

# Where each shape's weights are on the hub; a variant of the same shape stands after it. Asked for by these names, no
# network is needed.
_ON_THE_HUB = {
    "llama3-8b": "meta-llama/Meta-Llama-3-8B meta-llama/Meta-Llama-3-8B-Instruct",
    "llama3-70b": "meta-llama/Meta-Llama-3-70B meta-llama/Meta-Llama-3-70B-Instruct",
    "llama3.1-8b": "meta-llama/Llama-3.1-8B meta-llama/Llama-3.1-8B-Instruct",
    "llama3.1-70b": "meta-llama/Llama-3.1-70B meta-llama/Llama-3.1-70B-Instruct",
    "llama3.3-70b": "meta-llama/Llama-3.3-70B-Instruct",
    "llama3.2-1b": "meta-llama/Llama-3.2-1B meta-llama/Llama-3.2-1B-Instruct",
    "llama3.2-3b": "meta-llama/Llama-3.2-3B meta-llama/Llama-3.2-3B-Instruct",
    "mistral-7b": "mistralai/Mistral-7B-v0.3 mistralai/Mistral-7B-Instruct-v0.3",
    "mistral-nemo-12b": "mistralai/Mistral-Nemo-Base-2407 mistralai/Mistral-Nemo-Instruct-2407",
    "mistral-small-24b": "mistralai/Mistral-Small-24B-Base-2501 mistralai/Mistral-Small-24B-Instruct-2501",
    **{f"qwen2.5-{size}": f"Qwen/Qwen2.5-{size.upper()} Qwen/Qwen2.5-{size.upper()}-Instruct"
       for size in ("0.5b", "1.5b", "3b", "7b", "14b", "32b", "72b")},
    **{f"qwen3-{size}": f"Qwen/Qwen3-{size.upper()} Qwen/Qwen3-{size.upper()}-Base"
       for size in ("0.6b", "1.7b", "4b", "8b", "14b")},
    "qwen3-32b": "Qwen/Qwen3-32B",
    "gemma-2-2b": "google/gemma-2-2b google/gemma-2-2b-it",
    "gemma-2-9b": "google/gemma-2-9b google/gemma-2-9b-it",
    **{f"gemma-3-{size}": f"google/gemma-3-{size}-pt google/gemma-3-{size}-it" for size in ("1b", "4b", "12b", "27b")},
    "phi-3-mini": "microsoft/Phi-3-mini-4k-instruct",
    "phi-3.5-mini": "microsoft/Phi-3.5-mini-instruct",
    "phi-4": "microsoft/phi-4",
    "smollm3-3b": "HuggingFaceTB/SmolLM3-3B HuggingFaceTB/SmolLM3-3B-Base",
    **{f"smollm2-{size}": f"HuggingFaceTB/SmolLM2-{size.upper()} HuggingFaceTB/SmolLM2-{size.upper()}-Instruct"
       for size in ("135m", "360m", "1.7b")},
}  # fmt: skip
HUB_IDS = {name: ids.split()[0] for name, ids in _ON_THE_HUB.items()}
_KNOWN_IDS = {hub_id.lower(): name for name, ids in _ON_THE_HUB.items() for hub_id in ids.split()}


def known_shape(model: str) -> str | None:
    """The name in :data:`SHAPES` of a model that is named by it or by a hub id, in any case; None where none is."""
    name = model.lower()
    return name if name in SHAPES else _KNOWN_IDS.get(name)


def model_config(model: str, *, trust_remote_code: bool = False) -> Any:
    """The configuration of a model; nothing else of it is read or fetched.

    Args:
        model: a name in :data:`SHAPES` or a hub id of it, in any case; a config.json, folder, .gguf file, or other
            hub id.
        trust_remote_code: run Python code that comes with the model.

    Returns:
        transformers' configuration of a causal language model.

    Raises:
        QaromaError: no such model; built-in names that are near are said. Or one that is quantised
            already in a way that takes no adapter here.
    """
    from transformers import AutoConfig

    known = known_shape(model)
    if known is not None:
        values = dict(SHAPES[known])
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
    if known_shape(model) or (path.suffix == ".json" and path.is_file()):
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
