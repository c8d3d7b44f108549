"""The README of an export: what it is, how it came about, how good it is, how each engine loads it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qaroma import __version__
from qaroma.export.compress import Compression
from qaroma.export.selftest import SelfTest
from qaroma.export.source import Source
from qaroma.model.builtin import SMOLLM2_HUB_ID, hub_answers, resolve_model

RANK_MAP = "rank_map.svg"
UNKNOWN = "not known"
_WHEN = ("before", "after")  # training

_LOADING = {
    "peft": """In PEFT (`pip install peft`):

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained("{base}")
    model = PeftModel.from_pretrained(base, "FOLDER")

In qaroma: `qaroma generate FOLDER "a prompt"`. Other engines ignore the rank of each module and scale
it wrongly: give them the format `padded`.""",
    "padded": """In vLLM:

    vllm serve {base} --enable-lora --max-lora-rank {max_lora_rank} --lora-modules tuned=FOLDER

In SGLang:

    python -m sglang.launch_server --model-path {base} --lora-paths tuned=FOLDER

In Ollama: a Modelfile with `FROM` the base and `ADAPTER FOLDER`. In PEFT: as any LoRA, with
`PeftModel.from_pretrained(base, "FOLDER")`.""",
    "gguf-adapter": """In llama.cpp, on a GGUF of the base:

    llama-cli -m base.gguf --lora adapter.gguf

In LM Studio and Ollama: beside the base's GGUF (Ollama: `ADAPTER ./adapter.gguf` in a Modelfile).""",
    "merged": """In transformers, vLLM, SGLang or anything else that reads a checkpoint:

    model = AutoModelForCausalLM.from_pretrained("FOLDER")""",
    "gguf": """In Ollama:

    ollama create {name} -f Modelfile && ollama run {name}

In llama.cpp: `llama-cli -m model.gguf`. In LM Studio: open `model.gguf`.""",
}
_LIBRARY = {"peft": "peft", "padded": "peft", "gguf-adapter": "gguf", "merged": "transformers", "gguf": "gguf"}


def licence_of(base: str, revision: str | None = None) -> str:
    """The base's licence as its model card or the hub names it, or 'not known'.

    Args:
        base: name of the base as the user gave it.
        revision: branch, tag or commit on the hub.
    """
    place = resolve_model(base)
    card = Path(place.folder_or_id) / "README.md"
    if card.is_file():
        front = re.match(r"---\s*\n(.*?)\n---\s*$", card.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
        match = re.search(r"^license:\s*(\S+)", front[1], re.MULTILINE) if front else None
        if match:
            return match[1].strip("\"'")
    hub_id = SMOLLM2_HUB_ID if base.strip().lower() == "smollm2-135m" else place.folder_or_id
    if Path(hub_id).exists() or place.gguf_file is not None or not hub_answers(hub_id):
        return UNKNOWN
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        data = HfApi().model_info(hub_id, revision=revision).card_data
    except (HfHubHTTPError, OSError):
        return UNKNOWN
    return str(data.get("license") or UNKNOWN) if data else UNKNOWN


def model_card(
    source: Source,
    kind: str,
    *,
    ranks: Mapping[str, int],
    test: SelfTest | None,
    licence: str,
    written: Mapping[str, Any],
    compression: Compression | None = None,
    losses: Mapping[str, float] | None = None,
) -> str:
    """The text of ``README.md``.

    Args:
        source: what was exported.
        kind: the format.
        ranks: rank of each module, as exported.
        test: the self-test; None where it was not run.
        licence: of the base.
        written: what the format's writer returned.
        compression: where redundant directions were dropped.
        losses: validation loss by the base merged into.
    """
    base = source.public_base
    head = ["---", f"base_model: {base}", f"library_name: {_LIBRARY[kind]}"]
    head += [f"license: {licence}"] if licence != UNKNOWN else []
    head += ["tags: [lora, aroma, qaroma]", "---", "", f"# {source.name}", ""]
    growth = source.growth
    held = growth["base"]
    lines = [
        f"{base}, fine-tuned with qaroma {__version__} ({growth.get('method', 'lora')}) on a base held in "
        f"{held['quantization']}; format `{kind}`.",
        "",
        f"- Base model: {base} (fingerprint {held['fingerprint']}); its licence: {licence}",
        *[f"- {line}" for line in _data_lines(source.settings())],
        *[f"- {line}" for line in _growth_lines(source.records(), growth, ranks)],
        *[f"- {line}" for line in _metric_lines(source.records())],
        *_compression_lines(compression),
        *_loss_lines(losses),
        f"- Chat template: {source.template.kind}",
        f"- Self-test: {test.sentence() if test else 'not run'}",
        "",
        f"![Rank by layer and module]({RANK_MAP})",
        "",
        "## How to load it",
        "",
        _LOADING[kind].format(
            base=source.public_base, name=source.name.lower(), max_lora_rank=written.get("max_lora_rank")
        ),
        "",
    ]
    return "\n".join(head + lines)


def _data_lines(settings: Mapping[str, Any]) -> list[str]:
    data = settings.get("data") or {}
    sources = [
        one["path"] + (f" (weight {one['weight']:g})" if one["weight"] != 1 else "") for one in data.get("train", [])
    ]
    return [f"Data: {', '.join(sources)}"] if sources else ["Data: not known (the adapter lies outside its run)"]


def _growth_lines(
    records: Sequence[Mapping[str, Any]], growth: Mapping[str, Any], ranks: Mapping[str, int]
) -> list[str]:
    values = list(ranks.values())
    zero = sum(rank == 0 for rank in values)
    lines = [
        f"Rank: smallest {min(values)}, mean {sum(values) / len(values):.2f}, largest {max(values)} over "
        f"{len(values)} modules, {zero} of them 0"
    ]
    steps = [record for record in records if "event" not in record]
    events = [record for record in records if record.get("event") == "growth"]
    if steps:
        committed = sum(event["decision"] == "commit" for event in events)
        lines.append(
            f"Growth: {committed} components committed in {len(events)} growth events, {steps[-1]['step']} steps; "
            f"this adapter is of step {growth.get('step', steps[-1]['step'])}"
        )
        first, last = steps[0]["trainable_parameters"], steps[-1]["trainable_parameters"]
        lines.append(f"Trainable parameters: {first:,} at the start, {last:,} at the end")
    return lines


def _metric_lines(records: Sequence[Mapping[str, Any]]) -> list[str]:
    validations = [record for record in records if record.get("event") == "validation"]
    answers = [record for record in records if record.get("event") == "answers"]
    losses = {when: [r["loss"] for r in validations if (r["step"] > 0) == (when == "after")] for when in _WHEN}
    matches = {when: [r["exact_match"] for r in answers if r["when"] == when] for when in _WHEN}
    lines = []
    if validations:
        shown = [f"{min(losses[when]):.4g} {when}" for when in _WHEN if losses[when]]
        lines.append(f"Validation loss: {', '.join(shown)}")
    if answers:
        shown = [f"{100 * matches[when][-1]:.1f} % {when}" for when in _WHEN if matches[when]]
        lines.append(f"Exact match on held-out requests: {', '.join(shown)}")
    return lines


def _compression_lines(compression: Compression | None) -> list[str]:
    if compression is None:
        return []
    return [
        f"- Compressed: ranks sum to {compression.after} instead of {compression.before} (largest "
        f"{compression.largest_after} instead of {compression.largest_before}), relative error at most "
        f"{compression.reached:.2g} in a module"
    ]


def _loss_lines(losses: Mapping[str, float] | None) -> list[str]:
    if not losses:
        return []
    shown = ", ".join(f"{loss:.4f} merged into the {name} base" for name, loss in losses.items())
    return [f"- Validation loss: {shown}"]
