"""`qaroma finetune --adapter DIR`: growing on from a saved adapter, qaroma's own or PEFT's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_training import make_config, session_of

from qaroma.cli import main
from qaroma.config.schema import Config
from qaroma.errors import QaromaError
from qaroma.export.subject import open_subject
from qaroma.runs.adapter_info import AdapterInfo
from qaroma.training.finetune import finetune

QUIET = Console(quiet=True)


def config_with(adapter: Path, model: Path, data: Path, output: Path | None, **changes) -> Config:
    config = make_config(model, data, output, training__max_steps=12, growth__eps_out=1e-9, **changes)
    config.model.adapter = str(adapter)
    return config


@pytest.fixture(scope="module")
def theirs(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that PEFT made: rsLoRA of two ranks, on some modules only."""
    from peft import LoraConfig, get_peft_model

    from qaroma.model.base import load_base

    torch.manual_seed(2)
    settings = {"r": 3, "lora_alpha": 5, "use_rslora": True, "rank_pattern": {"v_proj": 2}}
    model = load_base(tiny_folder, compute_dtype=torch.float32, device="cpu")
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], **settings))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("peft") / "theirs"
    wrapped.save_pretrained(folder)
    return folder


def test_a_peft_adapter_is_the_first_frozen_component(
    theirs: Path, tiny_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    from qaroma.model.base import load_base

    ids = torch.arange(3, 30)[None]
    base = load_base(tiny_folder, compute_dtype=torch.float32, device="cpu")
    with torch.no_grad():
        wanted = PeftModel.from_pretrained(base, theirs).eval()(input_ids=ids).logits
    session = session_of(config_with(theirs, tiny_folder, data_file, None), tmp_path)
    with torch.no_grad():
        found = session.model.eval()(input_ids=ids).logits
    assert torch.allclose(found, wanted, atol=1e-5)  # new components start at zero
    layers = session.method.adapter.layers
    assert layers["model.layers.1.self_attn.v_proj"].components == [2]
    assert layers["model.layers.1.self_attn.v_proj"].rank == 3
    assert layers["model.layers.1.mlp.up_proj"].components == []
    # The weight that eq. 6 compares with is W0 and what is frozen on it.
    name = "model.layers.0.mlp.down_proj"
    weight = session.method._weight_norm_sq[session.method._rows[name]].item()
    A, B = layers[name].frozen_factors()
    from qaroma.method.dequantise import dense_weight

    assert weight == pytest.approx(float((dense_weight(layers[name].base, torch.float32) + B.T @ A).square().sum()))


def test_a_run_grows_on_and_keeps_what_was_loaded(
    theirs: Path, tiny_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    finetune(config_with(theirs, tiny_folder, data_file, run), console=QUIET)
    components = AdapterInfo.read(run / "adapter_last").components
    assert components["model.layers.0.self_attn.q_proj"][0] == 3
    assert len(components["model.layers.0.self_attn.q_proj"]) > 1
    first = open_subject(run / "adapter_last").update["model.layers.0.self_attn.q_proj"].A[:3]
    from safetensors.torch import load_file

    loaded = load_file(theirs / "adapter_model.safetensors")
    assert torch.equal(first, loaded["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"])
    # Once more, from what that left: every component is taken over.
    again = session_of(config_with(run / "adapter_last", tiny_folder, data_file, None), tmp_path)
    for name, layer in again.method.adapter.layers.items():
        assert layer.components == components[name], name


def test_a_killed_run_with_an_adapter_goes_on(theirs: Path, tiny_folder: Path, data_file: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finetune(config_with(theirs, tiny_folder, data_file, whole), console=QUIET)
    finetune(config_with(theirs, tiny_folder, data_file, cut), console=QUIET)
    checkpoints = sorted((cut / "checkpoints").iterdir())
    assert len(checkpoints) > 1
    for step in checkpoints[1:]:
        shutil.rmtree(step)
    shutil.rmtree(cut / "adapter_last")  # it holds what the resumed run is to find again
    resumed = Config.model_validate({"output": str(cut)})
    finetune(resumed, resume=True, console=QUIET)
    name = "adapter_last/adapter_model.safetensors"
    assert (whole / name).read_bytes() == (cut / name).read_bytes()


def test_what_cannot_be_gone_on_from(theirs: Path, tiny_folder: Path, data_file: Path, tmp_path: Path) -> None:
    with pytest.raises(QaromaError, match=r"holds no PEFT adapter"):
        session_of(config_with(tmp_path, tiny_folder, data_file, None), tmp_path)
    narrow = config_with(theirs, tiny_folder, data_file, None, growth__target_modules=["q_proj", "v_proj"])
    with pytest.raises(QaromaError, match=r"down_proj and others, which is not among the target modules of this run"):
        session_of(narrow, tmp_path)
    dora = tmp_path / "dora"
    shutil.copytree(theirs, dora)
    told = json.loads((dora / "adapter_config.json").read_text())
    (dora / "adapter_config.json").write_text(json.dumps({**told, "use_dora": True}))
    with pytest.raises(QaromaError, match="is DoRA; expected a plain LoRA"):
        session_of(config_with(dora, tiny_folder, data_file, None), tmp_path)


def test_the_flag(theirs: Path, tiny_folder: Path, data_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["finetune", "--model", str(tiny_folder), "--adapter", str(theirs), "--data", str(data_file)]
    arguments += ["--output", str(run), "--max-steps", "4", "--device", "cpu"]
    assert main(arguments) == 0
    assert AdapterInfo.read(run / "adapter").components["model.layers.0.self_attn.q_proj"][0] == 3
