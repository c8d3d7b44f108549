"""A seeded generator of damaged input: configurations, rows, run directories, adapters, checkpoints, GGUF files and
command lines, each a whole one with a few things changed in it. A seed gives the same case everywhere.

A case ends as it should with an exit code or a :class:`QaromaError`; anything else that is raised is a fault.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import struct
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qaroma.cli import COMMANDS, main
from qaroma.config.load import dump_config, read_settings
from qaroma.errors import QaromaError

DEEP = "[" * 3000 + "]" * 3000
ODD_TEXTS = ("", " ", "\0", "²", "--1", "~nouser/x", "../../x", "a" * 300, "(a+)+$", "1e999", "-", "é" * 200, "nan",
             "{{ 1 }}", "%s{x}", "C:\\x", "a:1e300", "a:0.0001", "\u2028", "\ud800", "[", "<script>", "*" * 50, ".")  # fmt: skip
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 10**9, 10**22, 10**400, -(10**22), 0.5, 1e300, float("inf"), float("nan"), [], {},
    [[]], {"a": 1}, ["a", 1], {"": None}, [None], *ODD_TEXTS,
)  # fmt: skip
YAML_PIECES = (
    "2024-99-99", "2024-01-01 25:61:61", "0x_", "0b_", "!!bool foo", "!!int ''", "!!float foo", "!!timestamp foo",
    "!!python/object:os.system x", "!!set {a}", "!!binary '='", "!!omap [a]", "&a [*a]", "&a {k: *a}", "*b", "<<: *a",
    "<<: {a: 1}", "9" * 5000, "1" * 60 + ":" + "1" * 60, "'", '"\\0"', '"\\ud800"', "- ", "? ", "{", "[" * 200, "\t",
    "%YAML 9.9", "---", "...", "| ", "1e999", ".nan", "-.inf", "~", "'' : ''", "? [a] : b", "@", "`", "=", "<<", "010",
)  # fmt: skip

_CONFIG = """\
model: {name: ./missing, compute_dtype: fp32}
data: {train: [{path: data.jsonl, weight: 1.0}], validation_share: 0.1, max_length: 64}
task: causal-lm
method: aroma
rank: 8
growth: {t_in: 6, check_every: 1, eps_in: 0.2, eps_out: 1.0e-4, warmup: 2, target_modules: [q_proj, v_proj]}
training: {max_steps: 40, micro_batch: 2, grad_accum: 2, evaluate_every: 4, device: cpu, memory: 0, seed: 0}
evaluation: {prompts: [hello], show: 1}
checkpoint: {every: 3, keep: 2}
output: out
"""
_ROWS: tuple[Any, ...] = (
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"instruction": "a", "input": "", "output": "b"},
    {"prompt": "a", "completion": "b"},
    {"text": "a b", "label": 1},
    {"text": "a b", "label": "x"},
)
_MODULES = ("model.layers.0.q_proj", "model.layers.1.mlp.up_proj")


def mutated_bytes(chooser: random.Random, data: bytes, pieces: tuple[bytes, ...] = ()) -> bytes:
    """``data`` with one to four bytes or stretches changed, cut out, doubled or put in."""
    for _ in range(chooser.randint(1, 4)):
        at = chooser.randrange(len(data) + 1)
        until = min(len(data), at + chooser.choice((1, 1, 4, 30)))
        kind = chooser.randrange(5)
        if kind == 0:
            data = data[:at] + bytes(chooser.randrange(256) for _ in range(until - at)) + data[until:]
        elif kind == 1:
            data = data[:at] + data[until:]
        elif kind == 2:
            data = data[:until] + data[at:until] * chooser.choice((1, 3, 50)) + data[until:]
        elif kind == 3 and chooser.random() < 0.3:
            data = data[:at]
        elif pieces:
            data = data[:at] + chooser.choice(pieces) + data[chooser.choice((at, until)) :]
    return data


def mutated_value(chooser: random.Random, value: Any) -> Any:
    """A JSON value with one of its parts replaced, left out, doubled or renamed."""
    if isinstance(value, dict) and value and chooser.random() < 0.85:
        key = chooser.choice(list(value))
        kind = chooser.randrange(12)
        if kind == 0:
            return {name: inner for name, inner in value.items() if name != key}
        if kind == 1:
            return {**value, chooser.choice(ODD_TEXTS): chooser.choice(ODD_VALUES)}
        return {**value, key: mutated_value(chooser, value[key])}
    if isinstance(value, list) and value and chooser.random() < 0.85:
        at = chooser.randrange(len(value))
        if chooser.randrange(8) == 0:
            return value[:at] + value[at + 1 :]
        return [*value[:at], mutated_value(chooser, value[at]), *value[at + 1 :]]
    return chooser.choice(ODD_VALUES)


def _json(chooser: random.Random, value: Any) -> bytes:
    """A JSON text of a value that was changed, or a changed text of the value, or one that is nested very deep."""
    for _ in range(chooser.randint(1, 3)):
        value = mutated_value(chooser, value)
    text = json.dumps(value).encode()
    if chooser.random() < 0.15:
        text = mutated_bytes(chooser, text, (DEEP.encode(), b"\xff", b"9" * 5000, b"\\ud800", b"NaN", b"1e999"))
    return text


def _command(*words: str) -> None:
    """Run a command with its output thrown away; its exit code must be one of those that are documented."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = main(words)
    assert code in (0, 2), f"exit code {code}"


def configuration(chooser: random.Random, folder: Path) -> None:
    """A configuration file, or settings on the command line, of a run whose model is not there."""
    text = _CONFIG
    (folder / "data.jsonl").write_text('{"text": "a"}\n')
    sets: list[str] = []
    if chooser.random() < 0.6:
        text = mutated_bytes(chooser, text.encode(), tuple(piece.encode() for piece in YAML_PIECES)).decode("latin-1")
        (folder / "config.yaml").write_bytes(text.encode("latin-1" if chooser.random() < 0.1 else "utf-8"))
    else:
        (folder / "config.yaml").write_text(text)
        keys = ("training.seed", "output", "growth.t_in", "training.micro_batch", "model.name", "data.train", "rank",
                "growth", "evaluation.prompts", "training.learning_rate", "model", "a.b", "checkpoint.keep",
                "growth.target_modules", "data.max_length", "training.epochs")  # fmt: skip
        for _ in range(chooser.randint(1, 3)):
            value = chooser.choice(YAML_PIECES) if chooser.random() < 0.5 else str(chooser.choice(ODD_VALUES))
            sets.append(f"{chooser.choice(keys)}={value}")
    config = read_settings(folder / "config.yaml", {}, sets)
    assert read_settings(None, {}, []) is not None and dump_config(config)
    sets += ["model.name=./missing"]
    _command("finetune", "--config", str(folder / "config.yaml"), *(word for text in sets for word in ("--set", text)))


def rows(chooser: random.Random, folder: Path) -> None:
    """A file of rows, read as conversations and as texts with labels."""
    from qaroma.data.forms import parse_rows
    from qaroma.data.labelled import _read
    from qaroma.data.sources import read_rows

    name = chooser.choice(("a.jsonl", "a.json", "a.csv", "a.txt", "a.jsonl.gz", "a.parquet"))
    like = chooser.choice(_ROWS)
    if name == "a.csv":
        pieces = (b'"', b"\0", b",,,", b"\n\n", b"\xff", b'"' + b"x" * 200_000)
        data = mutated_bytes(chooser, b"prompt,completion\na,b\nc,\"d,e\"\n", pieces)
    elif name == "a.json":
        data = _json(chooser, [like, like])
    else:
        data = b"\n".join(_json(chooser, like) for _ in range(chooser.randint(1, 3)))
    (folder / name).write_bytes(data)
    found = read_rows([(str(folder / name), chooser.choice((1.0, 0.0001, 2.0)))])
    with contextlib.suppress(QaromaError):
        parse_rows(found.rows)
    with contextlib.suppress(QaromaError):
        _read(found, "classification", ("text",), "label") if False else None


def run_directory(chooser: random.Random, folder: Path) -> None:
    """A run directory beside a whole one: listed, compared, reported."""
    for name in ("whole", "odd"):
        _write_run(folder / name)
    place = folder / "odd"
    file = chooser.choice(("config.yaml", "metrics.jsonl", "summary.json", "adapter/growth.json"))
    path = place / file
    if file == "config.yaml":
        pieces = tuple(piece.encode() for piece in YAML_PIECES)
        path.write_bytes(mutated_bytes(chooser, path.read_bytes(), pieces))
    elif file == "metrics.jsonl":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        at = chooser.randrange(len(lines))
        path.write_bytes(b"\n".join(_json(chooser, x) if i == at else json.dumps(x).encode()
                                    for i, x in enumerate(lines)))  # fmt: skip
    else:
        path.write_bytes(_json(chooser, json.loads(path.read_text())))
    command = chooser.choice(("runs",) * 6 + ("compare",) * 3 + ("report",))
    if command == "runs":
        listed = io.StringIO()
        with contextlib.redirect_stdout(listed), contextlib.redirect_stderr(io.StringIO()):
            assert main(["runs", str(folder), *chooser.choice(((), ("--json",)))]) == 0
        assert "whole" in listed.getvalue(), "the whole run is not listed"
    elif command == "compare":
        _command("compare-runs", str(folder / "whole"), str(place), *chooser.choice(((), ("--json",))))
    else:
        _command("report", str(place), "--format", "html", "--output", str(folder / "report"))


def _write_run(path: Path) -> None:
    (path / "adapter").mkdir(parents=True)
    (path / "config.yaml").write_text(_CONFIG)
    prompts = {"prompts": ["p"], "expected": ["right"], "answers": ["x"], "exact_match": 0.0}
    lines: list[dict[str, Any]] = [
        {"event": "answers", "when": "before", "step": 0, **prompts},
        {"event": "ranks", "step": 0, "ranks": dict.fromkeys(_MODULES, 1)},
        {"event": "validation", "step": 0, "loss": 0.5, "perplexity": 1.6},
        {"step": 1, "loss": 1.0, "mean_rank": 1.5, "trainable_parameters": 100, "seconds": 2.0, "memory_bytes": 1},
        {"event": "growth", "step": 1, "module": _MODULES[0], "component": 1, "decision": "commit"},
        {"event": "samples", "step": 1, "prompts": ["p"], "answers": ["x"]},
        {"step": 2, "loss": 1.0, "mean_rank": 1.5, "trainable_parameters": 100, "seconds": 2.0, "memory_bytes": 1},
        {"event": "validation", "step": 2, "loss": 0.4, "perplexity": 1.5},
        {"event": "answers", "when": "after", "step": 2, **prompts},
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "summary.json").write_text(json.dumps({"steps": 2, "ended": "grown", "seconds": 12.5, "metric": "loss",
                                                   "trainable_parameters_start": 100}))  # fmt: skip
    (path / "adapter" / "growth.json").write_text(json.dumps(_growth()))


def _growth() -> dict[str, Any]:
    base = {
        "name": "./missing", "revision": None, "fingerprint": "0" * 16, "quantization": "nf4",
        "double_quantization": True, "compute_dtype": "fp32", "head_quantization": "none", "attention": "sdpa",
        "needs_remote_code": False,
    }  # fmt: skip
    return {
        "version": 2, "components": {_MODULES[0]: [1, 1], _MODULES[1]: [1]}, "inner_rank": 1, "alpha": 1.0,
        "method": "aroma", "step": 2, "base": base, "settings": {"t_in": 6}, "task": "causal-lm",
        "template": None, "labels": [], "metric": None, "max_length": None, "head": [],
    }  # fmt: skip


def _safetensors(tensors: dict[str, tuple[int, int]]) -> bytes:
    header: dict[str, Any] = {}
    at = 0
    for name, shape in tensors.items():
        size = 4 * shape[0] * shape[1]
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"\0" * at


def _write_adapter(folder: Path) -> None:
    folder.mkdir()
    tensors = {}
    for name, rank in zip(_MODULES, (2, 1), strict=True):
        tensors[f"base_model.model.{name}.lora_A.weight"] = (rank, 4)
        tensors[f"base_model.model.{name}.lora_B.weight"] = (3, rank)
    (folder / "adapter_model.safetensors").write_bytes(_safetensors(tensors))
    ranks = dict(zip(_MODULES, (2, 1), strict=True))
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "bias": "none", "rank_pattern": ranks,
              "alpha_pattern": ranks, "target_modules": list(ranks), "use_rslora": False,
              "modules_to_save": None, "init_lora_weights": True}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "growth.json").write_text(json.dumps(_growth()))


def adapter(chooser: random.Random, folder: Path) -> None:
    """An adapter folder, read as qaroma's own, as anybody's, and by the commands that take one."""
    from qaroma.runs.adapter import read_adapter
    from qaroma.runs.peft_lora import read_lora

    place = folder / "adapter"
    _write_adapter(place)
    path = place / chooser.choice(("growth.json", "adapter_config.json", "adapter_model.safetensors"))
    if path.suffix == ".json":
        path.write_bytes(_json(chooser, json.loads(path.read_text())))
    else:
        path.write_bytes(_damaged_safetensors(chooser, path.read_bytes()))
    for read in (read_lora, read_adapter):
        with contextlib.suppress(QaromaError):
            read(place)
    words = chooser.choice((("generate", str(place), "x"), ("export", str(place)), ("runs", str(place)),
                            ("push", str(place), "me/x")))  # fmt: skip
    if words[0] == "runs":
        _command(*words)


def _damaged_safetensors(chooser: random.Random, data: bytes) -> bytes:
    if chooser.random() < 0.4:
        return mutated_bytes(chooser, data)
    (length,) = struct.unpack("<Q", data[:8])
    text = _json(chooser, json.loads(data[8 : 8 + length]))
    return struct.pack("<Q", chooser.choice((len(text), len(text), 2**62, 0))) + text + data[8 + length :]


def checkpoint(chooser: random.Random, folder: Path) -> None:
    """A checkpoint whose values or tensors are damaged, read to resume and to export."""
    from qaroma.runs.checkpoint import adapter_in, load_newest

    place = folder / "step-00000002"
    place.mkdir()
    values = {"version": 2, "base": "0" * 16, "step": 2, "sha256": "0" * 64,
              "values": {"adapter": _growth(), "method": {"name": "aroma", "components": {}}}}  # fmt: skip
    tensors = _safetensors({"method.a": (2, 3), "random.cpu": (1, 8)})
    (place / "state.json").write_bytes(_json(chooser, values))
    (place / "state.safetensors").write_bytes(_damaged_safetensors(chooser, tensors))
    with contextlib.suppress(QaromaError):
        load_newest(folder, fingerprint="0" * 16)
    with contextlib.suppress(QaromaError):
        adapter_in(place)


def gguf(chooser: random.Random, folder: Path) -> None:
    """A GGUF file's header, read as far as the configuration of the model in it."""
    from qaroma.model.found import find_model

    path = folder / "model.gguf"
    whole = _gguf()
    pieces = (struct.pack("<Q", 2**62), struct.pack("<I", 99), struct.pack("<I", 9), b"\xff" * 8, b"\0" * 40)
    path.write_bytes(mutated_bytes(chooser, whole, pieces) if chooser.random() < 0.7
                     else whole[: chooser.randrange(len(whole))])  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        find_model(str(path))


def _gguf() -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    numbers = {"block_count": 1, "context_length": 64, "embedding_length": 8, "feed_forward_length": 8,
               "attention.head_count": 2, "attention.head_count_kv": 2, "vocab_size": 4}  # fmt: skip
    entries = [text("general.architecture") + struct.pack("<I", 8) + text("llama")]
    entries += [text(f"llama.{key}") + struct.pack("<II", 4, value) for key, value in numbers.items()]
    tokens = struct.pack("<IQ", 8, 4) + b"".join(map(text, "abcd"))
    entries += [text("tokenizer.ggml.tokens") + struct.pack("<I", 9) + tokens]
    tensor = text("token_embd.weight") + struct.pack("<IQQIQ", 2, 8, 4, 0, 0)
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, len(entries)) + b"".join(entries) + tensor
    return head + b"\0" * (-len(head) % 32) + b"\0" * 128


_WORDS = ("--config", "--set", "--output", "--data", "--model", "--seed", "--max-steps", "--micro-batch", "--rank",
          "--resume", "--json", "--format", "--base", "--rows", "--vram", "--seq-len", "--methods", "--seeds", "--module",
          "--metric", "--tasks", "--prompt", "--force", "--yes", "--epochs", "--learning-rate", "--examples", "--memory",
          "--max-new-tokens", "--temperature", "--top-p", "--compress", "--revision", "--steps", "--frozen", "-h",
          "runs", "x", "quickstart", "smollm2-135", "demo:calendar", "./missing", ".", "..", "/", "aroma", "lora:8",
          "aroma,lora:8", "training.seed=1", "a=b", "=", "8GiB", "0GiB", "cpu", "llama3-8b", "configs", "data.jsonl:2",
          "10000000000000000000000", "1e400", "1e-400", "-1", "0", "1.5", "~nouser", "~", "a/b", "a" * 300, "\u2603",
          "--data=", "--output=", "--", "data.jsonl:0.0001", "data.jsonl:1e300", "glue:x", "demo:x", "9" * 5000)  # fmt: skip
# What would begin to work: commands that take the model "smollm2-135m" or the network are given neither.
_QUIET = tuple(name for name in COMMANDS if name != "doctor")


def command_line(chooser: random.Random, folder: Path) -> None:
    """Words in any order after a command's name, typed in an empty folder."""
    words = [chooser.choice(_WORDS if chooser.random() < 0.85 else ODD_TEXTS) for _ in range(chooser.randint(0, 6))]
    name = chooser.choice(_QUIET)
    more = {"data": ["preview"], "configs": [chooser.choice(("ls", "cp"))]}.get(name, [])
    words = [word.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape") if "\ud800" not in word else "x"
             for word in words]  # fmt: skip
    with contextlib.chdir(folder):
        (folder / "data.jsonl").write_text('{"text": "a"}\n')
        _command(name, *more, *words)


KINDS: dict[str, Callable[[random.Random, Path], None]] = {
    function.__name__: function
    for function in (configuration, rows, run_directory, adapter, checkpoint, gguf, command_line)
}


def fault(kind: str, seed: int, folder: Path) -> str | None:
    """Run one case; the traceback where it ended in one.

    Args:
        kind: of :data:`KINDS`.
        seed: of the case.
        folder: emptied before.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        KINDS[kind](random.Random(f"{kind} {seed}"), folder)
    except QaromaError:
        return None
    except BaseException:
        return traceback.format_exc()
    return None
