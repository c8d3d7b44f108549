"""The end of a run as printed: the rank map, the figures, and commands that can be copied."""

from __future__ import annotations

import dataclasses
import io
import shlex

import pytest
from rich.console import Console, RenderableType

from qaroma.report.outcome import Outcome
from qaroma.report.summary import BeforeAfter, RunSummary, Score, next_commands, print_summary, rank_map
from qaroma.runs.figures import Figures

LLAMA = {
    f"model.layers.{layer}.{module}": layer + column
    for layer in range(3)
    for column, module in enumerate(["self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj"])
}
RUN = RunSummary(
    run="runs/x",
    adapter="runs/x/adapter",
    steps=90,
    ended=Outcome("It was at its best when it ended", "the training rows are learnt", True),
    ranks=LLAMA,
    figures=Figures(
        rank_min=0,
        rank_mean=2.0,
        rank_max=4,
        trainable_start=1_234_567,
        trainable_mean=98_765.4,
        trainable_end=0,
        adapter_parameters=54_321,
        seconds=125.4,
    ),
    scores=(Score("exact match", 0.0, 0.97, metric="exact_match"), Score("validation loss", None, 0.01234)),
    examples=(
        BeforeAfter("Play [bold]Bach[/bold].", '{"a": [1]}', "Sure!\nI will.", '{"a": [1]}'),
        BeforeAfter("Dim it.", "{}", "No.", "{x}"),
    ),
    evaluation_data="demo:calendar-test",
)


def printed(renderable: RenderableType, width: int = 80) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width).print(renderable)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def summary_text(run: RunSummary, width: int = 80) -> str:
    out = io.StringIO()
    print_summary(run, Console(file=out, width=width))
    return out.getvalue()


def cells(lines: list[str]) -> list[list[str]]:
    return [line.split() for line in lines[1:] if line.strip()]


def test_rank_map_is_a_plain_table_when_piped() -> None:
    lines = printed(rank_map(LLAMA))
    assert "\x1b" not in "".join(lines)
    assert cells(lines) == [
        ["layer", "q_proj", "k_proj", "up_proj", "mean"],
        ["0", "0", "1", "2", "1.0"],
        ["1", "1", "2", "3", "2.0"],
        ["2", "2", "3", "4", "3.0"],
        ["mean", "1.0", "2.0", "3.0", "2.0"],
    ]


def test_rank_map_is_shaded_in_a_terminal() -> None:
    out = io.StringIO()
    Console(file=out, width=80, force_terminal=True, color_system="truecolor").print(rank_map(LLAMA))
    assert len({part.split("m")[0] for part in out.getvalue().split("48;2;")[1:]}) == 5


@pytest.mark.parametrize(
    ("names", "header", "first"),
    [
        (["transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_fc"], ["c_attn", "c_fc"], "0"),
        (
            [
                "roberta.encoder.layer.0.attention.self.query",
                "roberta.encoder.layer.0.attention.output.dense",
                "roberta.encoder.layer.0.intermediate.dense",
                "roberta.encoder.layer.0.output.dense",
            ],
            ["query", "attention.output.dense", "intermediate.dense", "output.dense"],
            "0",
        ),
        (["encoder.block.0.layer.0.q", "decoder.block.0.layer.1.q"], ["q"], "encoder.block.0"),
        (["proj"], ["proj"], "-"),
        (["0.fc", "1.fc"], ["fc"], "0"),
    ],
)
def test_names_of_other_architectures_are_grouped_by_layer(names: list[str], header: list[str], first: str) -> None:
    rows = cells(printed(rank_map(dict.fromkeys(names, 2)), width=200))
    assert rows[0] == ["layer", *header, "mean"]
    assert rows[1][0] == first


def test_layers_keep_apart_in_the_numbers_order_of_the_model() -> None:
    rows = cells(printed(rank_map({f"m.{layer}.q": layer for layer in range(12)})))
    assert [row[0] for row in rows[1:-1]] == [str(layer) for layer in range(12)]


def test_experts_share_a_cell_with_smallest_and_largest_rank() -> None:
    ranks = {f"model.layers.0.mlp.experts.{expert}.up_proj": expert + 1 for expert in range(4)}
    assert cells(printed(rank_map(ranks)))[1] == ["0", "1-4", "2.5"]


def test_a_module_that_a_layer_lacks_stays_empty() -> None:
    rows = cells(printed(rank_map({"m.0.q": 1, "m.0.k": 3, "m.1.q": 2})))
    assert rows[2] == ["1", "2", "2.0"]


def test_all_ranks_zero_can_be_shown() -> None:
    assert cells(printed(rank_map({"m.0.q": 0})))[1] == ["0", "0", "0.0"]


def test_summary_shows_scores_examples_ranks_and_parameters() -> None:
    text = summary_text(RUN, width=120)
    for part in [
        "0.0 % before, 97.0 % after",
        "not measured before, 0.01234 after",
        "Play [bold]Bach[/bold].",
        '{"a": [1]}',
        "I will.",
        "smallest 0, mean 2.0, largest 4, of the best adapter",
        "1,234,567 at the start, 98,765 on average, 0 at the end; 54,321 in the adapter",
        "90 steps, 2 min 05 s",
        "the training rows are learnt",
        "runs/x/adapter",
        "q_proj",
    ]:
        assert part in text
    # The expected answer stands only beside a wrong one.
    assert text.count("expected") == 1


def test_what_trimming_left_out_of_the_adapter_is_not_counted_in_it() -> None:
    figures = Figures(trainable_start=90, trainable_mean=90.0, trainable_end=90, adapter_parameters=60)
    assert "90 throughout; 60 in the adapter" in summary_text(dataclasses.replace(RUN, figures=figures))


def test_summary_without_scores_examples_and_ranks_still_prints() -> None:
    bare = dataclasses.replace(RUN, ranks={}, figures=Figures(), scores=(), examples=(), evaluation_data=None)
    text = summary_text(bare)
    assert "qaroma chat runs/x" in text
    assert "--data FILE" in text


def test_commands_are_printed_whole_on_a_narrow_terminal() -> None:
    text = summary_text(RUN, width=30)
    for line in next_commands(RUN):
        assert f"  {line}\n" in text


def test_long_answers_are_shortened() -> None:
    example = BeforeAfter("p", "e", "before " * 500, "e")
    assert len(summary_text(dataclasses.replace(RUN, ranks={}, examples=(example,)))) < 3000


def test_narrow_names_of_modules_are_not_broken() -> None:
    names = [f"m.layers.0.{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    wide, narrow = (printed(rank_map(dict.fromkeys(names, 2), width), width=width) for width in (100, 60))
    assert wide[1].split() == [
        "layer",
        *(f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")),
        "mean",
    ]
    assert narrow[1].split() == ["layer", "q", "k", "v", "o", "gate", "up", "down", "mean"]
    assert narrow[2].split()[0] == "0"


def test_a_run_that_still_improves_goes_on_first() -> None:
    longer = "qaroma finetune --resume --output runs/x --epochs 5"
    run = dataclasses.replace(RUN, ended=Outcome("", "still improving", False, longer))
    assert next_commands(run)[0] == longer


def test_next_come_chat_export_and_report() -> None:
    run = dataclasses.replace(RUN, run="runs/my run")
    words = [shlex.split(line, comments=True) for line in next_commands(run)]
    assert words == [
        ["qaroma", "chat", "runs/my run"],
        ["qaroma", "export", "runs/my run", "--format", "gguf"],
        ["qaroma", "evaluate", "runs/my run", "--data", "demo:calendar-test"],
        ["qaroma", "report", "runs/my run"],
    ]
    assert "--format merged" in next_commands(dataclasses.replace(RUN, in_gguf=False))[1]
    assert [line.split()[1] for line in next_commands(dataclasses.replace(RUN, outputs=2))] == ["evaluate", "report"]
