"""Answers to chosen prompts while a run trains: what the loss does not say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from qaroma.data.forms import Message
from qaroma.data.templates import Template
from qaroma.inference.generate import generate

MAX_NEW_TOKENS = 128


class Sampler:
    """Greedy answers to the same prompts, so that two of them can be compared.

    Args:
        prompts: of a user.
        tokenizer, template: of the run.
        max_new_tokens: longest answer.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        max_new_tokens: int | None = None,
    ) -> None:
        self.prompts, self.tokenizer, self.template = list(prompts), tokenizer, template
        self.max_new_tokens = max_new_tokens or MAX_NEW_TOKENS

    def record(self, model: Any, step: int) -> dict[str, Any]:
        """The line that ``metrics.jsonl`` keeps."""
        conversations = [[Message("user", prompt)] for prompt in self.prompts]
        answers = generate(model, self.tokenizer, self.template, conversations, max_new_tokens=self.max_new_tokens)
        return {"event": "samples", "step": step, "prompts": self.prompts, "answers": answers}
