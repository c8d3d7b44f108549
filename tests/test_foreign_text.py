"""What others wrote, read within bounds: YAML, JSON, paths, expressions and templates that are damaged or hostile."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from qaroma.cli import COMMANDS, main
from qaroma.config.load import read_settings
from qaroma.data.bounded_jinja import render_bounded
from qaroma.data.fields import BadRow, parsed_cell
from qaroma.data.labelled import _class_names
from qaroma.data.split import repeated
from qaroma.errors import QaromaError
from qaroma.text.json_text import parse_json
from qaroma.text.paths import inside, local_path
from qaroma.text.patterns import Patterns
from qaroma.text.yaml_text import read_yaml

LISTS = "a0: &a0 [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 20)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 9)}], y{i}: 1}}\n" for i in range(1, 20)
)
BAD_YAML = [
    "output: !!timestamp foo", "rank: !!int ''", "rank: !!float foo", "rank: !!bool foo", "rank: 0x_", "rank: 0b_",
    f"rank: {'9' * 5000}", "model: &a [*a]", "&a {k: *a}", "a: " + "[" * 1000, "a: " + "[" * 100_000, LISTS, MERGES,
    "output: !!binary '='", "output: !!binary aGk=", "output: !!set {a}", "!!python/object:os.system x",
    "? [a, b]\n: 1",
    'output: "\\ud800"', "a: *b", "training: {seed: !!timestamp 2024-01-01}", "x: " + "y" * 200_000,
]  # fmt: skip


@pytest.mark.parametrize("text", BAD_YAML, ids=[text[:25] for text in BAD_YAML])
def test_any_yaml_ends_in_a_sentence_soon(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    began = time.process_time()
    assert main(["finetune", "--config", str(file)]) == 2
    assert time.process_time() - began < 5
    assert str(file) in capsys.readouterr().err
    with pytest.raises(yaml.YAMLError):
        read_yaml(text)


def test_a_date_is_text() -> None:
    config = read_settings(None, {}, ["output=2024-99-99", "evaluation.prompts=[2024-01-01 25:61:61]"])
    assert (config.output, config.evaluation.prompts) == ("2024-99-99", ["2024-01-01 25:61:61"])


def test_aliases_and_merges_of_a_sensible_size_stay() -> None:
    values, _ = read_yaml("a: &a {b: 1}\nc: *a\nd: {<<: *a, e: 1e-3, f: 0o17, g: on}\n")
    assert values == {"a": {"b": 1}, "c": {"b": 1}, "d": {"b": 1, "e": "1e-3", "f": "0o17", "g": True}}


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("training.seed=10000000000000000000000", "a number at most 4.29497e\\+09"),
        ("training.micro_batch=1000000000000", "a number at most 1e\\+09"),
        ("growth.t_in=99999999999999999999", "a number at most"),
        ("training.learning_rate=1e300", "a number at most"),
        ("training.epochs=.inf", "a finite number"),
        ("data.train={path: a.jsonl, weight: 1e300}", "a number at most 1000"),
        ("data.train=a.jsonl:1e300", "a number at most 1000"),
        ("output=''", "text that is not empty"),
        ("output='  '", "text that is not empty"),
        ("data.train=''", "text that is not empty"),
        ("data.validation=''", "text that is not empty"),
        ("evaluation.prompts=['']", "text that is not empty"),
        ('model.name="a\\0b"', "text that is not empty"),
    ],
)
def test_settings_out_of_range_and_empty_texts_are_refused(setting: str, words: str) -> None:
    with pytest.raises(QaromaError, match=words):
        read_settings(None, {}, [setting])


@pytest.mark.parametrize("name", list(COMMANDS))
def test_an_empty_argument_is_refused_by_every_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--output", ""], ["--model="], [""], ["--data", " "], ["--base", ""]):
        assert main([name, *words]) == 2
        assert "got an empty text" in capsys.readouterr().err


def test_json_of_any_depth_is_a_value_error() -> None:
    for text in ("[" * 3000 + "]" * 3000, '{"a":[' * 300 + "]}" * 300, "9" * 5000, "{"):
        with pytest.raises(ValueError, match=r".+"):
            parse_json(text)
    wide, deep = [[number] for number in range(1000)], '{"a":[' * 200 + "]}" * 200
    assert parse_json(json.dumps(wide)) == wide
    assert parse_json(deep)["a"][0]["a"]


def test_paths_that_no_system_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, words in (("~nobodyhere/x", "nobody's home"), ("a" * 300, "300 bytes"), ("a\0b", "NUL"), ("", "empty")):
        with pytest.raises(QaromaError, match=words):
            local_path(text)
    long, data = "a" * 300, tmp_path / "d.jsonl"
    data.write_text('{"text": "a"}\n')
    commands = [
        ["finetune", "--model", long, "--data", str(data)], ["finetune", "--model", "~nobodyhere", "--data", str(data)],
        ["finetune", "--model", "x/y", "--data", long], ["finetune", "--config", long], ["finetune", "--config", "."],
        ["finetune", "--config", ".."], ["finetune", "--config", "/"], ["runs", long], ["report", long],
        ["generate", long, "x"], ["export", long], ["compare-runs", long, long], ["chat", "--base", long],
        ["evaluate", long, "--data", "x"], ["plan", "--model", long], ["configs", "cp", "quickstart", long],
        ["finetune", "--resume", "--output", long], ["demo", "--output", long],
        ["data", "preview", "--model", "~nobodyhere", "--data", str(data)],
    ]  # fmt: skip
    for words in commands:
        assert main(words) == 2, words
        assert "Traceback" not in capsys.readouterr().err


def test_names_that_leave_a_folder() -> None:
    assert inside("model-00001.safetensors")
    assert inside("part/model.safetensors")
    for name in ("../x", "/etc/passwd", "a/../../x", "C:\\x", "\\\\server\\x", "a\\..\\..\\x", "", None, 1, "a\0"):
        assert not inside(name)


def test_an_expression_has_an_end() -> None:
    began = time.process_time()
    with pytest.raises(QaromaError, match=r"takes too long to match; write out the names"):
        Patterns("adapter_config.json", seconds=0.5).fullmatch("(a|aa)+$", "a" * 60 + "b")
    assert time.process_time() - began < 5
    with pytest.raises(QaromaError, match="neither a name nor a regular expression"):
        Patterns("adapter_config.json").fullmatch("(", "a")
    assert Patterns("x").fullmatch(r"(.*\.)?(q_proj|v_proj)", "model.layers.0.v_proj")


TURNS = [{"role": "user", "content": "hé"}, {"role": "assistant", "content": "x"}]
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "text",
    [
        LOOPS,
        "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "{{ 'a' * 10 ** 10 }}",
        "{{ [1] * 10 ** 10 }}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ 'a'.ljust(10 ** 10) }}",
        "{{ 'a'.center(width) }}",
        "{{ 'a' | center(10 ** 10) }}",
        "{{ ['a'] | map('center', 10 ** 10) | list }}",
        "{{ ('a' | attr('zfill'))(10 ** 10) }}",
        "{{ ('\\t' * 10 ** 6).expandtabs(10 ** 6) }}",
        "{{ ('a' * 10 ** 6).replace('a', 'b' * 10 ** 6) }}",
        "{{ ('b' * 10 ** 6).join(['a'] * 10 ** 5) }}",
        "{{ range(99999) | map('string') | join('b' * 10 ** 6) }}",
        "{{ ['a' * 10 ** 6] * 10 ** 5 }}",
        "{{ (['a' * 10 ** 6] * 10 ** 5) | tojson }}",
        "{{ (['a' * 10 ** 6] * 10 ** 5) | string | length }}",
        "{{ (['a' * 10 ** 6] * 10 ** 5) | map('upper') | list | length }}",
        "{{ '%s' % (['a' * 10 ** 6] * 10 ** 5,) }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ '%*d' % (10 ** 10, 1) }}",
        "{{ '{:>9999999999}'.format(1) }}",
        "{{ '{:>{}}'.format(1, 10 ** 10) }}",
        "{{ ('{0}' * 10 ** 5).format('a' * 10 ** 6) }}",
        "{{ '{a:9999999999}'.format_map({'a': 1}) }}",
        "{{ ('%s' * 3) | format('a' * 10 ** 7, 'a' * 10 ** 7, 1) }}",
        "{{ ('a\n' * 10 ** 6) | indent('b' * 10 ** 6) }}",
        "{{ ('a\n' * 10 ** 6) | indent(10 ** 6) }}",
        "{{ ('a' * 10 ** 7) | list | length }}",
        "{{ ('a' * 10 ** 7).rfind('b' + 'a' * 10 ** 6) }}",
        "{{ ('a' * 10 ** 7).strip('b' * 10 ** 6 + 'a') }}",
        "{{ (1).to_bytes(10 ** 10, 'big') | length }}",
        "{{ 1 | round(10 ** 10, 'ceil') }}",
        "{{ ([[1] * 1000] * 10 ** 5) | sum(start=[]) | length }}",
        "{{ strftime_now('%c' * 10 ** 6) }}",
        "{% set s = 'a' * 10 ** 7 %}{{ [" + "s[1:]," * 99 + "] | length }}",
        "{% set n = namespace(s='aa') %}{% for i in range(60) %}{% set n.s = n.s.replace('a', 'aa') %}{% endfor %}",
        "{% set n = namespace(s=[1]) %}{% for i in range(60) %}{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s }}",
        "{% for i in range(99999) %}" + "words " * 9999 + "{% endfor %}",
        "{% macro m() %}" + "words " * 9999 + "{% endmacro %}{% for i in range(99999) %}{{ m() }}{% endfor %}",
    ],
)
def test_a_template_has_an_end(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qaroma.data.bounded_jinja._SECONDS", 0.3)
    began = time.process_time()
    with pytest.raises(Exception, match=r"it takes more than|it makes a text or a number"):
        render_bounded(text, messages=TURNS, width=10**10)
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    "text",
    [
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] + '\n' + m.role + '!' }}{% if not loop.last %}"
        "{{ 'a' ~ loop.index ~ m.role }}{% else %}-{% endif %}{% endfor %}{{ '%s' % 'q' }}{{ 2 * 3 + 1 }}{{ 2 ** 5 }}",
        "{% macro f(x, y='-') %}[{{ x + y }}]{% endmacro %}{% set n = namespace(a=1) %}{% for m in messages %}"
        "{% set n.a = n.a + 1 %}{{ f(m.content) }}{% endfor %}{{ n.a }}{% if add_generation_prompt %}>{% endif %}",
        "{% for m in messages %}{% generation %}{{ m.content | trim }}{% endgeneration %}{% endfor %}"
        "{{ messages|tojson }}",
        "{% for i in range(5) if i * 2 > 4 %}{{ i }}{% if i == 3 %}{% continue %}{% endif %},{% else %}none{% endfor %}"
        "{{ [1, 2] + [3] }}{{ 'ab' * 2 }}{{ ('x' if tools else 'y') + 'z' }}",
        "{{ messages[0].content.strip().upper().replace('H', '-').split('-') | map('trim') | join(',') }}"
        "{{ '%-5s|%3d%%' % ('a', 7) }}{{ '{:>5}{a}'.format(1, a=2) }}{{ messages[1:] | tojson(indent=2) }}"
        "{{ 'a\nb' | indent(2) }}{{ 'x' | center(5) }}{{ {'a': [1, 2.5, none, true]} }}{{ 2.345 | round(2) }}"
        "{{ [[1], [2]] | sum(start=[]) }}{{ messages | selectattr('role', 'in', ['user']) | list | length }}"
        "{{ messages | map(attribute='role') | join }}{{ nothing }}{{ 'q' if nothing is defined else 'r' }}",
        "{% macro m(x) %}({{ x }}{{ caller() }}){% endmacro %}{% call m('a') %}b{{ messages | length }}{% endcall %}"
        "{% set t %}{{ 'in' | upper }} a block{% endset %}{{ t[1:3] }}{% filter replace('a', 'b') %}a a{% endfilter %}"
        "{% for x in [[1, [2]], [3]] recursive %}{% if x is iterable %}{{ loop(x) }}{% else %}{{ x }}{% endif %}"
        "{% endfor %}",
    ],
)
@pytest.mark.parametrize("prompt", [True, False])
def test_bounds_change_no_template(text: str, prompt: bool) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    wanted, _ = render_jinja_template([TURNS], chat_template=text, add_generation_prompt=prompt)
    found = render_bounded(text, messages=TURNS, tools=None, documents=None, add_generation_prompt=prompt)
    assert found == wanted[0]


def test_labels_that_only_look_like_numbers() -> None:
    names = _class_names(["²", "--1", "x", "2", "10", "-3", "1" * 400], "classification")
    assert names[:3] == ("-3", "2", "10")
    assert set(names[3:]) == {"²", "--1", "x", "1" * 400}


def test_a_weight_that_leaves_nothing() -> None:
    examples = [SimpleNamespace(origin=f"a.jsonl:{line}", weight=1e-4) for line in range(100)]
    with pytest.raises(QaromaError, match=r"leave none of 100 examples \(the largest is 0.0001\)"):
        repeated(examples, seed=0)


def test_one_broken_run_hides_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = "model: {name: a}\ntraining: {max_steps: 3}\n"
    deep = "[" * 3000 + "]" * 3000
    damages: dict[str, dict[str, bytes]] = {
        "yaml": {"config.yaml": b"model: &a {name: *a}"},
        "date": {"config.yaml": b"model: {name: a}\noutput: !!timestamp x"},
        "latin": {"metrics.jsonl": b"\xff\xfe\n"},
        "list": {"metrics.jsonl": b"[1]\n"},
        "deep": {"metrics.jsonl": b'{"step": 1, "loss": 1}\n' + deep.encode()},
        "large": {"metrics.jsonl": b'{"step": 1, "loss": 1' + b"0" * 400 + b"}\n"},
        "infinite": {"summary.json": b'{"steps": 1, "trainable_parameters_start": Infinity, "seconds": 1e999}'},
        "names": {"summary.json": b'{"steps": [], "ended": {}, "metric": []}'},
        "deepsummary": {"summary.json": deep.encode()},
    }
    for name, files in damages.items():
        (tmp_path / name).mkdir()
        for file, content in ({"config.yaml": whole.encode()} | files).items():
            (tmp_path / name / file).write_bytes(content)
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "config.yaml").write_text(whole)
    for words in ([], ["--json"]):
        assert main(["runs", str(tmp_path), *words]) == 0
    listed = json.loads(capsys.readouterr().out.splitlines()[-1])["runs"]
    assert {run["name"] for run in listed} == {*damages, "good"}
    assert {run["name"] for run in listed if run["state"] == "broken"} == {"yaml", "date", "latin", "list", "large"}


def test_a_folder_that_may_not_be_read_hides_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("good", "locked"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("model: {name: a}\n")
    stat, listed, read = Path.stat, Path.iterdir, Path.read_text

    def guarded(function: Any) -> Any:
        def call(path: Path, *arguments: Any, **options: Any) -> Any:
            if "locked" in path.parts and path.name != "locked":
                raise PermissionError(13, "Permission denied", str(path))
            return function(path, *arguments, **options)

        return call

    monkeypatch.setattr(Path, "stat", guarded(stat))
    assert main(["runs", str(tmp_path)]) == 0
    assert "good" in capsys.readouterr().out
    monkeypatch.setattr(Path, "stat", stat)
    monkeypatch.setattr(Path, "read_text", guarded(read))
    monkeypatch.setattr(Path, "iterdir", guarded(listed))
    assert main(["runs", str(tmp_path), "--json"]) == 0
    runs = {run["name"]: run["state"] for run in json.loads(capsys.readouterr().out)["runs"]}
    assert runs == {"good": "stopped", "locked": "broken"}


@pytest.mark.parametrize("cell", ["[{[1]: 2}]", "[{{1}}]", "[" * 500, "[" * 3000 + "]" * 3000, "[" + "9" * 5000 + "]"])
def test_a_cell_that_begins_as_a_list_may_be_text(cell: str) -> None:
    with contextlib.suppress(BadRow):
        assert parsed_cell(cell) == cell
