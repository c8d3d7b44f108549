"""K types against ggml's own quantiser, the mixes of llama-quantize, and llama.cpp reading what was written."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config
from test_export_gguf import PROMPTS, tiny

from qaroma.data.templates import Template
from qaroma.errors import QaromaError
from qaroma.export.format_facts import OUTTYPES
from qaroma.export.gguf_model import write_gguf_model
from qaroma.export.gguf_types import converted, kinds_of
from qaroma.export.kquants import quantise
from qaroma.export.readers import LlamaCpp, load_gguf_model
from qaroma.export.selftest import compare_llama_cpp, live_answers, share_arrived
from qaroma.export.weights import StoredTensor, dequantised_tensors
from qaroma.method.factors import Factors

BITS = {"Q4_K": 4, "Q5_K": 5, "Q6_K": 6}


def rows() -> np.ndarray:
    """Rows of 512: of trained weights' shape, with outliers, of one sign, and those that have no scale."""
    generator = np.random.default_rng(0)
    values = [
        generator.normal(0, 0.02, (24, 512)),
        generator.standard_t(3, (24, 512)) * 0.05,
        np.abs(generator.normal(0, 1, (4, 512))),
        -np.abs(generator.normal(0, 1, (4, 512))),
        np.zeros((1, 512)), np.full((1, 512), -0.3), np.full((1, 512), 0.7), np.eye(1, 512, 300),
    ]  # fmt: skip
    return np.concatenate(values).astype(np.float32)


def by_ggml(values: np.ndarray, kind: str) -> np.ndarray:
    """The same rows by ggml's own ``ggml_quantize_chunk``, which llama-quantize calls for each tensor."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    found = importlib.util.find_spec("xllamacpp")
    files = [*Path(found.submodule_search_locations[0]).glob("xllamacpp*.so")] if found else []
    quantize = getattr(ctypes.CDLL(str(files[0])), "ggml_quantize_chunk", None) if files else None
    if quantize is None:
        pytest.skip("no library with ggml's quantiser")
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    out = np.empty((len(values), values.shape[1] // block * size), np.uint8)
    number = int(GGMLQuantizationType[kind])
    assert quantize(number, values.ctypes.data, out.ctypes.data, 0, *values.shape, None) == out.nbytes
    return out


@pytest.mark.parametrize("kind", list(BITS))
def test_k_types_are_ggmls_but_for_the_order_of_sums(kind: str) -> None:
    from gguf import GGMLQuantizationType, dequantize

    values = rows()
    ours, theirs = quantise(torch.from_numpy(values), BITS[kind]), by_ggml(values, kind)
    assert ours.shape == theirs.shape
    assert (ours[:56] == theirs[:56]).mean() > 0.97
    read = [dequantize(one, GGMLQuantizationType[kind]) for one in (ours, theirs)]
    error = [np.square(one - values).mean(1) ** 0.5 for one in read]
    assert np.allclose(read[0][56:], read[1][56:], rtol=2e-3)
    assert error[0][:56].sum() == pytest.approx(error[1][:56].sum(), rel=1e-3)
    assert (error[0][:24] < 0.02 * 0.09 * 2.0 ** (4 - BITS[kind])).all()  # whatever ggml does


def test_the_mixes_are_llama_quantizes() -> None:
    """As ``llama_model_quantize`` of a published libllama chose them for the same shapes."""
    shapes = {"token_embd.weight": (512, 256), "output.weight": (512, 256), "output_norm.weight": (256,)}
    for layer in range(9):
        for part, columns in (("attn_q", 256), ("attn_v", 256), ("ffn_up", 256), ("ffn_down", 544)):
            shapes[f"blk.{layer}.{part}.weight"] = (64, columns)
    shapes["blk.0.ffn_gate_inp.weight"] = (4, 256)

    def named(outtype: str, layers: int = 9, **changes) -> dict[str, str]:
        kinds = kinds_of({**shapes, **changes}, outtype, layers=layers, grouped=True)
        return {name.removesuffix(".weight"): kind.name for name, kind in kinds.items()}

    kinds = named("q4_k_m")
    assert [kinds[f"blk.{layer}.attn_v"] == "Q6_K" for layer in range(9)] == [
        layer in (0, 3, 6, 7, 8) for layer in range(9)
    ]
    assert [kinds[f"blk.{layer}.ffn_down"] for layer in (0, 1)] == ["Q8_0", "Q5_0"]  # 544 is no whole number of 256
    assert (kinds["token_embd"], kinds["output"], kinds["blk.3.attn_q"]) == ("Q4_K", "Q6_K", "Q4_K")
    assert (kinds["output_norm"], kinds["blk.0.ffn_gate_inp"]) == ("F32", "F32")
    assert named("q5_k_m")["blk.1.ffn_down"] == "Q5_1"
    assert named("q4_0")["output"] == named("q6_k")["blk.1.attn_v"] == "Q6_K"
    assert set(named("q8_0").values()) == {"Q8_0", "F32"}
    assert named("q4_k_m", layers=80)["blk.1.attn_v"] == "Q6_K"
    assert named("q4_k_m", layers=80, **{"blk.11.attn_v.weight": (64, 256)})["blk.11.attn_v"] == "Q5_K"
    assert named("q4_k_m", **{"blk.1.ffn_up.weight": (64, 100)})["blk.1.ffn_up"] == "F16"
    del shapes["output.weight"]
    assert named("q4_k_m")["token_embd"] == "Q6_K"  # tied: the embeddings are the head


def test_what_a_block_cannot_hold_is_refused() -> None:
    from gguf import GGMLQuantizationType

    for value in (7e4, float("nan")):
        values = torch.zeros(1, 256)
        values[0, 3] = value
        with pytest.raises(QaromaError, match=r"blk\.0\.w has values that q4_k cannot hold; type --outtype bf16"):
            converted(values, GGMLQuantizationType.Q4_K, "blk.0.w")


@pytest.mark.parametrize("outtype", ["q4_k_m", *(pytest.param(o, marks=pytest.mark.slow) for o in OUTTYPES)])
def test_llama_cpp_computes_what_a_file_holds(outtype: str, tokenizer, tmp_path: Path) -> None:
    """Its answers are those of the same bytes read by transformers, but for its 8-bit activations."""
    pytest.importorskip("xllamacpp")
    model = tiny("tied", tokenizer)
    model = type(model)(tiny_config(hidden_size=256, intermediate_size=512, num_hidden_layers=1))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.05, mean=float("norm" in name))
    template = Template.choose(tokenizer)
    write_gguf_model(
        tmp_path, dequantised_tensors(model), {}, model.config, tokenizer, template, outtype=outtype, name="x"
    )  # fmt: skip
    read = load_gguf_model(tmp_path / "model.gguf", torch.device("cpu"))
    live = live_answers(read, tokenizer, template, PROMPTS, tokens=6)
    test = compare_llama_cpp(LlamaCpp(tmp_path / "model.gguf"), live, tokenizer, tolerance=0.1)
    print(f"\n{outtype}: {test.sentence()}")
    assert test.passed, test.sentence()


def test_the_share_of_few_bits_is_that_of_all_modules_together() -> None:
    """Where one module's weights are drawn to another grid, the update as a whole still tells one that came twice."""
    update = {name: Factors(torch.ones(1, 4), torch.ones(1, 4) * size) for name, size in (("a", 1.0), ("b", 0.1))}

    def tensors(*shares: float) -> list[StoredTensor]:
        values = {n: torch.ones(4, 4) * s * f.B[0, 0] for (n, f), s in zip(update.items(), shares, strict=True)}
        return [StoredTensor(f"{n}.weight", (4, 4), torch.float32, lambda a, b, v=v: v[a:b]) for n, v in values.items()]

    base = tensors(0, 0)
    assert share_arrived(tensors(1, 0.5), base, update) == pytest.approx(0.5)
    assert share_arrived(tensors(1, 0.5), base, update, together=True) == pytest.approx(0.995, abs=1e-3)
    assert share_arrived(tensors(2, 2), base, update, together=True) == pytest.approx(2)
    assert share_arrived(base, base, {}, together=True) == 1
