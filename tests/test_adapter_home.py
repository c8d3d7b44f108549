"""What an adapter remembers: read back whole, without torch, from 0.1.0 too, and out of a checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_training import make_config, session_of

from qaroma.errors import QaromaError
from qaroma.export.exporter import Options, export
from qaroma.method.attach import attach
from qaroma.model.base import fingerprint, load_base
from qaroma.runs.adapter import load_adapter, save_adapter
from qaroma.runs.adapter_info import AdapterInfo, BaseInfo, TaskInfo
from qaroma.runs.checkpoint import Checkpoint, adapter_in, load_newest, save_checkpoint
from qaroma.training.fit import FitState, accumulate, save_state

WRITTEN_BY_0_1_0 = Path(__file__).parent / "growth_0.1.0.json"


def whole_info() -> AdapterInfo:
    base = BaseInfo("org/x", "v1", "ab12", "nf4", True, "auto", "fp4", "eager", True)
    task = TaskInfo("classification", None, ("no", "yes"), "f1", 128, ("score",))
    return AdapterInfo({"a.b": [1, 1], "a.c": []}, 1, 2.0, "aroma", 40, base, task, {"t_in": 6})


def test_it_comes_back_as_it_was(tmp_path: Path) -> None:
    info = whole_info()
    info.write(tmp_path)
    assert AdapterInfo.read(tmp_path) == info
    assert info.ranks() == {"a.b": 2, "a.c": 0}
    assert (info.task.outputs, TaskInfo("regression").outputs, TaskInfo().outputs) == (2, 1, None)


def test_an_adapter_of_0_1_0_still_opens(tiny_folder: Path, tmp_path: Path) -> None:
    model = load_base(tiny_folder, quantization="none", compute_dtype=torch.float32, device="cpu")
    adapter = attach(model, inner_rank=1, alpha=2.0)
    for layer in adapter.layers.values():
        layer.load_factors(torch.randn(2, layer.in_features), torch.randn(2, layer.out_features), [1, 1])
    save_adapter(adapter, tmp_path, base=str(tiny_folder))
    told = json.loads(WRITTEN_BY_0_1_0.read_text(encoding="utf-8"))
    told["components"] = {name: [1, 1] for name in adapter.layers}
    told["base"]["fingerprint"] = fingerprint(model)
    (tmp_path / "growth.json").write_text(json.dumps(told), encoding="utf-8")
    info = AdapterInfo.read(tmp_path)
    assert (info.method, info.step, info.alpha, info.task.kind) == ("aroma", 12, 2.0, "causal-lm")
    assert info.base is not None
    assert (info.base.compute_dtype, info.base.attention, info.base.needs_remote_code) == ("fp32", "sdpa", False)
    again = load_base(tiny_folder, quantization="none", compute_dtype=torch.float32, device="cpu")
    load_adapter(again, tmp_path)
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_what_cannot_be_read_is_said_in_words(tmp_path: Path) -> None:
    with pytest.raises(QaromaError, match=r"has no growth\.json.*; give a run directory"):
        AdapterInfo.read(tmp_path)
    for text in (
        "{",
        "[]",
        '{"version": 2}',
        '{"version": 2, "components": {}, "inner_rank": 1, "alpha": 1, "base": 3}',
    ):
        (tmp_path / "growth.json").write_text(text)
        with pytest.raises(QaromaError, match=r"growth\.json is damaged .*; copy the adapter again"):
            AdapterInfo.read(tmp_path)
    (tmp_path / "growth.json").write_text('{"version": 99}')
    with pytest.raises(QaromaError, match="has version 99, this qaroma reads up to 2; upgrade qaroma"):
        AdapterInfo.read(tmp_path)


def test_it_is_read_without_torch(tmp_path: Path) -> None:
    whole_info().write(tmp_path)
    code = (
        "import sys; from qaroma.runs.adapter_info import AdapterInfo; "
        f"AdapterInfo.read({str(tmp_path)!r}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("method", ["aroma", "lora", "peft-lora", "adalora"])
def test_a_checkpoint_holds_the_adapter_that_the_model_had(
    tiny_folder: Path, data_file: Path, tmp_path: Path, method: str
) -> None:
    session = session_of(make_config(tiny_folder, data_file, None, method=method, rank=2), tmp_path)
    session.run.create("")
    for _ in range(3):
        batch = session.task.collate(session.train[:4])
        accumulate(session, [batch])
        session.method.step()
    info, update = adapter_in(Path(save_state(session, FitState(step=3))))
    assert info == session.info(3)
    assert info.method == method
    for name, factors in session.method.factors().items():
        for mine, theirs in zip(update[name], factors, strict=True):
            assert torch.equal(mine, theirs), name


def test_a_checkpoint_of_a_method_of_peft_is_exported(tiny_folder: Path, data_file: Path, tmp_path: Path) -> None:
    session = session_of(make_config(tiny_folder, data_file, None, method="peft-lora", rank=2), tmp_path)
    session.run.create("")
    accumulate(session, [session.task.collate(session.train[:4])])
    session.method.step()
    path = save_state(session, FitState(step=1))
    (one,) = export(path, ["padded"], output=tmp_path / "out", options=Options(), device="cpu")
    assert one.test is not None
    assert one.test.passed


def saved(folder: Path, step: int) -> Path:
    values = {"fit": {"best": 0.1, "step": step}, "method": {"name": "aroma", 3: "a key that JSON turns into text"}}
    checkpoint = Checkpoint(step, {"method.a": torch.arange(4.0)}, values)
    return save_checkpoint(folder, checkpoint, fingerprint="f")


@pytest.mark.parametrize("change", [{"step": 3}, {"base": "g"}, {"values": {}}, {"version": 1}, {"more": 1}])
def test_the_digest_holds_every_value(tmp_path: Path, change: dict) -> None:
    saved(tmp_path, 1)
    state = saved(tmp_path, 2) / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), **change}))
    found, warnings = load_newest(tmp_path, fingerprint="f")
    assert found is not None
    assert found.step == 1
    assert "step-00000002 is damaged" in warnings[0]


def test_a_checkpoint_of_0_1_0_is_refused_in_words_unless_it_is_damaged(tmp_path: Path) -> None:
    import hashlib

    path = saved(tmp_path, 2)
    told = json.loads((path / "state.json").read_text())
    digest = hashlib.sha256((path / "state.safetensors").read_bytes()).hexdigest()
    (path / "state.json").write_text(json.dumps({**told, "version": 1, "sha256": digest}))
    words = r"written by qaroma 0\.1\.0, .*pip install qaroma==0\.1\.0.*begin it anew with another --output"
    with pytest.raises(QaromaError, match=words):
        load_newest(tmp_path, fingerprint="f")
    with pytest.raises(QaromaError, match=words):
        adapter_in(path)
    (path / "state.json").write_text(json.dumps({**told, "version": 1, "sha256": "0"}))
    assert load_newest(tmp_path, fingerprint="f")[0] is None


def test_an_adapter_that_does_not_fit_what_it_says_is_damaged(tiny_folder: Path, tmp_path: Path) -> None:
    adapter = attach(load_base(tiny_folder, quantization="none", compute_dtype=torch.float32, device="cpu"))
    save_adapter(adapter, tmp_path)
    info = AdapterInfo.read(tmp_path)
    name = next(iter(info.components))
    replace(info, components={**info.components, name: [4]}).write(tmp_path)
    fresh = load_base(tiny_folder, quantization="none", compute_dtype=torch.float32, device="cpu")
    with pytest.raises(QaromaError, match=r"is damaged: .* has rank 1, growth\.json says 4; copy the adapter again"):
        load_adapter(fresh, tmp_path)
