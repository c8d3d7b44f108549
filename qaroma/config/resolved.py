"""The settings of a run once they are decided: what it needs is never ``None`` here, and nothing changes any more."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from qaroma.config.schema import (
    CheckpointSection,
    Config,
    DataSection,
    GrowthSection,
    ModelSection,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Share,
    TrainingSection,
)


class ResolvedModelSection(ModelSection):
    """The base, named."""

    model_config = ConfigDict(frozen=True)

    name: str


class ResolvedDataSection(DataSection):
    """The data, with the length that follows from it."""

    model_config = ConfigDict(frozen=True)

    max_length: PositiveInt


class ResolvedGrowthSection(GrowthSection):
    """What every method has; of the rest, a method of fixed rank takes nothing."""

    model_config = ConfigDict(frozen=True)

    target_modules: str | list[str]
    alpha: PositiveFloat
    dropout: Share = Field(lt=1.0)
    warmup: NonNegativeInt
    min_lr_ratio: Share = Field(le=1.0)


class BudgetGrowthSection(ResolvedGrowthSection):
    """What growth within a budget has."""

    inner_rank: Literal[1]
    schedule: Literal["budget"]
    window: PositiveInt | Literal["all"]
    start_rank: PositiveInt
    max_rank: PositiveInt
    measured_rate: bool
    trim: Share = Field(lt=1.0)


class GrowingSection(ResolvedGrowthSection):
    """What every method has that grows by inner loops."""

    inner_rank: PositiveInt
    t_in: PositiveInt
    restart_warmup: NonNegativeInt
    init: Literal["kaiming", "gradient"]
    schedule: Literal["lockstep", "independent"]
    window: PositiveInt | Literal["all"]
    reset: Literal["prune", "full", "none"]


class MeasuredGrowthSection(GrowingSection):
    """What a method has that measures convergence, as AROMA does."""

    check_every: PositiveInt
    eps_in: PositiveFloat
    eps_out: NonNegativeFloat
    inner_criterion: Literal["norm", "product", "fixed"]
    outer_criterion: Literal["weight", "update"]
    on_converged: Literal["discard", "keep"]
    check_first: bool


class ResolvedTrainingSection(TrainingSection):
    """The length of the run and its rate, decided."""

    model_config = ConfigDict(frozen=True)

    learning_rate: PositiveFloat
    optimizer: Literal["adamw", "muon"]
    max_steps: PositiveInt
    evaluate_every: PositiveInt
    patience: NonNegativeInt


class ResolvedCheckpointSection(CheckpointSection):
    """When checkpoints are written, decided."""

    model_config = ConfigDict(frozen=True)

    every: PositiveInt


class ResolvedConfig(Config):
    """One fine-tuning run, every open setting decided (:func:`qaroma.config.presets.resolve`)."""

    model_config = ConfigDict(frozen=True)

    @property
    def component_rank(self) -> int:
        """Rank r of one component where ranks grow, or the configured one."""
        grows = isinstance(self.growth, (BudgetGrowthSection, GrowingSection))
        return self.growth.inner_rank or 1 if grows else self.rank

    @property
    def largest_training_rank(self) -> int:
        """The most rank of a module that can train at one time, which memory is planned for."""
        return self.growth.max_rank if isinstance(self.growth, BudgetGrowthSection) else self.component_rank

    model: ResolvedModelSection
    data: ResolvedDataSection
    growth: ResolvedGrowthSection
    training: ResolvedTrainingSection
    checkpoint: ResolvedCheckpointSection
