"""`push` against a small hub on loopback that speaks what huggingface_hub asks of the real one."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from export_adapters import save_random_adapter
from huggingface_hub import constants

from qaroma.cli import main
from qaroma.errors import QaromaError
from qaroma.export.push import public_base, public_path, push
from qaroma.model.base import load_base
from qaroma.runs.adapter import load_adapter

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "hf_secretsecretsecretsecret"
SENT = {"README.md", "adapter_config.json", "adapter_model.safetensors", "growth.json", "rank_map.svg"}
BASE = "org/tiny"


@dataclass
class Hub:
    """The hub's memory, and what it is told to answer.

    ``fail`` maps the beginning of a path to a status and a message; ``lfs`` holds uploaded contents.
    """

    url: str = ""
    private: dict[str, bool] = field(default_factory=lambda: {BASE: False})
    gated: set[str] = field(default_factory=set)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: list[str] = field(default_factory=list)
    commits: list[dict[str, Any]] = field(default_factory=list)
    lfs: dict[str, bytes] = field(default_factory=dict)
    fail: dict[str, tuple[int, str]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    """The endpoints that a push needs."""

    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, value: Any = None, **headers: str) -> None:
        body = json.dumps(value if value is not None else {}).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(body)

    def handle_one(self) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.requests.append(f"{self.command} {path}")
        failure = next((answer for start, answer in hub.fail.items() if path.startswith(start)), None)
        if failure is not None:
            return self.answer(failure[0], {"error": failure[1]})
        if path.startswith("/lfs/"):
            assert hashlib.sha256(body).hexdigest() == path[5:]
            hub.lfs[path[5:]] = body
            return self.answer(200)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        return self.route(path, body)

    do_GET = do_POST = do_PUT = handle_one

    def route(self, path: str, body: bytes) -> None:
        hub = self.hub
        if path == "/api/whoami-v2":
            return self.answer(200, {"name": "me", "type": "user"})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization'] or 'me'}/{wanted['name']}"
            hub.private[name] = wanted.get("visibility") == "private" or wanted.get("private", False)
            return self.answer(200, {"url": f"{hub.url}/{name}"})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{hub.url}/lfs/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self.answer(200, {"transfer": "basic", "objects": objects})
        parts = path.removeprefix("/api/models/").split("/")
        name, action, branch = "/".join(parts[:2]), parts[2] if len(parts) > 2 else "", parts[-1]
        if name not in hub.private:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        if action == "":
            card = {"license": "apache-2.0"} if name == BASE else {}
            gated = "manual" if name in hub.gated else False
            return self.answer(200, {"id": name, "private": hub.private[name], "cardData": card, "gated": gated,
                                     "siblings": [], "tags": []})  # fmt: skip
        if action == "branch":
            hub.branches.append(branch)
            return self.answer(200)
        if action == "preupload":
            modes = [{"path": one["path"], "shouldIgnore": False,
                      "uploadMode": "lfs" if one["path"].endswith((".safetensors", ".gguf")) else "regular"}
                     for one in json.loads(body)["files"]]  # fmt: skip
            return self.answer(200, {"files": modes})
        assert action == "commit"
        return self.commit(name, branch, [json.loads(line) for line in body.splitlines()])

    def commit(self, name: str, branch: str, lines: list[dict[str, Any]]) -> None:
        hub = self.hub
        stored = hub.files.setdefault(name, {})
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                hub.commits.append({"repo": name, "branch": branch, **value})
            elif line["key"] == "file":
                stored[value["path"]] = base64.b64decode(value["content"])
            else:
                stored[value["path"]] = hub.lfs[value["oid"]]
        self.answer(200, {"commitUrl": f"{hub.url}/{name}/commit/abc", "commitOid": "abc", "success": True})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    found = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": found}))
    found.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", found.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield found
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory: an adapter of a local base, a log, a checkpoint, data of this machine."""
    path = tmp_path_factory.mktemp("runs") / "counting"
    save_random_adapter(tiny_folder, path / "adapter")
    secret = str(path.parent / "customers.jsonl")
    config = {"model": {"name": str(tiny_folder)}, "data": {"train": [{"path": secret, "weight": 2.0}]}}
    (path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    records = [
        {"event": "validation", "step": 0, "loss": 2.5},
        {"step": 1, "loss": 1.0, "trainable_parameters": 10},
        {"event": "validation", "step": 1, "loss": 1.25},
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    (path / "checkpoints" / "step-00000001").mkdir(parents=True)
    (path / "checkpoints" / "step-00000001" / "state.json").write_text("{}")
    return path


def test_a_push_makes_a_private_repository_with_the_adapter_and_a_card(
    hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(run), "counting", "--base", BASE]) == 0
    assert hub.private["me/counting"] is True
    files = hub.files["me/counting"]
    assert set(files) == SENT
    assert files["adapter_model.safetensors"] == (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == BASE
    card = files["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert (front["base_model"], front["license"], front["library_name"]) == (BASE, "apache-2.0", "peft")
    assert 'PeftModel.from_pretrained(base, "me/counting")' in card
    assert "FOLDER" not in card
    assert "customers.jsonl (weight 2)" in card
    assert "2.5 before, 1.25 after" in card
    assert hub.commits[0]["summary"].startswith("Upload counting, fine-tuned with qaroma")
    out, err = capsys.readouterr()
    assert f"{hub.url}/me/counting (private), 5 files" in out
    assert f'base = AutoModelForCausalLM.from_pretrained("{BASE}")' in out
    assert 'model = PeftModel.from_pretrained(base, "me/counting")' in out
    assert TOKEN not in out + err


def test_nothing_of_this_machine_is_sent(hub: Hub, run: Path, tiny_folder: Path) -> None:
    said: list[str] = []
    pushed = push(run, "me/counting", say=said.append)
    assert pushed.base is None
    assert "a folder of this machine: others cannot find it" in said[0]
    assert "--base NAMESPACE/NAME" in said[0]
    for name, content in hub.files["me/counting"].items():
        for secret in (run.parent, tiny_folder, tiny_folder.parent, Path.home(), ROOT):
            assert str(secret).encode() not in content, name
        assert TOKEN.encode() not in content
    growth = json.loads(hub.files["me/counting"]["growth.json"])
    assert growth["base"]["name"] == tiny_folder.name
    assert json.loads(hub.files["me/counting"]["adapter_config.json"])["base_model_name_or_path"] is None
    assert "base_model" not in yaml.safe_load(hub.files["me/counting"]["README.md"].decode().split("---")[1])


def test_what_was_pushed_is_an_adapter_of_qaroma_and_of_peft(
    hub: Hub, run: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel

    push(run, "me/counting", base=BASE)
    for name, content in hub.files["me/counting"].items():
        (tmp_path / name).write_bytes(content)
    ids = torch.arange(3, 30)[None]
    models = [load_base(tiny_folder, quantization="none", compute_dtype=torch.float32, device="cpu") for _ in "ab"]
    load_adapter(models[0], tmp_path)
    theirs = PeftModel.from_pretrained(models[1], str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, models[0](ids).logits, rtol=1e-4, atol=1e-4)


def test_branch_message_visibility_gguf_and_json(
    hub: Hub, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(QaromaError, match="--format gguf-adapter"):
        push(run, "me/x", include_gguf=True)
    assert hub.requests == []
    folder = run / "export" / "gguf-adapter"
    folder.mkdir(parents=True)
    (folder / "adapter.gguf").write_bytes(b"GGUF")
    arguments = ["team/x", "--public", "--revision", "second", "--include-gguf", "--base", BASE, "--json"]
    assert main(["push", str(run), *arguments, "--message", "A second attempt"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["repo_id"], figures["private"], figures["revision"]) == ("team/x", False, "second")
    assert hub.private["team/x"] is False
    assert hub.branches == ["second"]
    assert (hub.commits[0]["branch"], hub.commits[0]["summary"]) == ("second", "A second attempt")
    assert set(hub.files["team/x"]) == {*SENT, "adapter.gguf"} == set(figures["files"])


def test_a_rehearsal_lists_what_would_go_and_asks_no_hub(
    hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert main(["push", str(run), "mine", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("would be sent to mine, ")
    assert {"  adapter_model.safetensors", "  README.md", "  growth.json"} <= set(lines[1:])
    assert not hub.requests


def test_visibility_is_never_changed(hub: Hub, run: Path) -> None:
    hub.private.update({"me/open": False, "me/closed": True})
    with pytest.raises(QaromaError, match=r"exists and is public.*Type --public"):
        push(run, "me/open", base=BASE)
    with pytest.raises(QaromaError, match=r"exists and is private; --public does not change that"):
        push(run, "me/closed", base=BASE, public=True)
    assert hub.files == {}
    push(run, "me/open", base=BASE, public=True)
    push(run, "me/closed", base=BASE)
    assert {name: hub.private[name] for name in hub.files} == {"me/open": False, "me/closed": True}
    assert "POST /api/repos/create" not in hub.requests


@pytest.mark.parametrize(
    ("fails", "expected"),
    [
        ({"/api/whoami-v2": (401, "Invalid credentials")}, "hf auth login --force"),
        ({"/api/repos/create": (403, "no rights here")}, r"may not write to 'me/x' .*rights.*settings/tokens"),
        ({"/api/repos/create": (402, "Private storage limit reached")}, "status 402.*storage limit"),
        ({"/api/models/me/x/commit": (403, "read-only token")}, "write access.*has been made and is empty"),
        ({"/api/models/me/x/commit": (404, "gone")}, "knows no repository 'me/x'"),
        ({"/api/models/me/x/commit": (500, "oops")}, r"a problem of its own \(status 500\)"),
        ({"/api/models/me/x/commit": (412, "changed")}, "status 412"),
        ({"/lfs/": (403, "expired")}, "may not write"),
        ({"/api/validate-yaml": (400, "bad")}, "refuses the model card"),
    ],
)  # fmt: skip
def test_each_refusal_is_a_sentence(
    fails: dict[str, tuple[int, str]], expected: str, hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.fail.update(fails)
    with pytest.raises(QaromaError, match=expected):
        push(run, "me/x", base=BASE)
    assert main(["push", str(run), "me/x", "--base", BASE]) == 2
    out, err = capsys.readouterr()
    assert TOKEN not in out + err
    assert hub.files == {}


@pytest.mark.parametrize("name", ["a/b/c", "with space", "-x", "é/x", "me/x.git", ""])
def test_a_name_that_is_none_is_told_before_anything_is_asked(name: str, hub: Hub, run: Path) -> None:
    with pytest.raises(QaromaError, match="is no name of a repository"):
        push(run, name, base=BASE)
    assert hub.requests == []


def test_who_is_not_logged_in_is_told_how(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(QaromaError, match="nobody is logged in to the hub; type: hf auth login"):
        push(run, "me/x", base=BASE)
    assert hub.requests == []


def test_offline_and_unreachable_are_told_apart(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(QaromaError, match="cannot be reached, so nothing was published"):
        push(run, "me/x", base=BASE, endpoint="http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(QaromaError, match="HF_HUB_OFFLINE is set"):
        push(run, "me/x", base=BASE)
    assert hub.requests == []


def test_a_gated_or_missing_base_is_a_warning(hub: Hub, run: Path) -> None:
    said: list[str] = []
    hub.gated.add(BASE)
    push(run, "me/x", base=BASE, say=said.append)
    push(run, "me/x", base="org/nowhere", say=said.append)
    assert "the base 'org/tiny' is gated" in said[0]
    assert "the base 'org/nowhere' is not on the hub" in said[1]
    with pytest.raises(QaromaError, match="lies on this machine"):
        push(run, "me/x", base=str(run))


def test_a_classifier_is_loaded_as_one(hub: Hub, run: Path, tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((run / "adapter" / name).read_bytes())
    growth = json.loads((run / "adapter" / "growth.json").read_text())
    del growth["template"], growth["sha256"]
    growth.update(task="classification", labels=["no", "yes", "maybe"])
    (tmp_path / "growth.json").write_text(json.dumps(growth))
    pushed = push(tmp_path, "me/x", base=BASE)
    line = 'base = AutoModelForSequenceClassification.from_pretrained("org/tiny", num_labels=3)'
    card = hub.files["me/x"]["README.md"].decode()
    assert line in card
    assert line in pushed.loading
    assert "AutoModelForCausalLM" not in card


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("org/model", "org/model"),
        ("gpt2", "gpt2"),
        ("/home/x/.cache/huggingface/hub/models--org--my-model/snapshots/0123", "org/my-model"),
        ("/home/x/model", None),
        ("C:\\models\\x", None),
        ("./model", None),
        ("model.gguf", None),
    ],
)
def test_the_base_is_named_as_others_find_it(name: str, expected: str | None) -> None:
    assert public_base(name) == expected


def test_data_is_named_without_its_folders(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    assert public_path("demo:calendar") == "demo:calendar"
    assert public_path("org/data") == "org/data"
    assert public_path("customers/list.jsonl") == "list.jsonl"
    assert public_path("C:\\customers\\list.jsonl") == "list.jsonl"
    assert public_path(str(tmp_path / "mine")) == "mine"
