"""The methods of training, one row each: what every other part asks about a method is answered here.

A new method is a row of this table and the class that it names.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

from qaroma.errors import QaromaError

MethodName = Literal["aroma", "relora", "lora", "peft-lora", "adalora"]


@dataclass(frozen=True)
class MethodFacts:
    """What is known of a method before it is built.

    Attributes:
        name: as it is typed and stored.
        title: in figures and pages.
        summary: for ``--help``.
        implementation: ``module:class`` of the :class:`~qaroma.method.base.Method`; imported by :meth:`load` alone.
        family: the method that it is a variant of; comparisons judge families.
        grows: whether it finds its ranks; otherwise they are the configuration's ``rank``.
        criteria: whether what grows is measured against criteria.
        package: whose layers it trains, where they are not our own.
    """

    name: MethodName
    title: str
    summary: str
    implementation: str
    family: str
    grows: bool = False
    criteria: bool = False
    package: str | None = None

    @property
    def ours(self) -> bool:
        """Whether it trains our own adapter, which can go on from another one."""
        return self.package is None

    def require(self) -> None:
        """Tell before anything is loaded that its package is missing.

        Raises:
            QaromaError: how to get it.
        """
        if self.package is not None and find_spec(self.package) is None:
            raise QaromaError(f"method {self.name} needs {self.package}; type: pip install 'qaroma[bench]'")

    def load(self) -> Any:
        """The class, of type ``type[Method]``; this imports torch."""
        module, _, name = self.implementation.partition(":")
        return getattr(import_module(module), name)


_ROWS = (
    MethodFacts(
        "aroma",
        "AROMA",
        "grows ranks until each layer has enough",
        "qaroma.method.aroma:GrowthController",
        family="aroma",
        grows=True,
        criteria=True,
    ),
    MethodFacts(
        "relora",
        "ReLoRA",
        "a new component every t_in steps, no criteria",
        "qaroma.method.aroma:GrowthController",
        family="relora",
        grows=True,
    ),
    MethodFacts("lora", "LoRA", "a fixed rank, ours", "qaroma.method.lora:PlainLora", family="lora"),
    MethodFacts(
        "peft-lora", "LoRA (PEFT)", "PEFT's LoRA", "qaroma.method.peft_lora:PeftLora", family="lora", package="peft"
    ),
    MethodFacts(
        "adalora", "AdaLoRA", "PEFT's AdaLoRA", "qaroma.method.peft_lora:AdaLora", family="adalora", package="peft"
    ),
)

METHODS: dict[str, MethodFacts] = {row.name: row for row in _ROWS}
FIXED_RANK = tuple(name for name, row in METHODS.items() if not row.grows)
DEFAULT_METHOD: MethodName = "aroma"
