"""Batched greedy generation equals the naive loop; losses count each token once; modes are restored."""

from __future__ import annotations

import math

import pytest
import torch
from data_tokenizers import byte_level, sentencepiece_like
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from qaroma.data.forms import Message
from qaroma.data.templates import Template
from qaroma.errors import QaromaError
from qaroma.inference import generate as generate_module
from qaroma.inference.generate import ExactMatch, exact_match, generate
from qaroma.tasks.evaluation import Loss, evaluate_loss, evaluating

QUESTIONS = ["Hi", "What is the capital of France?", "List three colours, please. " * 3, "?", "answer the question"]
CONVERSATIONS = [[Message("user", text), Message("assistant", "x")] for text in QUESTIONS]


def _model(vocab: int) -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=None,
        bos_token_id=None,
        initializer_range=0.3,  # so that the most probable token depends on the prompt
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def _naive(model: nn.Module, prompt: list[int], count: int, stops: list[int]) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token in stops:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("tokenizer", [byte_level(), sentencepiece_like()], ids=["bytes", "sentencepiece"])
def test_batched_answers_equal_the_naive_ones(tokenizer) -> None:
    model = _model(len(tokenizer))
    template = Template.choose(tokenizer)
    answers = generate(model, tokenizer, template, CONVERSATIONS, max_new_tokens=12, batch_size=2)
    stops = template.stop_token_ids(tokenizer)
    expected = []
    for turns in CONVERSATIONS:
        ids = _naive(model, template.encode_prompt(tokenizer, turns[:-1]), 12, stops)
        expected.append(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    assert answers == expected
    assert len(set(answers)) == len(answers), "answers that are all alike would show no order"


class _StopsAt(Template):
    """A template whose only stop token is the one given."""

    def stop_token_ids(self, tokenizer) -> list[int]:
        return [self.stop]  # type: ignore[attr-defined]


def test_a_batch_too_large_for_the_memory_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level()
    model, template = _model(len(tokenizer)), Template.choose(tokenizer)
    whole = generate(model, tokenizer, template, CONVERSATIONS, max_new_tokens=6)
    original, sizes = generate_module._generate_batch, []

    def crowded(model, prompts, settings):
        sizes.append(len(prompts))
        if len(prompts) > 1:
            raise RuntimeError("CUDA error: out of memory")
        return original(model, prompts, settings)

    monkeypatch.setattr(generate_module, "_generate_batch", crowded)
    assert generate(model, tokenizer, template, CONVERSATIONS, max_new_tokens=6) == whole
    assert sizes[0] == len(CONVERSATIONS)
    assert sizes.count(1) == len(CONVERSATIONS)


def test_generation_ends_at_the_stop_token_of_each_row() -> None:
    tokenizer = byte_level()
    model = _model(len(tokenizer))
    whole = Template.choose(tokenizer)
    ids = _naive(model, whole.encode_prompt(tokenizer, CONVERSATIONS[1]), 12, [])
    position = next(n for n in range(3, 12) if ids[n] not in ids[:n])
    template = _StopsAt(**whole.to_json())
    object.__setattr__(template, "stop", ids[position])
    answers = generate(model, tokenizer, template, CONVERSATIONS, max_new_tokens=12)
    assert answers[1] == tokenizer.decode(ids[:position], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert answers[1]


def test_suggestions_of_the_base_for_sampling_are_not_applied() -> None:
    tokenizer = byte_level()
    model = _model(len(tokenizer))
    template = Template.choose(tokenizer)
    plain = generate(model, tokenizer, template, CONVERSATIONS, max_new_tokens=12)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.do_sample = True
    model.generation_config.temperature = 0.7
    assert generate(model, tokenizer, template, CONVERSATIONS, max_new_tokens=12) == plain


@pytest.mark.filterwarnings("ignore:.*checkpointing.*:FutureWarning")  # renamed in transformers 5.23
def test_generation_leaves_the_model_as_it_was() -> None:
    tokenizer = byte_level()
    template = Template.choose(tokenizer)
    plain = generate(_model(len(tokenizer)), tokenizer, template, CONVERSATIONS, max_new_tokens=6)
    model = _model(len(tokenizer))
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    model.train()
    model.model.layers[0].mlp.eval()
    modes = [module.training for module in model.modules()]
    assert generate(model, tokenizer, template, CONVERSATIONS, max_new_tokens=6) == plain
    assert [module.training for module in model.modules()] == modes
    assert not model.config.use_cache
    assert model.is_gradient_checkpointing
    assert torch.is_grad_enabled()


def test_nothing_to_answer() -> None:
    tokenizer = byte_level()
    with pytest.raises(QaromaError, match="no question"):
        generate(_model(len(tokenizer)), tokenizer, Template.choose(tokenizer), [()], max_new_tokens=2)


def test_modes_are_restored_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())

    def fail() -> None:
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            assert not torch.is_grad_enabled()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [module.training for module in model.modules()] == [True, True, False]


def test_exact_match() -> None:
    conversations = [[Message("user", "q"), Message("assistant", text)] for text in (" a\n", "b", "C")]
    assert exact_match(["a", " b ", "c"], conversations) == ExactMatch(2, 3)
    assert exact_match(["a"], conversations[:1]).share == 1.0
    with pytest.raises(QaromaError, match="no answers to compare"):
        exact_match([], [])
    with pytest.raises(QaromaError, match="no answer; expected"):
        exact_match(["a"], [[Message("user", "q")]])
    with pytest.raises(ValueError, match="zip"):
        exact_match(["a"], conversations)


def test_each_token_counts_once_whatever_its_batch() -> None:
    torch.manual_seed(0)
    values = torch.rand(23)
    model = nn.Dropout()
    for sizes in ([23], [10, 10, 3], [1] * 23):
        loss = evaluate_loss(lambda batch: (batch.sum(), batch.numel()), values.split(sizes), model)
        assert loss.count == 23
        assert loss.mean == pytest.approx(float(values.double().mean()), rel=1e-6)
        assert loss.perplexity == pytest.approx(math.exp(loss.mean))
    assert model.training
    assert Loss(1e6, 1).perplexity == math.inf
    with pytest.raises(QaromaError, match="no trained token"):
        evaluate_loss(lambda batch: (batch.sum(), 0), [values], model)
