"""A run directory: where its files lie, how they are written, and its metrics log.

::

    runs/<name>/config.yaml       what was run, every value resolved
    runs/<name>/metrics.jsonl     one JSON object a line: steps, growth events, evaluations
    runs/<name>/summary.json      the figures of the whole run, written when it ends
    runs/<name>/reference.json    of preferences: what the starting model makes of the answers
    runs/<name>/checkpoints/      step-00000040/ ...
    runs/<name>/adapter/          the best adapter by validation (the last where there is none)
    runs/<name>/adapter_last/     the last one
"""

from __future__ import annotations

import os
import re
import shlex
from contextlib import suppress
from pathlib import Path

import yaml

from qaroma.config.resolved import ResolvedConfig
from qaroma.errors import QaromaError
from qaroma.runs.files import (
    cut_in_two,
    heal,
    is_leftover,
    make_directory,
    read_json,
    remove_leftovers,
    unused,
    write_atomically,
)
from qaroma.runs.lock import LOCK, locked
from qaroma.text.yaml_text import read_yaml

# What an adapter folder holds (qaroma.runs.adapter writes it); named here for those who load no torch.
WEIGHTS, CONFIG, GROWTH = "adapter_model.safetensors", "adapter_config.json", "growth.json"

STATE = "state.json"  # what a checkpoint folder holds beside its tensors

# How the line of an optimiser step begins, and how much of a log's end holds at least one of them.
_STEP, _TAIL = re.compile(rb'\{"step": (\d+), "loss": '), 1 << 20


class RunDirectory:
    """Paths of one run.

    Args:
        path: the directory; :meth:`create` makes it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.summary = self.path / "summary.json"
        self.reference = self.path / "reference.json"
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.adapter_last = self.path / "adapter_last"

    @property
    def resume_command(self) -> str:
        """What to type to go on with it, the leave for the base's own code included where it had one."""
        leave = " --trust-remote-code" if self._runs_remote_code() else ""
        return f"qaroma finetune --resume --output {quoted(self.path.as_posix())}{leave}"

    def _runs_remote_code(self) -> bool:
        try:
            model = read_yaml(self.config.read_text(encoding="utf-8"))[0]["model"]
            return bool(model["trust_remote_code"])
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):  # none, or none that can be gone on with
            return False

    def exists(self) -> bool:
        return self.config.is_file()

    def last_step(self) -> int:
        """The last optimiser step of its log, read from the end of the file; 0 where there is none."""
        if not self.metrics.is_file():
            return 0
        with self.metrics.open("rb") as file:
            file.seek(max(0, self.metrics.stat().st_size - _TAIL))
            found = _STEP.findall(file.read())
        return int(found[-1]) if found else 0

    def finished(self, last: int) -> bool:
        """Whether the run wrote its summary, and was not resumed to go further.

        Args:
            last: the last optimiser step of its log.
        """
        summary = read_json(self.summary)
        end = summary.get("steps", last) if summary else None
        return isinstance(end, int) and end >= last

    def require_unused(self) -> None:
        """See to it that no run is overwritten, nor anything else.

        Raises:
            QaromaError: there is a run, or a folder that holds other things.
        """
        if self.exists():
            raise QaromaError(
                f"{self.path} already holds a run; type --resume to go on with it, or choose another --output"
            )
        if self.path.exists() and not self.path.is_dir():
            raise QaromaError(f"{self.path} is a file; choose another --output")
        # A command that was killed before it wrote the configuration leaves these.
        others = sorted(p.name for p in self.path.glob("*") if p.name != LOCK and not is_leftover(p.name))
        if others:
            shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
            raise QaromaError(
                f"{self.path} holds other things ({shown}) and no run; expected a folder that is new or empty. "
                "Choose another --output"
            )

    def create(self, config_yaml: str) -> None:
        """Make the directory and write its configuration.

        Raises:
            QaromaError: there is a run already, or something else stands in the way.
        """
        self.require_unused()
        try:
            make_directory(self.path)
            remove_leftovers(self.path)
            write_atomically(self.config, config_yaml)
            make_directory(self.checkpoints)
        except OSError as error:
            raise QaromaError(f"cannot write to {self.path} ({error.strerror}); choose another --output") from error

    @classmethod
    def of(cls, config: ResolvedConfig) -> RunDirectory:
        """Where a run is written: as its configuration says, or ``runs/<model>-<data>``, a new one."""
        if config.output is not None:
            return cls(config.output)
        data = Path(config.data.train[0].path.replace(":", "-")).name.split(".")[0]
        return cls.unused(f"{Path(config.model.name).name}-{data}")

    @classmethod
    def unused(cls, name: str) -> RunDirectory:
        """``runs/<name>``, or ``runs/<name>-2`` and so on where that is taken."""
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "run"
        return cls(unused(Path("runs") / slug))


def adapter_folder(run: str | Path) -> Path:
    """The adapter of a run directory, or the folder itself if it is an adapter.

    Raises:
        QaromaError: neither.
    """
    found = find_adapter(run)
    if found is None:
        raise nothing_there(run, "a run nor an adapter folder")
    return found


def find_adapter(run: str | Path) -> Path | None:
    """As :func:`adapter_folder`; None where there is none."""
    of_run = RunDirectory(run)
    if cut_in_two(of_run.adapter) is not None:
        # A run that is at work sees to it itself; one that cannot be written to stays as it is.
        with suppress(OSError, QaromaError), locked(of_run.path):
            heal(of_run.adapter)
    return next((folder for folder in (Path(run), of_run.adapter) if (folder / GROWTH).is_file()), None)


def run_around(path: str | Path) -> RunDirectory | None:
    """The run that a folder is, or lies in as an adapter or a checkpoint does."""
    resolved = Path(path).resolve()
    return next((RunDirectory(p) for p in (resolved, *list(resolved.parents)[:2]) if RunDirectory(p).exists()), None)


def run_of_checkpoint(path: str | Path) -> RunDirectory | None:
    """The run that a checkpoint folder lies in; None where it is no checkpoint."""
    return run_around(path) if (Path(path) / STATE).is_file() else None


def require_adapter_or_checkpoint(path: str | Path) -> None:
    """See to it that a path is a run, an adapter folder, or a checkpoint in a run.

    Raises:
        QaromaError: none of these.
    """
    if find_adapter(path) is None and run_of_checkpoint(path) is None:
        raise nothing_there(path, "a run, nor a checkpoint in one, nor an adapter folder of qaroma")


def nothing_there(path: str | Path, expected: str) -> QaromaError:
    """The error to raise where a path is none of what was expected, or a run that is not so far yet."""
    run = RunDirectory(path)
    if run.exists():
        return QaromaError(f"{path} has no adapter yet; finish it with: {run.resume_command}")
    return QaromaError(f"{path} is neither {expected}; give a run directory such as runs/NAME")


def quoted(text: str) -> str:
    """``text`` as one word of this system's shell; plain double quotes where they are safe everywhere."""
    if re.fullmatch(r"[\w./:@+-]+", text):
        return text
    if not re.search(r'["$`\\!%]', text):
        return f'"{text}"'
    return '"' + text.replace('"', '\\"') + '"' if os.name == "nt" else shlex.quote(text)
