"""Checkpointing, offload, tiled MLP, placement: each changes no number that its naive twin has."""

from __future__ import annotations

import itertools
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from conftest import tiny_config
from counting import Unpacked

from qaroma.config.levels import LEVELS
from qaroma.data.encode import Example
from qaroma.engine import levels as levels_module
from qaroma.engine import tiled as tiled_module
from qaroma.engine.levels import apply_level
from qaroma.engine.placement import HostEmbedding
from qaroma.method.aroma import GrowthController
from qaroma.method.attach import attach
from qaroma.method.growth import GrowthSettings
from qaroma.model.base import load_base
from qaroma.tasks.causal_lm import CausalLM

TASK = CausalLM()


def batch(rows: int = 3, length: int = 40):
    generator = torch.Generator().manual_seed(5)
    examples = []
    for row in range(rows):
        ids = torch.randint(3, 500, (length - row,), generator=generator).tolist()
        examples.append(Example(ids, [-100] * 4 + ids[4:]))
    return TASK.collate(examples)


def trained(folder, level: int, dtype=torch.float32, dropout: float = 0.0, targets="all-linear"):
    """A model at a level with a component that is not zero; gradients are accumulated, not applied."""
    model = load_base(folder, quantization="nf4", compute_dtype=dtype, device="cpu")
    adapter = attach(model, targets, inner_rank=2, alpha=4.0, dropout=dropout)
    settings = GrowthSettings(t_in=5, check_every=2, warmup=1, restart_warmup=1, eps_out=1e-9)
    controller = GrowthController(adapter, settings, learning_rate=1e-2, total_steps=100)
    for _, layer in adapter.active_layers():
        torch.nn.init.normal_(layer.active_B, std=0.1, generator=torch.Generator().manual_seed(1))
    adapter.refresh()
    apply_level(model, level)
    return model.train(), controller


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that do not divide the sequence."""
    monkeypatch.setattr(levels_module, "tile_tokenwise", partial(tiled_module.tile_tokenwise, tile=37 * 64))


@pytest.mark.parametrize("targets", ["all-linear", ["gate_proj", "up_proj", "down_proj"]], ids=["all", "mlp"])
@pytest.mark.parametrize("level", [1, 2])
def test_levels_without_a_packed_head_change_no_gradient(tiny_folder, level: int, targets) -> None:
    results = {}
    for chosen in (0, level):
        model, controller = trained(tiny_folder, chosen, targets=targets)
        loss, count = TASK.loss(model, batch())
        (loss / count).backward()
        results[chosen] = (loss.item(), controller.trainer.optimiser.gradients.clone())
    assert results[0][1].norm() > 0
    assert results[level][0] == pytest.approx(results[0][0], rel=1e-6)
    torch.testing.assert_close(results[level][1], results[0][1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_step_adds_whole_micro_batches(tiny_folder, level: int) -> None:
    """To the bit, so that several processes can add theirs: no part of one is added to what another has left."""
    model, controller = trained(tiny_folder, level)
    gradients = controller.trainer.optimiser.gradients

    def passed(rows: int) -> torch.Tensor:
        TASK.loss(model, batch(rows))[0].backward()
        return gradients.clone()

    each = []
    for rows in (3, 2):
        each.append(passed(rows))
        gradients.zero_()
    passed(3)
    assert torch.equal(passed(2), each[0] + each[1])


def test_dropout_is_the_same_when_a_layer_is_recomputed(tiny_folder) -> None:
    gradients = []
    for level in (0, 1):
        model, controller = trained(tiny_folder, level, dropout=0.3)
        torch.manual_seed(11)
        loss, count = TASK.loss(model, batch())
        (loss / count).backward()
        gradients.append(controller.trainer.optimiser.gradients.clone())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_a_tile_is_computed_again_with_the_dropout_of_its_first_time(tiny_folder) -> None:
    """Along its gradient the loss changes as that says; and what the rest of a step draws does not depend on it."""
    model, controller = trained(tiny_folder, 2, dropout=0.3, targets=["down_proj"])
    adapter = controller.adapter
    parameters = [layer.active_B for _, layer in adapter.active_layers()]

    def loss_at(move: float) -> torch.Tensor:
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(move * direction)
        adapter.refresh()
        torch.manual_seed(11)
        return TASK.loss(model, batch())[0]

    directions = [torch.zeros_like(parameter) for parameter in parameters]
    loss = loss_at(0.0)
    drawn = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), drawn)
    directions = [parameter.grad.clone() for parameter in parameters]
    slope = sum(direction.square().sum().item() for direction in directions)
    step = 1.0 / slope
    after, before = loss_at(step).item(), loss_at(-2 * step).item()
    assert (after - before) / (2 * step) == pytest.approx(slope, rel=0.02)


def test_what_a_card_has_to_spare_leaves_room_for_what_lies_between_tensors(monkeypatch) -> None:
    """On a card of 6 GiB two weights that were kept took it, and a step that was planned to fit did not."""
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2 * gib, 8 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 5 * gib)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 4 * gib)
    for share, spare in ((1.0, 3 * gib), (0.75, 2 * gib)):
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _, share=share: share)
        assert tiled_module.spare_bytes(torch.device("cuda")) == spare - gib // 4
    assert tiled_module.spare_bytes(torch.device("cpu")) == 0


def test_weights_kept_dense_for_a_pass_change_no_bit_and_are_unpacked_once(tiny_folder, monkeypatch) -> None:
    seen = []
    for spare in (0, 2**40):
        monkeypatch.setattr(tiled_module, "spare_bytes", lambda _, spare=spare: spare)
        model, controller = trained(tiny_folder, 2, targets=["gate_proj", "up_proj", "down_proj"])
        with Unpacked() as counted:
            loss, _ = TASK.loss(model, batch())
            loss.backward()
        assert not any(hasattr(parameter, "kept_dense") for parameter in model.parameters())
        seen.append((loss.item(), controller.trainer.optimiser.gradients.clone(), counted.count))
    (loss, gradients, often), (same_loss, same_gradients, once) = seen
    assert loss == same_loss
    assert torch.equal(gradients, same_gradients)
    layers, weights, tiles, attention = 2, 3, 4, 4
    assert often == layers * weights * tiles * 3 + attention  # forward, forward again, backward
    assert once == layers * weights * 2 + attention


def test_a_pass_that_finds_no_memory_keeps_no_weight(tiny_folder, monkeypatch) -> None:
    monkeypatch.setattr(tiled_module, "spare_bytes", lambda _: 2**40)
    model, _ = trained(tiny_folder, 2)
    monkeypatch.setattr(model.model.layers[1].mlp.act_fn, "forward", Mock(side_effect=torch.OutOfMemoryError))
    with pytest.raises(torch.OutOfMemoryError) as held:
        TASK.loss(model, batch())
    assert not any(hasattr(parameter, "kept_dense") for parameter in model.parameters()), held


def test_level_3_is_the_model_with_a_4_bit_head(tiny_folder) -> None:
    """Its loss is that of a dense model whose head holds the dequantised values."""
    from qaroma.method.dequantise import dense_weight

    model, _ = trained(tiny_folder, 3)
    loss, _ = TASK.loss(model, batch())
    head = model.get_output_embeddings()
    assert head.weight.dtype == torch.uint8
    twin, _ = trained(tiny_folder, 0)
    twin.set_output_embeddings(torch.nn.Linear(64, 512, bias=False))
    twin.get_output_embeddings().weight.data = dense_weight(head, torch.float32).clone()
    expected, _ = TASK.loss(twin, batch())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    plain, _ = TASK.loss(trained(tiny_folder, 0)[0], batch())
    assert loss.item() != pytest.approx(plain.item(), rel=1e-6)  # it costs something


def test_the_embedding_lies_on_the_host_only_where_the_head_does_not_share_it(tiny_folder, tmp_path) -> None:
    from transformers import LlamaForCausalLM

    LlamaForCausalLM(tiny_config(tie_word_embeddings=False)).save_pretrained(tmp_path / "untied")
    assert not isinstance(trained(tiny_folder, 2)[0].get_input_embeddings(), HostEmbedding)
    for folder, level in ((tiny_folder, 3), (tmp_path / "untied", 2)):
        model, _ = trained(folder, level)
        assert isinstance(model.get_input_embeddings(), HostEmbedding)
        loss, _ = TASK.loss(model, batch())
        loss.backward()


def test_a_checkpointed_tiled_mlp_runs_forward_twice_not_three_times(tiny_folder) -> None:
    model, _ = trained(tiny_folder, 2)
    rows = []
    for layer in model.model.layers:
        layer.mlp.up_proj.register_forward_hook(lambda module, args, out: rows.append(args[0].shape[0]))
    loss, count = TASK.loss(model, batch())
    forward = sum(rows)
    (loss / count).backward()
    assert forward == 2 * 3 * 40
    assert sum(rows) == 2 * forward


def test_losses_agree_over_fifty_steps(tiny_folder) -> None:
    """fp32, same seed, growth included: every technique on and off.

    Tiles add up in another order. Training makes of that what it will: five seeds part after 21 to 46 steps.
    """
    curves = []
    for level in (0, 1, 2):
        model, controller = trained(tiny_folder, level)
        curve = []
        for _ in range(50):
            loss, count = TASK.loss(model, batch(2, 30))
            (loss / count).backward()
            controller.step()
            curve.append(loss.item() / count)
        curves.append(curve)
    assert curves[0][-1] < curves[0][0] - 0.1
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert curves[2][:20] == pytest.approx(curves[0][:20], rel=1e-4)
    assert curves[2] == pytest.approx(curves[0], rel=0.02)


def test_levels_only_ever_save_more() -> None:
    switches = [[v for v in vars(level).values() if isinstance(v, bool)] for level in LEVELS]
    for fewer, more in itertools.pairwise(switches):
        assert all(b or not a for a, b in zip(fewer, more, strict=True))
        assert sum(more) > sum(fewer)
