"""GGUF: names, row orders, rotary factors, vocabulary, Modelfile; and llama.cpp itself on tiny models."""

from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config
from export_adapters import random_update
from families import FAMILIES, write_base
from transformers import AutoConfig, AutoModelForCausalLM

from qaroma.data.forms import Message
from qaroma.data.templates import Template
from qaroma.errors import QaromaError
from qaroma.export.gguf_adapter import read_gguf_adapter, write_gguf_adapter
from qaroma.export.gguf_layout import gguf_layout
from qaroma.export.gguf_model import rope_factors, write_gguf_model
from qaroma.export.gguf_names import GgufNames
from qaroma.export.gguf_vocab import check_vocabulary, pre_tokenizer_name
from qaroma.export.ollama import modelfile, template_pieces
from qaroma.export.readers import LlamaCpp, LlamaCppAnswer
from qaroma.export.selftest import compare_llama_cpp, live_answers
from qaroma.export.weights import StoredTensor, dequantised_tensors
from qaroma.method.attach import attach_update, detach, linear_shapes

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def tiny(kind: str, tokenizer=None):
    """A tiny random model of one of the architectures, every weight random, biases too.

    With a tokenizer, it never says a special token, at which llama.cpp may stop, nor half a character, of
    which it does not tell.
    """
    import transformers

    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "max_position_embeddings", "eos_token_id", "pad_token_id")
    settings = {**{name: getattr(tiny_config(), name) for name in names}, "tie_word_embeddings": False}
    if kind == "llama3":
        config = transformers.LlamaConfig(**settings, rope_parameters=LLAMA3_ROPE, attention_bias=True)
        model = transformers.LlamaForCausalLM(config)
    elif kind == "tied":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**settings, "tie_word_embeddings": True}))
    elif kind == "mistral":
        model = transformers.MistralForCausalLM(transformers.MistralConfig(**settings))
    elif kind == "qwen2":
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**settings))
    else:
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**settings, head_dim=32))
    torch.manual_seed(4)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 1.0
    if tokenizer is not None:
        strange = [index for index in range(512) if index < 3 or not tokenizer.decode([index]).isascii()]
        model.get_output_embeddings().weight.data[strange] = 0
    return model.float().eval()


def test_an_adapter_comes_back_by_llama_cpps_rules(tiny_model, tmp_path: Path) -> None:
    update = random_update(linear_shapes(tiny_model))
    write_gguf_adapter(tmp_path, update, tiny_model.config, name="x", dtype=torch.float32)
    read = read_gguf_adapter(tmp_path / "adapter.gguf", tiny_model.config, update)
    assert set(read) == {name for name, factors in update.items() if factors.rank}
    for name, factors in read.items():
        assert factors.rank == update[name].rank  # its own: nothing is padded
        assert torch.allclose(factors.B.T @ factors.A, update[name].B.T @ update[name].A, atol=1e-7), name


def test_what_an_adapter_file_says(tiny_model, tmp_path: Path) -> None:
    from gguf import GGUFReader

    update = random_update(linear_shapes(tiny_model))
    write_gguf_adapter(tmp_path, update, tiny_model.config, name="x", dtype=torch.float16)
    reader = GGUFReader(tmp_path / "adapter.gguf")
    said = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert said["general.type"] == "adapter"
    assert said["adapter.type"] == "lora"
    assert said["general.architecture"] == "llama"
    assert said["adapter.lora.alpha"] == 0.0
    shapes = {tensor.name: tuple(int(n) for n in tensor.shape) for tensor in reader.tensors}
    rank = update["model.layers.1.mlp.down_proj"].rank
    assert shapes["blk.1.ffn_down.weight.lora_a"] == (128, rank)  # gguf's order: the fastest dimension first
    assert shapes["blk.1.ffn_down.weight.lora_b"] == (rank, 64)
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"F16"}


def test_rows_of_q_and_k_are_reordered_as_the_converter_does() -> None:
    from model_bases import llama_cpp_rows

    names = GgufNames(tiny_config())
    weight = torch.randn(64, 5)
    order = names.row_order("model.layers.0.self_attn.q_proj.weight", 64)
    assert np.array_equal(weight[order].numpy(), llama_cpp_rows(weight.numpy(), 4))
    order = names.row_order("model.layers.0.self_attn.k_proj.bias", 32)
    assert np.array_equal(weight[:32][order].numpy(), llama_cpp_rows(weight[:32].numpy(), 2))
    assert names.row_order("model.layers.0.self_attn.v_proj.weight", 32) is None


def test_rotary_factors_are_transformers_frequencies() -> None:
    model = tiny("llama3")
    plain = 10000.0 ** -(np.arange(0, 16, 2) / 16)
    factors = rope_factors(model.config)
    np.testing.assert_allclose(plain / factors, model.model.rotary_emb.inv_freq.numpy(), rtol=1e-5)
    assert len(set(factors.tolist())) > 1
    assert rope_factors(tiny_config()) is None


def test_architectures_without_names_are_refused() -> None:
    from transformers import GPTNeoXConfig

    with pytest.raises(QaromaError, match=r"of the architecture 'gpt_neox', which GGUF exports do not cover.*padded"):
        GgufNames(GPTNeoXConfig())
    with pytest.raises(QaromaError, match=r"no name for the tensor model\.layers\.0\.self_attn\.extra\.weight"):
        GgufNames(tiny_config()).tensor("model.layers.0.self_attn.extra.weight")


LLAMA3_CUT = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


def cutting(tokenizer, pre_tokenizer, **model):
    """A copy of a tokenizer that cuts text in another way."""
    import copy
    import json

    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"].update(model)
    other = copy.deepcopy(tokenizer)
    other._tokenizer = Tokenizer.from_str(json.dumps(state))
    if pre_tokenizer is not None:
        other._tokenizer.pre_tokenizer = pre_tokenizer
    return other


def test_ways_of_cutting_text_have_llama_cpps_names(tokenizer) -> None:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Metaspace, Sequence, Split

    def split(pattern: str):
        return Sequence([Split(Regex(pattern), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])

    assert pre_tokenizer_name(tokenizer) == "gpt-2"
    digits = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    assert pre_tokenizer_name(cutting(tokenizer, digits)) == "smollm"
    assert pre_tokenizer_name(cutting(tokenizer, split(LLAMA3_CUT), ignore_merges=True)) == "llama-bpe"
    assert pre_tokenizer_name(cutting(tokenizer, split(LLAMA3_CUT))) == "smaug-bpe"
    assert pre_tokenizer_name(cutting(tokenizer, split(LLAMA3_CUT.replace("{1,3}", "")))) == "qwen2"
    for unknown in (split(r"\p{L}+"), ByteLevel(add_prefix_space=True), Metaspace()):
        with pytest.raises(QaromaError, match=r"no name known here for llama\.cpp"):
            pre_tokenizer_name(cutting(tokenizer, unknown))


def pieces(scheme: str):
    """BPE over pieces with byte fallback, as SentencePiece models are converted; spaces in one of their ways."""
    from conftest import CHATML, TEXT
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.normalizer = normalizers.Replace(" ", "▁")
    special = ["<unk>", "<|im_start|>", "<|im_end|>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special[:3], show_progress=False)
    raw.train_from_iterator(TEXT.splitlines(), trainer)
    model = json.loads(raw.to_str())["model"]
    vocab = {token: index for index, token in enumerate(dict.fromkeys([*special, *model["vocab"]]))}
    merges = [tuple(pair) for pair in model["merges"]]
    raw.model = models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    raw.add_special_tokens(special[1:3])
    if scheme == "prepended":  # Llama 2 as published
        raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), raw.normalizer])
    elif scheme != "none":  # the same as transformers builds it now; "none" is Gemma's
        raw.normalizer = None
        raw.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|im_end|>", unk_token="<unk>", chat_template=CHATML
    )


@pytest.mark.parametrize("scheme", ["none", "prepended", "always", "first"])
def test_llama_cpp_cuts_text_into_the_same_pieces(scheme: str, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    tokenizer = pieces(scheme)
    config = tiny_config(vocab_size=len(tokenizer), tie_word_embeddings=False)
    model = type(tiny("tied"))(config).float().eval()
    template = Template.choose(tokenizer)
    write_gguf_model(
        tmp_path, dequantised_tensors(model), {}, config, tokenizer, template, outtype="f32", name="x"
    )  # fmt: skip
    engine = LlamaCpp(tmp_path / "model.gguf")
    answer = Message("assistant", "the mill")
    for text in (*PROMPTS, "two  spaces, three   spaces", "the same text €🌊\tend", "count the letters"):
        prompt = template.render_prompt([Message("user", text), answer, Message("user", text)])
        body = json.dumps({"content": prompt, "parse_special": True}).encode()
        request = urllib.request.Request(f"{engine._server.listening_address}/tokenize", body)
        with urllib.request.urlopen(request) as told:
            assert json.load(told)["tokens"] == tokenizer(prompt, add_special_tokens=False).input_ids, text


def test_spaces_that_are_written_otherwise_are_refused() -> None:
    from tokenizers import normalizers

    tokenizer = pieces("none")
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    with pytest.raises(QaromaError, match=r"writes spaces in a way that llama\.cpp has not \(NFKC before nothing"):
        check_vocabulary(tokenizer, Template.choose(tokenizer))


PROMPTS = ["count 7 x", "Who's there?\n\n  12 345 don't", "für Élise 3.14"]


@pytest.mark.parametrize("kind", ["tied", "llama3", "mistral", "qwen2", "qwen3"])
def test_llama_cpp_gives_transformers_answers(kind: str, tokenizer, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    model = tiny(kind, tokenizer)
    template = Template.choose(tokenizer)
    bare = live_answers(model, tokenizer, template, PROMPTS, tokens=12)
    update = random_update(linear_shapes(model), size=1.0)
    adapter = attach_update(model, update)
    live = live_answers(model, tokenizer, template, PROMPTS, tokens=12)
    detach(adapter)
    assert max((one.logits[0] - two.logits[0]).abs().max() for one, two in zip(live, bare, strict=True)) > 0.1
    for name, added in (("base", {}), ("merged", update)):
        (tmp_path / name).mkdir()
        write_gguf_model(
            tmp_path / name, dequantised_tensors(model), added, model.config, tokenizer, template,
            outtype="f32", name=name,
        )  # fmt: skip
    write_gguf_adapter(tmp_path, update, model.config, name="x", dtype=torch.float32)
    merged = compare_llama_cpp(LlamaCpp(tmp_path / "merged" / "model.gguf"), live, tokenizer, tolerance=1e-3)
    adapted = LlamaCpp(tmp_path / "base" / "model.gguf", tmp_path / "adapter.gguf")
    adapted = compare_llama_cpp(adapted, live, tokenizer, tolerance=1e-3)
    for test in (merged, adapted):
        assert test.passed, test.sentence()
        assert test.same_answers == len(PROMPTS)


SLOW = ("granite", "olmo2", "smollm3", "gemma2", "qwen3_moe")


@pytest.mark.parametrize("family", ["phi3", *(pytest.param(f, marks=pytest.mark.slow) for f in SLOW)])
def test_llama_cpp_takes_an_adapter_of_a_family(family: str, tokenizer, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    write_base(family, tmp_path / "base", tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    template, update = Template.choose(tokenizer), random_update(linear_shapes(model), size=1.0)
    write_gguf_model(
        tmp_path, dequantised_tensors(model), {}, model.config, tokenizer, template, outtype="f32", name="x"
    )  # fmt: skip
    write_gguf_adapter(tmp_path, update, model.config, name="x", dtype=torch.float32)
    attach_update(model, update)
    live = live_answers(model, tokenizer, template, PROMPTS, tokens=12)
    engine = LlamaCpp(tmp_path / "model.gguf", tmp_path / "adapter.gguf")
    test = compare_llama_cpp(engine, live, tokenizer, tolerance=1e-2)
    assert test.passed, test.sentence()
    assert not compare_llama_cpp(LlamaCpp(tmp_path / "model.gguf"), live, tokenizer, tolerance=1e-2).passed


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("gemma2", {"query_pre_attn_scalar": 7}, r"attention scaled by 7 \(query_pre_attn_scalar; expected 32\)"),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, "full attention in other layers than one of 2"),
        ("gemma3_text", {"layer_types": ["sliding_attention"] * 6}, "full attention in other layers than one of 6"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}, "positions left out of other layers than one of 4"),
        ("qwen3_moe", {"norm_topk_prob": False}, "weights of experts that do not sum to 1"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "layers without experts"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(family: str, changes: dict, words: str) -> None:
    with pytest.raises(QaromaError, match=f"a {family} model with {words}.*, which llama.cpp computes otherwise"):
        GgufNames(AutoConfig.for_model(family, **{**FAMILIES[family], **changes}))


def test_experts_are_one_tensor_however_they_came() -> None:
    """Fused as transformers holds them, or one by one as checkpoints do: 12 of them, so that 10 follows 9."""
    gate, up, down = torch.randn(12, 4, 8), torch.randn(12, 4, 8), torch.randn(12, 8, 4)
    stem = "model.layers.0.mlp.experts"
    fused = {f"{stem}.gate_up_proj": torch.cat([gate, up], 1), f"{stem}.down_proj": down}
    single = {
        f"{stem}.{index}.{name}.weight": values[index]
        for name, values in (("gate_proj", gate), ("up_proj", up), ("down_proj", down))
        for index in sorted(range(12), key=str)
    }
    names = GgufNames(AutoConfig.for_model("qwen3_moe", **FAMILIES["qwen3_moe"]))
    for tensors in (fused, single):
        stored = [StoredTensor(n, tuple(t.shape), t.dtype, lambda a, b, t=t: t[a:b]) for n, t in tensors.items()]
        found = {one.tensor.name: one.tensor for one in gguf_layout(stored, names)}
        for name, values in (("gate", gate), ("up", up), ("down", down)):
            tensor = found[f"blk.0.ffn_{name}_exps.weight"]
            assert tensor.shape == tuple(values.shape)
            assert torch.equal(torch.cat([tensor.rows(0, 5), tensor.rows(5, 12)]), values)


@pytest.mark.parametrize("wrong", ["nothing", "nan", "infinite", "other prompt"])
def test_an_engine_that_answers_badly_does_not_pass(wrong: str, tokenizer) -> None:
    live = live_answers(tiny("tied", tokenizer), tokenizer, Template.choose(tokenizer), PROMPTS, tokens=6)

    class Engine:
        """llama.cpp's answers as they should be, but for the last prompt's where ``spoiled``."""

        def __init__(self, *, spoiled: bool) -> None:
            self.waiting, self.spoiled = iter(live), spoiled

        def answer(self, prompt: str, tokens: int, *, top: int) -> LlamaCppAnswer:
            answered = next(self.waiting)
            expected, spoiled = answered.ids[answered.start :], self.spoiled and answered is live[-1]
            best = [row.topk(top) for row in answered.logits.log_softmax(-1)]
            told = [dict(zip(one.indices.tolist(), one.values.tolist(), strict=True)) for one in best]
            if spoiled and wrong == "nothing":
                expected, told = [], []
            elif spoiled and wrong in ("nan", "infinite"):
                told[2] = dict.fromkeys(told[2], float(wrong[:3]))
            more = spoiled and wrong == "other prompt"
            return LlamaCppAnswer(answered.start + more, "", expected, told)

    good = compare_llama_cpp(Engine(spoiled=False), live, tokenizer, tolerance=1e-3)
    assert good.passed
    assert (good.same_answers, good.largest) == (len(PROMPTS), pytest.approx(0, abs=1e-6))
    assert not compare_llama_cpp(Engine(spoiled=True), live, tokenizer, tolerance=1e-3).passed


def test_every_outtype_is_near_and_norms_stay_exact(tiny_model, tokenizer, tmp_path: Path) -> None:
    from gguf import GGUFReader, dequantize

    template = Template.choose(tokenizer)
    bounds = {"f32": 0.0, "f16": 1e-3, "bf16": 5e-3, "q8_0": 1e-2, "q5_k_m": 4e-2, "q4_0": 1e-1}
    kinds = {"q5_k_m": "Q8_0"}  # rows are no whole number of 256, and the last layers have more bits
    for outtype, bound in bounds.items():
        write_gguf_model(
            tmp_path, dequantised_tensors(tiny_model), {}, tiny_model.config, tokenizer, template,
            outtype=outtype, name="x",
        )  # fmt: skip
        stored = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
        assert "output.weight" not in stored  # tied
        down = stored["blk.1.ffn_down.weight"]
        values = torch.from_numpy(dequantize(down.data, down.tensor_type).copy())
        wanted = tiny_model.model.layers[1].mlp.down_proj.weight
        assert down.tensor_type.name == kinds.get(outtype, outtype.upper())
        assert float((values - wanted).detach().norm() / wanted.detach().norm()) <= bound
        assert stored["output_norm.weight"].tensor_type.name == "F32"
    with pytest.raises(QaromaError, match=r"got the outtype 'q3_k'; expected f32, f16, .*q4_k_m"):
        write_gguf_model(tmp_path, [], {}, tiny_model.config, tokenizer, template, outtype="q3_k", name="x")


USER, ANSWER = Message("user", "one\ntwo"), Message("assistant", "three")
TALKS = [
    [USER],
    [USER, ANSWER, USER],
    [Message("system", "be kind"), USER],
    [Message("system", "s"), USER, ANSWER, USER],
]


def run_go_template(text: str, messages: list[Message]) -> str:
    """The few words of Go's template language that a Modelfile uses, as Ollama would fill them in."""
    system = "\n\n".join(message.content for message in messages if message.role == "system")
    condition = re.match(r"\{\{ if \.System \}\}(.*?)\{\{ else \}\}(.*?)\{\{ end \}\}", text, re.DOTALL)
    if condition:
        head = condition[1].replace("{{ .System }}", system) if system else condition[2]
        text = text[condition.end() :]
    else:
        head, text = text[: text.index("{{ range")], text[text.index("{{ range") :]
    loop = re.match(
        r'\{\{ range \.Messages \}\}\{\{ if eq \.Role "user" \}\}(.*?)\{\{ else if eq \.Role "assistant" \}\}'
        r"(.*?)\{\{ end \}\}\{\{ end \}\}",
        text,
        re.DOTALL,
    )
    forms = {"user": loop[1], "assistant": loop[2], "system": ""}
    turns = "".join(forms[message.role].replace("{{ .Content }}", message.content) for message in messages)
    return head + turns + text[loop.end() :].replace("{{ .Response }}", "")


@pytest.mark.parametrize("kind", ["chat", "plain", "none"])
def test_the_modelfile_renders_what_the_template_does(kind: str, tokenizer) -> None:
    template = Template.choose(tokenizer, kind)
    text = modelfile(template, tokenizer, tiny_config(), model="model.gguf")
    assert text.startswith("FROM ./model.gguf\n")
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert "PARAMETER num_ctx 512" in text
    go = re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)[1]
    for talk in TALKS:
        assert run_go_template(go, talk) == template.render_prompt(talk)


def test_a_default_system_text_and_a_first_token_are_kept_apart(tokenizer) -> None:
    default = (
        "{{ '<|endoftext|>' }}{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nbe good<|im_end|>\n' }}"
        "{% endif %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    other = cutting(tokenizer, None)
    other.chat_template = default
    template = Template.choose(other)
    pieces = template_pieces(template, other)
    assert pieces.without_system == "<|endoftext|><|im_start|>system\nbe good<|im_end|>\n"
    assert pieces.system == ("<|endoftext|><|im_start|>system\n", "<|im_end|>\n")
    for talk in TALKS:
        assert run_go_template(pieces.go_template(), talk) == template.render_prompt(talk)


def test_a_template_with_more_rules_is_not_translated(tokenizer) -> None:
    numbered = (
        "{% for m in messages %}{{ loop.index ~ ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'answer: ' }}{% endif %}"
    )
    other = cutting(tokenizer, None)
    other.chat_template = numbered
    template = Template.choose(other)
    assert template_pieces(template, other) is None
    assert 'TEMPLATE """{{ .Prompt }}"""' in modelfile(template, other, tiny_config(), model="m.gguf")
