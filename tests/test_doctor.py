"""The doctor: each thing that can be wrong, broken one at a time; then this machine as it is."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from qaroma.cli import main
from qaroma.doctor import checks, machine
from qaroma.doctor.checks import Card, Finding

GIB = 2**30
CARD = Card("RTX 4060", 7 * GIB, 8 * GIB)


@pytest.mark.parametrize(
    ("finding", "level", "says"),
    [
        (checks.python("3.12.1", ">=3.10"), "ok", "3.12.1"),
        (checks.python("3.9.18", ">=3.10"), "problem", "Python >=3.10"),
        (checks.extras({"export": [], "bench": []}), "ok", "export, bench"),
        (checks.extras({"export": ["peft"], "bench": []}), "note", 'pip install "qaroma[export]"'),
        (checks.cuda(None, 0, None, None, "Linux"), "ok", "no NVIDIA driver"),
        (checks.cuda("12.8", 1, "570.1", None, "Linux"), "ok", "driver 570.1"),
        (checks.cuda(None, 0, "580.95", None, "Linux"), "problem", "--force-reinstall torch"),
        (
            checks.cuda(None, 0, "580.95", None, "Windows"),
            "problem",
            "torch --index-url https://download.pytorch.org/whl/cu130",
        ),
        (checks.cuda(None, 0, "570.1", None, "Linux"), "problem", "whl/cu126"),
        (checks.cuda("12.8", 0, "470.1", None, "Linux"), "problem", "update the driver to one for CUDA 12.8"),
        (checks.cuda("13.0", 0, "570.1", None, "Windows"), "problem", "for the driver that is there type: pip install"),
        (checks.cuda("12.8", 0, "570.1", "-1", "Linux"), "problem", "unset it"),
        (checks.gpu(CARD), "ok", "RTX 4060, 7.0 GiB of 8.0 GiB"),
        (checks.gpu(Card("RTX 4060", 2 * GIB, 8 * GIB)), "note", "6.0 GiB are held by other programs; nvidia-smi"),
        (checks.gpu(None), "note", "fine for SmolLM2 (135M), not for an 8B model"),
        (checks.gpus([CARD, CARD], None), "ok", "2 x RTX 4060 with 8.0 GiB"),
        (checks.gpus([CARD, Card("T4", 15 * GIB, 15 * GIB)], None), "note", "they differ: a run on all waits"),
        (checks.gpus([CARD, Card("RTX 4060", 2 * GIB, 8 * GIB)], 2), "note", "GPU 1: 6.0 GiB are held"),
        (checks.gpus([CARD, CARD], 4), "problem", "2 x RTX 4060 with 8.0 GiB; expected 4 type --gpus 2"),
        (checks.gpus([], 2), "problem", "none; expected 2 leave --gpus out"),
        (checks.nccl("2.27.5"), "ok", "2.27.5"),
        (checks.nccl(None), "note", "finetune --gpus needs it"),
        (checks.peers([]), "ok", "between all"),
        (checks.peers([(0, 1), (0, 2)]), "note", "none between GPUs 0 and 1, 0 and 2"),
        (checks.bf16(True, True), "ok", "hardware"),
        (checks.bf16(True, False), "note", "--set model.compute_dtype=fp32"),
        (checks.bf16(False, False), "note", "slow"),
        (checks.nf4("cpu", 0.09, 1e-6), "ok", "9.0%"),
        (checks.nf4("cuda:0", 0.0, 0.0), "problem", "reinstall"),  # nothing was quantised
        (checks.nf4("cuda:0", 1.0, 1.0), "problem", "reinstall"),  # zeros
        (checks.nf4("cuda:0", 0.09, 0.5), "problem", "wrong"),
        (checks.nf4("cuda:0", float("nan"), float("nan")), "problem", "wrong"),
        (
            checks.attention("cuda:0", ["flash", "efficient", "math"], True, True),
            "ok",
            "packed sequences in one kernel",
        ),
        (
            checks.attention("cuda:0", ["efficient", "math"], False, False),
            "ok",
            "a kernel each; none takes grouped key heads: they are repeated",
        ),
        (checks.attention("cuda:0", ["math"], False, False), "note", "square of the context"),
        (checks.attention("cuda:0", [], False, False), "problem", "model.attention=eager"),
        (checks.host_memory(8 * GIB, 16 * GIB), "ok", "8.0 GiB of 16.0 GiB"),
        (checks.host_memory(1 * GIB, 16 * GIB), "problem", "close other programs"),
        (checks.disk("runs", "/home", 50 * GIB, True), "ok", "50.0 GiB free in /home"),
        (checks.disk("models", "/cache", 5 * GIB, True), "note", "HF_HOME"),
        (checks.disk("models", "/cache", GIB // 2, True), "problem", "make room, or set HF_HOME"),
        (checks.disk("runs", "/home", GIB // 2, True), "problem", "make room, or work in a folder on another disk"),
        (checks.disk("runs", "/home", 50 * GIB, False), "problem", "permissions"),
        (checks.hub(True, False), "ok", "offline mode"),
        (checks.hub(False, True), "ok", "reachable"),
        (checks.hub(False, False), "note", "smollm2-135m work without it"),
        (checks.login(False, True, None), "note", "hf auth login"),
        (checks.login(True, True, "ada"), "ok", "as ada"),
        (checks.login(True, True, None), "problem", "refuses the stored token"),
        (checks.login(True, False, None), "ok", "not checked"),
        (checks.failed("torch", OSError("libcudart.so.12: no such file"), "reinstall"), "problem", "libcudart.so.12"),
    ],
)
def test_each_fact_is_judged_and_says_what_to_do(finding: Finding, level: str, says: str) -> None:
    assert finding.level == level
    assert says in f"{finding.found} {finding.advice}"
    assert finding.advice or level != "problem"


@pytest.mark.parametrize(
    ("version", "level", "says"),
    [
        ("5.2.0", "ok", "within the tested range"),
        ("5.23.9", "ok", "within the tested range"),
        ("4.57.1", "problem", 'pip install "transformers>=5.0"'),
        (None, "problem", "not installed; expected >=5.0"),
        ("5.24.0", "note", "pip install transformers==5.23.0"),
        ("6.0.0.dev0", "note", "newer than 5.23.0"),
    ],
)
def test_versions_beside_the_tested_ones(version: str | None, level: str, says: str) -> None:
    wanted = [Requirement("transformers>=5.0"), Requirement("torch>=2.8")]
    installed = {"transformers": version, "torch": "2.13.0+cu128"}
    (finding,) = checks.versions(wanted, installed, {"transformers": "5.23.0", "torch": "2.13.0"})
    assert finding.level == level
    assert says in f"{finding.found} {finding.advice}"


def test_the_tested_versions_are_the_constraints_that_come_with_qaroma(tmp_path: Path) -> None:
    tested = machine.tested_versions(machine.shipped_folder() / "constraints.txt")
    assert {"torch", "transformers", "bitsandbytes"} <= set(tested)
    assert machine.tested_versions(tmp_path / "none.txt") == {}


def test_bitsandbytes_really_quantises_and_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    from qaroma.model.bnb import bnb

    error, packed = machine.nf4_errors(torch.device("cpu"))
    assert 0.08 < error < 0.11
    assert packed < 1e-3
    monkeypatch.setattr(bnb, "matmul_4bit", lambda x, w, quant_state: torch.zeros(16, 256))
    assert machine._bitsandbytes().level == "problem"


def test_some_attention_kernel_runs_here() -> None:
    assert "math" in machine.attention_kernels(torch.device("cpu"))


def test_this_machine_has_no_problem_that_stops_the_tests() -> None:
    start = time.perf_counter()
    findings = machine.examine()
    assert time.perf_counter() - start < 20
    names = [finding.name for finding in findings]
    assert {"Python", "torch", "CUDA", "GPU", "bf16", "bitsandbytes", "attention", "hub", "hub login"} <= set(names)
    judged = {finding.name: finding.level for finding in findings}
    assert judged["torch"] == judged["bitsandbytes"] == judged["Python"] == "ok"
    assert "offline mode" in next(finding.found for finding in findings if finding.name == "hub")


def test_several_gpus_are_looked_at_where_there_are_several_or_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine._several_gpus(None) == []
    assert [finding.found for finding in machine._several_gpus(2)] == ["none; expected 2"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"card {index > 0}")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (8 * GIB, 8 * GIB))
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: (one, other) != (2, 1))
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
    for there, version in ((True, "2.27.5"), (False, "torch has none")):
        monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda there=there: there)
        assert [finding.found for finding in machine._several_gpus(None)] == [
            "1 x card False with 8.0 GiB, 2 x card True with 8.0 GiB",
            version,
            "none between GPUs 1 and 2",
        ]


def test_a_torch_that_cannot_be_imported_is_one_line_and_the_others_are_still_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    broken = next(index for index, line in enumerate(lines) if line.startswith("problem"))
    assert "torch" in lines[broken]
    assert "--force-reinstall" in lines[broken + 1]
    assert not any("bitsandbytes  " in line for line in lines)
    assert any("disk for runs" in line for line in lines)
    assert lines[-1].startswith("1 problem,")


def test_a_check_that_fails_is_a_problem_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def busy() -> Finding:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable")

    monkeypatch.setattr(machine, "_gpu", busy)
    finding = next(finding for finding in machine.examine() if finding.name == "GPU")
    assert finding.level == "problem"
    assert "busy or unavailable" in finding.found
    assert "nvidia-smi" in finding.advice


@pytest.mark.parametrize(("level", "code"), [("ok", 0), ("note", 0), ("problem", 1)])
def test_the_exit_code_says_whether_there_is_a_problem(
    level: checks.Level, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "examine", lambda gpus: [Finding("disk", level, "full", "make room")])
    assert main(["doctor", "--json"]) == code
    figures = json.loads(capsys.readouterr().out)
    assert figures["ok"] == (code == 0)
    assert figures["checks"] == [{"name": "disk", "level": level, "found": "full", "advice": "make room"}]
    assert main(["doctor"]) == code
    assert "-> make room" in capsys.readouterr().out
