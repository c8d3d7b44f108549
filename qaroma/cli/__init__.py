"""The command line: one module for each command, imported when the command is used.

Nothing here imports torch, so that every ``--help`` answers at once; a command imports what it runs
inside its function. To add a command, write ``qaroma/cli/<name>.py`` with a click command called
``command`` and name it in :data:`COMMANDS`.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from qaroma import __version__
from qaroma.cli.lazy import LazyGroup
from qaroma.errors import QaromaError, ToldElsewhereError
from qaroma.runs.files import disk_full
from qaroma.text.characters import is_unicode

COMMANDS = {
    "demo": "See a whole run: a small model learns in minutes, on a CPU.",
    "finetune": "Fine-tune a model on your data.",
    "chat": "Talk to a fine-tuned model.",
    "export": "Write a fine-tuned model as other engines load it.",
    "page": "Do all of this in a browser, on this machine alone.",
    "doctor": "Look at this machine and say what to do about what is missing.",
    "plan": "Tell what fits a card, without weights and without a GPU.",
    "init": "Write a configuration for your data and your card.",
    "data": "Look at data as training sees it.",
    "configs": "List the configurations that come with qaroma, or copy one.",
    "generate": "Answer prompts with a fine-tuned model.",
    "evaluate": "Score a model on a data set.",
    "benchmark": "Score a model on public benchmarks.",
    "report": "Draw how runs grew and learned, as figures and one HTML page.",
    "runs": "List runs: state, scores, ranks; remove old ones.",
    "compare-runs": "Put runs side by side: settings, figures, answers.",
    "push": "Send an adapter to the Hugging Face hub.",
    "compare": "Train several methods on one task and put them in one table.",
    "bench": "Time a training step and count its memory.",
}

# The help's sections, each by the command that it begins with.
SECTIONS = {
    "demo": "Begin here",
    "doctor": "Before a run",
    "generate": "After a run",
    "compare": "For those who measure",
}

# What options are called in other tools.
USUAL_NAMES = {
    "--lr": "--learning-rate",
    "--batch-size": "--micro-batch",
    "--per-device-train-batch-size": "--micro-batch",
    "--gradient-accumulation-steps": "--grad-accum",
    "--num-train-epochs": "--epochs",
    "--num-epochs": "--epochs",
    "--steps": "--max-steps",
    "--lora-r": "--rank",
    "--lora-rank": "--rank",
    "--dataset": "--data",
    "--train-file": "--data",
    "--base-model": "--model",
    "--model-name-or-path": "--model",
    "--output-dir": "--output",
    "--out": "--output",
    "--seq-length": "--max-length",
    "--max-seq-length": "--max-length",
    "--cutoff-len": "--max-length",
    "--load-in-4bit": "--quantization",
}

_EPILOG = """\b
Examples:
  qaroma demo
  qaroma chat runs/demo
"""

_INTERRUPTED = 130

# How tqdm is to draw: as rich's BarColumn, MofNCompleteColumn and TimeElapsedColumn do.
_BARS = {"ASCII": " ━", "COLOUR": "red", "BAR_FORMAT": "{desc} {bar:30} {n_fmt}/{total_fmt} {elapsed}"}


def _show_version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        click.echo(f"qaroma {__version__}")
        context.exit()


@click.group(
    cls=LazyGroup,
    package="qaroma.cli",
    commands_help=COMMANDS,
    sections=SECTIONS,
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_show_version, help="Show the version."
)
def root() -> None:
    """Fine-tune a 4-bit large language model on one consumer GPU, without choosing a rank."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: what was typed after ``qaroma``; None takes it from the process.

    Returns:
        The exit code: 0, 2 for a mistake that the user can mend (its sentence is on stderr), or
        130 after an interruption.
    """
    _speak_utf8()
    if sys.platform.startswith("linux"):  # against fragments of the card's memory; torch has it nowhere else
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    _dress_the_libraries_bars()
    try:
        typed = list(sys.argv[1:] if arguments is None else arguments)
        _refuse_blanks(typed)
        code = root.main(args=typed, prog_name="qaroma", standalone_mode=False, obj=typed.copy())
    except click.NoSuchOption as error:
        _with_our_name(error).show()
        return error.exit_code
    except click.UsageError as error:
        _with_the_option_meant(error).show()
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except ToldElsewhereError:
        return 2
    except QaromaError as error:
        click.echo(f"{_speaker()}error: {error}", err=True)
        return 2
    except (click.Abort, KeyboardInterrupt):
        click.echo(f"{_speaker()}interrupted", err=True)
        return _INTERRUPTED
    except Exception as error:
        sentence = _of_the_system(error)
        if sentence is None:
            raise
        click.echo(f"error: {sentence}", err=True)
        return 2
    # What a command gave to context.exit(); commands return nothing.
    return code if isinstance(code, int) else 0


def _speaker() -> str:
    """Who speaks, where it is one of several processes of a run and not the first."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"rank {rank}: "


def _dress_the_libraries_bars() -> None:
    """The bars of transformers, datasets and the hub look as ours do; in a log, which they would fill, there are none.

    tqdm reads its defaults from the environment when it is imported.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    for name, value in _BARS.items():
        os.environ.setdefault(f"TQDM_{name}", value)


def _with_our_name(error: click.NoSuchOption) -> click.NoSuchOption:
    """The same error, naming what an option of other tools is called here, where the command has it."""
    ours = USUAL_NAMES.get(error.option_name.lower().replace("_", "-"))
    known = {name for parameter in error.ctx.command.params for name in parameter.opts} if error.ctx else set()
    if ours not in known:
        return error
    said = f"No such option '{error.option_name}'. Did you mean '{ours}'?"
    return click.NoSuchOption(error.option_name, message=said, ctx=error.ctx)


def _with_the_option_meant(error: click.UsageError) -> click.UsageError:
    """The same error; for a word where a command takes options alone, with the option it may belong to."""
    found = re.match(r"Got unexpected extra arguments? \(([^\s)]+)", error.message)
    known = {name for parameter in error.ctx.command.params for name in parameter.opts} if error.ctx else set()
    likely = ("--data", "--model") if found and Path(found[1]).suffix else ("--model", "--data")
    wanted = next((name for name in likely if name in known), None)
    if found is None or wanted is None:
        return error
    return click.UsageError(f"{error.message}. Did you mean '{wanted} {found[1]}'?", ctx=error.ctx)


def _refuse_blanks(arguments: Sequence[str]) -> None:
    """An argument without any text is a variable that was not set: taken as a path, it means the working folder.

    Raises:
        QaromaError: there is one, or one that is not UTF-8, which no file of ours could hold.
    """
    before = ""
    for argument in arguments:
        name, equals, value = argument.partition("=")
        blank = not value.strip() if equals and name.startswith("--") else not argument.strip()
        if blank:
            what = f"for {name}" if equals else f"for {before}" if before.startswith("--") else "among the arguments"
            raise QaromaError(f"got an empty text {what}; expected some (is a variable of the shell not set?)")
        if not is_unicode(argument):
            raise QaromaError(f"got {argument!r}, which is not UTF-8; rename the file, or write UTF-8")
        before = argument


def _of_the_system(error: Exception) -> str | None:
    """What the system refuses, as a sentence; None for all other exceptions."""
    if disk_full(error):
        return f"the disk is full ({error}); make room and type the same command again"
    if not isinstance(error, OSError) or error.filename is None or error.strerror is None:
        return None
    name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else str(error.filename)
    shown = name if len(name) <= 120 else f"{name[:117]}..."
    return f"the system refuses '{shown}': {error.strerror}; check that path and your rights to it"


def _speak_utf8() -> None:
    """Windows consoles and pipes have other encodings, in which half of a model's answers cannot be written."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(encoding="utf-8", errors="replace")
