"""Every setting of a run, its default and its explanation.

A run is configured by one YAML file and by flags that override it. The classes below are the only
list of what can be set: the loader refuses what they do not name, `--help` prints their
descriptions, and the run directory keeps the resolved result. A value of ``None`` means "decided
from the data, the model or the device", and what was decided is printed with its reason
(see :mod:`qaroma.config.presets`); :mod:`qaroma.config.resolved` holds the same settings once that is done.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from annotated_types import Ge, Gt, Le
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
)
from pydantic_core import PydanticCustomError

from qaroma.config.levels import LEVEL_CHOICES, LEVELS
from qaroma.config.methods import DEFAULT_METHOD, FIXED_RANK, METHODS, MethodName
from qaroma.config.metrics import LabelMetric
from qaroma.config.tasks import PREFERENCE, WRITING, TaskName
from qaroma.text.characters import is_unicode

if TYPE_CHECKING:
    MemoryLevel: TypeAlias = str
else:
    MemoryLevel = Literal[LEVEL_CHOICES]


LARGEST = 10**9
LARGEST_SEED = 2**32 - 1
# Bounds that no run comes near: beyond them numbers overflow, inside torch or sooner.
PositiveInt = Annotated[int, Gt(0), Le(LARGEST)]
NonNegativeInt = Annotated[int, Ge(0), Le(LARGEST)]
PositiveFloat = Annotated[float, Gt(0), Le(LARGEST)]
NonNegativeFloat = Annotated[float, Ge(0), Le(LARGEST)]
# Where a field has an upper bound of its own (of two, pydantic keeps one).
Share = Annotated[float, Ge(0)]
Weight = Annotated[float, Gt(0), Le(1000)]
Seed = Annotated[int, Ge(0), Le(LARGEST_SEED)]


class Section(BaseModel):
    """A section of the configuration: unknown keys are errors, values are validated."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _usable_text(cls, value: object) -> object:
        """No setting is blank, or holds what neither a file nor its name can."""
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and (not text.strip() or "\0" in text or not is_unicode(text)):
                raise PydanticCustomError("text_unusable", "text that is not empty, of characters that a file can hold")
        return value


class ModelSection(Section):
    """The base model and how it is held in memory."""

    name: str | None = Field(
        None, description="Local folder, hub id, or .gguf file of the base model; 'smollm2-135m' is built in."
    )
    adapter: str | None = Field(
        None, description="Folder of a PEFT LoRA adapter of this base, qaroma's or not, to go on growing from."
    )
    quantization: Literal["nf4", "fp4", "none"] = Field("nf4", description="4-bit data type of the base, or none.")
    double_quantization: bool = Field(True, description="Quantise the constants too (0.4 bit a weight less).")
    compute_dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto",
        description="Arithmetic of the base and the adapter; auto is bf16, or on a GPU without it fp16, or fp32 for "
        "families that overflow in fp16 (Gemma 2 and 3).",
    )
    revision: str | None = Field(None, description="Branch, tag or commit on the hub.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model. Never on by itself.")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field("sdpa", description="Attention implementation.")


def _pairs(value: Any) -> Any:
    """KEY=NAME pairs typed on a command line, as a mapping; anything else as it is."""
    if not isinstance(value, str):
        return value
    pairs = [pair.partition("=") for pair in value.split(",")]
    if not all(key.strip() and name.strip() for key, _, name in pairs):
        raise PydanticCustomError("pairs", "KEY=NAME pairs, as prompt=question,completion=answer")
    return {key.strip(): name.strip() for key, _, name in pairs}


class DataSource(Section):
    """One file, folder or hub data set, and its share."""

    path: str = Field(
        description="A .jsonl, .json, .csv, .parquet or .txt file (also .gz), a folder of them, or a hub id."
    )
    weight: Weight = Field(1.0, description="How often its rows appear in an epoch: 2 is twice, 0.5 a random half.")


class DataSection(Section):
    """What is trained on, and how it is rendered."""

    train: list[DataSource] = Field(default_factory=list, description="Training data, one or several sources.")
    validation: str | None = Field(None, description="A file or hub id to validate on, instead of a split.")
    validation_share: Share = Field(
        0.05, le=0.5, description="Share of the training rows set aside for validation (0: none)."
    )
    validation_max: PositiveInt = Field(500, description="At most so many rows are set aside.")
    format: Literal["auto", "alpaca", "completion", "messages", "sharegpt", "text"] = Field(
        "auto", description="Form of the rows; auto recognises it and says which."
    )
    columns: Annotated[dict[str, str], BeforeValidator(_pairs)] = Field(
        default_factory=dict,
        description="Keys of your rows that stand for others, as prompt=question,completion=answer (also system, "
        "context, history, tools, weight, messages, text, chosen, rejected).",
    )
    feedback: Literal["refuse", "good"] = Field(
        "refuse",
        description="Rows that say which answers are good (chosen and rejected, or a label true or false): refuse "
        "them, or train plainly on the good answers alone. Task preference trains on both of chosen and rejected.",
    )
    tools: Literal["template", "text"] = Field(
        "template",
        description="Functions, calls and their results: rendered by the chat template's own means, or as JSON text.",
    )
    template: Literal["auto", "chat", "plain", "none"] = Field(
        "auto",
        description="chat: the tokenizer's own template; plain: qaroma's '### Instruction' one; "
        "none: prompt and completion joined as they are; auto: chat where the tokenizer has one, else plain.",
    )
    train_on: Literal["answer", "all"] = Field("answer", description="Tokens that the loss counts.")
    max_length: PositiveInt | None = Field(None, description="Longest example in tokens; default: follows the data.")
    on_too_long: Literal["drop", "truncate", "error"] = Field("drop", description="What happens to longer examples.")
    packing: bool = Field(False, description="Several short examples in one row of max_length tokens: no padding.")
    skip_bad_rows: bool = Field(False, description="Leave out rows that cannot be read instead of stopping.")


class GrowthSection(Section):
    """AROMA's growth: inner loop, outer loop. What is not given follows the preset."""

    preset: Literal["auto", "paper"] = Field(
        "auto",
        description="auto: settings follow the data's size; paper: the published table (LLaMA3-8B; RoBERTa-base for "
        "tasks with labels).",
    )
    target_modules: str | list[str] | None = Field(
        None, description="all-linear, or names, name suffixes or one regular expression of linear layers."
    )
    inner_rank: PositiveInt | None = Field(
        None, description="Rank r of one component; published: 1, and 8 for hard tasks."
    )
    alpha: PositiveFloat | None = Field(None, description="Scale numerator: the update is alpha / r times B A.")
    t_in: PositiveInt | None = Field(None, description="Longest inner loop, in optimiser steps.")
    check_every: PositiveInt | None = Field(None, description="Steps between two checks of inner convergence.")
    eps_in: PositiveFloat | None = Field(
        None, description="Inner criterion: relative change below which a component has converged."
    )
    eps_out: NonNegativeFloat | None = Field(
        None,
        description="Outer criterion: a component smaller than this share (of what outer_criterion says) ends its "
        "module's growth.",
    )
    inner_criterion: Literal["norm", "product", "fixed"] | None = Field(
        None,
        description="norm: change of the size of BA; product: norm of the change of BA; fixed: none, every inner loop "
        "lasts t_in steps (as in the reference code).",
    )
    outer_criterion: Literal["weight", "update"] | None = Field(
        None,
        description="What eps_out is a share of. weight: the weight with all earlier components; "
        "update: the earlier components alone, which asks for no tuning.",
    )
    init: Literal["kaiming", "gradient"] | None = Field(
        None,
        description="How a component begins. kaiming: random A; gradient: A is the leading right singular "
        "vector of the loss's gradient, from two more backward passes.",
    )
    schedule: Literal["budget", "lockstep", "independent"] | None = Field(
        None,
        description="When components begin. budget: where the loss falls too slowly for the steps that are left; by "
        "inner loops: lockstep, all modules together, or independent, each by itself.",
    )
    window: PositiveInt | Literal["all"] | None = Field(
        None, description="How many of a module's newest components train: 1, more, or all."
    )
    start_rank: PositiveInt | None = Field(
        None, description="Rank that every module begins with (schedule budget); later components add to it."
    )
    measured_rate: bool | None = Field(
        None,
        description="Set the learning rate right while the run begins, by whether the next gradient still points "
        "along the last update (schedule budget).",
    )
    trim: Share | None = Field(
        None,
        lt=1.0,
        description="Leave out of the adapter, at the end, directions that together make so small a share of the whole "
        "update's norm (schedule budget); 0 leaves out none.",
    )
    on_converged: Literal["discard", "keep"] | None = Field(
        None, description="What becomes of the last, small component of a module that is done."
    )
    reset: Literal["prune", "full", "none"] | None = Field(
        None,
        description="Optimiser state at a new component: prune 99.9 % of the moments, full (steps too), or none.",
    )
    check_first: bool | None = Field(None, description="Apply the outer criterion to the first component too.")
    max_rank: PositiveInt | None = Field(
        None,
        description="Upper bound of a module's rank; within a budget of their mean. Default: by the data, or none.",
    )
    dropout: Share | None = Field(None, lt=1.0, description="Dropout before A, on the active components only.")
    warmup: NonNegativeInt | None = Field(None, description="Steps of the first learning-rate warm-up.")
    restart_warmup: NonNegativeInt | None = Field(None, description="Steps of the warm-up after each new component.")
    min_lr_ratio: Share | None = Field(None, le=1.0, description="Where the cosine ends, as a share of the peak.")
    max_update: PositiveFloat | None = Field(
        None, description="Bound on one element of an update, in learning rates (guards the steps after a reset)."
    )


class TrainingSection(Section):
    """Optimiser, batches and length of the run."""

    learning_rate: PositiveFloat | None = Field(None, description="Peak learning rate.")
    head_learning_rate: PositiveFloat | None = Field(
        None, description="Peak learning rate of a head that is trained in full (tasks classification and regression)."
    )
    max_steps: PositiveInt | None = Field(None, description="Step budget T; default: follows the epochs.")
    epochs: PositiveFloat | None = Field(None, description="Passes over the data; ignored where max_steps is given.")
    micro_batch: PositiveInt = Field(4, description="Examples in one forward pass.")
    grad_accum: PositiveInt = Field(4, description="Forward passes in one optimiser step.")
    beta: PositiveFloat = Field(
        0.1, description="Of task preference: how much staying close to the model it starts from counts (DPO's beta)."
    )
    optimizer: Literal["adamw", "muon"] | None = Field(
        None,
        description="Of the adapter. muon: each step lengthens all directions of a factor alike; adamw: the usual one. "
        "Default: muon within a budget.",
    )
    weight_decay: NonNegativeFloat = Field(0.0, description="Decoupled weight decay of the active factors.")
    max_grad_norm: PositiveFloat = Field(1.0, description="Gradients are clipped to this norm.")
    memory: Annotated[MemoryLevel, BeforeValidator(str)] = Field(
        "auto",
        description="Memory level: "
        + ", ".join(f"{number} {level.title}" for number, level in enumerate(LEVELS))
        + "; auto: the fastest that fits.",
    )
    evaluate_every: PositiveInt | None = Field(
        None, description="Steps between validations; default: a tenth of the run, or more where validation takes long."
    )
    patience: NonNegativeInt | None = Field(
        None,
        description="Stop after so many validations without a better figure, in the first half of a run so many that "
        "are worse by two standard errors; 0 never does.",
    )
    seed: Seed = Field(0, description="Seed of everything random.")
    track: list[Literal["tensorboard", "wandb"]] = Field(
        default_factory=list, description="Also log to TensorBoard or Weights & Biases."
    )
    device: Literal["auto", "cuda", "cpu"] = Field("auto", description="Where to train.")
    reduce: Literal["auto", "ordered", "fast"] = Field(
        "auto",
        description="How several processes add their gradients. ordered: one micro-batch after the other, to the bytes "
        "of one process; fast: as they come; auto: ordered on CPUs and where deterministic, else fast.",
    )
    deterministic: bool = Field(
        False,
        description="The same bytes from every run on one GPU with one torch, as a CPU gives them anyway; attention's "
        "backward pass takes longer and more memory.",
    )


class EvaluationSection(Section):
    """A generation test before and after training: the answers themselves, not only the loss."""

    data: str | None = Field(None, description="File or hub id whose answers are generated greedily.")
    rows: PositiveInt = Field(100, description="At most so many of its rows.")
    metric: LabelMetric | None = Field(
        None,
        description="Figure that chooses the best adapter of a task with labels; default: GLUE's, or the usual one.",
    )
    prompts: list[str] = Field(
        default_factory=list, description="Prompts that are answered again and again while the run trains."
    )
    sample_every: PositiveInt | None = Field(
        None, description="Steps between two answers to the prompts; default: with every validation."
    )
    report: bool = Field(True, description="Keep report.html in the run directory up to date, at every validation.")
    show: NonNegativeInt = Field(3, description="Examples printed, before beside after.")
    max_new_tokens: PositiveInt | None = Field(
        None, description="Longest answer; default: follows the longest expected one."
    )


class CheckpointSection(Section):
    """Saving a run so that it can be killed."""

    every: PositiveInt | None = Field(None, description="Steps between checkpoints; default: a tenth of the run.")
    keep: PositiveInt = Field(2, description="Newest checkpoints kept.")


class Config(Section):
    """One fine-tuning run."""

    model: ModelSection = Field(default_factory=ModelSection)
    data: DataSection = Field(default_factory=DataSection)
    task: TaskName = Field(
        "causal-lm",
        description="causal-lm: answers or text; preference: of two answers rather the chosen than the rejected one "
        "(DPO); classification and regression: a label for a text or a pair of texts.",
    )
    method: MethodName = Field(
        DEFAULT_METHOD,
        description=f"{DEFAULT_METHOD} {METHODS[DEFAULT_METHOD].summary}; for comparison, in the same loop: "
        + ", ".join(f"{name} ({row.summary})" for name, row in METHODS.items() if name != DEFAULT_METHOD)
        + ".",
    )
    rank: PositiveInt = Field(8, description=f"Rank of the methods {', '.join(FIXED_RANK)}; the others need none.")
    growth: GrowthSection = Field(default_factory=GrowthSection)
    training: TrainingSection = Field(default_factory=TrainingSection)
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    output: str | None = Field(None, description="Run directory; default: runs/<model>-<data>.")

    @property
    def writes_text(self) -> bool:
        """Whether the model is to write text; else it has a new head, and labels."""
        return self.task in WRITING

    @property
    def sequences(self) -> int:
        """Sequences of one example: a preference has two."""
        return 2 if self.task == PREFERENCE else 1
