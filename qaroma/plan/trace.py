"""One real training step on tensors without memory, and what is alive while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qaroma.config.levels import LEVELS
from qaroma.engine.levels import apply_level
from qaroma.engine.loss import LMHead, linear_cross_entropy
from qaroma.errors import QaromaError
from qaroma.method.aroma import GrowthController
from qaroma.method.attach import attach
from qaroma.method.growth import GrowthSettings
from qaroma.method.head import backbone
from qaroma.method.pieces import Pieces, every_piece
from qaroma.model.attention import repeat_keys
from qaroma.model.documents import keep_documents_apart
from qaroma.model.norms import use_torchs_norms
from qaroma.plan.counter import WORKSPACE, LiveStorages, Peak
from qaroma.plan.weightless import KnownShapes, weightless
from qaroma.plan.weightless_model import materialise, tensors_of, weightless_model
from qaroma.plan.work import Work
from qaroma.plan.workspaces import FIXED
from qaroma.tasks.causal_lm import TokenBatch, trained_states


@dataclass(frozen=True)
class StepSettings:
    """What decides the memory of a step, apart from the model.

    Attributes:
        level: memory level, index into :data:`qaroma.config.levels.LEVELS`.
        seq_len, micro_batch: tokens of a sequence, all of them trained, and examples.
        sequences: of one example; a preference has two.
        inner_rank, frozen_rank: of the component that trains, and of the frozen ones, in every layer.
        optimizer: of the adapter; AdamW takes the more.
        targets: layers that have an adapter.
        quantized, double_quantization: whether linear layers lie in 4 bits, and their constants in 8.
        dtype: compute dtype.
        repeated_keys: whether key heads are repeated for attention (:mod:`qaroma.model.attention`).
        one_by_one: whether rows are packed, and attention reads one sequence of them after the other
            (:mod:`qaroma.model.documents`); in one kernel they take what a row of one sequence does.
        card: whether it runs on a card: norms are torch's (:mod:`qaroma.model.norms`), and kernels take room inside
            themselves (:mod:`qaroma.plan.workspaces`).
    """

    level: int
    seq_len: int
    micro_batch: int = 1
    sequences: int = 1
    inner_rank: int = 1
    frozen_rank: int = 16
    optimizer: str = "adamw"
    targets: str | tuple[str, ...] = "all-linear"
    quantized: bool = True
    double_quantization: bool = True
    dtype: torch.dtype = torch.bfloat16
    repeated_keys: bool = False
    one_by_one: bool = False
    card: bool = True


@dataclass(frozen=True)
class Trace:
    """What a step took, in bytes.

    Attributes:
        resident: on the device between steps.
        peaks: the most on the device in each phase: ``setup`` (adapter and optimiser are made),
            ``forward``, ``loss``, ``backward``, ``update``. Loading the base is no part of it.
        host: the most in host memory.
        streamed: of which the layers' weights wait there.
        parked: of which the layers' inputs wait there, without what torch rounds up.
        work: of each phase of the step itself, from ``forward`` on.
    """

    resident: int
    peaks: dict[str, Peak]
    host: int
    streamed: int = 0
    parked: int = 0
    work: dict[str, Work] = field(default_factory=dict)

    @property
    def peak(self) -> Peak:
        return max(self.peaks.values(), key=lambda peak: peak.bytes)


class WeightlessTraining:
    """A model without contents that is set up for training, whose steps of any length are counted one by one.

    Args:
        config: transformers' configuration of a causal language model.
        settings: of the steps; their length and number of sequences do not matter yet.
        shapes: of traces before, which make these faster.

    Raises:
        QaromaError: a model whose step depends on values, which weightless tensors do not have.
    """

    def __init__(self, config: Any, settings: StepSettings, shapes: KnownShapes | None = None) -> None:
        s = settings
        head = LEVELS[s.level].packed_head
        self._model = model = weightless_model(
            config, dtype=s.dtype, packed=s.quantized, double=s.double_quantization, packed_head=head
        )
        if s.repeated_keys:
            repeat_keys(model)
        if s.card:
            use_torchs_norms(model)
        if s.one_by_one:
            keep_documents_apart(model)
        self._counter = counter = LiveStorages(shapes or KnownShapes(), card=s.card)
        with self._counting():
            counter.phase("load", "base")
            counter.device.add(WORKSPACE, FIXED if s.card else 0)
            materialise(model)
            self._method = _set_up(model, settings, counter, counter.few_pieces)
            self._resident = counter.device.now

    def trace(self, settings: StepSettings) -> Trace:
        """Run one step and count.

        Args:
            settings: of the step, otherwise those that the model was set up for.

        Raises:
            QaromaError: see above.
        """
        model, counter = self._model, self._counter
        apply_level(model, settings.level, host=counter, pieces=counter.few_pieces)  # with no inputs parked on the host
        counter.forget_phases(but=("load", "setup"))
        with self._counting(), _booked_by_place(model, counter):
            _step(model, self._method, settings, counter, counter.few_pieces)
        peaks = {phase: peak for phase, peak in counter.device.peaks.items() if phase != "load"}
        stream = getattr(model, "layer_stream", None)
        work = {
            phase: Work(counter.kernels[phase], counter.sent[phase], counter.fetched[phase])
            for phase in peaks
            if phase != "setup"
        }
        streamed = stream.bytes if stream else 0
        return Trace(self._resident, peaks, counter.host.peak.bytes, streamed, counter.parked, work)

    @contextmanager
    def _counting(self) -> Iterator[None]:
        try:
            with weightless(), self._counter:
                yield
        except (NotImplementedError, RuntimeError) as error:
            raise QaromaError(
                f"{type(self._model).__name__} cannot be planned: its training step needs more than shapes "
                f"({str(error).splitlines()[0]}). Type, to measure instead: qaroma finetune --max-steps 3"
            ) from error


def trace_step(config: Any, settings: StepSettings, shapes: KnownShapes | None = None) -> Trace:
    """Set a model up on weightless tensors and count one step; see :class:`WeightlessTraining`."""
    return WeightlessTraining(config, settings, shapes).trace(settings)


def count_step(model: Any, settings: StepSettings, counter: LiveStorages, pieces: Pieces = every_piece) -> int:
    """Set a base model up for training as ``finetune`` does, and run one step under a counter.

    Args:
        model: as :func:`qaroma.load_base` returns it, on real tensors or on weightless ones, known to the
            counter under "base".
        settings: of the step.
        counter: entered.
        pieces: which tiles and chunks are computed.

    Returns:
        Bytes that are on the device between steps.
    """
    method = _set_up(model, settings, counter, pieces)
    resident = counter.device.now
    with _booked_by_place(model, counter):
        _step(model, method, settings, counter, pieces)
    return resident


def _set_up(model: Any, settings: StepSettings, counter: LiveStorages, pieces: Pieces) -> GrowthController:
    """What ``finetune`` has in memory before a step, some components later."""
    counter.adopt(tensors_of(model.get_output_embeddings()), "head")
    counter.adopt(tensors_of(model.get_input_embeddings()), "embeddings")  # where a table is both, it stands here
    counter.category = "layer_buffers"
    apply_level(model, settings.level, host=counter, pieces=pieces)
    counter.phase("setup", "adapter")
    targets = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
    adapter = attach(model, targets, inner_rank=settings.inner_rank)
    for layer in adapter.layers.values():
        A, B = (layer.A.new_empty(settings.frozen_rank, width) for width in (layer.in_features, layer.out_features))
        layer.load_factors(A, B, [1] * settings.frozen_rank)
    counter.category = "optimiser"
    growth = GrowthSettings(t_in=1000)
    method = GrowthController(
        adapter, growth, learning_rate=1e-4, total_steps=growth.t_in, optimizer=settings.optimizer, pieces=pieces
    )
    counter.adopt((factor for layer in adapter.layers.values() for factor in (layer.A, layer.B)), "adapter")
    stream = getattr(model, "layer_stream", None)
    if stream is not None:  # holds the first two, as the backward pass of the step before leaves them
        for number in (1, 0):
            stream.ask(number)
    model.train()
    return method


def _step(model: Any, method: GrowthController, settings: StepSettings, counter: LiveStorages, pieces: Pieces) -> None:
    """Forward, loss, backward, update: what the loop does between two checks of growth."""
    counter.phase("forward", "checkpoints")
    shape = (settings.micro_batch * settings.sequences, settings.seq_len)
    tokens = torch.zeros(shape, dtype=torch.int64)
    positions = torch.arange(settings.seq_len).expand(shape)  # no bytes depend on where a sequence begins
    lengths = (shape[1] // 2, shape[1] - shape[1] // 2) if settings.one_by_one else (shape[1],)
    batch = TokenBatch(tokens, tokens, positions, (lengths,) * shape[0], torch.arange(1, tokens.numel()))
    loss = _loss(model, batch, pieces)
    counter.phase("backward", "layer")
    (loss / batch.counted).backward()  # type: ignore[no-untyped-call]
    del loss
    counter.phase("update", "optimiser")
    method.step()


def _loss(model: Any, batch: TokenBatch, pieces: Pieces) -> Tensor:
    """As :meth:`qaroma.tasks.causal_lm.CausalLM.loss` computes it."""
    hidden_TD, targets_T = trained_states(model, batch)
    return linear_cross_entropy(hidden_TD, LMHead(model, pieces), targets_T)


@contextmanager
def _booked_by_place(model: Any, counter: LiveStorages) -> Iterator[None]:
    """Tell the counter what the forward pass is doing: a layer, what lies between layers, or the loss."""
    decoder = backbone(model)
    forward = True

    def inside(*_: Any) -> None:
        if forward:  # later, a layer is computed again as a part of the backward pass
            counter.category = "layer"

    def between(_: nn.Module, __: Any, output: Any) -> None:
        if forward:
            counter.category = "checkpoints"
            counter.adopt([output[0] if isinstance(output, tuple) else output], "checkpoints")

    def ended(*_: Any) -> None:
        nonlocal forward
        forward = False
        counter.phase("loss", "logits")

    hooks = [decoder.register_forward_hook(ended)]
    for layer in getattr(decoder, "layers", ()):
        hooks += [layer.register_forward_pre_hook(inside), layer.register_forward_hook(between)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
