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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

from qaroma.data.fields import BadRow
from qaroma.data.forms import Parsed, parse_rows, report_bad_rows
from qaroma.data.sources import Row, RowSet
from qaroma.data.templates import Template
from qaroma.data.tokens import added_bos, tokenize, tokenize_continuation
from qaroma.data.turns import Message
from qaroma.errors import QaromaError

IGNORED = -100
TEXT_CHUNK = 1024

_ROWS_AT_ONCE = 512
_SHOWN_TOO_LONG = 5


@dataclass(frozen=True)
class Example:
    """One training sequence.

    Attributes:
        input_ids: Token ids, of length L.
        labels: Aligned with ``input_ids``: the same id where the loss counts the token, else -100.
            The first is always -100, since nothing predicts it.
        origin: ``file:line`` of its row (of plain text: of the document that it begins in).
        conversation: The turns in it, the last one the assistant's; empty for plain text.
        weight: How often it appears in an epoch.
        loss_weights: Aligned with ``labels``, the factor of each token's loss; empty where all are 1.
        lengths: Of the sequences packed into it; empty where it is one.
    """

    input_ids: list[int]
    labels: list[int]
    origin: str = ""
    conversation: tuple[Message, ...] = ()
    weight: float = 1.0
    loss_weights: tuple[float, ...] = ()
    lengths: tuple[int, ...] = ()

    @property
    def trained(self) -> int:
        """Number of tokens that the loss counts."""
        return len(self.labels) - self.labels.count(IGNORED)


@dataclass(frozen=True)
class _Span:
    """Consecutive tokens that are trained with one weight, or with weight 0 not trained."""

    start: int
    end: int
    weight: float = 1.0


@dataclass(frozen=True)
class Encoded:
    """Examples, and what became of the rows they were made of.

    Attributes:
        examples: In the order of the rows.
        template: The template they were rendered with; the one the adapter must remember.
        forms: The form of each file.
        dropped_too_long: Examples left out because of their length.
        truncated: Examples cut at the greatest length.
        bad: ``file:line: what is wrong`` of the rows left out.
        notes: Sentences to print.
    """

    examples: list[Example]
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
        """The number of tokens of each example."""
        return [len(example.input_ids) for example in self.examples]

    @property
    def trained_tokens(self) -> int:
        """The number of tokens that the loss counts, in all examples."""
        return sum(example.trained for example in self.examples)

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
    train_on: str = "answer",
    max_length: int | None = None,
    on_too_long: str = "drop",
    skip_bad: bool = False,
    vocabulary: int | None = None,
) -> Encoded:
    """Recognise, render and tokenise rows.

    Args:
        rows: What :func:`qaroma.data.sources.read_rows` returned, or rows.
        tokenizer: The base's tokenizer.
        template: From :meth:`Template.choose`, or the one an adapter remembers.
        form: A form to force, or ``auto``: each file by its keys.
        columns, feedback: See :func:`qaroma.data.forms.parse_rows`.
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
    parsed = parse_rows(given.rows, form, columns=columns, feedback=feedback)
    template = template.fitted(messages for _, messages in parsed.conversations)
    examples = list(_conversation_examples(parsed, tokenizer, template, train_on))
    bad = [*given.bad, *parsed.bad]
    if bad and not skip_bad:
        raise report_bad_rows(bad, len(given.rows) + len(given.bad))
    examples += _text_examples(parsed.documents, tokenizer, max_length or TEXT_CHUNK)
    notes = [*given.notes, *parsed.notes, *_about_weights(parsed)]
    if not examples:
        raise report_bad_rows(bad, len(bad)) if bad else _nothing_left(notes)
    encoded = Encoded(examples, template, parsed.forms, bad=bad, notes=notes)
    if vocabulary is not None:
        _require_known(encoded, tokenizer, vocabulary)
    _require_trained(encoded, "a row needs an answer (or plain text) of at least two tokens")
    return limit_length(encoded, max_length, on_too_long)


def limit_length(encoded: Encoded, max_length: int | None, on_too_long: str = "drop") -> Encoded:
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
    too_long = [e for e in encoded.examples if len(e.input_ids) > max_length and e.conversation]
    if too_long and on_too_long == "error":
        places = ", ".join(f"{e.origin} ({len(e.input_ids)})" for e in too_long[:_SHOWN_TOO_LONG])
        raise QaromaError(
            f"{len(too_long)} examples are longer than {max_length} tokens: {places}"
            f"{', ...' if len(too_long) > _SHOWN_TOO_LONG else ''}. Type a greater --max-length, "
            "or --on-too-long truncate or drop."
        )
    kept: list[Example] = []
    truncated = dropped = 0
    for example in encoded.examples:
        if len(example.input_ids) <= max_length:
            kept.append(example)
        elif not example.conversation:
            kept += [
                _example(piece, [_Span(0, len(piece))], example) for piece in _pieces(example.input_ids, max_length)
            ]
        else:
            cut = replace(
                example,
                input_ids=example.input_ids[:max_length],
                labels=example.labels[:max_length],
                loss_weights=example.loss_weights[:max_length],
            )
            if on_too_long == "truncate" and cut.trained:
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
    longest = max(encoded.lengths)
    _require_trained(limited, f"--max-length is {max_length} and the longest example has {longest}; raise it")
    return limited


def _conversation_examples(
    parsed: Parsed, tokenizer: PreTrainedTokenizerBase, template: Template, train_on: str
) -> Iterator[Example]:
    """Render and tokenise the conversations, some hundreds at a time; refused ones join the bad rows."""
    same: dict[int, int] = {}  # one int object for each id, or a large data set takes three times the memory
    for start in range(0, len(parsed.conversations), _ROWS_AT_ONCE):
        rendered = []
        for row, messages in parsed.conversations[start : start + _ROWS_AT_ONCE]:
            try:
                rendered.append((row, messages, template.turns(messages)))
            except BadRow as error:
                parsed.bad.append(f"{row.place}: {error}")
        texts = [
            text for _, _, turns in rendered for turn in turns for text in (turn.prompt, turn.prompt + turn.answer)
        ]
        if not texts:
            continue
        ids = iter([[same.setdefault(token, token) for token in row] for row in tokenize(tokenizer, texts)])
        for row, messages, turns in rendered:
            tokenised = []
            for turn in turns:
                prompt, whole = next(ids), next(ids)
                if whole[: len(prompt)] != prompt:
                    whole = prompt + tokenize_continuation(tokenizer, turn.answer)
                tokenised.append((len(prompt), whole))
            yield from _examples_of_row(row, messages, tokenised, train_on)


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


def _require_known(encoded: Encoded, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    """Refuse ids that have no row in the embedding: on a GPU they would end the process in the midst of a step."""
    for example in encoded.examples:
        last = max(example.input_ids)
        if last >= vocabulary:
            token = tokenizer.convert_ids_to_tokens(last)
            raise QaromaError(
                f"{example.origin} has the token {token!r} (id {last}), but the base's "
                f"embedding has {vocabulary} rows: its tokenizer has tokens that it was never given. Take the token "
                "out of the data, or name a base whose tokenizer fits"
            )


def _require_trained(encoded: Encoded, advice: str) -> None:
    if not any(example.trained for example in encoded.examples):
        dropped = f" ({encoded.dropped_too_long} examples dropped as too long)" if encoded.dropped_too_long else ""
        raise QaromaError(f"the data has no token to train on{dropped}: {advice}.")
