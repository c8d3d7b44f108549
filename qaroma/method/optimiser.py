"""AdamW over one flat fp32 buffer that holds every active component.

The parameters of all groups (one group per module) lie one after the other in ``values``, their
gradients and moments likewise, so that an update is a handful of kernels however many modules
train. Learning rate and step count are per group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

PRUNED_SHARE = 0.999  # of the moments, at a reset "prune" (paper, section 3.3)


class FlatAdamW:
    """AdamW (Loshchilov & Hutter, 2019) with a learning rate and a step count per group.

    Equivalent, group by group, to ``torch.optim.AdamW`` as long as ``max_update`` is None.
    The parameters given become views into :attr:`values`, their ``.grad`` views into
    :attr:`gradients`.

    Args:
        groups: name -> fp32 parameters, in the order they take in the buffer.
        betas, eps, weight_decay: as in AdamW.
        max_update: bound on one element's ``|m_hat / (sqrt(v_hat) + eps)|``. After a reset that prunes
            moments but keeps the step count, that ratio reaches 3; None leaves it so.
    """

    def __init__(
        self,
        groups: Mapping[str, Sequence[nn.Parameter]],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_update: float | None = None,
    ) -> None:
        self.betas, self.eps, self.weight_decay, self.max_update = betas, eps, weight_decay, max_update
        self.groups: dict[str, list[nn.Parameter]] = {name: list(ps) for name, ps in groups.items()}
        self.steps: dict[str, int] = dict.fromkeys(self.groups, 0)
        self.values = _flattened([p.data for ps in self.groups.values() for p in ps])
        self.gradients, self.first_moment, self.second_moment = (torch.zeros_like(self.values) for _ in range(3))
        self._point_parameters()

    def _point_parameters(self) -> None:
        """Make every parameter and its gradient a view into the flat buffers."""
        self.slices: dict[str, slice] = {}
        offset = 0
        for name, parameters in self.groups.items():
            start = offset
            for p in parameters:
                part = slice(offset, offset + p.numel())
                p.data = self.values[part].view(p.shape)
                p.grad = self.gradients[part].view(p.shape)
                offset += p.numel()
            self.slices[name] = slice(start, offset)
        sizes = [s.stop - s.start for s in self.slices.values()]
        self._sizes = torch.tensor(sizes, dtype=torch.long, device=self.values.device)

    def zero_grad(self) -> None:
        self.gradients.zero_()

    def clip(self, max_norm: float) -> Tensor:
        """Scale all gradients so that their joint norm is at most ``max_norm``.

        Returns:
            The norm before, as a scalar on the device: reading it is the caller's synchronisation.
        """
        norm: Tensor = torch.linalg.vector_norm(self.gradients)
        self.gradients.mul_((max_norm / (norm + 1e-6)).clamp_max(1.0))
        return norm

    @torch.no_grad()
    def step(self, learning_rates: Mapping[str, float]) -> None:
        """One update of every group, each with its own learning rate."""
        beta1, beta2 = self.betas
        rows = []
        for name in self.groups:
            self.steps[name] += 1
            t = self.steps[name]
            rows.append((learning_rates[name], 1 - beta1**t, 1 - beta2**t))
        per_group = torch.tensor(rows, dtype=torch.float32).view(-1, 3).to(self.values.device, non_blocking=True)
        lr, correction1, correction2 = (
            torch.repeat_interleave(column, self._sizes, output_size=self.values.numel()) for column in per_group.T
        )
        self.first_moment.lerp_(self.gradients, 1 - beta1)
        self.second_moment.mul_(beta2).addcmul_(self.gradients, self.gradients, value=1 - beta2)
        denominator = (self.second_moment / correction2).sqrt_().add_(self.eps)
        update = (self.first_moment / correction1).div_(denominator)
        if self.max_update is not None:
            update.clamp_(-self.max_update, self.max_update)
        if self.weight_decay:
            update.add_(self.values, alpha=self.weight_decay)
        self.values.sub_(update.mul_(lr))

    @torch.no_grad()
    def reset(self, names: Sequence[str], mode: str, generator: torch.Generator) -> None:
        """Forget the moments of these groups.

        Args:
            names: groups whose component is new.
            mode: ``prune`` zeroes a random 99.9 % of both moments and keeps the step count, as the
                paper; ``full`` zeroes everything, step count too; ``none`` changes nothing.
            generator: CPU generator of the random choice.
        """
        if mode == "none":
            return
        for name in names:
            part = self.slices[name]
            if mode == "full":
                self.first_moment[part] = 0
                self.second_moment[part] = 0
                self.steps[name] = 0
                continue
            kept = torch.rand(part.stop - part.start, generator=generator) >= PRUNED_SHARE
            kept = kept.to(self.values.device)
            self.first_moment[part] *= kept
            self.second_moment[part] *= kept

    def drop(self, names: Sequence[str]) -> None:
        """Give back the memory of these groups; their parameters are no longer trained."""
        gone = set(names)
        for name in gone:
            for p in self.groups[name]:
                p.grad = None
        kept = [self.slices[name] for name in self.groups if name not in gone]
        for attribute in ("values", "gradients", "first_moment", "second_moment"):
            buffer: Tensor = getattr(self, attribute)
            setattr(self, attribute, torch.cat([buffer[part] for part in kept]) if kept else buffer.new_zeros(0))
        self.groups = {name: ps for name, ps in self.groups.items() if name not in gone}
        self.steps = {name: t for name, t in self.steps.items() if name not in gone}
        self._point_parameters()

    def moments(self, name: str) -> list[tuple[Tensor, Tensor]]:
        """First and second moment of each parameter of a group, as views in the parameter's shape."""
        found, offset = [], self.slices[name].start
        for p in self.groups[name]:
            part = slice(offset, offset + p.numel())
            found.append((self.first_moment[part].view(p.shape), self.second_moment[part].view(p.shape)))
            offset += p.numel()
        return found

    def buffers(self) -> dict[str, Tensor]:
        """What lasts from step to step: the values and both moments of all groups, each one flat tensor."""
        return {"values": self.values, "first_moment": self.first_moment, "second_moment": self.second_moment}


def _flattened(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1).float() for t in tensors]) if tensors else torch.zeros(0)
