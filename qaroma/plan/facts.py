"""What is decided by, from the rows and the base of a run: the same for ``init`` and for the training that follows."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from qaroma.config.decisions import DataFacts, ModelFacts
from qaroma.config.methods import METHODS
from qaroma.config.presets import told_bits
from qaroma.config.schema import Config
from qaroma.config.tasks import PREFERENCE
from qaroma.data.encode import Encoded, encode_rows
from qaroma.data.sources import RowSet
from qaroma.data.templates import Template
from qaroma.model.facts import facts_of_base
from qaroma.model.found import FoundModel


def encoded_as_asked(
    config: Config,
    rows: RowSet,
    base: FoundModel,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    *,
    max_length: int | None,
) -> Encoded[Any]:
    """Rows of conversations as the settings of ``data`` have them; as :func:`qaroma.data.encode.encode_rows`."""
    data = config.data
    return encode_rows(
        rows,
        tokenizer,
        template,
        form=data.format,
        columns=data.columns,
        feedback=data.feedback,
        pairs=config.task == PREFERENCE,
        train_on=data.train_on,
        max_length=max_length,
        on_too_long=data.on_too_long,
        skip_bad=data.skip_bad_rows,
        vocabulary=base.vocabulary,
    )


def conversation_facts(
    config: Config, base: FoundModel, *, lengths: list[int], train: Encoded[Any], validation_rows: int
) -> DataFacts:
    """The facts of a run on conversations.

    Args:
        config: with task, method and growth.
        base: looked up.
        lengths: of all examples, in tokens.
        train: those that are trained on.
        validation_rows: rows that are validated on.
    """
    return DataFacts(
        len(train.examples),
        lengths,
        base.longest_input,
        validation_rows=validation_rows,
        trained_bits=told_bits(config.task, train.distinct),
        model=model_facts(config, base),
    )


def model_facts(config: Config, base: FoundModel) -> ModelFacts | None:
    """What growth within a budget wants to know of the base; None where nothing grows."""
    if not METHODS[config.method].grows or config.growth.preset != "auto":
        return None
    return facts_of_base(base, config.growth.target_modules or "all-linear", task=config.task)
