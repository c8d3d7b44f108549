"""Record examples/day.md: python examples/record_day.py CHECKOUT alpaca_en_demo.json > day.md

Types the commands in a new virtual environment and a new folder, and writes what they print, shortened.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Command:
    """A line to type, and how many lines of what it prints are shown at its beginning and end."""

    line: str
    head: int = 12
    tail: int = 6


WHERE_PIP_LOOKS = ("WARNING: Location", "Looking in ")  # lines about this machine's indexes
REQUEST = "Dim the lights in the attic to 35 percent."
DATA = "alpaca_en_demo.json"
KILLED = (
    "qaroma demo & until grep -q '\"step\": 25,' runs/demo/metrics.jsonl 2>/dev/null; do sleep 1; done; kill -KILL $!"
)
STEPS: tuple[tuple[str, str, tuple[Command, ...]], ...] = (
    ("A new environment", "`qaroma` is a checkout of this repository.", (
        Command("python3 -m venv day && . day/bin/activate"),
        Command("pip install -q -c qaroma/configs/constraints.txt './qaroma[report]' xllamacpp"),
    )),
    ("Is this machine ready?", "", (Command("qaroma doctor", 30),)),
    ("A whole run, killed on the way", "The process is killed outright after step 25; the same command goes on.", (
        Command(KILLED, 12, 8),
        Command("qaroma demo", 12, 40),
    )),
    ("Talk to it", "", (Command(f"printf '{REQUEST}\\n/base\\n/exit\\n' | qaroma chat runs/demo"),)),
    ("An answer in llama.cpp", "", (
        Command("qaroma export runs/demo --format gguf"),
        Command(f'python qaroma/examples/ask_llama_cpp.py runs/demo/export/gguf/model.gguf "{REQUEST}"'),
    )),
    ("Data of one's own", "999 rows of Alpaca, as LLaMA-Factory has them.", (
        Command(f"qaroma init --yes --model smollm2-135m --data {DATA} --output mine.yaml"),
        Command(f"qaroma data preview --model smollm2-135m --data {DATA}", 10, 2),
        Command("qaroma finetune --config mine.yaml --dry-run", 40),
    )),
    ("Other small commands", "", (
        Command("qaroma --help", 10, 4),
        Command("qaroma runs"),
        Command("qaroma plan --model llama3-8b --vram 8GiB", 10, 12),
        Command("qaroma configs ls", 6, 2),
        Command("qaroma push runs/demo my-calendar --dry-run"),
    )),
)  # fmt: skip


def record(checkout: Path, data: Path) -> Iterator[str]:
    """The page, a line at a time."""
    yield "# One day, from a new environment to an answer in llama.cpp\n"
    yield "Real commands and what they print, shortened where a line says `...`; made by"
    yield "`python examples/record_day.py CHECKOUT alpaca_en_demo.json`."
    threads = os.environ.get("OMP_NUM_THREADS", "as many threads as torch takes")
    yield f"{os.cpu_count()} cores of an {_processor()}, no GPU, {threads}."
    yield f"{_load()} at the beginning: the computing time is the command's own, the other what went by.\n"
    taken = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "qaroma").symlink_to(checkout.resolve())
        shutil.copy(data, folder / DATA)
        for title, text, commands in STEPS:
            yield f"## {title}\n"
            if text:
                yield f"{text}\n"
            for command in commands:
                lines, seconds = _typed(command.line, folder)
                yield f"    $ {command.line}"
                yield from (f"    {line}".rstrip() for line in _shortened(lines, command))
                yield ""
                if command.line.startswith("qaroma") and command.line != KILLED:
                    taken.append((command.line, *seconds))
    yield "## How long they took\n"
    yield "| command | computing, s | in all, s |\n|---|---|---|"
    yield from (f"| `{line}` | {computing:.1f} | {whole:.1f} |" for line, computing, whole in taken)
    yield f"\n{_load()} at the end."


def _typed(line: str, folder: Path) -> tuple[list[str], tuple[float, float]]:
    """What a line prints in the day's environment, and its computing and whole seconds."""
    own = {"PATH": f"{folder}/day/bin:{os.environ['PATH']}", "QAROMA_CACHE": f"{folder}/models", "COLUMNS": "100"}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        env={**os.environ, **own},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    whole, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    computing = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    text = done.stdout.replace(str(folder), ".").replace(str(Path.home()), "~")
    print(f"{whole:6.0f} s  {done.returncode}  {line}", file=sys.stderr)
    return [line for line in text.splitlines() if not line.startswith(WHERE_PIP_LOOKS)], (computing, whole)


def _shortened(lines: list[str], command: Command) -> list[str]:
    if len(lines) <= command.head + command.tail + 1:
        return lines
    return [*lines[: command.head], "...", *lines[-command.tail :]]


def _processor() -> str:
    names = [line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return names[0] if names else "unknown processor"


def _load() -> str:
    return f"Load average {os.getloadavg()[0]:.1f}"


if __name__ == "__main__":
    for line in record(Path(sys.argv[1]), Path(sys.argv[2])):
        print(line, flush=True)
