"""Layer inputs and embeddings in host memory: what comes from there is as it was, and little more is taken than lies
there."""

from __future__ import annotations

import random
from unittest.mock import Mock

import pytest
import torch
from conftest import tiny_config
from own_memory import needs_rss_anon, run_measured
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from qaroma.data.encode import Example
from qaroma.engine import host as host_module
from qaroma.engine import placement
from qaroma.engine.checkpointing import enable_checkpointing
from qaroma.engine.host import Parking, ThisHost, aligned, as_torch_takes_it, piece_sizes, pinned_for
from qaroma.engine.levels import apply_level
from qaroma.engine.placement import PIECE, HostEmbedding, move_embeddings_to_host
from qaroma.method.aroma import GrowthController
from qaroma.method.attach import attach
from qaroma.method.growth import GrowthSettings
from qaroma.model.base import load_base
from qaroma.plan.counter import LiveStorages
from qaroma.plan.trace import StepSettings, trace_step
from qaroma.tasks.causal_lm import CausalLM

CPU = torch.device("cpu")
MIB = 2**20
TASK = CausalLM()


class Apart(ThisHost):
    """A host that is another memory than the CPU's.

    Attributes:
        asked: bytes of each piece of pinned memory.
    """

    def __init__(self) -> None:
        self.asked: list[int] = []

    def is_apart(self, device: torch.device) -> bool:
        return True

    def pinned_bytes(self, size: int, device: torch.device) -> Tensor:
        self.asked.append(size)
        return torch.empty(size, dtype=torch.uint8)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Places that lie in many pieces, and begin and end in the middle of one."""
    monkeypatch.setattr(host_module, "SMALLEST_PIECE", 512)


def test_pinned_memory_is_taken_in_powers_of_two() -> None:
    assert piece_sizes(112 * MIB + 5) == [64 * MIB, 32 * MIB, 16 * MIB, 5]
    assert piece_sizes(3) == [3]
    assert piece_sizes(0) == []
    assert pinned_for(112 * MIB + 5) == 112 * MIB + 8


@pytest.mark.parametrize("hidden", [576, 4096, 5120])
def test_no_length_takes_more_than_half_a_mib_beyond_what_waits(hidden: int) -> None:
    draw = random.Random(0)
    for tokens in [1, 2, 513, 2**17, *(draw.randint(1, 2**18) for _ in range(300))]:
        needed = 32 * aligned(2 * hidden * tokens)
        assert 0 <= pinned_for(needed) - needed < MIB / 2
        assert len(piece_sizes(needed)) <= 20


def test_a_context_of_88064_tokens_takes_what_its_layer_inputs_do() -> None:
    """Of an 8B model, whose inputs torch would round up from 688 to 1,024 MiB each."""
    assert pinned_for(32 * aligned(2 * 4096 * 88_064)) == 32 * 688 * MIB


def test_what_waits_is_never_written_over(small_pieces: None) -> None:
    """Places come and go, mostly the last first, with lengths of their own."""
    draw, host = random.Random(1), Apart()
    parking = Parking(host)
    waiting: dict[int, tuple[list[Tensor], Tensor]] = {}
    most = 0
    for _ in range(2000):
        if waiting and draw.random() < 0.49:
            place = list(waiting)[-1] if draw.random() < 0.9 else draw.choice(list(waiting))
            pieces, contents = waiting.pop(place)
            assert torch.equal(torch.cat(pieces), contents)
            parking.leave(place)
        else:
            contents = torch.randint(0, 256, (draw.randint(1, 5000),), dtype=torch.uint8)
            place, pieces = parking.enter(len(contents), CPU)
            for piece, part in zip(pieces, contents.split([len(piece) for piece in pieces]), strict=True):
                piece.copy_(part)
            waiting[place] = pieces, contents
        most = max(most, *(place + aligned(len(contents)) for place, (_, contents) in waiting.items()), 0)
    assert parking.bytes == sum(host.asked) == most


def rows(count: int, length: int, lengths: tuple[int, ...] = ()):
    generator = torch.Generator().manual_seed(length)
    examples = []
    for _ in range(count):
        ids = torch.randint(3, 500, (length,), generator=generator).tolist()
        examples.append(Example(ids, [-100] * 4 + ids[4:], lengths=lengths))
    return TASK.collate(examples)


BATCHES = [rows(3, 41), rows(1, 7), rows(2, 60, (33, 20, 7)), rows(3, 41), rows(1, 61)]


def trained(folder, dtype: torch.dtype, level: int = 2):
    model = load_base(folder, compute_dtype=dtype, device="cpu")
    adapter = attach(model, inner_rank=2)
    method = GrowthController(adapter, GrowthSettings(t_in=1000), learning_rate=1e-2, total_steps=100)
    for _, layer in adapter.active_layers():
        torch.nn.init.normal_(layer.active_B, std=0.1, generator=torch.Generator().manual_seed(1))
    adapter.refresh()
    apply_level(model, level)
    return model.train(), method


def gradients(model, method, batches) -> Tensor:
    method.trainer.optimiser.zero_grad()
    for batch in batches:
        loss, count = TASK.loss(model, batch)
        (loss / count).backward()
    found = method.trainer.optimiser.gradients.clone()
    assert found.any()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_micro_batches_of_any_shape_have_the_same_gradients(small_pieces: None, tiny_folder, dtype) -> None:
    model, method = trained(tiny_folder, dtype)
    expected, host = gradients(model, method, BATCHES), Apart()
    enable_checkpointing(model, offload=True, host=host)
    largest = max(2 * aligned(batch.input_ids.numel() * 64 * dtype.itemsize) for batch in BATCHES)
    for _ in range(2):
        assert torch.equal(gradients(model, method, BATCHES), expected)
        assert sum(host.asked) == largest  # two layers' inputs of the largest micro-batch, once


def test_a_step_that_fails_leaves_no_place_taken(tiny_folder, monkeypatch: pytest.MonkeyPatch) -> None:
    (model, method), host = trained(tiny_folder, torch.float32), Apart()
    enable_checkpointing(model, offload=True, host=host)
    expected, asked = gradients(model, method, BATCHES[:1]), list(host.asked)
    for layer in model.model.layers:
        with monkeypatch.context() as patch:
            attention = Mock(side_effect=[layer.self_attn.forward, MemoryError])  # the second time it is run
            patch.setattr(layer.self_attn, "forward", lambda *a, attention=attention, **k: attention()(*a, **k))
            with pytest.raises(MemoryError):
                gradients(model, method, BATCHES[:1])
        assert torch.equal(gradients(model, method, BATCHES[:1]), expected)
    assert host.asked == asked


def embedding(kind: str, dtype: torch.dtype = torch.bfloat16) -> nn.Embedding:
    scaled = kind == "scaled"
    made = Gemma3TextScaledWordEmbedding(300, 48, 0, embed_scale=48**0.5) if scaled else nn.Embedding(300, 48)
    return made.to(dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["plain", "scaled"])
def test_rows_that_go_piece_by_piece_are_those_of_the_table(kind: str, dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    inner, host = embedding(kind, dtype), Apart()
    asked = [torch.randint(0, 300, shape) for shape in ((2, 37), (1, 1), (3, 40), (1, 7))]
    expected = [inner(ids) for ids in asked]
    monkeypatch.setattr(placement, "PIECE", 7 * 48 * dtype.itemsize)
    table = HostEmbedding(inner, CPU, host)
    for context in (torch.enable_grad, torch.inference_mode, torch.no_grad):
        with context():
            found = [table(ids) for ids in asked]
        assert all(
            torch.equal(one, other) and one.shape == other.shape for one, other in zip(found, expected, strict=True)
        )
        assert not any(rows.requires_grad for rows in found)
    assert host.asked == [placement.PIECE] * 2  # once and for all


@pytest.mark.parametrize(("kind", "pieces"), [("plain", 3), ("scaled", 4)])  # before and after they are scaled
def test_of_rows_on_their_way_the_host_holds_three_pieces(kind: str, pieces: int) -> None:
    inner = embedding(kind)
    ids = torch.zeros(2, 3 * PIECE // 96, dtype=torch.int64)
    with LiveStorages() as counter:
        table = HostEmbedding(inner, CPU, counter)
        assert counter.device.now == 0
        rows = table(ids)
        counter.adopt([rows], "rows")
    assert counter.device.categories["rows"] == rows.nbytes
    held = counter.host.peak.bytes - table.weight.nbytes
    assert held == pytest.approx(pieces * PIECE, abs=3 * rows[0, 0].nbytes)


_LOOKS_UP = """
import torch
from own_memory import sampled_peak
from torch import nn
from qaroma.engine.host import ThisHost
from qaroma.engine.placement import HostEmbedding

class Apart(ThisHost):
    is_apart = lambda self, device: True
    pinned_bytes = lambda self, size, device: torch.ones(size, dtype=torch.uint8)

inner = nn.Embedding(500, 2048, dtype=torch.bfloat16).requires_grad_(False)
ids = torch.randint(0, 500, (1, 40_960))
with sampled_peak() as peak:
    rows = HostEmbedding(inner, torch.device("cpu"), Apart())(ids)
print(peak.bytes - rows.nbytes)
"""


@needs_rss_anon
def test_a_process_takes_no_more_than_these_for_160_mib_of_rows() -> None:
    """It took 416 MiB while all rows were looked up, and then copied to pinned memory, which torch rounds up."""
    assert 2 * PIECE < int(run_measured(_LOOKS_UP)) < 3.1 * PIECE


@pytest.mark.parametrize("level", [2, 3])
def test_a_plan_counts_what_a_step_asks_of_the_host(level: int, tmp_path, small_pieces: None) -> None:
    from transformers import LlamaForCausalLM

    config, host = tiny_config(tie_word_embeddings=False), Apart()
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    (plain, method), (model, again) = trained(tmp_path, torch.bfloat16, level), trained(tmp_path, torch.bfloat16, level)
    model.set_input_embeddings(model.get_input_embeddings().inner)
    assert move_embeddings_to_host(model, host)
    enable_checkpointing(model, offload=True, host=host)
    step = [rows(2, 41)]
    assert torch.equal(gradients(model, again, step), gradients(plain, method, step))
    planned = trace_step(model.config, StepSettings(level, seq_len=41, micro_batch=2)).host
    assert sum(map(as_torch_takes_it, host.asked)) + model.get_input_embeddings().weight.nbytes == planned


def test_a_plan_counts_what_is_taken_in_a_deep_model() -> None:
    config = tiny_config(num_hidden_layers=9, hidden_size=320, tie_word_embeddings=False)
    found = trace_step(config, StepSettings(2, seq_len=700, micro_batch=3))
    assert found.parked == 9 * aligned(3 * 700 * 320 * 2)
    embeddings = 2 * config.vocab_size * 320
    assert found.host == embeddings + 2 * PIECE + pinned_for(found.parked)
