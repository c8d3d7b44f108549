"""Low-rank adapters that grow: frozen components, those that train, and the layers that hold them.

Dimensions: N in_features, M out_features, R rank, r inner rank. W = W0 + B^T A with B (R, M), A (R, N).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qaroma.errors import QaromaError
from qaroma.method.dequantise import layer_shape
from qaroma.method.factors import Factors
from qaroma.method.lowrank import Active, lowrank_linear

# Factors lie in zero-filled blocks of so many rows: growing inside a block changes no shape, so the
# same kernels run and the logits stay bit-identical.
BLOCK = 16


class AdaptedLinear(nn.Module):
    """A frozen linear layer with low-rank components, of which the newest ones train.

    The compute factors ``A`` (capacity, N) and ``B`` (capacity, M) are in the base's compute dtype,
    with the scale alpha / r folded into B; frozen components come first. Active components are *updated*
    in fp32 (``active_A``, ``active_B``, their rows one component after the other) and copied, rounded,
    into their rows by :meth:`Adapter.refresh`; freezing one is therefore only a matter of counting: no
    number moves.

    Args:
        base: ``nn.Linear``, ``Linear4bit`` or ``Conv1D``; kept as it is and never trained.
        scale: alpha / inner rank.
        dtype: compute dtype of the factors.
        dropout: probability, applied before A, on the active components only.
    """

    A: Tensor
    B: Tensor
    active_A: nn.Parameter | None
    active_B: nn.Parameter | None

    def __init__(self, base: nn.Module, *, scale: float, dtype: torch.dtype, dropout: float = 0.0) -> None:
        super().__init__()
        self.base = base
        shape = layer_shape(base)
        assert shape is not None
        self.out_features, self.in_features = shape
        self.scale, self.dropout = scale, dropout
        device: torch.device = base.weight.device  # type: ignore[assignment]
        self.register_buffer("A", torch.zeros(0, self.in_features, dtype=dtype, device=device), persistent=False)
        self.register_buffer("B", torch.zeros(0, self.out_features, dtype=dtype, device=device), persistent=False)
        self.register_parameter("active_A", None)
        self.register_parameter("active_B", None)
        self.components: list[int] = []  # inner ranks of the frozen components, in order
        self.active_components: list[int] = []  # of those that train

    @property
    def weight(self) -> Tensor:
        """The base's weight; some model code asks a layer for its dtype or device."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias  # type: ignore[return-value]

    @property
    def frozen_rank(self) -> int:
        return sum(self.components)

    @property
    def active_rank(self) -> int:
        return sum(self.active_components)

    @property
    def rank(self) -> int:
        return self.frozen_rank + self.active_rank

    @property
    def active(self) -> Active | None:
        if self.active_A is None or self.active_B is None:
            return None
        return Active(self.active_A, self.active_B, self.frozen_rank, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """(..., N) -> (..., M). One product for all components, or two where dropout acts on the active one."""
        active = self.active
        x = x.to(self.A.dtype)
        if active is None or not (self.training and self.dropout > 0):
            return lowrank_linear(x, self.base, self.A, self.B, active)
        start, stop = active.start, self.rank
        own = lowrank_linear(  # first: what it saves is then there before the base's product
            F.dropout(x, self.dropout), None, self.A[start:stop], self.B[start:stop], active._replace(start=0)
        )
        frozen = lowrank_linear(x, self.base, self.A[:start], self.B[:start], None)
        return frozen + own

    def frozen_factors(self) -> tuple[Tensor, Tensor]:
        """(R_frozen, N) and (R_frozen, M) in the compute dtype, scale folded into B."""
        return self.A[: self.frozen_rank], self.B[: self.frozen_rank]

    def active_factors(self) -> tuple[Tensor, Tensor]:
        """(K, N) and (K, M) of all active components, K their rank, as the forward pass uses them."""
        return self.A[self.frozen_rank : self.rank], self.B[self.frozen_rank : self.rank]

    def newest_factors(self) -> tuple[Tensor, Tensor]:
        """(r, N) and (r, M) of the component that began last."""
        start = self.rank - self.active_components[-1]
        return self.A[start : self.rank], self.B[start : self.rank]

    def earlier_factors(self) -> tuple[Tensor, Tensor]:
        """Those of all components before the newest one, frozen or not."""
        start = self.rank - self.active_components[-1]
        return self.A[:start], self.B[:start]

    def factors(self) -> Factors:
        """(R, N) and (R, M) of every component, the active one included."""
        return Factors(self.A[: self.rank], self.B[: self.rank])

    def start_component(self, A_init: Tensor, components: Sequence[int] | None = None) -> None:
        """Begin to train: A as given (r, N), B zero, so that the output does not change.

        Args:
            A_init: rows of the new component, or of several.
            components: their inner ranks; None is one component of all rows.
        """
        device = self.A.device
        self.active_A = nn.Parameter(A_init.to(device=device, dtype=torch.float32))
        self.active_B = nn.Parameter(torch.zeros(A_init.shape[0], self.out_features, device=device))
        self.active_components = list(components or [A_init.shape[0]])
        self.reserve(self.rank)
        self.place_active()

    def restart_component(self, A_init: Tensor) -> None:
        """Freeze the only active component and begin the next one in the same fp32 storage."""
        active = self.active
        assert active is not None
        self.components += self.active_components
        self.active_components = [len(A_init)]
        self.reserve(self.rank)
        with torch.no_grad():
            active.A.copy_(A_init)
            active.B.zero_()
        self.place_active()

    def freezing(self, window: int | None) -> int:
        """How many of the oldest active components freeze as the next one begins; a window of None freezes none."""
        return 0 if window is None else max(0, len(self.active_components) + 1 - window)

    def extended(self, active: Sequence[nn.Parameter], rows: int, *, frozen: int) -> None:
        """Take the fp32 factors to which the optimiser has added a component, and from which it took the oldest.

        Args:
            active: (K, N) and (K, M), those that train from now on.
            rows: inner rank of the new component, which stands last.
            frozen: how many of the oldest active components train no more.
        """
        self.active_A, self.active_B = active
        self.components += self.active_components[:frozen]
        self.active_components = [*self.active_components[frozen:], rows]
        self.reserve(self.rank)
        self.place_active()

    def end(self, *, keep: bool) -> None:
        """Stop training this layer; its newest component is kept as a frozen one like the others, or discarded."""
        start, rank = self.rank - self.active_components[-1], self.rank
        kept = self.active_components if keep else self.active_components[:-1]
        self.active_A = self.active_B = None
        self.active_components = []
        self.components += kept
        if not keep:
            self.A[start:rank] = 0
            self.B[start:rank] = 0
        self.reserve(self.rank)

    def load_factors(self, A_RN: Tensor, B_RM: Tensor, components: list[int]) -> None:
        """Replace the frozen components by these (B with its scale folded in)."""
        assert self.active_A is None
        assert sum(components) == A_RN.shape[0] == B_RM.shape[0]
        self.components = []
        self.reserve(0)
        self.components = list(components)
        self.reserve(self.frozen_rank)
        self.A[: self.frozen_rank].copy_(A_RN)
        self.B[: self.frozen_rank].copy_(B_RM)

    def reserve(self, rank: int) -> None:
        """Set the capacity to the smallest whole number of blocks that holds ``rank`` rows."""
        capacity = math.ceil(rank / BLOCK) * BLOCK
        if capacity != self.A.shape[0]:
            self.A, self.B = (_resized(factor, capacity) for factor in (self.A, self.B))

    @torch.no_grad()
    def place_active(self) -> None:
        """Copy the fp32 components, rounded and scaled, into their rows of the compute factors."""
        active = self.active
        assert active is not None
        A_rows, B_rows = self.active_factors()
        A_rows.copy_(active.A)
        B_rows.copy_(active.B * active.scale)


def _resized(factor: Tensor, rows: int) -> Tensor:
    resized = factor.new_zeros(rows, factor.shape[1])
    kept = min(rows, factor.shape[0])
    resized[:kept] = factor[:kept]
    return resized


class Adapter:
    """The adapted layers of one model.

    Puts an :class:`AdaptedLinear` in the place of each named layer and freezes everything else.
    Nothing grows by itself: a method (:mod:`qaroma.method.aroma`, :mod:`qaroma.method.lora`) does that.

    Args:
        model: any module tree; changed in place.
        names: full names of its linear layers to adapt, as in ``model.named_modules()``.
        inner_rank: rank r of one component.
        alpha: the update is alpha / r times B A.
        dropout: see :class:`AdaptedLinear`.
        dtype: compute dtype of the factors; None is each layer's own.
        seed: of the Kaiming-uniform initial values.

    Raises:
        QaromaError: a layer that the model holds under several names.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Iterable[str],
        *,
        inner_rank: int = 1,
        alpha: float = 2.0,
        dropout: float = 0.0,
        dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.inner_rank, self.alpha, self.dropout = model, inner_rank, alpha, dropout
        self.scale = alpha / inner_rank
        self.generator = torch.Generator().manual_seed(seed)
        self.layers: dict[str, AdaptedLinear] = {}
        model.requires_grad_(False)
        places = _places(model)
        for name in names:
            base = model.get_submodule(name)
            if len(places[base]) > 1:
                raise QaromaError(
                    f"{' and '.join(places[base])} are one layer under several names, which an adapter cannot "
                    "keep apart; leave it out with --set growth.target_modules=[...]"
                )
            layer = AdaptedLinear(base, scale=self.scale, dtype=dtype or _compute_dtype(base), dropout=dropout)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.train(base.training))
            self.layers[name] = layer

    def initial_A(self, layer: AdaptedLinear, rank: int | None = None) -> Tensor:
        """Kaiming-uniform(a = sqrt 5) values of shape (rank, N), drawn on the CPU so that devices agree.

        Args:
            layer: what they are for.
            rank: of the new component; None is the inner rank.
        """
        return kaiming_A(rank or self.inner_rank, layer.in_features, self.generator)

    def active_layers(self) -> Iterator[tuple[str, AdaptedLinear]]:
        return ((name, layer) for name, layer in self.layers.items() if layer.active_A is not None)

    def _actives(self) -> list[Active]:
        return [active for layer in self.layers.values() if (active := layer.active) is not None]

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the compute copies of all active components up to date after an update."""
        actives = self._actives()
        if not actives:
            return
        rows = [layer.active_factors() for _, layer in self.active_layers()]
        torch._foreach_copy_([A for A, _ in rows], [active.A for active in actives])
        scaled = torch._foreach_mul([active.B for active in actives], [active.scale for active in actives])
        torch._foreach_copy_([B for _, B in rows], scaled)

    def ranks(self) -> dict[str, int]:
        """Rank of each layer, frozen and active components together."""
        return {name: layer.rank for name, layer in self.layers.items()}

    def components(self) -> dict[str, list[int]]:
        """Inner ranks of each layer's components, in order, the active ones last."""
        return {name: [*layer.components, *layer.active_components] for name, layer in self.layers.items()}

    def factors(self) -> dict[str, Factors]:
        """What is added to each layer's weight, in the compute dtype."""
        return {name: layer.factors() for name, layer in self.layers.items()}

    def trainable_parameters(self) -> int:
        return sum(active.A.numel() + active.B.numel() for active in self._actives())


def _places(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every name under which each module is found; more than one where parents share it."""
    places: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(module, []).append(name)
    return places


def kaiming_A(rank: int, in_features: int, generator: torch.Generator) -> Tensor:
    """The usual initial A of a LoRA: Kaiming-uniform(a = sqrt 5) values of shape (R, N), on the CPU."""
    bound = math.sqrt(1 / in_features)
    return torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)


def _compute_dtype(base: nn.Module) -> torch.dtype:
    weight: Tensor = base.weight  # type: ignore[assignment]
    if weight.is_floating_point():
        return weight.dtype
    return base.compute_dtype or torch.bfloat16  # type: ignore[return-value]
