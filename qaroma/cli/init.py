"""``qaroma init``."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import click

from qaroma.cli.config_file import write_config
from qaroma.cli.options import config_option
from qaroma.config.load import parse_source, read_settings
from qaroma.config.schema import Config
from qaroma.config.tasks import PREFERENCE
from qaroma.config.words import memory_size
from qaroma.data.sources import read_rows
from qaroma.errors import QaromaError
from qaroma.model.builtin import require_model
from qaroma.plan.card import card_memory
from qaroma.plan.other_tools import Foreign, read_foreign
from qaroma.runs.directory import quoted
from qaroma.training.checks import check_sources

_EPILOG = """\b
Examples:
  qaroma init
  qaroma init --model smollm2-135m --data mine.jsonl --vram 8GiB --output mine.yaml
  qaroma init --from axolotl.yaml
"""
_FIRST_MODEL = "smollm2-135m"


@click.command(epilog=_EPILOG)
@config_option("model.name")
@config_option("data.train")
@click.option("--from", "foreign", metavar="FILE", help="A configuration of Axolotl or LLaMA-Factory to begin with; "
              "what it says that cannot be done is listed.")  # fmt: skip
@click.option("--vram", "--card", "vram", metavar="CARD", help="Memory of the card, as 8GiB, or one that is "
              "known, as t4, or cpu. Default: this machine's GPU, or its CPU.")  # fmt: skip
@click.option("--output", metavar="FILE", help="The YAML file to write; default: named after the data.")
@click.option("--yes", is_flag=True, help="Ask nothing: what is not given has its default.")
@click.option("--force", is_flag=True, help="Overwrite a file that is there.")
@config_option("data.columns")
@config_option("data.feedback")
@config_option("data.tools")
@config_option("data.skip_bad_rows")
@config_option("model.trust_remote_code")
def command(
    model__name: str | None,
    data__train: tuple[str, ...],
    foreign: str | None,
    vram: str | None,
    output: str | None,
    yes: bool,
    force: bool,
    data__columns: str | None,
    data__feedback: str | None,
    data__tools: str | None,
    data__skip_bad_rows: bool | None,
    model__trust_remote_code: bool | None,
) -> None:
    """Write a configuration for your data and your card, every choice in it explained.

    Looks at the data, plans a training step, and decides the rest from both. Asks for what was not
    given, where there is a terminal. No weight is downloaded.
    """
    asking = sys.stdin.isatty() and not yes
    theirs = read_foreign(foreign) if foreign else Foreign("")
    model__name = model__name or theirs.settings.get("model.name")
    data__train = data__train or tuple(theirs.settings.get("data.train", ()))
    model = model__name or (_ask("Model: a folder or a hub id", _FIRST_MODEL, _check_model) if asking else None)
    data = data__train or ((_ask("Data: a file, a folder or a hub id", None, _check_data),) if asking else ())
    if asking and vram is None:
        answer = _ask("The card: its memory, as 8GiB, its name, as t4, or cpu", "this machine", _check_size)
        vram = None if answer == "this machine" else answer
    if not data or not (model or yes):
        missing = " and ".join(name for name, there in (("--model", model or yes), ("--data", data)) if not there)
        raise QaromaError(f"got no {missing}, and there is nobody to ask; type qaroma init --model NAME --data FILE")
    default = Path(re.sub(r"[^\w.-]+", "-", Path(parse_source(data[0])[0]).name).split(".")[0] + ".yaml")
    target = Path(output or (_ask("Write to", str(default), lambda _: None) if asking else default))
    if target.exists() and not force:
        raise QaromaError(f"{target} is there already and is left as it was; type --force, or name another: --output")
    flags = theirs.settings | {
        "model.name": model or _FIRST_MODEL,
        "data.train": list(data),
        "data.columns": data__columns or theirs.settings.get("data.columns"),
        "data.feedback": data__feedback,
        "data.tools": data__tools,
        "data.skip_bad_rows": data__skip_bad_rows or None,
        "model.trust_remote_code": model__trust_remote_code or None,
    }
    if theirs.left:
        click.echo(f"of the {theirs.tool} configuration not taken: {', '.join(theirs.left)}")
    config = read_settings(None, flags, [])
    if vram is not None:
        _check_size(vram)
    require_model(model or _FIRST_MODEL)
    check_sources(config)
    _write(config, vram, target, force)


def _write(config: Config, vram: str | None, target: Path, force: bool) -> None:
    """Decide, write, and say what was found and what to type next."""
    from rich.console import Console

    from qaroma.plan.configure import data_words, make_start, room_for, start_yaml

    with Console(stderr=True).status("looking at the model") as status:
        start = make_start(config, room_for(vram), tell=status.update)
    write_config(target, start_yaml(start, target.as_posix()), force=force)
    resolved, training = start.config, start.config.training
    click.echo(f"data: {data_words(start.data)}")
    for note in start.notes:
        click.echo(note)
    if start.left_out:
        share = start.left_out / start.data.rows
        click.echo(f"{start.left_out} of them ({share:.0%}) are longer than {resolved.data.max_length} and left out")
    click.echo(f"template: {start.data.template}")
    click.echo(
        f"plan: {training.micro_batch} x {training.grad_accum} examples of at most {resolved.data.max_length} tokens a "
        f"step, memory level {start.step.settings.level}, {memory_size(start.step.peak)} on {start.room.words}"
    )
    growth = resolved.growth
    click.echo(f"{training.max_steps} steps, rank {growth.start_rank} and up to {growth.max_rank} where it is missing, "
               f"learning rate {training.learning_rate:g} to begin with")  # fmt: skip
    click.echo(f"wrote {target.as_posix()}; each line says why. Type next:")
    source = resolved.data.train[0].path
    task = f" --task {resolved.task}" if resolved.task == PREFERENCE else ""
    click.echo(f"  qaroma data preview --model {quoted(resolved.model.name)} --data {quoted(source)}{task}")
    click.echo(f"  qaroma finetune --config {quoted(target.as_posix())}")


def _ask(question: str, default: str | None, check: Callable[[str], None]) -> str:
    """The answer, asked for until it is one that can be used."""
    while True:
        answer = str(click.prompt(question, default=default)).strip()
        try:
            check(answer)
        except QaromaError as error:
            click.echo(f"  {error}", err=True)
            continue
        return answer


def _check_model(name: str) -> None:
    from qaroma.model.base import load_model_config

    load_model_config(name)


def _check_data(text: str) -> None:
    read_rows([parse_source(text)])


def _check_size(text: str) -> None:
    if text.strip().lower() not in ("this machine", "cpu"):
        card_memory(text)
