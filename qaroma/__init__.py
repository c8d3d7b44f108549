"""qaroma: fine-tune a 4-bit language model on one GPU, without choosing a rank.

The pieces, for a loop of your own (see ``examples/own_loop.py``)::

    from qaroma import GrowthController, GrowthSettings, attach, load_base, save_adapter

Names are imported when first used, so that ``import qaroma`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qaroma.errors import QaromaError
    from qaroma.method.adapter import Adapter
    from qaroma.method.aroma import GrowthController
    from qaroma.method.attach import attach
    from qaroma.method.budget import BudgetSettings
    from qaroma.method.growth import GrowthEvent, GrowthSettings
    from qaroma.method.joint import JointController
    from qaroma.method.lora import PlainLora
    from qaroma.model.base import load_base, load_tokenizer
    from qaroma.runs.adapter import load_adapter, save_adapter

__version__ = "0.6.0"

_HOMES = {
    "Adapter": "qaroma.method.adapter",
    "BudgetSettings": "qaroma.method.budget",
    "GrowthController": "qaroma.method.aroma",
    "GrowthEvent": "qaroma.method.growth",
    "GrowthSettings": "qaroma.method.growth",
    "JointController": "qaroma.method.joint",
    "PlainLora": "qaroma.method.lora",
    "QaromaError": "qaroma.errors",
    "attach": "qaroma.method.attach",
    "load_adapter": "qaroma.runs.adapter",
    "load_base": "qaroma.model.base",
    "load_tokenizer": "qaroma.model.base",
    "save_adapter": "qaroma.runs.adapter",
}

__all__ = [
    "Adapter",
    "BudgetSettings",
    "GrowthController",
    "GrowthEvent",
    "GrowthSettings",
    "JointController",
    "PlainLora",
    "QaromaError",
    "__version__",
    "attach",
    "load_adapter",
    "load_base",
    "load_tokenizer",
    "save_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qaroma' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
