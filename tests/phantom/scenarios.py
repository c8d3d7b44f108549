"""All scenarios: importing the files that enter them."""

from phantom import steps
from phantom.registry import SCENARIOS

__all__ = ["SCENARIOS", "steps"]
