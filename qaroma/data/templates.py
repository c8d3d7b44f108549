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

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from pydantic import TypeAdapter, ValidationError
from transformers import PreTrainedTokenizerBase

from qaroma.data.bounded_jinja import render_bounded
from qaroma.data.calls import Tool
from qaroma.data.fields import BadRow
from qaroma.data.template_texts import NONE, PLAIN, with_fixed_date
from qaroma.data.thoughts import (
    CLOSED_THOUGHT,
    THOUGHT,
    THOUGHT_END,
    after_empty_thought,
    after_open_thought,
    ends_with_empty_thought,
    has_thought,
    with_thought,
    without_empty_thought,
)
from qaroma.data.tokens import token_ids, tokenize
from qaroma.data.tool_support import ToolSupport, as_text, call_fields, find_tool_support
from qaroma.data.turns import Message, folded
from qaroma.errors import QaromaError

KINDS = ("chat", "plain", "none")

_SYSTEM, _QUESTION, _ANSWER = "qaromasystem", "qaromaquestion", "qaromaanswer"
TOOLS = ("template", "text")


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
        tools: template: it renders functions, calls and results itself; text: they are written as JSON.
    """

    kind: str
    text: str
    special_tokens: dict[str, str] = field(default_factory=dict)
    turn_end: str = ""
    tail: str = ""
    prompt_suffix: str = ""
    fold_system: bool = False
    tools: str = "template"

    @classmethod
    def choose(cls, tokenizer: PreTrainedTokenizerBase, kind: str = "auto", tools: str = "template") -> Template:
        """The template to use with a tokenizer.

        Args:
            tokenizer: The base's tokenizer.
            kind: chat, plain, none, or ``auto``: chat where the tokenizer has a template, else plain.
            tools: how functions, calls and results are rendered: by the ``template``, or as ``text``.

        Returns:
            The template, probed with a short conversation.

        Raises:
            QaromaError: There is no chat template, it fails, or the tokenizer has no end-of-text token.
        """
        if kind not in ("auto", *KINDS):
            raise QaromaError(f"got the template '{kind}'; expected auto, {', '.join(KINDS)}.")
        if tools not in TOOLS:
            raise QaromaError(f"got tools '{tools}'; expected {' or '.join(TOOLS)}.")
        own = tokenizer.get_chat_template() if tokenizer.chat_template else None
        if kind == "chat" and own is None:
            raise QaromaError("the tokenizer has no chat template; type --set data.template=plain to use qaroma's own.")
        if kind == "auto":
            kind = "plain" if own is None else "chat"
        if kind != "chat":
            _end_of_text(tokenizer)
        text = {"plain": PLAIN, "none": NONE}.get(kind) or with_fixed_date(str(own))
        special = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
        return _probed(cls(kind, text, special, tools=tools), tokenizer)

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
        writes it when thinking is off; with thoughts, the model is trained to write them. Where thoughts or
        calls begin otherwise than answers (gpt-oss has a channel for each), prompts end before that.
        """
        if not self.prompt_suffix:
            return self
        bare = replace(self, prompt_suffix="")
        for turns in conversations:
            for index, message in enumerate(turns):
                if message.role == "assistant" and self._begins_otherwise(turns[:index], message):
                    return bare
        return self

    def _begins_otherwise(self, before: Sequence[Message], message: Message) -> bool:
        """Whether a turn is not what prompts with the suffix ask for."""
        if THOUGHT_END in self.prompt_suffix:
            return bool(message.thought) or has_thought(message.content)
        if not (message.thought or message.calls):
            return False
        try:
            return not self.render([*before, message]).startswith(self.render(before, prompt=True))
        except BadRow:
            return False

    def render(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        """The text of a conversation, as the template writes it.

        Args:
            messages: The turns.
            prompt: End with the assistant's header, ready for it to answer.

        Raises:
            BadRow: The template refuses the conversation (roles that do not alternate, for instance).
        """
        if self.tools == "text":
            messages = as_text(messages)
        tools = [tool for message in messages for tool in message.tools]
        if self.fold_system:
            messages = folded(messages)
        turns = [self._fields(message) for message in messages if message.content or message.role != "system"]
        return self._rendered(turns, tools or None, prompt) + (self.prompt_suffix if prompt else "")

    def _rendered(self, turns: list[dict[str, Any]], tools: list[Tool] | None = None, prompt: bool = False) -> str:
        options: dict[str, Any] = {"messages": turns, "tools": tools, "documents": None}
        try:
            return render_bounded(self.text, add_generation_prompt=prompt, **options, **self.special_tokens)
        except Exception as error:  # templates are programs: they raise whatever Jinja or Python does
            raise BadRow(f"the chat template refuses the conversation: {error}") from error

    def _fields(self, message: Message) -> dict[str, Any]:
        """A turn as the template sees it."""
        fields: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.thought and self._renders_thoughts:
            fields["reasoning_content"] = message.thought
        elif message.thought:
            fields["content"] = with_thought(message)
        if message.calls:
            fields["tool_calls"] = call_fields(message.calls, self._tool_support.text_arguments)
        if message.role == "tool":
            fields |= {"name": message.name, "tool_call_id": message.call_id}
        return fields

    @cached_property
    def _renders_thoughts(self) -> bool:
        """Whether the template writes what a turn has as ``reasoning_content``."""
        turn = {"role": "assistant", "content": _ANSWER, "reasoning_content": _SYSTEM}
        try:
            return _SYSTEM in self._rendered([{"role": "user", "content": _QUESTION}, turn])
        except BadRow:
            return False

    @cached_property
    def _tool_support(self) -> ToolSupport:
        return find_tool_support(self._rendered) if self.kind == "chat" else ToolSupport()

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
        if self.tools == "template":
            self._tool_support.require(messages)
        self._require_late_systems(messages)
        said = [index for index, message in enumerate(messages) if message.role == "assistant"]
        return [self._turn(messages[:index], messages[index]) for index in said]

    def _require_late_systems(self, messages: Sequence[Message]) -> None:
        """Refuse a conversation with a system turn in its midst that the template leaves out."""
        late = [m.content.strip() for m in messages[1:] if m.role == "system"]
        whole = self.render(messages) if late else ""
        for content in late:
            if content not in whole:
                raise BadRow(f"the chat template leaves out a later system turn ({content[:40]!r})")

    def _turn(self, before: Sequence[Message], message: Message) -> Turn:
        """One turn of the assistant's after those before it."""
        (message,) = as_text([message]) if self.tools == "text" else (message,)
        if not any(m.role == "user" for m in before):
            return self._opening_turn(self.render([*before, message]), message)
        prompt = self.render(before, prompt=True)
        if message.thought and ends_with_empty_thought(prompt):
            raise BadRow("the chat template asks for an answer without a thought, and this one has one")
        answer = self._answer(before, message, prompt)
        if message.calls:
            self._require_calls(answer, message)
        elif not answer or message.thought.strip() not in answer:
            answer = after_open_thought(prompt, with_thought(message)) + self.turn_end
        return Turn(*without_empty_thought(prompt, answer))

    def _opening_turn(self, whole: str, message: Message) -> Turn:
        """A turn that no request comes before: its prompt is what the template writes before its words."""
        start = whole.rfind(message.content.strip())
        if start < 0 or message.thought or message.calls:
            raise BadRow("the assistant begins with something else than plain words; expected the user's turn first")
        return Turn(whole[:start], self._ended(whole[start:], message))

    def _answer(self, before: Sequence[Message], message: Message, prompt: str) -> str:
        """What the template writes for a turn behind its prompt; empty where that does not continue the prompt."""
        whole = self.render([*before, message])
        if whole.startswith(prompt):
            return self._ended(whole[len(prompt) :], message)
        if any(m.thought for m in before):
            # Thoughts of earlier turns may be gone from the whole (gpt-oss); what is written is the same.
            before = [replace(m, thought="") for m in before]
            return self._answer(before, message, self.render(before, prompt=True))
        return self._ended(after_empty_thought(whole, self.render(before)), message) if message.calls else ""

    def _ended(self, answer: str, message: Message) -> str:
        """Cut an answer as rendered after the token that ends the turn."""
        if answer.endswith(self.tail):
            return answer[: len(answer) - len(self.tail)] + self.turn_end
        if message.calls:
            return answer.rstrip()  # calls may end with a token of their own
        end = answer.rfind(self.turn_end)
        return answer[:end] + self.turn_end if end >= 0 else answer.rstrip() + self.turn_end

    def _require_calls(self, answer: str, message: Message) -> None:
        """Refuse a turn whose calls, or the words beside them, the template leaves out."""
        names = [call["function"]["name"] for call in message.calls]
        lost = [text for text in (*names, message.content.strip(), message.thought.strip()) if text not in answer]
        if lost:
            raise BadRow(
                f"the chat template leaves out {lost[0][:40]!r} of a turn with calls; type --tools text to write calls "
                "as JSON text"
            )

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
        """Ids of the tokens at which generation ends: the end of the turn, of a call, and of the text."""
        ids = {token_ids(tokenizer, [self.turn_end])[0][-1]}
        call = self._tool_support.call.rstrip() if self.tools == "template" else ""
        ids.update(last for row in token_ids(tokenizer, [call]) for last in row[-1:] if last in _added(tokenizer))
        if tokenizer.eos_token_id is not None:
            ids.add(int(tokenizer.eos_token_id))
        return sorted(ids)


def without_answer(messages: Sequence[Message]) -> Sequence[Message]:
    """The turns before a last one of the assistant's; all of them where there is none."""
    return messages[:-1] if messages and messages[-1].role == "assistant" else messages


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
    elif prompt.rstrip().endswith(THOUGHT):
        suffix = CLOSED_THOUGHT
    try:
        fold = _SYSTEM not in template.render([Message("system", _SYSTEM), *dialogue])
    except BadRow:
        fold = True
    return replace(template, turn_end=_turn_end(tail, tokenizer), tail=tail, prompt_suffix=suffix, fold_system=fold)


def _added(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    return set(tokenizer.get_added_vocab().values())


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
    if not eos or token_ids(tokenizer, [eos])[0] != [tokenizer.eos_token_id]:
        raise QaromaError(
            "the tokenizer has no end-of-text token (eos_token), so that an answer could not be ended; "
            "set eos_token in its tokenizer_config.json."
        )
    return str(eos)
