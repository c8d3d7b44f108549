"""SmolLM2 with unequal ranks, exported, in the engines themselves: PEFT, transformers, llama.cpp."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from export_adapters import save_random_adapter

from qaroma.data.forms import Message
from qaroma.errors import QaromaError
from qaroma.export.exporter import Options, export
from qaroma.export.gguf_model import write_gguf_model
from qaroma.export.readers import LlamaCpp
from qaroma.export.subject import open_subject
from qaroma.export.weights import dequantised_tensors
from qaroma.inference.generate import generate
from qaroma.inference.open import open_run

PROMPTS = [
    "What is the capital of France?",
    "Set an alarm for 7:45 on 3 May 2025, don't forget it!",
    "Schreibe einen Satz über das Meer 🌊.",
]
TOKENS = 32
EXACT = Options(dtype="fp32", outtype="f32", self_test=False)


@dataclass
class Case:
    """One adapter: its folder, and what qaroma's own model answers and computes."""

    adapter: Path
    prompts: list[list[int]]
    texts: list[str]  # prompts as rendered
    answers: list[str]
    whole: list[list[int]]  # prompt and answer
    logits: list[torch.Tensor]  # at every position of whole but the last
    tokenizer: Any


def make_case(folder: Path, quantization: str) -> Case:
    try:
        save_random_adapter(
            "smollm2-135m", folder / "adapter", quantization=quantization, size=0.03, ranks=(0, 1, 2, 5, 3, 0, 4)
        )
    except QaromaError as error:
        pytest.skip(f"SmolLM2 cannot be had here: {error}")
    tuned = open_run(folder / "adapter", device="cpu")
    talks = [[Message("user", prompt)] for prompt in PROMPTS]
    answers = generate(tuned.model, tuned.tokenizer, tuned.template, talks, max_new_tokens=TOKENS)
    prompts = [tuned.template.encode_prompt(tuned.tokenizer, talk) for talk in talks]
    texts = [tuned.template.render_prompt(talk) for talk in talks]
    whole = [p + tuned.tokenizer(a, add_special_tokens=False).input_ids for p, a in zip(prompts, answers, strict=True)]
    return Case(folder / "adapter", prompts, texts, answers, whole, logits_of(tuned.model, whole), tuned.tokenizer)


@torch.no_grad()
def logits_of(model, rows: list[list[int]]) -> list[torch.Tensor]:
    return [model(input_ids=torch.tensor([ids])).logits[0, :-1].float() for ids in rows]


def greedy(model, tokenizer, prompts: list[list[int]]) -> list[str]:
    """transformers' own generate, with nothing of ours."""
    found = []
    for ids in prompts:
        produced = model.generate(
            torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False, repetition_penalty=1.0, eos_token_id=[2],
            pad_token_id=2,
        )  # fmt: skip
        found.append(tokenizer.decode(produced[0, len(ids) :], skip_special_tokens=True))
    return found


def check_torch(model, case: Case, engine: str, bound: float = 1e-3) -> None:
    pairs = zip(logits_of(model, case.whole), case.logits, strict=True)
    largest = max(float((found - ours).abs().max()) for found, ours in pairs)
    print(f"\n{engine}: largest logit difference {largest:.2g}")
    assert largest < bound
    assert greedy(model, case.tokenizer, case.prompts) == case.answers


def check_llama_cpp(engine: LlamaCpp, case: Case, name: str, bound: float = 1e-2) -> None:
    largest = 0.0
    for text, prompt, answer, logits in zip(case.texts, case.prompts, case.answers, case.logits, strict=True):
        told = engine.answer(text, TOKENS, top=20)
        assert told.prompt_tokens == len(prompt)  # llama.cpp's tokenizer cuts as ours
        assert told.text.removesuffix("<|im_end|>") == answer
        known = logits[len(prompt) - 1 :].log_softmax(-1)
        expected = case.tokenizer(answer, add_special_tokens=False).input_ids
        # The server does not tell of tokens that end within a character: compared up to the first of them.
        pairs = list(zip(told.tokens, expected, told.log_probabilities, strict=False))
        alike = next((position for position, (one, two, _) in enumerate(pairs) if one != two), len(pairs))
        assert alike >= 5
        for position in range(alike):
            likeliest = told.log_probabilities[position]
            assert len(likeliest) == 20
            largest = max(largest, *(abs(value - float(known[position, i])) for i, value in likeliest.items()))
    print(f"\n{name}: largest log-probability difference of the 20 likeliest {largest:.2g}")
    assert largest < bound


def base_gguf(case: Case, folder: Path) -> Path:
    """An f32 GGUF of the base alone, as 4 bits give it back."""
    subject = open_subject(case.adapter)
    model = subject.base.model(torch.device("cpu"), dtype=torch.float32)
    write_gguf_model(
        folder,
        dequantised_tensors(model),
        {},
        subject.config,
        subject.tokenizer,
        subject.template,
        outtype="f32",
        name="b",
    )
    return folder / "model.gguf"


def fresh_base(case: Case):
    subject = open_subject(case.adapter)
    return subject.base.model(torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """On a plain fp32 base."""
    return make_case(tmp_path_factory.mktemp("smollm2"), "none")


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """On an NF4 base."""
    return make_case(tmp_path_factory.mktemp("smollm2-nf4"), "nf4")


def test_llama_cpp_reads_the_adapter(case: Case, tmp_path: Path) -> None:
    """The quick one of this file: the engine that is farthest from ours."""
    pytest.importorskip("xllamacpp")
    (adapter,) = export(case.adapter, ["gguf-adapter"], output=tmp_path / "out", options=EXACT)
    engine = LlamaCpp(base_gguf(case, tmp_path), adapter.folder / "adapter.gguf")
    check_llama_cpp(engine, case, "llama.cpp from gguf-adapter, none")


@pytest.mark.slow
@pytest.mark.parametrize("held", ["none", "nf4"])
def test_torch_engines_give_our_answers(held: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    case = request.getfixturevalue({"none": "case", "nf4": "quantised"}[held])
    exports = export(case.adapter, ["peft", "padded", "merged"], output=tmp_path, options=EXACT)
    folders = {one.format: one.folder for one in exports}
    for kind in ("peft", "padded"):
        check_torch(
            PeftModel.from_pretrained(fresh_base(case), folders[kind]).eval(), case, f"PEFT from {kind}, {held}"
        )
    merged = AutoModelForCausalLM.from_pretrained(folders["merged"], dtype=torch.float32)
    check_torch(merged.eval(), case, f"transformers from merged, {held}")


@pytest.mark.slow
@pytest.mark.parametrize("held", ["none", "nf4"])
def test_llama_cpp_gives_our_answers(held: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("xllamacpp")
    case = request.getfixturevalue({"none": "case", "nf4": "quantised"}[held])
    adapter, model = export(case.adapter, ["gguf-adapter", "gguf"], output=tmp_path, options=EXACT)
    check_llama_cpp(LlamaCpp(model.folder / "model.gguf"), case, f"llama.cpp from gguf, {held}")
    engine = LlamaCpp(base_gguf(case, tmp_path), adapter.folder / "adapter.gguf")
    check_llama_cpp(engine, case, f"llama.cpp from gguf-adapter, {held}")


@pytest.mark.slow
def test_every_self_test_of_smollm2_passes(quantised: Case, tmp_path: Path) -> None:
    for options in (Options(dtype="fp32", outtype="f32"), Options(), Options(outtype="q8_0", merge_into="original")):
        for one in export(quantised.adapter, ["all"], output=tmp_path, options=options):
            assert one.test.passed, one.test.sentence()
            print(f"\n{options.outtype} {one.format}: {one.bytes / 1e6:.1f} MB, {one.test.sentence()}")
