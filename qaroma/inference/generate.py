"""Evaluation: greedy answers, exact match, and the loss over batches."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from qaroma.data.forms import Message
from qaroma.data.templates import Template
from qaroma.engine.no_memory import card_is_full
from qaroma.engine.placement import compute_device
from qaroma.errors import QaromaError
from qaroma.model.positions import learnt_positions
from qaroma.tasks.evaluation import evaluating


@dataclass(frozen=True)
class ExactMatch:
    """How many answers equal the expected ones."""

    correct: int
    total: int

    @property
    def share(self) -> float:
        """The share of right answers, from 0 to 1."""
        return self.correct / self.total


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    conversations: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
) -> list[str]:
    """Greedy answers to conversations, batched.

    Prompts of like length share a batch, padded on the left. Settings that the base suggests for
    sampling, such as a repetition penalty, are not applied.

    Args:
        model: a causal language model, in any mode, with gradient checkpointing or not.
        tokenizer: its tokenizer.
        template: the template it was trained with.
        conversations: turns; a last one of the assistant's is the expected answer and is left out.
        max_new_tokens: longest answer.
        batch_size: prompts in one batch; fewer where memory does not suffice for so many.

    Returns:
        The answers, in the order of the conversations, without special tokens.

    Raises:
        QaromaError: The template refuses a conversation, or one holds no turn to answer.
    """
    if any(not any(message.role == "user" for message in turns) for turns in conversations):
        raise QaromaError("got a conversation with no question, or plain text; expected a user turn to answer.")
    prompts = [template.encode_prompt(tokenizer, turns) for turns in conversations]
    stops = template.stop_token_ids(tokenizer)
    settings = generation_settings(tokenizer, stops, max_new_tokens=max_new_tokens)
    answers = [""] * len(prompts)
    # Longest first, so that a batch too large for the memory fails at once.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    with evaluating(model), _caching(model):
        while order:
            indices = order[:batch_size]
            try:
                new_ids = _generate_batch(model, [prompts[index] for index in indices], settings)
            except RuntimeError as error:
                if batch_size == 1 or not card_is_full(error):
                    raise
                batch_size = max(1, min(batch_size, len(indices)) // 2)
                continue
            for index, ids in zip(indices, new_ids, strict=True):
                answers[index] = _decoded(tokenizer, ids, stops)
            order = order[batch_size:]
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
        answers: from :func:`generate`.
        conversations: with the expected answers, in the same order.

    Returns:
        The number of equal ones, and of all.

    Raises:
        QaromaError: There is nothing to compare, or a conversation has no answer.
    """
    if not answers:
        raise QaromaError("got no answers to compare; expected at least one row with a question and an answer.")
    pairs = zip(answers, conversations, strict=True)
    return ExactMatch(sum(got.strip() == expected_answer(turns).strip() for got, turns in pairs), len(answers))


@contextmanager
def _caching(model: PreTrainedModel) -> Iterator[None]:
    """Key-value caching on, which training switches off for gradient checkpointing."""
    before = getattr(model.config, "use_cache", None)
    model.config.use_cache = True
    try:
        yield
    finally:
        model.config.use_cache = before


def generation_settings(
    tokenizer: PreTrainedTokenizerBase,
    stops: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> GenerationConfig:
    """How tokens are drawn; every value is given, or the base's own suggestions would fill it in.

    Args:
        tokenizer: whose padding token is taken, the first stop token where it has none.
        stops: ids at which an answer ends.
        max_new_tokens: longest answer.
        temperature: 0 is greedy.
        top_p: only the likeliest tokens of this share are drawn from.
    """
    warm = temperature > 0
    padding = tokenizer.pad_token_id
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=warm,
        num_beams=1,
        temperature=temperature if warm else 1.0,
        top_p=top_p if warm else 1.0,
        top_k=0 if warm else 50,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=list(stops),
        pad_token_id=stops[0] if padding is None else int(padding),
        use_cache=True,
    )


def _generate_batch(
    model: PreTrainedModel, prompts: Sequence[list[int]], settings: GenerationConfig
) -> list[list[int]]:
    """The new token ids of each prompt of a batch, padded on the left."""
    width = max(len(prompt) for prompt in prompts)
    rows = [[settings.pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    positions = learnt_positions(model)
    if positions is not None:  # the last token of an answer is not read any more
        settings = copy.deepcopy(settings)
        settings.max_new_tokens = max(1, min(int(settings.max_new_tokens), positions - width + 1))
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
