"""Whole programs: loading in every placement, and ``finetune`` with an out-of-memory at each tenth of a step."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from conftest import CHATML, tiny_config
from rich.console import Console

from phantom.card import CARD, Card
from phantom.registry import SCENARIOS, Scenario, scenario
from phantom.world import CONFIG, answers, batch, for_real, growing, real_zeros, step, whole_program
from qaroma.config.levels import LEVELS
from qaroma.config.schema import Config
from qaroma.engine.levels import apply_level
from qaroma.engine.placement import HostEmbedding
from qaroma.model.base import fingerprint, load_base
from qaroma.runs.stop import StopRequest
from qaroma.training import fit as fit_module
from qaroma.training.finetune import finetune
from qaroma.training.memory import relieve


@for_real
def saved_model(folder: Path, **sizes: Any) -> Path:
    """A checkpoint of a small Llama, with a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    LlamaForCausalLM(tiny_config(**{**CONFIG, **sizes})).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: i for i, word in enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet])}
    raw = Tokenizer(models.BPE(vocab=words, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    ).save_pretrained(folder)
    return folder


def _loads(level: int, **sizes: Any) -> Callable[[Card], None]:
    def run(card: Card) -> None:
        with tempfile.TemporaryDirectory() as folder, whole_program(card):
            saved_model(Path(folder), **sizes)
            chosen = LEVELS[level]
            model = load_base(
                folder, device="cuda", host_embeddings=chosen.host_embeddings, quantize_head=chosen.packed_head
            )
            assert len(fingerprint(model)) == 32
            method = growing(model)
            apply_level(model, level)
            card.clear()  # of what loading waited for
            table = model.get_input_embeddings()
            tied = bool(model.config.tie_word_embeddings)
            assert isinstance(table, HostEmbedding) == (chosen.host_embeddings and (not tied or chosen.packed_head))
            assert not card.order.memory(table.weight).pinned
            assert {p.device for p in model.parameters()} == {CARD}
            step(model.train(), method, [batch(1, 16)])

    return run


SCENARIOS["loading at level 1"] = Scenario(_loads(1, num_hidden_layers=1))
SCENARIOS["loading at level 3"] = Scenario(_loads(3, num_hidden_layers=1))
SCENARIOS["loading at level 2, a tied head"] = Scenario(
    _loads(2, num_hidden_layers=1, tie_word_embeddings=True), slow=True
)


def _config(folder: Path, **changes: Any) -> Config:
    rows = [{"instruction": f"count {n}", "output": "it is so"} for n in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Config.model_validate(
        {
            "model": {"name": str(folder / "model")},
            "data": {"train": [{"path": str(folder / "rows.jsonl")}], "validation_share": 0.25},
            "growth": {"schedule": "budget", "start_rank": 2, "max_rank": 4, "warmup": 1},
            "training": {
                "max_steps": 3, "micro_batch": 2, "grad_accum": 2, "device": "cuda", "learning_rate": 1e-3, "memory": 0,
            },
            "checkpoint": {"every": 2},
            "evaluation": {"report": False, "prompts": ["count one"], "max_new_tokens": 2},
            "output": str(folder / "run"),
            **changes,
        }
    )  # fmt: skip


@scenario("finetune, stopped and resumed")
def whole_run(card: Card) -> None:
    answers(card, 2)
    with tempfile.TemporaryDirectory() as name, whole_program(card):
        folder = Path(name)
        saved_model(folder / "model", num_hidden_layers=1)
        config = _config(folder)
        figures = finetune(config, console=Console(quiet=True))
        assert figures["steps"] == 3
