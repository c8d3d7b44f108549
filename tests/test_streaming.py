"""The base streamed from host memory: the numbers of a resident one, in every place where a weight is read."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_config
from model_bases import write_gguf
from test_engine_memory import TASK, batch
from test_training import QUIET, make_config, records

from qaroma.config.schema import Config
from qaroma.data.forms import Message
from qaroma.engine.levels import apply_level
from qaroma.engine.placement import HostEmbedding
from qaroma.engine.streaming import LayerStream, bytes_of_layers
from qaroma.errors import QaromaError
from qaroma.inference import open as open_module
from qaroma.inference.generate import generate
from qaroma.inference.open import open_base
from qaroma.inference.room import has_room
from qaroma.method import lowrank
from qaroma.method.aroma import GrowthController
from qaroma.method.attach import attach
from qaroma.method.growth import GrowthSettings
from qaroma.model import gguf
from qaroma.model.base import load_base
from qaroma.model.devices import matrix_to_host, move_all_but_layers
from qaroma.model.found import find_model
from qaroma.model.layers import decoder_layers, layer_matrices
from qaroma.plan.card import RESERVE
from qaroma.plan.weightless_model import base_bytes, tensors_of
from qaroma.training import fit as fit_module
from qaroma.training import memory
from qaroma.training.finetune import finetune

LAYERS = 5


def saved(folder: Path, name: str = "llama", **changes: Any) -> Path:
    """A random model of a family, on disk."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = tiny_config(**changes) if name == "llama" else AutoConfig.for_model(name, **changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def trained(
    folder: Path,
    level: int,
    targets: Any = "all-linear",
    *,
    quantization: str = "nf4",
    early: bool = False,
    **loading: Any,
) -> tuple[list[float], dict[str, torch.Tensor], Any]:
    """Losses and factors of some steps of the paper's growth, which reads the weights at its checks too."""
    model = load_base(folder, quantization=quantization, compute_dtype=torch.float32, device="cpu", **loading)
    if early:
        apply_level(model, level)
    adapter = attach(model, targets, inner_rank=2)
    settings = GrowthSettings(t_in=3, check_every=1, warmup=1, restart_warmup=1, eps_out=1e-9)
    method = GrowthController(adapter, settings, learning_rate=1e-2, total_steps=100)
    apply_level(model, level)
    model.train()
    losses = []
    for _ in range(4):
        loss, count = TASK.loss(model, batch(2, 24))
        (loss / count).backward()
        method.step()
        losses.append(loss.item())
    assert max(adapter.ranks().values()) > 2  # it grew
    return losses, {f"{name}.{i}": f for name, pair in adapter.factors().items() for i, f in enumerate(pair)}, model


def assert_the_same(folder: Path, targets: Any = "all-linear", **options: Any) -> Any:
    """Level 4 gives the bits of level 3; returns the streamed model."""
    losses, factors, _ = trained(folder, 3, targets, **options)
    streamed_losses, streamed_factors, model = trained(folder, 4, targets, **options)
    assert streamed_losses == losses
    assert all(torch.equal(streamed_factors[name], factor) for name, factor in factors.items())
    return model


@pytest.mark.parametrize(
    ("targets", "quantization", "early"),
    [("all-linear", "nf4", True), (["q_proj", "down_proj"], "nf4", False), (["v_proj"], "none", True)],
)
def test_a_streamed_base_gives_the_bits_of_a_resident_one(
    tmp_path: Path, targets: Any, quantization: str, early: bool
) -> None:
    """Whatever is adapted, before the level is entered or after it; layers of an odd number."""
    folder = saved(tmp_path, num_hidden_layers=LAYERS)
    assert_the_same(folder, targets, quantization=quantization, early=early)


def test_layers_that_differ_in_size_and_fused_experts_are_streamed(tmp_path: Path) -> None:
    """Every second layer is a mixture of experts, whose fused weights stay dense."""
    folder = saved(
        tmp_path, "qwen3_moe", vocab_size=512, hidden_size=64, intermediate_size=96, moe_intermediate_size=32,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=4,
        num_experts_per_tok=2, decoder_sparse_step=2, tie_word_embeddings=True,
    )  # fmt: skip
    stream = assert_the_same(folder, ["q_proj", "o_proj"]).layer_stream
    small, large = (buffer.nbytes for buffer in stream.buffers)
    assert 0 < small < large
    assert stream.bytes == 2 * (small + large)


def test_a_classifier_is_streamed(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.for_model(
        "bert", vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    ids = torch.randint(3, 500, (2, 24))
    gradients = []
    for level in (2, 4):
        torch.manual_seed(1)  # of the head and of dropout
        model: Any = load_base(tmp_path, compute_dtype=torch.float32, device="cpu", num_labels=2)
        apply_level(model, level)
        adapter = attach(model, ["query", "output.dense"], inner_rank=2)
        method = GrowthController(adapter, GrowthSettings(t_in=200), learning_rate=1e-2, total_steps=10)
        model.train()(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
        gradients.append(method.trainer.optimiser.gradients.clone())
    assert model.layer_stream.bytes > 0
    assert gradients[0].norm() > 0
    assert torch.equal(gradients[0], gradients[1])


def test_a_step_fetches_each_layer_twice_but_for_the_two_at_each_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, model = trained(saved(tmp_path, num_hidden_layers=LAYERS), 4)
    order: list[str] = []
    fill, read = LayerStream._fill, lowrank.dense_weight

    def filled(self: LayerStream, buffer: torch.Tensor, layer: int) -> None:
        order.append(f"copy {layer}")
        fill(self, buffer, layer)

    def dense(module: Any, dtype: torch.dtype) -> torch.Tensor:
        weight = read(module, dtype)
        order.append(f"run {model.layer_stream._now}")
        return weight

    monkeypatch.setattr(LayerStream, "_fill", filled)
    monkeypatch.setattr(lowrank, "dense_weight", dense)
    loss, _ = TASK.loss(model, batch(2, 24))
    loss.backward()
    assert [event for event, _ in itertools.groupby(order)] == [
        "run 0", "copy 2", "run 1", "copy 3", "run 2", "copy 4", "run 3", "run 4",
        "copy 2", "run 3", "copy 1", "run 2", "copy 0", "run 1", "run 0",
    ]  # fmt: skip


def test_runs_that_stream_leave_the_bytes_of_one_that_does_not(
    tmp_path: Path, data_file: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default growth: resident; streamed, stopped and resumed; and out of memory at level 3 in mid-run."""
    folder = saved(tmp_path / "base", num_hidden_layers=3, tie_word_embeddings=False)
    tokenizer.save_pretrained(folder)

    def config(name: str, memory: str) -> Any:
        return make_config(
            folder, data_file, tmp_path / name, growth={"start_rank": 1, "max_rank": 4}, training__memory=memory,
            training__micro_batch=1, training__grad_accum=2, training__max_steps=8, training__evaluate_every=8,
            evaluation__prompts=["What is it?"], evaluation__max_new_tokens=4,
        )  # fmt: skip

    def left(name: str) -> tuple[list[Any], bytes]:
        lines = [line.get("loss") or line for line in records(tmp_path / name) + records(tmp_path / name, "samples")]
        return lines, (tmp_path / name / "adapter_last" / "adapter_model.safetensors").read_bytes()

    assert finetune(config("resident", "3"), console=QUIET)["growth_events"] > 0
    accumulate = fit_module.accumulate

    def disturb(disturbance: Callable[[], None]) -> list[int]:
        """Let something happen in the fifth step of the next run; the levels of all steps."""
        levels: list[int] = []

        def disturbed(session: Any, batches: Any, *_: Any) -> Any:
            levels.append(session.level)
            if len(levels) == 5:
                disturbance()
            return accumulate(session, batches)

        monkeypatch.setattr(fit_module, "accumulate", disturbed)
        return levels

    levels = disturb(lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        finetune(config("streamed", "4"), console=QUIET)
    finetune(config("streamed", "4"), resume=True, console=QUIET)
    assert set(levels) == {4}
    assert left("streamed") == left("resident")
    levels = disturb(out_of_memory)
    finetune(config("relieved", "3"), console=QUIET)
    assert set(levels) == {3, 4}
    assert left("relieved") == left("resident")


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_layers_that_the_host_cannot_hold_stay_on_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = load_base(saved(tmp_path), device="cpu")
    needed = bytes_of_layers(model)
    session: Any = SimpleNamespace(
        model=model, level=3, plan=SimpleNamespace(micro_batch=1), config=Config(),
        accelerator=SimpleNamespace(device=torch.device("cuda")),
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed - 1)
    with pytest.raises(QaromaError, match=r"free host memory do not hold the .* of layers that level 4 keeps"):
        memory.relieve(session)
    assert session.level == 3
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed)
    assert "level 4" in memory.relieve(session)
    assert model.layer_stream.bytes == needed


def test_what_has_no_room_on_a_card_is_streamed_to_answer(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved(tmp_path, num_hidden_layers=LAYERS, tie_word_embeddings=False)
    tokenizer.save_pretrained(folder)
    found, card = find_model(folder), torch.device("cuda")
    size = base_bytes(found.config)
    assert size == sum(tensor.nbytes for tensor in tensors_of(load_base(folder, device="cpu")))
    for free, room in ((size + RESERVE + 1, True), (size + RESERVE, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        assert has_room(found, card, dtype=torch.bfloat16) == room
    answers = []
    for room in (True, False):
        monkeypatch.setattr(open_module, "has_room", lambda *_, room=room, **__: room)
        tuned = open_base(str(folder), device="cpu")
        conversations = [[Message("user", "the sea")], [Message("user", "count one")]]
        answers.append(generate(tuned.model, tokenizer, tuned.template, conversations, max_new_tokens=4))
    assert "copied from host memory for every token" in caplog.text
    assert isinstance(tuned.model.get_input_embeddings(), HostEmbedding)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("form", ["stored in 4 bits", "gguf", "gguf by transformers' reader"])
def test_every_form_of_a_base_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    from transformers import AutoModelForCausalLM

    path = saved(tmp_path / "plain")
    if form == "stored in 4 bits":
        load_base(path, device="cpu").save_pretrained(tmp_path / "packed")
        path = tmp_path / "packed"
    else:
        model = AutoModelForCausalLM.from_pretrained(path)
        path = tmp_path / "tiny.gguf"
        write_gguf(path, model)
        if form != "gguf":
            monkeypatch.setattr(gguf, "lazy_state_dict", lambda *_: None)
    logits = []
    for level in (3, 4):
        model = load_base(path, compute_dtype=torch.float32, device="cpu", host_layers=level == 4)
        apply_level(model, level)
        logits.append(model(torch.arange(24).view(2, 12)).logits)
    assert model.layer_stream.bytes > 0
    assert torch.equal(logits[0], logits[1])


def test_matrices_of_layers_stay_on_the_host_while_the_rest_goes_to_the_device(tmp_path: Path) -> None:
    """The device is torch's ``meta`` here: what went to it has lost its values, what stayed has them."""
    model = load_base(saved(tmp_path), device="cpu")
    kept = {id(getattr(*place)) for layer in decoder_layers(model) for place in layer_matrices(layer)}
    move_all_but_layers(model, torch.device("meta"))
    assert {p.device.type for p in model.parameters() if id(p) in kept} == {"cpu"}
    assert {p.device.type for p in model.parameters() if id(p) not in kept} == {"meta"}
    norm, projection = model.model.layers[0].input_layernorm, model.model.layers[0].mlp.up_proj
    before = projection.weight
    matrix_to_host(norm, "weight")
    matrix_to_host(projection, "weight")
    assert norm.weight.is_meta  # a vector
    assert torch.equal(projection.weight, before)
    assert type(projection.weight) is type(before)
    assert projection.weight.quant_state is before.quant_state


def test_peft_is_not_measured_beside_a_streamed_base() -> None:
    from qaroma.bench.bench import BenchSize, bench

    with pytest.raises(QaromaError, match="--memory 3"):
        bench("smollm2-135m", BenchSize(level=4), against="peft", device="cpu")
