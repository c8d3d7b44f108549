"""``qaroma plan``."""

from __future__ import annotations

import click

from qaroma.cli.options import config_option, count
from qaroma.cli.output import JSON_OPTION, figures_only
from qaroma.config.gpus import micro_batches_each
from qaroma.config.load import read_settings
from qaroma.config.tasks import WRITING
from qaroma.errors import QaromaError
from qaroma.plan.card import CARDS, Card, parse_card, parse_memory, this_card
from qaroma.plan.shapes import require_shape

_EPILOG = """\b
Examples:
  qaroma plan --model llama3-8b --vram 8GiB
  qaroma plan --model qwen3-4b --card rtx3060 --rows 5000
  qaroma plan --model mistralai/Mistral-7B-v0.3 --seq-len 8192 --memory 2
  qaroma plan --model llama3-8b --card rtx3060 --gpus 2 --rank-frozen 0 --rank-trained 16
"""


@click.command(epilog=_EPILOG)
@click.option("--model", required=True, metavar="TEXT",
              help="Built-in shape (llama3-8b, qwen2.5-7b, ...), config.json, folder or hub id.")  # fmt: skip
@click.option("--card", metavar="NAME", help="A card that is known, for its memory and rates: rtx3060, t4, h100, ...")
@click.option("--vram", metavar="SIZE", help="Memory of the card, as 8GiB. Default: this machine's GPU, if it has one.")
@click.option("--seq-len", type=count(2), default=2048, show_default=True, metavar="INTEGER",
              help="Tokens of a sequence.")  # fmt: skip
@click.option("--micro-batch", type=count(1), default=1, show_default=True, metavar="INTEGER",
              help="Examples in one forward pass.")  # fmt: skip
@config_option("task", text="preference counts two sequences an example; classification and regression are not "
               "counted.")  # fmt: skip
@config_option("training.memory")
@click.option("--rank-frozen", type=count(0), default=16, show_default=True, metavar="INTEGER",
              help="Rank of the frozen components of every layer.")  # fmt: skip
@click.option("--rank-trained", type=count(1), default=1, show_default=True, metavar="INTEGER",
              help="Rank that trains in every layer.")  # fmt: skip
@click.option("--gpus", type=count(1), default=1, show_default=True, metavar="INTEGER",
              help="Such cards that share a step: what they send each other, and how long it takes.")  # fmt: skip
@config_option("training.grad_accum", text="Forward passes in one optimiser step, which --gpus share.")
@click.option("--time", "all_cards", is_flag=True, help="Tell the time on every known card, where none is named.")
@click.option("--rows", type=count(1), default=1000, show_default=True, metavar="INTEGER",
              help="Examples of the run whose time is told.")  # fmt: skip
@click.option(
    "--dtype",
    type=click.Choice(("bf16", "fp16", "fp32")),
    default="bf16",
    show_default=True,
    help="Arithmetic: fp16 is what GPUs before RTX 30 take by themselves, fp32 where a model overflows in it.",
)
@config_option("model.trust_remote_code")
@JSON_OPTION
def command(
    model: str,
    card: str | None,
    vram: str | None,
    seq_len: int,
    micro_batch: int,
    task: str | None,
    training__memory: str | None,
    rank_frozen: int,
    rank_trained: int,
    gpus: int,
    training__grad_accum: int | None,
    all_cards: bool,
    rows: int,
    dtype: str,
    model__trust_remote_code: bool | None,
    json_output: bool,
) -> None:
    """Tell what a training step takes and what fits a card, without weights and without a GPU.

    The step is run on tensors that have a shape and no contents, and every byte that is alive is
    counted: nothing is estimated from a formula.
    """
    asked = read_settings(None, {"task": task, "training.grad_accum": training__grad_accum}, [])
    if not asked.writes_text:
        raise QaromaError(f"got --task {task}; expected {' or '.join(WRITING)}: a step of another kind is not counted")
    micro_batches_each(asked.training.grad_accum, gpus)
    require_shape(model)
    size, cards = _cards(card, vram, everyone=all_cards)

    from rich.console import Console

    from qaroma.model.precision import DTYPES
    from qaroma.plan.report import make_plan, print_plan
    from qaroma.plan.trace import StepSettings

    with figures_only(json_output) as write:
        with Console(stderr=True).status("reading the model's shapes") as status:
            plan = make_plan(
                model,
                StepSettings(
                    0,
                    seq_len,
                    micro_batch,
                    asked.sequences,
                    inner_rank=rank_trained,
                    frozen_rank=rank_frozen,
                    dtype=DTYPES[dtype],
                    repeated_keys=dtype != "bf16",
                ),
                memory=training__memory or "auto",
                vram=size,
                cards=cards,
                rows=rows,
                gpus=gpus,
                grad_accum=asked.training.grad_accum,
                trust_remote_code=bool(model__trust_remote_code),
                tell=lambda doing: status.update(doing),
            )
        if json_output:
            write(plan.to_json())
            return
    print_plan(plan, Console())


def _cards(name: str | None, vram: str | None, *, everyone: bool) -> tuple[int | None, tuple[Card, ...]]:
    """Bytes of the card that is meant, and the cards whose times are told: those with that memory, if none is named."""
    size = parse_memory(vram) if vram else None
    if name is not None:
        found = parse_card(name)
        return size or found.gib * 2**30, (found,)
    if size is not None:
        return size, tuple(card for card in CARDS.values() if card.gib * 2**30 == size)
    if everyone:
        return None, tuple(CARDS.values())
    here = this_card()
    return (here[0], here[1:] if here[1] else ()) if here else (None, ())  # type: ignore[return-value]
