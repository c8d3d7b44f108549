"""Memory that kernels take inside themselves, which no count of tensors can see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Workspace:
    """Bytes of one kind of kernel: at any size, and for each token and unit of attention width.

    The width is query heads times head dimension: FlashAttention's backward pass, the one kernel
    whose workspace grows with the sequence, accumulates gradients in fp32 at that width.
    """

    fixed: int = 0
    per_token_and_width: float = 0.0


# To be measured on a GPU: torch.cuda.max_memory_allocated less the planned peak, at 2,048 and 8,192 tokens.
# Not measured: no GPU. Zero until then, which `qaroma plan` says.
WORKSPACES: dict[str, Workspace] = {"matrix products": Workspace(), "attention": Workspace()}


def workspace_bytes(config: Any, tokens: int) -> int:
    """What to add to a counted peak.

    Args:
        config: transformers' configuration.
        tokens: of a micro-batch.
    """
    text = config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    width = text.num_attention_heads * head_dim
    return int(sum(w.fixed + w.per_token_and_width * tokens * width for w in WORKSPACES.values()))


def workspaces_measured() -> bool:
    """Whether the table holds anything yet."""
    return any(workspace != Workspace() for workspace in WORKSPACES.values())
