"""What a run decides that grows within a budget: ranks from the data, the rate from the weights, patience."""

from __future__ import annotations

import pytest

from qaroma.config.decisions import DataFacts, ModelFacts
from qaroma.config.growth_presets import BLOCK, LARGE_BUDGET, SMALL_BUDGET, TRIM
from qaroma.config.growth_settings import growth_settings
from qaroma.config.presets import BITS_A_TOKEN, resolve, warm_up_notes
from qaroma.config.resolved import BudgetGrowthSection, ResolvedConfig
from qaroma.config.schema import Config
from qaroma.errors import QaromaError
from qaroma.method.budget import BudgetSettings

SMOLLM2 = ModelFacts(component_parameters=317_952, width=576, weight_std=0.19)
LLAMA3_8B = ModelFacts(component_parameters=2_621_440, width=4096, weight_std=0.0165)
ROWS = (100, 1_000, 10_000, 100_000, 1_000_000)
TOKENS_A_ROW = 20


def decided(rows: int, *, model: ModelFacts | None = SMOLLM2, validation: int = 100, tokens: int = TOKENS_A_ROW,
            adapter: str | None = None, **settings) -> tuple[ResolvedConfig, dict[str, str]]:  # fmt: skip
    config = Config.model_validate({"model": {"name": "m", "adapter": adapter}, **settings})
    bits = BITS_A_TOKEN * rows * tokens
    facts = DataFacts(rows, [100], 4096, validation_rows=validation, trained_bits=bits, model=model)
    resolved, decisions = resolve(config, facts)
    return resolved, {d.key: d.reason for d in decisions}


@pytest.mark.parametrize("model", [SMOLLM2, LLAMA3_8B, None], ids=["smollm2", "llama3-8b", "unknown"])
def test_auto_decides_everything_for_any_number_of_rows(model: ModelFacts | None) -> None:
    steps = []
    for rows in ROWS:
        config, reasons = decided(rows, model=model)
        growth = config.growth
        assert isinstance(growth, BudgetGrowthSection)
        assert growth_settings(growth) == BudgetSettings(
            start_rank=growth.start_rank, max_rank=growth.max_rank, warmup=growth.warmup
        )
        assert (growth.schedule, growth.window, growth.inner_rank, growth.measured_rate) == ("budget", "all", 1, True)
        assert 1 <= growth.start_rank <= growth.max_rank <= LARGE_BUDGET
        assert (growth.t_in, growth.eps_out, growth.reset) == (None, None, None)
        assert 1 <= growth.warmup <= 100
        assert 1e-5 < config.training.learning_rate < 2e-2
        assert config.training.patience == (2 if rows == 100 else 3)  # a hundred rows have four validations
        assert all(reasons[key] for key in ("growth.start_rank", "growth.max_rank", "training.learning_rate"))
        print(rows, config.training.max_steps, growth.start_rank, growth.max_rank, config.training.learning_rate)
        steps.append(config.training.max_steps)
    assert steps == sorted(steps)
    assert steps[1:] == [188, 1875, 18750, 187500]


def test_the_rate_falls_with_the_steps_and_with_the_weights_size() -> None:
    rates = [decided(rows)[0].training.learning_rate for rows in ROWS]
    assert rates == sorted(rates, reverse=True)
    large = [decided(rows, model=LLAMA3_8B)[0].training.learning_rate for rows in ROWS]
    assert all(small < rate for small, rate in zip(large, rates, strict=True))


@pytest.mark.parametrize("epochs", [3, 20])
def test_data_that_needs_less_than_a_block_begins_with_a_block(epochs: int) -> None:
    config, reasons = decided(50, tokens=8, training={"epochs": epochs})
    assert (config.growth.start_rank, config.growth.max_rank) == (BLOCK, SMALL_BUDGET)
    assert "1,200 bits" in reasons["growth.start_rank"]


def test_data_that_fills_a_block_begins_with_more() -> None:
    config, reasons = decided(1000, tokens=400, training={"epochs": 3})
    assert (config.growth.start_rank, config.growth.max_rank) == (LARGE_BUDGET // 2, LARGE_BUDGET)
    assert reasons["growth.start_rank"].startswith("rank 30 takes in 1,200,000 bits in 189 steps")
    _, reasons = decided(1000, tokens=400, model=ModelFacts(component_parameters=17_000, width=64, weight_std=0.02))
    assert reasons["growth.start_rank"].startswith("rank 560 takes in")  # no 5.6e+02
    bounded, _ = decided(1000, tokens=400, growth={"max_rank": 12})
    assert (bounded.growth.start_rank, bounded.growth.max_rank) == (6, 12)


def test_a_long_run_has_room_for_all_that_its_data_tells() -> None:
    """A number keeps two bits, however many steps there are to learn them."""
    config, reasons = decided(100_000, tokens=60, training={"epochs": 3})
    assert (config.growth.start_rank, config.growth.max_rank) == (LARGE_BUDGET // 2, LARGE_BUDGET)
    assert reasons["growth.start_rank"].startswith("rank 28 takes in 18,000,000 bits in 18750 steps")
    again, _ = decided(100_000, tokens=60, training={"epochs": 12})
    assert again.growth.start_rank == config.growth.start_rank


def test_where_nobody_counted_a_run_begins_with_a_block() -> None:
    config, _ = resolve(Config.model_validate({"model": {"name": "m"}}), DataFacts(1000, [100], 4096))
    assert (config.growth.start_rank, config.growth.max_rank) == (BLOCK, SMALL_BUDGET)


@pytest.mark.parametrize(
    ("growth", "match"),
    [
        (
            {"schedule": "budget", "t_in": 10},
            r"growth\.t_in is a setting of inner loops.*--set growth\.schedule=lockst",
        ),
        ({"schedule": "budget", "inner_rank": 2}, r"growth\.inner_rank is a setting of inner loops"),
        (
            {"schedule": "lockstep", "start_rank": 4},
            r"growth\.start_rank is a setting of growth within a budget, got gr",
        ),
        (
            {"eps_out": 0.1, "measured_rate": False},
            r"growth\.measured_rate .* because of growth\.eps_out; leave one of",
        ),
        ({"schedule": "lockstep", "trim": 0.1}, r"growth\.trim is a setting of growth within a budget"),
        ({"start_rank": 9, "max_rank": 4}, r"max_rank 4 is less than the 9 that every .*growth\.start_rank=4 or less"),
    ],
)
def test_settings_of_two_kinds_of_growth_are_refused_together(growth: dict, match: str) -> None:
    with pytest.raises(QaromaError, match=match):
        decided(1000, growth=growth)


@pytest.mark.parametrize("given", [{"t_in": 12}, {"reset": "none"}, {"inner_rank": 2}, {"schedule": "independent"}])
def test_a_setting_of_inner_loops_asks_for_them(given: dict) -> None:
    config, _ = decided(1000, growth=given)
    assert config.growth.schedule == given.get("schedule", "lockstep")
    assert config.growth.window == 1
    assert config.growth.t_in is not None


def test_patience_needs_validation_rows_and_a_method_that_grows() -> None:
    config, reasons = decided(1000, validation=15)
    assert config.training.patience == 0
    assert reasons["training.patience"] == "15 validation rows are too few to end a run by"
    assert decided(1000, validation=16)[0].training.patience == 3
    assert decided(1000, growth={"preset": "paper"})[0].training.patience == 0
    assert decided(1000, method="lora")[0].training.patience == 0
    assert decided(1000, training={"patience": 5})[0].training.patience == 5


def test_the_most_rank_that_trains_is_what_memory_is_planned_for() -> None:
    assert decided(1000)[0].largest_training_rank == SMALL_BUDGET
    assert decided(1000, growth={"schedule": "lockstep", "inner_rank": 2})[0].largest_training_rank == 2
    assert decided(1000, method="lora", rank=4)[0].largest_training_rank == 4


def test_a_head_is_trained_at_the_adapters_rate_at_most_a_thousandth() -> None:
    config, _ = decided(100, task="classification")
    assert config.training.learning_rate > 1e-3
    assert config.training.head_learning_rate == 1e-3


def test_a_run_that_never_leaves_its_warm_up_says_so() -> None:
    config, _ = decided(1000, growth={"preset": "paper"}, training={"max_steps": 60})
    assert warm_up_notes(config) == [
        "60 steps never leave the warm-up of 100: the learning rate of 0.0001 is not reached; "
        "type --set growth.warmup=6, or a larger --max-steps"
    ]
    assert warm_up_notes(decided(1000, growth={"preset": "paper"}, training={"max_steps": 100})[0]) == []
    assert all(warm_up_notes(decided(rows)[0]) == [] for rows in ROWS)


def test_tasks_with_labels_neither_measure_their_rate_nor_end_by_patience() -> None:
    facts = DataFacts(1000, [100], 512, validation_rows=200)
    config, _ = resolve(Config.model_validate({"model": {"name": "m"}, "task": "classification"}), facts)
    assert (config.growth.measured_rate, config.training.patience) == (False, 0)
    config, _ = resolve(Config.model_validate({"model": {"name": "m"}}), facts)
    assert (config.growth.measured_rate, config.training.patience) == (True, 2)


def test_an_adapter_that_a_run_goes_on_from_is_not_trimmed() -> None:
    assert decided(1000)[0].growth.trim == TRIM
    config, reasons = decided(1000, adapter="runs/a/adapter")
    assert config.growth.trim == 0
    assert "stays as it is" in reasons["growth.trim"]
    with pytest.raises(QaromaError, match=r"growth\.trim 0\.1 would change the directions of runs/a/adapter"):
        decided(1000, adapter="runs/a/adapter", growth={"trim": 0.1})
