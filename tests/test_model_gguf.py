"""A GGUF file loads as the model it was written from, tensor by tensor where its architecture is known."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from conftest import tiny_config
from model_bases import write_gguf

from qaroma.errors import QaromaError
from qaroma.method.dequantise import dense_weight
from qaroma.model.base import bnb, fingerprint, load_base, load_model_config, load_tokenizer
from qaroma.model.gguf import LazyTensor, lazy_state_dict, metadata_string

IDS = torch.arange(24).view(2, 12)


@pytest.fixture(scope="module")
def llama_file(tmp_path_factory, tokenizer):
    from transformers import LlamaForCausalLM

    torch.manual_seed(3)
    model = LlamaForCausalLM(tiny_config())
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, model, tokenizer)
    return path, model


def test_unquantised_weights_come_back_exactly(llama_file):
    path, model = llama_file
    loaded = load_base(path, quantization="none", compute_dtype=torch.float32, device="cpu")
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)


def test_four_bits_of_a_gguf_are_those_of_the_same_folder(llama_file, tmp_path):
    path, model = llama_file
    model.save_pretrained(tmp_path)
    from_file, from_folder = load_base(path, device="cpu"), load_base(tmp_path, device="cpu")
    layers = [name for name, module in from_file.named_modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(layers) == 14
    for name in layers:
        one, two = from_file.get_submodule(name), from_folder.get_submodule(name)
        assert torch.equal(one.weight.data, two.weight.data)
        assert torch.equal(dense_weight(one, torch.float32), dense_weight(two, torch.float32))
        assert not one.support_avx512bf16_for_cpu
    assert from_file.config.name_or_path == str(path)
    assert fingerprint(from_file) == fingerprint(from_folder)


@pytest.mark.parametrize(("architecture", "kind"), [("llama", "Q8_0"), ("qwen2", "Q8_0"), ("qwen2", "F32")])
def test_streamed_tensors_are_those_of_transformers_reader(tmp_path, architecture, kind):
    from transformers import AutoModelForCausalLM, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    settings = tiny_config(tie_word_embeddings=False).to_dict()
    model = (
        LlamaForCausalLM(tiny_config(tie_word_embeddings=False))
        if architecture == "llama"
        else Qwen2ForCausalLM(Qwen2Config(**{key: value for key, value in settings.items() if key != "model_type"}))
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    write_gguf(tmp_path / "m.gguf", model, architecture=architecture, kind=kind)
    config = load_model_config(tmp_path)
    assert lazy_state_dict(tmp_path / "m.gguf", type(model), config, torch.float32) is not None
    streamed = load_base(tmp_path, quantization="none", compute_dtype=torch.float32, device="cpu")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    for name, parameter in dense.named_parameters():
        assert torch.equal(streamed.get_parameter(name), parameter), name


def test_other_architectures_take_transformers_reader_and_are_quantised_after(llama_file, monkeypatch):
    path, _ = llama_file
    expected = load_base(path, device="cpu")
    monkeypatch.setattr("qaroma.model.gguf._STREAMED", frozenset())
    model = load_base(path, device="cpu")
    layers = [name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(layers) == 14
    for name in layers:
        assert torch.equal(model.get_submodule(name).weight.data, expected.get_submodule(name).weight.data)
    assert torch.equal(model(IDS).logits, expected(IDS).logits)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any(parameter.requires_grad for parameter in model.parameters())
    plain = load_base(path, quantization="none", device="cpu")
    assert getattr(plain.config, "quantization_config", None) is None


def test_a_lazy_tensor_is_read_in_slices_and_the_result_is_whole(monkeypatch):
    from gguf import GGMLQuantizationType, quantize

    class Stored:
        def __init__(self, values: np.ndarray) -> None:
            self.data = quantize(values, GGMLQuantizationType.Q8_0)
            self.tensor_type = GGMLQuantizationType.Q8_0
            self.shape = np.array(values.shape[::-1])

    values = np.random.default_rng(0).standard_normal((10, 64), dtype=np.float32)
    whole = LazyTensor(Stored(values), torch.float32)[...]
    monkeypatch.setattr("qaroma.model.gguf._CHUNK_ELEMENTS", 3 * 64)
    assert torch.equal(LazyTensor(Stored(values), torch.float32)[...], whole)
    assert np.abs(whole.numpy() - values).max() < 0.05
    assert torch.equal(LazyTensor(Stored(values), torch.bfloat16)[...], whole.bfloat16())


def test_the_tokenizer_of_a_gguf(llama_file, tokenizer):
    path, _ = llama_file
    assert metadata_string(path, "tokenizer.ggml.pre") == "smollm"
    assert metadata_string(path, "tokenizer.ggml.none") is None
    tokenizer.save_pretrained(path.parent)  # beside it, as an export has them
    loaded = load_tokenizer(path)
    assert loaded.chat_template == tokenizer.chat_template
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (1, 2, 2)
    assert loaded.eos_token == "<|im_end|>"
    assert loaded.model_max_length == 512
    assert loaded("<|im_start|>a").input_ids[0] == 1
    # SmolLM cuts digits off first, so that white space before a number is one piece, as it is before nothing.
    pieces = loaded.backend_tokenizer.pre_tokenizer.pre_tokenize_str("x\n\n12")
    assert [piece for piece, _ in pieces] == ["x", "ĊĊ", "1", "2"]


def test_folders_with_gguf_files(llama_file, tmp_path):
    path, _ = llama_file
    shutil.copy(path, tmp_path / "one.gguf")
    assert load_model_config(tmp_path).num_hidden_layers == 2
    shutil.copy(path, tmp_path / "two.gguf")
    with pytest.raises(QaromaError, match=r"holds 2 GGUF files\. Name one: --model .*one\.gguf"):
        load_model_config(tmp_path)
    assert load_model_config(tmp_path / "two.gguf").num_hidden_layers == 2


def test_a_missing_or_damaged_gguf_file(llama_file, tmp_path):
    path, _ = llama_file
    with pytest.raises(QaromaError, match=r"There is no file .*none\.gguf"):
        load_base(tmp_path / "none.gguf", device="cpu")
    whole = path.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "other.gguf").write_bytes(b"PK" + whole[2:])
    for name in ("cut.gguf", "other.gguf"):
        with pytest.raises(QaromaError, match=r"GGUF file of .* cannot be read"):
            load_base(tmp_path / name, device="cpu")
