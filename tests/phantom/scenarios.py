"""All scenarios: importing the files that enter them."""

from phantom import growing, programs, steps, streaming, using
from phantom.registry import SCENARIOS

__all__ = ["SCENARIOS", "growing", "programs", "steps", "streaming", "using"]
