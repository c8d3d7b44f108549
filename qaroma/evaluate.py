"""Evaluation: greedy answers, exact match, and the loss over batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from qaroma.data.forms import Message
from qaroma.data.templates import Template
from qaroma.errors import QaromaError

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class ExactMatch:
    """How many answers equal the expected ones."""

    correct: int
    total: int

    @property
    def share(self) -> float:
        """The share of right answers, from 0 to 1."""
        return self.correct / self.total


@dataclass(frozen=True)
class Loss:
    """A summed cross-entropy, in nats, and the number of tokens it is the sum of."""

    sum: float
    count: int

    @property
    def mean(self) -> float:
        """Loss per trained token."""
        return self.sum / self.count

    @property
    def perplexity(self) -> float:
        """exp(mean), infinite where that overflows."""
        try:
            return math.exp(self.mean)
        except OverflowError:
            return math.inf


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode it was in before.

    Args:
        model: The model; modules of one model may be in different modes.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def compute_device(model: Any) -> torch.device:
    """Where a causal model computes: its head's device, since its embeddings may lie in host memory."""
    device: torch.device = model.get_output_embeddings().weight.device
    return device


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    conversations: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    on_progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Greedy answers to conversations, batched.

    Prompts of like length share a batch, padded on the left. Settings that the base suggests for
    sampling, such as a repetition penalty, are not applied.

    Args:
        model: A causal language model, in any mode, with gradient checkpointing or not.
        tokenizer: Its tokenizer.
        template: The template it was trained with.
        conversations: Turns; a last one of the assistant's is the expected answer and is left out.
        max_new_tokens: Longest answer.
        batch_size: Prompts in one batch.
        on_progress: Called with the number of answers that a batch has added.

    Returns:
        The answers, in the order of the conversations, without special tokens.

    Raises:
        QaromaError: The template refuses a conversation, or one holds no turn to answer.
    """
    if any(not any(message.role == "user" for message in turns) for turns in conversations):
        raise QaromaError("got a conversation with no question, or plain text; expected a user turn to answer.")
    prompts = [template.encode_prompt(tokenizer, turns) for turns in conversations]
    stops = template.stop_token_ids(tokenizer)
    padding = int(tokenizer.pad_token_id) if tokenizer.pad_token_id is not None else stops[0]
    settings = _greedy(max_new_tokens, stops, padding)
    answers = [""] * len(prompts)
    # Longest first, so that a batch too large for the memory fails at once.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    with evaluating(model), _caching(model):
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            new_ids = _generate_batch(model, [prompts[index] for index in indices], settings, padding)
            for index, ids in zip(indices, new_ids, strict=True):
                answers[index] = _decoded(tokenizer, ids, stops)
            if on_progress is not None:
                on_progress(len(indices))
    return answers


def expected_answer(conversation: Sequence[Message]) -> str:
    """The content of the last turn.

    Raises:
        QaromaError: It is not the assistant's.
    """
    if not conversation or conversation[-1].role != "assistant":
        raise QaromaError("got a conversation with no answer; expected the assistant's turn at its end.")
    return conversation[-1].content


def exact_match(answers: Sequence[str], conversations: Sequence[Sequence[Message]]) -> ExactMatch:
    """Compare answers with the last turns of the conversations, without the white space around them.

    Args:
        answers: From :func:`generate`.
        conversations: With the expected answers, in the same order.

    Returns:
        The number of equal ones, and of all.

    Raises:
        QaromaError: There is nothing to compare, or a conversation has no answer.
    """
    if not answers:
        raise QaromaError("got no answers to compare; expected at least one row with a question and an answer.")
    pairs = zip(answers, conversations, strict=True)
    return ExactMatch(sum(got.strip() == expected_answer(turns).strip() for got, turns in pairs), len(answers))


def evaluate_loss(
    loss_fn: Callable[[Batch], tuple[Tensor, int | Tensor]], batches: Iterable[Batch], model: nn.Module
) -> Loss:
    """The loss over batches, each token counted once whatever batch it is in.

    Args:
        loss_fn: Gives the summed loss of a batch (a scalar) and its number of trained tokens.
        batches: What ``loss_fn`` takes.
        model: Put into evaluation mode meanwhile.

    Returns:
        Sum and count.

    Raises:
        QaromaError: The batches hold no trained token.
    """
    # The sums stay where they are made until the end: one device synchronisation in all.
    sums: list[Tensor] = []
    counts: list[int | Tensor] = []
    with evaluating(model):
        for batch in batches:
            total, count = loss_fn(batch)
            sums.append(total.detach())
            counts.append(count)
    trained = sum(int(count) for count in counts)
    if trained == 0:
        raise QaromaError("the evaluation data has no trained token; expected rows with answers.")
    return Loss(float(torch.stack(sums).double().sum().item()), trained)


@contextmanager
def _caching(model: PreTrainedModel) -> Iterator[None]:
    """Key-value caching on, which training switches off for gradient checkpointing."""
    before = getattr(model.config, "use_cache", None)
    model.config.use_cache = True
    try:
        yield
    finally:
        model.config.use_cache = before


def _greedy(max_new_tokens: int, stops: list[int], padding: int) -> GenerationConfig:
    """Plain greedy search; every value is given, or the base's own suggestions would fill it in."""
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=stops,
        pad_token_id=padding,
        use_cache=True,
    )


def _generate_batch(
    model: PreTrainedModel, prompts: Sequence[list[int]], settings: GenerationConfig, padding: int
) -> list[list[int]]:
    """The new token ids of each prompt of a batch, padded on the left."""
    width = max(len(prompt) for prompt in prompts)
    rows = [[padding] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    device = compute_device(model)
    produced: Any = model.generate(
        input_ids=torch.tensor(rows, device=device),
        attention_mask=torch.tensor(mask, device=device),
        generation_config=settings,
    )
    new_ids: list[list[int]] = produced[:, width:].tolist()
    return new_ids


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stops: Sequence[int]) -> str:
    """The text before the first stop token, spaces left as the model wrote them."""
    end = next((position for position, token in enumerate(ids) if token in stops), len(ids))
    return str(tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False))
