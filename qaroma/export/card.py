"""The README of an export: what it is, how it came about, how good it is, how each engine loads it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qaroma import __version__
from qaroma.config.metrics import metric_facts
from qaroma.export.compress import Compression
from qaroma.export.format_facts import FORMAT_FACTS
from qaroma.export.selftest import SelfTest
from qaroma.model.builtin import SMOLLM2_HUB_ID, hub_answers, resolve_model
from qaroma.runs.adapter_info import AdapterInfo
from qaroma.runs.reading import validation_of_adapter

RANK_MAP = "rank_map.svg"
UNKNOWN = "not known"
_WHEN = ("before", "after")  # training

FOLDER = "FOLDER"  # stands for where the reader has put the files


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
    except (HfHubHTTPError, OSError, ValueError):  # no network, a refusal, or a page that is no JSON
        return UNKNOWN
    return str(data.get("license") or UNKNOWN) if data else UNKNOWN


@dataclass(frozen=True)
class CardFacts:
    """What a model card tells of an adapter, whatever its form.

    Attributes:
        name: of the adapter, for people.
        info: what it remembers.
        base: its base as readers find it; ``base_on_hub`` says whether that is an id on the hub.
        ranks: rank of each module, as exported.
        licence: of the base.
        data: the run's data sources, as they may be read; empty where they are not known.
        parameters: numbers that are exported; None where they are not known.
        records: of the run's metrics log, those that are of this adapter.
        template: kind of the chat template.
        repo: ``NAMESPACE/NAME`` where the files lie on the hub; None in a folder.
    """

    name: str
    info: AdapterInfo
    base: str
    ranks: Mapping[str, int]
    licence: str
    data: Sequence[str] = ()
    parameters: int | None = None
    records: Sequence[Mapping[str, Any]] = ()
    template: str = "none"
    base_on_hub: bool = True
    repo: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What an export came to.

    Attributes:
        test: the self-test; None where it was not run.
        written: what the format's writer returned.
        compression: where redundant directions were dropped.
        losses: validation loss by the base merged into.
    """

    test: SelfTest | None = None
    written: Mapping[str, Any] = field(default_factory=dict)
    compression: Compression | None = None
    losses: Mapping[str, float] = field(default_factory=dict)


def model_card(facts: CardFacts, kind: str, outcome: Outcome | None = None) -> str:
    """The text of ``README.md``.

    Args:
        facts: of the adapter.
        kind: the format.
        outcome: of an export; None where there was none.
    """
    outcome = outcome or Outcome()
    info, held = facts.info, facts.info.base
    head = ["---"]
    head += [f"base_model: {facts.base}"] if facts.base_on_hub else []  # the hub would look for a folder's name
    head += [f"library_name: {FORMAT_FACTS[kind].library}"]
    head += [f"license: {facts.licence}"] if facts.licence != UNKNOWN else []
    head += ["tags: [lora, aroma, qaroma]", "---", "", f"# {facts.name}", ""]
    lines = [
        f"{facts.base}, fine-tuned with qaroma {__version__} ({info.method or 'lora'}) on a base held in "
        f"{held.quantization if held else UNKNOWN}; format `{kind}`.",
        "",
        f"- Base model: {facts.base} (fingerprint {held.fingerprint if held else UNKNOWN}); its licence: "
        f"{facts.licence}",
        f"- Data: {', '.join(facts.data) or 'not known (the adapter lies outside its run)'}",
        *[f"- {line}" for line in _growth_lines(facts)],
        *[f"- {line}" for line in _metric_lines(facts, outcome.compression)],
        *_compression_lines(outcome.compression),
        *_loss_lines(outcome.losses),
        f"- Chat template: {facts.template}",
        f"- Self-test: {outcome.test.sentence() if outcome.test else 'not run'}",
        "",
        f"![Rank by layer and module]({RANK_MAP})",
        "",
        "## How to load it",
        "",
        _loading(facts, kind, outcome.written),
        "",
    ]
    return "\n".join(head + lines)


def use_line(facts: CardFacts, kind: str, written: Mapping[str, Any], place: str, name: str | None = None) -> str:
    """The command that uses an export.

    Args:
        facts: of the adapter.
        kind: the format.
        written: what the format's writer returned.
        place: where the files lie, as it is typed.
        name: in Ollama; None is made of the adapter's.
    """
    name = name or re.sub(r"[^a-z0-9._-]+", "-", facts.name.lower()).strip("-._") or "tuned"
    return FORMAT_FACTS[kind].use.format(
        base=facts.base, place=place, name=name, max_lora_rank=written.get("max_lora_rank")
    )


def _loading(facts: CardFacts, kind: str, written: Mapping[str, Any]) -> str:
    place, info = facts.repo or FOLDER, facts.info
    local = place.rpartition("/")[2]
    use = f"`qaroma evaluate {local} --data FILE`" if info.task.outputs else f'`qaroma generate {local} "a prompt"`'
    return FORMAT_FACTS[kind].loading.format(
        use=use_line(facts, kind, written, place),
        base=facts.base,
        place=place,
        in_peft="\n    ".join(lines_for_peft(info, facts.base, place)),
        in_qaroma=use if facts.repo is None else f"`hf download {place} --local-dir {local}`, then {use}",
        options=_trust(info),
    )


def lines_for_peft(info: AdapterInfo, base: str, place: str, revision: str | None = None) -> list[str]:
    """Python lines that load an adapter in PEFT.

    Args:
        info: what the adapter remembers.
        base: name of its base.
        place: folder or repository of the adapter.
        revision: its branch; None is the main one.
    """
    auto = "AutoModelForCausalLM" if info.task.outputs is None else "AutoModelForSequenceClassification"
    outputs = "" if info.task.outputs is None else f", num_labels={info.task.outputs}"
    branch = "" if revision is None else f', revision="{revision}"'
    return [
        "from peft import PeftModel",
        f"from transformers import {auto}",
        f'base = {auto}.from_pretrained("{base}"{outputs}{_trust(info)})',
        f'model = PeftModel.from_pretrained(base, "{place}"{branch})',
    ]


def _trust(info: AdapterInfo) -> str:
    return ", trust_remote_code=True" if info.base is not None and info.base.needs_remote_code else ""


def data_sources(settings: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Path and weight of each training source in a run's configuration."""
    data = settings.get("data")
    train = data.get("train") if isinstance(data, Mapping) else None
    sources = [one for one in train if isinstance(one, Mapping)] if isinstance(train, list) else []
    weights = [one.get("weight") for one in sources]
    return [
        (str(one.get("path")), float(weight) if isinstance(weight, (int, float)) and abs(weight) < 1e9 else 1.0)
        for one, weight in zip(sources, weights, strict=True)
    ]


def source_text(path: str, weight: float) -> str:
    """A data source for people."""
    return path + (f" (weight {weight:g})" if weight != 1 else "")


def _growth_lines(facts: CardFacts) -> list[str]:
    records, step, values = facts.records, facts.info.step, list(facts.ranks.values())
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
            f"this adapter is of step {step or steps[-1]['step']}"
        )
    trained = [record["trainable_parameters"] for record in steps if step is None or record["step"] <= step]
    return [*lines, *_parameter_lines(facts.parameters, max(trained, default=None))]


def _parameter_lines(held: int | None, trained: int | None) -> list[str]:
    """How many there are after trimming, with what froze; and how many trained together where those are others."""
    at_most = f"at most {trained:,} trained together" if trained is not None else ""
    if held is None:
        return [f"Parameters: {at_most}"] if at_most else []
    return [f"Parameters: {held:,} in the adapter" + (f", {at_most}" if at_most and trained != held else "")]


def _metric_lines(facts: CardFacts, compression: Compression | None) -> list[str]:
    validations = [record for record in facts.records if record.get("event") == "validation"]
    answers = [record for record in facts.records if record.get("event") == "answers"]
    matches = {when: [r["exact_match"] for r in answers if r["when"] == when] for when in _WHEN}
    base = next((record for record in validations if record["step"] == 0), {})
    own = validation_of_adapter(facts.info, validations)
    whole = ", before it was compressed" if compression else ""
    lines = []
    for name in dict.fromkeys(("loss", facts.info.task.metric or "loss")):
        values = {"before": base.get(name), "after": own.get(name)}
        shown = [f"{metric_facts(name).text(value)} {when}" for when, value in values.items() if value is not None]
        lines += [f"Validation {name}: {', '.join(shown)}{whole}"] if shown else []
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


def _loss_lines(losses: Mapping[str, float]) -> list[str]:
    if not losses:
        return []
    shown = ", ".join(f"{loss:.4f} merged into the {name} base" for name, loss in losses.items())
    return [f"- Validation loss: {shown}"]
