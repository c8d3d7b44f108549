"""What the training loop asks of a method: AROMA, plain LoRA, and others that join for comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from qaroma.method.budget import BudgetSettings
from qaroma.method.factors import Factors, Update
from qaroma.method.growth import GrowthEvent, GrowthSettings


@dataclass(frozen=True)
class MethodState:
    """A method's state for a checkpoint: tensors for safetensors, the rest as JSON values."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


@dataclass(frozen=True)
class MethodOptions:
    """What a run asks of a method, as plain values; each method takes what it has a use for.

    Attributes:
        rank: of every module, or of one component where ranks grow.
        alpha, dropout, seed: of the adapter.
        learning_rate, head_learning_rate: peaks of the schedules; None for the head is the adapter's.
        total_steps: step budget.
        warmup, min_lr_ratio: of a schedule that is not interrupted by growth.
        optimizer: of our own adapter, one of :data:`~qaroma.method.optimiser.OPTIMIZERS`.
        weight_decay, max_grad_norm: of the optimiser.
        growth: of a method that grows; None for the others.
    """

    rank: int
    alpha: float
    dropout: float
    seed: int
    learning_rate: float
    head_learning_rate: float | None
    total_steps: int
    warmup: int
    min_lr_ratio: float
    optimizer: str
    weight_decay: float
    max_grad_norm: float
    growth: GrowthSettings | BudgetSettings | None

    def optimisation(self) -> dict[str, Any]:
        """The keyword arguments that every method's class has."""
        names = ("learning_rate", "head_learning_rate", "total_steps", "weight_decay", "max_grad_norm")
        return {name: getattr(self, name) for name in names}

    def of_factors(self) -> dict[str, Any]:
        """The keyword arguments of the methods on our own adapter."""
        return {**self.optimisation(), "optimizer": self.optimizer}

    def cosine(self) -> dict[str, Any]:
        """The keyword arguments of methods with one warm-up and one cosine."""
        return {"warmup": self.warmup, "min_lr_ratio": self.min_lr_ratio}


class Method:
    """A way of adapting a model; owns its trainable parameters and their optimiser.

    The loop runs forward and backward passes; ``step`` does everything else. Gradients accumulate
    until then. Ranks and parameters are the adapter's: a head that is trained in full counts to neither.

    A method is built in two steps, between which other parts may be laid on the frozen model:
    :meth:`attach`, then :meth:`build` with what that returned. What not every method has, has a default.

    Attributes:
        name: as configurations and adapters have it.
        learning_rate: of the adapter's last update (the largest where modules differ).
    """

    name: str
    learning_rate: float

    @classmethod
    def attach(cls, model: nn.Module, names: Sequence[str], options: MethodOptions) -> Any:
        """Put the adapter on linear layers and freeze everything else.

        Args:
            model: changed in place.
            names: full names of the layers.
            options: of the run.

        Returns:
            What :meth:`build` takes.
        """
        raise NotImplementedError

    @classmethod
    def build(cls, attached: Any, options: MethodOptions, head: Sequence[nn.Parameter] = ()) -> Method:
        """The method that trains what was attached, and a head in full where there is one."""
        raise NotImplementedError

    @property
    def finished(self) -> bool:
        """Whether nothing is left to train."""
        return False

    @property
    def ending(self) -> Literal["grown", "learnt"]:
        """Why nothing is left to train: every module has its rank, or the training rows are learnt."""
        return "grown"

    @property
    def probing(self) -> bool:
        """Whether the next gradients are to be given to :meth:`probe` instead of :meth:`step`."""
        return False

    def probe(self) -> None:
        """Take gradients that choose where new components begin; zeroes them. No update."""
        raise AssertionError("nothing to probe")

    def penalty(self) -> Tensor | None:
        """A scalar to add to every step's loss; None adds nothing."""
        return None

    def gradients(self) -> list[Tensor]:
        """What has accumulated, as fp32 tensors that can be written into."""
        raise NotImplementedError

    def gradient_norm(self) -> Tensor:
        """The joint norm of what has accumulated, an fp32 scalar on the device."""
        raise NotImplementedError

    def multiply_gradients(self, factor: float) -> None:
        """Multiply what has accumulated, as to take a loss scale out of it again."""
        raise NotImplementedError

    def step(self, loss: float | None = None) -> list[GrowthEvent]:
        """Clip, update, zero the gradients and grow; returns what grew.

        Args:
            loss: mean training loss of the step, before its update; some methods grow by it.
        """
        raise NotImplementedError

    def validated(self, loss: float, standard_error: float) -> None:
        """Take note of a validation: mean loss of the rows, and that mean's standard error."""

    def zero_grad(self) -> None:
        """Throw away what has accumulated."""
        raise NotImplementedError

    def finish(self) -> list[GrowthEvent]:
        """The step budget is spent; what is active is kept."""
        raise NotImplementedError

    def ranks(self) -> dict[str, int]:
        """Rank of each module."""
        raise NotImplementedError

    def components(self) -> dict[str, list[int]]:
        """Inner ranks of each module's components, in order."""
        raise NotImplementedError

    def factors(self) -> dict[str, Factors]:
        """What is added to each module's weight."""
        raise NotImplementedError

    def load_factors(self, update: Update, components: Mapping[str, list[int]]) -> None:
        """After ``finish``: put saved factors in the place of the present ones; a module that has none is absent."""
        raise NotImplementedError

    def active_modules(self) -> int:
        """How many modules train."""
        raise NotImplementedError

    def trainable_parameters(self) -> int:
        """How many numbers of the adapter train."""
        raise NotImplementedError

    def state(self) -> MethodState:
        """What a checkpoint must hold to go on bit for bit."""
        raise NotImplementedError

    def load_state(self, state: MethodState) -> None:
        """Go on from such a state, on a model whose adapter is new."""
        raise NotImplementedError
