"""Each public form of rows trains exactly the turns that it means, or is refused with the sentence that says why."""

from __future__ import annotations

from dataclasses import replace

import pytest
from data_tokenizers import CHATML, TOOLS, byte_level
from row_forms import FORMS, TABLE, RowForm, table

from qaroma.data.encode import encode_rows
from qaroma.data.preview import preview
from qaroma.data.sources import Row
from qaroma.data.templates import Template
from qaroma.errors import QaromaError

TOKENIZERS = {"chatml": byte_level(CHATML), "tools": byte_level(TOOLS)}


def _shown(form: RowForm, **options: object) -> tuple[str, list[str]]:
    """The examples of a form with the trained text marked, and the notes."""
    tokenizer = TOKENIZERS[form.template]
    tools = str(options.pop("tools", "template"))
    rows = [Row(form.row, "a.jsonl", 1)]
    encoded = encode_rows(rows, tokenizer, Template.choose(tokenizer, tools=tools), **options)
    bodies = [preview(example, tokenizer).plain.split("\n", 1)[1] for example in encoded.examples]
    return "\n".join(bodies), encoded.notes


def _expected(form: RowForm) -> str:
    if form.turns[0][0] == "*":
        first, rest = form.turns[0][1][0], form.turns[0][1][1:]
        return f"{first}⟦{rest}<|im_end|>⟧"
    turns = []
    for role, text in form.turns:
        body = f"⟦{text}<|im_end|>⟧" if role.endswith("*") else f"{text}<|im_end|>"
        turns.append(f"<|im_start|>{role.rstrip('*')}\n{body}")
    return "\n".join(turns)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_a_form_trains_what_it_means_or_is_refused(form: RowForm) -> None:
    if form.refused:
        with pytest.raises(QaromaError) as caught:
            _shown(form)
        assert form.refused in str(caught.value)
    if form.turns:
        shown, notes = _shown(form, **form.option)
        assert shown == _expected(form)
        assert [note for note in notes if "ignored" in note] == (
            [f"ignored keys: {form.ignored}"] if form.ignored else []
        )


@pytest.mark.parametrize("form", [form for form in FORMS if form.rejected], ids=lambda form: form.name)
def test_both_answers_of_a_preference_are_trained_after_the_same_question(form: RowForm) -> None:
    tokenizer = TOKENIZERS[form.template]
    options = {key: value for key, value in form.option.items() if key != "feedback"}
    encoded = encode_rows([Row(form.row, "a.jsonl", 1)], tokenizer, Template.choose(tokenizer), pairs=True, **options)
    [pair] = encoded.examples
    worse = replace(form, turns=(*form.turns[:-1], ("assistant*", form.rejected)))
    for example, expected in ((pair.chosen, form), (pair.rejected, worse)):
        assert preview(example, tokenizer).plain.split("\n", 1)[1] == _expected(expected)


def test_the_table_of_the_examples_is_made_of_this_list() -> None:
    assert len(FORMS) >= 30
    assert TABLE.read_text(encoding="utf-8") == table(), "type python tests/row_forms.py"
