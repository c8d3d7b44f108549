"""What the factors of a saved adapter say: effective ranks, and how alike the components are.

Dimensions: M out_features, N in_features, R rank, P components.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qaroma.report.names import locate
from qaroma.runs.directory import WEIGHTS, RunDirectory
from qaroma.runs.reading import Run, remembered

if TYPE_CHECKING:
    from torch import Tensor

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Spectra:
    """The adapter of a run, measured.

    Args:
        step: Optimiser step of the adapter; None where it does not say.
        ranks: Rank of each module by its full name, zeros included, in the model's order.
        effective: Effective rank of each of them (Roy & Vetterli 2007), 0 where the rank is.
        components: Inner ranks of each module's components, in order.
    """

    folder: Path
    step: int | None
    ranks: dict[str, int]
    effective: dict[str, float]
    components: dict[str, list[int]]

    @property
    def mean_rank(self) -> float:
        """Over the modules."""
        return sum(self.ranks.values()) / len(self.ranks)

    @property
    def mean_effective(self) -> float:
        """The effective rank, over the modules."""
        return sum(self.effective.values()) / len(self.effective)

    @property
    def ratio(self) -> float | None:
        """Effective rank / rank over all modules; None where every rank is 0."""
        total = sum(self.ranks.values())
        return sum(self.effective.values()) / total if total else None


def read_spectra(run: Run) -> Spectra | None:
    """Measure a run's best adapter, or its last one; None where there is none yet.

    Costs a small decomposition a module: seconds for a large model.
    """
    place = RunDirectory(run.path)
    folder = next((f for f in (place.adapter, place.adapter_last) if (f / WEIGHTS).is_file()), None)
    if folder is None:
        return None
    from safetensors import safe_open

    from qaroma.method.spectrum import effective_rank

    about = remembered(folder)
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        stored = [key[len(_PREFIX) : -len(".lora_A.weight")] for key in file.keys() if key.endswith(".lora_A.weight")]  # noqa: SIM118
        listed: dict[str, list[int]] = about.get("components", {})
        effective, components = {}, {}
        for module in listed or sorted(stored, key=_in_order):
            components[module] = list(listed.get(module, []))
            effective[module] = 0.0
            # Where no module has a rank, the file holds one zero pair all the same.
            if module not in stored or (module in listed and not sum(listed[module])):
                continue
            A_RN, B_RM = _factors(file, module)
            # Components are what a method that grows says; those of the others are single ranks.
            if not run.grows or sum(components[module]) != A_RN.shape[0]:
                components[module] = [1] * A_RN.shape[0]
            effective[module] = float(effective_rank(A_RN, B_RM))
    ranks = {module: sum(inner) for module, inner in components.items()}
    return Spectra(folder, about.get("step"), ranks, effective, components)


def component_similarity(spectra: Spectra, modules: Sequence[str]) -> dict[str, Tensor]:
    """Cosines between the components of modules: name -> (P, P), only modules of two and more components."""
    from safetensors import safe_open

    from qaroma.method.spectrum import component_cosines

    with safe_open(spectra.folder / WEIGHTS, framework="pt") as file:
        return {
            module: component_cosines(*_factors(file, module), spectra.components[module])
            for module in modules
            if len(spectra.components.get(module, ())) > 1
        }


def similar_modules(all_spectra: Sequence[Spectra], most: int = 4) -> list[str]:
    """The modules whose components are worth comparing: of many components in every adapter, of different kinds."""
    counts = {
        module: min(len(spectra.components.get(module, ())) for spectra in all_spectra)
        for module in (all_spectra[0].components if all_spectra else ())
    }
    ordered = sorted((module for module, count in counts.items() if count > 1), key=lambda module: -counts[module])
    first_of_kind = list({locate(module)[2]: module for module in reversed(ordered)}.values())
    rest = [module for module in ordered if module not in first_of_kind]
    chosen = sorted(first_of_kind, key=ordered.index) + rest
    return chosen[:most]


def _factors(file: Any, module: str) -> tuple[Tensor, Tensor]:
    """A (R, N) and B (R, M) of one module, fp32."""
    A_RN = file.get_tensor(f"{_PREFIX}{module}.lora_A.weight").float()
    return A_RN, file.get_tensor(f"{_PREFIX}{module}.lora_B.weight").float().T


def _in_order(module: str) -> tuple[str, int, str]:
    stack, layer, kind = locate(module)
    return stack, int(layer or 0), kind
