"""What ``qaroma init`` decides: a configuration for one's own data and card, every choice explained.

The data is read and tokenised as training would, a step is planned for the card, and the rest
follows from :mod:`qaroma.config.presets`. No weight is loaded.
"""

from __future__ import annotations

import math
import textwrap
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
import yaml

from qaroma.config.decisions import Decision
from qaroma.config.growth_presets import LARGE_BUDGET
from qaroma.config.levels import LEVELS
from qaroma.config.load import config_fields, require_model_and_data
from qaroma.config.presets import resolve
from qaroma.config.resolved import ResolvedConfig
from qaroma.config.schema import Config, DataSource
from qaroma.config.tasks import PREFERENCE
from qaroma.config.words import memory_size
from qaroma.data.encode import Encoded, limit_length
from qaroma.data.forms import holds_pairs
from qaroma.data.sources import RowSet, read_rows
from qaroma.data.split import split_validation
from qaroma.data.templates import Template
from qaroma.errors import QaromaError
from qaroma.model.base import load_tokenizer, resolve_device
from qaroma.model.found import find_model
from qaroma.model.precision import dtype_name, in_range, resolve_dtype
from qaroma.plan.card import RESERVE, card_memory
from qaroma.plan.facts import conversation_facts, encoded_as_asked
from qaroma.plan.search import Estimate, Planner
from qaroma.plan.shapes import plannable
from qaroma.plan.trace import StepSettings

EFFECTIVE_BATCH = 16
MICRO_BATCHES = (1, 2, 4, 8)
QUANTILE = 0.95
GRAIN = 64
_PLANNED = ("max_length", "micro_batch", "grad_accum")  # whatever was asked for, the card decides
_LOOKED_AT = 200  # examples whose letters are counted
_UNKNOWN = 2**62  # host memory of a machine that is not this one
_WIDTH = 100
_TEMPLATES = {
    "chat": "the tokenizer's own chat template",
    "plain": "qaroma's plain one (### Instruction / ### Response), since the tokenizer has no chat template",
    "none": "none: prompt and completion joined as they are",
}


@dataclass(frozen=True)
class Room:
    """The memory that a step may take, in bytes.

    Attributes:
        device: on the device, what is kept free already left out.
        host: in the host's memory; None where the host is the device.
        words: the same for people.
        dtype: compute dtype there.
        name: ``auto``, or ``cpu`` where that was asked for.
    """

    device: int
    host: int | None
    words: str
    dtype: torch.dtype = torch.bfloat16
    name: str = "auto"

    def holds(self, step: Estimate) -> bool:
        if self.host is None:
            return step.peak + step.host <= self.device
        return step.peak <= self.device and step.host <= self.host


@dataclass(frozen=True)
class DataLook:
    """What the data is like: rows, tokens of a row at some quantiles, template, and letters by script."""

    form: str
    rows: int
    median: int
    p95: int
    p99: int
    longest: int
    template: str
    letters: str


@dataclass(frozen=True)
class Start:
    """A configuration to begin with.

    Attributes:
        config: every setting resolved.
        choices: what was decided, in the order of the file, each with its reason.
        data: what the data is like.
        step: the planned training step.
        room: what it was planned for.
        left_out: rows that are longer than the longest example.
        notes: sentences about the data.
    """

    config: ResolvedConfig
    choices: tuple[Decision, ...]
    data: DataLook
    step: Estimate
    room: Room
    left_out: int = 0
    notes: tuple[str, ...] = ()


def room_for(card: str | None) -> Room:
    """The memory to plan for.

    Args:
        card: as ``8GiB`` or ``t4``, of a card that need not be here; ``cpu``; None for this machine's GPU, or its
            CPU where it has none.

    Raises:
        QaromaError: neither a size, a known card nor ``cpu``, or a card smaller than what is kept free.
    """
    available = int(psutil.virtual_memory().available)
    if card is not None and card.strip().lower() != "cpu":
        size = card_memory(card)
        if size <= RESERVE:
            raise QaromaError(
                f"got a card of {memory_size(size)}; expected more than the {memory_size(RESERVE)} that are kept free"
            )
        return Room(size - RESERVE, _UNKNOWN, f"a card of {memory_size(size)}")
    device = resolve_device("auto" if card is None else "cpu")
    if device.type == "cpu":
        name = "auto" if card is None else "cpu"
        return Room(available - RESERVE, None, f"the CPU with {memory_size(available)} of free memory", name=name)
    free, words = torch.cuda.mem_get_info(device)[0], torch.cuda.get_device_name(device)
    dtype = resolve_dtype("auto", device)
    return Room(free - RESERVE, available, f"{words} with {memory_size(free)} free", dtype)


def make_start(config: Config, room: Room, *, tell: Callable[[str], None] = lambda _: None) -> Start:
    """Look at the data, plan for the card, and decide.

    Args:
        config: with model and data named; what else it sets is kept.
        room: what a step may take.
        tell: called with what is being done.

    Raises:
        QaromaError: data that cannot be read, no such model, or one that does not fit.
    """
    model = config.model
    tell("reading the data")
    name = require_model_and_data(config)
    base = find_model(name, revision=model.revision, trust_remote_code=model.trust_remote_code)
    tokenizer = load_tokenizer(base)
    template = Template.choose(tokenizer, config.data.template, config.data.tools)
    rows = read_rows([(source.path, source.weight) for source in config.data.train], seed=config.training.seed)
    found = _task_found(config, rows)
    config = config.model_copy(update={"task": found.value}) if found else config
    encoded = encoded_as_asked(config, rows, base, tokenizer, template, max_length=None)
    look = _look(encoded)
    longest = base.longest_input
    wanted = max(GRAIN, math.ceil(look.p95 / GRAIN) * GRAIN)
    planner = Planner(plannable(base))
    # Which rank the data needs is known when its length is: the step is planned for the largest that may train.
    dtype = in_range(room.dtype, base.config)
    wished = StepSettings(
        0,
        min(wanted, longest or wanted),
        sequences=config.sequences,
        inner_rank=LARGE_BUDGET,
        frozen_rank=0,
        dtype=dtype,
        repeated_keys=dtype != torch.bfloat16,  # as a GPU without bf16 has it
    )
    step = fit_step(planner, wished, room, tell=tell)
    chosen, settings = config.model_copy(deep=True), step.settings
    chosen.data.max_length = settings.seq_len
    chosen.training.micro_batch = settings.micro_batch
    chosen.training.grad_accum = EFFECTIVE_BATCH // settings.micro_batch
    within = limit_length(encoded, settings.seq_len, config.data.on_too_long)
    train, validation = split_validation(
        within, share=config.data.validation_share, at_most=config.data.validation_max, seed=config.training.seed
    )
    facts = conversation_facts(
        config, base, lengths=within.lengths, train=train, validation_rows=len(validation.examples)
    )
    resolved, decisions = resolve(chosen, facts)
    given = [
        ("model", chosen.model, {"name"}),
        ("data", chosen.data, {"train"}),
        ("training", config.training, set[str]()),
    ]
    choices = [
        *([found] if found else []),
        *(Decision(f"{name}.{key}", getattr(section, key), "as asked for")
          for name, section, always in given for key in type(section).model_fields
          if key in always or (key in section.model_fields_set and key not in _PLANNED)),
        *_of_the_plan(wanted, longest, look, within, step, room),
        *decisions,
    ]  # fmt: skip
    notes = (*([f"task {found.value}: {found.reason}"] if found else []), *encoded.notes)
    return Start(resolved, tuple(choices), look, step, room, within.dropped_too_long, notes)


def _task_found(config: Config, rows: RowSet) -> Decision | None:
    """The task that the rows ask for, where nothing was said of it."""
    said = config.data.feedback != "refuse" or config.data.format != "auto" or "task" in config.model_fields_set
    if said or not holds_pairs(rows.rows, config.data.columns):
        return None
    return Decision("task", PREFERENCE, "the rows have a chosen and a rejected answer each")


def fit_step(
    planner: Planner, settings: StepSettings, room: Room, *, tell: Callable[[str], None] = lambda _: None
) -> Estimate:
    """The fastest memory level that one sequence fits at, with as many sequences as fit at that level.

    Where no level holds even one sequence, it is made as short as the last level needs.

    Args:
        planner: of the model.
        settings: of the step; level and micro-batch do not matter.
        room: what it may take.
        tell: called with what is being planned.

    Raises:
        QaromaError: nothing fits.
    """
    tell(f"planning a step of {settings.seq_len:,} tokens")
    one = replace(settings, micro_batch=1)
    level = planner.fastest_level(one, room.device, room.host)
    if level is None:
        level = len(LEVELS) - 1
        one = replace(one, level=level, seq_len=_longest_held(planner, replace(one, level=level), room))
    best = planner.estimate(replace(one, level=level))
    for count in MICRO_BATCHES[1:]:
        tell(f"planning a step of {count} x {one.seq_len:,} tokens at level {level}")
        larger = planner.estimate(replace(one, level=level, micro_batch=count))
        if not room.holds(larger):
            break
        best = larger
    return best


def _longest_held(planner: Planner, settings: StepSettings, room: Room) -> int:
    """The longest sequence whose step fits, to :data:`GRAIN` tokens, below one that does not."""
    fits, over = 0, math.ceil(settings.seq_len / GRAIN)
    while over - fits > 1:
        middle = (fits + over) // 2
        if room.holds(planner.estimate(replace(settings, seq_len=middle * GRAIN))):
            fits = middle
        else:
            over = middle
    if not fits:
        raise QaromaError(
            f"not even the smallest step fits {room.words}; name a smaller --model (smollm2-135m), or a larger card: "
            "--vram 12GiB"
        )
    return fits * GRAIN


def _look(encoded: Encoded[Any]) -> DataLook:
    ordered = sorted(encoded.lengths)

    def quantile(share: float) -> int:
        return ordered[math.ceil(share * len(ordered)) - 1]

    rows = len({example.origin for example in encoded.examples})
    kind = _TEMPLATES[encoded.template.kind] if encoded.form != "text" else "none: plain text, in chunks"
    quantiles = (quantile(0.5), quantile(QUANTILE), quantile(0.99), ordered[-1])
    contents = (message.content for example in encoded.examples[:_LOOKED_AT] for message in example.conversation)
    return DataLook(encoded.form, rows, *quantiles, kind, letters("".join(contents)))


def letters(text: str) -> str:
    """Which scripts the letters of a text belong to, by their Unicode names, as ``Latin 98 %, Greek 2 %``.

    Those with less than a hundredth are left out; empty where the text has no letters.
    """
    scripts = Counter(unicodedata.name(char, "?").split()[0].title() for char in text if char.isalpha())
    total = sum(scripts.values())
    return ", ".join(f"{name} {n / total:.0%}" for name, n in scripts.most_common() if n >= total / 100)


def _of_the_plan(
    wanted: int, longest: int | None, look: DataLook, within: Encoded[Any], step: Estimate, room: Room
) -> list[Decision]:
    """The choices that the lengths and the card decide."""
    settings = step.settings
    chosen = settings.seq_len
    if chosen == wanted:
        why = f"95 % of the rows have at most {look.p95} tokens, rounded up to a multiple of {GRAIN}"
    elif chosen == longest:
        why = f"the model was made for {longest} tokens; 95 % of the rows have at most {look.p95}"
    else:
        why = f"the longest that fits {room.words}; 95 % of the rows have at most {look.p95} tokens"
    if within.dropped_too_long:
        why += (
            f". {within.dropped_too_long} of {look.rows} rows are longer and left out; on_too_long: truncate cuts them"
        )
    level = settings.level
    fit = f"the fastest level at which {chosen} tokens fit {room.words}: {LEVELS[level].summary}"
    choices = [
        Decision("data.max_length", chosen, why),
        Decision("training.micro_batch", settings.micro_batch, _why_micro_batch(step, room)),
        Decision("training.grad_accum", EFFECTIVE_BATCH // settings.micro_batch, f"{EFFECTIVE_BATCH} examples a step"),
        Decision("training.memory", level, f"{fit}. auto looks again at every start"),
        Decision("training.device", room.name, "auto takes a GPU where there is one"),
    ]
    if settings.dtype != torch.bfloat16:
        name = dtype_name(settings.dtype)
        why = "this GPU has no bf16" + (", and the model overflows in fp16" if name == "fp32" else "")
        choices.append(Decision("model.compute_dtype", name, why))
    return choices


def _why_micro_batch(step: Estimate, room: Room) -> str:
    count = step.settings.micro_batch
    bound = "more is not tried" if count == MICRO_BATCHES[-1] else f"{2 * count} do not fit"
    host = f" and {memory_size(step.host)} of host memory" if step.host else ""
    return f"such a step is planned to take {memory_size(step.peak)}{host} of {room.words}; {bound}"


def start_yaml(start: Start, file: str) -> str:
    """The configuration as YAML, each line under what it means and why it is as it is.

    Args:
        start: what was decided.
        file: name under which it will be found, for the command in the header.
    """
    data, step = start.data, start.step
    sources = ", ".join(source.path for source in start.config.data.train)
    letters_found = f"Letters: {data.letters}. " if data.letters else ""
    paragraphs = [
        f"Fine-tunes {start.config.model.name} on {sources}. Written by qaroma init: change what you like. A line "
        "that is taken out is decided anew at every start.",
        f"  qaroma finetune --config {file}",
        f"Data: {data_words(data)} {letters_found}Template: {data.template}.",
        f"PLANNED: memory {memory_size(step.peak)} at the peak of a step, on {start.room.words}; time and score are "
        "not known before a run.",
    ]
    lines = "\n\n".join(textwrap.fill(text, _WIDTH - 2, break_on_hyphens=False) if text[0] != " " else text
                        for text in paragraphs).splitlines()  # fmt: skip
    lines = [f"# {line}".rstrip() for line in lines]
    fields = config_fields()
    for section in Config.model_fields:
        chosen = [choice for choice in start.choices if choice.key.partition(".")[0] == section]
        lines += [""] if chosen else []
        indent = ""
        if chosen and chosen[0].key != section:
            lines.append(f"{section}:")
            indent = "  "
        for choice in chosen:
            about = f"{fields[choice.key].description} Here: {choice.reason}."
            lines += textwrap.wrap(about, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
            lines.append(f"{indent}{choice.key.rpartition('.')[2]}: {_value(choice.value)}")
    return "\n".join(lines) + "\n"


def data_words(data: DataLook) -> str:
    """A sentence about form and lengths."""
    return (
        f"{data.form}, {data.rows:,} rows; tokens of a row: median {data.median:,}, 95 % at most {data.p95:,}, "
        f"99 % at most {data.p99:,}, longest {data.longest:,}."
    )


def _value(value: Any) -> str:
    """A value on one line, as YAML reads it back."""
    if isinstance(value, Sequence) and value and isinstance(value[0], DataSource):
        value = [source.path if source.weight == 1 else source.model_dump() for source in value]
        value = value[0] if len(value) == 1 else value
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("\n...\n").strip()
