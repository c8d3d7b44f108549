"""The flat AdamW against torch's, its resets, why the update is in fp32, and Muon's orthogonal updates."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qaroma.method.optimiser import MUON_SIZE, FlatAdamW, FlatMuon
from qaroma.method.orthogonal import orthogonalise_


def groups(sizes: dict[str, tuple[int, ...]]) -> dict[str, list[nn.Parameter]]:
    return {name: [nn.Parameter(torch.randn(n)) for n in ns] for name, ns in sizes.items()}


def test_equals_torch_adamw_group_by_group() -> None:
    ours = groups({"a": (3, 5), "b": (7,)})
    theirs = {name: [nn.Parameter(p.detach().clone()) for p in ps] for name, ps in ours.items()}
    rates = {"a": [1e-2], "b": [3e-3]}
    flat = FlatAdamW(ours, weight_decay=0.1)
    reference = torch.optim.AdamW([{"params": theirs[n], "lr": rates[n][0]} for n in theirs], weight_decay=0.1)
    for _ in range(20):
        for name in ours:
            for p, q in zip(ours[name], theirs[name], strict=True):
                q.grad = torch.randn_like(q)
                p.grad.add_(q.grad / 2).add_(q.grad / 2)  # accumulates into the flat buffer
        reference.step()
        flat.step(rates)
        flat.zero_grad()
    for name in ours:
        for p, q in zip(ours[name], theirs[name], strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_parameters_and_gradients_are_views_into_the_flat_buffers() -> None:
    parameters = groups({"a": (3, 5), "b": (7,)})
    flat = FlatAdamW(parameters)
    (parameters["a"][1] * torch.arange(5.0)).sum().backward()
    assert flat.gradients.tolist() == [0.0] * 3 + [0.0, 1.0, 2.0, 3.0, 4.0] + [0.0] * 7
    flat.values.zero_()
    assert all(p.count_nonzero() == 0 for ps in parameters.values() for p in ps)


def test_clip_is_the_joint_norm() -> None:
    parameters = groups({"a": (300,), "b": (400,)})
    flat = FlatAdamW(parameters)
    flat.gradients.normal_()
    before = flat.gradients.clone()
    assert flat.clip(2.0).item() == pytest.approx(before.norm().item())
    torch.testing.assert_close(flat.gradients, before * (2.0 / before.norm()), rtol=1e-5, atol=1e-8)
    again = flat.gradients.clone()
    flat.clip(1e6)
    assert torch.equal(flat.gradients, again)


@pytest.mark.parametrize("mode", ["prune", "full", "none"])
def test_reset_does_what_its_mode_says(mode: str) -> None:
    flat = FlatAdamW(groups({"new": (20_000,), "old": (50,)}))
    for _ in range(3):
        flat.gradients.normal_()
        flat.step({"new": [1e-3], "old": [1e-3]})
    first, second = flat.first_moment.clone(), flat.second_moment.clone()
    flat.reset(["new"], mode, torch.Generator().manual_seed(0))
    kept = flat.second_moment[:20_000] != 0
    expected = {"prune": 20, "full": 0, "none": 20_000}[mode]
    assert abs(int(kept.sum()) - expected) <= (15 if mode == "prune" else 0)
    assert torch.equal(flat.first_moment[:20_000][kept], first[:20_000][kept])
    assert torch.equal(flat.first_moment[:20_000] != 0, kept)  # both moments of an element go together
    assert torch.equal(flat.first_moment[20_000:], first[20_000:])
    assert torch.equal(flat.second_moment[20_000:], second[20_000:])
    assert flat.steps == {"new": [0 if mode == "full" else 3], "old": [3]}


@pytest.mark.parametrize(("mode", "size"), [("prune", 3.16), ("full", 1.0)])
def test_first_update_after_a_reset(mode: str, size: float) -> None:
    """Pruned moments with a full step count make the next update 3 learning rates long; the guard bounds it."""
    for bound in (None, 1.0):
        flat = FlatAdamW(groups({"a": (1000,)}), max_update=bound)
        for _ in range(5000 if mode == "prune" else 10):
            flat.gradients.fill_(1.0)
            flat.step({"a": [0.0]})
        flat.reset(["a"], mode, torch.Generator().manual_seed(1))
        before = flat.values.clone()
        flat.gradients.fill_(1.0)
        flat.step({"a": [1e-3]})
        moved = (before - flat.values).median().item() / 1e-3
        assert moved == pytest.approx(min(size, bound or size), rel=0.02)


def test_max_update_bounds_both_ways() -> None:
    flat = FlatAdamW(groups({"a": (3,)}), max_update=1.0)
    before, flat.steps["a"] = flat.values.clone(), [100_000]  # no correction is left
    flat.first_moment.copy_(torch.tensor([3.0, -3.0, 0.5]))
    flat.second_moment.fill_(1.0)
    flat.step({"a": [0.1]})
    torch.testing.assert_close(before - flat.values, torch.tensor([0.1, -0.1, 0.045]), rtol=1e-3, atol=0.0)


def test_dropped_groups_leave_nothing_behind() -> None:
    parameters = groups({"a": (3,), "b": (5, 2), "c": (4,)})
    flat = FlatAdamW(parameters)
    flat.gradients.normal_()
    flat.step({"a": [1e-3], "b": [1e-3], "c": [1e-3]})
    moments = flat.first_moment.clone()
    flat.drop(["b"])
    assert list(flat.groups) == list(flat.steps) == ["a", "c"]
    assert torch.equal(flat.first_moment, torch.cat([moments[:3], moments[10:]]))
    assert all(p.grad is None for p in parameters["b"])
    assert parameters["c"][0].data_ptr() == flat.values[3:].data_ptr()
    flat.drop(["a", "c"])
    assert all(t.numel() == 0 for t in (flat.values, flat.gradients, flat.first_moment, flat.second_moment))
    flat.step({})  # nothing left: no error


def test_bf16_parameters_lose_updates_at_lr_1e_4_and_ours_do_not() -> None:
    """A unit weight's bf16 spacing is 2^-7: steps of 1e-4 round away. The fp32 master keeps them all."""
    start = torch.linspace(0.05, 1.0, 256)
    pure = nn.Parameter(start.bfloat16())
    flat = FlatAdamW({"a": [ours := nn.Parameter(start.clone())]})
    reference = torch.optim.AdamW([pure], lr=1e-4, weight_decay=0.0)
    for _ in range(100):
        pure.grad = torch.ones_like(pure)
        reference.step()
        flat.gradients.fill_(1.0)
        flat.step({"a": [1e-4]})
    moved_pure = (start.bfloat16().float() - pure.detach().float()).mean()
    moved_ours = (start - ours.detach()).mean()
    assert moved_ours.item() == pytest.approx(1e-2, rel=1e-3)  # 100 steps of 1e-4
    assert moved_pure < 0.2 * moved_ours


@pytest.mark.parametrize("shape", [(1, 40), (8, 40), (32, 40), (24, 10)])
def test_orthogonal_matrices_are_the_nearest_ones(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    U, _, V = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    found = U * torch.logspace(0, -1, min(shape)) @ V
    orthogonalise_([found], size=1.0)
    assert found.square().mean().sqrt().item() == pytest.approx(1.0, abs=0.28)
    core = U.T @ found @ V.T / max(shape) ** 0.5
    torch.testing.assert_close(core, torch.diag(torch.ones(min(shape))), atol=0.28, rtol=0.0)


def test_matrices_of_any_shapes_go_through_one_batch_and_zeros_stay() -> None:
    torch.manual_seed(0)
    matrices = [torch.randn(3, 9), torch.randn(8, 5), torch.zeros(3, 9), torch.randn(3, 9)]
    alone = [m.clone() for m in matrices]
    for matrix in alone:
        orthogonalise_([matrix], size=0.5)
    orthogonalise_(matrices, size=0.5)
    for together, single in zip(matrices, alone, strict=True):
        torch.testing.assert_close(together, single)
    assert matrices[2].count_nonzero() == 0
    orthogonalise_([], size=1.0)


def factors(rank: int = 4) -> dict[str, list[nn.Parameter]]:
    return {"a": [nn.Parameter(torch.zeros(rank, 12)), nn.Parameter(torch.zeros(rank, 7))]}


def test_muon_moves_all_directions_alike_whatever_the_size_of_the_gradients() -> None:
    torch.manual_seed(0)
    gradient = torch.randn(4, 12) * torch.tensor([1.0, 0.5, 0.2, 0.05])[:, None]
    moved = []
    for scale in (1.0, 1e-4):
        parameters = factors()
        muon = FlatMuon(parameters, parts={"a": [4]})
        parameters["a"][0].grad.copy_(scale * gradient)
        muon.step({"a": [0.1]})
        moved.append(-parameters["a"][0].detach())
        assert parameters["a"][1].count_nonzero() == 0  # without a gradient nothing moves
    torch.testing.assert_close(*moved)
    singular = torch.linalg.svdvals(moved[0]) / (0.1 * MUON_SIZE * 12**0.5)
    torch.testing.assert_close(singular, torch.ones(4), atol=0.28, rtol=0.0)
    assert (moved[0] * gradient).sum() > 0


def test_muon_is_torchs_momentum_orthogonalised() -> None:
    torch.manual_seed(0)
    parameters = factors()
    muon = FlatMuon(parameters, parts={"a": [4]})
    momentum = torch.zeros(4, 12)
    for step in range(1, 6):
        gradient = torch.randn(4, 12)
        parameters["a"][0].grad.copy_(gradient)
        before = parameters["a"][0].detach().clone()
        muon.step({"a": [0.1]})
        momentum.lerp_(gradient, 0.1)
        wanted = (momentum / (1 - 0.9**step)).lerp(gradient, 0.1)  # Nesterov's, without a bias
        orthogonalise_([wanted], MUON_SIZE)
        torch.testing.assert_close(before - parameters["a"][0].detach(), 0.1 * wanted)


def test_muon_leaves_a_head_to_adamw_and_keeps_no_second_moment_without_one() -> None:
    torch.manual_seed(0)
    head = nn.Parameter(torch.randn(3, 5))
    twin = nn.Parameter(head.detach().clone())
    muon = FlatMuon({**factors(), "head": [head]}, parts={"a": [4]})
    assert muon.second_moment is not None
    reference = torch.optim.AdamW([twin], lr=1e-2, weight_decay=0.0)
    for _ in range(5):
        muon.gradients.normal_()
        twin.grad = head.grad.clone()
        reference.step()
        muon.step({"a": [0.1], "head": [1e-2]})
        muon.zero_grad()
    torch.testing.assert_close(head, twin, rtol=1e-5, atol=1e-7)
    alone = FlatMuon(factors(), parts={"a": [4]})
    assert list(alone.buffers()) == ["values", "first_moment"]


def test_muon_goes_on_with_a_component_more() -> None:
    torch.manual_seed(0)
    muon = FlatMuon(factors(), parts={"a": [4]})
    muon.gradients.normal_()
    muon.step({"a": [0.1]})
    muon.grow({"a": [torch.randn(2, 12), torch.zeros(2, 7)]}, gone={"a": 1})
    assert muon.steps == {"a": [0]}
    assert [p.shape for p in muon.groups["a"]] == [(2, 12), (2, 7)]
    muon.gradients.normal_()
    before = muon.values.clone()
    muon.step({"a": [0.1]})
    assert (before - muon.values).square().mean().sqrt().item() == pytest.approx(0.1 * MUON_SIZE, rel=0.28)
