"""What is done with a model beside training: validation, generation, chat, classifiers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from conftest import tiny_config
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, GenerationConfig

from phantom.card import CARD, Card
from phantom.registry import SCENARIOS, Scenario, scenario
from phantom.steps import counts
from phantom.world import answers, batch, for_real, gradients, step, trained
from qaroma.data.forms import Message
from qaroma.data.labelled import LabelledExample
from qaroma.engine.levels import apply_level
from qaroma.inference.chat import Chat, Sampling
from qaroma.inference.generate import _generate_batch
from qaroma.inference.open import TunedModel
from qaroma.method.adapter import Adapter
from qaroma.method.aroma import GrowthController
from qaroma.method.growth import GrowthSettings
from qaroma.method.head import TrainedHead, head_names, is_inside
from qaroma.method.targets import find_targets
from qaroma.model.bnb import bnb
from qaroma.plan.weightless_model import materialise
from qaroma.tasks.causal_lm import CausalLM, require_known_head
from qaroma.tasks.evaluation import evaluating
from qaroma.tasks.labelled import Classification


@scenario("validation at level 3", waits={"copy to the host in evaluation.evaluate_loss": 1})
def validation(card: Card) -> None:
    model, _ = trained(3)
    card.clear()
    CausalLM().evaluate(model, [batch(2, 64), batch(2, 32)], CARD)


@scenario("the head is known")
def head_is_known(card: Card) -> None:
    model, _ = trained(2)
    card.scalar = lambda dtype: False if dtype is torch.bool else 1
    with mock.patch.object(CausalLM, "collate", for_real(CausalLM.collate)):
        require_known_head(model.eval())


def _generation(level: int, *, warm: bool = False) -> Callable[[Card], None]:
    def run(card: Card) -> None:
        model, _ = trained(level)
        answers(card, 3)
        settings = GenerationConfig(
            max_new_tokens=3, do_sample=warm, top_p=0.9 if warm else 1.0, pad_token_id=0, eos_token_id=[2]
        )
        with evaluating(model):
            new = _generate_batch(model, [[3, 4, 5], [3, 4, 5, 6, 7]], settings)
        assert [len(ids) for ids in new] == [3, 3], new

    return run


for _level in range(5):
    SCENARIOS[f"generation at level {_level}"] = Scenario(_generation(_level), slow=_level == 0)
SCENARIOS["sampling"] = Scenario(_generation(1, warm=True), slow=True)


@scenario("a token of an answer", result={"kernels": 97, "products": 29, "weights unpacked": 0})
def token(card: Card) -> dict[str, int]:
    """No weight is unpacked for it: bitsandbytes multiplies with the packed ones."""
    model, _ = trained(1)
    ids = torch.full((1, 1), 3, device=CARD)
    card.clear()
    with evaluating(model):
        model(input_ids=ids, use_cache=False)
    return counts(card)


class _Words:
    """A tokenizer of numbers."""

    model_max_length, pad_token_id, eos_token_id = 64, 0, 2

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))


class _Plain:
    """A template that knows no turns."""

    def encode_prompt(self, tokenizer: Any, turns: list[Message]) -> list[int]:
        return [3] * (4 * len(turns))

    def stop_token_ids(self, tokenizer: Any) -> list[int]:
        return [2]


@scenario("a conversation")
def conversation(card: Card) -> None:
    model, method = trained(1)
    method.finish()
    words: Any = _Words()
    template: Any = _Plain()
    chat = Chat(TunedModel(model, words, template), Sampling(max_new_tokens=3, temperature=0.7, seed=1))
    answers(card, 3)
    pieces: list[str] = []
    assert chat.ask("one", pieces.append).tokens == 3
    answers(card, 3)
    of_the_base = chat.ask_base(pieces.append)
    assert of_the_base is not None
    assert of_the_base.tokens == 3


def _classifier(config: Any) -> Any:
    """A classifier on the card, its linear layers in NF4 but for the head's, and the head's names."""
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16).requires_grad_(False).eval()
    names = head_names(model)
    for name, plain in list(model.named_modules()):
        if not isinstance(plain, nn.Linear) or is_inside(name, names):
            continue
        shape, bias = (plain.in_features, plain.out_features), plain.bias is not None
        packed = bnb.nn.Linear4bit(*shape, bias, compute_dtype=torch.bfloat16, quant_type="nf4")
        if bias:
            packed.bias = plain.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, packed)
    return model, names


def _classifies(level: int, config: Callable[[], Any]) -> Callable[[Card], None]:
    def run(card: Card) -> None:
        task: Any = Classification(3)

        @for_real
        def built() -> tuple[Any, Any, Any]:
            example = LabelledExample([5] * 16, [0] * 16 if config is _bert else None, 1, "")
            shorter = LabelledExample([5] * 8, [0] * 8 if config is _bert else None, 1, "")
            rows = task.collate([example, shorter])
            with torch.device("meta"):
                return *_classifier(config()), rows

        model, names, rows = built()
        with CARD:
            materialise(model)
        adapter = Adapter(model, [n for n in find_targets(model) if not is_inside(n, names)])
        head = TrainedHead(model, names)
        method = GrowthController(
            adapter, GrowthSettings(t_in=1000), learning_rate=1e-3, total_steps=100, head=head.parameters()
        )
        apply_level(model, level)
        model.train()
        card.scalar = lambda dtype: False if dtype is torch.bool else 1
        step(model, method, [rows], task)
        card.clear()
        gradients(model, method, [rows], task)
        assert sum(card.waits.values()) <= 3, card.waits
        logits, labels = task.predict(model, [rows], CARD)
        assert logits.device.type == labels.device.type == "cpu", (logits.device, labels.device)
        head.load(head.tensors())

    return run


def _bert() -> Any:
    return AutoConfig.for_model(
        "bert", vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_labels=3,
    )  # fmt: skip


def _llama() -> Any:
    return tiny_config(hidden_size=128, num_labels=3, pad_token_id=0, tie_word_embeddings=False)


SCENARIOS["an encoder classifies at level 0"] = Scenario(_classifies(0, _bert))
SCENARIOS["an encoder classifies at level 2"] = Scenario(_classifies(2, _bert), slow=True)
SCENARIOS["a decoder classifies at level 2"] = Scenario(_classifies(2, _llama), slow=True)
