"""Every way in which a model cannot be loaded is one sentence that says what to type."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import tiny_config

from qaroma.errors import QaromaError
from qaroma.model.base import load_base, load_model_config
from qaroma.model.failures import explain, explained


class Response:
    """The least that huggingface_hub's exceptions take for an answer of the hub."""

    headers: dict[str, str] = {}  # noqa: RUF012
    request = None
    status_code = 403


def hub_error(name: str) -> Exception:
    from huggingface_hub import errors

    cls = getattr(errors, name)
    return (
        cls("it failed")
        if name in ("OfflineModeIsEnabled", "LocalEntryNotFoundError")
        else cls("no", response=Response())
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("GatedRepoError", r"gated.*https://huggingface\.co/org/model.*hf auth login"),
        ("RepositoryNotFoundError", r"neither a folder here nor a model on the hub.*hf auth login"),
        ("RevisionNotFoundError", r"no such revision.*--set model\.revision"),
        ("RemoteEntryNotFoundError", r"lacks a file.*--model"),
        ("OfflineModeIsEnabled", r"Unset HF_HUB_OFFLINE"),
        ("LocalEntryNotFoundError", r"hub cannot be reached.*--model FOLDER"),
    ],
)
def test_errors_of_the_hub(name, expected):
    error = hub_error(name)
    wrapped = OSError("transformers says something long")
    wrapped.__cause__ = error
    for raised in (error, wrapped):
        with pytest.raises(QaromaError, match=expected) as told, explained("org/model"):
            raise raised
        assert told.value.__cause__ is raised
        assert "'org/model'" in str(told.value)


@pytest.mark.parametrize("kind", ["RepositoryNotFoundError", "OfflineModeIsEnabled", "LocalEntryNotFoundError"])
def test_a_misspelt_model_is_told_what_is_like_it(kind, tmp_path, monkeypatch):
    (tmp_path / "my-llama").mkdir()
    (tmp_path / "my-llama" / "config.json").touch()
    (tmp_path / "gpt").mkdir()  # no model
    monkeypatch.chdir(tmp_path)
    for name, near in {"smollm2": "smollm2-135m", "SmolLM-135M": "smollm2-135m", "my-lama": "my-llama"}.items():
        with pytest.raises(QaromaError, match=rf"\. Did you mean {near}\?$"), explained(name):
            raise hub_error(kind)
    for name in ("gpt2", "org/my-lama"):
        with pytest.raises(QaromaError) as told, explained(name):
            raise hub_error(kind)
        assert "Did you mean" not in str(told.value)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError("We couldn't connect to 'https://huggingface.co' to load the files"), "cannot be reached"),
        (
            ValueError(
                "The checkpoint you are trying to load has model type `new` but Transformers does not recognize it"
            ),
            "pip install -U transformers",
        ),
        (ValueError("Unrecognized configuration class X for this kind of AutoModel"), "not a causal language model"),
        (OSError("x does not appear to have a file named pytorch_model.bin or model.safetensors."), "has no weights"),
        (ImportError("FlashAttention2 has been toggled on, but it cannot be used"), r"--set model\.attention=sdpa"),
        (ValueError("X does not support an attention implementation through torch's sdpa"), r"model\.attention=eager"),
    ],
)
def test_errors_of_transformers(error, expected):
    told = explain(error, "org/model")
    assert told is not None
    assert __import__("re").search(expected, str(told))


def test_an_unknown_error_passes_unchanged():
    with pytest.raises(ZeroDivisionError), explained("org/model"):
        raise ZeroDivisionError
    assert explain(KeyError("x"), "m") is None


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model in several shards, to be damaged."""
    from transformers import LlamaForCausalLM

    LlamaForCausalLM(tiny_config()).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    return tmp_path


def test_a_truncated_shard_is_named(folder):
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(QaromaError, match=rf"damaged \({shard.name}: .*Download or copy that file again"):
        load_base(folder, device="cpu")


def test_a_missing_shard(folder):
    sorted(folder.glob("*.safetensors"))[1].unlink()
    with pytest.raises(QaromaError, match=r"Download or copy it again"):
        load_base(folder, device="cpu")


def test_missing_tensors_are_not_filled_with_noise(folder):
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text(encoding="utf-8"))
    gone = "model.layers.1.mlp.down_proj.weight"
    from safetensors.torch import load_file, save_file

    shard = folder / content["weight_map"].pop(gone)
    tensors = load_file(shard)
    del tensors[gone]
    save_file(tensors, shard, metadata={"format": "pt"})
    index.write_text(json.dumps(content), encoding="utf-8")
    for quantization in ("nf4", "none"):
        with pytest.raises(QaromaError, match=rf"lacks 1 of its model's tensors \({gone}\)"):
            load_base(folder, device="cpu", quantization=quantization)


def test_tensors_of_another_shape_are_refused_whatever_put_them_there():
    from transformers import LlamaForCausalLM

    from qaroma.model.complete import require_shapes

    network = LlamaForCausalLM(tiny_config(tie_word_embeddings=False))
    require_shapes("m", network)
    for module, shape in ((network.model.embed_tokens, (500, 64)), (network.model.layers[0].mlp.up_proj, (128, 32))):
        whole, module.weight = module.weight, torch.nn.Parameter(torch.zeros(shape))
        with pytest.raises(QaromaError, match=f"{shape[0]} x {shape[1]}, expected"):
            require_shapes("m", network)
        module.weight = whole


def test_weights_of_another_shape(folder):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 500}), encoding="utf-8")
    with pytest.raises(QaromaError, match=r"do not have the shapes that its config\.json says"):
        load_base(folder, device="cpu")


def test_no_weights_at_all(folder):
    for path in folder.glob("model*"):
        path.unlink()
    with pytest.raises(QaromaError, match="has no weights"):
        load_base(folder, device="cpu")


def test_a_folder_without_or_with_a_damaged_config(folder):
    (folder / "config.json").write_text('{"model_type": ', encoding="utf-8")
    with pytest.raises(QaromaError, match="damaged JSON file"):
        load_model_config(folder)
    (folder / "config.json").write_text('{"model_type": "no_such_kind"}', encoding="utf-8")
    with pytest.raises(QaromaError, match="pip install -U transformers"):
        load_model_config(folder)
    (folder / "config.json").unlink()
    with pytest.raises(QaromaError, match=r"has no config\.json"):
        load_base(folder, device="cpu")


def test_an_encoder_is_not_a_causal_model(tmp_path):
    from transformers import T5Config

    T5Config(d_model=64, d_ff=64, num_layers=1, num_heads=2, vocab_size=64).save_pretrained(tmp_path)
    with pytest.raises(QaromaError, match="not a causal language model"):
        load_base(tmp_path, device="cpu")


REMOTE = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
Path({marker!r}).touch()
from transformers import PretrainedConfig
class Config(PretrainedConfig):
    model_type = "brought_along"
"""


def test_remote_code_runs_only_when_it_was_allowed(tmp_path, monkeypatch):
    marker, folder = tmp_path / "ran", tmp_path / "model"
    folder.mkdir()
    (folder / "code.py").write_text(REMOTE.format(marker=str(marker)), encoding="utf-8")
    config = {"model_type": "brought_along", "auto_map": {"AutoConfig": "code.Config"}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(QaromaError, match=r"brings Python code of its own.*--trust-remote-code"):
        load_model_config(folder)
    with pytest.raises(QaromaError, match="--trust-remote-code"):
        load_base(folder, device="cpu")
    assert not marker.exists()
    assert load_model_config(folder, trust_remote_code=True).model_type == "brought_along"
    assert marker.exists()


def test_a_known_model_that_brings_code_is_loaded_without_it(tiny_folder, tmp_path):
    marker, folder = tmp_path / "ran", tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (folder / "code.py").write_text(REMOTE.format(marker=str(marker)), encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    model = load_base(folder, device="cpu", compute_dtype=torch.float32)
    assert type(model).__module__.startswith("transformers.models.llama")
    assert not marker.exists()
