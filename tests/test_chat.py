"""`chat`: streamed answers, the conversation that it keeps, the base beside the tuned model, and Ctrl-C."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from export_adapters import save_random_adapter

from qaroma.cli import main
from qaroma.cli.chat import converse
from qaroma.data.forms import Message
from qaroma.errors import QaromaError
from qaroma.inference.chat import AnswerStream, Chat, Sampling, adapter_off, open_chat
from qaroma.inference.generate import generate
from qaroma.inference.open import TunedModel
from qaroma.method.adapter import AdaptedLinear
from qaroma.model.base import load_base

SHORT = Sampling(max_new_tokens=12)


@pytest.fixture(scope="module")
def adapter(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "mine"
    save_random_adapter(tiny_folder, folder)
    return folder


@pytest.fixture(scope="module")
def tuned(adapter: Path) -> TunedModel:
    return open_chat(str(adapter), device="cpu")


def greedy(tuned: TunedModel, *turns: Message, tokens: int = 12) -> str:
    return generate(tuned.model, tuned.tokenizer, tuned.template, [list(turns)], max_new_tokens=tokens)[0]


def typing(*lines: str) -> Callable[[str], str]:
    """What a person types; records nothing, ends with Ctrl-D. An exception among the lines is raised."""
    waiting = iter(lines)

    def read(_: str) -> str:
        line = next(waiting, None)
        if line is None:
            raise EOFError
        if line == "^C":
            raise KeyboardInterrupt
        return line

    return read


def test_an_answer_comes_in_pieces_and_equals_that_of_generate(tuned: TunedModel) -> None:
    pieces: list[str] = []
    reply = Chat(tuned, SHORT).ask("count 3", pieces.append)
    assert reply.text == "".join(pieces) == greedy(tuned, Message("user", "count 3"))
    assert len(pieces) > 3
    assert reply.tokens <= 12


def test_the_conversation_and_the_system_text_are_what_the_next_answer_sees(tuned: TunedModel) -> None:
    chat = Chat(tuned, SHORT, system="be brief")
    first = chat.ask("count 3", lambda _: None)
    second = chat.ask("count 4", lambda _: None)
    system, user = Message("system", "be brief"), Message("user", "count 3")
    assert first.text == greedy(tuned, system, user)
    assert second.text == greedy(tuned, system, user, Message("assistant", first.text), Message("user", "count 4"))
    assert [turn.role for turn in chat.turns] == ["user", "assistant"] * 2
    chat.reset()
    assert chat.ask("count 3", lambda _: None).text == first.text


def test_the_base_answers_in_place_and_the_adapter_is_back_after_that(tuned: TunedModel, tiny_folder: Path) -> None:
    ids = torch.arange(3, 20)[None]
    plain = load_base(tiny_folder, compute_dtype=torch.float32, device="cpu")
    layers = [module for module in tuned.model.modules() if isinstance(module, AdaptedLinear)]
    factors = [layer.A.data_ptr() for layer in layers]
    with torch.no_grad():
        before = tuned.model(ids).logits
        with adapter_off(tuned.model):
            off = tuned.model(ids).logits
        with pytest.raises(RuntimeError, match="in between"), adapter_off(tuned.model):
            raise RuntimeError("in between")
        assert torch.equal(off, plain(ids).logits)
        assert not torch.equal(off, before)
        assert torch.equal(tuned.model(ids).logits, before)
    assert [layer.A.data_ptr() for layer in layers] == factors


def test_base_shows_its_answer_and_the_conversation_stays_the_tuned_models(
    tuned: TunedModel, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = TunedModel(
        load_base(tiny_folder, compute_dtype=torch.float32, device="cpu"), tuned.tokenizer, tuned.template
    )
    chat = Chat(tuned, SHORT)
    converse(chat, typing("/base", "count 3", "/base", "/base", "count 4"))
    ours, theirs = (greedy(model, Message("user", "count 3")) for model in (tuned, plain))
    assert ours != theirs
    out, err = capsys.readouterr()
    turns = [Message("user", "count 3"), Message("assistant", ours), Message("user", "count 4")]
    assert out == f"{ours}\n{theirs}\n{theirs}\n{greedy(tuned, *turns)}\n"
    assert err.count("the base, without the adapter:") == 2
    assert "nothing has been asked yet" in err
    assert [turn.content for turn in chat.turns[:3]] == ["count 3", ours, "count 4"]


def test_characters_of_several_tokens_are_written_whole(tokenizer: Any) -> None:
    text = "häß 日本語 🙂 ende"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) > len(text)  # one token a byte
    pieces: list[str] = []
    stream = AnswerStream(tokenizer, [2], pieces.append)
    stream.put(torch.tensor([[1, 1, 1]]))
    for token in [*ids, 2, 40]:
        stream.put(torch.tensor([token]))
    stream.end()
    assert "".join(pieces) == stream.text() == text  # nothing of the stop token, or of what is after it
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_answer_that_ends_within_a_character_is_still_written(tokenizer: Any) -> None:
    ids = tokenizer("a🙂", add_special_tokens=False).input_ids[:-1]
    pieces: list[str] = []
    stream = AnswerStream(tokenizer, [2], pieces.append)
    stream.put(torch.tensor([[1]]))
    for token in ids:
        stream.put(torch.tensor([token]))
    assert pieces == ["a"]
    stream.end()
    assert "".join(pieces) == stream.text()


def test_the_oldest_turns_are_forgotten_when_the_context_is_full(
    tuned: TunedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = Chat(tuned, SHORT, system="keep me")
    assert chat.context == 512
    # Without the first question alone there would be room; its answer must not stay behind.
    chat.turns = [Message("user", "x" * 250), Message("assistant", "y" * 9)] * 2
    prompts: list[str] = []
    encode = type(tuned.template).encode_prompt

    def recording(template: Any, tokenizer: Any, messages: Any) -> list[int]:
        ids = encode(template, tokenizer, messages)
        prompts.append(tokenizer.decode(ids))
        return ids

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(tuned.template), "encode_prompt", recording)
        converse(chat, typing("the last question"))
    assert "oldest turns are forgotten: the conversation has outgrown the 512 tokens" in capsys.readouterr().err
    assert "keep me" in prompts[-1]
    assert "the last question" in prompts[-1]
    assert [turn.role for turn in chat.turns] == ["user", "assistant"] * 2
    assert chat.turns[1].content == "y" * 9


def test_a_message_larger_than_the_context_is_refused_and_leaves_the_conversation(
    tuned: TunedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = Chat(tuned, SHORT)
    converse(chat, typing("count 1", "z" * 700, "count 2"))
    assert [turn.content for turn in chat.turns if turn.role == "user"] == ["count 1", "count 2"]
    assert "the model sees 512 at once" in capsys.readouterr().err


def test_ctrl_c_stops_the_answer_and_not_the_program(tuned: TunedModel, capsys: pytest.CaptureFixture[str]) -> None:
    handler, terminate = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    chat = Chat(tuned, Sampling(max_new_tokens=200))
    pieces: list[str] = []

    def write(piece: str) -> None:
        pieces.append(piece)
        assert signal.getsignal(signal.SIGTERM) is terminate  # which ends the program at once, as it always does
        if len(pieces) == 3:
            signal.raise_signal(signal.SIGINT)

    reply = chat.ask("count 3", write)
    assert reply.stopped
    assert reply.tokens < 20
    assert chat.turns[-1] == Message("assistant", reply.text)  # what was said stays said
    assert signal.getsignal(signal.SIGINT) is handler
    converse(chat, typing("^C", "/exit", "never read"))
    assert "/exit or Ctrl-D leaves" in capsys.readouterr().err


def test_a_second_ctrl_c_ends_the_program_with_everything_put_back(tuned: TunedModel) -> None:
    turns = [Message("user", "count 3"), Message("assistant", "it is 3")]
    chat = Chat(tuned, Sampling(max_new_tokens=200), turns=list(turns))

    def write(_: str) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        chat.ask_base(write)
    assert chat.turns == turns
    assert all(
        layer.A.shape[0] > 0 for layer in tuned.model.modules() if isinstance(layer, AdaptedLinear) and layer.rank
    )


def test_a_full_memory_is_a_sentence(tuned: TunedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(type(tuned.model), "generate", full)
    chat = Chat(tuned, SHORT)
    with pytest.raises(QaromaError, match="/reset"):
        chat.ask("count 3", lambda _: None)
    assert chat.turns == []


def test_sampling_follows_its_seed(tuned: TunedModel) -> None:
    def drawn(seed: int) -> str:
        return Chat(tuned, Sampling(12, temperature=5.0, top_p=0.95, seed=seed)).ask("count 3", lambda _: None).text

    assert drawn(1) == drawn(1) != drawn(2)


def test_commands_and_mistakes(tuned: TunedModel, capsys: pytest.CaptureFixture[str]) -> None:
    chat = Chat(tuned, Sampling(max_new_tokens=2))
    converse(chat, typing("/system be kind", "/nothing", "", "/etc/hosts is a path", "/help"))
    assert chat.system == "be kind"
    assert [turn.content for turn in chat.turns if turn.role == "user"] == ["/etc/hosts is a path"]
    converse(chat, typing("/reset", "/system"))
    assert (chat.system, chat.turns) == (None, [])
    err = capsys.readouterr().err
    assert "error: got /nothing; expected /reset" in err
    assert "cut off after 2 tokens; --max-new-tokens allows more" in err
    assert "Ctrl-C stops an answer" in err


def test_an_answer_that_fills_what_the_model_sees_says_so(
    tuned: TunedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = Chat(tuned, Sampling(max_new_tokens=5000))
    converse(chat, typing("count 3"))
    err = capsys.readouterr().err
    assert f"tokens; the model sees {chat.context} at once, which are full" in err
    assert "--max-new-tokens" not in err


def test_a_run_with_labels_is_refused(adapter: Path, tmp_path: Path) -> None:
    for task in ("classification", "regression"):
        growth = {**json.loads((adapter / "growth.json").read_text()), "task": task}
        (tmp_path / "growth.json").write_text(json.dumps(growth))
        with pytest.raises(QaromaError, match=f"trained for {task} and writes no text; .*qaroma evaluate"):
            open_chat(str(tmp_path))
    assert main(["chat"]) == 2


def test_a_base_without_a_run(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("count 3\n/base\n"))
    assert main(["chat", "--base", str(tiny_folder), "--device", "cpu", "--max-new-tokens", "4"]) == 0
    out, err = capsys.readouterr()
    assert out.endswith("\n")
    assert "this is the base already" in err


def test_piped_lines_give_bare_answers(
    adapter: Path, tuned: TunedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("count 3\n/exit\nnever read\n"))
    assert main(["chat", str(adapter), "--device", "cpu", "--max-new-tokens", "12"]) == 0
    assert capsys.readouterr().out == greedy(tuned, Message("user", "count 3")) + "\n"


def test_messages_and_answers_as_lines_of_json(
    adapter: Path, tuned: TunedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        '{"message": "count 3", "base": true}',
        "count 4",
        '{"message": 4}',
        '{"reset": true, "message": "count\\n5"}',
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    assert main(["chat", str(adapter), "--device", "cpu", "--max-new-tokens", "12", "--json"]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert told[0] == {"ready": True}
    assert sum("done" in line for line in told) == len(lines)
    first = told[: told.index({"done": True})]
    answers = {
        who: "".join(line.get("piece", "") for line in first if line.get("from") == who) for who in ("tuned", "base")
    }
    assert answers["tuned"] == greedy(tuned, Message("user", "count 3"))
    with adapter_off(tuned.model):
        assert answers["base"] == greedy(tuned, Message("user", "count 3"))
    assert [line["from"] for line in first if "end" in line] == ["tuned", "base"]
    assert [line["error"] for line in told if "error" in line] == [
        'got a line that is no message; expected {"message": TEXT}'
    ] * 2
    last = told[len(told) - told[-2::-1].index({"done": True}) - 1 :]
    assert "".join(line.get("piece", "") for line in last) == greedy(tuned, Message("user", "count\n5"))
