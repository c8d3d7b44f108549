"""What a run decides for itself."""

from __future__ import annotations

import re

import pytest
from pydantic import ValidationError

from qaroma.config.decisions import DataFacts
from qaroma.config.growth_presets import CRITERIA
from qaroma.config.growth_settings import growth_settings
from qaroma.config.presets import resolve
from qaroma.config.resolved import (
    BudgetGrowthSection,
    GrowingSection,
    MeasuredGrowthSection,
    ResolvedConfig,
    ResolvedGrowthSection,
)
from qaroma.config.schema import Config
from qaroma.errors import QaromaError


def named(settings: dict) -> Config:
    return Config.model_validate({"model": {"name": "m"}, **settings})


LOOPS = {"schedule": "lockstep"}


def decided(rows: int, lengths=(100,), limit: int | None = 4096, **settings) -> tuple[ResolvedConfig, dict[str, str]]:
    config, decisions = resolve(named(settings), DataFacts(rows, list(lengths), limit))
    return config, {d.key: d.reason for d in decisions}


@pytest.mark.parametrize("rows", [5, 23, 100, 1000, 50_000, 2_000_000])
def test_inner_loops_always_leave_room_to_grow(rows: int) -> None:
    config, reasons = decided(rows, growth=LOOPS)
    growth, steps = growth_settings(config.growth), config.training.max_steps
    assert steps >= 2 * growth.t_in
    assert growth.t_in <= 1000
    assert growth.restart_warmup < growth.t_in
    assert growth.t_in // growth.check_every >= 2
    assert 1e-4 <= config.training.learning_rate <= 1e-2
    assert all(reasons[key] for key in ("growth.t_in", "training.learning_rate", "training.max_steps"))


def test_a_thousand_rows_are_some_hundred_steps() -> None:
    config, _ = decided(1000, training={"micro_batch": 4, "grad_accum": 8})
    assert config.training.max_steps == 94  # 3 epochs of 1,000 rows, 32 a step


def test_paper_is_the_published_table() -> None:
    config, _ = decided(170_000, growth={"preset": "paper"})
    growth = config.growth
    assert (growth.inner_rank, growth.alpha, growth.t_in, growth.check_every) == (1, 2.0, 1000, 10)
    assert (growth.eps_in, growth.eps_out, growth.dropout, growth.min_lr_ratio) == (0.1, 1e-3, 0.1, 0.1)
    assert (growth.warmup, growth.restart_warmup, growth.reset, growth.max_update) == (100, 50, "prune", None)
    assert growth.target_modules == ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    assert (config.training.learning_rate, config.training.max_steps) == (1e-4, 100_000)
    config, _ = decided(170_000, growth={"preset": "paper", "inner_rank": 8})
    assert (config.growth.alpha, config.growth.t_in, config.growth.eps_out) == (16.0, 2000, 1e-2)
    assert config.training.max_steps == 80_000


def test_what_the_user_gave_is_never_changed() -> None:
    given = {"growth": {"t_in": 7, "warmup": 2, "eps_out": 0.5}, "training": {"learning_rate": 3e-4, "max_steps": 11}}
    config, reasons = decided(1000, **given)
    assert (config.growth.t_in, config.growth.warmup, config.growth.eps_out) == (7, 2, 0.5)
    assert (config.training.learning_rate, config.training.max_steps) == (3e-4, 11)
    assert not {"growth.t_in", "growth.warmup", "growth.eps_out", "training.learning_rate"} & set(reasons)


def test_length_follows_the_data_within_the_model() -> None:
    lengths = [50] * 990 + [5000] * 10
    assert decided(1000, lengths)[0].data.max_length == 64
    assert decided(1000, [300] * 10)[0].data.max_length == 320
    assert decided(1000, [5000] * 10)[0].data.max_length == 2048
    assert decided(1000, [5000] * 10, limit=512)[0].data.max_length == 512


def test_epochs_become_steps() -> None:
    assert decided(100, training={"epochs": 2.5})[0].training.max_steps == 18  # 7 steps an epoch


def test_settings_that_contradict_each_other_are_a_clear_error() -> None:
    with pytest.raises(QaromaError, match=r"t_in = 10 steps must be longer than its warm-ups.*change growth\.t_in"):
        decided(1000, growth={"t_in": 10, "warmup": 20})


@pytest.mark.parametrize("method", ["lora", "peft-lora", "adalora"])
def test_methods_of_fixed_rank_share_one_rule_and_need_no_growth(method: str) -> None:
    config, reasons = decided(1000, method=method, rank=8, growth={"preset": "paper"})
    assert config.growth.alpha == 16.0
    assert config.training.learning_rate == 2e-4
    assert config.training.head_learning_rate is None
    assert config.training.max_steps == 188  # of the data, not the paper's 100,000
    assert "growth.t_in" not in reasons
    classifier, _ = decided(1000, method=method, rank=8, task="classification", training={"learning_rate": 5e-4})
    assert classifier.training.head_learning_rate == 5e-4


@pytest.mark.parametrize("growth", [{}, {"schedule": "lockstep"}, {"preset": "paper"}], ids=str)
@pytest.mark.parametrize("task", ["causal-lm", "classification"])
def test_reasons_are_words_and_no_citations(growth: dict, task: str) -> None:
    _, reasons = decided(1000, task=task, growth=growth)
    assert reasons
    assert not [reason for reason in reasons.values() if re.search(r"\bpaper\b|\beq\.|Algorithm|\bNone\b", reason)]


@pytest.mark.parametrize("preset", ["auto", "paper"])
def test_relora_is_the_same_growth_without_criteria(preset: str) -> None:
    relora, reasons = decided(1000, method="relora", growth={"preset": preset})
    aroma, _ = decided(1000, growth={"preset": preset, **LOOPS})
    settings = growth_settings(relora.growth)
    assert not settings.criteria
    assert growth_settings(aroma.growth).criteria
    assert not {"growth.eps_in", "growth.eps_out", "growth.check_every", "growth.outer_criterion"} & set(reasons)
    for name in ("t_in", "warmup", "restart_warmup", "reset", "alpha", "dropout", "max_update", "schedule", "init"):
        assert getattr(relora.growth, name) == getattr(aroma.growth, name)
    assert relora.training == aroma.training


def test_paper_for_an_encoder_is_its_table_for_roberta() -> None:
    config, _ = decided(3668, task="classification", growth={"preset": "paper"}, training={"epochs": 10})
    growth = config.growth
    assert (growth.alpha, growth.target_modules, growth.t_in, growth.eps_out) == (4.0, "all-linear", 1000, 5e-3)
    assert (config.training.learning_rate, config.training.head_learning_rate) == (1e-4, 1e-4)
    assert config.training.max_steps == 2300
    assert decided(3668, task="regression", growth={"preset": "paper", "inner_rank": 8})[0].growth.alpha == 32.0


@pytest.mark.parametrize(("given", "head"), [(None, 1e-3), (5e-4, 5e-4), (5e-3, 1e-3)])
def test_a_heads_rate_is_the_adapters_but_no_more_than_a_thousandth(given: float | None, head: float) -> None:
    config, reasons = decided(1000, task="classification", training={"learning_rate": given})
    assert config.training.head_learning_rate == head
    assert reasons["training.head_learning_rate"]
    assert decided(1000)[0].training.head_learning_rate is None  # there is no head


@pytest.mark.parametrize("preset", ["auto", "paper"])
def test_new_choices_are_decided_with_reasons(preset: str) -> None:
    config, reasons = decided(1000, growth={"preset": preset, **LOOPS})
    assert (config.growth.init, config.growth.outer_criterion) == ("kaiming", "weight")
    assert reasons["growth.init"]
    assert reasons["growth.outer_criterion"]


@pytest.mark.parametrize("preset", ["auto", "paper"])
def test_a_share_of_the_update_needs_no_figure_of_the_task(preset: str) -> None:
    bounds = {
        decided(rows, growth={"preset": preset, "outer_criterion": "update"}, training={"learning_rate": rate})[
            0
        ].growth.eps_out
        for rows in (100, 10_000)
        for rate in (1e-4, 1e-2)
    }
    assert bounds == {0.1}


@pytest.mark.parametrize("preset", ["auto", "paper"])
@pytest.mark.parametrize("method", ["aroma", "relora"])
def test_every_choice_of_the_method_can_be_set(preset: str, method: str) -> None:
    choices = {
        "inner_criterion": "product",
        "outer_criterion": "update",
        "init": "gradient",
        "schedule": "independent",
        "on_converged": "keep",
        "reset": "full",
        "check_first": False,
        "max_rank": 12,
        "max_update": 0.5,
        "eps_in": 0.2,
        "eps_out": 0.3,
        "min_lr_ratio": 0.0,
    }
    config, reasons = decided(1000, method=method, growth={"preset": preset, **choices})
    settings = growth_settings(config.growth)
    taken = choices if settings.criteria else {k: v for k, v in choices.items() if f"growth.{k}" not in CRITERIA}
    assert {name: getattr(settings, name) for name in taken} == taken
    assert not {f"growth.{name}" for name in choices} & set(reasons)


def test_a_rank_that_holds_no_component_is_a_clear_error() -> None:
    with pytest.raises(
        QaromaError, match=r"max_rank 4 holds no component of inner_rank 8; type --set growth\.max_rank"
    ):
        decided(1000, growth={"inner_rank": 8, "max_rank": 4})


def test_validation_does_not_take_over_a_short_run() -> None:
    config, _ = resolve(named({"training": {"max_steps": 20}}), DataFacts(2000, [100], 4096, 112))
    assert config.training.evaluate_every == 14  # 112 rows forward beside 14 steps of 16 rows, thrice
    config, _ = resolve(named({"training": {"max_steps": 2000}}), DataFacts(2000, [100], 4096, 112))
    assert config.training.evaluate_every == 200


def test_packed_rows_are_fewer_and_longer() -> None:
    facts = DataFacts(950, [100] * 1000, 4096)
    config, _ = resolve(named({"data": {"packing": True}, "training": {"epochs": 4}}), facts)
    assert config.data.max_length == 2048
    assert config.training.max_steps == 4 * 3  # 95,000 tokens are 47 rows: three steps of 16


@pytest.mark.parametrize(
    ("method", "growth", "kind"),
    [
        ("aroma", {}, BudgetGrowthSection),
        ("aroma", LOOPS, MeasuredGrowthSection),
        ("relora", {}, GrowingSection),
        ("lora", {}, ResolvedGrowthSection),
        ("peft-lora", {}, ResolvedGrowthSection),
        ("adalora", {}, ResolvedGrowthSection),
    ],
)
def test_nothing_that_a_method_needs_is_left_open_and_nothing_changes_later(
    method: str, growth: dict, kind: type
) -> None:
    config, _ = decided(1000, method=method, growth=growth)
    assert type(config.growth) is kind
    for section in (config.model, config.data, config.growth, config.training, config.checkpoint):
        needed = [name for name, field in type(section).model_fields.items() if field.is_required()]
        assert needed
        assert all(getattr(section, name) is not None for name in needed)
    with pytest.raises(ValidationError, match="frozen"):
        config.growth.min_lr_ratio = 0.5
    # Written and read again it is what a user could have given, every value filled in.
    assert Config.model_validate(config.model_dump()).model_dump() == config.model_dump()
