"""Log-probabilities of given answers to a prompt.

Dimensions: T tokens of a batch, D hidden size, P scored positions, C positions of a chunk, V vocabulary,
S scored tokens (a position may score several: one for each candidate).

A row is a prompt and all but the last token of a candidate: the logits at its positions score every
candidate that begins alike. "answer1" to "answer4" differ in their last token alone, so that a
question is mostly one row, whatever the number of its candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qaroma.data.encode import Example
from qaroma.data.forms import BadRow, Message
from qaroma.data.templates import Template, tokenize, tokenize_continuation, without_answer
from qaroma.engine.loss import LMHead
from qaroma.engine.placement import compute_device
from qaroma.errors import QaromaError
from qaroma.tasks.causal_lm import CausalLM, hidden_states
from qaroma.tasks.evaluation import evaluating

LOGIT_BYTES = 128 * 2**20  # of fp32 logits alive at a time


@dataclass(frozen=True)
class Choice:
    """A prompt and its candidate answers, in tokens."""

    prompt: list[int]
    answers: tuple[list[int], ...]

    @property
    def length(self) -> int:
        """Tokens of the prompt with its longest answer."""
        return len(self.prompt) + max(len(answer) for answer in self.answers)


def encode_choice(
    tokenizer: PreTrainedTokenizerBase, template: Template, turns: Sequence[Message], outputs: Sequence[str]
) -> Choice:
    """Tokenise a question and its candidate answers as training tokenises a prompt and its answer.

    Args:
        tokenizer: The base's tokenizer.
        template: The template that the model was trained with.
        turns: The conversation; a last turn of the assistant's is left out.
        outputs: The candidates' texts.

    Returns:
        The prompt's ids, and each candidate's without the tokens that end the turn.

    Raises:
        QaromaError: The template refuses the conversation.
    """
    question = list(without_answer(turns))
    try:
        texts = [template.turns([*question, Message("assistant", output)])[-1] for output in outputs]
    except BadRow as error:
        raise QaromaError(f"{error}.") from error
    answers = [turn.answer.removesuffix(template.turn_end) for turn in texts]
    prompt, *wholes = tokenize(tokenizer, [texts[0].prompt, *(texts[0].prompt + answer for answer in answers)])
    found = []
    for answer, whole in zip(answers, wholes, strict=True):
        joined = whole[: len(prompt)] != prompt
        found.append(tokenize_continuation(tokenizer, answer) if joined else whole[len(prompt) :])
    return Choice(prompt, tuple(found))


def score_choices(model: PreTrainedModel, choices: Sequence[Choice], head: LMHead) -> list[list[float]]:
    """Summed log-probability of each candidate's tokens after its prompt.

    Equivalent to, and tested against, for each candidate by itself (with the head in fp32)::

        logits = model(prompt + answer).logits.log_softmax(-1)
        sum(logits[len(prompt) - 1 + i, token] for i, token in enumerate(answer))

    Args:
        model: A causal language model, in any mode.
        choices: One batch; padded on the right.
        head: The model's head; made once for all batches.

    Returns:
        For each choice the scores of its candidates, in nats.
    """
    rows, positions, targets, owners = _plan(choices)
    task = CausalLM()
    batch = task.collate([Example(row, [-100] * len(row)) for row in rows])
    length = batch.input_ids.shape[1]
    places = torch.tensor([row * length + column for row, column in positions])
    order = places.argsort(stable=True)
    device = compute_device(model)
    with evaluating(model):
        hidden_TD = hidden_states(model, batch.to(device)).flatten(0, 1)
        scores_S = _log_probabilities(hidden_TD, head, places[order], torch.tensor(targets)[order])
    summed = [[0.0] * len(choice.answers) for choice in choices]
    for index, score in zip(order.tolist(), scores_S.double().tolist(), strict=True):
        choice, candidate = owners[index]
        summed[choice][candidate] += score
    return summed


_Place = tuple[int, int]


def _plan(choices: Sequence[Choice]) -> tuple[list[list[int]], list[_Place], list[int], list[_Place]]:
    """The rows to run, and for each scored token its (row, column), its id and its (choice, candidate)."""
    rows: list[list[int]] = []
    positions: list[_Place] = []
    targets: list[int] = []
    owners: list[_Place] = []
    for number, choice in enumerate(choices):
        mine: list[tuple[int, list[int]]] = []  # of this choice: row number and the answer's part of the row
        for candidate in sorted(range(len(choice.answers)), key=lambda c: -len(choice.answers[c])):
            answer = choice.answers[candidate]
            known = answer[:-1]
            row = next((row for row, part in mine if part[: len(known)] == known), None)
            if row is None:
                row = len(rows)
                mine.append((row, known))
                rows.append(choice.prompt + known)
            first = len(choice.prompt) - 1
            positions += [(row, first + offset) for offset in range(len(answer))]
            targets += answer
            owners += [(number, candidate)] * len(answer)
    return rows, positions, targets, owners


def _log_probabilities(hidden_TD: Tensor, head: LMHead, places_S: Tensor, targets_S: Tensor) -> Tensor:
    """Log-probability of each target at its place.

    Logits exist for a chunk of positions at a time, and only for positions that score something. They are
    made in fp32 whatever the model computes in: in bf16, neighbouring logits of 16 and more lie 0.125
    apart, and candidates that differ in a digit would tie.

    Args:
        hidden_TD: Hidden states of all tokens of the batch.
        head: The model's head.
        places_S: Rows of ``hidden_TD``, ascending, on the CPU.
        targets_S: Token ids, on the CPU.
    """
    places_P, which_S = places_S.unique_consecutive(return_inverse=True)  # type: ignore[no-untyped-call]
    device = hidden_TD.device
    chunk = max(1, LOGIT_BYTES // (4 * head.vocabulary))
    found: list[Tensor] = []
    for start in range(0, places_P.shape[0], chunk):
        logits_CV = head.logits(hidden_TD.index_select(0, places_P[start : start + chunk].to(device)).float())
        first, last = torch.searchsorted(which_S, torch.tensor([start, start + chunk])).tolist()
        rows = (which_S[first:last] - start).to(device)
        found.append(logits_CV[rows, targets_S[first:last].to(device)] - logits_CV.logsumexp(dim=1)[rows])
    return torch.cat(found)
