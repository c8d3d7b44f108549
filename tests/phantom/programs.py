"""Whole programs: loading in every placement, and ``finetune`` with an out-of-memory at each tenth of a step."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import CHATML, tiny_config
from model_bases import write_gguf
from rich.console import Console

from phantom.card import CARD, Card
from phantom.registry import SCENARIOS, Scenario, scenario
from phantom.world import CONFIG, answers, batch, for_real, growing, on_host, step, trained, whole_program
from qaroma.config.levels import LEVELS
from qaroma.config.schema import Config
from qaroma.engine.levels import apply_level
from qaroma.engine.placement import HostEmbedding
from qaroma.errors import QaromaError
from qaroma.export.weights import dequantised_tensors, merged_tensors
from qaroma.method.factors import Factors
from qaroma.model import base as base_module
from qaroma.model.base import fingerprint, load_base
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


@scenario("loading a GGUF file", slow=True)
def gguf(card: Card) -> None:
    with tempfile.TemporaryDirectory() as name, whole_program(card):
        path = Path(name) / "tiny.gguf"

        @for_real
        def write() -> None:
            from transformers import LlamaForCausalLM

            write_gguf(path, LlamaForCausalLM(tiny_config(num_hidden_layers=1)))

        write()
        with mock.patch.object(base_module, "find_model", for_real(base_module.find_model)):
            model = load_base(path, device="cuda")
        method = growing(model)
        apply_level(model, 1)
        card.clear()
        step(model.train(), method, [batch(1, 16)])


@scenario("export reads a model that trains")
def export_reads(card: Card) -> None:
    """Every tensor of the base in blocks of rows, with the update added where there is one."""
    model, method = trained(1, sizes={"num_hidden_layers": 1})
    step(model, method, [batch(1, 16)])
    method.finish()
    update = {name: Factors(A.float(), B.float()) for name, (A, B) in on_host(method).items()}
    tensors = merged_tensors(dequantised_tensors(model), update)
    assert len(tensors) == 12
    for tensor in tensors:
        for _, rows in tensor.blocks():
            assert rows.shape[1:] == tensor.shape[1:]


def _config(folder: Path, max_steps: int, **changes: Any) -> Config:
    rows = [{"instruction": f"count {n}", "output": "it is so"} for n in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Config.model_validate(
        {
            "model": {"name": str(folder / "model")},
            "data": {"train": [{"path": str(folder / "rows.jsonl")}], "validation_share": 0.25},
            "growth": {"schedule": "budget", "start_rank": 2, "max_rank": 4, "warmup": 1},
            "training": {
                "max_steps": max_steps, "micro_batch": 2, "grad_accum": 1, "device": "cuda", "memory": 0,
            },
            "checkpoint": {"every": 2},
            "evaluation": {"report": False, "prompts": ["count one"], "max_new_tokens": 2},
            "output": str(folder / "run"),
            **changes,
        }
    )  # fmt: skip


def _run(card: Card, max_steps: int, gradients: Any, **changes: Any) -> list[dict[str, Any]]:
    """``finetune`` from the command's function to the adapter; its gradients go by way of ``gradients``.

    Returns:
        The lines of its log.
    """
    answers(card, 2)
    with (
        tempfile.TemporaryDirectory() as name,
        whole_program(card),
        mock.patch.object(fit_module, "accumulate", gradients),
    ):
        folder = Path(name)
        saved_model(folder / "model", num_hidden_layers=1)
        config = _config(folder, max_steps, **changes)
        try:
            figures = finetune(config, console=Console(quiet=True))
        except KeyboardInterrupt:
            figures = finetune(config, resume=True, console=Console(quiet=True))
        assert figures["steps"] == max_steps
        return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@scenario("finetune, killed and resumed")
def killed(card: Card) -> None:
    original, calls = fit_module.accumulate, []

    def gradients(session: Any, batches: Any, *shown: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(session, batches)

    lines = _run(card, 3, gradients)
    assert [line["step"] for line in lines if "loss" in line and "event" not in line] == [1, 2, 3]
    assert all(line["reserved_bytes"] for line in lines if "event" not in line)


@scenario("finetune, out of memory at each tenth of a step")
def crowded(card: Card) -> None:
    """Level after level, then smaller micro-batches (put back after each), at the end the packed head."""
    original, seen = fit_module.accumulate, []
    kernels: dict[tuple[int, int], int] = {}  # of a step, by level and micro-batch
    tried = 0

    def gradients(session: Any, batches: Any, *shown: Any) -> Any:
        nonlocal tried
        before, tenth, at = card.kernels, len(seen), (session.level, session.plan.micro_batch)
        if tried < tenth <= 10:
            tried = tenth
            card.fail_at = before + kernels[at] * (2 * tenth - 1) // 20
            kind = torch.OutOfMemoryError if tenth % 2 else RuntimeError
            card.failure = lambda: kind("CUDA error: out of memory")
        result = original(session, batches)
        assert card.fail_at is None
        kernels[at] = card.kernels - before
        seen.append(at)
        session.plan.micro_batch = 2 if len(seen) < 10 else 1
        return result

    _run(card, 11, gradients, checkpoint={"every": 100}, evaluation={"report": False})
    assert tried == 10
    assert seen == [(0, 2), (1, 2), (2, 2), *[(2, 1)] * 7, (3, 1)]


@scenario("relief from level to level")
def relief(card: Card) -> None:
    """Each level is entered with next to no memory to spare: the head is packed where it lies."""
    model, method = trained(0, sizes={"num_hidden_layers": 1, "vocab_size": 40_000})
    dense = model.get_output_embeddings().weight.nbytes
    session: Any = SimpleNamespace(
        model=model, method=method, level=0, plan=SimpleNamespace(micro_batch=2), config=Config(),
        accelerator=SimpleNamespace(device=CARD), base_name="x",
    )  # fmt: skip
    with whole_program(card):
        whole = card.order.allocated
        for level, rows in ((1, 2), (2, 2), (2, 1), (3, 1), (4, 1)):
            card.order.peak = before = card.order.allocated
            relieve(session)
            assert (session.level, session.plan.micro_batch) == (level, rows)
            assert card.order.peak - before < 0.4 * dense
            step(model, method, [batch(rows, 16)])
        assert card.order.allocated < whole - 0.5 * dense
        with pytest.raises(QaromaError, match="out of memory at the smallest memory level"):
            relieve(session)
