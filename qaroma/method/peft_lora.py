"""LoRA and AdaLoRA on PEFT's own layers, as methods of our loop: what growing ranks is compared with.

Data, schedule, clipping, head and evaluation are the loop's; the layers, their forward pass and
AdaLoRA's budget are PEFT's. The model object stays as it is, only its linear layers are replaced.

Dimensions: N in_features, M out_features, R rank.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qaroma.method.adapter import kaiming_A
from qaroma.method.base import Method, MethodOptions, MethodState
from qaroma.method.factors import Factors, Update
from qaroma.method.growth import GrowthEvent
from qaroma.method.schedule import warm_cosine

ADAPTER = "default"  # PEFT's name for the only adapter

# AdaLoRA's schedule as shares of the run: about those of its paper's GLUE table, where the first budget
# cut comes after a tenth to a fifth of the steps and the last one near the middle.
TINIT_SHARE, TFINAL_SHARE = 0.15, 0.5
ALLOCATIONS = 1000  # at most so many budget cuts in a run
INIT_RANK = 1.5  # initial over target rank, as PEFT's defaults (12 and 8)

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_IMPORTANCE = ("ipt", "exp_avg_ipt", "exp_avg_unc")


def inject_lora(
    model: nn.Module, names: Sequence[str], *, rank: int, alpha: float, dropout: float = 0.0, seed: int = 0
) -> Any:
    """Put PEFT's LoRA on linear layers; everything else is frozen.

    Args:
        model: changed in place; its class stays.
        names: full names of the layers.
        rank, alpha, dropout: of LoRA, as PEFT takes them.
        seed: of A, whose values are those of :class:`~qaroma.method.lora.PlainLora` for the same seed.

    Returns:
        The ``peft.LoraModel``, whose ``model`` is the one given.
    """
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=_exactly(names))
    with torch.random.fork_rng():  # the base's own dropout draws as it does under every other method
        tuner = _in_fp32(peft.LoraModel(model, {ADAPTER: config}, ADAPTER))
    generator = torch.Generator().manual_seed(seed)
    for layer in _layers(tuner).values():
        layer.lora_A[ADAPTER].weight.data.copy_(kaiming_A(rank, layer.in_features, generator))
    return tuner


def inject_adalora(
    model: nn.Module,
    names: Sequence[str],
    *,
    rank: int,
    alpha: float,
    total_steps: int,
    dropout: float = 0.0,
    seed: int = 0,
) -> Any:
    """Put PEFT's AdaLoRA on linear layers; everything else is frozen.

    Every layer begins with 1.5 x ``rank`` singular triplets. Between 15 % and 50 % of the run the budget
    falls to ``rank`` a layer on average, at every step in runs of up to 2,000 steps; the second half trains
    what is left. The update is ``alpha / initial rank`` times ``B diag(E) A``, as PEFT has it.

    Args:
        model, names, alpha, dropout: see :func:`inject_lora`.
        rank: mean rank at the end.
        total_steps: step budget, from which the schedule follows.
        seed: of A and B, both normal with deviation 0.02.

    Returns:
        The ``peft.AdaLoraModel``, whose ``model`` is the one given.
    """
    import peft

    config = peft.AdaLoraConfig(
        target_r=rank,
        init_r=max(rank + 1, round(INIT_RANK * rank)),
        tinit=int(TINIT_SHARE * total_steps),
        tfinal=int(TFINAL_SHARE * (total_steps - 1)),  # one step, at least, is measured before the last cut
        deltaT=max(1, total_steps // ALLOCATIONS),
        total_step=total_steps,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=_exactly(names),
    )
    with torch.random.fork_rng():
        tuner = _in_fp32(peft.AdaLoraModel(model, {ADAPTER: config}, ADAPTER))
    generator = torch.Generator().manual_seed(seed)
    for layer in _layers(tuner).values():
        for factor in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]):
            factor.data.copy_(torch.empty(factor.shape).normal_(0, 0.02, generator=generator))
    return tuner


class PeftMethod(Method):
    """What both methods do alike: one adapter of PEFT, torch's AdamW, a cosine with one warm-up.

    Args:
        tuner: as :func:`inject_lora` or :func:`inject_adalora` returns it.
        learning_rate: peak of the cosine.
        total_steps: step budget.
        warmup, min_lr_ratio: of the cosine.
        weight_decay, max_grad_norm: of the optimiser.
        head: fp32 parameters trained in full beside the adapter, with the same schedule.
        head_learning_rate: their peak; None is ``learning_rate``.
    """

    def __init__(
        self,
        tuner: Any,
        *,
        learning_rate: float,
        total_steps: int,
        warmup: int = 0,
        min_lr_ratio: float = 0.1,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        head: Sequence[nn.Parameter] = (),
        head_learning_rate: float | None = None,
    ) -> None:
        self.tuner, self.layers = tuner, _layers(tuner)
        self.learning_rate, self.steps_done = 0.0, 0
        self.total_steps, self.warmup, self.min_lr_ratio = total_steps, warmup, min_lr_ratio
        self.max_grad_norm = max_grad_norm
        self._adapter = {n: p for n, p in tuner.model.named_parameters() if ".lora_" in n}
        self._parameters = {**self._adapter, **{f"head.{i}": p for i, p in enumerate(head)}}
        groups = [{"params": list(self._adapter.values()), "peak": learning_rate}]
        if head:
            groups.append({"params": list(head), "peak": head_learning_rate or learning_rate})
        self.optimiser = torch.optim.AdamW(groups, lr=learning_rate, weight_decay=weight_decay)
        for parameter in self._parameters.values():
            parameter.grad = torch.zeros_like(parameter)  # of a layer that no example reached, too

    @classmethod
    def build(cls, attached: Any, options: MethodOptions, head: Sequence[nn.Parameter] = ()) -> PeftMethod:
        return cls(attached, head=head, **options.optimisation(), **options.cosine())

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self._parameters.values() if p.grad is not None]

    def gradient_norm(self) -> Tensor:
        return torch.nn.utils.get_total_norm(self.gradients())

    def multiply_gradients(self, factor: float) -> None:
        torch._foreach_mul_(self.gradients(), factor)

    def step(self, loss: float | None = None) -> list[GrowthEvent]:
        """Clip, update, zero the gradients. Nothing grows."""
        factor = warm_cosine(self.steps_done, total=self.total_steps, warmup=self.warmup, min_ratio=self.min_lr_ratio)
        for group in self.optimiser.param_groups:
            group["lr"] = group["peak"] * factor
        self.learning_rate = self.optimiser.param_groups[0]["lr"]
        torch.nn.utils.clip_grad_norm_(self._parameters.values(), self.max_grad_norm)
        self.optimiser.step()
        self.steps_done += 1
        self._after_update()
        self.zero_grad()
        return []

    def _after_update(self) -> None:
        """Between the update and the zeroing of the gradients."""

    def zero_grad(self) -> None:
        self.optimiser.zero_grad(set_to_none=False)

    def finish(self) -> list[GrowthEvent]:
        """Nothing to decide: the adapter stays as it is."""
        for parameter in self._adapter.values():
            parameter.requires_grad_(False)
        return []

    def factors(self) -> dict[str, Factors]:
        parameters = {name: parameter.detach() for name, parameter in self._adapter.items()}
        return {name: _factors(parameters, name, self._scale(layer)) for name, layer in self.layers.items()}

    def _scale(self, layer: Any) -> float:
        """What a layer multiplies its product of factors by."""
        return float(layer.scaling[ADAPTER])

    def components(self) -> dict[str, list[int]]:
        """One component for each module, of the rank that :meth:`factors` has."""
        return {name: [len(A)] if len(A) else [] for name, (A, _) in self.factors().items()}

    def active_modules(self) -> int:
        return len(self.layers) if self.trainable_parameters() else 0

    def trainable_parameters(self) -> int:
        return sum(p.numel() for p in self._adapter.values() if p.requires_grad)

    def state(self) -> MethodState:
        tensors = {f"parameter.{name}": p.detach() for name, p in self._parameters.items()}
        for name, parameter in self._parameters.items():
            for key, moment in self.optimiser.state[parameter].items():
                tensors[f"optimiser.{key}.{name}"] = moment
        scales = {name: self._scale(layer) for name, layer in self.layers.items()}
        return MethodState(tensors, {"steps_done": self.steps_done, "scales": scales})

    @torch.no_grad()
    def load_state(self, state: MethodState) -> None:
        self.steps_done = state.values["steps_done"]
        for name, parameter in self._parameters.items():
            parameter.copy_(state.tensors[f"parameter.{name}"])
        moments = {}
        if self.steps_done:
            for place, name in enumerate(self._parameters):
                moments[place] = {key: state.tensors[f"optimiser.{key}.{name}"] for key in _MOMENTS}
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": moments})
        self.zero_grad()


class PeftLora(PeftMethod):
    """LoRA (Hu et al., 2021) as PEFT has it; see :class:`PeftMethod` for the arguments."""

    name = "peft-lora"

    @classmethod
    def attach(cls, model: nn.Module, names: Sequence[str], options: MethodOptions) -> Any:
        return inject_lora(
            model, names, rank=options.rank, alpha=options.alpha, dropout=options.dropout, seed=options.seed
        )

    def ranks(self) -> dict[str, int]:
        return {name: layer.r[ADAPTER] for name, layer in self.layers.items()}

    @torch.no_grad()
    def load_factors(self, update: Update, components: Mapping[str, list[int]]) -> None:
        for name, layer in self.layers.items():
            A, B = update[name]
            layer.scaling[ADAPTER] = 1.0
            layer.lora_A[ADAPTER].weight.copy_(A)
            layer.lora_B[ADAPTER].weight.copy_(B.T)


class AdaLora(PeftMethod):
    """AdaLoRA (Zhang et al., 2023) as PEFT has it; see :class:`PeftMethod` for the arguments.

    PEFT masks what the budget leaves no room for and goes on training all triplets, so the trainable
    parameters stay those of the initial rank.
    """

    name = "adalora"

    @classmethod
    def attach(cls, model: nn.Module, names: Sequence[str], options: MethodOptions) -> Any:
        return inject_adalora(
            model,
            names,
            rank=options.rank,
            alpha=options.alpha,
            total_steps=options.total_steps,
            dropout=options.dropout,
            seed=options.seed,
        )

    @property
    def _config(self) -> Any:
        return self.tuner.peft_config[ADAPTER]

    def penalty(self) -> Tensor | None:
        """Orthogonality of A and B, as ``peft.AdaLoraModel.forward`` adds it to a loss (PEFT has it nowhere else)."""
        distances = []
        for layer in self.layers.values():
            A, B = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
            for gram in (A @ A.T, B.T @ B):
                distances.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device)))
        total: Tensor = torch.stack(distances).mean() * self._config.orth_reg_weight
        return total

    def _after_update(self) -> None:
        step, config = self.steps_done, self._config
        last = config.total_step - config.tfinal
        if config.rank_pattern is None:
            step = min(step, last)  # a run resumed with a smaller budget has passed its last allocation
        if step == last and not self.tuner.rankallocator.ipt:
            if config.rank_pattern is None:  # a run of one step
                return
            step += 1  # resumed with a greater budget, nothing measured since the last allocation: it stands
        self.tuner.update_and_allocate(step)

    def _scale(self, layer: Any) -> float:
        return float(layer.scaling[ADAPTER] / (layer.ranknum[ADAPTER] + 1e-5))

    def ranks(self) -> dict[str, int]:
        """Triplets that the last allocation kept.

        Between two allocations PEFT trains the others on from zero, so that they can come back.
        """
        pattern = self._config.rank_pattern
        if pattern is None:
            return dict.fromkeys(self.layers, self._config.init_r)
        return {name: sum(pattern[_singular(name)]) for name in self.layers}

    @torch.no_grad()
    def load_factors(self, update: Update, components: Mapping[str, list[int]]) -> None:
        pattern = {}
        for name, layer in self.layers.items():
            A, B, E = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER], layer.lora_E[ADAPTER]
            rank = sum(components[name])
            layer.scaling[ADAPTER] = (layer.ranknum[ADAPTER] + 1e-5).item()  # what PEFT divides by
            E.zero_()
            E[:rank] = 1
            if rank:
                A_kept, B_kept = update[name]
                A[:rank], B[:, :rank] = A_kept.to(A), B_kept.T.to(B)
            pattern[_singular(name)] = [place < rank for place in range(len(E))]
        self._config.rank_pattern = pattern

    def state(self) -> MethodState:
        state = super().state()
        for kind in _IMPORTANCE:
            for name, moment in getattr(self.tuner.rankallocator, kind).items():
                state.tensors[f"{kind}.{name}"] = moment
        return MethodState(state.tensors, {**state.values, "rank_pattern": self._config.rank_pattern})

    def load_state(self, state: MethodState) -> None:
        super().load_state(state)
        self._config.rank_pattern = state.values["rank_pattern"]
        for kind in _IMPORTANCE:
            saved = {
                name: state.tensors[f"{kind}.{name}"].to(parameter.device)
                for name, parameter in self._adapter.items()
                if f"{kind}.{name}" in state.tensors
            }
            setattr(self.tuner.rankallocator, kind, saved)


def factors_in(state: MethodState) -> dict[str, Factors]:
    """The update in the state of one of PEFT's methods.

    Raises:
        KeyError: the state of another kind of method.
    """
    prefix = "parameter."
    parameters = {key.removeprefix(prefix): t for key, t in state.tensors.items() if key.startswith(prefix)}
    return {name: _factors(parameters, name, scale) for name, scale in state.values["scales"].items()}


def _factors(parameters: Mapping[str, Tensor], name: str, scale: float) -> Factors:
    """The update of one module, the scale in B; of AdaLoRA's triplets those whose singular value is not zero."""
    A, B = (_parameter(parameters, name, f"lora_{factor}") for factor in "AB")
    E = parameters.get(_singular(name))
    if E is None:
        return Factors(A, B.T * scale)
    kept = E[:, 0] != 0
    return Factors((A * E)[kept], B.T[kept] * scale)


def _parameter(parameters: Mapping[str, Tensor], name: str, kind: str) -> Tensor:
    """A factor by PEFT's name of it: LoRA's are linear layers, AdaLoRA's bare parameters."""
    bare = f"{name}.{kind}.{ADAPTER}"
    return parameters[bare] if bare in parameters else parameters[f"{bare}.weight"]


def _in_fp32(tuner: Any) -> Any:
    """The adapter in fp32, as ``get_peft_model`` has it; the tuner alone takes the base's dtype."""
    for name, parameter in tuner.model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    return tuner


def _exactly(names: Sequence[str]) -> str:
    """An expression for these modules; PEFT would take a plain name for the end of others, too."""
    return "|".join(re.escape(name) for name in names)


def _layers(tuner: Any) -> dict[str, Any]:
    return {name: tuner.model.get_submodule(name) for name in tuner.targeted_module_names}


def _singular(name: str) -> str:
    """The parameter by whose name PEFT's rank pattern knows a module."""
    return f"{name}.lora_E.{ADAPTER}"
