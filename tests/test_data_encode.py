"""Examples train the answers and nothing else, whatever the tokenizer and the template."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_tokenizers import CHATML, ENDLESS, GEMMA, LLAMA2, OPENED, THINKING, byte_level, sentencepiece_like

from qaroma.data.encode import IGNORED, Encoded, Example, encode_rows, limit_length
from qaroma.data.preview import preview, trained_pieces
from qaroma.data.sources import Row, RowSet, read_rows
from qaroma.data.split import split_validation, weigh
from qaroma.data.templates import Template
from qaroma.errors import QaromaError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

TOKENIZERS = {
    "chatml": byte_level(CHATML),
    "chatml with bos": byte_level(CHATML, bos=True, eos="</s>"),
    "gemma": byte_level(GEMMA, bos=True, eos="</s>"),
    "llama 2": sentencepiece_like(LLAMA2),
    "thinking": byte_level(THINKING),
    "opened thought": byte_level(OPENED),
    "endless": byte_level(ENDLESS, bos=True, eos="</s>"),
    "plain": byte_level(None),
    "plain, sentencepiece": sentencepiece_like(None),
}
TURNS = [
    ("system", "Be kind."),
    ("user", "One <|im_end|></s>?"),
    ("assistant", "1st"),
    ("user", "Two?"),
    ("assistant", "2nd\n\nmore"),
]


def _row(turns: list[tuple[str, str]], line: int = 1, weight: float = 1.0) -> Row:
    return Row({"messages": [{"role": role, "content": text} for role, text in turns]}, "a.jsonl", line, weight)


def _encode(tokenizer, rows, kind: str = "auto", **options) -> Encoded:
    return encode_rows(rows, tokenizer, Template.choose(tokenizer, kind), **options)


def _trained(example: Example, tokenizer) -> list[str]:
    return [text for trained, text in trained_pieces(example, tokenizer) if trained]


def _check(encoded: Encoded, tokenizer) -> None:
    """What holds for every conversation example of every template."""
    stops = encoded.template.stop_token_ids(tokenizer)
    bos = tokenizer.bos_token_id
    for example in encoded.examples:
        ids, labels = example.input_ids, example.labels
        assert len(ids) == len(labels)
        assert labels[0] == IGNORED
        assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
        prompt = encoded.template.encode_prompt(tokenizer, example.conversation)
        assert ids[: len(prompt)] == prompt, "generation must start from the very tokens that were trained on"
        assert labels[len(prompt) - 1] == IGNORED
        assert labels[len(prompt) :] == ids[len(prompt) :], "the whole last turn is trained"
        assert ids[-1] in stops
        if bos is not None:
            assert ids[0] == bos
            assert ids[1] != bos


@pytest.mark.parametrize("name", TOKENIZERS)
def test_answers_and_their_ends_are_trained_and_nothing_else(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    encoded = _encode(tokenizer, [_row(TURNS), _row(TURNS[1:3], 2)])
    _check(encoded, tokenizer)
    end = encoded.template.turn_end
    trained = [[piece.strip() for piece in _trained(example, tokenizer)] for example in encoded.examples]
    one, two = "1st" + end, "2nd\n\nmore" + end
    if name in ("thinking", "endless", "opened thought"):  # as history, a turn looks different: one example each
        assert trained == [[one], [two], [one]]
        assert [len(example.conversation) for example in encoded.examples] == [3, 5, 2]
    else:
        assert trained == [[one, two], [one]]
    assert {example.origin for example in encoded.examples} == {"a.jsonl:1", "a.jsonl:2"}


def test_end_of_turn_is_trained_though_it_is_the_padding_token() -> None:
    tokenizer = TOKENIZERS["chatml"]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    (example,) = _encode(tokenizer, [_row(TURNS)]).examples
    assert example.labels.count(tokenizer.pad_token_id) == 2
    assert example.input_ids.count(tokenizer.pad_token_id) > 2


def test_all_tokens_are_trained_on_request() -> None:
    tokenizer = TOKENIZERS["chatml with bos"]
    (example,) = _encode(tokenizer, [_row(TURNS)], train_on="all").examples
    assert example.labels == [IGNORED, *example.input_ids[1:]]
    with pytest.raises(QaromaError, match="got train_on 'most'"):
        _encode(tokenizer, [_row(TURNS)], train_on="most")


@pytest.mark.parametrize("tokenizer", [byte_level(None), sentencepiece_like(None)], ids=["bytes", "sentencepiece"])
@pytest.mark.parametrize(
    ("prompt", "answer"), [("The ans", "wer"), ("a ", "b"), ("a", " b"), ("a\n", "\nb"), ("日", "本")]
)
def test_a_token_across_the_border_is_parted(tokenizer, prompt: str, answer: str) -> None:
    rows = [Row({"prompt": prompt, "completion": answer}, "a.jsonl", 1)]
    encoded = _encode(tokenizer, rows, "none")
    _check(encoded, tokenizer)
    (example,) = encoded.examples
    text = tokenizer.decode(example.input_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert text == prompt + answer
    assert _trained(example, tokenizer) == [answer + tokenizer.eos_token]


def test_the_border_test_meets_a_token_across_it() -> None:
    tokenizer = byte_level(None)
    whole = tokenizer("The answer").input_ids
    prompt = tokenizer("The ans").input_ids
    assert whole[: len(prompt)] != prompt


def test_bad_rows_of_every_stage_are_reported_together(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    blank = good.replace('"b"', '""')
    twice = good.replace('[{"role": "user"', '[{"role": "user", "content": "x"}, {"role": "user"')
    path.write_text("\n".join([good, "{", blank, twice]), encoding="utf-8")
    rows = read_rows([(str(path), 1.0)])
    tokenizer = TOKENIZERS["gemma"]
    with pytest.raises(QaromaError, match="3 of 4 rows cannot be used") as caught:
        _encode(tokenizer, rows)
    for line, reason in {2: "not valid JSON", 3: "is blank", 4: "must alternate"}.items():
        assert any(f"{path}:{line}: " in entry and reason in entry for entry in str(caught.value).splitlines())
    encoded = _encode(tokenizer, rows, skip_bad=True)
    assert [example.origin for example in encoded.examples] == [f"{path}:1"]
    assert len(encoded.bad) == 3
    with pytest.raises(QaromaError, match="2 of 2 rows cannot be used"):
        _encode(tokenizer, RowSet([row for row in rows.rows if row.line > 2]), skip_bad=True)


def test_plain_text_is_cut_into_chunks_and_nothing_dropped() -> None:
    for tokenizer in (byte_level(None, bos=True, eos="</s>"), byte_level(None, eos="<|endoftext|>")):
        texts = ["The capital of France is Paris.", "a " * 40, "end"]
        bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        stream = []
        starts = []
        for text in texts:
            starts.append(len(stream))
            stream += [*bos, *tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        rows = [Row({"text": text}, "a.jsonl", line) for line, text in enumerate(texts, start=1)]
        for length in (3, 16, len(stream) - 1, len(stream), 1000):
            encoded = _encode(tokenizer, rows, max_length=length)
            joined = [token for example in encoded.examples for token in example.input_ids]
            assert joined == stream
            assert max(encoded.lengths) <= length
            assert min(encoded.lengths) > 1, "a chunk of one token trains nothing"
            assert all(example.labels == [IGNORED, *example.input_ids[1:]] for example in encoded.examples)
            position = 0
            for example in encoded.examples:
                assert example.origin == f"a.jsonl:{sum(start <= position for start in starts)}"
                position += len(example.input_ids)
        again = limit_length(_encode(tokenizer, rows), 16)
        assert [token for example in again.examples for token in example.input_ids] == stream
        assert max(again.lengths) == 16
        assert again.dropped_too_long == 0


def test_too_long_examples() -> None:
    tokenizer = TOKENIZERS["chatml"]
    rows = [_row([("user", "a"), ("assistant", "b" * n)], line=n) for n in (1, 40)]
    rows.append(_row([("user", "a" * 60), ("assistant", "b")], line=3))
    encoded = _encode(tokenizer, rows)
    limit = encoded.lengths[0] + 5
    assert encoded.lengths[1] > limit
    assert encoded.lengths[2] > limit
    assert limit_length(encoded, None) is encoded

    dropped = limit_length(encoded, limit)
    assert (dropped.examples, dropped.dropped_too_long, dropped.truncated) == (encoded.examples[:1], 2, 0)

    cut = limit_length(encoded, limit, "truncate")
    assert (cut.truncated, cut.dropped_too_long) == (1, 1), "the third has no trained token left"
    assert cut.examples[1].input_ids == encoded.examples[1].input_ids[:limit]
    assert cut.examples[1].labels == encoded.examples[1].labels[:limit]

    with pytest.raises(
        QaromaError, match=rf"2 examples are longer than {limit} tokens: a\.jsonl:40 \(\d+\), a\.jsonl:3"
    ):
        limit_length(encoded, limit, "error")
    with pytest.raises(
        QaromaError,
        match=r"no token to train on \(3 examples dropped as too long\): --max-length is 2 and the shortest example "
        r"has \d+; type a greater one, where the model sees as much, or --on-too-long truncate\.",
    ):
        limit_length(encoded, 2)
    with pytest.raises(QaromaError, match="got on_too_long 'wrap'"):
        limit_length(encoded, 2, "wrap")


@pytest.mark.parametrize("on_too_long", ["drop", "truncate", "error"])
def test_an_example_of_exactly_max_length_stays_whole(on_too_long: str) -> None:
    tokenizer = TOKENIZERS["chatml"]
    encoded = _encode(tokenizer, [_row(TURNS)])
    limited = limit_length(encoded, encoded.lengths[0], on_too_long)
    assert limited.examples == encoded.examples
    assert (limited.dropped_too_long, limited.truncated) == (0, 0)


def test_no_trained_token_is_an_error() -> None:
    tokenizer = byte_level(None)
    with pytest.raises(QaromaError, match="no token to train on"):
        limit_length(Encoded([Example([1, 2], [IGNORED] * 2)], Template.choose(tokenizer)), 5)
    with pytest.raises(QaromaError, match="holds no rows"):
        _encode(tokenizer, [])


def _many(count: int, weight: float = 1.0) -> list[Row]:
    return [_row([("user", f"q{n}"), ("assistant", f"a{n}")], n, weight) for n in range(1, count + 1)]


def test_weights_repeat_rows() -> None:
    tokenizer = TOKENIZERS["chatml"]
    for weight, smallest, largest, total in ((2.0, 2, 2, 40), (0.5, 0, 1, 10), (1.5, 1, 2, 30), (1.0, 1, 1, 20)):
        epoch = weigh(_encode(tokenizer, _many(20, weight)), seed=3)
        origins = [example.origin for example in epoch.examples]
        counts = [origins.count(f"a.jsonl:{n}") for n in range(1, 21)]
        assert (min(counts), max(counts), len(origins)) == (smallest, largest, total)
        assert origins == sorted(origins, key=lambda origin: int(origin.split(":")[1]))
        assert weigh(epoch) == epoch, "weights are spent once"
    halves = [weigh(_encode(tokenizer, _many(20, 0.5)), seed=seed) for seed in (1, 1, 2)]
    assert halves[0] == halves[1] != halves[2]


def test_validation_shares_no_row_with_training() -> None:
    tokenizer = TOKENIZERS["thinking"]  # two examples from a row of two turns
    rows = [*_many(30, 2.0), _row(TURNS, 31), _row(TURNS, 32)]
    encoded = _encode(tokenizer, rows)
    assert len(encoded.examples) == 34
    seen = set()
    for seed in range(8):
        train, validation = split_validation(encoded, share=0.25, at_most=6, seed=seed)
        origins = {example.origin for example in validation.examples}
        assert len(origins) == 6
        assert not origins & {example.origin for example in train.examples}
        assert len(train.examples) == sum(
            2 if int(e.origin[8:]) <= 30 else 1 for e in encoded.examples if e.origin not in origins
        )
        assert {id(example) for example in validation.examples} <= {id(example) for example in encoded.examples}
        seen |= origins
    assert len(seen) > 12, "the choice depends on the seed"
    train, validation = split_validation(encoded, share=0.0)
    assert not validation.examples
    assert len(train.examples) == 64
    assert split_validation(_encode(tokenizer, _many(1)), share=0.5)[1].examples == []


@pytest.mark.parametrize(("rows", "train", "held_out"), [(3, 1, 2), (1, 1, 0)])
def test_something_always_remains_to_train_on(rows: int, train: int, held_out: int) -> None:
    encoded = _encode(TOKENIZERS["chatml"], [_row(TURNS, line) for line in range(rows)])
    parts = split_validation(encoded, share=1.0)
    assert [len(part.examples) for part in parts] == [train, held_out]


def test_the_same_rows_twice_or_the_same_chunks_do_not_leak() -> None:
    tokenizer = byte_level(None)
    rows = [Row("the same words again and again " * 40, "a.txt", 1), Row("other " * 90, "b.txt", 1)]
    encoded = _encode(tokenizer, rows, max_length=16)
    train, validation = split_validation(encoded, share=0.3)
    assert validation.examples
    assert not {tuple(e.input_ids) for e in validation.examples} & {tuple(e.input_ids) for e in train.examples}
    twice = _encode(TOKENIZERS["chatml"], [*_many(10), *_many(10)])
    train, validation = split_validation(twice, share=0.3)
    assert len(validation.examples) == 3
    assert len(train.examples) == 14


def test_preview_marks_what_is_trained() -> None:
    for tokenizer in (TOKENIZERS["chatml"], TOKENIZERS["llama 2"]):
        (example,) = _encode(tokenizer, [_row(TURNS[1:])]).examples
        pieces = trained_pieces(example, tokenizer)
        whole = tokenizer.decode(example.input_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert "".join(text for _, text in pieces) == whole
        shown = preview(example, tokenizer)
        heading, body = shown.plain.split("\n", 1)
        assert heading == f"{len(example.input_ids)} tokens, {example.trained} trained, from a.jsonl:1"
        assert body == "".join(f"⟦{text}⟧" if trained else text for trained, text in pieces)
        assert body.count("⟦") == 2
        assert "[INST]" in body or "<|im_start|>" in body, "brackets are no markup"


@pytest.mark.parametrize(
    ("name", "form", "rows"),
    [
        ("instruct/lima.json", "alpaca", 1029),
        ("instruct/derived/lima_messages.jsonl.gz", "messages", 1029),
        ("instruct/derived/lima_sharegpt.json", "sharegpt", 329),
        ("instruct/alpaca_en_demo.json", "alpaca", 999),
        ("instruct/torchtune_alpaca_tiny.json", "alpaca", 100),
        ("commonsense/ARC-Easy/train.json", "alpaca", 2251),
    ],
)
def test_real_data(name: str, form: str, rows: int) -> None:
    if not (SHARED / name).is_file():
        pytest.skip(f"../shared/data/{name} is absent")
    tokenizer = TOKENIZERS["chatml"]
    found = read_rows([(str(SHARED / name), 1.0)])
    assert len(found.rows) == rows
    assert not found.bad
    encoded = _encode(tokenizer, found.head(200))
    assert encoded.form == form
    assert len(encoded.examples) == min(rows, 200)
    _check(encoded, tokenizer)
    for row, example in zip(found.rows, encoded.examples, strict=False):
        answers = [m.content for m in example.conversation if m.role == "assistant"]
        assert _trained(example, tokenizer) == [answer + "<|im_end|>" for answer in answers], row.place
        if form == "alpaca":
            assert answers[-1] == row.value["output"]


def test_the_three_forms_of_lima_are_one() -> None:
    names = ["instruct/lima.json", "instruct/derived/lima_messages.jsonl.gz"]
    if not all((SHARED / name).is_file() for name in names):
        pytest.skip("../shared/data/instruct is absent")
    tokenizer = TOKENIZERS["plain"]
    first, second = (_encode(tokenizer, RowSet(read_rows([(str(SHARED / name), 1.0)]).rows[-40:])) for name in names)
    assert any(len(example.conversation) > 2 for example in first.examples)
    assert [e.input_ids for e in first.examples] == [e.input_ids for e in second.examples]
    assert [e.labels for e in first.examples] == [e.labels for e in second.examples]


def _weighted(*weights: float) -> Row:
    turns = []
    for number, weight in enumerate(weights):
        turns += [{"role": "user", "content": f"q{number}"}]
        turns += [{"role": "assistant", "content": f"a{number}", "weight": weight}]
    return Row({"messages": turns}, "a.jsonl", 1)


def test_weights_of_turns() -> None:
    tokenizer = TOKENIZERS["chatml"]
    (example,) = _encode(tokenizer, [_weighted(0.5, 0, 2)]).examples
    assert _trained(example, tokenizer) == ["a0<|im_end|>", "a2<|im_end|>"]
    by_weight = {w: [i for i, label in enumerate(example.labels) if label != IGNORED and example.loss_weights[i] == w]
                 for w in (0.5, 2.0)}  # fmt: skip
    assert [tokenizer.decode([example.input_ids[i] for i in places]) for places in by_weight.values()] == [
        "a0<|im_end|>",
        "a2<|im_end|>",
    ]
    assert ", 6 trained, loss times 0.5 to 2, from a.jsonl:1" in preview(example, tokenizer).plain
    (last_masked,) = _encode(tokenizer, [_weighted(1, 0)]).examples
    assert _trained(last_masked, tokenizer) == ["a0<|im_end|>"]
    assert not tokenizer.decode(last_masked.input_ids).endswith("a1<|im_end|>"), "nothing is trained behind it"
    assert last_masked.loss_weights == (), "weights of 1 take no room"
    cut = limit_length(_encode(tokenizer, [_weighted(0.5, 1)]), 30, "truncate").examples[0]
    assert len(cut.loss_weights) == len(cut.labels) == 30


def test_everything_but_a_masked_turn_is_trained_on_request() -> None:
    tokenizer = TOKENIZERS["chatml"]
    (example,) = _encode(tokenizer, [_weighted(0, 1)], train_on="all").examples
    shown = preview(example, tokenizer).plain
    assert "a0<|im_end|>⟦" in shown
    assert shown.count("⟦") == 2


def test_rows_with_nothing_to_train_are_left_out_and_counted() -> None:
    tokenizer = TOKENIZERS["chatml"]
    encoded = _encode(tokenizer, [_weighted(0), _weighted(1)])
    assert len(encoded.examples) == 1
    assert encoded.notes == ["1 rows left out, whose turns are all of weight 0"]
    with pytest.raises(QaromaError, match=r"no rows to train on \(1 rows left out, whose turns are all of weight 0\)"):
        _encode(tokenizer, [_weighted(0)])


def test_a_weight_of_the_row_multiplies_those_of_its_turns() -> None:
    row = Row({"prompt": "q", "completion": "a", "weight": "0.25"}, "a.csv", 2)
    encoded = _encode(TOKENIZERS["chatml"], [row])
    assert encoded.notes == ["1 turns whose loss is multiplied by their weight"]
    (example,) = encoded.examples
    assert {w for w, label in zip(example.loss_weights, example.labels, strict=True) if label != IGNORED} == {0.25}


def test_tokens_that_the_base_does_not_have_are_told_before_training() -> None:
    tokenizer = byte_level(CHATML)
    known = len(tokenizer)
    tokenizer.add_tokens(["<extra>"], special_tokens=True)
    rows = [_row([("user", "a"), ("assistant", "b")]), _row([("user", "a"), ("assistant", "<extra>")], 2)]
    with pytest.raises(QaromaError, match=r"a\.jsonl:2 has the token '<extra>' \(id \d+\).* embedding has \d+ rows"):
        _encode(tokenizer, rows, vocabulary=known)
    assert len(_encode(tokenizer, rows, vocabulary=known + 1).examples) == 2


def test_no_empty_thought_is_trained_beside_rows_that_think() -> None:
    rows = [
        _row([("user", "a"), ("assistant", "<think>\nhm\n</think>\n\n1st")]),
        _row([("user", "a"), ("assistant", "2nd")], 2),
        _row([("user", "a"), ("assistant", "<think>\n\n</think>\n\n3rd")], 3),
    ]
    for name in ("thinking", "opened thought", "chatml"):
        tokenizer = TOKENIZERS[name]
        first, second, third = _encode(tokenizer, rows).examples
        assert "hm" in _trained(first, tokenizer)[0], name
        assert _trained(second, tokenizer) == ["2nd<|im_end|>"], name
        assert _trained(third, tokenizer) == ["3rd<|im_end|>"], name
