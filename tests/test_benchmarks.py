"""Benchmarks: requests and scores of the harness equal naive ones, both kinds of task, resumption, figures."""

from __future__ import annotations

import gzip
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHARED_DATA
from data_tokenizers import GEMMA, byte_level, sentencepiece_like
from rich.console import Console
from test_training import make_config
from transformers import LlamaConfig, LlamaForCausalLM

from qaroma.cli import main
from qaroma.data.encode import encode_rows
from qaroma.data.forms import Message
from qaroma.data.sources import Row
from qaroma.data.templates import Template
from qaroma.errors import QaromaError
from qaroma.inference.open import TunedModel, open_base
from qaroma.training.finetune import finetune

pytest.importorskip("lm_eval", reason="the extra bench is not installed")

from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from qaroma.benchmarks import harness
from qaroma.benchmarks.commonsense import read
from qaroma.benchmarks.model import HarnessModel, encode_answer
from qaroma.benchmarks.results import results_table, summarise, wilson

QUIET = Console(quiet=True)
OUTPUTS = ["the correct answer is answer1", "the correct answer is answer2", "answer1", "answer1 and more of it", "no"]
TASKS = ("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Challenge", "ARC-Easy", "openbookqa")


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


def test_records_are_read_compressed_or_not(folder: Path) -> None:
    boolq, easy = (read(task, str(folder))["test"] for task in ("boolq", "ARC-Easy"))
    assert (len(boolq), len(easy)) == (10, 7)
    assert easy[1] == {
        "question": "Please choose: word 1word 1\n\nAnswer format: answer1/answer2/answer3/answer4",
        "choices": ["answer1", "answer2", "answer3", "answer4"],
        "answer": "answer2",
        "gold": 1,
        "outputs": [f"the correct answer is answer{n}" for n in (1, 2, 3, 4)],
    }


@pytest.mark.skipif(not (SHARED_DATA / "commonsense").is_dir(), reason="the real test sets are not on this machine")
def test_the_real_test_sets_are_whole() -> None:
    sets = [read(task, str(SHARED_DATA / "commonsense"))["test"] for task in TASKS]
    assert [len(documents) for documents in sets] == [3270, 1838, 1954, 10042, 1267, 1172, 2376, 500]
    # Some questions of ARC have three answers and some five.
    assert {len(choices) for choices in sets[5]["choices"]} == {3, 4, 5}


def test_what_is_missing_is_named_with_where_to_get_it(folder: Path, tmp_path: Path) -> None:
    fetch = r"git clone https://github.com/AGI-Edgerunners/LLM-Adapters, then --data LLM-Adapters/dataset"
    with pytest.raises(QaromaError, match=f"no folder.*{fetch}"):
        read("boolq", str(tmp_path / "nowhere"))
    with pytest.raises(QaromaError, match=f"lacks piqa/test.json.*it holds ARC-Easy, boolq, which --tasks.*{fetch}"):
        read("piqa", str(folder))
    with pytest.raises(QaromaError, match=f"need LLM-Adapters' test sets.*{fetch}"):
        read("piqa")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer": "maybe", "output": "the correct answer is maybe"}, "'maybe' is none of true/false"),
        ({"instruction": "Is it?"}, "'true' is none of an Answer format"),
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
        read("boolq", str(tmp_path))


# Requests


TOKENIZERS = {
    "bytes": byte_level(),
    "bos": byte_level(GEMMA, bos=True, eos="<end_of_turn>"),
    "plain": byte_level(None, eos="<|endoftext|>"),
    "sentencepiece": sentencepiece_like(),
    "sentencepiece-plain": sentencepiece_like(None),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_requests_are_tokenised_as_training_does(name: str) -> None:
    model = HarnessModel(tuned(TOKENIZERS[name]), batch_size=2)
    for output in OUTPUTS:
        row = Row({"instruction": "Which?", "input": "é: ", "output": output}, "f", 1)
        (example,) = encode_rows([row], model.tokenizer, model.template).examples
        context = model.apply_chat_template([{"role": "user", "content": example.conversation[0].content}])
        prompt, answer = model._encode_pair(context, output)
        trained = [token for token in example.labels if token != -100]
        assert prompt == example.input_ids[: len(example.input_ids) - len(trained)]
        assert answer == trained[: len(answer)]
        # All that is left out is the end of the turn.
        assert model.tokenizer.decode(trained[len(answer) :]).strip() == model.template.turn_end.strip()
        # Generation begins from the same tokens.
        assert model.tok_batch_encode([context])[0].tolist() == [prompt]


def test_an_answer_that_would_join_the_prompt_keeps_it_whole() -> None:
    tokenizer = TOKENIZERS["bytes"]
    template = Template.choose(tokenizer, "none")
    prompt, joined = (tokenizer(text).input_ids for text in ("the ans", "the answer"))
    assert joined[: len(prompt)] != prompt
    found, answer = encode_answer(tokenizer, template, [Message("user", "the ans")], "wer")
    row = Row({"instruction": "the ans", "output": "wer"}, "f", 1)
    (example,) = encode_rows([row], tokenizer, template).examples
    assert found == prompt
    assert example.input_ids[:-1] == prompt + answer
    assert tokenizer.decode(answer) == "wer"


def test_a_begun_answer_goes_on_and_a_refusal_is_a_sentence() -> None:
    model = HarnessModel(tuned(TOKENIZERS["bos"]), batch_size=2)
    question = {"role": "user", "content": "Which?"}
    whole = model.apply_chat_template([question])
    begun = model.apply_chat_template([question, {"role": "assistant", "content": "It is"}], False)
    assert begun == whole + "It is"
    with pytest.raises(QaromaError, match=r"refuses the conversation.*--no-template"):
        model.apply_chat_template([question, question])


@pytest.mark.parametrize("name", ["bytes", "sentencepiece"])
@pytest.mark.parametrize("batch", [1, 4])
def test_likelihoods_equal_the_naive_ones_in_any_batch(name: str, batch: int) -> None:
    model = HarnessModel(tuned(TOKENIZERS[name]), batch_size=batch)
    contexts = [model.apply_chat_template([{"role": "user", "content": "why " * n}]) for n in (5, 1, 9, 2, 3, 3)]
    pairs = [(context, output) for context in contexts for output in OUTPUTS]
    found = model.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs])
    expected = [naive(model.model, *model._encode_pair(*pair)) for pair in pairs]
    assert [score for score, _ in found] == pytest.approx(expected, rel=1e-4)
    assert len({round(score, 3) for score, _ in found}) == 6 * 5 - 5, "only the equal questions are equal"


def test_logits_are_made_in_fp32_and_only_where_something_scores() -> None:
    """Rounded to bf16, many of them would be equal, and the first candidate would win for no reason."""
    opened = tuned(TOKENIZERS["bytes"])
    opened.model.bfloat16()
    model = HarnessModel(opened, batch_size=4)
    rows = [([5, 6, 7], [1, 2]), ([8, 9, 4, 3], [1, 2, 3]), ([8, 0, 0], [0, 4])]
    shapes = []
    made = model._head.logits
    model._head.logits = lambda hidden: shapes.append(hidden.shape[0]) or made(hidden)  # type: ignore[method-assign]
    found = model._loglikelihood_tokens([(None, *row) for row in rows])
    # Rows of 6, 4 and 4 tokens, the last of which ends with two zeros: 5 positions of 6 may score.
    assert shapes == [3 * 6]
    with torch.no_grad():
        for (prompt, answer), (score, _) in zip(rows, found, strict=True):
            hidden = opened.model.model(torch.tensor([prompt + answer])).last_hidden_state[0].float()
            logits = (hidden @ opened.model.lm_head.weight.float().T).log_softmax(1)
            places = range(len(prompt) - 1, len(prompt + answer) - 1)
            assert score == pytest.approx(
                sum(float(logits[p, t]) for p, t in zip(places, answer, strict=True)), rel=0.02
            )
    assert {made(hidden[:1]).dtype for _ in rows} == {torch.float32}


def test_generated_text_ends_at_the_templates_stop_token() -> None:
    model = HarnessModel(tuned(TOKENIZERS["plain"]), batch_size=2)
    stop = model.stops[0]
    ids = model.tokenizer("answer1").input_ids
    assert model.tok_decode([*ids, stop, *ids]) == "answer1"
    assert model.model.generation_config.eos_token_id == model.stops


# Figures


def test_wilson_intervals() -> None:
    assert wilson(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    assert wilson(0, 10) == pytest.approx((0.0, 0.277533), abs=1e-6)
    assert wilson(10, 10) == pytest.approx((0.722467, 1.0), abs=1e-6)


def found(name: str, scores: list[float], results: dict[str, Any], filtered: Any = "x") -> dict[str, Any]:
    """What the harness returns for one task "a" with a metric."""
    samples = [{"filter": "none", name: score, "filtered_resps": [filtered]} for score in scores]
    return {
        "samples": {"a": samples},
        "n-samples": {"a": {"original": 20, "effective": len(scores)}},
        "results": {"a": {"alias": "a", "sample_len": 3, **results}},
    }


def test_figures_have_an_interval_that_fits_them() -> None:
    share = summarise(found("acc", [1.0, 0.0], {"acc,none": 0.5, "acc_stderr,none": 0.3}, "[invalid]"), {})
    assert share["tasks"]["a"] == {
        "rows": 2, "of": 20,
        "metrics": {"acc,none": {"value": 0.5, "interval": list(wilson(1, 2)), "unparsed": 2}},
    }  # fmt: skip
    mean = summarise(found("f1", [0.2, 0.6], {"f1,none": 0.4, "f1_stderr,none": 0.1}), {})
    assert mean["tasks"]["a"]["metrics"]["f1,none"]["interval"] == pytest.approx([0.204, 0.596], abs=1e-3)
    bare = summarise(found("ppl", [3.0], {"ppl,none": 20.0, "ppl_stderr,none": "N/A"}), {"g": ["a"]})
    assert bare["tasks"]["a"]["metrics"] == {"ppl,none": {"value": 20.0, "interval": None, "unparsed": 0}}
    table = results_table({**share, "model": "m"})
    assert table.caption == "only a part of 1 test sets was scored"
    assert list(table.columns[3].cells) == ["50.00  (9.5 - 90.5)"]
    assert list(results_table({**bare, "model": "m"}).columns[3].cells) == ["20.00"]


# The command


def benchmark(folder: Path, *arguments: str) -> int:
    return main(["benchmark", "--data", str(folder), "--device", "cpu", *arguments])


def figures_of(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert benchmark(folder, "--json", *arguments) == 0
    return json.loads(capsys.readouterr().out)


BOTH = "commonsense_boolq,commonsense_likelihood_arc_easy"


def test_a_base_is_scored_alike_in_any_batch(
    folder: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--base", str(tiny_folder), "--tasks", BOTH, "--quantization", "none"]
    one = figures_of(folder, capsys, *common, "--batch-size", "1", "--output", str(tmp_path / "one"))
    four = figures_of(folder, capsys, *common, "--batch-size", "4", "--output", str(tmp_path / "sub" / "four.json"))
    assert {**one, "output": ""} == {**four, "output": ""}
    assert json.loads(Path(one["output"]).read_text()) == one
    assert json.loads((tmp_path / "sub" / "four.json").read_text()) == four
    answers = [json.loads(line) for line in (tmp_path / "sub" / "four.jsonl").read_text().splitlines()]
    assert [line["task"] for line in answers] == ["commonsense_boolq"] * 10 + ["commonsense_likelihood_arc_easy"] * 7
    assert set(one["tasks"]) == set(BOTH.split(","))
    assert (one["quantization"], one["template"]) == ("none", "chat")


def test_an_interrupted_benchmark_goes_on(
    folder: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ["--base", str(tiny_folder), "--tasks", "commonsense_likelihood_arc_easy", "--batch-size", "3"]
    whole = figures_of(folder, capsys, *common, "--output", str(tmp_path / "whole"))
    real, calls = HarnessModel._model_call, []

    def counted(self: Any, inps: torch.Tensor) -> torch.Tensor:
        calls.append(len(inps))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, inps)

    monkeypatch.setattr(HarnessModel, "_model_call", counted)
    assert benchmark(folder, *common, "--output", str(tmp_path / "cut")) == 130
    assert "type the same command to go on" in capsys.readouterr().err
    assert [path.suffix for path in (tmp_path / "cut").iterdir()] == [".db"]
    calls += [0]
    resumed = figures_of(folder, capsys, *common, "--output", str(tmp_path / "cut"))
    assert calls[:2] == [3, 3]
    assert sum(calls[3:]) == 7 - 3, "what was answered before is not asked again"
    assert {**resumed, "output": ""} == {**whole, "output": ""}
    asked = list(calls)
    assert figures_of(folder, capsys, *common, "--output", str(tmp_path / "cut")) == resumed
    assert calls == asked


def test_answers_of_another_model_are_not_taken(
    folder: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    common = ["--base", str(tiny_folder), "--tasks", "commonsense_likelihood_boolq", "--rows", "2"]
    figures = figures_of(folder, capsys, *common)
    assert figures["output"] == "benchmarks/tiny-llama/commonsense_likelihood_boolq.json"
    assert figures["tasks"]["commonsense_likelihood_boolq"]["rows"] == 2
    assert figures_of(folder, capsys, *common, "--quantization", "none")["quantization"] == "none"
    assert len(list((tmp_path / "benchmarks" / "tiny-llama").glob("answers-*.db"))) == 2


def test_generated_answers_are_matched_as_in_the_paper(
    folder: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = ["it is true, not false", "True", " false", ""]
    given = []

    def generated(self: Any, requests: Any) -> list[str]:
        given.extend(request.args for request in requests)
        return [said[number % 4] for number in range(len(requests))]

    monkeypatch.setattr(HarnessModel, "generate_until", generated)
    arguments = ["--base", str(tiny_folder), "--tasks", "commonsense_boolq", "--output", str(tmp_path)]
    task = figures_of(folder, capsys, *arguments, "--rows", "8")["tasks"]["commonsense_boolq"]
    # Right are the answers to 0 and 4 (true); to 2 and 6 (true) false was said, to the others nothing.
    figure = task["metrics"]["exact_match,first_match"]
    assert (figure["value"], figure["unparsed"]) == (0.25, 4)
    assert {options["max_gen_toks"] for _, options in given} == {32}
    assert benchmark(folder, *arguments, "--max-new-tokens", "5") == 0
    assert given[-1][1]["max_gen_toks"] == 5
    assert "commonsense_boolq" in capsys.readouterr().out


def test_long_lists_of_tasks_have_results_of_their_own() -> None:
    short, one, other = (harness._places("run", True, [*"ab" * n, "c"], None)[1].name for n in (1, 30, 31))
    assert short == "a+b+c.json"
    assert one != other
    assert len(one) == len(other) == 85


@pytest.mark.parametrize(
    ("task", "text", "answer"),
    [
        ("commonsense_piqa", "the correct answer is solution2", "solution2"),
        ("commonsense_arc_easy", "answer5, answer1", "answer5"),
        ("commonsense_social_i_qa", "answer12", "answer1"),
        ("commonsense_hellaswag", "ending5 Ending4", "[invalid]"),
        ("commonsense_winogrande", "", "[invalid]"),
    ],
)
def test_the_first_match_of_the_papers_pattern_counts(task: str, text: str, answer: str, tmp_path: Path) -> None:
    for name in TASKS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.json").write_text(json.dumps([record("x", "yes", "yes/no")]), encoding="utf-8")
    (loaded,) = harness._load_tasks([task], str(tmp_path))["tasks"].values()
    loaded.set_config("num_fewshot", 0)
    loaded.build_all_requests()
    loaded.instances[0].resps.append(text)
    loaded.apply_filters()
    assert loaded.instances[0].filtered_resps == {"first_match": answer}


def test_both_groups_hold_the_eight_tasks_and_have_a_mean(tmp_path: Path) -> None:
    for name in TASKS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.json").write_text(json.dumps([record("x", "yes", "yes/no")]), encoding="utf-8")
    chosen = harness._load_tasks(["commonsense", "commonsense_likelihood"], str(tmp_path))
    lower = [name.lower().replace("-", "_") for name in TASKS]
    assert chosen["group_map"] == {
        kind: [f"{kind}_{name}" for name in lower] for kind in ("commonsense", "commonsense_likelihood")
    }
    values = {
        f"commonsense_{name}": {"exact_match,first_match": n / 8, "sample_len": n + 1} for n, name in enumerate(lower)
    }
    assert chosen["groups"]["commonsense"].aggregate(values)["exact_match,first_match"] == 3.5 / 8


def test_examples_before_a_question_are_turns_of_the_conversation(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task as the harness has them: records from a file, its own delimiter, two filters of one metric."""
    records = [{"q": f"what is {n}", "a": str(n)} for n in range(6)]
    (tmp_path / "rows.json").write_text(json.dumps(records), encoding="utf-8")
    task = {
        "task": "sums", "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(tmp_path / "rows.json"), "cache_dir": str(tmp_path / "cache")},
        "test_split": "train", "fewshot_split": "train", "output_type": "generate_until",
        "doc_to_text": "Q: {{q}}\nA:", "doc_to_target": "{{a}}", "generation_kwargs": {"until": ["Q:"]},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "filter_list": [
            {"name": name, "filter": [{"function": "regex", "regex_pattern": pattern}, {"function": "take_first"}]}
            for name, pattern in {"any": "[0-9]", "none_of": "x"}.items()
        ],
    }  # fmt: skip
    (tmp_path / "sums.yaml").write_text(json.dumps(task), encoding="utf-8")
    monkeypatch.setattr(harness, "OURS", tmp_path)
    asked = []

    def generated(self: Any, requests: Any) -> list[str]:
        asked.extend(request.args[0] for request in requests)
        return ["it is 1" for _ in requests]

    monkeypatch.setattr(HarnessModel, "generate_until", generated)
    common = ["--base", str(tiny_folder), "--tasks", "sums", "--rows", "3", "--examples", "2"]
    metrics = figures_of(tmp_path, capsys, *common, "--output", str(tmp_path / "out"))["tasks"]["sums"]["metrics"]
    assert metrics["exact_match,any"] == {"value": pytest.approx(1 / 3), "interval": list(wilson(1, 3)), "unparsed": 0}
    assert metrics["exact_match,none_of"]["unparsed"] == 3
    chat = asked[0]
    figures_of(tmp_path, capsys, *common, "--no-template", "--output", str(tmp_path / "out"))
    raw = asked[3]
    assert (chat.count("<|im_start|>user"), chat.count("<|im_start|>assistant")) == (3, 3)
    assert raw.count("\nA:") == 3
    assert "<|im_start|>" not in raw


def test_a_run_is_scored_with_its_adapter(
    folder: Path, tiny_folder: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    data = tmp_path / "train.json"
    data.write_text(json.dumps([record(f"word {n}", "answer3", "answer1/answer2/answer3") for n in range(40)]))
    finetune(make_config(tiny_folder, data, run, training__max_steps=40), console=QUIET)
    task = "commonsense_likelihood_arc_easy"
    figures = figures_of(folder, capsys, str(run), "--tasks", task)
    assert figures["output"] == (run / "benchmarks" / f"{task}.json").as_posix()
    lines = [json.loads(line) for line in (run / "benchmarks" / f"{task}.jsonl").open()]
    chosen = {max(range(4), key=lambda n: line["filtered_resps"][n][0]) for line in lines}
    assert chosen == {2}, "what it was trained to say"
    # The adapter is part of what answers are kept under.
    assert benchmark(folder, "--base", str(tiny_folder), "--tasks", task, "--output", str(run / "benchmarks")) == 0
    assert len(list((run / "benchmarks").glob("answers-*.db"))) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tasks", "commonsense", "--data", "d"], "got neither RUN nor --base"),
        (["r", "--tasks", "hellaswag", "--quantization", "fp4"], "got --quantization with RUN"),
        (["r", "--tasks", ","], "got no name in --tasks"),
        (["r", "--tasks", "commonsense"], "then --data LLM-Adapters/dataset"),
        (["--base", "gpt2", "--tasks", "commonsense", "--data", "nowhere"], "there is no folder 'nowhere'"),
        (["r"], "--tasks"),
    ],
)
def test_contradictions_are_sentences(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_an_unknown_task_is_answered_with_the_nearest_names(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "TaskManager", partial(TaskManager, include_defaults=False))  # thousands of files
    assert main(["benchmark", "--base", str(tiny_folder), "--tasks", "comonsense_bolq"]) == 2
    told = capsys.readouterr().err
    assert "got the task 'comonsense_bolq'" in told
    assert "did you mean commonsense_boolq" in told
    assert "lm-eval ls tasks" in told


@pytest.mark.slow
def test_the_harnesss_own_tasks_are_known(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["benchmark", "r", "--tasks", "gsm8k,helaswag"]) == 2
    assert "got the task 'helaswag'" in (told := capsys.readouterr().err)
    assert "hellaswag" in told.split("did you mean")[1]


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert main(["benchmark", "r", "--tasks", "hellaswag"]) == 2
    assert 'pip install "qaroma[bench]"' in capsys.readouterr().err


def test_evaluate_names_the_command_that_benchmarks_moved_to(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["r", "--data", "d", "--benchmark", "commonsense"], ["--scorer", "likelihood", "--base", "m"]):
        assert main(["evaluate", *arguments]) == 2
        assert "qaroma benchmark RUN --tasks commonsense" in capsys.readouterr().err


def test_an_untuned_base_has_the_template_of_training(tiny_folder: Path) -> None:
    opened = open_base(str(tiny_folder), device="cpu")
    assert opened.template == Template.choose(opened.tokenizer)
    assert not opened.model.training
