"""Models with a learnt vector for each position: what is longer is refused in a sentence, wherever it comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config
from transformers import AutoModelForCausalLM, BertConfig, GPT2Config, OPTConfig, RobertaConfig

from qaroma.cli import main
from qaroma.data.forms import Message
from qaroma.data.templates import Template
from qaroma.errors import QaromaError
from qaroma.inference.generate import generate
from qaroma.model.base import load_base
from qaroma.model.positions import learnt_positions
from qaroma.model.skeleton import skeleton

SIZES: dict[str, Any] = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT2 = GPT2Config(
    vocab_size=512, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2, pad_token_id=2
)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (GPT2, 64),
        (OPTConfig(**SIZES, ffn_dim=128, word_embed_proj_dim=64, max_position_embeddings=64), 64),
        (BertConfig(**SIZES, intermediate_size=128, max_position_embeddings=64), 64),
        (RobertaConfig(**SIZES, intermediate_size=128, max_position_embeddings=66, pad_token_id=1), 64),
        (tiny_config(), None),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_the_positions_that_there_are(config: Any, expected: int | None) -> None:
    labelled = config.model_type in ("bert", "roberta")
    network = skeleton(config, classifier=labelled)
    assert learnt_positions(network) == expected
    if expected is not None:  # the last one exists, and none behind it
        with torch.device("cpu"):
            real = type(network)(config).eval()
        real(input_ids=torch.full((1, expected), 7))
        with pytest.raises((IndexError, RuntimeError)):
            real(input_ids=torch.full((1, expected + 1), 7))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    AutoModelForCausalLM.from_config(GPT2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_an_input_that_is_too_long_is_refused_by_the_model_and_by_its_trunk(gpt2: Path) -> None:
    model = load_base(gpt2, device="cpu")
    ids = torch.full((2, 65), 7)
    model(input_ids=ids[:, :64])
    for network in (model, model.base_model):
        for call in ({"input_ids": ids}, {"inputs_embeds": torch.zeros(1, 65, 64)}):
            with pytest.raises(QaromaError, match=r"an input of 65 tokens; '.*gpt2' has 64 positions"):
                network(**call)


def test_an_answer_ends_with_the_positions(gpt2: Path, tokenizer: Any) -> None:
    model = load_base(gpt2, device="cpu", compute_dtype=torch.float32)
    template = Template.choose(tokenizer, "plain", "template")
    turns = [Message("user", "count the letters of a word")]
    prompt = len(template.encode_prompt(tokenizer, turns))
    (short,) = generate(model, tokenizer, template, [turns], max_new_tokens=64 - prompt + 1)
    (long,) = generate(model, tokenizer, template, [turns], max_new_tokens=500)
    assert short == long != ""


def test_rows_that_are_too_long_are_found_before_training(
    gpt2: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "the mill " * (60 if n % 4 == 0 else 3), "completion": "a word"} for n in range(40)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    typed = ["finetune", "--data", str(data), "--device", "cpu", "--dry-run", "--output", str(tmp_path / "run")]
    assert main([*typed, "--model", str(gpt2), "--max-length", "256"]) == 2
    said = capsys.readouterr().err
    assert "10 examples have more tokens than the 64 positions of" in said
    assert "type --max-length 64, and --on-too-long truncate to keep them" in said
    assert main([*typed, "--model", str(gpt2), "--max-length", "64"]) == 0
    capsys.readouterr()
    short = tmp_path / "short"
    short.mkdir()
    for file in tiny_folder.iterdir():
        (short / file.name).write_bytes(file.read_bytes())
    config = json.loads((short / "config.json").read_text(encoding="utf-8"))
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}), encoding="utf-8")
    assert main([*typed, "--model", str(short), "--max-length", "256"]) == 0  # computed positions go on
    assert "10 examples have more tokens than the 64 that the model was made for" in "".join(capsys.readouterr())
