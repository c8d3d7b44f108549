"""What a transformers model is called in GGUF: architecture, tensor names, order of rows.

llama.cpp rotates neighbouring pairs of rows of a head where transformers rotates its two halves, so
for Llama's architecture the rows of q and k are stored in another order; an adapter's B likewise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qaroma.errors import QaromaError
from qaroma.export.gguf_families import ARCHITECTURES


class GgufNames:
    """Names and row orders of one model's tensors in GGUF.

    Args:
        config: the model's transformers configuration.

    Raises:
        QaromaError: an architecture that is not among :data:`ARCHITECTURES`, or a configuration of one that
            llama.cpp computes otherwise.
    """

    def __init__(self, config: Any) -> None:
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        kind = config.model_type
        if kind not in ARCHITECTURES:
            raise QaromaError(
                f"the base is of the architecture '{kind}', which GGUF exports do not cover; "
                f"expected {', '.join(ARCHITECTURES)}. Type: --format padded, or --format merged"
            )
        self.config, self.architecture = config, ARCHITECTURES[kind]
        unlike = self.architecture.unlike(config)
        if unlike is not None:
            raise QaromaError(
                f"the base is a {kind} model with {unlike}, which llama.cpp computes otherwise; "
                "type: --format padded, or --format merged"
            )
        key = next(key for key, name in MODEL_ARCH_NAMES.items() if name == self.architecture.name)
        self._map = get_tensor_name_map(key, config.num_hidden_layers)

    def tensor(self, name: str) -> str:
        """GGUF's name of a parameter, as ``model.layers.0.mlp.up_proj.weight``.

        Raises:
            QaromaError: GGUF has no name for it.
        """
        found: str | None = self._map.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise QaromaError(
                f"GGUF has no name for the tensor {name} of a {self.config.model_type} model; "
                "type: --format padded, or --format merged"
            )
        return found

    def row_order(self, name: str, rows: int) -> Tensor | None:
        """Which row of transformers' tensor stands in each row of GGUF's.

        Args:
            name: the parameter's name in transformers.
            rows: M.

        Returns:
            (M,) indices; None where the order is the same.
        """
        if not self.architecture.interleaved:
            return None
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
        count = heads.get(name.split(".")[-2])
        if count is None:
            return None
        return torch.arange(rows).view(count, 2, rows // count // 2).transpose(1, 2).reshape(rows)
