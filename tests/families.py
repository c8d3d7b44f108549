"""Tiny random models of many families, each taken through training, generating and exporting.

``examples/families.md`` is made of this list: ``python tests/families.py``.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from conftest import tiny_tokenizer

from qaroma.data.encode import Example
from qaroma.data.forms import Message
from qaroma.data.templates import Template
from qaroma.errors import QaromaError
from qaroma.export.exporter import Options, export
from qaroma.export.selftest import SelfTest
from qaroma.inference.generate import generate
from qaroma.inference.open import open_run
from qaroma.method.adapter import Adapter
from qaroma.method.attach import attach
from qaroma.method.dequantise import dense_weight
from qaroma.method.lora import PlainLora
from qaroma.method.targets import unadaptable
from qaroma.model.base import fingerprint, load_base, load_tokenizer
from qaroma.runs.adapter import save_adapter
from qaroma.runs.adapter_info import AdapterInfo, BaseInfo, TaskInfo
from qaroma.tasks.causal_lm import CausalLM, require_known_head

TABLE = Path(__file__).resolve().parents[1] / "examples" / "families.md"
EXACT = Options(dtype="fp32", outtype="f32")
RANK, STEPS, RATE = 4, 8, 1e-2
ENGINES = {"peft": "PEFT", "merged": "transformers", "gguf": "llama.cpp"}
QUANTIZATIONS = ("nf4", "none")
QUESTIONS = ("count 7 x", "What is the colour of the sea?")

_EVERY: dict[str, Any] = {"vocab_size": 512, "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 2}
_DENSE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip
_TIED = {**_DENSE, "tie_word_embeddings": True}
_FULL_HEADS = {key: value for key, value in _DENSE.items() if key != "num_key_value_heads"}
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
_EXPERTS = {**_DENSE, "moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
_ROUTED = {**_DENSE, "num_local_experts": 4, "num_experts_per_tok": 2}
_SLIDING = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
_STATES = {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}

# model_type of transformers -> what its configuration says.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _DENSE,
    "mistral": {**_DENSE, "sliding_window": None},
    "qwen2": _DENSE,
    "qwen3": {**_DENSE, "head_dim": 32},
    "gemma": {**_TIED, "head_dim": 32},
    "gemma2": {**_TIED, **_SLIDING, "sliding_window": 16, "head_dim": 32, "query_pre_attn_scalar": 32},
    "gemma3_text": {
        **_TIED, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16, "num_hidden_layers": 6,
    },
    "phi": _FULL_HEADS,
    "phi3": {**_DENSE, "sliding_window": None},
    "granite": {
        **_TIED, "embedding_multiplier": 2.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
    },
    "smollm3": {**_TIED, "num_hidden_layers": 4},
    "olmo": _DENSE,
    "olmo2": _DENSE,
    "starcoder2": {**_TIED, "sliding_window": None},
    "stablelm": _DENSE,
    "cohere": {**_TIED, "logit_scale": 0.5},
    "cohere2": {**_TIED, **_SLIDING, "logit_scale": 0.5},
    "glm": {**_DENSE, "head_dim": 16},
    "glm4": {**_DENSE, "head_dim": 16},
    "falcon": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "multi_query": True},
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gptj": {**_GPT2, "rotary_dim": 8},
    "gpt_neox": _FULL_HEADS,
    "opt": {
        "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 64,
        "max_position_embeddings": 512,
    },
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 512},
    "nemotron": _DENSE,
    "mixtral": {**_ROUTED, "sliding_window": None},
    "phimoe": {**_ROUTED, "sliding_window": None},
    "granitemoe": _ROUTED,
    "olmoe": {**_DENSE, "num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 64},
    "qwen3_moe": {**_EXPERTS, "head_dim": 32, "norm_topk_prob": True},
    "qwen3_next": {
        **_EXPERTS, "head_dim": 32, "shared_expert_intermediate_size": 64, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "deepseek_v3": {
        **_DENSE, "num_key_value_heads": 4, "moe_intermediate_size": 64, "n_routed_experts": 4, "n_shared_experts": 1,
        "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 32,
        "q_lora_rank": 48, "qk_rope_head_dim": 16, "v_head_dim": 32, "qk_nope_head_dim": 32,
    },
    "llama4_text": {
        **_ROUTED, "num_experts_per_tok": 1, "intermediate_size_mlp": 128, "head_dim": 32,
        "interleave_moe_layer_step": 1,
    },
    "gpt_oss": {**_ROUTED, **_SLIDING, "head_dim": 32},
    "mamba": _STATES,
    "falcon_mamba": _STATES,
    "mamba2": {**_STATES, "num_heads": 8, "head_dim": 16, "n_groups": 2},
    "jamba": {
        **_DENSE, "num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
        "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 8, "use_mamba_kernels": False,
    },
    "bamba": {
        **_DENSE, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8,
        "attn_layer_indices": [1],
    },
    "falcon_h1": {
        **_DENSE, "mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8,
        "lm_head_multiplier": 0.5,
    },
}  # fmt: skip


@dataclass
class Found:
    """What came of one family on one base.

    Attributes:
        refused: the sentence that ended it before training; empty where it trained.
        without_gradient: adapters that got none.
        losses: of the repeated batch, before the first step and after the last.
        error: the largest relative difference of an adapted layer from W0 x + s B A x.
        effect: the largest change of a logit that the adapter makes.
        generates: whether greedy answers come out of qaroma's own generate.
        notes: what is said of layers that take no adapter.
        exports: format -> its self-test, or the sentence that refuses it.
    """

    refused: str = ""
    without_gradient: list[str] = field(default_factory=list)
    losses: tuple[float, float] = (math.nan, math.nan)
    error: float = math.nan
    effect: float = math.nan
    generates: bool = False
    notes: list[str] = field(default_factory=list)
    exports: dict[str, SelfTest | str] = field(default_factory=dict)

    @property
    def trains(self) -> bool:
        return not self.without_gradient and self.losses[1] < 0.97 * self.losses[0] and self.error < 1e-4

    def arrived(self, kind: str) -> bool:
        """Whether an engine that is not ours gives our logits, which the adapter has changed by much more."""
        test = self.exports[kind]
        return isinstance(test, SelfTest) and test.passed and test.engine == ENGINES[kind] and self.effect > 0.1


def write_base(family: str, folder: Path, tokenizer: Any) -> None:
    """A random model of a family, every weight random, with its tokenizer.

    It never says a special token, at which an engine may stop, nor half a character, of which none tells.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(4)
    config = AutoConfig.for_model(family, **{**_EVERY, **FAMILIES[family]})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "conv" not in name and "A_log" not in name:
            torch.nn.init.normal_(parameter, std=0.15)
        elif "norm" in name or "bias" in name:
            parameter.data += torch.randn_like(parameter) * 0.1
    strange = [index for index in range(512) if index < 3 or not tokenizer.decode([index]).isascii()]
    model.get_output_embeddings().weight.data[strange] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def try_family(family: str, folder: Path, tokenizer: Any, quantization: str) -> Found:
    """Take a family through all that qaroma does, on a base in 4 bits (``nf4``) or in fp32 (``none``)."""
    base, found = folder / "base", Found()
    write_base(family, base, tokenizer)
    model: Any = load_base(base, quantization=quantization, compute_dtype=torch.float32, device="cpu")
    found.notes = unadaptable(model)
    try:
        require_known_head(model)
        adapter = attach(model, inner_rank=RANK, alpha=2.0 * RANK)
    except QaromaError as error:
        found.refused = str(error)
        return found
    _train(found, model, adapter, tokenizer)
    held = BaseInfo(str(base), None, fingerprint(model), quantization, True, "fp32")
    task = TaskInfo(template=Template.choose(load_tokenizer(base)).to_json())
    info = AdapterInfo({}, RANK, 2.0 * RANK, method="lora", step=STEPS, base=held, task=task)
    save_adapter(adapter, folder / "adapter", base=str(base), info=info)
    tuned = open_run(folder / "adapter", device="cpu")
    talks = [[Message("user", question)] for question in QUESTIONS]
    answers = generate(tuned.model, tuned.tokenizer, tuned.template, talks, max_new_tokens=8)
    found.generates = len(answers) == len(talks) and any(answers)
    for kind in ENGINES:
        try:
            (one,) = export(folder / "adapter", [kind], output=folder / kind, options=EXACT)
            assert one.test is not None
            found.exports[kind] = one.test
        except QaromaError as error:
            found.exports[kind] = str(error)
    return found


def _train(found: Found, model: Any, adapter: Adapter, tokenizer: Any) -> None:
    task, ids = CausalLM(2), tokenizer("count one and it is one; count two and it is two.").input_ids
    batch = task.collate([Example(ids, ids, "", ()), Example(ids[:9], ids[:9], "", ())])
    with torch.no_grad():
        bare = model.eval()(input_ids=batch.input_ids[:1]).logits
    method = PlainLora(adapter, learning_rate=RATE, total_steps=STEPS, warmup=1)
    losses = []
    for step in range(STEPS + 1):
        loss, count = task.loss(model.train(), batch)
        losses.append(loss.item() / count)
        if step == STEPS:
            break
        (loss / count).backward()
        if step == 0:
            gradients = {name: layer.active_B.grad for name, layer in adapter.active_layers()}
            found.without_gradient = [name for name, grad in gradients.items() if grad is None or not grad.any()]
        method.step()
    method.finish()
    found.losses = (losses[0], losses[-1])
    found.error = max(_error(layer) for layer in adapter.layers.values())
    with torch.no_grad():
        found.effect = float((model.eval()(input_ids=batch.input_ids[:1]).logits - bare).abs().max())


@torch.no_grad()
def _error(layer: Any) -> float:
    x_TN = torch.randn(5, layer.in_features)
    A_RN, B_RM = (factor.double() for factor in layer.factors())
    expected = x_TN.double() @ (dense_weight(layer.base, torch.float64).T + A_RN.T @ B_RM)
    if layer.bias is not None:
        expected += layer.bias
    return float((layer(x_TN).double() - expected).norm() / expected.norm())


def table(results: Mapping[str, Mapping[str, Found]]) -> str:
    """What was found, as Markdown.

    Args:
        results: family -> quantization -> what came of it.
    """
    lines = [
        "# Families",
        "",
        f"{len(results)} families of transformers, tried on tiny models with random weights (fp32 arithmetic, a CPU),",
        "on an NF4 base and on a dense one. Made by `python tests/families.py`; each line is a test",
        "(`pytest -m slow tests/test_families.py`).",
        "",
        "- **trains**: gradient reaches every adapter, the loss of a repeated batch falls, and every adapted layer",
        "  computes W0 x + s B A x to 1e-4 of its norm.",
        "- **generates**: `qaroma generate` answers.",
        "- **PEFT**, **merged**, **GGUF**: PEFT, transformers and llama.cpp open what was exported and give our logits",
        "  (llama.cpp: our likeliest tokens with their log-probabilities), which the adapter had changed by far more.",
        "",
        "Where a cell is a number, the sentence that qaroma says before it trains or exports stands below under it,",
        "with FAMILY, NAME, N and M in the place of what differs.",
        "",
        "| family | trains | generates | PEFT | merged | GGUF |",
        "|---|---|---|---|---|---|",
    ]
    sentences: list[str] = []
    for family, found in results.items():
        lines.append(f"| {family} | " + " | ".join(_cells(list(found.values()), sentences)) + " |")
    return "\n".join([*lines, "", *(f"{n}. {sentence}" for n, sentence in enumerate(sentences, 1)), ""])


def _cells(found: Sequence[Found], sentences: list[str]) -> list[str]:
    """A family's line; what holds on one of its bases alone is no yes."""
    refused = next((one.refused for one in found if one.refused), "")
    if refused:
        return [_number(refused, sentences), *[""] * 4]
    notes = " ".join(_number(note, sentences) for note in dict.fromkeys(note for one in found for note in one.notes))
    trains = "yes" if all(one.trains for one in found) else "NO"
    cells = [f"{trains} ({notes.replace(' ', ', ')})" if notes else trains]
    cells.append("yes" if all(one.generates for one in found) else "NO")
    for kind in ENGINES:
        said = next((one.exports[kind] for one in found if isinstance(one.exports[kind], str)), None)
        arrived = all(one.arrived(kind) for one in found)
        cells.append(_number(said, sentences) if isinstance(said, str) else "yes" if arrived else "NO")
    return cells


def _number(sentence: str, sentences: list[str]) -> str:
    """The sentence's place; those that differ in the family's name, or in which layer is the first, are one."""
    general = re.sub(rf"\b({'|'.join(FAMILIES)})('? \(|', which|, which does)", r"FAMILY\2", sentence)
    general = re.sub(r"\b\d+ (layers|fused)", r"N \1", re.sub(r"\b\d+ of \d+", "N of M", general))
    general = re.sub(r"[\w.]*layers\.\d[\w.]*", "NAME", general)
    if general not in sentences:
        sentences.append(general)
    return str(sentences.index(general) + 1)


def main() -> None:
    """Try every family on both bases and write the table."""
    tokenizer, results = tiny_tokenizer(), {}
    for family in FAMILIES:
        results[family] = {}
        for quantization in QUANTIZATIONS:
            with tempfile.TemporaryDirectory() as folder:
                results[family][quantization] = try_family(family, Path(folder), tokenizer, quantization)
    TABLE.write_text(table(results), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
