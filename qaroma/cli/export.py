"""``qaroma export``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click

from qaroma.cli.options import config_option, number
from qaroma.cli.output import JSON_OPTION, figures_only
from qaroma.cli.run_arguments import BASE_OPTION, RUN_ARGUMENT, TRUST_OPTION
from qaroma.export.format_facts import FORMAT_FACTS, OUTTYPES
from qaroma.model.builtin import require_model
from qaroma.runs.directory import require_adapter_or_checkpoint, run_around

if TYPE_CHECKING:
    from qaroma.data.encode import Example

_FORMATS = (*FORMAT_FACTS, "all")
_LIST = "\n".join(f"  {name:<14}{facts.audience}" for name, facts in FORMAT_FACTS.items())
_EPILOG = f"""\b
Formats:
{_LIST}
\b
Examples:
  qaroma export runs/demo
  qaroma export runs/demo --ollama calendar
  qaroma export runs/demo --format merged --merge-into original --dtype bf16
  qaroma export runs/demo --format all --output exports --compress 0.01
"""


@click.command(epilog=_EPILOG)
@RUN_ARGUMENT
@click.option("--format", "formats", type=click.Choice(_FORMATS), multiple=True,
              help="What to write; default: padded, or gguf with --ollama. Repeatable.")  # fmt: skip
@click.option("--output", metavar="DIR",
              help="Folder of the export, or of several; default: export/FORMAT in the run.")  # fmt: skip
@click.option("--merge-into", type=click.Choice(("dequantised", "original")), default="dequantised", show_default=True,
              help="Weights that merged and gguf add to: as 4 bits give them back (what training saw), or as "
                   "published.")  # fmt: skip
@click.option("--dtype", type=click.Choice(("bf16", "fp16", "fp32")),
              help="Of the stored numbers; default: fp32 for adapters, bf16 for merged.")  # fmt: skip
@click.option("--outtype", type=click.Choice(tuple(OUTTYPES)),
              help="Of the matrices of a GGUF model; default: f16, or q4_k_m with --ollama.")  # fmt: skip
@click.option("--ollama", metavar="NAME",
              help="Make the GGUF model one of Ollama's, and ask both it and the run a question.")  # fmt: skip
@click.option("--compress", type=number(0, 1, max_open=True), metavar="ERR",
              help="Drop redundant directions up to this relative error in a module.")  # fmt: skip
@click.option("--self-test/--no-self-test", default=True, show_default=True,
              help="Read the export back and compare it with the live model.")  # fmt: skip
@BASE_OPTION
@TRUST_OPTION
@config_option("training.device", text="Where the live model computes.")
@JSON_OPTION
def command(
    run: str,
    formats: tuple[str, ...],
    output: str | None,
    merge_into: str,
    dtype: str | None,
    outtype: str | None,
    ollama: str | None,
    compress: float | None,
    self_test: bool,
    base: str | None,
    trust_remote_code: bool,
    training__device: str | None,
    json_output: bool,
) -> None:
    """Write the fine-tuned model of RUN, a run directory, a checkpoint or an adapter folder, as other
    engines load it.

    Every export holds the tokenizer, the chat template and a model card, and is read back by another
    way than qaroma's own before it appears.
    """
    require_adapter_or_checkpoint(run)
    if base is not None:
        require_model(base)

    from qaroma.export.exporter import Options, export

    kind = outtype or ("q4_k_m" if ollama else "f16")
    with figures_only(json_output) as write:
        exported = export(
            run,
            formats or ("gguf" if ollama else "padded",),
            output=output,
            base=base,
            device=training__device or "auto",
            trust_remote_code=trust_remote_code,
            options=Options(merge_into, dtype, kind, compress, self_test, ollama),
            validation=_validation(run, trust_remote_code),
            say=click.echo,
        )
        if json_output:
            write({"exports": [one.to_json() for one in exported]})


def _validation(run: str, trust_remote_code: bool) -> Callable[[], Sequence[Example]] | None:
    """The validation examples of the run that a path is or lies in, read when they are wanted."""
    found = run_around(run)
    if found is None:
        return None

    def read() -> Sequence[Example]:
        from qaroma.config.load import read_settings
        from qaroma.errors import QaromaError
        from qaroma.training.prepare import prepare_data

        try:
            config = read_settings(found.config, {}, [])
            config.model.trust_remote_code = trust_remote_code  # what the run's file says is no consent
            # Of preferences the better answers, whose plain loss can be measured without the model it began with.
            return [pair.sequences.get("chosen", pair) for pair in prepare_data(config).validation]
        except QaromaError as error:
            click.echo(f"validation loss not measured: {error}", file=sys.stderr)
            return ()

    return read
