"""What a fact about the machine means for a run: plain facts in, one line out.

Nothing here looks at anything itself (:mod:`qaroma.doctor.machine` does), so that a test can break
each thing that can be broken. A problem is what stops a run with qaroma's own settings; a note is
what one should know.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from qaroma.config.words import memory_size

Level = Literal["ok", "note", "problem"]

WHEELS = "https://download.pytorch.org/whl"
CUDA_13_DRIVER = 580  # the oldest that CUDA 13 runs on (NVIDIA, CUDA toolkit release notes); 12.6 takes any from 528
# NF4 with blocks of 64 changes normal weights by 9 % (root of the mean square), and a product with them by as much.
NF4_ERROR = (0.05, 0.15)
SAME_PRODUCT = 0.02  # the packed product beside the one with the unpacked weight: bf16's rounding
QUICKSTART_BYTES = 2 * 2**30
SMALL_DOWNLOAD, LARGE_DOWNLOAD = 2**30, 20 * 2**30  # SmolLM2 with a run; an 8B model in bf16 with a run
CROWDED = 0.15  # share of a card that may be held, our own CUDA context included, before it is worth a word


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's: what was looked at, how it is, and what to do."""

    name: str
    level: Level
    found: str
    advice: str = ""


@dataclass(frozen=True)
class Card:
    """A GPU: its name, and its memory in bytes."""

    name: str
    free: int
    total: int


def python(version: str, requires: str) -> Finding:
    """Whether this Python is one that the package declares.

    Args:
        version: as ``3.12.1``.
        requires: as ``>=3.10``.
    """
    if Version(version) in SpecifierSet(requires):
        return Finding("Python", "ok", version)
    return Finding("Python", "problem", version, f"make a new virtual environment with Python {requires}")


def versions(
    required: Sequence[Requirement], installed: Mapping[str, str | None], tested: Mapping[str, str]
) -> list[Finding]:
    """The packages that qaroma runs on, beside what it asks for and what its tests were run with.

    Args:
        required: the package's own requirements.
        installed: version by name; None where a package is not there.
        tested: the newest version that was tried, by name.

    Returns:
        A line for each package that is not as it should be, or one line for all.
    """
    findings = []
    for wanted in required:
        name, version = wanted.name, installed.get(wanted.name)
        newest = tested.get(name)
        if version is None:
            findings.append(Finding(name, "problem", f"not installed; expected {wanted.specifier}", _install(wanted)))
        elif not wanted.specifier.contains(version, prereleases=True):
            findings.append(Finding(name, "problem", f"{version}; expected {wanted.specifier}", _install(wanted)))
        elif newest is not None and Version(version).release[:2] > Version(newest).release[:2]:
            advice = f"if something breaks, type: pip install {name}=={newest}"
            findings.append(Finding(name, "note", f"{version}, newer than {newest}, the newest that was tried", advice))
    return findings or [Finding("packages", "ok", f"{len(required)}, all within the tested range")]


def _install(wanted: Requirement) -> str:
    return f'type: pip install "{wanted.name}{wanted.specifier}"'


def extras(missing: Mapping[str, Sequence[str]]) -> Finding:
    """What is installed beyond the necessary.

    Args:
        missing: for each optional group of the package, which of its packages are not there.
    """
    absent = {group: names for group, names in missing.items() if names}
    if not absent:
        return Finding("extras", "ok", ", ".join(missing) or "none declared")
    found = "; ".join(f"{group} lacks {', '.join(names)}" for group, names in absent.items())
    return Finding("extras", "note", found, f'where you want one, type: pip install "qaroma[{",".join(absent)}]"')


def torch_with_cuda(driver: str, system: str) -> str:
    """What to type for a torch with CUDA.

    PyPI's wheels carry CUDA 13 for Linux and none for Windows (their metadata, torch 2.13).

    Args:
        driver: version of the NVIDIA driver.
        system: as ``platform.system()`` names it.
    """
    install = "type: pip install --force-reinstall torch"
    if Version(driver).major < CUDA_13_DRIVER:
        return f"{install} --index-url {WHEELS}/cu126"
    return install if system == "Linux" else f"{install} --index-url {WHEELS}/cu130"


def cuda(built_for: str | None, cards: int, driver: str | None, visible: str | None, system: str) -> Finding:
    """Whether torch and the GPU's driver find each other.

    Args:
        built_for: CUDA version of the torch build; None for a build without.
        cards: GPUs that torch sees.
        driver: version of the NVIDIA driver; None where there is none.
        visible: CUDA_VISIBLE_DEVICES, None where it is not set.
        system: as ``platform.system()`` names it.
    """
    build = f"torch for CUDA {built_for}" if built_for else "torch without CUDA"
    found = f"{build}, {f'driver {driver}' if driver else 'no NVIDIA driver'}"
    if cards or driver is None:
        return Finding("CUDA", "ok", found)
    if built_for is None:
        return Finding("CUDA", "problem", found, torch_with_cuda(driver, system))
    if visible is not None and visible.strip() in ("", "-1"):
        advice = f"CUDA_VISIBLE_DEVICES={visible!r} hides every GPU: unset it"
    else:
        advice = f"torch sees no GPU: update the driver to one for CUDA {built_for}, restart, and ask nvidia-smi"
        if Version(built_for).major >= 13 and Version(driver).major < CUDA_13_DRIVER:
            advice += f"; for the driver that is there {torch_with_cuda(driver, system)}"
    return Finding("CUDA", "problem", found, advice)


def gpu(card: Card | None) -> Finding:
    """The GPU that a run would take, and how much of it is free."""
    if card is None:
        found = "none: training runs on the CPU: fine for SmolLM2 (135M), not for an 8B model"
        return Finding("GPU", "note", found, "to see what a card would hold: qaroma plan --model llama3-8b --vram 8GiB")
    found = f"{card.name}, {memory_size(card.free, 1)} of {memory_size(card.total, 1)} free"
    held = _held(card)
    if held:
        return Finding("GPU", "note", found, f"{held}; nvidia-smi names them: close them before a large run")
    return Finding("GPU", "ok", found)


def _held(card: Card) -> str:
    """What other programs hold of a card; empty where it is little."""
    held = card.total - card.free
    return f"{memory_size(held, 1)} are held by other programs" if held > CROWDED * card.total else ""


def gpus(cards: Sequence[Card], asked: int | None) -> Finding:
    """Whether several GPUs can share a run, or have one each.

    Args:
        cards: all that torch sees, in its order.
        asked: how many are wanted; None is those that are there.
    """
    kinds = Counter((card.name, memory_size(card.total, 1)) for card in cards)
    found = ", ".join(f"{count} x {name} with {size}" for (name, size), count in kinds.items()) or "none"
    if asked is not None and len(cards) < asked:
        advice = f"type --gpus {len(cards)}" if cards else "leave --gpus out: a run then trains on the CPU"
        return Finding("GPUs", "problem", f"{found}; expected {asked}", advice)
    advices = [f"GPU {index}: {held}" for index, card in enumerate(cards) if (held := _held(card))]
    if len(kinds) > 1:
        advices.append(
            "they differ: a run on all waits for the slowest and fits the smallest; CUDA_VISIBLE_DEVICES=0,1 chooses"
        )
    return Finding("GPUs", "note" if advices else "ok", found, "; ".join(advices))


def nccl(version: str | None) -> Finding:
    """What GPUs sum their gradients with.

    Args:
        version: of the one in torch; None where there is none.
    """
    if version is None:
        advice = "finetune --gpus needs it, which torch has on Linux; compare --gpus does not"
        return Finding("NCCL", "note", "torch has none", advice)
    return Finding("NCCL", "ok", version)


def peers(apart: Sequence[tuple[int, int]]) -> Finding:
    """Whether GPUs read each other's memory.

    Args:
        apart: pairs that cannot.
    """
    if not apart:
        return Finding("peer access", "ok", "between all GPUs")
    found = f"none between GPUs {', '.join(f'{one} and {other}' for one, other in apart)}"
    return Finding("peer access", "note", found, "they meet in host memory; what that costs: qaroma plan --gpus 2")


def bf16(on_gpu: bool, native: bool) -> Finding:
    """Whether the device computes in bf16, which is qaroma's choice.

    Args:
        on_gpu: the run would take a GPU.
        native: its hardware has bf16.
    """
    if native:
        return Finding("bf16", "ok", "in hardware")
    fp32 = "--set model.compute_dtype=fp32"
    if on_gpu:
        found = "this GPU has none (it needs an RTX 30 or later): runs take fp16 and scale the loss"
        return Finding("bf16", "note", found, f"Gemma 2 and 3 overflow in fp16 and take fp32; others do with {fp32}")
    return Finding("bf16", "note", "this CPU imitates it: right, but slow", f"{fp32} may be faster")


def nf4(device: str, error: float, packed_error: float) -> Finding:
    """Whether bitsandbytes really quantised a weight and multiplied with it.

    Args:
        device: where.
        error: of the product with the packed weight, relative to the one with the weight as it was.
        packed_error: the same, relative to the one with the weight as 4 bits give it back.
    """
    found = f"an NF4 product on {device} differs by {error:.1%} (expected 5 % to 15 %)"
    if NF4_ERROR[0] < error < NF4_ERROR[1] and packed_error < SAME_PRODUCT:
        return Finding("bitsandbytes", "ok", found)
    found += f", and by {packed_error:.1%} from its own unpacked weight"
    advice = "what it computes is wrong; type: pip install --force-reinstall --no-deps bitsandbytes"
    return Finding("bitsandbytes", "problem", found, advice)


def attention(device: str, kernels: Sequence[str], grouped: bool, together: bool) -> Finding:
    """Which of SDPA's kernels ran forward and backward.

    Args:
        device: where.
        kernels: of ``flash``, ``efficient``, ``math``, those that ran.
        grouped: a fused one ran with fewer key heads than query heads.
        together: one ran for sequences of many lengths, as packed rows have.
    """
    fused = [name for name in kernels if name != "math"]
    if fused:
        repeated = "" if grouped else "; none takes grouped key heads: they are repeated, which costs memory"
        packed = f"; packed sequences in {'one kernel' if together else 'a kernel each'}"
        return Finding("attention", "ok", f"SDPA with {' and '.join(fused)} kernels on {device}{packed}{repeated}")
    if kernels:
        found = f"SDPA on {device} has no fused kernel: memory grows with the square of the context"
        return Finding("attention", "note", found, "keep --max-length small, or install a newer torch")
    return Finding("attention", "problem", f"SDPA does not run on {device}", "type: --set model.attention=eager")


def host_memory(available: int, total: int) -> Finding:
    """Whether the host's memory is enough for the smallest run."""
    found = f"{memory_size(available, 1)} of {memory_size(total, 1)} free"
    if available < QUICKSTART_BYTES:
        return Finding("host memory", "problem", found, "close other programs: the quickstart takes 1.9 GiB")
    return Finding("host memory", "ok", found)


def disk(what: str, folder: str, free: int, writable: bool) -> Finding:
    """Whether a folder's disk has room.

    Args:
        what: lies there: ``models`` or ``runs``.
        folder: its path.
        free: bytes.
        writable: this user may write there.
    """
    name, found = f"disk for {what}", f"{memory_size(free, 1)} free in {folder}"
    elsewhere = "set HF_HOME to a folder on another disk" if what == "models" else "work in a folder on another disk"
    if not writable:
        return Finding(name, "problem", f"{found}, but it cannot be written", f"mend its permissions, or {elsewhere}")
    if free < SMALL_DOWNLOAD:
        return Finding(name, "problem", found, f"make room, or {elsewhere}")
    if free < LARGE_DOWNLOAD:
        advice = f"enough for SmolLM2; an 8B model is a download of 16 GB: make room, or {elsewhere}"
        return Finding(name, "note", found, advice)
    return Finding(name, "ok", found)


def hub(offline: bool, reachable: bool) -> Finding:
    """Whether models can be fetched.

    Args:
        offline: the user forbade it (HF_HUB_OFFLINE).
        reachable: the hub answered.
    """
    if offline:
        return Finding("hub", "ok", "offline mode (HF_HUB_OFFLINE is set): folders and what is cached work")
    if reachable:
        return Finding("hub", "ok", "reachable")
    advice = "folders, cached models and smollm2-135m work without it"
    return Finding("hub", "note", "does not answer", advice)


def login(token: bool, reachable: bool, user: str | None) -> Finding:
    """Whether gated models can be fetched.

    Args:
        token: one is stored or in the environment.
        reachable: the hub answered.
        user: whose token the hub says it is; None where it was not asked or refused.
    """
    if not token:
        return Finding("hub login", "note", "none; only gated models (Llama, Gemma) need it", "type: hf auth login")
    if user is not None:
        return Finding("hub login", "ok", f"as {user}")
    if reachable:
        return Finding("hub login", "problem", "the hub refuses the stored token", "type: hf auth login")
    return Finding("hub login", "ok", "a token is stored; not checked, since the hub was not asked")


def failed(name: str, error: BaseException, advice: str) -> Finding:
    """A thing that could not even be looked at, as a torch whose libraries do not load."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 200 else text[:200] + "..."
    return Finding(name, "problem", f"{type(error).__name__}: {text}", advice)
