"""The fine-tuned model as a GGUF model file, written a tensor at a time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qaroma.data.templates import Template
from qaroma.errors import QaromaError
from qaroma.export.gguf_families import ARCHITECTURES, head_width, rope_of
from qaroma.export.gguf_layout import gguf_layout
from qaroma.export.gguf_names import GgufNames
from qaroma.export.gguf_types import check_outtype, converted, file_type, kinds_of
from qaroma.export.gguf_vocab import add_vocabulary
from qaroma.export.weights import StoredTensor, merged_tensors
from qaroma.method.factors import Update

FILE = "model.gguf"


def write_gguf_model(
    folder: Path,
    tensors: list[StoredTensor],
    update: Update,
    config: Any,
    tokenizer: Any,
    template: Template,
    *,
    outtype: str,
    name: str,
) -> dict[str, Any]:
    """Write ``model.gguf``: weights, hyper-parameters, tokenizer and chat template.

    Args:
        folder: an existing directory.
        tensors: the base's, from :mod:`qaroma.export.weights`.
        update: the update; empty writes the base itself.
        config, tokenizer: the base's, from transformers.
        template: of the run.
        outtype: one of :data:`qaroma.export.format_facts.OUTTYPES`, of the matrices; vectors are f32 always.
        name: ``general.name``.

    Returns:
        ``bytes`` of the tensors.

    Raises:
        QaromaError: an architecture, a tokenizer or an outtype that cannot be written.
    """
    from gguf import GGML_QUANT_VERSION, GGUFWriter

    names = GgufNames(config)
    check_outtype(outtype)
    check_positions(config)
    writer = GGUFWriter(folder / FILE, names.architecture.name)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_file_type(file_type(outtype))
    _add_hyper_parameters(writer, config)
    names.architecture.settings(writer, config)
    add_vocabulary(writer, tokenizer, template, config.vocab_size)
    stored = gguf_layout(merged_tensors(tensors, update), names)
    factors = rope_factors(config)
    grouped = config.num_key_value_heads < config.num_attention_heads
    shapes = {tensor.name: tensor.shape for tensor, _ in stored}
    kinds = kinds_of(shapes, outtype, layers=config.num_hidden_layers, grouped=grouped)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for tensor, _ in stored:
        kind = kinds[tensor.name]
        size = _row_bytes(tensor, kind) * (tensor.elements // tensor.shape[-1])
        writer.add_tensor_info(tensor.name, tensor.shape, np.float32, size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for tensor, order in stored:
        writer.write_tensor_data(_converted(tensor, kinds[tensor.name], order))
    writer.close()
    return {"bytes": (folder / FILE).stat().st_size}


def check_positions(config: Any) -> None:
    """Refuse a way of scaling positions that is not written here.

    Raises:
        QaromaError: dynamic scaling, LongRoPE and others.
    """
    kind = rope_of(config).get("rope_type", "default")
    if kind not in ("default", "linear", "yarn", "llama3"):
        raise QaromaError(
            f"the base scales its positions by '{kind}', which is not written to GGUF here; "
            "type: --format gguf-adapter, or --format merged"
        )


def context_length(config: Any) -> int:
    """Tokens up to which llama.cpp computes what the base does.

    Where it has no sliding window for a family, it lets every token see all before it. Within the first window that is
    the same, so the file's context ends there.

    Args:
        config: the base's transformers configuration.
    """
    longest, window = int(config.max_position_embeddings), getattr(config, "sliding_window", None)
    if ARCHITECTURES[config.model_type].slides:
        return longest
    kinds = getattr(config, "layer_types", None)
    slides = "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True)
    return min(longest, int(window)) if window and slides else longest


def _row_bytes(tensor: StoredTensor, kind: Any) -> int:
    from gguf import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[kind]
    return int(tensor.shape[-1] // block * size)


def _converted(tensor: StoredTensor, kind: Any, order: torch.Tensor | None) -> np.ndarray[Any, Any]:
    """A whole tensor in its GGUF type and row order, filled block by block."""
    place = None if order is None else order.argsort().numpy()  # row of the file for each row of transformers'
    whole: np.ndarray[Any, Any] | None = None
    for start, block in tensor.blocks():
        part = converted(block.float(), kind, tensor.name)
        if whole is None:
            whole = np.empty((tensor.shape[0], *part.shape[1:]), dtype=part.dtype)
        stop = start + len(part)
        whole[slice(start, stop) if place is None else place[start:stop]] = part
    assert whole is not None
    return whole


def _add_hyper_parameters(writer: Any, config: Any) -> None:
    head, rope = head_width(config), rope_of(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(int(head * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(_scaling("LINEAR"))
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn":
        writer.add_rope_scaling_type(_scaling("YARN"))
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _scaling(name: str) -> Any:
    from gguf import RopeScalingType

    return RopeScalingType[name]


def rope_factors(config: Any) -> np.ndarray[Any, Any] | None:
    """By what llama.cpp divides each rotary frequency, for Llama 3's scaling; None for all others.

    Wavelengths above ``original / low_freq_factor`` are stretched by ``factor``, those below
    ``original / high_freq_factor`` are left, and between them the inverse factor is blended linearly
    in original / wavelength (Llama 3.1's reference code).

    Returns:
        (head_dim / 2,), fp32.
    """
    rope = rope_of(config)
    if rope.get("rope_type") != "llama3":
        return None
    low, high, original = (
        rope[key] for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    frequencies = rope["rope_theta"] ** -(np.arange(0, head_width(config), 2, dtype=np.float64) / head_width(config))
    turns = original * frequencies / (2 * math.pi)  # full turns within the original context
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    inverse: np.ndarray[Any, Any] = (1 - blend) / rope["factor"] + blend
    return (1 / inverse).astype(np.float32)
