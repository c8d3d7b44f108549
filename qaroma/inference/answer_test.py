"""The generation test of a run: the same held-out requests, answered before and after training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from qaroma.data.forms import BadRow, Message, parse_rows, report_bad_rows
from qaroma.data.sources import read_rows
from qaroma.data.templates import Template
from qaroma.data.tokens import encode
from qaroma.errors import QaromaError
from qaroma.inference.generate import exact_match, expected_answer, generate
from qaroma.runs.log import MetricsLog

SPARE_TOKENS = 8  # an answer may be so much longer than the longest expected one
BATCH_TOKENS = 12_288  # of prompts and answers together: bounds the cache of keys and values


@dataclass(frozen=True)
class Answers:
    """Greedy answers to one set of prompts."""

    prompts: list[str]
    expected: list[str]
    answers: list[str]
    exact_match: float


def read_conversations(
    sources: Sequence[tuple[str, float]],
    *,
    form: str = "auto",
    columns: Mapping[str, str] | None = None,
    feedback: str = "refuse",
    rows: int | None = None,
    skip_bad: bool = False,
) -> list[list[Message]]:
    """Rows whose answers are known, as conversations.

    Raises:
        QaromaError: bad rows, or rows of plain text, which hold no question.
    """
    found = read_rows(sources)
    looked_at = found.rows if rows is None else found.head(rows).rows
    parsed = parse_rows(looked_at, form, columns=columns, feedback=feedback)
    bad = [*found.bad, *parsed.bad]
    if bad and not skip_bad:
        raise report_bad_rows(bad, len(found.rows) + len(found.bad))
    if not parsed.conversations:
        raise QaromaError(
            f"{sources[0][0]} holds no questions with answers, so nothing can be compared; give another file"
        )
    return [messages for _, messages in parsed.conversations]


class AnswerTest:
    """Held-out conversations whose last turn the model is to say by itself.

    Args:
        conversations: the last turn is the expected answer.
        tokenizer, template: of the run.
        max_new_tokens: longest answer; None is the longest expected one and a little more.
    """

    def __init__(
        self,
        conversations: list[list[Message]],
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        max_new_tokens: int | None = None,
    ) -> None:
        self.conversations = [_with_whole_answer(c, template) for c in conversations]
        conversations, self.tokenizer, self.template = self.conversations, tokenizer, template
        longest = max(map(len, encode(tokenizer, [expected_answer(c) for c in conversations]).input_ids))
        self.max_new_tokens = max_new_tokens or longest + SPARE_TOKENS
        prompts = [len(template.encode_prompt(tokenizer, c)) for c in conversations]
        self.batch_size = max(1, BATCH_TOKENS // (max(prompts) + self.max_new_tokens))

    def run(self, model: Any) -> Answers:
        """Answer every conversation greedily."""
        answers = generate(
            model,
            self.tokenizer,
            self.template,
            self.conversations,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
        )
        return Answers(
            prompts=[c[-2].content for c in self.conversations],
            expected=[expected_answer(c) for c in self.conversations],
            answers=answers,
            exact_match=exact_match(answers, self.conversations).share,
        )

    def run_once(self, model: Any, log: MetricsLog, when: str, step: int) -> Answers:
        """As :meth:`run`, kept in the run's metrics; a resumed run takes what is there."""
        for record in log.records():
            if record.get("event") == "answers" and (record["when"], record["step"]) == (when, step):
                return Answers(record["prompts"], record["expected"], record["answers"], record["exact_match"])
        answers = self.run(model)
        log.write({"event": "answers", "when": when, "step": step, **asdict(answers)})
        return answers


def _with_whole_answer(conversation: list[Message], template: Template) -> list[Message]:
    """The conversation with all that the assistant is to write as its last turn's text: thought and calls too."""
    last = conversation[-1]
    if not (last.thought or last.calls):
        return conversation
    try:
        answer = template.turns(conversation)[-1].answer.removesuffix(template.turn_end)
    except BadRow as error:
        raise QaromaError(f"{error}.") from error
    return [*conversation[:-1], Message("assistant", answer)]
