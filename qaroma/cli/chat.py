"""``qaroma chat``."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from qaroma.cli.options import config_option, count, number
from qaroma.cli.output import figures_only
from qaroma.cli.run_arguments import BASE_OPTION, TRUST_OPTION
from qaroma.config.schema import LARGEST_SEED
from qaroma.errors import QaromaError
from qaroma.model.builtin import require_model
from qaroma.runs.directory import adapter_folder
from qaroma.text.json_text import parse_json

if TYPE_CHECKING:
    from qaroma.inference.chat import Chat, Reply

_EPILOG = """\b
Examples:
  qaroma chat runs/demo
  qaroma chat runs/mine --system "Answer in one sentence." --temperature 0.7
  printf 'hello\\n/base\\n' | qaroma chat runs/mine
"""
_HELP = """\
/reset        forget the conversation
/base         show what the base, without the adapter, answers to the last message;
              the conversation goes on with the tuned model
/system TEXT  put TEXT before the conversation; without TEXT, nothing
/help         this list
/exit         leave; so does Ctrl-D. Ctrl-C stops an answer"""


@click.command(epilog=_EPILOG)
@click.argument("run", metavar="[RUN]", required=False)
@BASE_OPTION
@TRUST_OPTION
@click.option("--system", metavar="TEXT", help="What stands before the conversation.")
@click.option("--max-new-tokens", type=count(1), default=512, show_default=True, metavar="INTEGER",
              help="Longest answer.")  # fmt: skip
@click.option("--temperature", type=number(0, 1000), default=0.0, show_default=True, metavar="NUMBER",
              help="0 gives the same answer each time; higher values draw more freely.")  # fmt: skip
@click.option("--top-p", type=number(0, 1, min_open=True), default=1.0, show_default=True, metavar="NUMBER",
              help="Draw from the likeliest tokens of this share.")  # fmt: skip
@click.option("--seed", type=count(0, LARGEST_SEED), metavar="INTEGER", help="Draw the same answers each time.")
@config_option("training.device", text="Where to compute.")
@click.option("--json", "json_lines", is_flag=True, help="Read messages and write answers as JSON, one object a line.")
def command(
    run: str | None,
    base: str | None,
    trust_remote_code: bool,
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    training__device: str | None,
    json_lines: bool,
) -> None:
    """Talk to the fine-tuned model of RUN, a run directory or an adapter folder.

    Without RUN, --base names a model to talk to as it is. Lines that are piped in are answered one
    by one; /help lists what else can be typed.

    With --json a line is {"message": TEXT}, with "base": true to have the base's answer after it, or
    "reset": true to forget what was said. A piece of an answer is {"from": "tuned", "piece": TEXT}, its end
    {"from": "tuned", "end": true, ...}; {"ready": true} comes first, {"done": true} after each line.
    """
    if run is None and base is None:
        raise QaromaError("got no run; expected qaroma chat RUN, or qaroma chat --base MODEL to talk to a base")
    if run is not None:
        adapter_folder(run)
    if base is not None:
        require_model(base)

    from qaroma.inference.chat import Chat, Sampling, open_chat

    if json_lines:
        with figures_only(True) as write:
            tuned = open_chat(run, base=base, device=training__device or "auto", trust_remote_code=trust_remote_code)
            converse_in_json(Chat(tuned, Sampling(max_new_tokens, temperature, top_p, seed), system), write)
        return
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        click.echo("loading the model", err=True)
    tuned = open_chat(run, base=base, device=training__device or "auto", trust_remote_code=trust_remote_code)
    chat = Chat(tuned, Sampling(max_new_tokens, temperature, top_p, seed), system)
    if terminal:
        click.echo("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves", err=True)
    converse(chat, _line_editor() if terminal else _piped_line, alone=run is None)


def converse(chat: Chat, read: Callable[[str], str], *, alone: bool = False) -> None:
    """Read lines and answer them until the input ends. Answers go to stdout, all else to stderr.

    Args:
        chat: the conversation.
        read: gives the next line, shown the prompt; raises EOFError at the end of the input.
        alone: there is no adapter, so that ``/base`` would change nothing.
    """
    while True:
        try:
            line = read("> ").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            click.echo("\n/exit or Ctrl-D leaves", err=True)
            continue
        word, _, rest = line.partition(" ")
        try:
            if word == "/exit":
                return
            if re.fullmatch("/[a-z]+", word):  # a path is a message
                _obey(chat, word, rest.strip(), alone)
            elif line:
                _tell(chat, chat.ask(line, _write))
        except QaromaError as error:
            click.echo(f"error: {error}", err=True)


def converse_in_json(chat: Chat, write: Callable[[Any], None]) -> None:
    """Answer the lines of stdin until it ends, as the help of ``--json`` says.

    Args:
        chat: the conversation.
        write: writes a value as a line of JSON.
    """
    write({"ready": True})
    for line in sys.stdin:
        try:
            _answer_in_json(chat, line, write)
        except QaromaError as error:
            write({"error": str(error)})
        write({"done": True})


def _answer_in_json(chat: Chat, line: str, write: Callable[[Any], None]) -> None:
    try:
        asked = parse_json(line)
    except ValueError:
        asked = None
    if not isinstance(asked, dict) or not isinstance(asked.get("message", ""), str):
        raise QaromaError('got a line that is no message; expected {"message": TEXT}')
    if asked.get("reset"):
        chat.reset()
    if not asked.get("message", "").strip():
        return
    for who in ("tuned", "base") if asked.get("base") else ("tuned",):

        def write_piece(piece: str, who: str = who) -> None:
            write({"from": who, "piece": piece})

        reply = chat.ask(asked["message"], write_piece) if who == "tuned" else chat.ask_base(write_piece)
        if reply is not None:
            counts = {"tokens": reply.tokens, "stopped": reply.stopped, "full": reply.full}
            write({"from": who, "end": True, **counts, "forgotten": reply.forgotten})


def _obey(chat: Chat, word: str, rest: str, alone: bool) -> None:
    if word == "/reset":
        chat.reset()
        click.echo("the conversation is forgotten", err=True)
    elif word == "/base":
        if alone:
            raise QaromaError("this is the base already; name a run to compare: qaroma chat RUN")
        if not chat.turns:
            raise QaromaError("nothing has been asked yet; ask something, then /base shows the base's answer to it")
        click.echo("the base, without the adapter:", err=True)
        reply = chat.ask_base(_write)
        if reply is not None:
            _tell(chat, reply)
    elif word == "/system":
        chat.system = rest or None
        click.echo(f"system: {rest}" if rest else "no system text", err=True)
    elif word == "/help":
        click.echo(_HELP, err=True)
    else:
        raise QaromaError(f"got {word}; expected /reset, /base, /system, /help or /exit")


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _tell(chat: Chat, reply: Reply) -> None:
    """End the answer's line, and say what one cannot see of it."""
    _write("\n")
    if reply.forgotten:
        click.echo(
            f"the {reply.forgotten} oldest turns are forgotten: the conversation has outgrown the "
            f"{chat.context} tokens that the model sees",
            err=True,
        )
    if reply.stopped:
        click.echo("stopped", err=True)
    elif reply.full:
        asked_for = reply.tokens >= chat.sampling.max_new_tokens
        why = "--max-new-tokens allows more" if asked_for else f"the model sees {chat.context} at once, which are full"
        click.echo(f"cut off after {reply.tokens} tokens; {why}", err=True)


def _line_editor() -> Callable[[str], str]:
    """``input``, with the arrow keys and a history where the system has them."""
    with contextlib.suppress(ImportError):  # Windows has its own
        import readline  # noqa: F401
    return input


def _piped_line(_: str) -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line
