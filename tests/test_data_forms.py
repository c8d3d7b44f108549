"""Each form becomes the same turns; bad rows are named one by one and reported together."""

from __future__ import annotations

import json
import math
from random import Random
from typing import Any

import pytest

from qaroma.data.forms import BadRow, Message, parse_rows, recognise, report_bad_rows, to_conversation, to_pair
from qaroma.data.sources import Row
from qaroma.errors import QaromaError

SYSTEM, Q1, A1, Q2, A2 = "Be kind.", "One?", "1", "Two?", "2"
TURNS = [
    Message("system", SYSTEM),
    Message("user", Q1),
    Message("assistant", A1),
    Message("user", Q2),
    Message("assistant", A2),
]
MESSAGES = [{"role": turn.role, "content": turn.content} for turn in TURNS]
SHAREGPT = [
    {"from": {"user": "human", "assistant": "gpt"}.get(turn.role, turn.role), "value": turn.content} for turn in TURNS
]


@pytest.mark.parametrize(
    ("value", "form", "turns"),
    [
        ({"messages": MESSAGES}, "messages", TURNS),
        ({"messages": json.dumps(MESSAGES)}, "messages", TURNS),  # a CSV cell
        ({"conversations": SHAREGPT}, "sharegpt", TURNS),
        ({"conversations": SHAREGPT[1:], "system": SYSTEM}, "sharegpt", TURNS),
        ({"conversations": MESSAGES}, "sharegpt", TURNS),
        (
            {"instruction": Q2, "input": "", "output": A2, "history": [[Q1, A1]], "system": SYSTEM},
            "alpaca",
            TURNS,
        ),
        ({"instruction": Q2, "output": A2, "answer": "x", "text": "t", "input": None}, "alpaca", TURNS[3:]),
        (
            {"instruction": "Add.", "input": "1 2", "output": "3", "history": "[]"},
            "alpaca",
            [Message("user", "Add.\n\n1 2"), Message("assistant", "3")],
        ),
        ({"prompt": Q2, "completion": A2}, "completion", TURNS[3:]),
        ({"prompt": "[1, 2]", "response": " 3"}, "completion", [Message("user", "[1, 2]"), Message("assistant", " 3")]),
        ({"prompt": MESSAGES[:4], "completion": MESSAGES[4:]}, "completion", TURNS),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": Q2}]}, MESSAGES[4]]},
            "messages",
            TURNS[3:],
        ),
    ],
)
def test_forms_are_recognised_and_read(value: dict, form: str, turns: list[Message]) -> None:
    row = Row(value, "a.jsonl", 1)
    assert recognise([row]) == form
    assert to_conversation(row, form) == turns


def test_text() -> None:
    rows = [Row({"text": "a"}, "a.jsonl", 1), Row({"text": " "}, "a.jsonl", 2), Row("whole file", "b.txt", 1)]
    parsed = parse_rows(rows)
    assert [text for _, text in parsed.documents] == ["a", "whole file"]
    assert parsed.bad == ["a.jsonl:2: the field 'text' is blank"]
    assert parsed.forms == {"a.jsonl": "text", "b.txt": "text"}


@pytest.mark.parametrize(
    ("value", "form", "message"),
    [
        ({"instruction": "a"}, "alpaca", "'output' is missing"),
        ({"instruction": "a", "output": "  "}, "alpaca", "'output' is blank"),
        ({"instruction": "a", "output": 3}, "alpaca", "'output' is a number; expected text"),
        ({"instruction": None, "input": "", "output": "a"}, "alpaca", "'instruction' is missing or blank"),
        ({"instruction": "a", "output": "b", "history": ["c"]}, "alpaca", "not a pair"),
        ({"instruction": "a", "output": "b", "history": "c"}, "alpaca", "'history' is text"),
        ({"prompt": "", "completion": "b"}, "completion", "'prompt' is blank"),
        ({"messages": []}, "messages", "'messages' is an empty list"),
        ({"messages": None}, "messages", "'messages' is missing"),
        ({"messages": ["hello"]}, "messages", "turn 1 is text; expected an object"),
        ({"messages": [{"speaker": "me"}]}, "messages", "turn 1 has the keys speaker"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "messages", "turn 1 has the role 'wizard'"),
        ({"messages": MESSAGES[:4]}, "messages", "last turn is from user"),
        ({"messages": MESSAGES[:1]}, "messages", "last turn is from system"),
        ({"messages": [MESSAGES[1], {"role": "assistant", "content": "\n"}]}, "messages", "turn 2 .* is blank"),
        ({"messages": [MESSAGES[1], {"role": "assistant", "content": None}]}, "messages", "content of turn 2 is miss"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, MESSAGES[2]]},
            "messages",
            "turn 1 has a part that is not text",
        ),
    ],
)
def test_bad_rows_say_what_is_wrong(value: dict, form: str, message: str) -> None:
    with pytest.raises(BadRow, match=message):
        to_conversation(Row(value, "a.jsonl", 1), form)


def test_files_of_different_forms_mix_but_one_file_does_not() -> None:
    alpaca = {"instruction": "a", "output": "b"}
    rows = [Row(alpaca, "a.jsonl", 1), Row({"messages": MESSAGES}, "b.jsonl", 1)]
    assert parse_rows(rows).forms == {"a.jsonl": "alpaca", "b.jsonl": "messages"}
    mixed = [Row(alpaca, "a.jsonl", 1), Row(alpaca, "a.jsonl", 2), Row({"messages": MESSAGES}, "a.jsonl", 7)]
    with pytest.raises(QaromaError, match=r"a\.jsonl mixes two forms: alpaca \(line 1\) and messages \(line 7\)"):
        parse_rows(mixed)
    assert len(parse_rows(mixed, "alpaca").bad) == 1


@pytest.mark.parametrize(("label", "ignored"), [("bad", {"label"}), (3, {"label"}), (True, set()), ("1", set())])
def test_a_label_that_says_nothing_known_of_the_answer_is_named_as_ignored(label: Any, ignored: set[str]) -> None:
    rows = [Row({"prompt": "a", "completion": "b", "label": label}, "a.jsonl", 1)]
    assert parse_rows(rows, feedback="good").ignored == ignored


def test_rows_of_no_form() -> None:
    with pytest.raises(QaromaError, match=r"a\.jsonl:1: the keys \(sentence, label\) fit no known form; expected"):
        recognise([Row({"sentence": "a", "label": 1}, "a.jsonl", 1)])
    with pytest.raises(QaromaError, match="got the data format 'dolly'"):
        recognise([], "dolly")
    for file, row, way_on in (
        (
            "a.csv",
            {"Frage": "a", "Antwort": "b"},
            '--columns "prompt=Frage,completion=Antwort". Is the line with the names',
        ),
        ("a.json", {"id": 1, "asked of": "a", "n": 2, "said": "b"}, '--columns "prompt=asked of,completion=said".'),
        ("a.json", {"title": "a", "mapping": {}}, "--columns prompt=ASKED,completion=ANSWERED."),
    ):
        with pytest.raises(QaromaError) as refused:
            recognise([Row(row, file, 1)])
        assert way_on in str(refused.value)
        assert ("Is the line" in str(refused.value)) == (file == "a.csv")
    fitting = [Row({"wrong": 1}, "a.jsonl", 1), Row({"prompt": "a", "completion": "b"}, "a.jsonl", 2)]
    assert recognise(fitting) == "completion"
    assert parse_rows(fitting).bad == ["a.jsonl:1: the field 'prompt' is missing"]


def test_report_is_capped() -> None:
    text = str(report_bad_rows([f"a.jsonl:{i}: blank" for i in range(1, 13)], 40))
    assert text.startswith("12 of 40 rows cannot be used:\n  a.jsonl:1: blank\n")
    assert "a.jsonl:10: blank" in text
    assert "a.jsonl:11" not in text
    assert "and 2 more" in text
    assert "--skip-bad-rows" in text


def test_what_has_no_meaning_is_named_once() -> None:
    rows = [
        Row({"prompt": "a", "completion": "b", "id": line, "note": "", "tags": [], "x": None}, "a.jsonl", line)
        for line in (1, 2)
    ]
    talk = [{**MESSAGES[1], "date": "today"}, MESSAGES[2]]
    parsed = parse_rows([*rows, Row({"messages": talk, "text": "t"}, "b.jsonl", 1)])
    assert parsed.notes == ["ignored keys: id, text, turns: date"]


def test_columns_are_renamed_and_go_before_what_else_a_row_has() -> None:
    rows = [Row({"q": Q2, "a": A2, "s": SYSTEM, "text": "t", "messages": MESSAGES[:2]}, "a.jsonl", 1)]
    columns = {"prompt": "q", "completion": "a", "system": "s"}
    parsed = parse_rows(rows, columns=columns)
    assert [turns for _, turns in parsed.conversations] == [[TURNS[0], *TURNS[3:]]]
    assert parsed.notes == ["ignored keys: messages, text"]
    with pytest.raises(QaromaError, match=r"got --columns prompt=w, but no row has w; there are q, a, s, text, mess"):
        parse_rows(rows, columns={"prompt": "w"})
    with pytest.raises(QaromaError, match=r"got --columns promt=\.\.\.; expected one of prompt, completion"):
        parse_rows(rows, columns={"promt": "q"})


def test_feedback_is_refused_or_the_good_answers_are_taken() -> None:
    labels = (True, False, "true", "False", 1, 0)
    rows = [Row({"prompt": Q2, "completion": A2, "label": label}, "a.jsonl", n) for n, label in enumerate(labels, 1)]
    with pytest.raises(QaromaError, match=r"a\.jsonl:1 has a label .*\(KTO\).*type --feedback good to train on"):
        parse_rows(rows)
    parsed = parse_rows(rows, feedback="good")
    assert [row.line for row, _ in parsed.conversations] == [1, 3, 5]
    assert parsed.notes == ["3 rows left out, whose answers are not good by their own label"]
    assert parse_rows([Row({"text": "a", "label": True}, "a.jsonl", 1)]).notes == ["ignored keys: label"]
    with pytest.raises(QaromaError, match="got feedback 'bad'; expected refuse or good"):
        parse_rows(rows, feedback="bad")


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"content": "a \ud83d"}, r"turn 2 holds \\ud83d, half of a surrogate pair"),
        ({"content": "a", "weight": -1}, "'weight' of turn 2 is -1; expected a factor of the loss"),
        ({"content": "a", "loss_weight": "much"}, "'loss_weight' of turn 2 is 'much'"),
        ({"content": "a", "loss_weight": 10**400}, "'loss_weight' of turn 2 is 1000"),
        ({"content": None, "tool_calls": [{"function": {"arguments": "{}"}}]}, "turn 2 has a call .* without a name"),
        ({"content": None, "tool_calls": [{"name": "f", "arguments": "x"}]}, "calls f with arguments that are no JSON"),
        ({"content": [{"type": "text"}]}, "turn 2 has a part of type text without text"),
        ({"content": "<think>\n\n</think>\n\n"}, "turn 2 .* is blank"),
    ],
)
def test_bad_turns(turn: dict, message: str) -> None:
    with pytest.raises(BadRow, match=message):
        to_conversation(Row({"messages": [MESSAGES[1], {"role": "assistant", **turn}]}, "a.jsonl", 1), "messages")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"messages": MESSAGES[1:3], "tools": "none"}, "'tools' is text; expected a list of functions"),
        ({"messages": MESSAGES[1:3], "tools": [{"description": "d"}]}, "entry 1 of 'tools' is no function with a name"),
        ({"messages": MESSAGES[2:3]}, "no turn is the user's"),
        ({"messages": [{**MESSAGES[1], "train": True}, MESSAGES[2]]}, r"turn 1 \(user\) is to be trained"),
        ({"chat": "hello", "system": "s"}, "one text without 'USER:'"),
        (
            {"messages": "[{'role': 'user'}\n {'role': 'assistant'}]"},
            "a printed list that is not JSON; save the table as",
        ),
        ({"chat": "USER: a\n\nASSISTANT: <functioncall> x"}, "the field 'chat' has a call that is text without a name"),
    ],
)
def test_bad_conversations(value: dict, message: str) -> None:
    with pytest.raises(BadRow, match=message):
        to_conversation(Row(value, "a.jsonl", 1), "messages")


def test_turns_as_tables_hold_them() -> None:
    columns = {"role": ["user", "assistant"], "content": [Q2, A2]}
    printed = str([{"role": "user", "content": Q2}, {"role": "assistant", "content": A2}])  # as Python prints it
    for value in (
        {"messages": columns},
        {"messages": printed},
        {"Messages": MESSAGES[3:]},
        {" messages": MESSAGES[3:]},
    ):
        row = Row(value, "a.csv", 2)
        assert recognise([row]) == "messages"
        assert to_conversation(row, "messages") == TURNS[3:]


def test_calls_and_results_are_tied() -> None:
    calls = [{"name": name, "arguments": {}} for name in ("f", "g")]
    talk = [
        MESSAGES[1],
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": {"x": 1}},
        {"role": "tool", "content": "2"},
        MESSAGES[2],
    ]
    _, called, first, second, _ = to_conversation(Row({"messages": talk}, "a.jsonl", 1), "messages")
    assert [call["id"] for call in called.calls] == ["call00000", "call00001"]
    assert [(m.name, m.call_id, m.content) for m in (first, second)] == [
        ("f", "call00000", '{"x": 1}'),
        ("g", "call00001", "2"),
    ]


KEYS = [
    "messages",
    "conversations",
    "chat",
    "contents",
    "prompt",
    "completion",
    "question",
    "answers",
    "instruction",
    "output",
    "input",
    "context",
    "system",
    "systemInstruction",
    "history",
    "tools",
    "functions",
    "chosen",
    "rejected",
    "label",
    "weight",
    "images",
    "text",
    "preferred_output",
    "non_preferred_output",
    "segments",
    "x",
]
TURN_KEYS = [
    "role",
    "from",
    "content",
    "value",
    "parts",
    "tool_calls",
    "function_call",
    "weight",
    "train",
    "thinking",
    "reasoning_content",
    "name",
    "tool_call_id",
    "input",
    "output",
    "loss_weight",
]
PART_KEYS = ["type", "text", "value", "name", "arguments", "function", "id", "input", "content", "tool_use_id"]
WORDS = [
    *[
        "user",
        "assistant",
        "gpt",
        "tool",
        "function_call",
        "system",
        "text",
        "tool_use",
        "tool_result",
        "reasoning",
        "[1",
        "[]",
        "{}",
        "²",
        "--1",
        "1e400",
    ],
    *("", " ", '{"name": "f"}', "a \ud83d", "USER: a ASSISTANT: b", "<think>"),
]


def _random_value(random: Random, depth: int = 0) -> object:
    kind = random.randrange(9 if depth < 4 else 6)
    if kind < 4:
        return random.choice(WORDS)
    if kind < 6:
        return random.choice((None, True, False, 0, -1, 3, 10**400, math.nan, math.inf, 0.5))
    if kind == 6:
        return [_random_value(random, depth + 1) for _ in range(random.randrange(4))]
    keys = random.choice((KEYS, TURN_KEYS, PART_KEYS))
    return {key: _random_value(random, depth + 1) for key in random.sample(keys, random.randrange(5))}


def _random_turns(random: Random) -> list[object]:
    turns: list[object] = [{**MESSAGES[1]}, {**MESSAGES[2]}]
    for turn in turns:
        if isinstance(turn, dict):
            turn[random.choice(TURN_KEYS)] = _random_value(random, 2)
    return [*turns, _random_value(random, 1)] if random.random() < 0.2 else turns


def test_no_row_ends_in_anything_but_a_sentence() -> None:
    random = Random(5)
    for number in range(3000):
        value = {key: _random_value(random) for key in random.sample(KEYS, random.randrange(1, 5))}
        if random.random() < 0.5:
            value[random.choice(("messages", "conversations", "chosen", "history", "prompt"))] = _random_turns(random)
        for feedback in ("refuse", "good"):
            try:
                parsed = parse_rows([Row(value, "a.jsonl", number)], feedback=feedback)
            except QaromaError:
                continue
            "\n".join([*parsed.bad, *parsed.notes]).encode("utf-8")
            for _, turns in parsed.conversations:
                assert turns[-1].role == "assistant"
                "".join(m.content + m.thought for m in turns).encode("utf-8")


@pytest.mark.parametrize("answer", ['{"call": "timer", "minutes": 5}', '[{"call": "timer"}]', "[1, 2]"])
def test_an_answer_that_is_json_is_a_text(answer: str) -> None:
    row = Row({"prompt": "A timer, please.", "completion": answer}, "a.jsonl", 1)
    assert to_conversation(row, "completion")[-1] == Message("assistant", answer)
    row = Row({"prompt": "A timer, please.", "chosen": answer, "rejected": "{}"}, "a.jsonl", 1)
    assert [turns[-1].content for turns in to_pair(row)] == [answer, "{}"]


def test_what_both_answers_begin_with_is_context() -> None:
    ends = [{"role": "user", "content": "Three?"}, {"role": "assistant", "content": "3"}]
    chosen, rejected = to_pair(Row({"chosen": [*MESSAGES, *ends], "rejected": MESSAGES[:4] + ends[1:]}, "a.jsonl", 1))
    assert [turn.weight for turn in chosen if turn.role == "assistant"] == [0.0, 1.0, 1.0]
    assert [turn.weight for turn in rejected if turn.role == "assistant"] == [0.0, 1.0]
    assert chosen[:4] == rejected[:4]
