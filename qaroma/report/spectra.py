"""What the factors of a saved adapter say: effective ranks, and how alike the components are.

Dimensions: M out_features, N in_features, R rank, P components.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qaroma.report.names import locate
from qaroma.runs.adapter_info import info_if_any
from qaroma.runs.directory import RunDirectory
from qaroma.runs.reading import Run

if TYPE_CHECKING:
    from torch import Tensor

    from qaroma.method.factors import Update


@dataclass(frozen=True)
class Spectra:
    """The adapter of a run, measured.

    Args:
        step: optimiser step of the adapter; None where it does not say.
        ranks: rank of each module by its full name, zeros included, in the model's order.
        effective: effective rank of each of them (Roy & Vetterli 2007), 0 where the rank is.
        components: inner ranks of each module's components, in order.
        update: factors of the modules that the file holds.
    """

    step: int | None
    ranks: dict[str, int]
    effective: dict[str, float]
    components: dict[str, list[int]]
    update: Update

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

    Raises:
        QaromaError: its files are damaged.
    """
    place = RunDirectory(run.path)
    remembered = ((folder, info_if_any(folder)) for folder in (place.adapter, place.adapter_last))
    folder, info = next((found for found in remembered if found[1]), (place.adapter, None))
    if info is None:
        return None
    from qaroma.method.spectrum import effective_rank
    from qaroma.runs.peft_lora import read_lora

    update, _ = read_lora(folder, whole=info.task.head)
    effective, components = {}, {}
    for module, parts in info.components.items():
        held = update[module] if module in update and any(parts) else None  # a zero pair may be there for PEFT's sake
        # Components are what a method that grows says; those of the others are single ranks.
        single = held is not None and (not run.grows or sum(parts) != held.rank)
        components[module] = [1] * held.rank if held is not None and single else list(parts)
        effective[module] = 0.0 if held is None else float(effective_rank(*held))
    ranks = {module: sum(inner) for module, inner in components.items()}
    return Spectra(info.step, ranks, effective, components, update)


def component_similarity(spectra: Spectra, modules: Sequence[str]) -> dict[str, Tensor]:
    """Cosines between the components of modules: name -> (P, P), only modules of two and more components."""
    from qaroma.method.spectrum import component_cosines

    return {
        module: component_cosines(*spectra.update[module], spectra.components[module])
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
