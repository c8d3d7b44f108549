"""The adapted projection and its layers against the naive dense form."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from counting import Unpacked
from torch import nn
from torch.utils.checkpoint import checkpoint

from qaroma.errors import QaromaError
from qaroma.method.adapter import BLOCK, AdaptedLinear, Adapter
from qaroma.method.dequantise import dense_rows, dense_weight, fused_product
from qaroma.method.lowrank import Active, lowrank_linear


def nf4_linear(in_features: int, out_features: int, bias: bool = False, dtype=torch.float32) -> nn.Module:
    import bitsandbytes as bnb

    dense = nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
    layer = bnb.nn.Linear4bit(in_features, out_features, bias=bias, compute_dtype=dtype, quant_type="nf4")
    layer.load_state_dict(dense.state_dict())
    layer.support_avx512bf16_for_cpu = False
    return layer.to("cpu").requires_grad_(False)


def layers(dtype=torch.float32) -> list[nn.Module]:
    return [nn.Linear(192, 128, bias=True, dtype=dtype).requires_grad_(False), nf4_linear(192, 128, dtype=dtype)]


@pytest.mark.parametrize("kind", [0, 1], ids=["dense", "nf4"])
@pytest.mark.parametrize("shape", [(7,), (3, 5), (1, 1)])
def test_forward_and_gradients_equal_the_naive_form(kind: int, shape: tuple[int, ...]) -> None:
    base, scale, start, r = layers()[kind], 2.0, 3, 2
    A, B = torch.randn(16, 192) / 14, torch.randn(16, 128)
    A_param = nn.Parameter(A[start : start + r].clone())
    B_param = nn.Parameter(B[start : start + r].clone() / scale)
    x = torch.randn(*shape, 192, requires_grad=True)
    weights = torch.randn(*shape, 128)
    (lowrank_linear(x, base, A, B, Active(A_param, B_param, start, scale)) * weights).sum().backward()

    x2, A2, B2 = (t.detach().double().requires_grad_() for t in (x, A, B))
    bias = None if base.bias is None else base.bias.double()
    y2 = F.linear(x2, dense_weight(base, torch.float64), bias) + (x2 @ A2.T) @ B2
    (y2 * weights).sum().backward()
    y = lowrank_linear(x, base, A, B, None)
    torch.testing.assert_close(y.double(), y2, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), x2.grad, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(A_param.grad.double(), A2.grad[start : start + r], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(B_param.grad.double(), scale * B2.grad[start : start + r], rtol=1e-5, atol=1e-4)


def test_bf16_error_is_no_larger_than_the_naive_bf16_error() -> None:
    base = nf4_linear(192, 128, dtype=torch.bfloat16)
    A, B = torch.randn(16, 192).bfloat16() / 14, torch.randn(16, 128).bfloat16()
    x = torch.randn(33, 192).bfloat16()
    truth = F.linear(x.double(), dense_weight(base, torch.float64)) + (x.double() @ A.double().T) @ B.double()
    naive = F.linear(x, dense_weight(base, torch.bfloat16)) + (x @ A.T) @ B
    ours = lowrank_linear(x, base, A, B, None)
    assert (ours - truth).norm() <= (naive - truth).norm() * 1.001


def test_bf16_error_of_the_gradients_is_no_larger_than_the_naive_bf16_error() -> None:
    base, start, r = nf4_linear(192, 128, dtype=torch.bfloat16), 3, 2
    A, B = torch.randn(16, 192).bfloat16() / 14, torch.randn(16, 128).bfloat16()
    x, weights = torch.randn(33, 192).bfloat16(), torch.randn(33, 128).bfloat16()
    gradients = {}
    for name, dtype in (("truth", torch.float64), ("naive", torch.bfloat16)):
        given = [t.to(dtype).requires_grad_() for t in (x, A, B)]
        y = F.linear(given[0], dense_weight(base, dtype)) + (given[0] @ given[1].T) @ given[2]
        found = torch.autograd.grad(y, given, weights.to(dtype))
        gradients[name] = [found[0], *(factor[start : start + r] for factor in found[1:])]
    active = Active(*(nn.Parameter(factor[start : start + r].float()) for factor in (A, B)), start, 1.0)
    given = [x.requires_grad_(), active.A, active.B]
    gradients["ours"] = torch.autograd.grad(lowrank_linear(x, base, A, B, active), given, weights)
    for truth, naive, ours in zip(*gradients.values(), strict=True):
        assert (ours - truth).norm() <= (naive - truth).norm() * 1.001


@pytest.mark.parametrize("trains", [True, False])
def test_only_the_input_and_its_products_with_what_trains_are_saved(trains: bool) -> None:
    saved = []
    base = nf4_linear(192, 128)
    x = torch.randn(5, 192, requires_grad=True)
    active = Active(nn.Parameter(torch.randn(1, 192)), nn.Parameter(torch.randn(1, 128)), 0, 1.0)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        lowrank_linear(x, base, torch.randn(16, 192), torch.randn(16, 128), active if trains else None)
    assert saved == [x.shape, (5, 1)] * trains


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_recomputation_stops_before_the_last_product(dropout: float) -> None:
    """With the very gradients of what is not computed again."""
    model = nn.Sequential(
        nf4_linear(192, 128, dtype=torch.bfloat16), nn.SiLU(), nf4_linear(128, 64, dtype=torch.bfloat16)
    )
    adapter = Adapter(model, ["0", "2"], alpha=2.0, dropout=dropout)
    for layer in adapter.layers.values():
        layer.start_component(adapter.initial_A(layer))
        nn.init.normal_(layer.active_B)
    adapter.refresh()
    x = torch.randn(9, 192, dtype=torch.bfloat16, requires_grad=True)
    trained = [x, *(parameter for layer in adapter.layers.values() for parameter in (layer.active_A, layer.active_B))]
    gradients, unpacked = [], []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        torch.manual_seed(3)
        with Unpacked() as counted:
            gradients.append(torch.autograd.grad(run(x).square().sum(), trained))
        unpacked.append(counted.count)
    assert all(map(torch.equal, *gradients))
    assert unpacked == [4, 5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sizes", [(192, 128), (128, 192), (100, 64)])
def test_the_product_by_bitsandbytes_is_that_with_the_dense_weight(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    for base in (nf4_linear(*sizes, bias=True, dtype=dtype), nn.Linear(*sizes, dtype=dtype)):
        for rows in (1, 5):
            x = torch.randn(rows, sizes[0], dtype=dtype)
            with torch.no_grad():
                expected = F.linear(x, dense_weight(base, dtype), base.bias.to(dtype))
                torch.testing.assert_close(fused_product(x, base), expected)


def test_what_a_layer_returns_may_be_added_to_in_place() -> None:
    """Falcon and Llama 4 do."""
    _, layer, x = adapted(torch.float32)
    x = x.reshape(3, -1, x.shape[-1]).requires_grad_()
    (layer(x) + x.sum()).square().sum().backward()
    expected = (x.grad.clone(), layer.active_B.grad.clone())
    x.grad = layer.active_B.grad = None
    y = layer(x)
    y += x.sum()
    y.square().sum().backward()
    assert torch.equal(x.grad, expected[0])
    assert torch.equal(layer.active_B.grad, expected[1])


def adapted(dtype: torch.dtype, r: int = 1) -> tuple[Adapter, AdaptedLinear, torch.Tensor]:
    model = nn.Sequential(nf4_linear(192, 128, dtype=dtype))
    adapter = Adapter(model, ["0"], inner_rank=r, alpha=2.0 * r)
    layer = adapter.layers["0"]
    layer.start_component(adapter.initial_A(layer))
    return adapter, layer, torch.randn(9, 192).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_growing_changes_no_output(dtype: torch.dtype) -> None:
    """Bit-identical inside a block of columns; 1e-6 across one in fp32, where the product is re-ordered."""
    adapter, layer, x = adapted(dtype)
    for rank in range(1, 2 * BLOCK + 3):
        with torch.no_grad():
            layer.active_B.normal_()
        adapter.refresh()
        before = layer(x).detach()
        crosses = rank % BLOCK == 0
        layer.restart_component(adapter.initial_A(layer))
        after = layer(x).detach()
        assert layer.rank == rank + 1
        if dtype == torch.bfloat16 or not crosses:
            assert torch.equal(before, after), f"rank {rank}"
        else:
            assert ((before - after).abs().max() / before.abs().max()) < 1e-6


def test_kaiming_uniform_initial_values() -> None:
    _, layer, _ = adapted(torch.float32, r=64)
    bound = (1 / 192) ** 0.5
    assert layer.active_A.abs().max() <= bound
    assert layer.active_A.detach().std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert layer.active_B.count_nonzero() == 0


def test_initial_values_are_the_seeds() -> None:
    first, same, other = (Adapter(nn.Sequential(nn.Linear(192, 128)), ["0"], seed=seed) for seed in (3, 3, 4))
    drawn = [adapter.initial_A(adapter.layers["0"]) for adapter in (first, same, other)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("keep", [True, False])
def test_a_done_layer_has_nothing_left_to_train(keep: bool) -> None:
    adapter, layer, x = adapted(torch.float32)
    empty = layer(x).detach()
    with torch.no_grad():
        layer.active_B.normal_()
    adapter.refresh()
    full = layer(x).detach()
    layer.end(keep=keep)
    assert torch.equal(layer(x), full if keep else empty)
    assert not torch.equal(full, empty)
    assert list(adapter.model.parameters(recurse=True)) == [layer.base.weight]
    assert adapter.trainable_parameters() == 0
    assert layer.rank == (1 if keep else 0)
    assert layer.A.shape[0] == (BLOCK if keep else 0)


def test_dropout_acts_on_the_active_component_only() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    adapter = Adapter(model, ["0"], inner_rank=1, alpha=2.0, dropout=0.5)
    layer = adapter.layers["0"]
    layer.start_component(adapter.initial_A(layer))
    with torch.no_grad():
        layer.active_B.normal_()
    adapter.refresh()
    x = torch.randn(4, 64)
    layer.train()
    assert not torch.equal(layer(x), layer(x))  # the active component is dropped at random
    layer.restart_component(adapter.initial_A(layer))
    assert torch.allclose(layer(x), layer.eval()(x), atol=1e-5)  # frozen components never are
    layer.train()(x).sum().backward()
    assert layer.active_B.grad.abs().sum() > 0


@pytest.mark.parametrize("double", [True, False])
def test_rows_of_a_4_bit_weight_equal_the_whole(double: bool) -> None:
    import bitsandbytes as bnb

    for rows, columns in ((128, 192), (100, 64), (33, 640)):
        layer = bnb.nn.Linear4bit(columns, rows, bias=False, quant_type="nf4", compress_statistics=double)
        layer = layer.to("cpu")
        whole = dense_weight(layer, torch.float32)
        for start, stop in ((0, rows), (0, 1), (17, 33), (rows - 5, rows)):
            assert torch.equal(dense_rows(layer, start, stop, torch.float32), whole[start:stop])
    plain = nn.Linear(64, 10)
    assert torch.equal(dense_rows(plain, 3, 7, torch.float32), plain.weight[3:7])


def test_a_layer_that_two_parents_share_is_refused() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"one": nn.Sequential(shared), "two": nn.Sequential(shared)})
    with pytest.raises(QaromaError, match=r"one\.0 and two\.0 are one layer .* growth\.target_modules"):
        Adapter(model, ["one.0"])
