"""AdamW and Muon over one flat fp32 buffer that holds every component that trains.

The parameters of all groups (one group per module) lie one after the other in ``values``, their
gradients and moments likewise, so that an update is a handful of kernels however many modules
train. A group's rows belong to its components, its parts; learning rate and step count are per part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from qaroma.method.orthogonal import orthogonalise_

PRUNED_SHARE = 0.999  # of the moments, at a reset "prune" (paper, section 3.3)
MUON_SIZE = 0.25  # of an element of Muon's update, in learning rates, as AdamW's often are: one rate does for both
_BUFFERS = ("values", "gradients", "first_moment", "second_moment", "last_update")


class FlatAdamW:
    """AdamW (Loshchilov & Hutter, 2019) with a learning rate and a step count for every part of every group.

    Equivalent, part by part, to ``torch.optim.AdamW`` as long as ``max_update`` is None.
    The parameters given become views into :attr:`values`, their ``.grad`` views into
    :attr:`gradients`.

    Args:
        groups: name -> fp32 parameters, in the order they take in the buffer.
        parts: name -> numbers of rows that belong together, oldest first; every parameter of the group has
            as many rows as they sum to. A group that is not named is one part, its parameters of any shape.
        betas, eps, weight_decay: as in AdamW.
        max_update: bound on one element of an update, in learning rates. After a reset that prunes moments but
            keeps the step count, AdamW's reach 3; None leaves it so.
    """

    values: Tensor
    gradients: Tensor
    first_moment: Tensor
    second_moment: Tensor | None  # None where no group asks for it
    last_update: Tensor | None  # what the last step subtracted from the values; kept on request

    def __init__(
        self,
        groups: Mapping[str, Sequence[nn.Parameter]],
        *,
        parts: Mapping[str, Sequence[int]] | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_update: float | None = None,
    ) -> None:
        self.betas, self.eps, self.weight_decay, self.max_update = betas, eps, weight_decay, max_update
        self.groups: dict[str, list[nn.Parameter]] = {name: list(ps) for name, ps in groups.items()}
        self.parts: dict[str, list[int]] = {name: list(rows) for name, rows in (parts or {}).items()}
        self.steps: dict[str, list[int]] = {name: [0] * len(self.parts.get(name, (1,))) for name in self.groups}
        self.values = _flattened([p.data for ps in self.groups.values() for p in ps])
        self.gradients, self.first_moment = torch.zeros_like(self.values), torch.zeros_like(self.values)
        self.second_moment = torch.zeros_like(self.values) if self._needs_second_moment() else None
        self.last_update = None
        self._point_parameters({p: p.shape for ps in self.groups.values() for p in ps})

    def _point_parameters(self, shapes: Mapping[nn.Parameter, torch.Size]) -> None:
        """Make every parameter and its gradient a view of such a shape into the flat buffers."""
        self.slices: dict[str, slice] = {}
        sizes: list[int] = []  # of the runs of elements that share a learning rate
        owners: list[int] = []  # which part of all groups each of them belongs to
        offset = first_part = 0
        for name, parameters in self.groups.items():
            start = offset
            rows = self.parts.get(name)
            for p in parameters:
                shape = shapes[p]
                part = slice(offset, offset + shape.numel())
                p.data = self.values[part].view(shape)
                p.grad = self.gradients[part].view(shape)
                offset += shape.numel()
                sizes += [shape.numel()] if rows is None else [count * shape[1:].numel() for count in rows]
                owners += range(first_part, first_part + len(self.steps[name]))
            first_part += len(self.steps[name])
            self.slices[name] = slice(start, offset)
        device = self.values.device
        self._sizes = torch.tensor(sizes, dtype=torch.long, device=device)
        self._owners = torch.tensor(owners, dtype=torch.long, device=device)
        groups = [part.stop - part.start for part in self.slices.values()]
        self._group_sizes = torch.tensor(groups, dtype=torch.long, device=device)

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
    def step(self, learning_rates: Mapping[str, Sequence[float]]) -> None:
        """One update of every group, each of its parts with a learning rate of its own."""
        beta1, beta2 = self.betas
        rows = []
        for name, steps in self.steps.items():
            self.steps[name] = steps = [t + 1 for t in steps]
            rows += [(rate, 1 - beta1**t, 1 - beta2**t) for rate, t in zip(learning_rates[name], steps, strict=True)]
        per_part = torch.tensor(rows, dtype=torch.float32).view(-1, 3).to(self.values.device, non_blocking=True)
        lr, correction1, correction2 = per_part[self._owners].T
        self.first_moment.lerp_(self.gradients, 1 - beta1)
        update = self._direction(correction1, correction2)
        if self.max_update is not None:
            update.clamp_(-self.max_update, self.max_update)
        if self.weight_decay:
            update.add_(self.values, alpha=self.weight_decay)
        update.mul_(self._spread(lr))
        self.values.sub_(update)
        if self.last_update is not None:
            self.last_update = update

    def _needs_second_moment(self) -> bool:
        return True

    def _spread(self, per_run: Tensor) -> Tensor:
        """A figure for every element, from one for each run of elements that share a learning rate."""
        return torch.repeat_interleave(per_run, self._sizes, output_size=self.values.numel())

    def _direction(self, correction1: Tensor, correction2: Tensor) -> Tensor:
        """The update in learning rates; the gradients are in the first moment already.

        Args:
            correction1, correction2: of the moments of each run of elements, for the steps it was trained.
        """
        assert self.second_moment is not None
        self.second_moment.mul_(self.betas[1]).addcmul_(self.gradients, self.gradients, value=1 - self.betas[1])
        denominator = (self.second_moment / self._spread(correction2)).sqrt_().add_(self.eps)
        return (self.first_moment / self._spread(correction1)).div_(denominator)

    def keep_updates(self, wanted: bool) -> None:
        """Whether each update is kept until the next one, for :meth:`agreement`."""
        if wanted != (self.last_update is not None):
            self.last_update = torch.zeros_like(self.values) if wanted else None

    def agreement(self) -> Tensor:
        """Cosine of the angle between the gradients' descent direction and the last update, a scalar on the device.

        Positive where the loss still falls along what the last update did; 0 where there is nothing to compare.
        """
        assert self.last_update is not None
        cosine: Tensor = torch.nn.functional.cosine_similarity(self.gradients, self.last_update, dim=0, eps=1e-30)
        return cosine

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
                for moment in self._moments():
                    moment[part] = 0
                self.steps[name] = [0] * len(self.steps[name])
                continue
            kept = torch.rand(part.stop - part.start, generator=generator) >= PRUNED_SHARE
            kept = kept.to(self.values.device)
            for moment in self._moments():
                moment[part] *= kept

    @torch.no_grad()
    def grow(self, rows: Mapping[str, Sequence[Tensor]], *, gone: Mapping[str, int]) -> None:
        """Give groups another part, and give back the memory of the oldest ones.

        What stays keeps its values, gradients, moments and step counts; the new part begins without any. A group
        that grows gets new parameters: as long as a loss refers to an old one, autograd holds it to its old shape.

        Args:
            rows: name -> new rows of each of the group's parameters.
            gone: name -> how many of its oldest parts train no more.
        """
        shapes: dict[nn.Parameter, torch.Size] = {}
        grown: dict[str, list[Tensor]] = {buffer: [] for buffer in self._kept_buffers()}
        for name, parameters in self.groups.items():
            dropped = sum(self.parts.get(name, ())[: gone.get(name, 0)])
            offset = self.slices[name].start
            for index, p in enumerate(list(parameters)):
                new = rows[name][index].to(self.values) if name in rows else None
                for buffer, pieces in grown.items():
                    kept = getattr(self, buffer)[offset : offset + p.numel()].view(p.shape)[dropped:]
                    pieces.append(kept.reshape(-1))
                    if new is not None:
                        pieces.append((new if buffer == "values" else torch.zeros_like(new)).reshape(-1))
                offset += p.numel()
                if new is not None:
                    p.grad = None
                    parameters[index] = nn.Parameter(p.detach())
                shapes[parameters[index]] = torch.Size(
                    (p.shape[0] - dropped + (0 if new is None else len(new)), *p.shape[1:])
                )
            if name in rows:
                self.parts[name] = [*self.parts[name][gone.get(name, 0) :], len(rows[name][0])]
                self.steps[name] = [*self.steps[name][gone.get(name, 0) :], 0]
        for buffer, pieces in grown.items():
            setattr(self, buffer, torch.cat(pieces))
        self._point_parameters(shapes)

    def drop(self, names: Sequence[str]) -> None:
        """Give back the memory of these groups; their parameters are no longer trained."""
        gone = set(names)
        for name in gone:
            for p in self.groups[name]:
                p.grad = None
        kept = [self.slices[name] for name in self.groups if name not in gone]
        for attribute in self._kept_buffers():
            buffer: Tensor = getattr(self, attribute)
            setattr(self, attribute, torch.cat([buffer[part] for part in kept]) if kept else buffer.new_zeros(0))
        self.groups = {name: ps for name, ps in self.groups.items() if name not in gone}
        self.parts = {name: rows for name, rows in self.parts.items() if name not in gone}
        self.steps = {name: t for name, t in self.steps.items() if name not in gone}
        self._point_parameters({p: p.shape for ps in self.groups.values() for p in ps})

    def credits(self) -> Tensor:
        """How much the loss falls along the last update by this step's gradients, one figure a group, on the device.

        The sum of gradient times what was subtracted: what each group took off the loss, to first order.
        """
        assert self.last_update is not None
        return torch.segment_reduce(self.gradients * self.last_update, "sum", lengths=self._group_sizes)

    def _moments(self) -> list[Tensor]:
        return [self.first_moment] if self.second_moment is None else [self.first_moment, self.second_moment]

    def _kept_buffers(self) -> list[str]:
        return [name for name in _BUFFERS if getattr(self, name) is not None]

    def beside(self, name: str) -> list[dict[str, Tensor]]:
        """What is kept beside each parameter of a group (moments, last update), as views in the parameter's shape."""
        kept = {key: self._views(buffer, name) for key, buffer in self.buffers().items() if key != "values"}
        return [{key: views[place] for key, views in kept.items()} for place in range(len(self.groups[name]))]

    def _views(self, buffer: Tensor, name: str) -> list[Tensor]:
        """A group's part of a flat buffer, parameter by parameter, in their shapes."""
        parameters = self.groups[name]
        pieces = torch.split(buffer[self.slices[name]], [p.numel() for p in parameters])
        return [piece.view(p.shape) for piece, p in zip(pieces, parameters, strict=True)]

    def buffers(self) -> dict[str, Tensor]:
        """What lasts from step to step: values, moments and, where kept, the last update, each one flat tensor."""
        return {name: getattr(self, name) for name in self._kept_buffers() if name != "gradients"}


class FlatMuon(FlatAdamW):
    """Muon (Jordan et al., 2024) on factors, AdamW on groups without parts.

    A factor's update is its Nesterov momentum, orthogonalised: all directions of its row space are as long, the ones
    of small gradient included, and the size of the gradient says nothing. It needs no second moment.
    """

    def _needs_second_moment(self) -> bool:
        return any(name not in self.parts for name in self.groups)

    def _direction(self, correction1: Tensor, correction2: Tensor) -> Tensor:
        """Elements of a factor have a root mean square of :data:`MUON_SIZE`."""
        momentum = (self.first_moment / self._spread(correction1)).lerp_(self.gradients, 1 - self.betas[0])
        if self.second_moment is None:
            update = momentum
        else:
            update = super()._direction(correction1, correction2)
            for name in self.parts:
                update[self.slices[name]] = momentum[self.slices[name]]
        orthogonalise_([view for name in self.parts for view in self._views(update, name)], MUON_SIZE)
        return update


OPTIMIZERS = {"adamw": FlatAdamW, "muon": FlatMuon}


def _flattened(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1).float() for t in tensors]) if tensors else torch.zeros(0)
