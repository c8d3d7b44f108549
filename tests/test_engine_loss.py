"""Chunked linear cross-entropy against the naive form, on dense and 4-bit heads."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_method_lowrank import nf4_linear
from torch import nn

from qaroma.engine import loss as loss_module
from qaroma.engine.loss import LMHead, linear_cross_entropy
from qaroma.method.dequantise import dense_weight


def head_of(projection: nn.Module, **config) -> LMHead:
    model = SimpleNamespace(config=SimpleNamespace(**config), get_output_embeddings=lambda: projection)
    return LMHead(model)


def naive(hidden, head: LMHead, targets, weights=1.0):
    logits = F.linear(hidden, dense_weight(head.projection, hidden.dtype)).float() * head.multiplier
    if head.projection.bias is not None:
        logits = logits + head.projection.bias * head.multiplier
    if head.softcap:
        logits = torch.tanh(logits / head.softcap) * head.softcap
    return (weights * F.cross_entropy(logits, targets, reduction="none")).sum()


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks of tokens and several blocks of the vocabulary, the last of each short."""
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 9 * 300 * 7)
    monkeypatch.setattr(loss_module, "HIDDEN_SHARE", 0)
    monkeypatch.setattr(loss_module, "BLOCK_ROWS", 128)


@pytest.mark.parametrize("kind", ["dense", "bias", "nf4"])
@pytest.mark.parametrize("config", [{}, {"final_logit_softcapping": 2.0}, {"logits_scaling": 4.0, "logit_scale": 3.0}])
@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_loss_and_gradient_equal_the_naive_form(kind: str, config: dict, tokens: int) -> None:
    projection = nf4_linear(64, 300) if kind == "nf4" else nn.Linear(64, 300, bias=kind == "bias")
    head = head_of(projection.requires_grad_(False), **config)
    hidden, targets = torch.randn(tokens, 64), torch.randint(0, 300, (tokens,))
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().double().requires_grad_()
    loss = linear_cross_entropy(ours, head, targets) / 3
    loss.backward()
    truth = naive(theirs, head, targets) / 3
    truth.backward()
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_each_tokens_loss_is_multiplied_by_its_weight(kind: str) -> None:
    projection = nf4_linear(64, 300) if kind == "nf4" else nn.Linear(64, 300, bias=False)
    head = head_of(projection.requires_grad_(False))
    hidden, targets, weights = torch.randn(23, 64), torch.randint(0, 300, (23,)), torch.rand(23) * 3
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().double().requires_grad_()
    loss, truth = linear_cross_entropy(ours, head, targets, weights), naive(theirs, head, targets, weights)
    loss.backward()
    truth.backward()
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-6)


def test_bf16_error_is_no_larger_than_the_naive_bf16_error() -> None:
    head = head_of(nn.Linear(64, 300, bias=False, dtype=torch.bfloat16).requires_grad_(False))
    hidden, targets = torch.randn(50, 64).bfloat16(), torch.randint(0, 300, (50,))
    gradients = {}
    for name, function, values in (
        ("truth", naive, hidden.double()),
        ("naive", naive, hidden.clone()),
        ("ours", linear_cross_entropy, hidden.clone()),
    ):
        values.requires_grad_()
        function(values, head, targets).backward()
        gradients[name] = values.grad.double()
    error = {name: (gradients[name] - gradients["truth"]).norm().item() for name in ("naive", "ours")}
    assert error["ours"] <= error["naive"] * 1.05


def test_fp16_keeps_the_gradient_of_tokens_that_are_all_but_learnt() -> None:
    """Made before the loss is scaled, it would be rounded to nothing there, whatever the scale."""
    projection = nn.Linear(64, 300, bias=False, dtype=torch.float16).requires_grad_(False)
    projection.weight /= 64  # as large as those of a model's thousands of columns
    head, targets = head_of(projection), torch.arange(20)
    directions = head.projection.weight[targets].double()
    hidden = (16 * directions / directions.square().sum(1, keepdim=True)).half()
    ours, theirs = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    (linear_cross_entropy(ours, head, targets) / (5000 / 2**16)).backward()
    (naive(theirs, head, targets) / (5000 / 2**16)).backward()
    error = (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm()
    assert error < 0.02


def test_a_packed_head_is_dequantised_no_oftener_for_more_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 1)
    monkeypatch.setattr(loss_module, "HIDDEN_SHARE", 6)
    head = head_of(nf4_linear(64, 300, dtype=torch.bfloat16))
    made: list[int] = []
    rows = head._rows
    monkeypatch.setattr(head, "_rows", lambda *where: made.append(1) or rows(*where))
    counts = []
    for tokens in (100, 1000, 4000):
        made.clear()
        hidden, targets = torch.randn(tokens, 64).bfloat16().requires_grad_(), torch.randint(0, 300, (tokens,))
        loss = linear_cross_entropy(hidden, head, targets)
        counts.append(len(made))
        assert loss.item() == pytest.approx(naive(hidden.double(), head, targets).item(), rel=1e-3)
    assert counts == [2 * 3 * 2] * 3  # two chunks, three blocks of the vocabulary, forward and backward


@pytest.mark.parametrize(("limit", "tokens"), [(2**18, 100), (2**30, 100), (2**30, 400)])
def test_what_a_chunk_takes_is_what_it_may_take(monkeypatch: pytest.MonkeyPatch, limit: int, tokens: int) -> None:
    """Its logits, room for one slice's softmax and, for a dense head, their gradient in the compute dtype."""
    from qaroma.plan.counter import LiveStorages

    monkeypatch.setattr(loss_module, "CHUNK_BYTES", limit)
    for projection, copies in (
        (nf4_linear(64, 3000, dtype=torch.bfloat16), 4.5),
        (nn.Linear(64, 3000, False, dtype=torch.bfloat16), 6.5),
    ):
        # The head's own bytes, where these are less, or what four chunks take.
        allowed = min(limit, 3000 * max(2 * 64, copies * tokens / 4))
        head = head_of(projection.requires_grad_(False), final_logit_softcapping=30.0)
        hidden, targets = torch.randn(tokens, 64).bfloat16().requires_grad_(), torch.randint(0, 3000, (tokens,))
        with LiveStorages() as counter:
            counter.adopt([hidden, targets, *projection.parameters()], "resident")
            resident = counter.device.now
            linear_cross_entropy(hidden, head, targets)
        beside = hidden.nbytes + 2 * 128 * 64  # gradients, and a block of the dense head
        assert 0.8 * allowed < counter.device.peak.bytes - resident < 1.25 * allowed + beside


def test_no_tensor_of_tokens_times_vocabulary_is_ever_made() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            largest.append(
                max((t.numel() for t in torch.utils._pytree.tree_leaves(out) if hasattr(t, "numel")), default=0)
            )
            return out

    head = head_of(nn.Linear(64, 300, bias=False).requires_grad_(False))
    hidden = torch.randn(100, 64, requires_grad=True)
    with Sizes():
        linear_cross_entropy(hidden, head, torch.randint(0, 300, (100,))).backward()
    assert max(largest) <= 300 * 64 < 100 * 300  # the weight itself is the largest


def test_without_gradient_no_gradient_is_made() -> None:
    head = head_of(nn.Linear(64, 300, bias=False).requires_grad_(False))
    made: list[int] = []
    head.backward = lambda *a: made.append(1)
    with torch.no_grad():
        linear_cross_entropy(torch.randn(9, 64, requires_grad=True), head, torch.randint(0, 300, (9,)))
    linear_cross_entropy(torch.randn(9, 64), head, torch.randint(0, 300, (9,)))
    assert made == []
