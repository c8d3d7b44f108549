"""Both criteria against dense fp64 twins, on a dense and on a 4-bit base."""

from __future__ import annotations

import pytest
import torch
from test_method_lowrank import nf4_linear
from torch import Tensor, nn

from qaroma.errors import QaromaError
from qaroma.method.adapter import Adapter
from qaroma.method.aroma import GrowthController
from qaroma.method.criteria import change_norm_sq, dense_inner_product, dense_norm_sq, product_norm_sq
from qaroma.method.dequantise import dense_weight
from qaroma.method.growth import GrowthSettings


def close(value: float, truth: Tensor) -> bool:
    return abs(value - truth.item()) <= 1e-6 * abs(truth.item()) + 1e-12


@pytest.mark.parametrize("r", [1, 8])
def test_norms_from_factors_equal_dense_ones(r: int) -> None:
    A, B = torch.randn(r, 192), torch.randn(r, 128) * 1e-3
    step_A, step_B = torch.randn(r, 192) * 1e-6, torch.randn(r, 128) * 1e-9
    dense = B.double().T @ A.double()
    assert close(product_norm_sq(A, B).sqrt().item(), dense.norm())
    moved = (B + step_B).double().T @ (A + step_A).double()
    assert close(change_norm_sq(A + step_A, B + step_B, A, B).sqrt().item(), (moved - dense).norm())
    assert change_norm_sq(A, B, A, B) == 0


def test_dense_norm_and_inner_product_in_blocks_of_rows() -> None:
    W = torch.randn(2500, 64).bfloat16()  # more rows than one block, the last one short
    A, B = torch.randn(2, 64).bfloat16(), torch.randn(2, 2500).bfloat16()
    assert close(dense_norm_sq(W).item(), W.double().square().sum())
    assert close(dense_inner_product(W, A, B).item(), (W.double() * (B.double().T @ A.double())).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("criterion", ["norm", "product"])
def test_controller_measures_what_a_dense_twin_does(kind: str, dtype: torch.dtype, criterion: str) -> None:
    """Five components of random training: at each check inner and outer equal eq. 5 and 6 on dense fp64 matrices."""
    base = nf4_linear(128, 192, dtype=dtype) if kind == "nf4" else nn.Linear(128, 192, dtype=dtype)
    adapter = Adapter(nn.Sequential(base), ["0"], inner_rank=2, alpha=4.0)
    settings = GrowthSettings(
        t_in=6, check_every=2, warmup=1, restart_warmup=1, eps_in=-1e9, eps_out=1e-9, inner_criterion=criterion
    )
    controller = GrowthController(adapter, settings, learning_rate=1e-2, total_steps=60)
    layer, state = adapter.layers["0"], controller.growth.modules
    W = dense_weight(layer.base, dtype).double()
    before = None
    for step in range(1, 31):
        controller.trainer.optimiser.gradients.normal_()
        due = step % 2 == 0
        if due:  # what the check of this step will see is known after the update: redo it on a copy
            twin = _after_update(controller)
        events = controller.step()
        if not due:
            continue
        module = events[0] if events else state["0"]
        assert close(module.outer, twin.norm() / W.norm())
        if before is not None:
            change = (twin - before).norm() if criterion == "product" else twin.norm() - before.norm()
            assert close(module.inner, change / before.norm())
        before = None if events else twin
        if events:
            assert events[0].decision == "commit"
            W = W + twin
    assert layer.frozen_rank == 10


def _after_update(controller: GrowthController) -> Tensor:
    """The active product in dense fp64, as it will be after the next update."""
    optimiser = controller.trainer.optimiser
    kept = [t.clone() for t in (optimiser.values, optimiser.gradients, optimiser.first_moment, optimiser.second_moment)]
    steps = dict(optimiser.steps)
    controller.trainer.update(controller.learning_rates())
    A, B = controller.adapter.layers["0"].active_factors()
    dense = B.double().T @ A.double()
    for buffer, values in zip(
        (optimiser.values, optimiser.gradients, optimiser.first_moment, optimiser.second_moment), kept, strict=True
    ):
        buffer.copy_(values)
    optimiser.steps = steps
    controller.adapter.refresh()
    return dense


def test_a_check_synchronises_once_for_all_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(7)))
    adapter = Adapter(model, [str(i) for i in range(7)])
    settings = GrowthSettings(t_in=4, check_every=2, warmup=1, restart_warmup=1, eps_out=1e-9)
    controller = GrowthController(adapter, settings, learning_rate=1e-2, total_steps=20)
    reads = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "numpy"):
        original = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda self, *a, _o=original, _n=name: reads.append(_n) or _o(self, *a))
    per_step = []
    for _ in range(8):
        controller.trainer.optimiser.gradients.normal_()
        reads.clear()
        events = controller.step()
        per_step.append((len(reads), len(events)))
    assert per_step == [(0, 0), (1, 0), (0, 0), (1, 7)] * 2


def test_components_that_an_adapter_brought_count_towards_max_rank() -> None:
    adapter = Adapter(nn.Sequential(nn.Linear(64, 64)), ["0"])
    adapter.layers["0"].load_factors(torch.randn(3, 64), torch.randn(3, 64), [3])
    settings = GrowthSettings(t_in=2, check_every=1, warmup=0, restart_warmup=0, eps_out=1e-9, max_rank=5)
    controller = GrowthController(adapter, settings, learning_rate=1e-2, total_steps=50)
    for _ in range(20):
        controller.trainer.optimiser.gradients.normal_()
        controller.step()
    assert controller.finished
    assert adapter.ranks() == {"0": 5}


def two_layers() -> GrowthController:
    adapter = Adapter(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8)), ["0", "1"])
    settings = GrowthSettings(t_in=4, warmup=1, restart_warmup=1)
    return GrowthController(adapter, settings, learning_rate=1e-2, total_steps=20)


def test_a_running_norm_that_rounding_left_below_zero_is_zero() -> None:
    method = two_layers()
    method._weight_norm_sq.fill_(-1e-12)
    assert method._measure(["0"])["0"].beside == 0.0


def test_components_that_are_not_finite_stop_the_run_with_a_sentence() -> None:
    method = two_layers()
    method.adapter.layers["0"].A[0, 0] = float("nan")
    with pytest.raises(QaromaError, match=r"components of 0 are no longer finite numbers .* --learning-rate"):
        method._measure(["0"])
