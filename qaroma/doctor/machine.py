"""Looks at this machine and hands what it sees to :mod:`qaroma.doctor.checks`."""

from __future__ import annotations

import itertools
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement

from qaroma.config.load import shipped_folder
from qaroma.doctor import checks
from qaroma.doctor.checks import Card, Finding
from qaroma.model.waiting import Answer

if TYPE_CHECKING:
    import torch

_SECONDS = 4.0  # that the hub or the driver may take to answer
_FOR_CONTRIBUTORS = "dev"
_AGAIN = "type: pip install --force-reinstall --no-deps"


def examine(gpus: int | None = None) -> list[Finding]:
    """Everything that a run needs, one line each; a check that cannot be made is a problem of its own.

    Takes seconds, most of them for importing torch; reads nothing but what it reports and writes nothing.

    Args:
        gpus: as many are wanted; None asks about several where there are several.
    """
    findings: list[Finding] = []

    def look(name: str, check: Callable[[], Finding | list[Finding]], advice: str) -> None:
        try:
            found = check()
        except Exception as error:  # a broken installation raises anything; the other lines are still wanted
            found = checks.failed(name, error, advice)
        findings.extend(found if isinstance(found, list) else [found])

    hub = Answer(_ask_hub)
    look("Python", _python, "install qaroma again")
    look("packages", _packages, "install qaroma again")
    look("torch", _torch, f"{_AGAIN} torch")
    if findings[-1].level != "problem":
        look("CUDA", _cuda, "update the GPU's driver and restart")
        look("GPU", _gpu, "see what holds it with nvidia-smi; if nothing does, restart")
        look("GPUs", lambda: _several_gpus(gpus), "see with nvidia-smi which of them answers")
        look("bf16", _bf16, "update the GPU's driver")
        look("bitsandbytes", _bitsandbytes, f"{_AGAIN} bitsandbytes; for an old driver, update it")
        look("attention", _attention, "type: --set model.attention=eager")
    look("host memory", _host_memory, f"{_AGAIN} psutil")
    look("disk", _disks, "look at the folders' permissions")
    look("hub", lambda: _hub(hub), f"{_AGAIN} huggingface_hub")
    look("extras", lambda: checks.extras(_missing_extras()), "install qaroma again")
    return findings


def _python() -> Finding:
    requires = metadata.metadata("qaroma").get_all("Requires-Python") or [">=3.10"]
    return checks.python(platform.python_version(), requires[0])


def _packages() -> list[Finding]:
    required = [wanted for wanted in _requirements() if wanted.marker is None or wanted.marker.evaluate({"extra": ""})]
    installed = {wanted.name: _installed(wanted.name) for wanted in required}
    return checks.versions(required, installed, tested_versions(shipped_folder() / "constraints.txt"))


def tested_versions(constraints: Path) -> dict[str, str]:
    """Name and version of each ``name==version`` line of a constraints file; none where it is not there."""
    if not constraints.is_file():
        return {}
    return dict(re.findall(r"^([\w.-]+)==(\S+)", constraints.read_text(encoding="utf-8"), re.MULTILINE))


def _requirements() -> list[Requirement]:
    return [Requirement(text) for text in metadata.requires("qaroma") or ()]


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _missing_extras() -> dict[str, list[str]]:
    groups = [name for name in metadata.metadata("qaroma").get_all("Provides-Extra") or () if name != _FOR_CONTRIBUTORS]
    missing: dict[str, list[str]] = {name: [] for name in groups}
    for wanted in _requirements():
        if wanted.marker is None or wanted.marker.evaluate({"extra": ""}) or _installed(wanted.name) is not None:
            continue
        for group in groups:
            if wanted.marker.evaluate({"extra": group}):
                missing[group].append(wanted.name)
    return missing


def _torch() -> Finding:
    import torch

    return Finding("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} CPU threads")


def _device() -> torch.device:
    from qaroma.model.base import resolve_device

    return resolve_device("auto")


def _cuda() -> Finding:
    import torch

    build = torch.version.cuda or getattr(torch.version, "hip", None)
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return checks.cuda(build, cards, _driver(), os.environ.get("CUDA_VISIBLE_DEVICES"), platform.system())


def _driver() -> str | None:
    """The NVIDIA driver's version, as its own tool says it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    versions = re.findall(r"^\d[\d.]*$", done.stdout, re.MULTILINE)
    return versions[0] if versions and done.returncode == 0 else None


def _gpu() -> Finding:
    import torch

    device = _device()
    if device.type != "cuda":
        return checks.gpu(None)
    free, total = torch.cuda.mem_get_info(device)
    return checks.gpu(Card(torch.cuda.get_device_name(device), free, total))


def _several_gpus(asked: int | None) -> list[Finding]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < 2 and asked is None:
        return []
    cards = [Card(torch.cuda.get_device_name(index), *torch.cuda.mem_get_info(index)) for index in range(count)]
    findings = [checks.gpus(cards, asked)]
    if count > 1:
        pairs = itertools.combinations(range(count), 2)
        apart = [pair for pair in pairs if not _reach_each_other(*pair)]
        findings += [checks.nccl(_nccl()), checks.peers(apart)]
    return findings


def _reach_each_other(one: int, other: int) -> bool:
    import torch

    reach = torch.cuda.can_device_access_peer
    return reach(one, other) and reach(other, one)


def _nccl() -> str | None:
    import torch

    if not torch.distributed.is_available() or not torch.distributed.is_nccl_available():
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]


def _bf16() -> Finding:
    import torch

    from qaroma.model.precision import has_bf16

    device = _device()
    if device.type == "cuda":
        return checks.bf16(True, has_bf16(device))
    return checks.bf16(False, bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def _bitsandbytes() -> Finding:
    device = _device()
    return checks.nf4(str(device), *nf4_errors(device))


def nf4_errors(device: torch.device) -> tuple[float, float]:
    """Quantise a random weight to NF4, multiply with it, and compare.

    Args:
        device: where.

    Returns:
        The relative error of the product (Frobenius norms) to the product with the weight as it was,
        and to the product with the weight as bitsandbytes unpacks it.
    """
    import torch

    from qaroma.model.bnb import bnb

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 512, generator=generator).to(device)
    inputs = torch.randn(16, 512, generator=generator).to(device)
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4")
    product = bnb.matmul_4bit(inputs, packed.t(), quant_state=state)
    unpacked = bnb.functional.dequantize_4bit(packed, state)

    def error(exact: Any) -> float:
        return float((product - exact).norm() / exact.norm())

    return error(inputs @ weight.T), error(inputs @ unpacked.T)


def _attention() -> Finding:
    from qaroma.model.attention import fused_for_groups
    from qaroma.model.documents import one_kernel_for_all

    device = _device()
    dtype = _attention_dtype(device)
    grouped = device.type != "cuda" or fused_for_groups(device, dtype)
    return checks.attention(str(device), attention_kernels(device), grouped, one_kernel_for_all(device, dtype))


def _attention_dtype(device: torch.device) -> torch.dtype:
    """What runs take on a GPU; fp32 on a CPU, where every kernel has it."""
    import torch

    from qaroma.model.precision import resolve_dtype

    return resolve_dtype("auto", device) if device.type == "cuda" else torch.float32


def attention_kernels(device: torch.device) -> list[str]:
    """The kernels of scaled dot-product attention that run there, forward and backward."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernels = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
               "math": SDPBackend.MATH}  # fmt: skip
    dtype = _attention_dtype(device)
    found = []
    for name, kernel in kernels.items():
        query = torch.ones(1, 2, 16, 64, device=device, dtype=dtype, requires_grad=True)
        try:
            with sdpa_kernel(kernel):
                output = torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
                output.sum().backward()  # type: ignore[no-untyped-call]
        except RuntimeError:
            continue
        found.append(name)
    return found


def _host_memory() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    return checks.host_memory(int(memory.available), int(memory.total))


def _disks() -> list[Finding]:
    from huggingface_hub import constants

    places = {"models": Path(constants.HF_HUB_CACHE), "runs": Path.cwd()}
    findings = []
    for what, folder in places.items():
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        findings.append(checks.disk(what, str(folder), shutil.disk_usage(there).free, os.access(there, os.W_OK)))
    return findings


def _ask_hub() -> tuple[bool, str | None]:
    """Whether the hub answers, and whose the token is that it was asked with."""
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError

    from qaroma.model.builtin import SMOLLM2_HUB_ID, hub_answers

    if constants.is_offline_mode() or not hub_answers(SMOLLM2_HUB_ID):
        return False, None
    if get_token() is None:
        return True, None
    try:
        return True, str(HfApi().whoami()["name"])
    except (HfHubHTTPError, KeyError):
        return True, None
    except Exception:  # the network went away in between
        return False, None


def _hub(answer: Answer[tuple[bool, str | None]]) -> list[Finding]:
    from huggingface_hub import constants, get_token

    reachable, user = answer.get(_SECONDS) or (False, None)
    offline = bool(constants.is_offline_mode())
    return [checks.hub(offline, reachable), checks.login(get_token() is not None, reachable, user)]
