"""Families of models: each trains, generates and exports, or is told why not before it trains."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import ENGINES, FAMILIES, QUANTIZATIONS, TABLE, try_family

from qaroma.export.gguf_families import ARCHITECTURES

pytest.importorskip("peft")
pytest.importorskip("xllamacpp")

# Of each kind of fault one, the rest slow.
QUICK = ("gpt2", "falcon", "mamba", "llama4_text", "gemma2", "deepseek_v3")
REFUSED = {"falcon_h1": "does something to its logits that qaroma does not know"}
NO_GGUF = "which GGUF exports do not cover"
NO_PEFT = {
    **dict.fromkeys(("deepseek_v3", "qwen3_next"), "PEFT does not load an adapter of this base whole"),
    **dict.fromkeys(("mamba", "falcon_mamba", "mamba2"), "PEFT refuses an adapter of this base"),
}


def _case(family: str, quantization: str):
    quick = family in QUICK and quantization == "nf4"
    return pytest.param(family, quantization, marks=() if quick else pytest.mark.slow)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "quantization"), [_case(f, q) for f in FAMILIES for q in QUANTIZATIONS])
def test_a_family_trains_generates_and_exports(family: str, quantization: str, tokenizer, tmp_path: Path) -> None:
    found = try_family(family, tmp_path, tokenizer, quantization)
    if family in REFUSED:
        assert REFUSED[family] in found.refused
        return
    assert not found.refused
    assert found.without_gradient == []
    assert found.trains, (found.losses, found.error)
    assert found.generates
    refused = {"peft": NO_PEFT.get(family), "gguf": None if family in ARCHITECTURES else NO_GGUF}
    for kind in ENGINES:
        sentence, outcome = refused.get(kind), found.exports[kind]
        if sentence is not None:
            assert sentence in str(outcome), kind
        else:
            assert found.arrived(kind), outcome


def test_the_table_has_every_family() -> None:
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    assert [line.split("|")[1].strip() for line in lines if line.startswith("| ")][1:] == list(FAMILIES)
    assert not any("NO" in line.split("|") for line in lines)
