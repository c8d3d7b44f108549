"""From single traces to answers: the peak at full depth, the level that fits, the longest context.

A model's layers are alike, or of a few kinds, so every figure of a phase is a straight line over their numbers:
shallow traces give it for any depth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

from qaroma.config.levels import LEVELS
from qaroma.engine.host import pinned_for
from qaroma.plan.counter import Peak
from qaroma.plan.layers import Sample, as_built, layer_kinds, with_layers
from qaroma.plan.trace import StepSettings, Trace, WeightlessTraining
from qaroma.plan.weightless import KnownShapes
from qaroma.plan.weightless_model import weightless_model
from qaroma.plan.work import Work

GRAIN = 256  # a context is found to so many tokens
LONGEST = 2**18  # beyond it nobody looks
SMALL = 4  # layers, that are all traced


@dataclass(frozen=True)
class Estimate:
    """One step of a model, in bytes.

    Attributes:
        settings: of the step.
        peak, resident: on the device.
        host: the most in host memory.
        breakdown: what the device holds at the peak; sums to ``peak``.
        phases: the peak of each phase of the step.
        streamed: bytes of the layers' weights that wait in host memory.
        work: of each phase.
    """

    settings: StepSettings
    peak: int
    resident: int
    host: int
    breakdown: dict[str, int]
    phases: dict[str, int]
    streamed: int = 0
    work: dict[str, Work] = field(default_factory=dict)

    @property
    def phase(self) -> str:
        """Where the peak is."""
        return max(self.phases, key=lambda name: self.phases[name])


class Planner:
    """Answers about one model. Traces are kept, so that no question costs one twice.

    Args:
        config: transformers' configuration of a causal language model.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self.layers: int = config.get_text_config().num_hidden_layers
        self._traces: dict[tuple[StepSettings, tuple[int, ...]], Trace] = {}
        self._trainings: dict[tuple[StepSettings, tuple[int, ...]], WeightlessTraining] = {}
        self._shapes = KnownShapes()

    @cached_property
    def base(self) -> Any:
        """The model at full depth, in 16 bits and without contents."""
        return weightless_model(self.config, packed=False)

    def estimate(self, settings: StepSettings) -> Estimate:
        """A step's memory, by a few of the layers where the others are like them."""
        if self._sample is None:
            return self.exact(settings)
        traces = [self._trace(settings, layers) for layers in self._sample.models]
        line = self._sample.line
        parked = line([trace.parked for trace in traces])
        deep = Trace(
            line([trace.resident for trace in traces]),
            {phase: _peak([trace.peaks[phase] for trace in traces], line) for phase in traces[0].peaks},
            line([trace.host - pinned_for(trace.parked) for trace in traces]) + pinned_for(parked),
            line([trace.streamed for trace in traces]),
            parked,
            {phase: Work.along([trace.work[phase] for trace in traces], line) for phase in traces[0].work},
        )
        return self._estimate(settings, deep)

    def exact(self, settings: StepSettings) -> Estimate:
        """A step's memory, every layer traced."""
        return self._estimate(settings, self._trace(settings, tuple(range(self.layers))))

    @cached_property
    def _sample(self) -> Sample | None:
        """None where a model with some of the layers has not the same ones, or is not much shallower."""
        if self.layers <= SMALL:
            return None
        kinds, built = layer_kinds(self.config, self.base), as_built(self.base)
        sample = Sample.of(kinds)
        for layers in sample.models:
            model = weightless_model(with_layers(self.config, layers), packed=False)
            if as_built(model) != [built[number] for number in layers]:
                return None
        return sample

    def fastest_level(self, settings: StepSettings, device_bytes: int, host_bytes: int | None) -> int | None:
        """The first level whose step fits: each costs time beside the one before, on every card that is known.

        Args:
            settings: of the step; its own level does not matter.
            device_bytes: that the step may take, :data:`~qaroma.plan.card.RESERVE` already left out on a GPU.
            host_bytes: likewise of the host's memory; None where the device is the host, whose memory
                holds both.

        Returns:
            The level, or None where the smallest does not fit either.
        """
        for level in range(len(LEVELS)):
            found = self.estimate(replace(settings, level=level))
            if host_bytes is None and found.peak + found.host <= device_bytes:
                return level
            if host_bytes is not None and found.peak <= device_bytes and found.host <= host_bytes:
                return level
        return None

    def longest_context(self, settings: StepSettings, device_bytes: int) -> Estimate | None:
        """The longest sequence whose step fits, to :data:`GRAIN` tokens, at most :data:`LONGEST`.

        Args:
            settings: of the step; its own length does not matter.
            device_bytes: that the step may take.

        Returns:
            That step; None where not even ``GRAIN`` tokens fit.
        """
        best = _longest(lambda tokens: self.estimate(replace(settings, seq_len=tokens)).phases, device_bytes)
        return self.estimate(replace(settings, seq_len=best)) if best else None

    def _trace(self, settings: StepSettings, layers: tuple[int, ...]) -> Trace:
        key = (settings, layers)
        if key not in self._traces:
            before = replace(settings, level=self._set_up_as(settings.level), seq_len=0, micro_batch=0, sequences=0)
            if (before, layers) not in self._trainings:
                config = with_layers(self.config, layers)
                self._trainings[before, layers] = WeightlessTraining(config, before, self._shapes)
            self._traces[key] = self._trainings[before, layers].trace(settings)
        return self._traces[key]

    def _set_up_as(self, level: int) -> int:
        """The first level at which all lies where it does at this one, before a step."""
        shared = self.base.get_input_embeddings().weight is self.base.get_output_embeddings().weight
        places = [
            (chosen.packed_head, chosen.host_embeddings and (chosen.packed_head or not shared), chosen.streamed)
            for chosen in LEVELS
        ]
        return places.index(places[level])

    def _estimate(self, settings: StepSettings, trace: Trace) -> Estimate:
        phase = max(trace.peaks, key=lambda name: trace.peaks[name].bytes)
        breakdown = dict(trace.peaks[phase].categories)
        layer = breakdown.pop("layer", 0)
        breakdown["layer_recompute" if LEVELS[settings.level].checkpointing else "activations"] = layer
        phases = {name: peak.bytes for name, peak in trace.peaks.items()}
        return Estimate(
            settings, phases[phase], trace.resident, trace.host, breakdown, phases, trace.streamed, trace.work
        )


def _peak(peaks: Sequence[Peak], line: Callable[[Sequence[int]], int]) -> Peak:
    names = {name: None for peak in peaks for name in peak.categories}
    categories = {name: line([peak.categories.get(name, 0) for peak in peaks]) for name in names}
    return Peak(line([peak.bytes for peak in peaks]), categories)


def _longest(phases: Callable[[int], dict[str, int]], limit: int) -> int:
    """The largest multiple of ``GRAIN`` up to ``LONGEST`` where every phase stays within the limit, or 0.

    The bytes of a phase grow with the tokens, along straight lines that only ever become steeper, or with their
    square, where masks are made. So the line through the last two lengths that fit leads to a guess that is not too
    small; the line from one that fits to one that does not, or the parabola through the last three that fit, to one
    that is not too large. Between them the guess is, at first, the parabola's through the last three lengths of all.
    The search ends when the first is within a hundredth of what fitted, or the second within a two-hundredth.
    """
    fits: list[tuple[int, dict[str, int]]] = []  # ascending
    over: tuple[int, dict[str, int]] = (LONGEST + GRAIN, {})
    guess = 8 * GRAIN
    while True:
        point = (guess, phases(guess))
        if max(point[1].values()) <= limit:
            fits.append(point)
        else:
            over = point
        longest = fits[-1][0] if fits else 0
        if over[0] - longest <= max(GRAIN, longest // 100):
            return longest
        if len(fits) < 2 or (len(fits) == 2 and not over[1]):
            guess = min(4 * guess, (longest + over[0]) // 2) if fits else guess // 2
        else:
            most = _crossing(fits[-2:], limit, over[0])
            least = _crossing([fits[-1], over] if over[1] else fits[-3:], limit, over[0])
            if most - longest < max(GRAIN, longest // 100) or least - longest < max(GRAIN, longest // 200):
                return longest
            bent = _crossing([*fits, over][-3:] if over[1] else fits[-3:], limit, over[0])
            guess = bent if least < bent < most and len(fits) < 4 else (least + most) // 2
        guess = min(max(guess // GRAIN * GRAIN, longest + GRAIN), over[0] - GRAIN)


def _crossing(points: list[tuple[int, dict[str, int]]], limit: int, most: int) -> int:
    """The first length where the line or the parabola of a phase through two or three points reaches the limit, at most
    ``most``."""
    found = float(most)
    lengths = [length for length, _ in points]
    for phase, last in points[-1][1].items():
        sizes = [phases[phase] for _, phases in points]
        slopes = [(b - a) / (y - x) for (x, a), (y, b) in pairwise(zip(lengths, sizes, strict=True))]
        bend = max(0.0, (slopes[-1] - slopes[0]) / (lengths[-1] - lengths[0]))
        slope = slopes[-1] + bend * (lengths[-1] - lengths[-2])
        if slope > 0:
            left = limit - last
            found = min(found, lengths[-1] + 2 * left / (slope + math.sqrt(max(0.0, slope**2 + 4 * bend * left))))
    return int(found)
