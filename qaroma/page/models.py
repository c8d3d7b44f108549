"""The models that can be chosen: what lies on this machine first, then what fits it and would be fetched."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from qaroma.model.builtin import SMOLLM2_HUB_ID, SMOLLM2_NAME
from qaroma.plan.card import RESERVE, this_card
from qaroma.plan.shapes import HUB_IDS, SHAPES
from qaroma.runs.files import read_json

_BYTES = 0.516  # of a weight in NF4 with its scales
_STEP = 2**29  # what a step of a few hundred tokens takes beside the weights, at memory level 3
_CPU_PARAMETERS = 2 * 10**9  # the most that anybody waits for without a GPU


@dataclass(frozen=True)
class Model:
    """A model that can be chosen.

    Attributes:
        name: as ``--model`` takes it.
        parameters: of the whole; 0 where its configuration does not say.
        memory: bytes that training takes at the least, by arithmetic; the plan of the run counts them.
        here: it lies on this machine.
    """

    name: str
    parameters: int
    memory: int
    here: bool


@dataclass(frozen=True)
class Machine:
    """Where it would train: bytes of the GPU, or of the host's memory where there is none."""

    memory: int
    gpu: str | None


def this_machine() -> Machine:
    """Look for a GPU, in a process that ends: to look takes some of a card's memory for as long as it lives."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(this_card).result()
    if found is None:
        return Machine(int(psutil.virtual_memory().available), None)
    memory, card = found
    return Machine(memory - RESERVE, card.title if card else "the GPU")


def models_for(machine: Machine, cache: Path | None = None) -> list[Model]:
    """The built-in model, those in the hub's cache, and known ones to fetch; all but the first only where they fit."""
    built_in = _model(SMOLLM2_NAME, SHAPES[SMOLLM2_NAME], here=True)
    cached = [_model(name, config, here=True) for name, config in _cached(cache)]
    names = {SMOLLM2_HUB_ID, *(model.name for model in cached)}
    known = [_model(HUB_IDS[name], shape, here=False) for name, shape in SHAPES.items() if name != SMOLLM2_NAME]
    fetched = sorted((one for one in known if one.name not in names), key=lambda model: model.parameters)
    most = float("inf") if machine.gpu else _CPU_PARAMETERS
    fits = (one for one in (*cached, *fetched) if one.memory <= machine.memory and one.parameters <= most)
    return [built_in, *fits]


def _cached(cache: Path | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and configurations of the hub's models that write text, and whose weights are here."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir(cache).repos
    except CacheNotFound:
        return
    for repo in sorted(repos, key=lambda repo: -repo.last_accessed):
        for revision in list(repo.revisions)[:1] if repo.repo_type == "model" else []:
            config = read_json(revision.snapshot_path / "config.json")
            writes = any(str(name).endswith("ForCausalLM") for name in config.get("architectures") or ())
            weights = any(file.file_name.endswith(".safetensors") for file in revision.files)
            if writes and weights and repo.repo_id != SMOLLM2_HUB_ID:
                yield repo.repo_id, config


def _model(name: str, config: Mapping[str, Any], *, here: bool) -> Model:
    """A model by the sizes of its configuration."""
    try:
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        attention = 2 * (heads + config["num_key_value_heads"]) * (config.get("head_dim") or hidden // heads)
        layers = config["num_hidden_layers"] * hidden * (attention + 3 * config["intermediate_size"])
        embedding = config["vocab_size"] * hidden
    except (KeyError, TypeError):
        return Model(name, 0, 0, here)
    heads_apart = 1 if config.get("tie_word_embeddings") else 2
    return Model(name, layers + heads_apart * embedding, round(_BYTES * (layers + embedding)) + _STEP, here)
