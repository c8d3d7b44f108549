"""From rows to examples: token ids, and for each token whether the loss counts it.

Which tokens are trained is found by spans, never by token id: of every answer, the tokens from the
end of its prompt to the end of its turn. The end-of-turn token is among them even where it is also
the padding token.

The tokens of a prompt as generation sees them are a prefix of the example, by construction: where the
text, tokenised whole, would join the prompt's last characters with the answer's first ones into one
token, the answer is tokenised as a continuation instead. An earlier turn of a conversation is trained
inside the example of a later turn where that example begins with its very tokens; where it does not
(Qwen3's template takes the thoughts out of earlier turns), the turn becomes an example of its own.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Generic, TypeVar

from transformers import PreTrainedTokenizerBase

from qaroma.data.example import IGNORED as IGNORED
from qaroma.data.example import Example as Example
from qaroma.data.example import Pair
from qaroma.data.fields import BadRow
from qaroma.data.forms import Parsed, parse_pairs, parse_rows, report_bad_rows
from qaroma.data.sources import Row, RowSet
from qaroma.data.templates import Template, Turn
from qaroma.data.tokens import added_bos, tokenize, tokenize_continuation
from qaroma.data.turns import Message
from qaroma.errors import QaromaError

TEXT_CHUNK = 1024

_ROWS_AT_ONCE = 512
_SHOWN_TOO_LONG = 5

_E = TypeVar("_E", Example, Pair)


@dataclass(frozen=True)
class _Span:
    """Consecutive tokens that are trained with one weight, or with weight 0 not trained."""

    start: int
    end: int
    weight: float = 1.0


@dataclass(frozen=True)
class Encoded(Generic[_E]):
    """Examples, and what became of the rows they were made of.

    Attributes:
        examples: In the order of the rows; or pairs of examples.
        template: The template they were rendered with; the one the adapter must remember.
        forms: The form of each file.
        dropped_too_long: Examples left out because of their length.
        truncated: Examples cut at the greatest length.
        bad: ``file:line: what is wrong`` of the rows left out.
        notes: Sentences to print.
    """

    examples: list[_E]
    template: Template
    forms: dict[str, str] = field(default_factory=dict)
    dropped_too_long: int = 0
    truncated: int = 0
    bad: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def form(self) -> str:
        """The form of the rows, or the forms joined by ``+``."""
        return " + ".join(sorted(set(self.forms.values())))

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each sequence: a pair has two."""
        return [sequence.tokens for example in self.examples for sequence in example.sequences.values()]

    @property
    def trained_tokens(self) -> int:
        """The number of tokens that the loss counts, in all examples."""
        return sum(example.trained for example in self.examples)

    @property
    def distinct(self) -> list[_E]:
        """The examples, copies of a row counted once."""
        once: dict[Hashable, _E] = {}
        for example in self.examples:
            once[example.origin, tuple(tuple(s.input_ids) for s in example.sequences.values())] = example
        return list(once.values())

    @property
    def conversations(self) -> list[tuple[Message, ...]]:
        """The conversation of each example (empty for plain text)."""
        return [example.conversation for example in self.examples]


def encode_rows(
    rows: RowSet | Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    *,
    form: str = "auto",
    columns: Mapping[str, str] | None = None,
    feedback: str = "refuse",
    pairs: bool = False,
    train_on: str = "answer",
    max_length: int | None = None,
    on_too_long: str = "drop",
    skip_bad: bool = False,
    vocabulary: int | None = None,
) -> Encoded[Any]:
    """Recognise, render and tokenise rows.

    Args:
        rows: What :func:`qaroma.data.sources.read_rows` returned, or rows.
        tokenizer: The base's tokenizer.
        template: From :meth:`Template.choose`, or the one an adapter remembers.
        form: A form to force, or ``auto``: each file by its keys.
        columns, feedback: See :func:`qaroma.data.forms.parse_rows`.
        pairs: Rows have a better and a worse answer, and become pairs of examples.
        train_on: ``answer``: the loss counts the assistant's turns; ``all``: every token.
        max_length: Greatest length in tokens, see :func:`limit_length`; None is no limit, and chunks of
            1024 for plain text.
        on_too_long: See :func:`limit_length`.
        skip_bad: Leave bad rows out instead of raising.
        vocabulary: Rows of the base's embedding; None asks nothing of the ids.

    Returns:
        The examples; ``template`` of the result is the one to remember.

    Raises:
        QaromaError: Bad rows (all of them reported together), mixed forms, tokens that the base does not have,
            or nothing left to train on.
    """
    if train_on not in ("answer", "all"):
        raise QaromaError(f"got train_on '{train_on}'; expected answer or all.")
    given = rows if isinstance(rows, RowSet) else RowSet(list(rows))
    if pairs:
        _require_usual(form=(form, "auto"), feedback=(feedback, "refuse"), train_on=(train_on, "answer"))
        parsed = parse_pairs(given.rows, columns=columns)
    else:
        parsed = parse_rows(given.rows, form, columns=columns, feedback=feedback)
    template = template.fitted(messages for _, messages in parsed.conversations)
    encoded_talks = list(_conversation_examples(parsed, tokenizer, template, train_on))
    examples: list[Any] = _paired(parsed, encoded_talks) if pairs else [e for talk in encoded_talks for e in talk]
    bad = [*given.bad, *dict.fromkeys(parsed.bad)]
    if bad and not skip_bad:
        raise report_bad_rows(bad, len(given.rows) + len(given.bad))
    examples += _text_examples(parsed.documents, tokenizer, max_length or TEXT_CHUNK)
    notes = [*given.notes, *parsed.notes, *_about_weights(parsed)]
    if not examples:
        raise report_bad_rows(bad, len(bad)) if bad else _nothing_left(notes)
    encoded: Encoded[Any] = Encoded(examples, template, parsed.forms, bad=bad, notes=notes)
    if vocabulary is not None:
        _require_known(encoded, tokenizer, vocabulary)
    _require_trained(encoded, "a row needs an answer (or plain text) of at least two tokens")
    return limit_length(encoded, max_length, on_too_long)


def _require_usual(**settings: tuple[str, str]) -> None:
    """Refuse settings of plain training where pairs are trained.

    Args:
        settings: by the name in the section ``data``, the value given and the one expected.
    """
    for name, (given, usual) in settings.items():
        if given != usual:
            raise QaromaError(f"got data.{'format' if name == 'form' else name} {given} with --task preference, which "
                              f"trains on both answers of each row; leave it out ({usual})")  # fmt: skip


def _paired(parsed: Parsed, talks: Sequence[list[Example]]) -> list[Pair]:
    """Pairs of the examples of either answer; rows that make no pair join the bad rows.

    Args:
        parsed: of :func:`qaroma.data.forms.parse_pairs`.
        talks: the examples of each of its conversations; none where the template refused it.
    """
    pairs = []
    for (row, _), chosen, rejected in zip(parsed.conversations[::2], talks[::2], talks[1::2], strict=True):
        if len(chosen) > 1 or len(rejected) > 1:
            parsed.bad.append(
                f"{row.place}: an answer has several turns, of which the chat template shows the earlier ones in "
                "another way later; expected answers of one turn"
            )
        elif chosen and rejected and chosen[0].input_ids == rejected[0].input_ids:
            parsed.bad.append(f"{row.place}: the chat template makes the same text of chosen and rejected")
        elif chosen and rejected:
            pairs.append(Pair(chosen[0], rejected[0], row.weight))
    return pairs


def limit_length(encoded: Encoded[_E], max_length: int | None, on_too_long: str = "drop") -> Encoded[_E]:
    """Deal with the examples longer than a limit.

    Plain text is never dropped: its chunks are cut again.

    Args:
        encoded: The examples.
        max_length: Greatest length in tokens, or None for no limit.
        on_too_long: ``drop`` them, ``truncate`` them at the right (those left with no trained token are
            dropped), or raise an ``error``.

    Returns:
        The examples within the limit, with the counts of those dropped and truncated added.

    Raises:
        QaromaError: An example is too long and ``on_too_long`` is error, or no trained token is left.
    """
    if on_too_long not in ("drop", "truncate", "error"):
        raise QaromaError(f"got on_too_long '{on_too_long}'; expected drop, truncate or error.")
    if max_length is None:
        return encoded
    too_long = [e for e in encoded.examples if _longest(e) > max_length and e.conversation]
    if too_long and on_too_long == "error":
        places = ", ".join(f"{e.origin} ({_longest(e)})" for e in too_long[:_SHOWN_TOO_LONG])
        raise QaromaError(
            f"{len(too_long)} examples are longer than {max_length} tokens: {places}"
            f"{', ...' if len(too_long) > _SHOWN_TOO_LONG else ''}. Type a greater --max-length, "
            "or --on-too-long truncate or drop."
        )
    kept: list[Any] = []
    truncated = dropped = 0
    for example in encoded.examples:
        if _longest(example) <= max_length:
            kept.append(example)
        elif isinstance(example, Example) and not example.conversation:
            kept += [
                _example(piece, [_Span(0, len(piece))], example) for piece in _pieces(example.input_ids, max_length)
            ]
        elif on_too_long == "truncate" and (cut := example.cut(max_length)) is not None:
            kept.append(cut)
            truncated += 1
        else:
            dropped += 1
    limited = replace(
        encoded,
        examples=kept,
        truncated=encoded.truncated + truncated,
        dropped_too_long=encoded.dropped_too_long + dropped,
    )
    way = "" if on_too_long == "truncate" else ", or --on-too-long truncate"
    advice = (
        f"--max-length is {max_length} and the shortest example has {min(encoded.lengths)}; type a greater one, where "
        f"the model sees as much{way}"
    )
    _require_trained(limited, advice)
    return limited


def _longest(example: Example | Pair) -> int:
    """Tokens of its longest sequence."""
    return max(sequence.tokens for sequence in example.sequences.values())


def _conversation_examples(
    parsed: Parsed, tokenizer: PreTrainedTokenizerBase, template: Template, train_on: str
) -> Iterator[list[Example]]:
    """Render and tokenise the conversations, some hundreds at a time; refused ones join the bad rows.

    Yields:
        The examples of each conversation; none of one that was refused, or has nothing trained.
    """
    same: dict[int, int] = {}  # one int object for each id, or a large data set takes three times the memory
    for start in range(0, len(parsed.conversations), _ROWS_AT_ONCE):
        rendered: list[tuple[Row, list[Message], list[Turn]]] = []
        for row, messages in parsed.conversations[start : start + _ROWS_AT_ONCE]:
            try:
                rendered.append((row, messages, template.turns(messages)))
            except BadRow as error:
                rendered.append((row, messages, []))
                parsed.bad.append(f"{row.place}: {error}")
        texts = [
            text for _, _, turns in rendered for turn in turns for text in (turn.prompt, turn.prompt + turn.answer)
        ]
        found = tokenize(tokenizer, texts) if texts else []
        ids = iter([[same.setdefault(token, token) for token in row] for row in found])
        for row, messages, turns in rendered:
            tokenised = []
            for turn in turns:
                prompt, whole = next(ids), next(ids)
                if whole[: len(prompt)] != prompt:
                    whole = prompt + tokenize_continuation(tokenizer, turn.answer)
                tokenised.append((len(prompt), whole))
            yield _examples_of_row(row, messages, tokenised, train_on) if tokenised else []


def _examples_of_row(
    row: Row, messages: Sequence[Message], turns: Sequence[tuple[int, list[int]]], train_on: str
) -> list[Example]:
    """The example of the last trained turn and of every earlier one that is not part of it, in their order.

    Args:
        row: Where they come from.
        messages: The conversation.
        turns: For each turn of the assistant, the length of its prompt and the ids of prompt and answer.
        train_on: answer or all; with all, a turn of weight 0 is the only thing that is not trained.
    """
    ends = [index + 1 for index, message in enumerate(messages) if message.role == "assistant"]
    found: list[tuple[int, list[int], list[_Span]]] = []
    for end, (prompt_length, ids) in reversed(list(zip(ends, turns, strict=True))):
        message = messages[end - 1]
        within = bool(found) and found[-1][1][: len(ids)] == ids
        if not (within or _is_trained(message)):
            continue
        if not within:
            found.append((end, ids, [_Span(0, len(ids))] if train_on == "all" else []))
        found[-1][2].append(_Span(prompt_length, len(ids), message.weight))
    return [
        _example(ids, spans, Example([], [], row.place, tuple(messages[:end]), row.weight))
        for end, ids, spans in reversed(found)
    ]


def _is_trained(message: Message) -> bool:
    return message.role == "assistant" and message.weight > 0


def _text_examples(
    documents: Sequence[tuple[Row, str]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[Example]:
    """Join documents (BOS where the base expects one, text, end of text) and cut them into chunks."""
    bos, eos = added_bos(tokenizer), tokenizer.eos_token_id
    streams: dict[float, tuple[list[int], list[tuple[int, str]]]] = {}
    for row, text in documents:
        stream, starts = streams.setdefault(row.weight, ([], []))
        starts.append((len(stream), row.place))
        ids = tokenize(tokenizer, [text])[0]
        stream += ids if eos is None or ids[-1:] == [eos] != [bos] else [*ids, int(eos)]
    examples = []
    for weight, (stream, starts) in streams.items():
        position, document = 0, 0
        for piece in _pieces(stream, max_length):
            while document + 1 < len(starts) and starts[document + 1][0] <= position:
                document += 1
            examples.append(_example(piece, [_Span(0, len(piece))], Example([], [], starts[document][1], (), weight)))
            position += len(piece)
    return examples


def _pieces(ids: list[int], length: int) -> list[list[int]]:
    """Cut into consecutive pieces, nothing dropped.

    A last piece of a single token would train nothing (nothing predicts it): it takes one from the
    piece before.
    """
    cuts = [*range(0, len(ids), length), len(ids)]
    if len(cuts) > 2 and cuts[-1] - cuts[-2] == 1 and length > 2:
        cuts[-2] -= 1
    return [ids[start:end] for start, end in pairwise(cuts)]


def _example(ids: list[int], spans: Sequence[_Span], like: Example) -> Example:
    """An example whose labels are the ids inside the spans, later over earlier; the first is never trained."""
    labels = [IGNORED] * len(ids)
    weights = [1.0] * len(ids)
    for span in spans:
        places = slice(max(span.start, 1), span.end)
        labels[places] = ids[places] if span.weight else [IGNORED] * len(ids[places])
        weights[places] = [span.weight or 1.0] * len(ids[places])
    return replace(
        like, input_ids=ids, labels=labels, loss_weights=tuple(weights) if any(w != 1.0 for w in weights) else ()
    )


def _about_weights(parsed: Parsed) -> list[str]:
    """Sentences about what weights do: a column of that name may mean something else."""
    talks = [turns for _, turns in parsed.conversations]
    untrained = sum(not any(_is_trained(m) for m in turns) for turns in talks)
    scaled = sum(_is_trained(m) and m.weight != 1.0 for turns in talks for m in turns)
    notes = [f"{untrained} rows left out, whose turns are all of weight 0"] if untrained else []
    return [*notes, f"{scaled} turns whose loss is multiplied by their weight"] if scaled else notes


def _nothing_left(notes: Sequence[str]) -> QaromaError:
    left_out = f" ({'; '.join(notes)})" if notes else ""
    return QaromaError(f"the data holds no rows to train on{left_out}; expected at least one.")


def _require_known(encoded: Encoded[Any], tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    """Refuse ids that have no row in the embedding: on a GPU they would end the process in the midst of a step."""
    for example in (s for e in encoded.examples for s in e.sequences.values()):
        last = max(example.input_ids)
        if last >= vocabulary:
            token = tokenizer.convert_ids_to_tokens(last)
            raise QaromaError(
                f"{example.origin} has the token {token!r} (id {last}), but the base's "
                f"embedding has {vocabulary} rows: its tokenizer has tokens that it was never given. Take the token "
                "out of the data, or name a base whose tokenizer fits"
            )


def _require_trained(encoded: Encoded[Any], advice: str) -> None:
    if not any(example.trained for example in encoded.examples):
        dropped = f" ({encoded.dropped_too_long} examples dropped as too long)" if encoded.dropped_too_long else ""
        raise QaromaError(f"the data has no token to train on{dropped}: {advice}.")
