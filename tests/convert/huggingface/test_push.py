"""Uploads to the Hub: what is sent, and the real client of the Hub against a server of our own on this machine."""

import base64
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from commands import report, run
from merging_tokenizer import write_tiny

from convert.__main__ import main as convert
from convert.huggingface.push import check_push, plan_upload, push_to_hub
from gluprune_jax.errors import OperationError, RequestError
from gluprune_jax.prune import main as prune

CARD = "---\nlicense: mit\ntags: [gluprune, pruned, llama]\n---\n# A model\n"
FILES = {
    "config.json": b"{}",
    "model-00001-of-00002.safetensors": b"first",
    "model-00002-of-00002.safetensors": b"second",
    "model.safetensors.index.json": b"{}",
    "README.md": CARD.encode(),
    "tokenizer.json": b"{}",
    "additional_chat_templates/tool_use.jinja": b"{{ messages }}",
}
FOREIGN = {".env": b"HF_TOKEN=hf_secret", "notes/diary.txt": b"dear", "train.py": b"print()"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    for name, content in {**FILES, **FOREIGN}.items():
        path = tmp_path / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "model"


class Hub(http.server.ThreadingHTTPServer):
    """As much of the Hub as an upload needs. Every file goes into the commit itself, as small ones do there."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.commits = 0
        self.status = 200  # of what writes


class _Answers(http.server.BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, content: Any, status: int = 200, **headers: str) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        assert self.headers["Authorization"] == "Bearer hf_test"
        name = "/".join(self.path.split("?")[0].split("/")[3:5])
        if name not in self.server.repositories:
            self.answer({"error": "Repository not found"}, 404, **{"X-Error-Code": "RepoNotFound"})
            return
        files = [{"rfilename": file} for file in self.server.repositories[name]]
        private = name in self.server.private
        self.answer({"id": name, "private": private, "siblings": files, "sha": "0" * 40, "tags": [], "downloads": 0})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if self.path.startswith("/api/validate-yaml"):
            self.answer({"errors": [], "warnings": []})
        elif self.server.status != 200:
            self.answer({"error": "no"}, self.server.status)
        elif self.path.startswith("/api/repos/create"):
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if asked.get("private") or asked.get("visibility") == "private":
                self.server.private.add(name)
            known = name in self.server.repositories
            self.server.repositories.setdefault(name, {".gitattributes": b""})
            self.answer({"url": f"{self.root()}/{name}"}, 409 if known else 200)
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        else:
            self.commit("/".join(self.path.split("/")[3:5]), body)

    def commit(self, name: str, body: str) -> None:
        files = self.server.repositories[name]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.server.commits += 1
        self.answer({"commitUrl": f"{self.root()}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40})

    def root(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        for module in (huggingface_hub.constants, huggingface_hub.hf_api):
            monkeypatch.setattr(module, "ENDPOINT", endpoint, raising=False)
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_test")
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        yield server
        server.shutdown()
        thread.join()


def test_a_dry_run_asks_nobody(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda *_: pytest.fail("asked"))
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: pytest.fail("asked"))
    upload = push_to_hub(model, "me/model", private=True, dry_run=True)
    assert set(upload.files) == set(FILES)
    assert upload.nbytes == sum(map(len, FILES.values()))
    assert set(upload.left_out) == set(FOREIGN)
    assert upload.private
    assert upload.has_card


def test_a_gguf_file_is_a_model_too(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "beside.gguf").write_bytes(b"GGUF")
    upload = plan_upload(tmp_path / "model.gguf", "me/model")
    assert list(upload.files) == ["model.gguf"]
    assert not upload.has_card


def test_what_is_no_model(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="there is no model"):
        plan_upload(tmp_path / "nothing", "me/model")
    for path in model.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(RequestError, match="holds no weights"):
        plan_upload(model, "me/model")


@pytest.mark.parametrize("name", ["model", "me/model/more", "me/", "me/mo del", "https://huggingface.co/me/model"])
def test_what_is_no_name_of_a_repository(model: Path, name: str) -> None:
    with pytest.raises(RequestError, match="has the form owner/name"):
        push_to_hub(model, name, dry_run=True)
    with pytest.raises(RequestError, match="has the form owner/name"):
        check_push(name)


def test_without_a_token(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    for ask in (lambda: push_to_hub(model, "me/model"), lambda: check_push("me/model")):
        with pytest.raises(
            RequestError, match=r"an upload to me/model needs a token .* set HF_TOKEN .*`hf auth login`"
        ):
            ask()


def test_a_model_in_one_commit(hub: Hub, model: Path) -> None:
    check_push("me/model", private=True)
    push_to_hub(model, "me/model", private=True)
    assert hub.repositories["me/model"] == {".gitattributes": b"", **FILES}
    assert hub.private == {"me/model"}
    assert hub.commits == 1


def test_a_model_that_is_there(hub: Hub, model: Path) -> None:
    own = {".gitattributes": b"", "plot.png": b"kept"}
    old = {"model.safetensors": b"old", "config.json": b"old"}
    hub.repositories["me/model"] = {**own, **old}
    for ask in (lambda: push_to_hub(model, "me/model"), lambda: check_push("me/model")):
        with pytest.raises(RequestError, match=r"me/model has a model on the Hub; .* add `overwrite`"):
            ask()
    assert hub.repositories["me/model"] == {**own, **old}
    push_to_hub(model, "me/model", overwrite=True)
    assert hub.repositories["me/model"] == {**own, **FILES}
    with pytest.raises(RequestError, match="is public, and `private` is given"):
        push_to_hub(model, "me/model", overwrite=True, private=True)


def test_an_empty_repository_is_filled(hub: Hub, model: Path) -> None:
    hub.repositories["me/model"] = {".gitattributes": b"", "README.md": b"# Soon\n"}
    push_to_hub(model, "me/model")
    assert hub.repositories["me/model"] == {".gitattributes": b"", **FILES}


@pytest.mark.parametrize(
    ("status", "kind", "says"), [(403, RequestError, "may not write to me/model"), (400, OperationError, "refuses")]
)
def test_refusals_of_the_hub(hub: Hub, model: Path, status: int, kind: type[Exception], says: str) -> None:
    hub.status = status
    with pytest.raises(kind, match=says):
        push_to_hub(model, "me/model")
    assert not hub.commits


def test_no_connection(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", unreachable)
    with pytest.raises(OperationError, match=r"the upload to me/model failed \(ConnectionError: Name or service"):
        push_to_hub(model, "me/model")


# ------------------------------------------------------------------------------------------------ by the commands


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working folder, with a tiny model in `model`."""
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path / "model")


@pytest.mark.usefixtures("folder")
def test_prune_uploads_what_it_wrote(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(prune, capsys, "--model", "model", "--width", "8", "--output", "out", "--push-to-hub", "me/model")
    assert found["pushed_to"] == "me/model"
    written = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    assert hub.repositories["me/model"] == {".gitattributes": b"", **written}
    assert {"README.md", "model.safetensors", "gluprune_plan.json"} <= written.keys()


@pytest.mark.usefixtures("folder")
def test_convert_uploads_a_file(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(convert, capsys, "model", "small.gguf", "--push-to-hub", "me/model", "--private")
    assert status == 0
    assert out.splitlines()[-1] == "uploaded to https://huggingface.co/me/model"
    assert hub.repositories["me/model"]["small.gguf"] == Path("small.gguf").read_bytes()
    assert hub.private == {"me/model"}


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("repository", ["me/model", "me"])
def test_what_cannot_be_uploaded_is_said_before_any_work(hub: Hub, repository: str) -> None:
    hub.repositories["me/model"] = {"model.safetensors": b"old"}
    for command, arguments in (
        (prune, ["--model", "model", "--width", "8", "--output", "out"]),
        (convert, ["model", "out"]),
    ):
        assert command([*arguments, "--push-to-hub", repository]) == 2
        assert command([*arguments, "--private"]) == 2
    assert not Path("out").exists()
    assert not hub.commits


@pytest.mark.usefixtures("folder")
def test_an_upload_needs_an_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert prune(["--model", "model", "--width", "8", "--plan-out", "plan.json", "--push-to-hub", "me/model"]) == 2
    assert "--push-to-hub uploads a folder or file that is written here; give --output" in capsys.readouterr().err
