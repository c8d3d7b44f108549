"""``qaroma export``: from a run to folders that other engines load, each tested before it appears."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from qaroma import __version__
from qaroma.config.words import file_size
from qaroma.data.encode import Example
from qaroma.errors import QaromaError
from qaroma.export import card
from qaroma.export.chat_template import complete_jinja
from qaroma.export.compress import Compression, compress
from qaroma.export.formats import DTYPES, FORMATS, Format
from qaroma.export.in_ollama import Asked, check_name, hand_over
from qaroma.export.live import LiveModel
from qaroma.export.rank_map import rank_map_svg
from qaroma.export.selftest import SelfTest
from qaroma.export.subject import Subject, open_subject, records_about, settings_of
from qaroma.method.factors import Factors
from qaroma.model.base import resolve_device
from qaroma.runs.files import directory_written_aside, disk_full, unused, written_aside
from qaroma.runs.lock import LOCK, locked, owner_is_gone

MARKER = "export.json"
FAILED = ".failed"


@dataclass(frozen=True)
class Options:
    """How to export.

    Attributes:
        merge_into: ``original`` or ``dequantised``, for merged and gguf.
        dtype: of the stored numbers; None is fp32 for adapters and bf16 for a merged checkpoint.
        outtype: of a GGUF model's matrices.
        compress: relative error up to which redundant directions are dropped; None leaves them.
        self_test: read every export back and compare.
        ollama: what the GGUF model shall be called in Ollama, where it is made and asked a question; None is not at
            all.
    """

    merge_into: str = "dequantised"
    dtype: str | None = None
    outtype: str = "f16"
    compress: float | None = None
    self_test: bool = True
    ollama: str | None = None


@dataclass(frozen=True)
class Exported:
    """One export that stands.

    Attributes:
        format, folder, bytes: what and where it is.
        use: the command that uses it.
        test: its self-test; None where it was not run.
        written: what the format's writer told.
        losses: validation loss by the base merged into.
        ollama: what Ollama answered, where it was asked.
    """

    format: str
    folder: Path
    bytes: int
    use: str
    test: SelfTest | None
    written: dict[str, Any] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    ollama: Asked | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "folder": self.folder.as_posix(),
            "bytes": self.bytes,
            "use": self.use,
            "self_test": self.test.to_json() if self.test else None,
            "validation_loss": self.losses or None,
            **({"ollama": self.ollama.to_json()} if self.ollama else {}),
            **self.written,
        }


def export(
    run: str | Path,
    formats: Sequence[str],
    *,
    output: str | Path | None = None,
    base: str | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    options: Options | None = None,
    validation: Callable[[], Sequence[Example]] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Exported]:
    """Export a run in one or several formats.

    Args:
        run: run directory, checkpoint, or adapter folder of qaroma.
        formats: names of :data:`FORMATS`, or ``all``, which leaves out what the base cannot be written as.
        output: the folder of one format, or the parent of several; None is ``export/`` in the run.
        base: where the base lies now, if not where it was.
        device: where the live model computes.
        trust_remote_code: run Python code that comes with the base.
        options: see :class:`Options`.
        validation: gives the run's validation examples, for the losses of a merge.
        say: takes a line for people.

    Returns:
        The exports, each whole and tested.

    Raises:
        QaromaError: anything the user can mend; a failed self-test too, whose files are kept under
            another name.
    """
    options = options or Options()
    if options.ollama is not None:
        check_name(options.ollama)
    subject = open_subject(run, base=base, trust_remote_code=trust_remote_code)
    update, compression = _compressed(subject.update, options.compress, say)
    chosen = _possible(formats, subject, update, options, say)
    if options.ollama is not None and all(one.name != "gguf" for one in chosen):
        raise QaromaError("Ollama takes a whole GGUF model, which is not among the formats; type --format gguf")
    folders = {one.name: _folder(subject, one.name, output, len(chosen) > 1 or "all" in formats) for one in chosen}
    for folder in folders.values():
        _check_free(folder)
        _remove_abandoned(folder, say)
    tuned = LiveModel(subject, update, resolve_device(device), options.merge_into, validation)
    tuned.model()  # the wrong base is told before anything is written
    licence = card.licence_of(subject.base.name, subject.base.revision)
    found = []
    for one in chosen:
        exported = _export_one(one, tuned, folders[one.name], options, compression, licence)
        for line in _lines(exported):
            say(line)
        found.append(exported)
    if options.ollama is not None:
        found = [_in_ollama(one, tuned, options.ollama, say) for one in found]
    return found


def _in_ollama(exported: Exported, tuned: LiveModel, name: str, say: Callable[[str], None]) -> Exported:
    if exported.format != "gguf":
        return exported
    return replace(exported, ollama=hand_over(tuned, exported.folder, name, say))


def _compressed(
    update: dict[str, Factors], error: float | None, say: Callable[[str], None]
) -> tuple[dict[str, Factors], Compression | None]:
    """The update within a relative error, and what was dropped; None leaves it as it is."""
    if error is None:
        return update, None
    smaller, told = compress(update, error)
    say(
        f"compressed: ranks sum to {told.after} instead of {told.before}, largest {told.largest_after} instead of "
        f"{told.largest_before}, relative error {told.reached:.2g}"
    )
    return smaller, told


def _possible(
    names: Sequence[str], subject: Subject, update: dict[str, Factors], options: Options, say: Callable[[str], None]
) -> list[Format]:
    """The formats that were asked for; with ``all``, those that this base can be written as."""
    if "all" not in names:
        chosen = [_format(name) for name in dict.fromkeys(names)]
        for one in chosen:
            one.check(subject, update, options.outtype)
        return chosen
    chosen = []
    for one in FORMATS.values():
        try:
            one.check(subject, update, options.outtype)
        except QaromaError as error:
            say(f"{one.name}: left out, since {error}")
        else:
            chosen.append(one)
    return chosen


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise QaromaError(f"got the format '{name}'; expected {', '.join(FORMATS)} or all")
    return FORMATS[name]


def _folder(subject: Subject, name: str, output: str | Path | None, several: bool) -> Path:
    if output is None:
        parent = subject.run.path if subject.run else subject.folder
        return Path(os.path.relpath(parent)) / "export" / name if _near(parent) else parent / "export" / name
    folder = Path(output) / name if several else Path(output)
    return Path(os.path.realpath(folder)) if folder.is_symlink() else folder  # the user's link stays


def _near(path: Path) -> bool:
    return path.resolve().is_relative_to(Path.cwd())


def _check_free(folder: Path) -> None:
    """Refuse to replace anything but an earlier export."""
    taken = any(folder.iterdir()) and not (folder / MARKER).is_file() if folder.is_dir() else folder.exists()
    if taken:
        raise QaromaError(f"{folder} exists and is no earlier export; choose another --output")


def _remove_abandoned(folder: Path, say: Callable[[str], None]) -> None:
    """Remove what exports to a folder left that were killed; what may be another's is told."""
    for path in written_aside(folder):
        gone = owner_is_gone(path)
        if gone:
            shutil.rmtree(path, ignore_errors=True)
            say(f"{path}: removed, an export that was killed had left it")
        elif gone is None:
            say(f"{path}: seems to be left by a command that was killed; remove it where none is at work there")


def _export_one(
    one: Format, tuned: LiveModel, folder: Path, options: Options, compression: Compression | None, licence: str
) -> Exported:
    subject = tuned.subject
    dtype = DTYPES[options.dtype] if options.dtype else one.dtype
    with _explained(folder), directory_written_aside(folder) as aside:
        with locked(aside):  # whoever finds it knows by this whether it is still being written
            written = one.write(tuned, aside, dtype, options.outtype)
            subject.tokenizer.save_pretrained(aside)
            (aside / "chat_template.jinja").write_text(complete_jinja(subject.template), encoding="utf-8")
            (aside / "template.json").write_text(json.dumps(subject.template.to_json(), indent=2), encoding="utf-8")
            test = one.test(tuned, aside, dtype, options.outtype) if options.self_test else None
            losses = tuned.losses() if one.merges else {}
            facts = _facts(subject, tuned.update, licence)
            (aside / card.RANK_MAP).write_text(rank_map_svg(facts.ranks), encoding="utf-8")
            text = card.model_card(facts, one.name, card.Outcome(test, written, compression, losses))
            (aside / "README.md").write_text(text, encoding="utf-8")
            size = sum(file.stat().st_size for file in aside.iterdir() if file.name != LOCK)
            use = card.use_line(facts, one.name, written, shlex.quote(folder.as_posix()), options.ollama)
            exported = Exported(one.name, folder, size, use, test, written, losses)
            marker = {"qaroma": __version__, **exported.to_json()}
            (aside / MARKER).write_text(json.dumps(marker, indent=2, allow_nan=True), encoding="utf-8")
        if test is not None and not test.passed:
            raise QaromaError(f"{one.name}: self-test {test.sentence()}; {_kept(aside, folder)}")
    return exported


def _facts(subject: Subject, update: Mapping[str, Factors], licence: str) -> card.CardFacts:
    return card.CardFacts(
        name=subject.name,
        info=subject.info,
        base=subject.public_base,
        ranks={name: factors.rank for name, factors in update.items()},
        licence=licence,
        data=[card.source_text(*one) for one in card.data_sources(settings_of(subject.run))],
        parameters=sum(factors.A.numel() + factors.B.numel() for factors in update.values()),
        records=records_about(subject.folder, subject.info),
        template=subject.template.kind,
    )


def _kept(aside: Path, folder: Path) -> str:
    """Put the files of a failed export aside under a name that says so, and that nothing has yet."""
    failed = aside.rename(unused(folder.with_name(folder.name + FAILED)))
    return f"do not use what was written, it is kept in {failed} for a look"


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """A full or read-only disk as a sentence; the half-written folder is gone by then."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = disk_full(error)
        if not full and not isinstance(error, OSError):
            raise
        reason = "the disk is full" if full else (getattr(error, "strerror", None) or str(error))
        raise QaromaError(f"cannot write to {folder} ({reason}); free some room, or choose another --output") from error


def _lines(exported: Exported) -> list[str]:
    """What is printed of an export."""
    lines = [f"{exported.format}: {exported.folder.as_posix()}, {file_size(exported.bytes)}"]
    if "sliding_window" in exported.written:
        lines.append(
            f"  context of {exported.written['sliding_window']} tokens: llama.cpp has no sliding window for this "
            "architecture, and answers longer conversations otherwise than the base"
        )
    if exported.losses:
        shown = ", ".join(f"{name} {loss:.4f}" for name, loss in exported.losses.items())
        lines.append(f"  validation loss by --merge-into: {shown}")
    lines.append(f"  self-test {exported.test.sentence()}" if exported.test else "  self-test not run")
    lines.append(f"  use it with: {exported.use}")
    return lines
