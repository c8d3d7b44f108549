"""Building the guard, once for each version of torch, and loading it before torch. Imports no torch."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")


def missing() -> str | None:
    """Why there can be no phantom card here; None where there can."""
    if not sys.platform.startswith("linux"):
        return "the phantom card's guard is built on Linux only"
    if shutil.which("g++") is None:
        return "the phantom card's guard needs g++, which is not here"
    if "+cpu" not in version("torch") and (_torch() / "lib" / "libtorch_cuda.so").exists():
        return "this torch is built for CUDA: a phantom card cannot take the place of its own"
    return None


def arm() -> None:
    """Put the guard in the place of CUDA's; torch may be imported from then on."""
    assert "torch" not in sys.modules, "the guard must be loaded before torch"
    built = _built()
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(_torch() / "lib" / name), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(built)).phantom_arm()


def _torch() -> Path:
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


def _built() -> Path:
    """The guard as a library, in the user's cache; another for each torch and each guard."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qaroma-tests"
    name = hashlib.sha256(SOURCE.read_bytes() + f"{version('torch')} {_torch()}".encode()).hexdigest()[:16]
    library = cache / f"guard-{name}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        aside = library.with_suffix(f".{os.getpid()}")
        place = [f"-I{_torch()}/include", f"-L{_torch()}/lib", "-lc10", "-ltorch_cpu"]
        subprocess.run(
            ["g++", "-O1", "-std=c++20", "-shared", "-fPIC", str(SOURCE), "-o", str(aside), *place], check=True
        )
        aside.replace(library)
    return library
