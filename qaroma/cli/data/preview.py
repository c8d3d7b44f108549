"""``qaroma data preview``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from qaroma.cli.options import CONFIG_OPTION, SET_OPTION, config_options, count, read_config
from qaroma.cli.output import JSON_OPTION, figures_only
from qaroma.config.load import require_model_and_data
from qaroma.config.tasks import PREFERENCE, WRITING
from qaroma.errors import QaromaError
from qaroma.model.builtin import require_model
from qaroma.training.checks import check_sources

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from qaroma.config.schema import Config
    from qaroma.data.encode import Encoded
    from qaroma.data.sources import RowSet

_EPILOG = """\b
Examples:
  qaroma data preview --model smollm2-135m --data demo:calendar
  qaroma data preview --config mine.yaml --examples 5 --set data.template=plain
"""
_LONGEST_PIECE = 240  # characters of a text that is all trained or all not


@click.command(epilog=_EPILOG)
@CONFIG_OPTION
@config_options(
    "model.name",
    "data.train",
    "task",
    "data.format",
    "data.columns",
    "data.feedback",
    "data.tools",
    "data.template",
    "data.train_on",
    "data.max_length",
    "data.on_too_long",
    "data.skip_bad_rows",
    "model.trust_remote_code",
)
@click.option("--examples", type=count(1), default=2, show_default=True, metavar="INTEGER",
              help="Examples shown.")  # fmt: skip
@click.option("--full", is_flag=True, help="Show them whole, however long they are.")
@click.option("--rows", type=count(1), default=1000, show_default=True, metavar="INTEGER",
              help="Only the first so many rows are looked at.")  # fmt: skip
@SET_OPTION
@JSON_OPTION
def command(
    config: str | None,
    examples: int,
    full: bool,
    rows: int,
    sets: tuple[str, ...],
    json_output: bool,
    **parameters: Any,
) -> None:
    """Show examples as the model sees them: rendered with the template, decoded from their tokens,
    what is trained marked.

    Takes the settings of finetune, so that --config shows what that run will train on.
    """
    settings = read_config(config, parameters, sets)
    if not settings.writes_text:
        raise QaromaError(
            f"got task {settings.task}, whose texts are trained as they are; expected {' or '.join(WRITING)}"
        )
    name = require_model_and_data(settings)
    require_model(name)
    check_sources(settings)

    from rich.console import Console

    with figures_only(json_output) as write:
        encoded, tokenizer, found = _encoded(settings, name, rows)
        shown, most = encoded.examples[:examples], None if full else _LONGEST_PIECE
        if json_output:
            write(_as_json(encoded, shown, tokenizer, most))
            return
    console = Console()
    _print_examples(console, shown, tokenizer, most)
    _print_counts(console, encoded, rows, found)


def _encoded(settings: Config, name: str, rows: int) -> tuple[Encoded[Any], PreTrainedTokenizerBase, RowSet]:
    """The first rows as training encodes them, the base's tokenizer, and all rows."""
    from qaroma.data.encode import encode_rows
    from qaroma.data.sources import read_rows
    from qaroma.data.templates import Template
    from qaroma.model.base import load_tokenizer
    from qaroma.model.found import find_model

    model, data = settings.model, settings.data
    base = find_model(name, revision=model.revision, trust_remote_code=model.trust_remote_code)
    tokenizer = load_tokenizer(base)
    sources = [(source.path, source.weight) for source in data.train]
    found = read_rows(sources, seed=settings.training.seed)
    encoded = encode_rows(
        found.head(rows),
        tokenizer,
        Template.choose(tokenizer, data.template, data.tools),
        form=data.format,
        columns=data.columns,
        feedback=data.feedback,
        pairs=settings.task == PREFERENCE,
        train_on=data.train_on,
        max_length=data.max_length,
        on_too_long=data.on_too_long,
        skip_bad=data.skip_bad_rows,
        vocabulary=base.vocabulary,
    )
    return encoded, tokenizer, found


def _print_examples(
    console: Console, examples: Sequence[Any], tokenizer: PreTrainedTokenizerBase, most: int | None
) -> None:
    from qaroma.data.preview import preview

    for example in examples:
        # Soft wrapping: the line breaks shown are the example's own.
        for name, sequence in example.sequences.items():
            console.print(preview(sequence, tokenizer, name, most=most), soft_wrap=True)
            console.print()


def _as_json(
    encoded: Encoded[Any], examples: Sequence[Any], tokenizer: PreTrainedTokenizerBase, most: int | None
) -> dict[str, Any]:
    """The examples as pieces, each with whether it is trained; and the counts."""
    from qaroma.data.preview import trained_pieces

    return {
        "form": encoded.form,
        "template": encoded.template.kind,
        "examples": [
            [{"name": name, "pieces": trained_pieces(sequence, tokenizer, most=most)}
             for name, sequence in example.sequences.items()]
            for example in examples
        ],
        "tokens": sum(encoded.lengths),
        "trained_tokens": encoded.trained_tokens,
        "notes": [*_left_out(encoded), *encoded.notes],
    }  # fmt: skip


def _left_out(encoded: Encoded[Any]) -> list[str]:
    """Sentences about rows that are no examples, or not whole ones."""
    said = []
    if encoded.dropped_too_long or encoded.truncated:
        said.append(f"too long: {encoded.dropped_too_long:,} dropped, {encoded.truncated:,} truncated")
    if encoded.bad:
        said.append(f"{len(encoded.bad):,} bad rows left out, the first: {encoded.bad[0]}")
    return said


def _print_counts(console: Console, encoded: Encoded[Any], rows: int, found: RowSet) -> None:
    unread = len(found.bad)
    looked_at, all_rows = min(rows, len(found.rows)) + unread, len(found.rows) + unread
    lengths = sorted(encoded.lengths)
    kind = "pairs" if len(lengths) > len(encoded.examples) else "examples"
    lines = [
        f"{looked_at:,} of {all_rows:,} rows, form {encoded.form}, template {encoded.template.kind}",
        f"{len(encoded.examples):,} {kind} of {lengths[0]:,} to {lengths[-1]:,} tokens, half of them up to "
        f"{lengths[len(lengths) // 2]:,}; {encoded.trained_tokens:,} of {sum(lengths):,} tokens trained",
    ]
    for line in [*lines, *_left_out(encoded), *encoded.notes]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
