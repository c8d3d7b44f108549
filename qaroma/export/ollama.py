"""An Ollama Modelfile for the exported GGUF: the chat template in Go's language, stop tokens, parameters.

Ollama does not read Jinja. What a chat template writes around each role's text is found by rendering
it, put together again in Go's template language, and compared with the original on several
conversations; a template that does more than that is not translated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qaroma.data.forms import BadRow, Message
from qaroma.data.templates import Template
from qaroma.data.tokens import added_bos
from qaroma.export.gguf_model import context_length

_SYSTEM, _QUESTION, _ANSWER, _SECOND = "qaromasystem", "qaromaquestion", "qaromaanswer", "qaromasecond"
_MOST_CONTEXT = 8192


@dataclass(frozen=True)
class Pieces:
    """What a chat template writes around the texts of a conversation.

    Attributes:
        without_system: before the first turn where there is no system text.
        system: before and after system text; None where the template has no system turn.
        user: before and after a user's text.
        assistant: before and after an answer.
        prompt: after the last turn, for the assistant to go on.
    """

    without_system: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    prompt: str

    def render(self, messages: Sequence[Message]) -> str:
        """A prompt as the Go template writes it."""
        system = [message.content for message in messages if message.role == "system"]
        text = self.without_system
        if system and self.system:
            text = self.system[0] + "\n\n".join(system) + self.system[1]
        for message in messages:
            if message.role != "system":
                before, after = self.user if message.role == "user" else self.assistant
                text += before + message.content + after
        return text + self.prompt

    def go_template(self) -> str:
        """The same in Go's template language, with Ollama's variables."""
        head = self.without_system
        if self.system:
            said = f"{self.system[0]}{{{{ .System }}}}{self.system[1]}"
            head = f"{{{{ if .System }}}}{said}{{{{ else }}}}{self.without_system}{{{{ end }}}}"
        user, answer = ("{{ .Content }}".join(pair) for pair in (self.user, self.assistant))
        turns = (
            '{{ range .Messages }}{{ if eq .Role "user" }}' + user
            + '{{ else if eq .Role "assistant" }}' + answer + "{{ end }}{{ end }}"
        )  # fmt: skip
        return head + turns + self.prompt + "{{ .Response }}"


def template_pieces(template: Template, tokenizer: Any) -> Pieces | None:
    """Take a chat template apart.

    Args:
        template: of the run.
        tokenizer: the base's; a BOS that it or llama.cpp adds by itself is taken off the front.

    Returns:
        The pieces; None where they do not give the template's own text back.
    """
    try:
        pieces = _taken_apart(template)
    except (BadRow, ValueError):
        return None
    user, answer, second = Message("user", _QUESTION), Message("assistant", _ANSWER), Message("user", _SECOND)
    system = Message("system", _SYSTEM)
    talks = [[user], [user, answer, second], [user, answer, second, answer, user]]
    if pieces.system:
        talks += [[system, *talk] for talk in talks]
    if any(pieces.render(talk) != template.render_prompt(talk) for talk in talks):
        return None
    bos = tokenizer.bos_token if added_bos(tokenizer) is not None else None
    if bos:
        pieces = Pieces(
            pieces.without_system.removeprefix(bos),
            pieces.system and (pieces.system[0].removeprefix(bos), pieces.system[1]),
            pieces.user,
            pieces.assistant,
            pieces.prompt,
        )
    texts = [pieces.without_system, *(pieces.system or ()), *pieces.user, *pieces.assistant, pieces.prompt]
    return None if any("{{" in text or '"""' in text for text in texts) else pieces


def _taken_apart(template: Template) -> Pieces:
    """The pieces, from the places of known texts in rendered conversations."""
    user, answer, second = Message("user", _QUESTION), Message("assistant", _ANSWER), Message("user", _SECOND)
    single = template.render_prompt([user])
    long = template.render_prompt([user, answer, second])
    start, tail = single.split(_QUESTION)
    between, rest = long.partition(_QUESTION)[2].split(_ANSWER)
    middle, _ = rest.split(_SECOND)
    # "between" closes the user's turn and opens the answer's; "middle" closes that and opens the next user's.
    closing = _with_white_space(middle, middle.find(template.turn_end) + len(template.turn_end))
    if not start.endswith(middle.removeprefix(closing)):
        closing = middle.removesuffix(_common_end(start, middle))
    before_user, after_answer = middle.removeprefix(closing), closing
    after_user = closing if between.startswith(closing) and tail.startswith(closing) else _with_white_space(between, 0)
    pieces = Pieces(
        without_system=start.removesuffix(before_user),
        system=None,
        user=(before_user, after_user),
        assistant=(between.removeprefix(after_user), after_answer),
        prompt=tail.removeprefix(after_user),
    )
    if template.fold_system:
        return pieces
    with_system = template.render_prompt([Message("system", _SYSTEM), user])
    head, _, rest = with_system.partition(_SYSTEM)
    after_system = rest.partition(_QUESTION)[0].removesuffix(before_user)
    return Pieces(pieces.without_system, (head, after_system), pieces.user, pieces.assistant, pieces.prompt)


def _with_white_space(text: str, length: int) -> str:
    """The first ``length`` characters and the white space after them."""
    rest = text[length:]
    return text[:length] + rest[: len(rest) - len(rest.lstrip())]


def _common_end(first: str, second: str) -> str:
    length = 0
    while length < min(len(first), len(second)) and first[-1 - length] == second[-1 - length]:
        length += 1
    return first[len(first) - length :]


def modelfile(template: Template, tokenizer: Any, config: Any, *, model: str) -> str:
    """The Modelfile's text.

    Args:
        template: of the run.
        tokenizer, config: the base's, from transformers.
        model: the GGUF file's name, beside the Modelfile.
    """
    lines = [f"FROM ./{model}", ""]
    pieces = template_pieces(template, tokenizer)
    if pieces is None:
        lines += ["# The chat template has rules that Ollama's language has no words for: give prompts as rendered."]
        lines += ['TEMPLATE """{{ .Prompt }}"""']
    else:
        lines += [f'TEMPLATE """{pieces.go_template()}"""']
    stops = tokenizer.convert_ids_to_tokens(template.stop_token_ids(tokenizer))
    context = min(context_length(config), _MOST_CONTEXT)
    lines += ["", *(f'PARAMETER stop "{stop}"' for stop in stops), f"PARAMETER num_ctx {context}"]
    lines += ["# Greedy, as the run was tested; Ollama's own defaults would change the answers."]
    lines += ["PARAMETER temperature 0", "PARAMETER repeat_penalty 1", ""]
    return "\n".join(lines)
