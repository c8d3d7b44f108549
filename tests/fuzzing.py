"""A seeded generator of damaged input: configurations, rows, run directories, adapters, checkpoints, GGUF files and
command lines, each a whole one with a few things changed in it. A seed gives the same case everywhere.

A case ends as it should with an exit code or a :class:`QaromaError`; anything else that is raised is a fault.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import random
import shutil
import struct
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from qaroma.cli import COMMANDS, main, root
from qaroma.config.load import dump_config, read_settings
from qaroma.errors import QaromaError

DEEP = "[" * 3000 + "]" * 3000
ODD_TEXTS = (
    "", " ", "\0", "²", "--1", "~nouser/x", "../../x", "a" * 300, "(a+)+$", "(a|aa)+$", "1e999", "-", "é" * 200, "nan",
    "{{ 1 }}", "%s{x}", "C:\\x", "a:1e300", "a:0.0001", "\u2028", "\ud800", "[", "<script>", "*" * 50, ".",
)  # fmt: skip
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
    with contextlib.suppress(QaromaError):
        assert dump_config(read_settings(folder / "config.yaml", {}, sets))
    sets += ["model.name=./missing"]
    _command("finetune", "--config", str(folder / "config.yaml"), *(word for text in sets for word in ("--set", text)))


def _no_tokenizer(*_: Any, **__: Any) -> Any:
    """What comes before the tokenizer is tried here."""
    raise QaromaError("no tokenizer")


def rows(chooser: random.Random, folder: Path) -> None:
    """A file of rows, read as conversations and as texts with labels."""
    from qaroma.data.forms import parse_rows
    from qaroma.data.labelled import encode_labelled
    from qaroma.data.sources import read_rows

    name = chooser.choice(("a.jsonl", "a.json", "a.csv", "a.txt", "a.jsonl.gz", "a.parquet"))
    like = chooser.choice(_ROWS)
    if name == "a.csv":
        pieces = (b'"', b"\0", b",,,", b"\n\n", b"\xff", b'"' + b"x" * 200_000)
        data = mutated_bytes(chooser, b'prompt,completion\na,b\nc,"d,e"\n', pieces)
    elif name == "a.json":
        data = _json(chooser, [like, like])
    else:
        data = b"\n".join(_json(chooser, like) for _ in range(chooser.randint(1, 3)))
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") and chooser.random() < 0.7 else data)
    found = read_rows([(str(folder / name), chooser.choice((1.0, 0.0001, 2.0)))])
    with contextlib.suppress(QaromaError):
        parse_rows(found.rows)
    for kind in ("classification", "regression"):
        with contextlib.suppress(QaromaError):
            encode_labelled(found, _no_tokenizer, kind, skip_bad=chooser.random() < 0.5)


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
    from qaroma.data.forms import BadRow, Message
    from qaroma.data.templates import PLAIN, Template
    from qaroma.runs.adapter import read_adapter
    from qaroma.runs.adapter_info import AdapterInfo
    from qaroma.runs.peft_lora import read_lora

    place = folder / "adapter"
    _write_adapter(place)
    if chooser.random() < 0.5:
        template = Template("plain", PLAIN, {"eos_token": "<e>"}, "<e>", "<e>").to_json()
        (place / "growth.json").write_text(json.dumps({**_growth(), "template": template}))
    path = place / chooser.choice(("growth.json", "adapter_config.json", "adapter_model.safetensors"))
    if path.suffix == ".json":
        path.write_bytes(_json(chooser, json.loads(path.read_text())))
    else:
        path.write_bytes(_damaged_safetensors(chooser, path.read_bytes()))
    for read in (read_lora, read_adapter):
        with contextlib.suppress(QaromaError):
            read(place)
    with contextlib.suppress(QaromaError, BadRow):
        template = AdapterInfo.read(place).task.template
        Template.from_json(dict(template)).render_prompt([Message("user", "a")]) if template else None
    words = (("generate", "x"), ("export",), ("evaluate", "--data", "demo:calendar-test"), ("runs",), ("chat",))
    name, *more = chooser.choice(words)
    if chooser.random() < 0.3:
        _command(name, str(place), *more)


def _damaged_safetensors(chooser: random.Random, data: bytes) -> bytes:
    if chooser.random() < 0.4:
        return mutated_bytes(chooser, data)
    (length,) = struct.unpack("<Q", data[:8])
    text = _json(chooser, json.loads(data[8 : 8 + length]))
    return struct.pack("<Q", chooser.choice((len(text), len(text), 2**62, 0))) + text + data[8 + length :]


_BASE = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 8,
    "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1, "vocab_size": 8, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 16, "tie_word_embeddings": True, "dtype": "float32",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip
_INDEX = {"metadata": {"total_size": 8}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}


def base_model(chooser: random.Random, folder: Path) -> None:
    """A base's folder whose configuration or index of weights is damaged, as far as it is read before its weights."""
    from qaroma.model.found import find_model, stored_quantization
    from qaroma.model.generation import generation_settings
    from qaroma.model.weight_files import require_safetensors, weight_files

    files = {"config.json": _BASE, "model.safetensors.index.json": _INDEX,
             "generation_config.json": {"eos_token_id": [1, 2], "do_sample": True, "temperature": 0.5}}  # fmt: skip
    damaged = chooser.choice(list(files))
    for name, value in files.items():
        (folder / name).write_bytes(_json(chooser, value) if name == damaged else json.dumps(value).encode())
    with contextlib.suppress(QaromaError):
        require_safetensors("x", folder)
        assert all(file.resolve().is_relative_to(folder.resolve()) for file in weight_files(folder))
    generation_settings(str(folder))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        found = find_model(str(folder))
        stored_quantization(found.config, "x")


def checkpoint(chooser: random.Random, folder: Path) -> None:
    """A checkpoint whose values or tensors are damaged, read to resume and to export."""
    from qaroma.runs.checkpoint import _digest, adapter_in, load_newest

    place = folder / "step-00000002"
    place.mkdir()
    values = {"version": 2, "base": "0" * 16, "step": 2, "sha256": "0" * 64,
              "values": {"adapter": _growth(), "method": {"name": "aroma", "components": {}}}}  # fmt: skip
    tensors = _safetensors({"method.a": (2, 3), "random.cpu": (1, 8)})
    (place / "state.safetensors").write_bytes(tensors)
    if chooser.random() < 0.6:  # somebody's own, whose digest is right
        header = {key: mutated_value(chooser, value) for key, value in values.items() if key != "sha256"}
        header = {**header, "version": 2, "base": "0" * 16}
        header["sha256"] = _digest(header, place / "state.safetensors")
        (place / "state.json").write_text(json.dumps(header))
    else:
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


_WORDS = (
    "runs", "x", "quickstart", "smollm2-135", "demo:calendar", "./missing", ".", "..", "aroma", "lora:8", "run",
    "aroma,lora:8", "training.seed=1", "a=b", "=", "8GiB", "0GiB", "1e300GiB", "cpu", "configs", "data.jsonl:2",
    "10000000000000000000000", "1e400", "1e-400", "-1", "0", "1", "1.5", "~nouser", "~", "a/b", "a" * 300, "\u2603",
    "data.jsonl:0.0001", "data.jsonl:1e300", "glue:x", "demo:x", "9" * 5000, "peft", "gguf", "run,run", "data.jsonl",
    "0,0,1", "png,svg", "html", "lora:" + "9" * 30, "aroma+t_in=0", "aroma+=", "+", ",",
)  # fmt: skip
# demo trains, page serves until it is stopped, doctor tries the machine, and benchmark reads the thousands of files
# of lm-evaluation-harness.
_OTHERS = ("demo", "page", "doctor", "benchmark", "configs", "data", "runs")
_WITHOUT_A_MODEL = tuple(name for name in COMMANDS if name not in _OTHERS)
_OF_GROUPS = ("configs ls", "configs cp", "data preview", "runs ls", "runs rm")


def command_line(chooser: random.Random, folder: Path) -> None:
    """Options and words in any order after a command's name, typed beside a run, with no model and no network."""
    name = chooser.choice((*_WITHOUT_A_MODEL, *_WITHOUT_A_MODEL, *_OF_GROUPS))
    words = name.split()
    command = root.get_command(click.Context(root), words[0])
    if isinstance(command, click.Group):
        command = command.get_command(click.Context(command), words[1])
    assert command is not None
    arguments = [one for one in command.params if isinstance(one, click.Argument)]
    options = [one for one in command.params if isinstance(one, click.Option)]
    words += [_word(chooser) for _ in arguments if chooser.random() < 0.9]
    chosen = [one for one in options if one.required and chooser.random() < 0.95]
    for option in chosen + chooser.choices(options or [click.Option(["--x"])], k=chooser.randint(0, 4)):
        words.append(chooser.choice(option.opts))
        if not option.is_flag:
            kind = option.type
            words.append(chooser.choice(kind.choices) if isinstance(kind, click.Choice) else _word(chooser))
    if "--suite" in words:
        words.append("--table-only")  # without it, one that is typed right trains for hours
    with contextlib.chdir(folder):
        (folder / "data.jsonl").write_text('{"text": "a"}\n')
        _write_run(folder / "run")
        _command(*words)


def _word(chooser: random.Random) -> str:
    word = chooser.choice(_WORDS if chooser.random() < 0.85 else ODD_TEXTS)
    return word if word.isprintable() else "x"


KINDS: dict[str, Callable[[random.Random, Path], None]] = {
    function.__name__: function
    for function in (configuration, rows, run_directory, adapter, checkpoint, base_model, gguf, command_line)
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
