"""A tuned model as lm-evaluation-harness asks it: prompts as in training, logits in fp32.

Dimensions: B rows, L padded length, K positions that may score something, D hidden size, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from qaroma.data.forms import BadRow, Message
from qaroma.data.templates import Template
from qaroma.data.tokens import added_bos, tokenize, tokenize_continuation
from qaroma.engine.loss import LMHead
from qaroma.engine.placement import compute_device
from qaroma.errors import QaromaError
from qaroma.inference.open import TunedModel
from qaroma.method.head import backbone

Encoded = tuple[Any, list[int], list[int]]  # the harness's request, its prompt and its continuation in tokens


class HarnessModel(HFLM):  # type: ignore[misc]
    """The harness's model of transformers, with what a run knows better.

    Chat prompts are those of the run's own template, answers to them are tokenised as training does, and
    generation is plain greedy search up to the template's stop tokens, whatever the base suggests.

    Args:
        tuned: the opened run or base; its generation settings are replaced.
        batch_size: requests in one forward pass.
    """

    def __init__(self, tuned: TunedModel, *, batch_size: int) -> None:
        super().__init__(
            pretrained=tuned.model,
            tokenizer=tuned.tokenizer,
            batch_size=batch_size,
            add_bos_token=added_bos(tuned.tokenizer) is not None,
        )
        self._device = compute_device(tuned.model)
        self.template = tuned.template
        self.stops = self.template.stop_token_ids(self.tokenizer)
        self.model.generation_config = GenerationConfig(eos_token_id=self.stops)
        self._head = LMHead(self.model)
        self._conversations: dict[str, list[Message]] = {}
        self._longest_continuation = 0

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the run's template renders it.

        Args:
            chat_history: turns with ``role`` and ``content``.
            add_generation_prompt: False where the last turn begins the answer that the model goes on with.

        Raises:
            QaromaError: the template refuses the conversation.
        """
        turns = [Message(turn["role"], turn["content"]) for turn in chat_history]
        begun = "" if add_generation_prompt else turns.pop().content
        try:
            prompt = self.template.render(turns, prompt=True)
        except BadRow as error:
            raise QaromaError(f"{error}. Type --no-template to give the task's prompts as they are") from error
        if add_generation_prompt:
            self._conversations[prompt] = turns
        return prompt + begun

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        turns = self._conversations.get(context)
        if turns is None:
            encoded: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
            return encoded
        return encode_answer(self.tokenizer, self.template, turns, continuation)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=_no_terminal())
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        found: list[str] = super().generate_until(requests, disable_tqdm=_no_terminal())
        return found

    def _loglikelihood_tokens(self, requests: Sequence[Encoded], **options: Any) -> list[tuple[float, bool]]:
        self._longest_continuation = max((len(continuation) for _, _, continuation in requests), default=0)
        options["disable_tqdm"] = _no_terminal()
        found: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, **options)
        return found

    @torch.no_grad()
    def _model_call(self, inps: Tensor, attn_mask: None = None, labels: None = None) -> Tensor:
        """Logits of the last positions of (B, L) token ids padded on the right with zeros: (B, K, V) in fp32.

        In bf16, neighbouring logits of 16 and more lie 0.125 apart, and candidates that differ in a digit
        would tie. The harness counts positions from the end and asks for none before a row's continuation,
        so logits of the long prompts are not made.
        """
        length = inps.shape[1]
        # Of a prompt that itself ends with token 0 this finds too little, and keeps a position too many.
        filled = (inps != 0).int() * torch.arange(1, length + 1, device=inps.device)
        shortest = int(filled.amax(dim=1).min())
        kept = min(length, length - shortest + self._longest_continuation)
        hidden_BLD: Tensor = backbone(self.model)(input_ids=inps, use_cache=False).last_hidden_state
        hidden_BKD = hidden_BLD[:, length - kept :].float()
        return self._head.logits(hidden_BKD.flatten(0, 1)).view(*hidden_BKD.shape[:2], self._head.vocabulary)

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
        """Text of generated tokens, up to the first that ends the answer; other tokens are decoded whole."""
        if skip_special_tokens and isinstance(tokens, list):
            tokens = tokens[: next((place for place, token in enumerate(tokens) if token in self.stops), len(tokens))]
        return str(self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens))


def _no_terminal() -> bool:
    """Where progress bars would fill a log; the harness heeds no variable that switches them off."""
    return not sys.stderr.isatty()


def encode_answer(
    tokenizer: PreTrainedTokenizerBase, template: Template, turns: Sequence[Message], output: str
) -> tuple[list[int], list[int]]:
    """Tokenise a question and a possible answer as training tokenises a prompt and its answer.

    Args:
        tokenizer: the base's tokenizer.
        template: the template that the model was trained with.
        turns: the conversation up to the question.
        output: the answer's text.

    Returns:
        The prompt's ids, and the answer's without the tokens that end the turn.
    """
    turn = template.turns([*turns, Message("assistant", output)])[-1]
    answer = turn.answer.removesuffix(template.turn_end)
    prompt, whole = tokenize(tokenizer, [turn.prompt, turn.prompt + answer])
    if whole[: len(prompt)] != prompt:
        return prompt, tokenize_continuation(tokenizer, answer)
    return prompt, whole[len(prompt) :]
