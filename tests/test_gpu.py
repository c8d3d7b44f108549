"""What only a GPU can show. Run with: pytest -m gpu"""

from __future__ import annotations

import gc

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

CUDA = torch.device("cuda")
MIB = 2**20


@pytest.fixture(autouse=True)
def _an_empty_card() -> None:
    """What the test before left in cycles must not count in this one's peak."""
    gc.collect()
    torch.cuda.empty_cache()


def step_at(level: int, length: int, layers: int = 4):
    """One step of LLaMA-3-8B's shape, ``layers`` deep; returns step, method and config."""
    from qaroma.bench.contestants import examples, qaroma_step, random_base
    from qaroma.plan.shapes import model_config

    config = model_config("llama3-8b")
    config.num_hidden_layers = layers
    torch.manual_seed(0)
    model = random_base(config, dtype=torch.bfloat16, device=CUDA)
    rows = examples(config.vocab_size, rows=1, length=length)
    return *qaroma_step(model, rows, level=level, frozen=16), config


@pytest.mark.parametrize(("resident", "level"), [(0, 1), (0, 2), (3, 4)])
def test_offload_tiles_and_streaming_change_no_gradient(resident: int, level: int) -> None:
    from qaroma.bench.contestants import examples, qaroma_step, random_base, twin
    from qaroma.plan.shapes import model_config

    config = model_config("llama3-8b")
    config.num_hidden_layers = 3
    model = random_base(config, dtype=torch.bfloat16, device=CUDA)
    rows = examples(config.vocab_size, rows=1, length=3000)
    values = []
    for chosen in (resident, level):
        torch.manual_seed(1)
        step, method = qaroma_step(twin(model), rows, level=chosen)
        for _ in range(3):
            step()
        values.append(method.trainer.optimiser.values.clone())
    naive_error = values[0].norm() * 2**-8
    assert (values[1] - values[0]).norm() < naive_error


@pytest.mark.parametrize("level", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [2048, 8192])
def test_the_allocator_agrees_with_the_plan(level: int, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from qaroma.engine import tiled
    from qaroma.plan.trace import StepSettings, trace_step
    from qaroma.plan.workspaces import FIXED

    monkeypatch.setattr(tiled, "spare_bytes", lambda _: 0)  # the plan is that of a card without room to spare
    step, _, config = step_at(level, length)
    step()
    torch.cuda.reset_peak_memory_stats()
    step()
    measured = torch.cuda.max_memory_allocated() - workspaces_of_this_card() + FIXED
    planned = trace_step(config, StepSettings(level=level, seq_len=length)).peak.bytes
    assert measured == pytest.approx(planned, rel=0.05)


def workspaces_of_this_card() -> int:
    """What cuBLAS keeps: on a Hopper more than the plan has, which is made for smaller cards."""
    from qaroma.plan.workspaces import FIXED

    return 2 * 32 * MIB if torch.cuda.get_device_capability()[0] == 9 else FIXED


def test_the_products_library_takes_what_the_plan_has() -> None:
    torch._C._cuda_clearCublasWorkspaces()
    before = torch.cuda.memory_allocated()
    x, weight = (torch.ones(256, 256, device=CUDA, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    (x @ weight).sum().backward()
    del x, weight
    assert torch.cuda.memory_allocated() - before == workspaces_of_this_card()


@pytest.mark.parametrize(("key_heads", "length", "width"), [(8, 2048, 128), (32, 2000, 128), (8, 8192, 64)])
def test_attentions_backward_pass_takes_what_the_plan_has(key_heads: int, length: int, width: int) -> None:
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from qaroma.plan.workspaces import workspace_bytes

    query, key, value = (  # as a layer has them: (B, L, H, D), seen as (B, H, L, D)
        torch.randn(1, length, heads, width, device=CUDA, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        for heads in (32, key_heads, key_heads)
    )
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # a Hopper would take cuDNN's
        found = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=key_heads < 32)
    gradient = torch.ones_like(found)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found.backward(gradient)
    results = query.nbytes + key.nbytes + value.nbytes
    inside = torch.cuda.max_memory_allocated() - before - results
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    assert inside == pytest.approx(workspace_bytes(op, (gradient, query, key)), rel=0.02)


def test_a_check_costs_one_synchronisation() -> None:
    step, method, _ = step_at(1, 256, layers=1)
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert method.step() == []  # no check is due
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_bf16_nf4_trains_and_grows_as_on_the_cpu(tiny_folder) -> None:
    from qaroma import GrowthController, GrowthSettings, attach, load_base

    def grown(device: str) -> tuple[list[float], int]:
        torch.manual_seed(0)
        model = load_base(tiny_folder, device=device)
        adapter = attach(model)
        settings = GrowthSettings(t_in=5, check_every=2, warmup=1, restart_warmup=1, eps_out=1e-9)
        growth = GrowthController(adapter, settings, learning_rate=1e-2, total_steps=40)
        batch = torch.arange(3, 60, device=device)[None]
        losses = []
        for _ in range(30):
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            growth.step()
            losses.append(loss.item())
        return losses, min(adapter.ranks().values())

    (here, rank_here), (there, rank_there) = grown("cpu"), grown("cuda")
    assert there == pytest.approx(here, rel=2e-3)
    assert there[-1] < there[0] - 0.3
    assert rank_here == rank_there > 3


@pytest.mark.parametrize("rows", [1, 4, 33, 600])
def test_a_product_without_a_gradient_is_as_exact_as_that_with_the_dense_weight(rows: int) -> None:
    import torch.nn.functional as F

    from qaroma.method.dequantise import dense_weight, fused_product
    from qaroma.model.bnb import bnb

    base = bnb.nn.Linear4bit(4096, 1024, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").to(CUDA)
    x = torch.randn(rows, 4096, device=CUDA, dtype=torch.bfloat16)
    with torch.no_grad():
        truth = F.linear(x.double(), dense_weight(base, torch.float64))
        naive = F.linear(x, dense_weight(base, torch.bfloat16))
        assert (fused_product(x, base) - truth).norm() <= (naive - truth).norm() * 1.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_packed_rows_are_as_exact_as_under_a_mask(dtype: torch.dtype) -> None:
    from types import SimpleNamespace

    import torch.nn.functional as F

    from qaroma.model.documents import Documents, attend, one_kernel_for_all

    lengths = (40, 24, 1, 63)
    numbers = torch.tensor([n for n, length in enumerate(lengths) for _ in range(length)], device=CUDA).view(2, 1, 64)
    mask = (numbers[..., None] == numbers[..., None, :]).tril()
    starts = torch.tensor([0, 40, 64, 65, 128], device=CUDA, dtype=torch.int32)
    states = [torch.randn(2, heads, 64, 32, device=CUDA, dtype=torch.float64) for heads in (4, 2, 2)]
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    together = one_kernel_for_all(CUDA, dtype, 32)
    assert together == (dtype != torch.float32)

    def outcome(kind: torch.dtype, given: object) -> list[torch.Tensor]:
        query, key, value = (state.detach().to(kind).requires_grad_() for state in states)
        if isinstance(given, Documents):
            found = attend(module, query, key, value, given)[0].transpose(1, 2)
        else:
            wide = (t.repeat_interleave(2, 1) for t in (key, value))
            found = F.scaled_dot_product_attention(query, *wide, attn_mask=mask)
        found.square().sum().backward()
        return [found.detach(), query.grad, key.grad, value.grad]

    truth, naive = outcome(torch.float64, None), outcome(dtype, None)
    ours = outcome(dtype, Documents(lengths, (None,) * 4, starts if together else None))
    for one, other, true in zip(ours, naive, truth, strict=True):
        assert (one - true).norm() <= 1.5 * (other - true).norm() + 1e-6 * true.norm()
