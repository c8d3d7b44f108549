"""``qaroma bench``."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from qaroma.cli.options import config_option, count
from qaroma.cli.output import JSON_OPTION, figures_only
from qaroma.config.levels import LEVEL_NAMES
from qaroma.plan.shapes import require_shape

_EPILOG = """\b
Examples:
  qaroma bench --model smollm2-135m --seq-len 512 --against peft
  qaroma bench --model llama3-8b --seq-len 2048 --memory 1 --against peft --json
  qaroma bench --model llama3-8b --sheet sheet
"""


@click.command(epilog=_EPILOG)
@click.option("--model", required=True, help="A shape (random weights, see qaroma plan), a folder, or a hub id.")
@click.option("--seq-len", default=2048, show_default=True, type=count(8), help="Tokens of an example.")
@click.option("--micro-batch", default=1, show_default=True, type=count(1), help="Examples of a step.")
@click.option("--steps", default=3, show_default=True, type=count(1), help="Steps of one turn.")
@click.option("--rounds", default=5, show_default=True, type=count(1), help="Turns of each contestant.")
@click.option("--memory", default="1", show_default=True, type=click.Choice(LEVEL_NAMES), help="Memory level.")
@click.option("--frozen", default=0, show_default=True, type=count(0), help="Frozen rank of each module.")
@click.option("--against", type=click.Choice(["peft"]), help="Measure PEFT's QLoRA (r 8) in turns with ours.")
@click.option("--sheet", type=click.Path(path_type=Path, file_okay=False), metavar="FOLDER",
              help="Fill every table of levels, lengths and emulated cards there, or go on with it; only --model and "
              "--device count beside it.")  # fmt: skip
@config_option("training.device", text="Where to compute.")
@JSON_OPTION
def command(
    model: str,
    seq_len: int,
    micro_batch: int,
    steps: int,
    rounds: int,
    memory: str,
    frozen: int,
    against: str | None,
    sheet: Path | None,
    training__device: str | None,
    json_output: bool,
) -> None:
    """Time a training step and count its memory.

    Contestants run in turns in one process, on the very same frozen weights; every figure is the
    median of the turns, with the smallest and the largest.
    """
    require_shape(model)

    if sheet is not None:
        from qaroma.bench.sheet import fill_sheet

        click.echo(fill_sheet(model, sheet, device=training__device or "auto", tell=partial(click.echo, err=True)))
        return

    from qaroma.bench.bench import BenchSize, bench

    size = BenchSize(seq_len, micro_batch, steps, rounds, int(memory), frozen)
    with figures_only(json_output) as write:
        figures = bench(model, size, against=against, device=training__device or "auto")
        if json_output:
            write(figures)
            return
    for name in ("qaroma", "peft"):
        if name in figures:
            speed = figures[name]["tokens_per_second"]
            click.echo(
                f"{name:<7} {speed['median']:10,.0f} tokens/s ({speed['low']:,.0f} to {speed['high']:,.0f})  "
                f"peak {figures[name]['peak_bytes'] / 2**20:,.0f} MiB"
            )
    if "speed_ratio" in figures:
        ratio = figures["speed_ratio"]
        click.echo(
            f"ratio   {ratio['median']:.2f} x the speed ({ratio['low']:.2f} to {ratio['high']:.2f}), "
            f"{figures['memory_ratio']:.2f} x the memory"
        )
    click.echo(f"share of the device's matrix rate: {100 * figures['share_of_matrix_rate']:.0f} %")
