"""Mistakes that show without opening a model or reading data are told before anything heavy is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# Types each of its arguments, in one process: the imports are counted once, and for all.
RUN = """
import resource, shlex, sys
from qaroma.cli import main
for line in sys.argv[1:]:
    print(main(shlex.split(line)))
    sys.stderr.write("\\f")
heavy = sorted({"torch", "transformers", "datasets", "peft", "accelerate"} & set(sys.modules))
used = resource.getrusage(resource.RUSAGE_SELF)
print(used.ru_utime + used.ru_stime, *heavy)
"""

MISTAKES = {
    "generate NO_SUCH_RUN hello": "NO_SUCH_RUN is neither a run nor an adapter folder; give a run directory such as",
    "generate begun hello": "begun has no adapter yet; finish it with: qaroma finetune --resume --output begun",
    "chat NO_SUCH_RUN": "NO_SUCH_RUN is neither a run nor an adapter folder",
    "chat --base ./nofolder": "There is no folder './nofolder'; expected a model's folder",
    "evaluate NO_SUCH_RUN --data d.jsonl": "NO_SUCH_RUN is neither a run nor an adapter folder",
    "export NO_SUCH_RUN": "NO_SUCH_RUN is neither a run, nor a checkpoint in one, nor an adapter folder of qaroma",
    "push NO_SUCH_RUN name": "NO_SUCH_RUN is neither a run nor an adapter folder",
    "report NO_SUCH_RUN": "NO_SUCH_RUN is not there; give a run directory such as runs/NAME",
    "compare-runs NO_SUCH_RUN begun": "NO_SUCH_RUN is not there",
    "runs NO_SUCH_FOLDER": "there is no folder NO_SUCH_FOLDER",
    "finetune": "got no model and no data; expected --model FOLDER_OR_HUB_ID",
    "finetune --config unknown.yaml": "unknown.yaml line 1: modle: unknown key; did you mean model?",
    "finetune --model smollm2-135m --data d.jsonl --output begun": "begun already holds a run; type --resume to go on",
    "finetune --resume --output nothing": "cannot resume: nothing holds no run; type --resume --output runs/NAME",
    "finetune --resume --output begun --rank 3": "cannot resume begun with other settings: rank was None, now 3",
    "finetune --model smollm2-135m --data missing.jsonl": "there is no file or folder 'missing.jsonl'. Did you mean",
    "finetune --model ./nofolder --data d.jsonl": "There is no folder './nofolder'; expected a model's folder",
    "finetune --model begun --data d.jsonl": "'begun' has no config.json; expected a folder as written by",
    "finetune --model smollm2-135m --data d.jsonl --adapter begun": "begun holds no PEFT adapter; expected a folder",
    "compare --methods aroma,nonsense --output x --model m --data d.jsonl": "no such method: 'nonsense'",
    "plan --model ./nofolder": "There is no folder './nofolder'; expected a model's folder",
    "plan --model lama3-8b": "near it are llama3-8b",
    "plan --model llama3-8b --vram big": "got memory 'big'; expected a size such as 8GiB",
    "bench --model ./nofolder": "There is no folder './nofolder'; expected a model's folder",
    "init --model ./nofolder --data d.jsonl": "There is no folder './nofolder'; expected a model's folder",
    "data preview --model smollm2-135m --data missing.jsonl": "there is no file or folder 'missing.jsonl'",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "d.jsonl").write_text('{"instruction": "a", "output": "b"}\n', encoding="utf-8")
    (folder / "unknown.yaml").write_text("modle: {name: x}\n", encoding="utf-8")
    (folder / "begun").mkdir()
    (folder / "begun" / "config.yaml").write_text("model: {name: x}\ndata: {train: d.jsonl}\n", encoding="utf-8")
    return folder


@pytest.mark.skipif(sys.platform == "win32", reason="counts CPU time as POSIX does")
@pytest.mark.parametrize("command", sorted({typed.split()[0] for typed in MISTAKES}))
def test_mistakes_are_told_at_once(command: str, folder: Path) -> None:
    typed = [line for line in MISTAKES if line.split()[0] == command]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *typed],
        cwd=folder, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    *codes, last = done.stdout.splitlines()
    seconds, *heavy = last.split()
    assert codes == ["2"] * len(typed)
    for line, said in zip(typed, done.stderr.split("\f"), strict=False):
        assert MISTAKES[line] in said
    assert not heavy
    assert float(seconds) < 1.0  # 0.1 to 0.4 on an idle machine
