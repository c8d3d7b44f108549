"""A tokenizer.json from elsewhere ends in tokens or in a sentence, soon."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from qaroma.data import tokens
from qaroma.data.tokens import token_ids
from qaroma.errors import QaromaError
from qaroma.model.base import load_tokenizer


def replace(pattern: str, content: str, kind: str = "Regex") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(steps)}


def split(expression: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


def added(content: str, number: int = 2) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "special"), False)
    return {"id": number, "content": content, "normalized": True, **flags}


def folder_of(place: Path, **parts: Any) -> Path:
    """A model's folder whose tokenizer knows one word, and has ``parts``."""
    model = {"type": "WordLevel", "vocab": {"a": 0, "?": 1}, "unk_token": "?"}
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"), None)
    file = {"version": "1.0", "added_tokens": [], **empty, "model": model, **parts}
    (place / "tokenizer.json").write_text(json.dumps(file))
    (place / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (place / "config.json").write_text('{"model_type": "llama"}')
    return place


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"normalizer": replace("(a+)+$", ""), "added_tokens": [added("a" * 500 + "!")]}, "the regular expression"),
        ({"normalizer": replace("a*a*$", "")}, "the regular expression"),
        ({"decoder": replace("(?:a|aa)+$", "")}, "the regular expression"),
        ({"normalizer": sequence(*[replace("a", "aa", "String")] * 40)}, "1.1e[+]12 times as long"),
        ({"normalizer": sequence(*[{"type": "ByteLevel"}] * 40)}, "1.1e[+]12 times as long"),
        ({"normalizer": replace("", "x" * 9999)}, "times as long"),
        ({"normalizer": sequence(*[{"type": "NFC"}] * 99)}, "100 parts"),
        ({"added_tokens": [added("x" * 10_000)]}, "an added token of 10000 characters"),
        ({"added_tokens": [added(f"{n:0500}", n + 2) for n in range(10_000)]}, "added tokens of 5e[+]06 characters"),
        ({"added_tokens": [{"content": 1}]}, "cannot be read"),
        ({"pre_tokenizer": split("(((")}, "cannot be read"),
    ],
)
def test_what_could_take_for_ever_to_load_is_not_loaded(parts: dict[str, Any], words: str, tmp_path: Path) -> None:
    began = time.process_time()
    with pytest.raises(QaromaError, match=words):
        load_tokenizer(folder_of(tmp_path, **parts))
    assert time.process_time() - began < 5


def test_other_names_of_the_file_are_looked_at_and_stay_in_the_folder(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    file = folder / "tokenizer.json"
    worse = json.loads(file.read_text()) | {"normalizer": replace("(a+)+$", "")}
    (folder / "tokenizer.4.0.json").write_text(json.dumps(worse))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "fast_tokenizer_files": ["tokenizer.4.0.json"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(QaromaError, match="the regular expression"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text('{"fast_tokenizer_files": ["../tokenizer.4.0.json"]}')
    with pytest.raises(QaromaError, match="outside its folder"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("expression", "words"), [("(a+)+$", "retry-limit"), ("a*a*$", "more than 0 seconds")], ids=["panic", "time"]
)
def test_splitting_a_text_has_an_end(
    expression: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(folder_of(tmp_path, pre_tokenizer=split(expression)))
    if "seconds" in words:
        monkeypatch.setattr(tokens, "_SECONDS", 0.1)
    with pytest.raises(QaromaError, match=words):
        token_ids(tokenizer, ["a" * 700 + "!"])
    assert token_ids(tokenizer, ["a"]) == [[0]]


def test_a_text_that_grows_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(folder_of(tmp_path, normalizer=replace("a", "x" * 4000, "String")))
    monkeypatch.setattr(tokens, "_BYTES", 20 << 20)
    with pytest.raises(QaromaError, match=r"more than \d+ MiB of memory"):
        token_ids(tokenizer, ["a" * 20_000])


def test_what_public_tokenizers_do_is_let_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_AT_ONCE", 1000)
    usual = sequence(
        {"type": "Prepend", "prepend": "▁"},
        replace(" ", "▁", "String"),
        *(
            replace(expression, " ")
            for expression in (" {2,}", r"\s+", r"[!\"#$%&'()*+,\-./:;\[\\\]]", r"\p{Mn}", "\n")
        ),
    )
    tokenizer = load_tokenizer(folder_of(tmp_path, normalizer=usual, added_tokens=[added("<x>")]))
    many = ["a"] * 3 + ["a" * 1000] * 2  # in three parts
    assert token_ids(tokenizer, many) == [[1]] * 5
