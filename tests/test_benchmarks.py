"""The commonsense benchmark: its records, both scorers, resumption, figures, and the paper's configurations."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHARED_DATA
from data_tokenizers import GEMMA, byte_level, sentencepiece_like
from rich.console import Console
from test_training import make_config
from transformers import LlamaConfig, LlamaForCausalLM

from qaroma.benchmarks import likelihood, scorers
from qaroma.benchmarks.commonsense import TASKS, chosen_tasks, extract, read_tasks
from qaroma.benchmarks.likelihood import Choice, encode_choice, score_choices
from qaroma.benchmarks.progress import ScoreFile
from qaroma.benchmarks.results import results_table, summarise, wilson
from qaroma.cli import main
from qaroma.config.load import read_settings
from qaroma.config.presets import DataFacts, resolve
from qaroma.data.encode import encode_rows
from qaroma.data.forms import Message
from qaroma.data.sources import Row
from qaroma.data.templates import Template
from qaroma.engine.loss import LMHead
from qaroma.errors import QaromaError
from qaroma.inference.open import TunedModel, open_base
from qaroma.training.finetune import finetune

QUIET = Console(quiet=True)
OUTPUTS = ["the correct answer is answer1", "the correct answer is answer2", "answer1", "answer1 and more of it", "no"]


def record(question: str, answer: str, candidates: str) -> dict[str, str]:
    return {
        "instruction": f"Please choose: {question}\n\nAnswer format: {candidates}",
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten records of boolq, and seven of ARC-Easy, compressed."""
    root = tmp_path_factory.mktemp("dataset")
    boolq = [record(f"is {n} even" + " really" * (n % 4), str(n % 2 == 0).lower(), "true/false") for n in range(10)]
    easy = [
        record(f"word {n}" * (1 + n % 3), f"answer{n % 4 + 1}", "answer1/answer2/answer3/answer4") for n in range(7)
    ]
    (root / "boolq").mkdir()
    (root / "boolq" / "test.json").write_text(json.dumps(boolq), encoding="utf-8")
    (root / "ARC-Easy").mkdir()
    (root / "ARC-Easy" / "test.json.gz").write_bytes(gzip.compress(json.dumps(easy).encode()))
    return root


def tuned(tokenizer: Any, **changes: Any) -> TunedModel:
    """A random model of the tokenizer's size whose next token depends on what stands before."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.3, **sizes, **changes)
    return TunedModel(LlamaForCausalLM(config).eval(), tokenizer, Template.choose(tokenizer))


@torch.no_grad()
def naive(model: Any, prompt: list[int], answer: list[int]) -> float:
    logits = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))


# Records


def test_the_first_match_of_the_papers_pattern_counts() -> None:
    assert extract("boolq", " it is not true but false") == "true"
    assert extract("piqa", "the correct answer is solution2") == "solution2"
    assert extract("ARC-Easy", "answer5, answer1") == "answer5"
    assert extract("social_i_qa", "answer12") == "answer1"
    assert extract("hellaswag", "ending5 Ending4") is None
    assert extract("winogrande", "") is None


def test_records_are_read_compressed_or_not(folder: Path, tmp_path: Path) -> None:
    boolq, easy = read_tasks(folder, ["boolq", "ARC-Easy"], rows=4)
    assert (boolq.size, len(boolq.questions), easy.size, len(easy.questions)) == (10, 4, 7, 4)
    first = easy.questions[1]
    assert (first.row, first.answer, first.candidates) == (1, "answer2", ("answer1", "answer2", "answer3", "answer4"))
    assert first.outputs[2] == "the correct answer is answer3"
    assert first.turns[-1] == Message("assistant", "the correct answer is answer2")
    (tmp_path / "ARC-Easy").mkdir()
    plain = gzip.decompress((folder / "ARC-Easy" / "test.json.gz").read_bytes())
    (tmp_path / "ARC-Easy" / "test.json").write_bytes(plain)
    assert read_tasks(tmp_path, ["ARC-Easy"])[0].digest == easy.digest
    (tmp_path / "ARC-Easy" / "test.json").write_bytes(plain.replace(b"word 6", b"word 7"))
    assert read_tasks(tmp_path, ["ARC-Easy"], rows=2)[0].digest != easy.digest


@pytest.mark.skipif(not (SHARED_DATA / "commonsense").is_dir(), reason="the real test sets are not on this machine")
def test_the_real_test_sets_are_whole() -> None:
    sets = read_tasks(SHARED_DATA / "commonsense", TASKS)
    assert [task.size for task in sets] == [3270, 1838, 1954, 10042, 1267, 1172, 2376, 500]
    # Some questions of ARC have three answers and some five.
    assert {len(question.candidates) for question in sets[5].questions} == {3, 4, 5}
    assert all(q.outputs[q.candidates.index(q.answer)] == q.turns[-1].content for q in sets[3].questions)


def test_what_is_missing_is_named_with_where_to_get_it(folder: Path, tmp_path: Path) -> None:
    fetch = r"git clone https://github.com/AGI-Edgerunners/LLM-Adapters, then --data LLM-Adapters/dataset"
    with pytest.raises(QaromaError, match=f"no folder.*{fetch}"):
        read_tasks(tmp_path / "nowhere", TASKS)
    with pytest.raises(QaromaError, match=f"piqa/test.json.*{fetch}, or leave them out with --tasks boolq,ARC-Easy"):
        read_tasks(folder, TASKS)
    assert chosen_tasks("arc-easy, boolq,boolq") == ("ARC-Easy", "boolq")
    assert chosen_tasks(None) == TASKS
    for text in ("boolq,bolq", ","):
        with pytest.raises(QaromaError, match="expected some of boolq,piqa"):
            chosen_tasks(text)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer": "maybe", "output": "the correct answer is maybe"}, "'maybe' is none of true/false"),
        ({"output": "yes"}, "does not end with the field 'answer'"),
        ({"answer": 1}, "does not end with the field 'answer'"),
        ({"instruction": " "}, "the field 'instruction' is missing or blank"),
    ],
)
def test_a_record_of_another_kind_is_refused_with_its_place(change: dict, said: str, tmp_path: Path) -> None:
    (tmp_path / "boolq").mkdir()
    good = record("x", "true", "true/false")
    (tmp_path / "boolq" / "test.json").write_text(json.dumps([good, {**good, **change}]), encoding="utf-8")
    with pytest.raises(QaromaError, match=rf"test\.json:2: .*{said}"):
        read_tasks(tmp_path, ["boolq"])


# Likelihood


TOKENIZERS = {
    "bytes": byte_level(),
    "bos": byte_level(GEMMA, bos=True, eos="<end_of_turn>"),
    "plain": byte_level(None, eos="<|endoftext|>"),
    "sentencepiece": sentencepiece_like(),
    "sentencepiece-plain": sentencepiece_like(None),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_candidates_are_tokenised_as_training_does(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    template = Template.choose(tokenizer)
    for output in OUTPUTS:
        row = Row({"instruction": "Which?", "input": "é: ", "output": output}, "f", 1)
        (example,) = encode_rows([row], tokenizer, template).examples
        choice = encode_choice(tokenizer, template, example.conversation, [output, "other"])
        trained = [token for token in example.labels if token != -100]
        assert choice.prompt == example.input_ids[: len(example.input_ids) - len(trained)]
        assert choice.answers[0] == trained[: len(choice.answers[0])]
        # All that is left out is the end of the turn.
        assert tokenizer.decode(trained[len(choice.answers[0]) :]).strip() == template.turn_end.strip()


def test_a_candidate_that_would_join_the_prompt_keeps_it_whole() -> None:
    tokenizer = TOKENIZERS["bytes"]
    template = Template.choose(tokenizer, "none")
    prompt, joined = (tokenizer(text).input_ids for text in ("the ans", "the answer"))
    assert joined[: len(prompt)] != prompt
    choice = encode_choice(tokenizer, template, [Message("user", "the ans")], ["wer", " is"])
    row = Row({"instruction": "the ans", "output": "wer"}, "f", 1)
    (example,) = encode_rows([row], tokenizer, template).examples
    assert choice.prompt == prompt
    assert example.input_ids[:-1] == prompt + choice.answers[0]
    assert tokenizer.decode(choice.answers[0]) == "wer"


@pytest.mark.parametrize("name", ["bytes", "sentencepiece"])
@pytest.mark.parametrize("batch", [1, 4])
def test_scores_equal_the_naive_ones_in_any_batch(name: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "LOGIT_BYTES", 4 * len(TOKENIZERS[name]) * 3)  # three positions at a time
    model = tuned(TOKENIZERS[name])
    turns = [[Message("user", "why " * n)] for n in (5, 1, 9, 2, 3, 3)]
    choices = [encode_choice(model.tokenizer, model.template, t, OUTPUTS) for t in turns]
    head = LMHead(model.model)
    scores: list[list[float]] = []
    for start in range(0, len(choices), batch):
        scores += score_choices(model.model, choices[start : start + batch], head)
    for choice, got in zip(choices, scores, strict=True):
        expected = [naive(model.model, choice.prompt, answer) for answer in choice.answers]
        assert got == pytest.approx(expected, rel=1e-4)
    assert len({round(score, 3) for row in scores for score in row}) == 6 * 5 - 5, "only the equal questions are equal"


def test_candidates_that_begin_alike_share_a_row_and_its_logits() -> None:
    model = tuned(TOKENIZERS["bytes"]).model
    choices = [Choice([5, 6, 7], ([1, 2], [1, 3], [1, 4])), Choice([8, 9], ([1], [1, 2, 3], [4, 5]))]
    seen: dict[str, list[int]] = {"rows": [], "positions": []}
    head = LMHead(model)
    logits = head.logits

    def watched(hidden_CD: torch.Tensor) -> torch.Tensor:
        seen["positions"].append(hidden_CD.shape[0])
        return logits(hidden_CD)

    head.logits = watched  # type: ignore[method-assign]
    hook = model.model.register_forward_pre_hook(
        lambda _, __, named: seen["rows"].append(len(named["input_ids"])), with_kwargs=True
    )
    scores = score_choices(model, choices, head)
    hook.remove()
    assert seen == {"rows": [3], "positions": [2 + 3 + 2]}  # not 6 rows, and not 3 x 4 positions
    for choice, got in zip(choices, scores, strict=True):
        assert got == pytest.approx([naive(model, choice.prompt, answer) for answer in choice.answers], rel=1e-4)


def test_a_bf16_model_has_its_logits_in_fp32() -> None:
    """Rounded to bf16, many of them would be equal, and the first candidate would win for no reason."""
    model = tuned(TOKENIZERS["bytes"]).model.bfloat16()
    choice = Choice(list(range(9)), tuple([token] for token in range(40, 240)))
    (scores,) = score_choices(model, [choice], LMHead(model))
    with torch.no_grad():
        hidden = model.model(torch.tensor([choice.prompt])).last_hidden_state[0, -1].float()
    expected = (model.lm_head.weight.float() @ hidden).log_softmax(0)[40:240]
    assert scores == pytest.approx(expected.tolist(), rel=1e-5)
    assert len(set(scores)) > 195
    assert len(set(expected.bfloat16().tolist())) < 150


def test_both_likelihoods_are_kept_and_may_differ(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    model = tuned(TOKENIZERS["bytes"])
    monkeypatch.setattr(scorers, "score_choices", lambda *_: [[-3.0, -4.0]])
    scorer = scorers.Likelihood(model.model, model.tokenizer, model.template)
    (question,) = read_tasks(folder, ["boolq"], rows=1)[0].questions
    (scored,) = scorer.score("boolq", [scorers.Item(question, Choice([1], ([1, 2], [1, 2, 3])))])
    assert (scored["predicted"], scored["predicted_per_token"]) == ("true", "false")
    assert scored["scores"] == {"true": -3.0, "false": -4.0}
    assert scored["tokens"] == [2, 3]


# Figures


def test_wilson_intervals() -> None:
    assert wilson(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    assert wilson(0, 10) == pytest.approx((0.0, 0.277533), abs=1e-6)
    assert wilson(10, 10) == pytest.approx((0.722467, 1.0), abs=1e-6)


def test_the_mean_counts_each_task_once(folder: Path) -> None:
    sets = read_tasks(folder, ["boolq", "ARC-Easy"], rows=8)
    scored = {(t.name, q.row): {"answer": q.answer, "predicted": q.answer} for t in sets for q in t.questions}
    for row in range(6):
        scored["boolq", row]["predicted"] = None
    figures = summarise(sets, scored, "generation")
    assert figures["tasks"]["boolq"] == {
        "rows": 8, "of": 10, "chance": 0.5, "accuracy": 0.25, "interval": list(wilson(2, 8)), "unparsed": 6,
    }  # fmt: skip
    assert figures["tasks"]["ARC-Easy"]["accuracy"] == 1.0
    assert figures["mean_accuracy"] == 0.625
    table = results_table({**figures, "scorer": "generation", "model": "m"})
    assert table.caption == "only a part of 1 test sets was scored"
    assert table.row_count == 3


# The command


def evaluate(folder: Path, *arguments: str) -> int:
    return main(["evaluate", "--benchmark", "commonsense", "--data", str(folder), "--device", "cpu", *arguments])


def figures_of(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert evaluate(folder, "--json", *arguments) == 0
    return json.loads(capsys.readouterr().out)


TWO = ("--tasks", "boolq,ARC-Easy")


@pytest.mark.parametrize("scorer", scorers.SCORERS)
def test_a_base_is_scored_alike_in_any_batch(
    scorer: str, folder: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--base", str(tiny_folder), *TWO, "--scorer", scorer, "--quantization", "none"]
    one = figures_of(folder, capsys, *common, "--batch-size", "1", "--output", str(tmp_path / "one"))
    four = figures_of(folder, capsys, *common, "--batch-size", "4", "--output", str(tmp_path / "sub" / "four.json"))
    assert {**one, "output": ""} == {**four, "output": ""}
    assert json.loads((tmp_path / "one" / "results.json").read_text()) == one
    assert json.loads((tmp_path / "sub" / "four.json").read_text()) == four
    assert (tmp_path / "sub" / "four.jsonl").is_file()
    assert set(one["tasks"]) == {"boolq", "ARC-Easy"}
    assert one["quantization"] == "none"


def test_an_interrupted_benchmark_goes_on(
    folder: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ["--base", str(tiny_folder), *TWO, "--scorer", "likelihood", "--batch-size", "3"]
    whole = figures_of(folder, capsys, *common, "--output", str(tmp_path / "whole"))
    real, calls = scorers.Likelihood.score, []

    def counted(self: Any, task: str, items: Any) -> Any:
        calls.append(len(items))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, task, items)

    monkeypatch.setattr(scorers.Likelihood, "score", counted)
    assert evaluate(folder, *common, "--output", str(tmp_path / "cut")) == 130
    assert "type the same command to go on" in capsys.readouterr().err
    scores = tmp_path / "cut" / "scores.jsonl"
    assert len(scores.read_text().splitlines()) == 1 + 2 + 6  # header, two tasks, two batches
    assert not (tmp_path / "cut" / "results.json").exists()
    with scores.open("a") as file:
        file.write('{"task": "boolq", "row": 9, "ans')  # as a kill leaves it
    calls += [0]
    resumed = figures_of(folder, capsys, *common, "--output", str(tmp_path / "cut"))
    assert calls[4:] == [3, 1, 3, 3, 1]
    assert {**resumed, "output": ""} == {**whole, "output": ""}
    lines = [json.loads(line) for line in scores.read_text().splitlines()]
    assert len(lines) == 1 + 2 + 17
    assert figures_of(folder, capsys, *common, "--output", str(tmp_path / "cut")) == resumed
    assert calls[4:] == [3, 1, 3, 3, 1], "nothing is scored twice"


def test_more_rows_and_tasks_go_on_and_anything_else_is_refused(
    folder: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    common = ["--base", str(tiny_folder), "--scorer", "likelihood"]
    few = figures_of(folder, capsys, *common, "--tasks", "boolq", "--rows", "4")
    assert few["output"] == "benchmarks/tiny-llama/commonsense-likelihood/results.json"
    assert figures_of(folder, capsys, *common, *TWO)["tasks"]["boolq"]["rows"] == 10
    assert figures_of(folder, capsys, *common, "--tasks", "boolq", "--rows", "4") == few
    assert evaluate(folder, *common, *TWO, "--quantization", "none") == 2
    told = capsys.readouterr().err
    assert "holds scores of something else: quantisation nf4-double, now none" in told
    assert "Type --output with another folder, or delete" in told
    changed = tmp_path / "changed"
    (changed / "boolq").mkdir(parents=True)
    (changed / "boolq" / "test.json").write_text(json.dumps([record("z", "true", "true/false")]), encoding="utf-8")
    assert evaluate(changed, *common, "--tasks", "boolq") == 2
    assert "another test set of boolq" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["not JSON\n", '{"instruction": "mine"}\n', "[1, 2]\n", ""])
def test_a_file_of_something_else_is_left_as_it_is(text: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(QaromaError, match="is not a file of benchmark scores; choose another --output"):
        ScoreFile(file, {"scorer": "likelihood"})
    assert file.read_text(encoding="utf-8") == text


def test_generated_answers_are_matched_and_the_rest_counted(
    folder: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, Any]] = []

    def said(model: Any, tokenizer: Any, template: Any, conversations: Any, **options: Any) -> list[str]:
        given.append(options)
        return ["True." if "0" in turns[0].content else "it is true, not false" for turns in conversations]

    monkeypatch.setattr(scorers, "generate", said)
    figures = figures_of(
        folder, capsys, "--base", str(tiny_folder), "--tasks", "boolq", "--output", str(tmp_path), "--batch-size", "8"
    )
    assert figures["tasks"]["boolq"]["unparsed"] == 1
    assert figures["tasks"]["boolq"]["accuracy"] == 0.4
    assert [options["batch_size"] for options in given] == [8, 2]
    assert {options["max_new_tokens"] for options in given} == {32}
    assert evaluate(folder, "--base", str(tiny_folder), "--tasks", "boolq", "--output", str(tmp_path)) == 0
    out = capsys.readouterr().out
    assert "commonsense, generation: " in out
    assert "40.00" in out


def test_a_run_is_scored_with_its_adapter(
    folder: Path, tiny_folder: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    data = tmp_path / "train.json"
    data.write_text(json.dumps([record(f"word {n}", "answer3", "answer1/answer2/answer3") for n in range(40)]))
    finetune(make_config(tiny_folder, data, run, training__max_steps=40), console=QUIET)
    arguments = ["--scorer", "likelihood", "--tasks", "ARC-Easy"]
    figures = figures_of(folder, capsys, str(run), *arguments)
    assert figures["output"] == (run / "benchmarks" / "commonsense-likelihood" / "results.json").as_posix()
    lines = [json.loads(line) for line in (run / "benchmarks/commonsense-likelihood/scores.jsonl").open()]
    assert {line["predicted"] for line in lines[2:]} == {"answer3"}, "what it was trained to say"
    base = figures_of(folder, capsys, "--base", str(tiny_folder), *arguments, "--output", str(tmp_path / "base"))
    assert base["quantization"] == figures["quantization"] == "nf4-double"
    assert json.loads((tmp_path / "base" / "scores.jsonl").open().readline())["base"] == lines[0]["base"]
    assert evaluate(folder, str(run / "adapter_last"), *arguments, "--output", str(tmp_path / "base")) == 2
    assert "adapter None, now " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "d"], "got no RUN"),
        (["--data", "d", "--base", "m"], "qaroma evaluate --base MODEL --benchmark commonsense"),
        (
            ["r", "--data", "d", "--tasks", "boolq", "--scorer", "likelihood"],
            "got --tasks, --scorer without a benchmark",
        ),
        (["--data", "d", "--benchmark", "commonsense"], "got neither RUN nor --base"),
        (["r", "--data", "d", "--data", "e", "--benchmark", "commonsense"], "got --data 2 times"),
        (["r", "--data", "d", "--benchmark", "commonsense", "--skip-bad-rows"], "got --skip-bad-rows with --benchmark"),
        (["r", "--data", "d", "--benchmark", "commonsense", "--quantization", "fp4"], "got --quantization with RUN"),
        (
            ["r", "--data", "d", "--benchmark", "commonsense", "--scorer", "likelihood", "--max-new-tokens", "3"],
            "which generates nothing",
        ),
        (["r", "--data", "d", "--benchmark", "commonsense", "--tasks", "x"], "expected some of boolq"),
        (["r", "--data", "nowhere", "--benchmark", "commonsense"], "there is no folder 'nowhere'"),
        (["r", "--benchmark", "commonsense"], "--data"),
    ],
)
def test_contradictions_are_sentences(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_an_untuned_base_has_the_template_of_training(tiny_folder: Path) -> None:
    opened = open_base(str(tiny_folder), device="cpu")
    assert opened.template == Template.choose(opened.tokenizer)
    assert not opened.model.training


# The paper's configurations

PUBLISHED = {
    "paper/llama3-8b-commonsense-r1": (1, 2.0, 1e-3, 1000, 100_000),
    "paper/llama3-8b-commonsense-r8": (8, 16.0, 1e-2, 2000, 80_000),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_papers_settings_are_the_published_ones(name: str) -> None:
    given = read_settings(name, {}, [])
    facts = DataFacts(rows=170_420, lengths=[200] * 100, model_max_length=8192)
    config, _ = resolve(given, facts)
    growth, training = config.growth, config.training
    found = (growth.inner_rank, growth.alpha, growth.eps_out, growth.t_in, training.max_steps)
    assert found == PUBLISHED[name]
    assert (training.learning_rate, training.micro_batch * training.grad_accum, config.data.max_length) == (
        1e-4,
        32,
        256,
    )
    assert (growth.check_every, growth.eps_in, growth.dropout) == (10, 0.1, 0.1)
    assert (growth.warmup, growth.restart_warmup, growth.min_lr_ratio) == (100, 50, 0.1)
    assert growth.target_modules == ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    assert (training.weight_decay, training.max_grad_norm) == (0.0, 1.0)
    # The numbers are written out, not left to a preset that may change; the preset gives the same.
    for key in ("inner_rank", "alpha", "eps_out", "t_in", "check_every", "eps_in", "dropout", "warmup"):
        assert getattr(given.growth, key) is not None
    bare = read_settings(None, {}, ["model.name=m", "growth.preset=paper", f"growth.inner_rank={growth.inner_rank}"])
    preset, _ = resolve(bare, facts)
    assert preset.growth == growth
    assert preset.training.max_steps == training.max_steps


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_papers_settings_run(name: str, tiny_folder: Path, data_file: Path, tmp_path: Path) -> None:
    sets = [f"model.name={tiny_folder.as_posix()}", f"data.train={data_file.as_posix()}", "training.max_steps=2"]
    arguments = ["finetune", "--config", name, "--output", str(tmp_path / "run"), "--device", "cpu"]
    assert main([*arguments, *(part for key in sets for part in ("--set", key)), "--set", "training.grad_accum=1"]) == 0
    assert (tmp_path / "run" / "adapter" / "growth.json").is_file()
