"""All scenarios: importing the files that enter them."""

from phantom import growing, steps, using
from phantom.registry import SCENARIOS

__all__ = ["SCENARIOS", "growing", "steps", "using"]
