"""Whether a checkpoint brought what its configuration says."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qaroma.errors import QaromaError
from qaroma.method.dequantise import layer_shape
from qaroma.method.head import may_be_new


def require_complete(model: str, network: Any, missing: Iterable[str], *, classifier: bool) -> None:
    """Refuse a model of which tensors are missing: transformers fills them with random numbers and only warns.

    Args:
        model: its name, for the sentence.
        network: changed where it is a classifier: those of a new head are noted as new.
        missing: names that the checkpoint does not have.
        classifier: whether a head may be new.
    """
    missing = sorted(missing)
    if classifier:
        network.new_parameters = [name for name in missing if may_be_new(network, name)]
        missing = [name for name in missing if name not in network.new_parameters]
    if missing:
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise QaromaError(
            f"The checkpoint '{model}' lacks {len(missing)} of its model's tensors ({names}); expected all of them. "
            "Download or copy it again, or name a causal language model"
        )


def require_shapes(model: str, network: Any) -> None:
    """Refuse tensors of other shapes than the configuration's: before 5.18, transformers puts any in place that it
    quantises."""
    for name, module in network.named_modules():
        weight = getattr(module, "weight", None)
        table: Any = module if hasattr(module, "embedding_dim") else None
        declared = layer_shape(module) if table is None else (table.num_embeddings, table.embedding_dim)
        held = getattr(weight, "quant_state", weight)  # None where packed bytes have no values, as on ``meta``
        if held is None or declared is None:
            continue
        shape = tuple(held.shape)
        if sorted(shape) != sorted(declared):
            raise QaromaError(
                f"The weights of '{model}' do not have the shapes that its config.json says: {name} has "
                f"{' x '.join(map(str, shape))}, expected {' x '.join(map(str, declared))}. Download or copy it again"
            )
