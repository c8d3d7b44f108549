"""How a conversation becomes text and tokens: the tokenizer's own chat template, or one of two of ours.

All three kinds are Jinja chat templates, so that there is one way through the code, and the adapter
remembers the template as text whatever happens to the tokenizer later:

chat   the tokenizer's own;
plain  for bases without one, in plain words and the base's own end-of-text token::

           {system}

           ### Instruction:
           {question}

           ### Response:
           {answer}<eos>

none   the turns joined as they are, the end-of-text token after each answer.

A training example is a prompt, exactly as it is rendered for generation, and what the assistant
writes after it, up to and with the token that ends its turn.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pydantic import TypeAdapter, ValidationError
from transformers import PreTrainedTokenizerBase

from qaroma.data.bounded_jinja import render_bounded
from qaroma.data.forms import BadRow, Message
from qaroma.errors import QaromaError

KINDS = ("chat", "plain", "none")

PLAIN = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
    "{% else %}{{ '### Response:\n' + message['content'] + eos_token }}"
    "{% if not loop.last %}{{ '\n\n' }}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
NONE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)

# Templates write today's date into the system turn. A run must render the same tomorrow, when it is
# resumed, so the date is fixed: the one that Llama 3's template falls back to by itself.
FIXED_DATE = datetime.date(2024, 7, 26)

_STRFTIME = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
_SYSTEM, _QUESTION, _ANSWER = "qaromasystem", "qaromaquestion", "qaromaanswer"
_THOUGHT, _THOUGHT_END = "<think>", "</think>"
_CLOSED_THOUGHT = "\n</think>\n\n"


@dataclass(frozen=True)
class Turn:
    """One turn of the assistant: the text it answers to, and the text it is trained to write."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Template:
    """A chat template and what was found out about it; :meth:`choose` makes one.

    Attributes:
        kind: chat, plain or none.
        text: The Jinja text.
        special_tokens: Names the text may use, such as ``eos_token``, and their strings.
        turn_end: What ends the assistant's turn, up to and with a special token; it is trained.
        tail: All that the template writes after the last answer.
        prompt_suffix: What is added to every prompt: the assistant's header, where the template
            leaves it out of its generation prompt, or the empty thought of a reasoning model.
        fold_system: The template has no system turn; system text goes into the first user turn.
    """

    kind: str
    text: str
    special_tokens: dict[str, str] = field(default_factory=dict)
    turn_end: str = ""
    tail: str = ""
    prompt_suffix: str = ""
    fold_system: bool = False

    @classmethod
    def choose(cls, tokenizer: PreTrainedTokenizerBase, kind: str = "auto") -> Template:
        """The template to use with a tokenizer.

        Args:
            tokenizer: The base's tokenizer.
            kind: chat, plain, none, or ``auto``: chat where the tokenizer has a template, else plain.

        Returns:
            The template, probed with a short conversation.

        Raises:
            QaromaError: There is no chat template, it fails, or the tokenizer has no end-of-text token.
        """
        if kind not in ("auto", *KINDS):
            raise QaromaError(f"got the template '{kind}'; expected auto, {', '.join(KINDS)}.")
        own = tokenizer.get_chat_template() if tokenizer.chat_template else None
        if kind == "chat" and own is None:
            raise QaromaError("the tokenizer has no chat template; type --set data.template=plain to use qaroma's own.")
        if kind == "auto":
            kind = "plain" if own is None else "chat"
        if kind != "chat":
            _end_of_text(tokenizer)
        text = {"plain": PLAIN, "none": NONE}.get(kind) or _with_fixed_date(str(own))
        special = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
        return _probed(cls(kind, text, special), tokenizer)

    def to_json(self) -> dict[str, Any]:
        """Everything needed to render alike later, as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Template:
        """The template that :meth:`to_json` described.

        Raises:
            QaromaError: A key is missing or unknown.
        """
        try:
            return TypeAdapter(cls).validate_python(asdict(cls(**value)))  # of the right keys, and their kinds
        except (TypeError, ValidationError) as error:
            raise QaromaError(f"the saved template is not one that this version can read ({error}).") from error

    def fitted(self, conversations: Iterable[Sequence[Message]]) -> Template:
        """This template, or for a reasoning model whose data has thoughts in it, one that lets it think.

        Without thoughts in the data, prompts end with an empty thought, as the model's own template
        writes it when thinking is off; with thoughts, the model is trained to write them.
        """
        if _THOUGHT_END not in self.prompt_suffix:
            return self
        thinks = any(_THOUGHT_END in m.content for turns in conversations for m in turns if m.role == "assistant")
        return replace(self, prompt_suffix="") if thinks else self

    def render(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        """The text of a conversation, as the template writes it.

        Args:
            messages: The turns.
            prompt: End with the assistant's header, ready for it to answer.

        Raises:
            BadRow: The template refuses the conversation (roles that do not alternate, for instance).
        """
        if self.fold_system:
            messages = _folded(messages)
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            rendered = render_bounded(self.text, messages=turns, tools=None, documents=None,
                                      add_generation_prompt=prompt, **self.special_tokens)  # fmt: skip
        except Exception as error:  # templates are programs: they raise whatever Jinja or Python does
            raise BadRow(f"the chat template refuses the conversation: {error}") from error
        return rendered + (self.prompt_suffix if prompt else "")

    def render_prompt(self, messages: Sequence[Message]) -> str:
        """The text that the assistant is to answer. A last turn of the assistant's is left out."""
        return self.render(without_answer(messages), prompt=True)

    def turns(self, messages: Sequence[Message]) -> list[Turn]:
        """Each turn of the assistant with the prompt before it.

        The answer is what the template itself writes for the turn when it is the last one; where that
        does not continue the prompt (templates that open a thought for the model), it is the content
        followed by the end of the turn.

        Raises:
            BadRow: The template refuses the conversation.
        """
        found = []
        for index, message in enumerate(messages):
            if message.role == "assistant":
                prompt = self.render_prompt(messages[:index])
                whole = self.render(messages[: index + 1])
                if whole.startswith(prompt):
                    answer = self._ended(whole[len(prompt) :])
                else:
                    answer = _after_open_thought(prompt, message.content) + self.turn_end
                found.append(Turn(prompt, answer))
        return found

    def _ended(self, answer: str) -> str:
        """Cut an answer as rendered after the token that ends the turn."""
        if answer.endswith(self.tail):
            return answer[: len(answer) - len(self.tail)] + self.turn_end
        end = answer.rfind(self.turn_end)
        return answer[:end] + self.turn_end if end >= 0 else answer.rstrip() + self.turn_end

    def encode_prompt(self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
        """Token ids of a prompt, with exactly one BOS where the base expects one.

        Args:
            tokenizer: The base's tokenizer.
            messages: The turns; a last one of the assistant's is left out.

        Raises:
            QaromaError: The template refuses the conversation.
        """
        try:
            return tokenize(tokenizer, [self.render_prompt(messages)])[0]
        except BadRow as error:
            raise QaromaError(f"{error}.") from error

    def stop_token_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Ids of the tokens at which generation ends: the end of the turn, and the end of the text."""
        ids = {_ids(tokenizer, [self.turn_end])[0][-1]}
        if tokenizer.eos_token_id is not None:
            ids.add(int(tokenizer.eos_token_id))
        return sorted(ids)


def without_answer(messages: Sequence[Message]) -> Sequence[Message]:
    """The turns before a last one of the assistant's; all of them where there is none."""
    return messages[:-1] if messages and messages[-1].role == "assistant" else messages


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of rendered texts, with exactly one BOS where the base expects one.

    A BOS is expected where the text begins with it already or the tokenizer adds one by itself.
    That a tokenizer merely names one is no reason: ChatML's names ``<|im_start|>``. Special tokens
    spelt out in the data become special tokens, as in every other tool.

    Args:
        tokenizer: The base's tokenizer.
        texts: Whole texts, each from its beginning.

    Returns:
        One list of ids for each text, without padding or truncation.
    """
    bos = added_bos(tokenizer)
    ids = _ids(tokenizer, texts)
    return ids if bos is None else [row if row[:1] == [bos] else [bos, *row] for row in ids]


def tokenize_continuation(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that continues another one.

    Tokenised alone, a text may get a space before it (SentencePiece) that nobody wrote. So it is
    tokenised behind a short lead-in whose tokens are then taken off; of several lead-ins, the first
    whose tokens stay what they are alone.

    Args:
        tokenizer: The base's tokenizer.
        text: The continuation.

    Returns:
        The ids of the continuation alone.
    """
    for lead in ("\n", ":", ")", "x"):
        alone, together = _ids(tokenizer, [lead, lead + text])
        if together[: len(alone)] == alone:
            return together[len(alone) :]
    return _ids(tokenizer, [text])[0]


def added_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the BOS token if the tokenizer puts one before every text, else None."""
    if tokenizer.bos_token_id is None:
        return None
    bos = int(tokenizer.bos_token_id)
    adds = tokenizer("a").input_ids[:1] == [bos] and _ids(tokenizer, ["a"])[0][:1] != [bos]
    return bos if adds else None


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    # verbose=False: a text longer than the model's context is dealt with later, not warned of.
    batch = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )
    return [list(row) for row in batch["input_ids"]]


def _probed(template: Template, tokenizer: PreTrainedTokenizerBase) -> Template:
    """Find out how the template ends a turn, whether it has a system turn, and what its prompts lack."""
    dialogue = [Message("user", _QUESTION), Message("assistant", _ANSWER)]
    try:
        whole, prompt = template.render(dialogue), template.render(dialogue[:1], prompt=True)
    except BadRow as error:
        raise QaromaError(f"{error}. Type --set data.template=plain to use qaroma's own.") from error
    if _ANSWER not in whole or _QUESTION not in prompt:
        raise QaromaError(
            "the tokenizer's chat template leaves out plain text; type --set data.template=plain to use qaroma's own."
        )
    tail = whole[whole.rindex(_ANSWER) + len(_ANSWER) :]
    suffix = ""
    if whole.startswith(prompt):
        header = whole[len(prompt) : whole.rindex(_ANSWER)]
        suffix = header if header.strip() else ""
    elif prompt.rstrip().endswith(_THOUGHT):
        suffix = _CLOSED_THOUGHT
    try:
        fold = _SYSTEM not in template.render([Message("system", _SYSTEM), *dialogue])
    except BadRow:
        fold = True
    return replace(template, turn_end=_turn_end(tail, tokenizer), tail=tail, prompt_suffix=suffix, fold_system=fold)


def _turn_end(tail: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The tail up to and with its first special token, or the end-of-text token where it has none."""
    ends = [
        (tail.index(token), -len(token))
        for token in {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
        if token.strip() and token in tail
    ]
    if ends:
        start, length = min(ends)
        return tail[: start - length]
    return _end_of_text(tokenizer)


def _end_of_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """The end-of-text token, which must be read back as itself."""
    eos = tokenizer.eos_token
    if not eos or _ids(tokenizer, [eos])[0] != [tokenizer.eos_token_id]:
        raise QaromaError(
            "the tokenizer has no end-of-text token (eos_token), so that an answer could not be ended; "
            "set eos_token in its tokenizer_config.json."
        )
    return str(eos)


def _with_fixed_date(text: str) -> str:
    """The template with every ``strftime_now("...")`` replaced by the text of the fixed date."""
    return _STRFTIME.sub(lambda call: json.dumps(FIXED_DATE.strftime(call.group(2))), text)


def _folded(messages: Sequence[Message]) -> list[Message]:
    """Move system turns into the user turn they follow, or else the next one."""
    folded: list[Message] = []
    waiting = ""
    for message in messages:
        if message.role == "system" and folded and folded[-1].role == "user":
            folded[-1] = Message("user", f"{folded[-1].content}\n\n{message.content}")
        elif message.role == "system":
            waiting += message.content + "\n\n"
        elif message.role == "user":
            folded.append(Message("user", waiting + message.content))
            waiting = ""
        else:
            folded.append(message)
    return folded


def _after_open_thought(prompt: str, content: str) -> str:
    """An answer as it continues a prompt that ends inside an opened thought."""
    if not prompt.rstrip().endswith(_THOUGHT):
        return content
    opened = content.lstrip()
    if opened.startswith(_THOUGHT):
        return opened[len(_THOUGHT) :].lstrip("\n")
    return content if _THOUGHT_END in content else _CLOSED_THOUGHT + content
