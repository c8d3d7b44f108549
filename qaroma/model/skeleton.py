"""A model of the right modules and no contents, for what must be known of it before any weight is read."""

from __future__ import annotations

import copy
from typing import Any

import torch


def skeleton(config: Any, *, trust_remote_code: bool = False, classifier: bool = False) -> Any:
    """A model on device ``meta``.

    Args:
        config: its transformers configuration; left as it is.
        trust_remote_code: build models whose code comes with them.
        classifier: one for sequence classification in the place of a causal language model.

    Raises:
        ValueError: transformers knows no such model.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    with torch.device("meta"):
        return kind.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
