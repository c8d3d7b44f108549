"""The tasks: what a model can be trained to do."""

from __future__ import annotations

from typing import Literal

TaskName = Literal["causal-lm", "preference", "classification", "regression"]

PREFERENCE: TaskName = "preference"
WRITING: tuple[TaskName, ...] = ("causal-lm", PREFERENCE)  # the others have a new head, and labels
