"""Loading a base: what is quantised, what is not, what never changes, and what it costs in memory."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from model_bases import linear_grad
from own_memory import needs_rss_anon, run_measured
from torch import nn
from transformers import AutoConfig

from qaroma.errors import QaromaError
from qaroma.method.dequantise import dense_weight
from qaroma.model.base import (
    fingerprint,
    load_base,
    load_model_config,
    load_tokenizer,
    resolve_device,
)
from qaroma.model.bnb import bnb
from qaroma.model.precision import dtype_note, resolve_dtype

IDS = torch.arange(24).view(2, 12)


def save_llama(folder: Path, dtype: torch.dtype = torch.float32, seed: int = 1, **changes) -> Path:
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    LlamaForCausalLM(tiny_config(**changes)).to(dtype).save_pretrained(folder)
    return folder


def linears(model) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_linear_layers_are_quantised_and_everything_else_is_in_the_compute_dtype(tiny_folder, quantization, dtype):
    model = load_base(tiny_folder, quantization=quantization, compute_dtype=dtype, device="cpu")
    found = linears(model)
    assert len(found) == 15
    for name, module in found.items():
        if name == "lm_head" or quantization == "none":
            assert type(module) is nn.Linear
            assert module.weight.dtype is dtype
        else:
            assert isinstance(module, bnb.nn.Linear4bit)
            assert module.weight.quant_state.quant_type == quantization
            assert module.weight.quant_state.nested
            assert module.compute_dtype is dtype
            assert not module.support_avx512bf16_for_cpu
    for name, parameter in model.named_parameters():
        if "norm" in name or "embed" in name:
            assert parameter.dtype is dtype
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    assert model.lm_head.weight is model.model.embed_tokens.weight  # tied stays tied


def test_an_untied_head_keeps_its_own_weights(tmp_path):
    folder = save_llama(tmp_path, tie_word_embeddings=False)
    plain = load_base(folder, quantization="none", compute_dtype=torch.float32, device="cpu")
    model = load_base(folder, device="cpu")
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    torch.testing.assert_close(model.lm_head.weight, plain.lm_head.weight.bfloat16(), rtol=0, atol=0)


def test_double_quantisation_can_be_off(tiny_folder):
    model = load_base(tiny_folder, double_quantization=False, device="cpu")
    assert not model.model.layers[0].mlp.up_proj.weight.quant_state.nested


def test_dense_weight_is_what_the_layer_multiplies_by(tmp_path):
    folder = save_llama(tmp_path, intermediate_size=100)  # 100 in-features are no multiple of the block of 64
    model = load_base(folder, compute_dtype=torch.float32, device="cpu")
    plain = load_base(folder, quantization="none", compute_dtype=torch.float32, device="cpu")
    for name in ("q_proj", "down_proj"):
        layer = model.get_submodule(f"model.layers.0.{'self_attn' if name == 'q_proj' else 'mlp'}.{name}")
        original = plain.get_submodule(f"model.layers.0.{'self_attn' if name == 'q_proj' else 'mlp'}.{name}")
        weight = dense_weight(layer, torch.float32)
        assert weight.shape == (layer.out_features, layer.in_features)
        x = torch.randn(3, layer.in_features)
        torch.testing.assert_close(layer(x), x @ weight.T, rtol=1e-5, atol=1e-6)
        error = (weight - original.weight).norm() / original.weight.norm()
        assert 0.02 < error < 0.2  # NF4's own error: quantised, and of the right layer
        assert dense_weight(layer, torch.bfloat16).dtype is torch.bfloat16
        assert torch.equal(dense_weight(original, torch.float32), original.weight)


def test_bf16_checkpoints_pack_to_the_same_bytes_in_every_compute_dtype(tmp_path):
    folder = save_llama(tmp_path, torch.bfloat16)
    half = load_base(folder, compute_dtype=torch.bfloat16, device="cpu")
    full = load_base(folder, compute_dtype=torch.float32, device="cpu")
    short = load_base(folder, compute_dtype=torch.float16, device="cpu")
    for name, module in linears(half).items():
        assert torch.equal(module.weight.data, linears(full)[name].weight.data.to(module.weight.dtype)), name
        if module.weight.dtype == torch.uint8:
            assert torch.equal(module.weight.data, linears(short)[name].weight.data), name
    assert {tensor.dtype for tensor in short.parameters()} == {torch.float16, torch.uint8}


@pytest.mark.parametrize("double", [True, False])
def test_a_checkpoint_that_was_quantised_before_loads_as_it_is(tiny_folder, tmp_path, caplog, double):
    first = load_base(tiny_folder, quantization="fp4", double_quantization=double, device="cpu")
    first.save_pretrained(tmp_path)
    caplog.set_level(logging.WARNING, logger="qaroma.model.base")
    again = load_base(tmp_path, quantization="fp4", double_quantization=double, device="cpu")
    assert caplog.records == []
    other = load_base(tmp_path, quantization="nf4", double_quantization=double, device="cpu")
    assert [record.getMessage() for record in caplog.records] == [
        f"'{tmp_path}' is stored in fp4 {'with' if double else 'without'} double quantisation and is used so, "
        f"though nf4{' with double quantisation' if double else ''} was asked for."
    ]
    for loaded in (again, other):
        for name, module in linears(first).items():
            twin = linears(loaded)[name]
            assert torch.equal(module.weight.data, twin.weight.data)
            assert torch.equal(dense_weight(module, torch.float32), dense_weight(twin, torch.float32))
            assert not getattr(twin, "support_avx512bf16_for_cpu", False)
    assert not torch.equal(dense_weight(linears(first)["lm_head"], torch.float32), torch.zeros(512, 64))


@pytest.mark.parametrize(
    ("stored", "kind"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes 8-bit"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
    ],
)
def test_other_quantised_checkpoints_are_refused(tmp_path, stored, kind):
    folder = save_llama(tmp_path)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": stored}), encoding="utf-8")
    with pytest.raises(QaromaError, match=f"quantised already \\({kind}\\).*the original model"):
        load_base(folder, device="cpu")


def test_train_evaluate_train_gives_equal_gradients(tiny_folder):
    """On a CPU with AVX512-BF16, bitsandbytes' eval forward repacks weights into a form without a backward."""
    model = load_base(tiny_folder, device="cpu")
    before = [module.weight.data.clone() for module in linears(model).values()]
    model.train()
    first = linear_grad(model, IDS)
    model.eval()
    with torch.no_grad():
        model(IDS)
        model(IDS[:1, :1])
    model.train()
    second = linear_grad(model, IDS)
    assert first.norm() > 0
    assert torch.equal(first, second)
    assert all(torch.equal(a, b.weight.data) for a, b in zip(before, linears(model).values(), strict=True))


def test_the_fingerprint_knows_a_base_in_every_form_and_no_other(tiny_folder, tmp_path):
    prints = {
        fingerprint(load_base(tiny_folder, quantization=quantization, compute_dtype=dtype, device="cpu"))
        for quantization in ("nf4", "fp4", "none")
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    }
    assert len(prints) == 1
    other = load_base(save_llama(tmp_path / "seed", seed=2), device="cpu")
    longer = load_base(save_llama(tmp_path / "long", num_hidden_layers=3), device="cpu")
    assert len({fingerprint(other), fingerprint(longer)} | prints) == 3
    with torch.no_grad():
        other.model.norm.weight.mul_(1.5)
    assert fingerprint(other) not in {fingerprint(longer)} | prints


def test_norms_and_embeddings_are_part_of_the_fingerprint(tiny_folder):
    for name in ("model.norm", "model.layers.1.input_layernorm", "model.embed_tokens"):
        model = load_base(tiny_folder, quantization="none", device="cpu")
        before = fingerprint(model)
        with torch.no_grad():
            model.get_submodule(name).weight.mul_(1.5)
        assert fingerprint(model) != before, name


def test_the_fingerprint_survives_adapters(tiny_folder):
    from peft import LoraConfig, get_peft_model

    model = load_base(tiny_folder, device="cpu")
    before = fingerprint(model)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], r=2))
    assert fingerprint(wrapped) == before


def test_gpt2_in_four_bits_computes_what_gpt2_does(tmp_path):
    """Its Conv1D layers become 4-bit linear layers, transposed; they can then be adapted like any."""
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=2, n_positions=64)).save_pretrained(
        tmp_path
    )
    plain = load_base(tmp_path, quantization="none", compute_dtype=torch.float32, device="cpu")
    packed = load_base(tmp_path, compute_dtype=torch.float32, device="cpu")
    for name in ("c_attn", "c_proj"):
        one, two = (model.transformer.h[0].attn.get_submodule(name) for model in (plain, packed))
        original = one.weight.T
        assert original.shape == (two.out_features, two.in_features)
        assert (original - dense_weight(two, torch.float32)).norm() < 0.15 * original.norm()
    assert (plain(IDS).logits - packed(IDS).logits).norm() < 0.2 * plain(IDS).logits.norm()


def test_devices_and_dtypes(monkeypatch):
    cpu = torch.device("cpu")
    assert [resolve_dtype(name, cpu) for name in ("auto", "fp16", "fp32")] == [
        torch.bfloat16, torch.float16, torch.float32,
    ]  # fmt: skip
    with pytest.raises(QaromaError, match="expected auto, bf16, fp16, fp32"):
        resolve_dtype("int8", cpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device(None) == torch.device("cpu")
    with pytest.raises(QaromaError, match="--device cpu"):
        resolve_device("cuda")


def test_a_gpu_without_bf16_takes_fp16_or_fp32_where_the_family_overflows(monkeypatch):
    from contextlib import nullcontext

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    card, llama, gemma = torch.device("cuda"), tiny_config(), AutoConfig.for_model("gemma2")
    with pytest.raises(QaromaError, match=r"Tesla T4 has no bf16.*--set model\.compute_dtype=auto"):
        resolve_dtype("bf16", card)
    assert resolve_dtype("fp32", card, llama) is torch.float32
    assert resolve_dtype("auto", card, llama) is torch.float16
    assert resolve_dtype("auto", card, gemma) is torch.float32
    assert resolve_dtype("fp16", card, gemma) is torch.float16  # typed is taken
    assert "in fp16, the loss scaled" in dtype_note("auto", card, llama)
    assert "gemma2 overflows in fp16: arithmetic in fp32" in dtype_note("auto", card, gemma)
    assert "known to overflow" in dtype_note("fp16", card, gemma)
    assert dtype_note("fp16", card, llama) is None


def test_config_and_tokenizer_load_alone(tiny_folder, tokenizer, tmp_path):
    assert load_model_config(tiny_folder).num_hidden_layers == 2
    loaded = load_tokenizer(tiny_folder)
    assert loaded("some text").input_ids == tokenizer("some text").input_ids
    assert loaded.model_max_length == 512  # the folder says none; the model's positions are the limit
    with pytest.raises(QaromaError, match=r"no tokenizer files; expected tokenizer\.json"):
        load_tokenizer(save_llama(tmp_path))


KERNELS_PACKAGE = """
from pathlib import Path
def get_kernel(*args, **kwargs):
    Path(__file__).with_name("called").touch()
    raise RuntimeError("a download was tried")
"""


def test_bitsandbytes_asks_no_hub_for_kernels(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(KERNELS_PACKAGE, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}

    program = (
        "import qaroma.model.base, bitsandbytes, logging, sys; from pathlib import Path; "
        "assert 'kernels' not in sys.modules; assert not logging.getLogger('bitsandbytes.backends.cpu.ops').filters; "
        "import kernels; assert not Path(kernels.__file__).with_name('called').exists(); print(kernels.get_kernel)"
    )
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "function get_kernel" in result.stdout  # the package itself stays usable
    assert "kernels-community" not in result.stderr


MEASURE = """
import json, sys, time
import torch
torch.set_num_threads(1)
import transformers.models.llama.modeling_llama, transformers.integrations.bitsandbytes
from own_memory import sampled_peak
from qaroma.model.base import bnb, load_base

bnb.functional.quantize_4bit(torch.randn(64, 64))
started = time.perf_counter()
with sampled_peak() as peak:
    model = load_base(sys.argv[1], quantization=sys.argv[2], device="cpu")
seconds = time.perf_counter() - started
quantised = sum(p.numel() * p.element_size() for p in model.parameters())
for module in model.modules():
    if isinstance(module, bnb.nn.Linear4bit):
        state = module.weight.quant_state
        quantised += state.absmax.numel() * state.absmax.element_size() + 4 * state.state2.absmax.numel()
print(json.dumps({"peak": peak.bytes, "quantised": quantised, "seconds": seconds}))
"""


def measure_loading(folder: Path, quantization: str) -> dict[str, float]:
    return json.loads(run_measured(MEASURE, str(folder), quantization).splitlines()[-1])


def save_random(folder: Path, shard: str, **sizes) -> tuple[int, int]:
    """A checkpoint of random bf16 weights in shards; returns its bytes and those of its largest linear layer."""
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(tiny_config(**sizes)).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder, max_shard_size=shard)
    assert len(list(folder.glob("*.safetensors"))) > 2
    largest = max(module.weight.numel() for name, module in linears(model).items() if name != "lm_head")
    return 2 * sum(parameter.numel() for parameter in model.parameters()), 2 * largest


def check_memory(folder: Path, total: int, largest: int) -> None:
    told = measure_loading(folder, "nf4")
    print(f"\n{told}, bf16 {total}, largest linear layer {largest}")
    # bitsandbytes quantises one tensor on a CPU with five fp32 temporaries, ten times its bf16 bytes; 8 MB are the
    # modules of the model and the allocator's slack.
    allowed = told["quantised"] + 10 * largest + 8e6
    assert allowed < 0.7 * total  # else this would prove nothing
    assert told["peak"] < allowed


@needs_rss_anon
def test_loading_needs_the_quantised_model_and_a_tensor_or_two(tmp_path):
    check_memory(
        tmp_path,
        *save_random(
            tmp_path, "40MB", hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
            num_key_value_heads=12, vocab_size=2048,
        ),
    )  # fmt: skip


@pytest.mark.slow
@needs_rss_anon
def test_loading_a_gigabyte_needs_the_quantised_model_and_a_tensor_or_two(tmp_path):
    check_memory(
        tmp_path,
        *save_random(
            tmp_path, "200MB", hidden_size=2048, intermediate_size=5632, num_hidden_layers=9, num_attention_heads=16,
            num_key_value_heads=16, vocab_size=16000,
        ),
    )  # fmt: skip


@pytest.mark.gpu
def test_a_gpu_holds_the_whole_model_and_agrees_with_the_cpu(tiny_folder):
    here = load_base(tiny_folder, device="cpu")
    there = load_base(tiny_folder, device="cuda")
    assert {parameter.device.type for parameter in there.parameters()} == {"cuda"}
    assert fingerprint(here) == fingerprint(there)
    torch.testing.assert_close(there(IDS.cuda()).logits.cpu(), here(IDS).logits, rtol=0.05, atol=0.05)


def test_the_head_can_be_quantised_while_loading(tmp_path):
    """Layer by layer like the rest, so that the dense head is never on the device beside it."""
    folder = save_llama(tmp_path / "untied", tie_word_embeddings=False)
    head = load_base(folder, quantize_head=True, device="cpu").get_output_embeddings()
    assert isinstance(head, bnb.nn.Linear4bit)
    dense = load_base(folder, device="cpu", compute_dtype=torch.float32).get_output_embeddings().weight
    assert (dense_weight(head, torch.float32) - dense).norm() < 0.15 * dense.norm()
    tied = save_llama(tmp_path / "tied")
    assert type(load_base(tied, quantize_head=True, device="cpu").get_output_embeddings()) is nn.Linear


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_embeddings_can_stay_on_the_host_while_the_rest_goes_to_the_device(tmp_path, quantization):
    """The device is torch's ``meta`` here: what went to it has lost its values, what stayed has them."""
    from qaroma.engine.placement import HostEmbedding, move_embeddings_to_host

    folder = save_llama(tmp_path / "untied", tie_word_embeddings=False)
    whole = load_base(folder, quantization=quantization, device="cpu")
    model = load_base(folder, quantization=quantization, device="meta", host_embeddings=True)
    table = model.get_input_embeddings()
    assert torch.equal(table.weight, whole.get_input_embeddings().weight)
    assert {p.device.type for p in model.parameters() if p is not table.weight} == {"meta"}
    assert len(linears(model)) == len(linears(whole))
    assert [type(m) for m in linears(model).values()] == [type(m) for m in linears(whole).values()]
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())
    assert move_embeddings_to_host(model)
    moved = model.get_input_embeddings()
    assert isinstance(moved, HostEmbedding)
    assert moved.weight.device.type == "cpu"
    assert moved(IDS).is_meta  # its rows go where the model computes
    tied = load_base(save_llama(tmp_path / "tied"), quantization=quantization, device="meta", host_embeddings=True)
    assert tied.get_input_embeddings().weight.is_meta


@pytest.mark.gpu
def test_embeddings_on_the_host_never_take_the_gpus_memory(tmp_path):
    folder = save_llama(tmp_path, tie_word_embeddings=False, vocab_size=200_000)
    table = 200_000 * 64 * 2
    peaks = {}
    for host in (True, False):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model = load_base(folder, device="cuda", host_embeddings=host)
        peaks[host] = torch.cuda.max_memory_allocated() - before
        found = fingerprint(model)
        del model
    assert found == fingerprint(load_base(folder, device="cpu"))
    assert peaks[False] - peaks[True] > 0.9 * table
