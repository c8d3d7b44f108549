"""Memory levels: bundles of techniques, from the fastest (0) to the smallest (4), one row each.

What a row switches on is carried out by :func:`qaroma.engine.levels.apply_level`.
"""

from __future__ import annotations

from dataclasses import dataclass

FRAGMENTS = int(0.25 * 2**30)  # bytes of a card that lie between tensors and fit none


@dataclass(frozen=True)
class Level:
    """What a level switches on; the loss is computed in chunks at every level.

    Attributes:
        title: in a list of all levels, after its number.
        summary: what ``qaroma plan`` and ``finetune`` print.
        checkpointing: activations are recomputed in the backward pass.
        offload: a layer's input waits in host memory.
        tiled: MLPs and norms are computed tile by tile.
        host_embeddings: the embeddings stay in host memory.
        packed_head: the output head lies in 4 bits, which changes its logits.
        streamed: the layers' weights wait in host memory, two layers of them on the device at a time.
    """

    title: str
    summary: str
    checkpointing: bool = False
    offload: bool = False
    tiled: bool = False
    host_embeddings: bool = False
    packed_head: bool = False
    streamed: bool = False

    @property
    def exact(self) -> bool:
        """Whether it changes no number."""
        return not self.packed_head


LEVELS = (
    Level("fastest", "every activation is kept"),
    Level("recomputes activations", "activations are recomputed, layer by layer", checkpointing=True),
    Level(
        "uses host memory too",
        "recomputed; layer inputs and embeddings in host memory; MLPs and norms tile by tile",
        checkpointing=True,
        offload=True,
        tiled=True,
        host_embeddings=True,
    ),
    Level(
        "packs the head",
        "as 2, with the output head in 4 bits",
        checkpointing=True,
        offload=True,
        tiled=True,
        host_embeddings=True,
        packed_head=True,
    ),
    Level(
        "streams the base",
        "as 3, with the layers' weights in host memory, each copied to the device while the one before it computes",
        checkpointing=True,
        offload=True,
        tiled=True,
        host_embeddings=True,
        packed_head=True,
        streamed=True,
    ),
)

LEVEL_NAMES = tuple(str(number) for number in range(len(LEVELS)))
LEVEL_CHOICES = ("auto", *LEVEL_NAMES)
