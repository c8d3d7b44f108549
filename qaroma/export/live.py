"""The live model of an export, and what it answers: made once, used by every format's self-test."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psutil
import torch

from qaroma.data.encode import Example
from qaroma.engine.placement import compute_device
from qaroma.errors import QaromaError
from qaroma.export.selftest import Answered, live_answers
from qaroma.export.subject import Subject, records_of, settings_of
from qaroma.export.weights import StoredTensor, dequantised_tensors, original_tensors
from qaroma.inference.answer_test import read_conversations
from qaroma.method.attach import attach_update, detach
from qaroma.method.factors import Factors
from qaroma.tasks.causal_lm import CausalLM
from qaroma.tasks.evaluation import evaluate_loss

PROMPTS = 4
VALIDATION_ROWS = 64
_MICRO_BATCH = 4
_SPARE = 1.15  # of the memory that weights take, for activations and buffers
# Where an adapter lies outside its run, so that it has no prompts of its own.
_GENERAL_PROMPTS = ("What is the capital of France?", "Write one sentence about the sea.", "Count from 1 to 12.")


class LiveModel:
    """A base in fp32 arithmetic with an update that can be put on and taken off.

    Args:
        subject: what is exported.
        update: its update, compressed or not.
        device: where the live model computes.
        merge_into: ``original`` or ``dequantised``.
        validation: gives the run's validation examples; None where there are none.
    """

    def __init__(
        self,
        subject: Subject,
        update: dict[str, Factors],
        device: torch.device,
        merge_into: str,
        validation: Callable[[], Sequence[Example]] | None,
    ) -> None:
        self.subject, self.update, self.device = subject, update, device
        self.merge_into = merge_into
        self._validation = validation
        self._examples: Sequence[Example] | None = None
        self._model: Any = None
        self._answers: dict[str, list[Answered]] = {}
        self._losses: dict[str, float] = {}
        self._tensors: list[StoredTensor] = []

    def model(self) -> Any:
        """The base as training held it, without an adapter."""
        if self._model is None:
            self._model = self.subject.base.model(self.device, dtype=torch.float32)
        return self._model

    def stored_update(self) -> dict[str, Factors]:
        """The update as a checkpoint holds the weights: A^T B is added to one that lies as (N, M)."""
        turned = self.subject.transposed
        return {name: Factors(f.B, f.A) if name in turned else f for name, f in self.update.items()}

    def tensors(self) -> list[StoredTensor]:
        """What is merged into."""
        if self.merge_into == "dequantised":
            return dequantised_tensors(self.model())
        self.model()  # whose fingerprint says whether it is the right base
        if not self._tensors:
            base = self.subject.base
            self._tensors = original_tensors(base.name, self.subject.config, revision=base.revision)
        return self._tensors

    def answers(self) -> list[Answered]:
        """The live model's, on the base that training saw."""
        self._meet("dequantised", self.model, answers=True)
        return self._answers["dequantised"]

    def merged_answers(self) -> list[Answered]:
        """The live model's, on the base that is merged into."""
        if self.merge_into == "dequantised":
            return self.answers()
        self._meet("original", self._dense, answers=True, loss=True)
        return self._answers["original"]

    def answer(self, prompt: str, tokens: int) -> tuple[str, bool]:
        """The live model's greedy answer on the base that is merged into, and whether it came to its end.

        Args:
            prompt: a user's text.
            tokens: longest answer.
        """
        model, subject = self.model() if self.merge_into == "dequantised" else self._dense(), self.subject
        with self._wearing(model):
            (found,) = live_answers(model, subject.tokenizer, subject.template, [prompt], tokens=tokens)
        return found.answer, len(found.ids) - found.start < tokens

    def losses(self) -> dict[str, float]:
        """Validation loss of the update on either base; nothing where there is no data or no room."""
        if self._validation is None:
            return {}
        self._meet("dequantised", self.model, loss=True)
        if self._has_room(self._dense_bytes(torch.bfloat16)) and self.subject.base.info.quantization != "none":
            self._meet("original", self._dense, loss=True)
        return dict(self._losses)

    def room_for_dense(self, dtype: str) -> tuple[torch.device, torch.dtype]:
        """Where the whole model fits in fp32, or in its own 16 bits.

        Args:
            dtype: ``fp32``, ``bf16`` or ``fp16``, of the files.

        Raises:
            QaromaError: nowhere.
        """
        own = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype, torch.float32)
        for kind in (torch.float32, own):
            for device in (self.device, torch.device("cpu")):
                if self._has_room(self._dense_bytes(kind), device):
                    return device, kind
        need, free = (f"{size / 1e9:.1f} GB" for size in (self._dense_bytes(own), _free(torch.device("cpu"))))
        raise QaromaError(
            f"the self-test loads the whole model, which takes {need}, but {free} are free; "
            "type --no-self-test, or export an adapter: --format padded"
        )

    def _dense(self) -> Any:
        device, dtype = self.room_for_dense("bf16")
        return self.subject.base.model(device, dtype=dtype, quantization="none")

    def _meet(self, name: str, load: Callable[[], Any], *, answers: bool = False, loss: bool = False) -> None:
        """Ask one of the two models what is wanted of it and not known yet, while it is loaded."""
        answers = answers and name not in self._answers
        examples = self._validation_examples() if loss and name not in self._losses else ()
        if not answers and not examples:
            return
        model, subject = load(), self.subject
        with self._wearing(model):
            if answers:
                prompts = sample_prompts(subject)
                self._answers[name] = live_answers(model, subject.tokenizer, subject.template, prompts)
            if examples:
                self._losses[name] = self._loss(model, examples)
        del model
        gc.collect()

    @contextmanager
    def _wearing(self, model: Any) -> Iterator[None]:
        """The update on a model, inside the block."""
        adapter = attach_update(model, self.update)
        try:
            yield
        finally:
            detach(adapter)

    def _validation_examples(self) -> Sequence[Example]:
        if self._examples is None:
            found = list(self._validation()) if self._validation else []
            random.Random(0).shuffle(found)
            self._examples = sorted(found[:VALIDATION_ROWS], key=lambda e: len(e.input_ids))
        return self._examples

    def _loss(self, model: Any, examples: Sequence[Example]) -> float:
        task = CausalLM(self.subject.tokenizer.pad_token_id or 0)
        device = compute_device(model)
        batches = (task.collate(examples[i : i + _MICRO_BATCH]) for i in range(0, len(examples), _MICRO_BATCH))
        return evaluate_loss(lambda batch: task.loss(model, batch.to(device)), batches, model).mean

    def _dense_bytes(self, dtype: torch.dtype) -> int:
        config = self.subject.config.get_text_config()
        linear = sum(rows * columns for rows, columns in self.subject.shapes.values())
        table = config.vocab_size * config.hidden_size
        return int((linear + table) * dtype.itemsize * _SPARE)

    def _has_room(self, size: int, device: torch.device | None = None) -> bool:
        return size < _free(device or torch.device("cpu"))


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def sample_prompts(subject: Subject) -> list[str]:
    """Prompts that a run was tested with, else the first of its data, else general ones."""
    for record in records_of(subject.run):
        if record.get("event") == "answers":
            return [str(prompt) for prompt in record["prompts"][:PROMPTS]]
    data = settings_of(subject.run).get("data") or {}
    for place in [data.get("validation"), *(one["path"] for one in data.get("train", []))]:
        if place is None:
            continue
        try:
            conversations = read_conversations(
                [(place, 1.0)], columns=data.get("columns"), feedback="good", rows=PROMPTS, skip_bad=True
            )
        except QaromaError:  # moved since, or plain text, which holds no questions
            continue
        prompts = [next((m.content for m in talk if m.role == "user"), "") for talk in conversations]
        if any(prompts):
            return [prompt for prompt in prompts if prompt]
    return list(_GENERAL_PROMPTS)
