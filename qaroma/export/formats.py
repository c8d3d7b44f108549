"""The formats: how each is checked beforehand, written, and read back for its self-test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qaroma.errors import QaromaError
from qaroma.export import gguf_adapter, gguf_model, mlx_adapter
from qaroma.export.format_facts import FEW_BITS, OUTTYPES
from qaroma.export.gguf_layout import read_linears
from qaroma.export.gguf_names import GgufNames
from qaroma.export.gguf_types import check_outtype
from qaroma.export.gguf_vocab import check_vocabulary
from qaroma.export.live import LiveModel
from qaroma.export.merged import copy_code, write_generation_settings, write_merged
from qaroma.export.ollama import modelfile
from qaroma.export.padded import padded_rank, write_padded
from qaroma.export.readers import LlamaCpp, in_peft, installed, load_gguf_model, load_merged, on_hooks
from qaroma.export.selftest import (
    LOG_PROBABILITY_TOLERANCE,
    LOGIT_TOLERANCE,
    SelfTest,
    compare_llama_cpp,
    compare_model,
    share_arrived,
)
from qaroma.export.subject import Subject
from qaroma.export.weights import checkpoint_tensors
from qaroma.method.factors import Factors
from qaroma.runs.adapter import write_adapter_files
from qaroma.runs.peft_limits import told_of_peft
from qaroma.runs.peft_lora import read_lora

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Check = Callable[[Subject, dict[str, Factors], str], None]
Write = Callable[[LiveModel, Path, torch.dtype, str], dict[str, Any]]
Test = Callable[[LiveModel, Path, torch.dtype, str], SelfTest]


@dataclass(frozen=True)
class Format:
    """One export format.

    Attributes:
        name: as ``--format`` has it.
        dtype: of the stored numbers where none is asked for.
        merges: whether the update is added to the weights.
        check: raises where this base or adapter cannot be written so.
        write: writes into an existing folder.
        test: reads the folder in another way and compares it with the live model.
    """

    name: str
    dtype: torch.dtype
    merges: bool
    check: Check
    write: Write
    test: Test


def _no_check(subject: Subject, update: dict[str, Factors], outtype: str) -> None:
    """Everything can be written so."""


def _check_peft(subject: Subject, update: dict[str, Factors], outtype: str) -> None:
    told = told_of_peft(subject.config, update)
    if told is not None:
        raise QaromaError(told)


def _check_padded(subject: Subject, update: dict[str, Factors], outtype: str) -> None:
    padded_rank(max(factors.rank for factors in update.values()))


def _check_gguf_adapter(subject: Subject, update: dict[str, Factors], outtype: str) -> None:
    names = GgufNames(subject.config)
    for module in update:
        names.tensor(f"{module}.weight")


def _check_mlx(subject: Subject, update: dict[str, Factors], outtype: str) -> None:
    mlx_adapter.check_family(subject.config)


def _check_gguf(subject: Subject, update: dict[str, Factors], outtype: str) -> None:
    _check_gguf_adapter(subject, update, outtype)
    check_outtype(outtype)
    gguf_model.check_positions(subject.config)
    check_vocabulary(subject.tokenizer, subject.template)


def _write_peft(tuned: LiveModel, folder: Path, dtype: torch.dtype, outtype: str) -> dict[str, Any]:
    subject = tuned.subject
    components = {
        name: parts if sum(parts) == tuned.update[name].rank else [tuned.update[name].rank]  # compressed
        for name, parts in subject.info.components.items()
    }
    components = {name: [rank for rank in parts if rank] for name, parts in components.items()}
    info = replace(subject.info, components=components)
    write_adapter_files(folder, tuned.update, info, base=subject.public_base, dtype=dtype)
    return {}


def _write_padded(tuned: LiveModel, folder: Path, dtype: torch.dtype, outtype: str) -> dict[str, Any]:
    return write_padded(folder, tuned.update, linear=tuned.subject.shapes, base=tuned.subject.public_base, dtype=dtype)


def _write_gguf_adapter(tuned: LiveModel, folder: Path, dtype: torch.dtype, outtype: str) -> dict[str, Any]:
    subject = tuned.subject
    gguf_adapter.write_gguf_adapter(folder, tuned.update, subject.config, name=subject.name, dtype=dtype)
    return {}


def _write_mlx(tuned: LiveModel, folder: Path, dtype: torch.dtype, outtype: str) -> dict[str, Any]:
    subject = tuned.subject
    mlx_adapter.write_mlx_adapter(folder, tuned.update, subject.config, base=subject.public_base, dtype=dtype)
    return {}


def _write_merged(tuned: LiveModel, folder: Path, dtype: torch.dtype, outtype: str) -> dict[str, Any]:
    subject = tuned.subject
    told = write_merged(folder, tuned.tensors(), tuned.stored_update(), subject.config, dtype=dtype)
    stops = subject.template.stop_token_ids(subject.tokenizer)
    write_generation_settings(folder, subject.tokenizer, stops, subject.base.generation_settings())
    if subject.base.trust_remote_code:
        copy_code(subject.base.name, folder)
    return {"merged_into": tuned.merge_into, "weights_bytes": told["bytes"]}


def _write_gguf(tuned: LiveModel, folder: Path, dtype: torch.dtype, outtype: str) -> dict[str, Any]:
    subject = tuned.subject
    gguf_model.write_gguf_model(
        folder, tuned.tensors(), tuned.update, subject.config, subject.tokenizer, subject.template,
        outtype=outtype, name=subject.name,
    )  # fmt: skip
    text = modelfile(subject.template, subject.tokenizer, subject.config, model=gguf_model.FILE)
    (folder / "Modelfile").write_text(text, encoding="utf-8")
    told = {"merged_into": tuned.merge_into, "outtype": outtype, "context": gguf_model.context_length(subject.config)}
    if told["context"] < subject.config.max_position_embeddings:
        told["sliding_window"] = told["context"]
    return told


def _test_lora(tuned: LiveModel, folder: Path, dtype: torch.dtype, outtype: str) -> SelfTest:
    """In PEFT itself, or by PEFT's rules in plain torch where it is not installed."""
    tolerance = LOGIT_TOLERANCE[_NAMES[dtype]]
    live = tuned.answers()
    told = told_of_peft(tuned.subject.config, tuned.update)
    if installed("peft") and told is None:
        with in_peft(tuned.model(), folder) as model:
            return compare_model(model, live, engine="PEFT", tolerance=tolerance)
    with on_hooks(tuned.model(), read_lora(folder)[0]):
        why = "it does not load this one whole" if installed("peft") else "peft is not installed"
        engine = f"PEFT's rules in plain torch ({why})"
        return compare_model(tuned.model(), live, engine=engine, tolerance=tolerance)


def _test_gguf_adapter(tuned: LiveModel, folder: Path, dtype: torch.dtype, outtype: str) -> SelfTest:
    """Read with gguf-py and applied by llama.cpp's rules; llama.cpp itself would need a GGUF of the base."""
    read = gguf_adapter.read_gguf_adapter(folder / gguf_adapter.FILE, tuned.subject.config, tuned.update)
    return _test_by_rules(tuned, read, dtype, "gguf-py, by llama.cpp's rules")


def _test_mlx(tuned: LiveModel, folder: Path, dtype: torch.dtype, outtype: str) -> SelfTest:
    """mlx-lm itself would need the base once more, as it is published."""
    read = mlx_adapter.read_mlx_adapter(folder, tuned.update)
    return _test_by_rules(tuned, read, dtype, "safetensors, by mlx-lm's rules in plain torch")


def _test_by_rules(tuned: LiveModel, read: dict[str, Factors], dtype: torch.dtype, engine: str) -> SelfTest:
    with on_hooks(tuned.model(), read):
        tolerance = LOGIT_TOLERANCE[_NAMES[dtype]]
        return compare_model(tuned.model(), tuned.answers(), engine=engine, tolerance=tolerance)


def _test_merged(tuned: LiveModel, folder: Path, dtype: torch.dtype, outtype: str) -> SelfTest:
    live = tuned.merged_answers()
    share = share_arrived(checkpoint_tensors(folder), tuned.tensors(), tuned.stored_update())
    device, arithmetic = tuned.room_for_dense(_NAMES[dtype])
    model = load_merged(folder, arithmetic, device, trust_remote_code=tuned.subject.base.trust_remote_code)
    tolerance = LOGIT_TOLERANCE[_NAMES[dtype]]
    if arithmetic != torch.float32:
        tolerance *= 2  # rounding of the sums comes on top of that of the weights
    test = compare_model(model, live, engine="transformers", tolerance=tolerance)
    return replace(test, share=share)


def _test_gguf(tuned: LiveModel, folder: Path, dtype: torch.dtype, outtype: str) -> SelfTest:
    """In llama.cpp where it is installed, else through transformers' own GGUF reader."""
    subject, path = tuned.subject, folder / gguf_model.FILE
    live = tuned.merged_answers()
    kind, together = OUTTYPES[outtype].tolerance, outtype in FEW_BITS
    written = read_linears(path, subject.config, tuned.update)
    share = share_arrived(written, tuned.tensors(), tuned.update, together=together)
    if installed("xllamacpp"):
        engine = LlamaCpp(path, context=max(len(one.ids) for one in live))
        test = compare_llama_cpp(engine, live, subject.tokenizer, tolerance=LOG_PROBABILITY_TOLERANCE[kind])
    else:
        device, _ = tuned.room_for_dense("fp32")
        model = load_gguf_model(path, device)
        test = compare_model(model, live, engine="transformers' GGUF reader", tolerance=LOGIT_TOLERANCE[kind])
    return replace(test, share=share, share_of="over all modules" if together else test.share_of)


FORMATS = {
    one.name: one
    for one in (
        Format("peft", torch.float32, False, _check_peft, _write_peft, _test_lora),
        Format("padded", torch.float32, False, _check_padded, _write_padded, _test_lora),
        Format("gguf-adapter", torch.float32, False, _check_gguf_adapter, _write_gguf_adapter, _test_gguf_adapter),
        Format("mlx", torch.float32, False, _check_mlx, _write_mlx, _test_mlx),
        Format("merged", torch.bfloat16, True, _no_check, _write_merged, _test_merged),
        Format("gguf", torch.float32, True, _check_gguf, _write_gguf, _test_gguf),
    )
}
