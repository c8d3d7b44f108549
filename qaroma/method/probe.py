"""Where a component begins when the loss's gradient chooses it (``growth.init: gradient``).

AROMA's greedy step is rank-one matching pursuit: the best next component is the top singular pair of
the gradient G (M, N) with respect to the weight. With B = 0 the gradient of B is s A G^T, with A = 0
that of A is s B G: block power iteration on G whose products are backward passes, G never formed.

Dimensions: N in_features, M out_features, r inner rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qaroma.method.adapter import Adapter

# The mean norm of a row of Kaiming-uniform(a = sqrt 5) values: what training expects of A.
ROW_NORM = 1 / math.sqrt(3)
# Share of random directions mixed into a gradient: they fill up what a gradient of lower rank leaves open.
FILL = 1e-7


class GradientProbe:
    """Gives new components the leading right singular directions of their layer's gradient, in two passes.

    Both passes want the gradients of a step's loss, and neither changes the model's output: the
    first has B = 0, the second A = 0.

    Args:
        adapter: its active components are changed in place.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.names: list[str] = []
        self._drawn: dict[str, Tensor] = {}  # the random A of the components, between the two passes

    @property
    def pending(self) -> bool:
        """Whether another pass is wanted."""
        return bool(self.names)

    def begin(self, names: Sequence[str]) -> None:
        """Ask for the two passes for these layers, whose components are new (A random, B zero)."""
        self.names = list(names)

    @torch.no_grad()
    def advance(self) -> None:
        """Use the gradients of one pass; the caller zeroes them afterwards."""
        second = bool(self._drawn)
        for name in self.names:
            A, B = self._newest(name)
            wanted = (self._parameters(name)[0] if second else self._parameters(name)[1]).grad
            assert wanted is not None
            # What is not finite says nothing here; the loss of the next step will stop the run and say why.
            gradient = torch.nan_to_num(wanted[-len(A) :], posinf=0.0, neginf=0.0)
            if second:
                drawn = self._drawn.pop(name)
                directions = leading_directions(gradient, drawn).mul_(ROW_NORM)
                # A layer that no gradient reached keeps its random A; decided on the device, without a copy.
                A.copy_(torch.where(gradient.any(), directions, drawn))
                B.zero_()
            else:
                self._drawn[name] = A.clone()
                fill = torch.randn(B.shape, generator=self.adapter.generator).to(B)
                B.copy_(leading_directions(gradient, fill))
                A.zero_()
        if second:
            self.names = []
        self.adapter.refresh()

    @torch.no_grad()
    def rewind(self) -> None:
        """Go back to before the first pass, so that a checkpoint holds components that are merely new."""
        for name, drawn in self._drawn.items():
            A, B = self._newest(name)
            A.copy_(drawn)
            B.zero_()
        if self._drawn:
            self._drawn = {}
            self.adapter.refresh()

    def _parameters(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        active = self.adapter.layers[name].active
        assert active is not None
        return active.A, active.B

    def _newest(self, name: str) -> tuple[Tensor, Tensor]:
        """The fp32 rows of the component that began last; those before it, if they train, stand above them."""
        A, B = self._parameters(name)
        rows = self.adapter.layers[name].active_components[-1]
        return A.detach()[-rows:], B.detach()[-rows:]


def leading_directions(gradient_rN: Tensor, fill_rN: Tensor) -> Tensor:
    """The right singular vectors of a wide matrix, largest first.

    Equivalent to ``torch.linalg.svd(gradient_rN, full_matrices=False).Vh``, but for what fills it up.

    Args:
        gradient_rN: of any scale.
        fill_rN: random directions that take the place of those the gradient does not have.

    Returns:
        (r, N) orthonormal rows, in the gradient's dtype; zero beyond the N-th where r is larger.
    """
    gradient, fill = gradient_rN.double(), fill_rN.double()
    norm = torch.linalg.matrix_norm(gradient).clamp_min(torch.finfo(torch.float64).tiny)
    mixed = gradient / norm + FILL * fill / torch.linalg.matrix_norm(fill)
    # QR first: the SVD is then of an r x r matrix, whatever N.
    Q_Nr, right_rr = torch.linalg.qr(mixed.T)
    _, _, rows_rr = torch.linalg.svd(right_rr.T, full_matrices=False)
    directions_rN = torch.zeros_like(gradient_rN)
    directions_rN[: len(rows_rr)] = rows_rr @ Q_Nr.T
    return directions_rN
