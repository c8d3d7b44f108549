"""What is exported: a run's adapter, an adapter folder, or a checkpoint, with all that belongs to it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open

from qaroma.data.templates import Template
from qaroma.engine.placement import quantise_head
from qaroma.errors import QaromaError
from qaroma.export.delta import Factors, check_shapes, linear_shapes
from qaroma.model.base import fingerprint, load_base, load_model_config, load_tokenizer
from qaroma.model.builtin import SMOLLM2_HUB_ID
from qaroma.runs.adapter import read_growth
from qaroma.runs.directory import (
    GROWTH,
    STATE,
    RunDirectory,
    find_adapter,
    nothing_there,
    run_around,
    run_of_checkpoint,
)
from qaroma.runs.log import read_records
from qaroma.runs.peft_lora import read_lora


@dataclass(frozen=True)
class Source:
    """An adapter and what it was trained with.

    Attributes:
        folder: where the factors lie.
        run: its run directory, where it lies in one.
        growth: what ``growth.json`` says.
        delta: the update, rank-0 modules included.
        base: name of the base; ``revision`` on the hub.
        config, tokenizer, template: of the base and the run.
        shapes: (M, N) of each of the base's linear layers.
    """

    folder: Path
    run: RunDirectory | None
    growth: dict[str, Any]
    delta: dict[str, Factors]
    base: str
    revision: str | None
    config: Any
    tokenizer: Any
    template: Template
    shapes: dict[str, tuple[int, int]]

    @property
    def name(self) -> str:
        """A name for people: the run's, or the folder's."""
        return (self.run.path if self.run else self.folder).resolve().name

    @property
    def public_base(self) -> str:
        """The base as other tools find it: the built-in one by its id on the hub."""
        return SMOLLM2_HUB_ID if self.base.strip().lower() == "smollm2-135m" else self.base

    def settings(self) -> dict[str, Any]:
        """The run's resolved configuration as plain values; empty outside a run."""
        if self.run is None:
            return {}
        return dict(yaml.safe_load(self.run.config.read_text(encoding="utf-8")) or {})

    def records(self) -> list[dict[str, Any]]:
        """The run's metrics log; empty outside a run."""
        return read_records(self.run) if self.run else []


def open_source(path: str | Path, *, base: str | None = None) -> Source:
    """Read an adapter and find what belongs to it.

    Args:
        path: a run directory, a checkpoint in one, or an adapter folder of qaroma.
        base: where the base lies now, if not where it was.

    Raises:
        QaromaError: nothing of these, or an adapter that is not the base's.
    """
    folder = Path(path)
    found, run = find_adapter(folder), run_of_checkpoint(folder)
    if found is not None:
        growth, run = read_growth(found), run_around(found)
    elif run is not None:
        growth = _growth_of_checkpoint(folder, run)
    else:
        raise nothing_there(folder, "a run, nor a checkpoint in one, nor an adapter folder of qaroma")
    if growth.get("task", "causal-lm") != "causal-lm":
        raise QaromaError(
            f"{path} is a {growth['task']} run, which these forms cannot hold; its adapter folder loads in PEFT"
        )
    remembered = growth["base"]
    name, revision = base or remembered["name"], None if base else remembered["revision"]
    config = load_model_config(name, revision=revision)
    shapes = _shapes(config, name)
    delta = _delta_of_checkpoint(folder, growth, shapes) if found is None else _delta_of_adapter(found, growth, shapes)
    check_shapes(delta, shapes, str(path))
    tokenizer = load_tokenizer(name, revision=revision)
    template = growth["template"]
    if isinstance(template, str):  # a checkpoint of a run that has no adapter yet
        template = Template.choose(tokenizer, template).to_json()
    return Source(
        found or folder, run, growth, delta, name, revision, config, tokenizer, Template.from_json(template), shapes
    )


def load_live(source: Source, *, quantization: str | None, dtype: torch.dtype, device: torch.device) -> Any:
    """The base of a source, without the adapter.

    Args:
        source: what is exported.
        quantization: None for the one that training saw, or 'none'.
        dtype: of the arithmetic.
        device: where it goes.

    Raises:
        QaromaError: another base than the one it was trained on.
    """
    remembered = source.growth["base"]
    model = load_base(
        source.base,
        quantization=quantization or remembered["quantization"],
        double_quantization=remembered["double_quantization"],
        compute_dtype=dtype,
        device=device,
        revision=source.revision,
    )
    packed = remembered.get("head_quantization", "none")
    if quantization is None and packed != "none":
        quantise_head(model, packed, double_quantization=remembered["double_quantization"])
    found = fingerprint(model)
    if found != remembered["fingerprint"]:
        raise QaromaError(
            f"{source.folder} was trained on {remembered['name']} (fingerprint {remembered['fingerprint']}), "
            f"but {source.base} is another model ({found}); give the right one with --base"
        )
    return model


def _shapes(config: Any, name: str) -> dict[str, tuple[int, int]]:
    """Linear layers of the model that a configuration describes; no weight is read or made."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise QaromaError(f"'{name}' is no causal language model that transformers knows ({error})") from error
    return linear_shapes(model)


def _delta_of_adapter(
    folder: Path, growth: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]]
) -> dict[str, Factors]:
    """The factors of an adapter folder, with a zero update for each module that was left at rank 0."""
    factors, _ = read_lora(folder)
    found = {}
    for name, components in growth["components"].items():
        if name not in shapes:
            raise QaromaError(
                f"{folder} adapts {name}, which this model does not have; give the base it was trained on"
            )
        found[name] = factors[name] if sum(components) else Factors.zero(shapes[name])
    return found


def _growth_of_checkpoint(folder: Path, run: RunDirectory) -> dict[str, Any]:
    """What ``growth.json`` would say of a checkpoint, from its header and the run's configuration."""
    try:
        header = json.loads((folder / STATE).read_text(encoding="utf-8"))
        settings: dict[str, Any] = yaml.safe_load(run.config.read_text(encoding="utf-8"))
        model, method = settings["model"], header["values"]["method"]
        inner_rank = settings["rank"] if method["name"] == "lora" else settings["growth"]["inner_rank"]
        components = {name: list(ranks) for name, ranks in method["components"].items()}
        for name in method["steps"]:
            components[name].append(inner_rank)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise QaromaError(f"{folder} is damaged ({error!r}); name another checkpoint of {run.path}") from error
    template: Any = settings["data"].get("template", "auto")
    keys = ("name", "revision", "quantization", "double_quantization", "compute_dtype")
    base = {"head_quantization": "none", **{key: model[key] for key in keys}}
    for written in (run.adapter, run.adapter_last):
        if (written / GROWTH).is_file():
            told = read_growth(written)
            template, base = told["template"], {**base, **told["base"]}
    return {
        "version": 1,
        "inner_rank": inner_rank,
        "alpha": settings["growth"]["alpha"],
        "components": components,
        "method": method["name"],
        "step": header["step"],
        "task": settings.get("task", "causal-lm"),
        "base": {**base, "fingerprint": header["base"]},
        "template": template,
        "settings": settings["growth"],
    }


def _delta_of_checkpoint(
    folder: Path, growth: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]]
) -> dict[str, Factors]:
    """Frozen factors as they lie in a checkpoint, and the active ones rounded as the forward pass has them."""
    header = json.loads((folder / STATE).read_text(encoding="utf-8"))["values"]["method"]
    rank, scale = growth["inner_rank"], growth["alpha"] / growth["inner_rank"]
    dtype = torch.float32 if growth["base"]["compute_dtype"] == "fp32" else torch.bfloat16
    found = {}
    try:
        with safe_open(folder / "state.safetensors", framework="pt") as file:
            active, offset = file.get_tensor("method.optimiser.values").float(), 0
            parts = {}
            for name in header["steps"]:
                rows, columns = shapes[name]
                end = offset + rank * (rows + columns)
                A, B = active[offset:end].split([rank * columns, rank * rows])
                parts[name] = A.view(rank, columns).to(dtype).float(), (B.view(rank, rows) * scale).to(dtype).float()
                offset = end
            for name, components in header["components"].items():
                pairs = [parts[name]] if name in parts else []
                if sum(components):
                    frozen = [file.get_tensor(f"method.frozen.{name}.{factor}").float() for factor in "AB"]
                    pairs.insert(0, (frozen[0], frozen[1]))
                found[name] = (
                    Factors(torch.cat([A for A, _ in pairs]), torch.cat([B for _, B in pairs]).T.contiguous())
                    if pairs
                    else Factors.zero(shapes[name])
                )
    except (SafetensorError, OSError, RuntimeError) as error:
        raise QaromaError(f"{folder} is damaged ({error}); name another checkpoint") from error
    except KeyError as error:
        raise QaromaError(f"{folder} adapts {error}, which this model does not have; give the right --base") from error
    return found
