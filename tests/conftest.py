"""Fixtures that every test shares: a tiny random Llama and a tokenizer trained on the spot."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

# Before torch is imported, here and in every process that a test starts: the models are so tiny that
# a second thread only waits, and waits long where the cores are shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What the tests' tokenizer is trained on: words that their rows use, some prose and some code.
TEXT = '''
The module keeps the state of a run, and the run keeps the state of every module.
A question has an answer, and the answer to a question is a word or a number.
count one and it is one; count two and it is two; count the letters of a word, and it is done.
What is the colour of the sea? It is blue where it is deep, and green where it is not.
How many steps are there in a day? There are as many steps as there are stones on the way to the mill.
The river comes from the hills, turns the wheel of the mill, and goes on to the sea.
In the morning the miller counts the sacks that stand at the door, and writes the number in a book.
In the evening he counts them again; where the number is not the same, he asks who has taken one.
The first sentence of a text says what it is about, the others say why, and the last one says what follows.
Something that is measured can be compared, and something that is compared can be said to be better or worse.
An instruction tells what to do, an input what to do it with, and an output what has come of it.
the same text or other words, the left and the right, the first and the second, the old and the new

class Module:
    def __init__(self, name: str, state: dict[str, float]) -> None:
        self.name, self.state = name, state

    def forward(self, values: list[float]) -> list[float]:
        """Return what the module makes of the values."""
        if not self.state:
            return values
        return [self.state[self.name] * value for value in values]

    def count(self) -> int:
        return len(self.state)

def test(module: Module, inputs: list[float], outputs: list[float]) -> bool:
    for value, output in zip(module.forward(inputs), outputs, strict=True):
        if abs(value - output) > 1e-6:
            return False
    return True
'''
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_configure(config: pytest.Config) -> None:
    """Tests that do not ask for a card see none, so that they say the same on every machine, however small its card."""
    wanted = re.sub(r"not gpu\b", "", config.option.markexpr)
    if "gpu" not in wanted:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)


def tiny_tokenizer():
    """Byte-level BPE with 512 tokens, a ChatML template, and pad equal to eos."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(TEXT.splitlines(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=CHATML
    )


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


def tiny_config(**changes):
    from transformers import LlamaConfig

    sizes = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "eos_token_id": 2,
        "bos_token_id": None,
        "pad_token_id": 2,
        "tie_word_embeddings": True,
    }
    return LlamaConfig(**{**sizes, **changes})


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    """A saved tiny Llama (fp32) with its tokenizer, as a user's local folder would be."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    LlamaForCausalLM(tiny_config()).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_model():
    """A tiny fp32 Llama, not quantised."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(1)
    return LlamaForCausalLM(tiny_config()).eval()


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty short questions whose answers follow a rule, of several lengths."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"instruction": f"count {n} " + "x" * (n % 7), "output": f"it is {n % 5}"} for n in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    """A tiny random BERT without a head, as an encoder on the hub is."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    config = BertConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, pad_token_id=2,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train and dev files; a pair is of class 'same' where both texts have one word in common."""
    folder = tmp_path_factory.mktemp("data") / "pairs"
    folder.mkdir()
    words = ["return", "self", "module", "state"]
    for name, count in (("train", 64), ("dev", 23)):
        rows = [
            {"sentence1": f"a {words[n % 4]}", "sentence2": f"the {words[(n // 4) % 4]} " + "x " * (n % 5),
             "label": "same" if n % 4 == (n // 4) % 4 else "other"}
            for n in range(count)
        ]  # fmt: skip
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty questions with the answer that a rule gives, and another one, of several lengths."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [
        {"prompt": f"count {n} " + "x" * (n % 7), "chosen": f"it is {n % 5}", "rejected": f"it is not {n % 3} " * 2}
        for n in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
