"""The factor that keeps gradients in fp16's range: as large as they bear, halved where they overflow."""

from __future__ import annotations

from dataclasses import dataclass

# Those of torch.amp.GradScaler: begin, then twice as much after so many steps without an overflow.
START, INTERVAL = 65536.0, 2000
FLOOR = 1.0  # gradients that overflow without any scale do so for another reason


@dataclass
class LossScale:
    """A dynamic loss scale, always a power of two, so that scaling and unscaling round nothing.

    As ``torch.amp.GradScaler``, but that the rows of a pass that overflowed are tried again at half the scale
    instead of being left out, so that every step of a run is made, and with all its rows.

    Attributes:
        scale: that the loss is multiplied by before the backward pass.
        good_steps: made since the scale changed.
        overflows: passes that were thrown away, over the whole run.
    """

    scale: float = START
    good_steps: int = 0
    overflows: int = 0

    def halve(self) -> bool:
        """After gradients that are not finite; whether they can be tried again, which at the floor they cannot."""
        if self.scale <= FLOOR:
            return False
        self.scale, self.good_steps, self.overflows = self.scale / 2, 0, self.overflows + 1
        return True

    def step_made(self) -> None:
        """After a step whose gradients were finite."""
        self.good_steps += 1
        if self.good_steps == INTERVAL:
            self.scale, self.good_steps = 2 * self.scale, 0
