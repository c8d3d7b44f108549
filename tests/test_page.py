"""`qaroma page`: who may speak to it, what may be named, and what each screen says and runs. No browser, no model."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urljoin

import pytest
from starlette import testclient
from starlette.requests import Request
from test_run_table import write_run

from qaroma.cli import main
from qaroma.errors import QaromaError
from qaroma.page import places
from qaroma.page.choices import DEMO, Choice
from qaroma.page.commands import Jobs, answer_of, shown
from qaroma.page.models import Machine, models_for
from qaroma.page.places import LOGS, RUNS, UPLOADS
from qaroma.page.screens import Screens
from qaroma.page.server import make_app
from qaroma.page.talk import Talk
from qaroma.runs.reading import read_run

TOKEN, PORT = "secret-token", 8123
HOST = f"127.0.0.1:{PORT}"
OURS = {"Origin": f"http://{HOST}"}
EVIL = "<script>alert(1)</script>"


@pytest.fixture
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


TOLD = {"sentences": {"takes": "about 12 minutes on one RTX 3060 by arithmetic"}, "decisions": [], "examples": []}


@pytest.fixture
def page(working_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The page, whose screens wait for no command."""
    monkeypatch.setattr("qaroma.page.screens.answer_of", lambda words: TOLD)
    app = make_app(TOKEN, PORT, Machine(8 * 2**30, "a card"))
    return testclient.TestClient(app, base_url=f"http://{HOST}/{TOKEN}/", raise_server_exceptions=False)


def put(name: str, text: str) -> None:
    UPLOADS.mkdir(parents=True, exist_ok=True)
    (UPLOADS / name).write_text(text, encoding="utf-8")


def wait_for(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("url", "headers", "why"),
    [
        (f"http://{HOST}/", {}, "whole"),
        (f"http://{HOST}/wrong/", {}, "whole"),
        (f"http://{HOST}/{TOKEN}x/", {}, "whole"),
        (f"http://{HOST}//{TOKEN}/", {}, "whole"),
        (f"http://evil.example/{TOKEN}/", {}, "127.0.0.1"),
        (f"http://127.0.0.1:1/{TOKEN}/", {}, "127.0.0.1"),
        ("", {"Origin": "http://evil.example"}, "another page"),
        ("", {"Origin": f"https://{HOST}"}, "another page"),
        ("", {"Origin": "null"}, "another page"),
        ("", {"Sec-Fetch-Site": "cross-site"}, "another page"),
        ("", {"Sec-Fetch-Site": "same-site"}, "another page"),  # another port of this machine
    ],
)
def test_others_are_refused(page: Any, url: str, headers: dict[str, str], why: str) -> None:
    answer = page.get(url, headers=headers)
    assert answer.status_code == 403
    assert why in answer.text


def test_what_changes_something_says_where_it_comes_from(page: Any) -> None:
    for headers in ({}, {"Origin": "null"}, {"Origin": "http://127.0.0.1:1"}):
        assert page.post("run/one/stop", headers=headers).status_code == 403
        assert page.put("upload?name=a.txt", content=b"x", headers=headers).status_code == 403
    assert not UPLOADS.exists()


def test_there_is_no_websocket_with_or_without_the_token(page: Any) -> None:
    for path in (f"/{TOKEN}/", f"/{TOKEN}/run/one/events", "/"):
        with (
            pytest.raises(testclient.WebSocketDisconnect),
            page.websocket_connect(f"ws://{HOST}{path}", headers=OURS),
        ):
            pass


def test_every_answer_forbids_all_but_our_own_script(page: Any) -> None:
    for address in ("", "data?data=none.csv", f"http://{HOST}/", "static/page.js"):
        answer = page.get(address)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'; script-src 'self'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
    screens = {"": "Data", f"data?data={DEMO}": "Data", f"model?data={DEMO}": "Model", f"plan?data={DEMO}": "Run"}
    for address, step in screens.items():
        screen = page.get(address)
        assert screen.status_code == 200
        assert f'aria-current="step">{step}<' in screen.text
        assert "http" not in screen.text.replace(OURS["Origin"], "")  # nothing is asked for elsewhere
        assert screen.text.count("<script") == 1
        assert screen.text.count('class="main"') + screen.text.count("button main") == 1
    assert "about 12 minutes on one RTX 3060 by arithmetic" in screen.text


def test_an_upload_stays_in_its_folder(page: Any) -> None:
    def upload(name: str, text: bytes = b"a,b\n1,2\n") -> Any:
        return page.put("upload", params={"name": name}, content=text, headers=OURS)

    assert upload("my rows (1).csv").text == "data?data=my-rows-1-.csv"
    assert upload("my rows (1).csv").text == "data?data=my-rows-1--2.csv"
    names = ("../out.csv", "/etc/out.csv", "..\\out.csv", ".hidden.csv", "", "a\0.csv", "run.sh", "page.html", "csv")
    for name in names:
        answer = upload(name)
        assert answer.status_code == 400, name
        assert answer.text.startswith("got "), name
    assert {path.parent.name for path in UPLOADS.parent.rglob("*.csv*")} == {"data"}


def test_too_large_an_upload_is_refused_and_leaves_nothing(page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "LARGEST_UPLOAD", 10)

    def pieces() -> Any:  # without a length, as a client may send it
        yield from (b"x" * 6, b"x" * 6)

    for content in (b"x" * 11, pieces()):
        answer = page.put("upload?name=a.txt", content=content, headers=OURS)
        assert answer.status_code == 400
        assert "command line" in answer.text
        assert not list(UPLOADS.glob("*"))
    assert page.put("upload?name=a.txt", content=b"x" * 10, headers=OURS).text == "data?data=a.txt"


def test_a_name_that_leads_elsewhere_is_refused(page: Any, tmp_path: Path) -> None:
    (tmp_path / "secret.csv").write_text("prompt,completion\na,b\n")
    write_run(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "report.html").write_text("secret")
    put("mine.csv", "prompt,completion\na,b\n")
    (UPLOADS / "link.csv").symlink_to(tmp_path / "secret.csv")
    write_run(RUNS / "one")
    (RUNS / "link").symlink_to(tmp_path / "elsewhere")
    (RUNS / "one" / "report.html").symlink_to(tmp_path / "secret.csv")
    for name in ("../../secret.csv", str(tmp_path / "secret.csv"), "link.csv", "", "..", ".", "mine.csv/", "--help"):
        answer = page.get("data", params={"data": name})
        assert answer.status_code == 400, name
        assert "<h1>That did not work</h1>" in answer.text
    with pytest.raises(QaromaError, match="expected one of something in runs"):
        places.inside(RUNS, "..")
    for name in ("..%2f..%2fsecret", "link", "-x"):
        assert page.get(f"run/{name}").status_code in (400, 404), name
        assert page.get(f"run/{name}/report").status_code in (400, 404), name
    assert page.get("run/one/report").status_code == 400
    assert page.post(f"run/-x/start?data={DEMO}", headers=OURS).status_code == 400
    assert page.post("run/one/bin", headers=OURS).status_code in (404, 405)
    assert not list(LOGS.glob("*"))


def test_the_data_screen_says_the_form_or_guesses_the_columns(page: Any) -> None:
    put("known.csv", "prompt,completion\na,b\n")
    put("odd.csv", f"asked,{EVIL},when\na,b,c\n")
    put("pairs.jsonl", json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    put("broken.json", "{")
    known = page.get("data?data=known.csv").text
    assert "These are questions with their answers." in known
    assert "<select" not in known
    assert "qaroma data preview --model smollm2-135m --data qaroma-page/data/known.csv --examples 3" in known
    odd = page.get("data?data=odd.csv").text
    assert odd.count("selected") == 2
    assert EVIL not in odd
    assert "--columns &#39;prompt=asked,completion=&lt;script" in odd or "prompt=asked,completion=&lt;script" in odd
    assert "completion=when" in page.get("data?data=odd.csv&prompt=asked&completion=when").text
    assert "--task preference" in page.get("data?data=pairs.jsonl").text
    assert "--skip-bad-rows" not in known
    skipping = page.get("data?data=odd.csv&skip=1").text
    assert '<input type="hidden" name="skip" value="1">' in skipping
    assert "--skip-bad-rows --examples 3" in skipping
    broken = page.get("data?data=broken.json").text  # the command that is asked says what is wrong
    assert "qaroma data preview --model smollm2-135m --data qaroma-page/data/broken.json --examples 3" in broken
    assert "<select" not in broken


def test_the_choices_become_the_command_that_is_shown_and_run(page: Any, monkeypatch: Any) -> None:
    put("odd.csv", "asked,said\na,b\n")
    started: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(Jobs, "start", lambda _, name, words: started.append((name, words)))
    plan = page.get("plan?data=odd.csv&model=smollm2-135m&other=my/model").text
    line = 'qaroma finetune --model my/model --data qaroma-page/data/odd.csv --columns "prompt=asked,completion=said" '
    assert (line + "--output runs/model-odd").replace('"', "&#34;") in plan
    buttons = {
        "start?data=odd.csv&model=my/model": ("model-odd", f"{line}--output runs/model-odd"),
        "resume": ("model-odd", "qaroma finetune --resume --output runs/model-odd"),
        "gguf": ("model-odd.export", "qaroma export runs/model-odd --format gguf --outtype q8_0"),
    }
    for button, (job, shown_line) in buttons.items():
        answer = page.post(f"run/model-odd/{button}", headers=OURS, follow_redirects=False)
        assert answer.status_code == 303
        assert urljoin(str(answer.url), answer.headers["location"]).endswith(f"/{TOKEN}/run/model-odd")
        name, words = started.pop()
        assert (name, shown(words)) == (job, shown_line)
    write_run(RUNS / "model-odd")
    assert "runs/model-odd-2" in page.get("plan?data=odd.csv&model=my/model").text


def test_a_run_is_shown_as_it_stands(page: Any) -> None:
    done, half = write_run(RUNS / "done"), write_run(RUNS / "half", finished=False)
    (done / "adapter" / "growth.json").touch()
    (done / "report.html").write_text(f"<h1>report</h1>{EVIL}")
    finished = page.get("run/done").text
    assert "<h1>It is done</h1>" in finished  # the report in the frame below has its own heading
    assert "Chat with it" in finished
    assert "data-at-work" not in finished
    report = page.get("run/done/report")
    assert report.headers["content-security-policy"].endswith("sandbox")  # a script in it does not run
    assert "script-src" not in report.headers["content-security-policy"]
    LOGS.mkdir(parents=True)
    (LOGS / "done.export.log").write_text("qaroma export runs/done\nwrote it")
    assert "Written</b></p><pre>qaroma export runs/done\nwrote it" in page.get("run/done").text
    assert '<iframe title="Report of the run" sandbox' in finished
    assert '<a href="run/done/report" target="_blank">' in finished
    (half / "report.html").touch()
    stopped = page.get("run/half").text
    assert "too little to chat with yet" in stopped
    assert "Use it elsewhere" not in stopped
    assert "<iframe" not in stopped  # it would say that nothing is learnt
    assert "Stopped at step 4 of 8<" in stopped
    assert f"qaroma finetune --resume --output {half.as_posix()}" in stopped
    assert "There is no run of this name." in page.get("run/none").text
    home = page.get("").text
    assert "run/done" in home
    assert "4 of 8 steps" in home


HOLDER = """
import pathlib, sys, time
from qaroma.runs.lock import locked
with locked(pathlib.Path(sys.argv[1])):
    time.sleep(60)
"""


def test_another_page_finds_a_run_at_work_and_stops_it(page: Any) -> None:
    run = write_run(RUNS / "one", finished=False)
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(run)])
    try:
        wait_for(lambda: read_run(run).state == "running")
        shown_run = page.get("run/one").text
        assert "data-at-work>It is learning<" in shown_run  # so that it is asked for again
        assert "about 0 min 08 s left" in shown_run  # four steps of two seconds
        assert "at work" in page.get("").text
        assert "one is at work" in page.get(f"plan?data={DEMO}").text
        assert page.post("run/one/stop", headers=OURS, follow_redirects=False).status_code == 303
        assert holder.wait(timeout=60) != 0
    finally:
        holder.kill()
        holder.wait()
    assert read_run(run).state == "stopped"


@pytest.mark.parametrize("lock", [{}, {"pid": os.getpid()}, {"pid": os.getpid(), "host": "elsewhere"}, {"pid": "x"}])
def test_a_lock_that_names_no_run_of_this_machine_stops_nothing(working_folder: Path, lock: dict[str, Any]) -> None:
    run = write_run(RUNS / "one", finished=False)
    (run / "run.lock").write_text(json.dumps(lock))
    Jobs().stop(run)  # would be this process


def test_a_job_outlives_the_page_and_keeps_its_words(working_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os, sys; print(os.getsid(0) == os.getpid()); print('noise'); print('error: got 1\\nexpected 2')"
    monkeypatch.setattr("qaroma.page.commands.argv", lambda words: [sys.executable, "-c", code])
    jobs = Jobs()
    jobs.start("one", ["finetune", "--data", "a b"])
    wait_for(lambda: not jobs.working("one"))
    assert jobs.said("one").splitlines()[:3] == ['qaroma finetune --data "a b"', "True", "noise"]
    assert jobs.failure("one") == "got 1\nexpected 2"
    assert Jobs().failure("one") == "got 1\nexpected 2"  # another page
    assert jobs.failure("none") is None


def test_an_error_of_a_command_is_shown_as_it_is(page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qaroma.page.screens.answer_of", answer_of)
    assert "there is no folder nowhere" in answer_of(["runs", "nowhere"])["error"]
    put("a.csv", "prompt,completion\na,b\n")
    screen = page.get("data?data=a.csv&model=./nowhere").text
    assert "There is no folder &#39;./nowhere&#39;" in screen
    assert "Go on" not in screen
    assert "Choose another file" in screen
    error = "2 of 9 rows cannot be used. Mend them, or type --skip-bad-rows to go on without them."
    monkeypatch.setattr("qaroma.page.screens.answer_of", lambda _: {"error": error})
    skip = (
        '<a class="button main" href="data?data=a.csv&amp;model=smollm2-135m&amp;skip=1">Go on without these rows</a>'
    )
    assert skip in page.get("data?data=a.csv").text
    monkeypatch.setattr("qaroma.page.screens.answer_of", answer_of)
    plan = page.get("plan?data=a.csv&model=./nowhere").text
    assert "There is no folder &#39;./nowhere&#39;" in plan
    assert 'href="model?data=a.csv&amp;model=.%2Fnowhere">Choose another model<' in plan


def test_models_that_fit_the_ones_here_first(tmp_path: Path) -> None:
    def cached(name: str, **config: Any) -> None:
        snapshot = tmp_path / f"models--{name.replace('/', '--')}" / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text(json.dumps(config))
        (snapshot / "model.safetensors").touch()

    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
             "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True}  # fmt: skip
    cached("own/small", architectures=["LlamaForCausalLM"], **sizes)
    cached("own/huge", architectures=["LlamaForCausalLM"], **{**sizes, "num_hidden_layers": 1600})
    cached("own/odd", architectures=["OddForCausalLM"])
    cached("own/encoder", architectures=["BertForMaskedLM"])
    card = models_for(Machine(6 * 2**30, "a card"), tmp_path)
    here = [model.name for model in card if model.here]
    assert here[0] == "smollm2-135m"
    assert set(here[1:]) == {"own/small", "own/odd"}
    small = next(model for model in card if model.name == "own/small")
    assert small.parameters == 1_235_814_400 - 67_584  # Llama-3.2-1B without its norms
    fetched = [model.name for model in card if not model.here]
    assert "meta-llama/Meta-Llama-3-8B" in fetched
    assert "Qwen/Qwen3-14B" not in fetched
    assert [model.parameters for model in card if not model.here] == sorted(m.parameters for m in card if not m.here)
    slow = models_for(Machine(64 * 2**30, None), tmp_path / "none")
    assert max(model.parameters for model in slow) < 2 * 10**9


ANSWERS = """
import json, sys, time
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if asked.get("message") == "die":
        print("noise\\nerror: the card is full", file=sys.stderr)
        sys.exit(2)
    for _ in range(3 if "message" in asked else 0):
        print(json.dumps({"from": "tuned", "piece": asked["message"]}), flush=True)
    print(json.dumps({"done": True}), flush=True)
"""


def test_a_talk_is_one_process_and_an_answer_left_alone_is_no_ones_else(
    working_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qaroma.page.talk.argv", lambda words: [sys.executable, "-c", ANSWERS])

    async def collected(lines: AsyncIterator[str]) -> list[dict[str, Any]]:
        return [json.loads(line) async for line in lines]

    async def talk() -> None:
        one, run = Talk(), Path("runs/one")
        assert await collected(one.answer(run, "")) == [{"ready": True}, {"done": True}]
        assert [line.get("piece") for line in await collected(one.answer(run, "a"))] == ["a", "a", "a", None]
        assert {"ready": True} not in await collected(one.answer(run, ""))  # it is loaded, and forgets what was said
        abandoned = one.answer(run, "b")
        await anext(abandoned)
        await abandoned.aclose()
        assert [line.get("piece") for line in await collected(one.answer(run, "c"))] == [None, "c", "c", "c", None]
        assert await collected(one.answer(run, "die")) == [{"error": "the card is full"}]
        assert {"ready": True} in await collected(one.answer(Path("runs/two"), ""))
        one.end()
        await asyncio.sleep(0.1)

    asyncio.run(talk())


def test_a_start_gives_the_memory_of_the_talk_to_the_run(page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qaroma.page.talk.argv", lambda words: [sys.executable, "-c", ANSWERS])
    monkeypatch.setattr(Jobs, "start", lambda *_: None)
    with page:  # one loop for all requests

        def said(message: str) -> list[dict[str, Any]]:
            answer = page.post("run/one/talk", content=message, headers=OURS)
            return [json.loads(line) for line in answer.text.splitlines()]

        assert {"ready": True} in said("")
        assert {"ready": True} not in said("a")
        page.post(f"run/two/start?data={DEMO}", headers=OURS, follow_redirects=False)
        assert {"ready": True} in said("a")
        page.post(f"run/two/start?data={DEMO}", headers=OURS, follow_redirects=False)


def test_choices_survive_the_way_through_addresses(working_folder: Path) -> None:
    put("odd.csv", "a&b,c=d\n1,2\n")
    choice = Choice.read({"data": "odd.csv", "model": "./a folder"})
    for one in (choice, choice.skipping):
        assert Choice.read(dict(parse_qsl(urlencode(one.fields)))) == one


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("qaroma.cli.page.importlib.util.find_spec", lambda name: None)
    assert main(["page"]) == 2
    assert "pip install 'qaroma[page]'" in capsys.readouterr().err


def test_a_taken_port_is_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["page", "--no-browser", "--port", str(taken.getsockname()[1])]) == 2
    assert "leave --port out for a free one" in capsys.readouterr().err


def test_a_screen_is_sent_as_far_as_it_is_known_while_its_command_works(
    working_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []

    def asked(words: list[str]) -> dict[str, Any]:
        assert words[:2] == ["data", "preview"]
        assert "Reading your rows" in "".join(sent)
        return {"error": "no such model"}

    async def collect() -> None:
        request = Request(
            {"type": "http", "path": f"/{TOKEN}/data", "headers": [], "query_string": b"data=demo:calendar"}
        )
        async for piece in Screens(Machine(1, None)).data(request).body_iterator:  # type: ignore[attr-defined]
            sent.append(piece)

    monkeypatch.setattr("qaroma.page.screens.answer_of", asked)
    asyncio.run(collect())
    assert '<p class="error">no such model</p>' in "".join(sent)
