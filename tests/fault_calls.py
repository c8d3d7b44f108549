"""Every call by which a run changes or opens files, one by one: listed, failed, or followed by what a crash leaves.

The interposer stands in Python, between qaroma and the functions of ``os``, ``open`` and safetensors: reads of
metadata (``stat``) go by uncounted.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from qaroma.runs import checkpoint, files, peft_lora

READS = ("open", "scandir", "listdir")  # do not change anything
NEED_NO_ROOM = (*READS, "unlink", "rmdir")  # and never fail for want of it


class Interposer:
    """Counts the calls under a folder while it is entered.

    Args:
        root: the folder.
        before: called with number and name before each call; what it raises the caller sees.
        after: called with number, name, path and result after each call.
    """

    def __init__(
        self,
        root: Path,
        before: Callable[[int, str, str], None] = lambda *_: None,
        after: Callable[[int, str, str, Any], None] = lambda *_: None,
    ) -> None:
        self.root, self.before, self.after = str(root), before, after
        self.count, self._inside = 0, False
        self._real: list[tuple[Any, str, Any]] = []

    def path_of(self, value: Any, directory: int | None = None) -> str:
        if isinstance(value, int):
            return os.readlink(f"/proc/self/fd/{value}")
        text = os.fsdecode(value)
        if directory is not None:
            return os.path.join(os.readlink(f"/proc/self/fd/{directory}"), text)
        return os.path.abspath(text)

    def call(self, name: str, path: str, real: Callable[[], Any]) -> Any:
        if self._inside or not path.startswith(self.root):
            return real()
        self._inside = True
        try:
            self.count += 1
            number = self.count
            self.before(number, name, path)
            result = real()
            self.after(number, name, path, result)
            return result
        finally:
            self._inside = False

    def _patch(self, module: Any, name: str, made: Callable[[Any], Any]) -> None:
        real = getattr(module, name)
        self._real.append((module, name, real))
        setattr(module, name, made(real))

    def __enter__(self) -> Interposer:
        def by_path(name: str, place: int = 0) -> Callable[[Any], Any]:
            def made(real: Any) -> Any:
                def wrapper(*args: Any, **named: Any) -> Any:
                    if not args:
                        return real(*args, **named)
                    path = self.path_of(args[place], named.get("dir_fd"))
                    return self.call(name, path, lambda: real(*args, **named))

                return wrapper

            return made

        for name in ("fsync", "mkdir", "unlink", "rmdir", "truncate", "write", "scandir", "listdir"):
            self._patch(os, name, by_path(name))
        for name in ("rename", "replace", "link"):
            self._patch(os, name, by_path(name, 1))

        def opened(real: Any) -> Any:
            def wrapper(path: Any, flags: int, *args: Any, **named: Any) -> Any:
                name = "create" if flags & os.O_CREAT else "open"
                return self.call(
                    name, self.path_of(path, named.get("dir_fd")), lambda: real(path, flags, *args, **named)
                )

            return wrapper

        self._patch(os, "open", opened)
        self._patch(io, "open", lambda real: self._opened(real))
        self._patch(files, "exchange", by_path("exchange", 1))
        for module in (checkpoint, peft_lora):
            self._patch(module, "save_file", self._saved)
        return self

    def __exit__(self, *_: object) -> None:
        for module, name, real in reversed(self._real):
            setattr(module, name, real)

    def _opened(self, real: Any) -> Any:
        def wrapper(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **named: Any) -> Any:
            if isinstance(file, int) or not self.path_of(file).startswith(self.root):
                return real(file, mode, buffering, *args, **named)
            path = self.path_of(file)
            if not set(mode) & set("wxa"):
                return self.call("open", path, lambda: real(file, mode, buffering, *args, **named))
            raw = self.call("create", path, lambda: _Raw(path, mode.replace("b", "").replace("t", ""), self))
            buffered = io.BufferedWriter(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, *args, **named)

        return wrapper

    def _saved(self, real: Any) -> Any:
        def wrapper(tensors: Any, path: Any, *args: Any, **named: Any) -> Any:
            def save() -> None:
                # First half of it, then all of it: two calls.
                real(tensors, path, *args, **named)

            whole = Path(path)
            try:
                self.call("create", self.path_of(path), lambda: whole.write_bytes(b"\0" * 100))
                self.call("write", self.path_of(path), save)
            except OSError as error:  # safetensors has an exception of its own
                raise SafetensorError(f"Error while serializing: I/O error: (os error {error.errno})") from None

        return wrapper


class _Raw(io.FileIO):
    """A file whose writes are counted."""

    def __init__(self, path: str, mode: str, calls: Interposer) -> None:
        super().__init__(path, mode)
        self.path, self.calls = path, calls

    def write(self, data: Any) -> int:
        written: int = self.calls.call("write", self.path, lambda: super(_Raw, self).write(data))
        return written


def failing(at: int, number: int) -> Callable[[int, str, str], None]:
    """Let call ``at`` fail with the system's error ``number``."""

    def before(count: int, name: str, path: str) -> None:
        if count == at:
            raise OSError(number, os.strerror(number), path)

    return before


class CrashStates:
    """What a folder holds after each call, were the process killed, or the power cut, right there.

    Three kinds: ``kill`` (all that was written), ``unsynced`` (nothing of what was not fsynced, names included)
    and ``names`` (all names, with the content that was fsynced). Each state is kept once.

    Args:
        root: the folder.
        store: where the states are kept.
    """

    def __init__(self, root: Path, store: Path) -> None:
        self.root, self.store = root, store
        self.data: dict[int, bytes] = {}
        self.names: dict[int, dict[str, int]] = {root.stat().st_ino: {}}
        self.directories: set[int] = {root.stat().st_ino}
        self.alive: list[int] = []  # an open file's number is not given to another one
        self.known: set[int] = set()
        self.seen: dict[tuple[str, Any], int] = {}
        self.calls: list[tuple[int, str, str]] = []

    def after(self, number: int, name: str, path: str, result: Any) -> None:
        self.calls.append((number, name, path))
        self._keep_alive()
        if name == "fsync":
            self._synced(Path(path))
        if name in READS:
            return
        now = self._now(self.root)
        for kind, tree in (("kill", now), ("unsynced", self._durable(self.root.stat().st_ino)),
                           ("names", self._without_data(self.root))):  # fmt: skip
            key = (kind, tree)
            if key not in self.seen:
                self.seen[key] = number
                place = self.store / f"{number:05d}-{kind}"
                place.mkdir(parents=True)
                _write_tree(place, tree)

    def _keep_alive(self) -> None:
        for folder, _, names in os.walk(self.root):
            for path in (folder, *(os.path.join(folder, name) for name in names)):
                ino = os.stat(path).st_ino
                if ino not in self.known:
                    self.known.add(ino)
                    self.alive.append(os.open(path, os.O_RDONLY))

    def _synced(self, path: Path) -> None:
        ino = path.stat().st_ino
        if path.is_dir():
            self.names[ino] = {p.name: p.stat().st_ino for p in path.iterdir()}
            self.directories |= {p.stat().st_ino for p in path.iterdir() if p.is_dir()}
        else:
            self.data[ino] = path.read_bytes()

    def _now(self, folder: Path) -> Any:
        return tuple(
            (p.name, self._now(p) if p.is_dir() else p.read_bytes())
            for p in sorted(folder.iterdir())
        )  # fmt: skip

    def _durable(self, ino: int) -> Any:
        found = []
        for name, child in sorted(self.names.get(ino, {}).items()):
            found.append((name, self._durable(child) if child in self.directories else self.data.get(child, b"")))
        return tuple(found)

    def _without_data(self, folder: Path) -> Any:
        return tuple(
            (p.name, self._without_data(p) if p.is_dir() else self.data.get(p.stat().st_ino, b""))
            for p in sorted(folder.iterdir())
        )


def _write_tree(place: Path, tree: Any) -> None:
    for name, content in tree:
        if isinstance(content, bytes):
            (place / name).write_bytes(content)
        else:
            (place / name).mkdir()
            _write_tree(place / name, content)


def copy(source: Path, target: Path) -> None:
    """A folder's copy in the place of another one."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
