"""The two ways to score a question: what the model says, and what it holds most likely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qaroma.benchmarks.commonsense import Question, extract
from qaroma.benchmarks.likelihood import Choice, encode_choice, score_choices
from qaroma.data.templates import Template
from qaroma.engine.loss import LMHead
from qaroma.inference.generate import generate

SCORERS = ("generation", "likelihood")


@dataclass(frozen=True)
class Item:
    """A question, and its prompt and candidates in tokens (generation has the prompt alone)."""

    question: Question
    choice: Choice


class Scorer(Protocol):
    """Scores a batch of questions of one task."""

    def prepare(self, question: Question) -> Item:
        """What can be done before the model runs."""
        ...

    def score(self, task: str, items: Sequence[Item]) -> list[dict[str, Any]]:
        """A record for each question: ``task``, ``row``, ``answer``, ``predicted``, and what it came from."""
        ...


class Generation:
    """Greedy text; the first match of the task's pattern is the answer, no match is a wrong one.

    Args:
        model, tokenizer, template: Of the run.
        max_new_tokens: Longest text.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        *,
        max_new_tokens: int,
    ) -> None:
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.max_new_tokens = max_new_tokens

    def prepare(self, question: Question) -> Item:
        return Item(question, Choice(self.template.encode_prompt(self.tokenizer, question.turns), ([],)))

    def score(self, task: str, items: Sequence[Item]) -> list[dict[str, Any]]:
        texts = generate(
            self.model,
            self.tokenizer,
            self.template,
            [item.question.turns for item in items],
            max_new_tokens=self.max_new_tokens,
            batch_size=len(items),
        )
        return [
            {**_record(task, item.question), "predicted": extract(task, text), "text": text}
            for item, text in zip(items, texts, strict=True)
        ]


class Likelihood:
    """The candidate with the greatest log-probability, summed over its tokens and per token.

    Args:
        model, tokenizer, template: Of the run.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.head = LMHead(model)

    def prepare(self, question: Question) -> Item:
        return Item(question, encode_choice(self.tokenizer, self.template, question.turns, question.outputs))

    def score(self, task: str, items: Sequence[Item]) -> list[dict[str, Any]]:
        records = []
        scores = score_choices(self.model, [item.choice for item in items], self.head)
        for item, summed in zip(items, scores, strict=True):
            lengths = [len(answer) for answer in item.choice.answers]
            mean = [score / length for score, length in zip(summed, lengths, strict=True)]
            candidates = item.question.candidates
            records.append(
                {
                    **_record(task, item.question),
                    "predicted": candidates[summed.index(max(summed))],
                    "predicted_per_token": candidates[mean.index(max(mean))],
                    "scores": dict(zip(candidates, summed, strict=True)),
                    "tokens": lengths,
                }
            )
        return records


def _record(task: str, question: Question) -> dict[str, Any]:
    return {"task": task, "row": question.row, "answer": question.answer}
