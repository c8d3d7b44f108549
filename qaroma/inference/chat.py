"""A conversation with a tuned model: answers that appear as they are written, and the base beside them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

from qaroma.data.forms import Message
from qaroma.engine.placement import compute_device
from qaroma.errors import QaromaError
from qaroma.inference.generate import generation_settings
from qaroma.inference.open import TunedModel, open_base, open_run
from qaroma.method.adapter import AdaptedLinear
from qaroma.runs.stop import StopRequest
from qaroma.tasks.evaluation import evaluating

_INCOMPLETE = "\ufffd"  # how a tokenizer decodes the first bytes of a character of several
# Room that is kept for an answer when a conversation grows into the end of the context.
_RESERVED_SHARE = 4


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        max_new_tokens: longest answer.
        temperature: 0 is greedy: the same answer each time.
        top_p: only the likeliest tokens of this share are drawn from.
        seed: of the draws; None is another one each time.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(frozen=True)
class Reply:
    """One answer.

    Attributes:
        text: without special tokens.
        tokens: generated.
        stopped: the user cut it short.
        full: it ended because no more tokens were allowed.
        forgotten: turns dropped from the conversation's beginning, since it had outgrown the context.
    """

    text: str
    tokens: int
    stopped: bool
    full: bool
    forgotten: int


def open_chat(
    run: str | None, *, base: str | None = None, device: str = "auto", trust_remote_code: bool = False
) -> TunedModel:
    """The model to talk to.

    Args:
        run: run directory or adapter folder; None talks to ``base`` as it is.
        base: base model, where it is no longer found under the name that the run remembers.
        device: ``auto``, ``cuda`` or ``cpu``.
        trust_remote_code: run Python code that comes with the base.

    Raises:
        QaromaError: nothing to open, or a run that gives labels and writes no text.
    """
    if run is None:
        if base is None:
            raise QaromaError("got no run; expected qaroma chat RUN, or qaroma chat --base MODEL to talk to a base")
        return open_base(base, device=device, trust_remote_code=trust_remote_code)
    return open_run(run, base=base, device=device, trust_remote_code=trust_remote_code)


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """The base alone, in place: every adapted layer leaves its low-rank term out while this is entered.

    Afterwards, and when the block raises, the layers are as they were; nothing is loaded or copied.

    Args:
        model: a model with :class:`~qaroma.method.adapter.AdaptedLinear` layers, none of which trains.
    """
    layers = [module for module in model.modules() if isinstance(module, AdaptedLinear)]
    factors = [(layer.A, layer.B) for layer in layers]
    try:
        for layer in layers:
            layer.A, layer.B = layer.A[:0], layer.B[:0]
        yield
    finally:
        for layer, (A_RN, B_RM) in zip(layers, factors, strict=True):
            layer.A, layer.B = A_RN, B_RM


class AnswerStream(BaseStreamer):  # type: ignore[misc]
    """Writes an answer while it is generated: whole characters only, and nothing from the stop token on.

    Args:
        tokenizer: decodes all tokens so far again for each new one, since a token's text depends on
            those before it.
        stops: ids at which the answer ends.
        write: takes the next piece of text.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[int], write: Callable[[str], None]) -> None:
        self.tokenizer, self.stops, self.write = tokenizer, frozenset(stops), write
        self.ids: list[int] = []
        self.ended = False
        self._prompt_to_come = True
        self._written = 0

    def put(self, value: Tensor) -> None:
        """Take the prompt, then token by token what is generated."""
        if self._prompt_to_come:
            self._prompt_to_come = False
            return
        for token in value.reshape(-1).tolist():
            self.ended = self.ended or token in self.stops
            if not self.ended:
                self.ids.append(token)
        text = self.text()
        if not text.endswith(_INCOMPLETE):
            self._write(text)

    def end(self) -> None:
        """Write what was held back."""
        self._write(self.text())

    def text(self) -> str:
        """The answer so far."""
        return str(self.tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _write(self, text: str) -> None:
        if len(text) > self._written:
            self.write(text[self._written :])
            self._written = len(text)


@dataclass
class Chat:
    """A conversation and the model that answers in it.

    Attributes:
        tuned: model, tokenizer and chat template.
        sampling: how answers are drawn.
        system: what stands before the conversation, or None.
        turns: of the user and the assistant, without the system's.
    """

    tuned: TunedModel
    sampling: Sampling = field(default_factory=Sampling)
    system: str | None = None
    turns: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.sampling.seed is not None:
            torch.manual_seed(self.sampling.seed)

    @property
    def context(self) -> int:
        """Tokens that the model can see at once."""
        config: Any = self.tuned.model.config
        limit = getattr(config.get_text_config(), "max_position_embeddings", None)
        return int(min(limit or self.tuned.tokenizer.model_max_length, self.tuned.tokenizer.model_max_length))

    def ask(self, text: str, write: Callable[[str], None]) -> Reply:
        """Answer a message; both become part of the conversation.

        Args:
            text: the user's message.
            write: takes the answer piece by piece, as it comes.

        Returns:
            The whole answer. One that was stopped before its first token leaves the conversation as it was.

        Raises:
            QaromaError: the message alone does not fit the context, or the template refuses it; the
                conversation is as it was.
        """
        before = list(self.turns)
        self.turns.append(Message("user", text))
        try:
            reply = self._reply(write)
        except torch.OutOfMemoryError as error:
            self.turns = before
            raise QaromaError(
                "the device's memory is full; the conversation is as it was. Type /reset to begin a shorter one"
            ) from error
        except BaseException:
            self.turns = before
            raise
        if reply.tokens == 0 and reply.stopped:
            self.turns = before
        else:
            self.turns.append(Message("assistant", reply.text))
        return reply

    def ask_base(self, write: Callable[[str], None]) -> Reply | None:
        """The base's answer to the last message, beside that of the conversation, which stays as it is.

        Returns:
            The answer, or None where nothing has been asked yet.

        Raises:
            QaromaError: as :meth:`ask`.
        """
        if not self.turns:
            return None
        before = list(self.turns)
        question = self.turns[-2].content
        del self.turns[-2:]
        try:
            with adapter_off(self.tuned.model):
                return self.ask(question, write)
        finally:
            self.turns = before

    def reset(self) -> None:
        """Forget the conversation; the system text stays."""
        self.turns.clear()

    def _reply(self, write: Callable[[str], None]) -> Reply:
        prompt, forgotten = self._fitted_prompt()
        tuned = self.tuned
        stops = tuned.template.stop_token_ids(tuned.tokenizer)
        room = min(self.sampling.max_new_tokens, self.context - len(prompt))
        stream = AnswerStream(tuned.tokenizer, stops, write)
        input_ids = torch.tensor([prompt], device=compute_device(tuned.model))
        settings = generation_settings(
            tuned.tokenizer,
            stops,
            max_new_tokens=room,
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
        )
        # Ctrl-C ends the answer after the next token; SIGTERM still ends the program.
        with StopRequest([signal.SIGINT]) as stop, evaluating(tuned.model):

            def stopping(ids: Tensor, scores: Any, **_: Any) -> Tensor:
                return torch.full((ids.shape[0],), stop.requested, dtype=torch.bool, device=ids.device)

            generate: Any = tuned.model.generate
            generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                generation_config=settings,
                stopping_criteria=[stopping],
                streamer=stream,
            )
        full = not stream.ended and not stop.requested
        return Reply(stream.text(), len(stream.ids), stop.requested and not stream.ended, full, forgotten)

    def _fitted_prompt(self) -> tuple[list[int], int]:
        """Token ids of the conversation, its oldest turns dropped until an answer has room; how many were."""
        reserved = min(self.sampling.max_new_tokens, self.context // _RESERVED_SHARE)
        system = [Message("system", self.system)] if self.system else []
        forgotten = 0
        while True:
            ids = self.tuned.template.encode_prompt(self.tuned.tokenizer, [*system, *self.turns])
            if len(ids) + reserved <= self.context:
                return ids, forgotten
            if len(self.turns) == 1:
                if len(ids) < self.context:
                    return ids, forgotten
                raise QaromaError(
                    f"the message takes {len(ids)} tokens with all that goes before it; the model sees "
                    f"{self.context} at once. Make it shorter, or cut it in pieces"
                )
            del self.turns[:2]
            forgotten += 2
