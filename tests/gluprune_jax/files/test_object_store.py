"""Orbax checkpoints in an object store, against an emulator of one on this machine."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from byte_tokenizer import VOCABULARY, write_tokenizer
from processes import done, finish, start
from tiny_models import hf_config, write_folder

import convert.__main__
import gluprune_jax.prune
from convert.output import begin_in_store
from gluprune_jax.errors import RequestError
from gluprune_jax.files import object_store
from gluprune_jax.files.object_store import folder_at
from gluprune_jax.parallel.mesh import MeshShape, make_mesh

if not all(map(importlib.util.find_spec, ("gcsfs", "gcp_storage_emulator"))):  # gcsfs reads variables when imported
    pytest.skip("needs gcsfs and gcp-storage-emulator: pip install gluprune-jax[dev]", allow_module_level=True)

Capture = pytest.CaptureFixture[str]
BUCKET = "gs://bucket"
PRUNE = ("--width", "41", "--format", "orbax")


@pytest.fixture(scope="module")
def emulator() -> Iterator[None]:
    """An object store with one empty bucket, and the environment that leads gcsfs and TensorStore to it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "gcp_storage_emulator", "start", f"--port={port}", "--host=127.0.0.1"]
    with subprocess.Popen([*command, "--in-memory", "--default-bucket=bucket"], stderr=subprocess.DEVNULL) as server:
        address = f"http://127.0.0.1:{port}"
        environment = {
            "STORAGE_EMULATOR_HOST": address,  # of gcsfs
            "FSSPEC_GCS_TOKEN": "anon",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks for the kind of bucket by gRPC, which is not emulated
            "TENSORSTORE_GCS_HTTP_URL": address,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        }
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            import fsspec.config

            fsspec.config.set_conf_env(fsspec.config.conf)  # it has read the environment when it was imported
            try:
                wait_for(address)
                yield
            finally:
                server.terminate()


def wait_for(address: str) -> None:
    for _ in range(100):
        try:
            urllib.request.urlopen(address).close()
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(f"the emulator does not answer at {address}")


@pytest.fixture
def bucket(emulator: None) -> Iterator[None]:
    yield
    for name in object_store.entries(folder_at(BUCKET)):
        object_store.delete(folder_at(BUCKET) / name)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = hf_config(vocab_size=VOCABULARY, eos_token_id=VOCABULARY - 1, intermediate_size=83)
    folder = write_folder(tmp_path_factory.mktemp("models") / "tiny-llama", config)
    write_tokenizer(folder)
    return folder


def prune(*argv: object) -> int:
    return gluprune_jax.prune.main([str(argument) for argument in argv])


def weights(name: object, **options: Any) -> bytes:
    """The safetensors that become of a model: without the padding that its mesh brings."""
    with tempfile.TemporaryDirectory() as folder:
        convert.save(convert.load(str(name), **options), Path(folder) / "hf")
        return (Path(folder) / "hf/model.safetensors").read_bytes()


def names(folder: str) -> set[str]:
    return set(object_store.sizes(folder_at(folder)))


@pytest.mark.usefixtures("bucket")
def test_what_is_pruned_into_a_store_is_what_is_pruned_onto_the_disk(model: Path, tmp_path: Path) -> None:
    assert prune("--model", model, *PRUNE, "--mesh", "data=2,model=4", "--output", f"{BUCKET}/models/tiny") == 0
    assert prune("--model", model, *PRUNE, "--output", tmp_path / "tiny") == 0
    expected = weights(tmp_path / "tiny")
    assert weights(f"{BUCKET}/models/tiny") == expected
    mesh = make_mesh(MeshShape(4, 2), 2)
    assert weights(f"{BUCKET}/models/tiny/orbax", mesh=lambda model: mesh) == expected
    for file in (tmp_path / "tiny").iterdir():
        if file.is_file() and file.name not in ("README.md", "gluprune_history.json", "gluprune_plan.json"):
            assert (folder_at(f"{BUCKET}/models/tiny") / file.name).read_bytes() == file.read_bytes(), file.name
    on_disk = {file.name for file in (tmp_path / "tiny").iterdir()}
    assert {name.split("/")[0] for name in names(f"{BUCKET}/models/tiny")} == on_disk
    assert object_store.entries(folder_at(f"{BUCKET}/models")) == ["tiny/"]  # no trace of having tried to write
    loaded, local = convert.load(f"{BUCKET}/models/tiny"), convert.load(tmp_path / "tiny")
    assert loaded.assets.keys() == local.assets.keys() >= {"tokenizer.json"}
    assert loaded.config == local.config


@pytest.mark.usefixtures("bucket")
def test_from_a_store_into_a_folder_and_back(model: Path, tmp_path: Path, capsys: Capture) -> None:
    assert convert.__main__.main([str(model), f"{BUCKET}/tiny", "--format", "orbax"]) == 0
    assert f"wrote orbax to {BUCKET}/tiny" in capsys.readouterr().out
    assert convert.__main__.main([f"{BUCKET}/tiny", str(tmp_path / "back")]) == 0
    assert (tmp_path / "back/model.safetensors").read_bytes() == weights(model)
    assert prune("--model", f"{BUCKET}/tiny", *PRUNE, "--output", f"{BUCKET}/pruned") == 0
    assert prune("--model", f"{BUCKET}/tiny", "--width", "41", "--dry-run") == 0


@pytest.mark.usefixtures("bucket")
def test_two_processes_write_and_read_together(model: Path, tmp_path: Path) -> None:
    argv = ("--model", model, *PRUNE)
    done(finish(start("gluprune_jax.prune", *argv, "--output", f"{BUCKET}/two", processes=2, environment={})))
    assert prune(*argv, "--output", tmp_path / "one") == 0
    assert weights(f"{BUCKET}/two") == weights(tmp_path / "one")
    done(finish(start("convert", f"{BUCKET}/two", tmp_path / "back", processes=2, environment={})))
    assert (tmp_path / "back/model.safetensors").read_bytes() == weights(tmp_path / "one")
    for status, _, error in finish(
        start("gluprune_jax.prune", *argv, "--output", f"{BUCKET}/two", processes=2, environment={})
    ):
        assert status == 2, error


@pytest.mark.usefixtures("bucket")
def test_nothing_is_replaced_without_overwrite(model: Path, capsys: Capture) -> None:
    target = ("--model", model, *PRUNE, "--output", f"{BUCKET}/tiny")
    assert prune(*target) == 0
    assert prune(*target) == 2
    assert f"{BUCKET}/tiny exists; choose another path or add --overwrite" in capsys.readouterr().err
    (folder_at(f"{BUCKET}/tiny") / "NOTICE.txt").write_text("of the old model")
    assert prune(*target, "--width", "40", "--overwrite") == 0
    assert convert.load(f"{BUCKET}/tiny").config.intermediate_sizes == (40, 40, 40)
    assert "NOTICE.txt" not in names(f"{BUCKET}/tiny")


@pytest.mark.usefixtures("bucket")
def test_overwrite_replaces_only_models(model: Path, capsys: Capture) -> None:
    for path, message in (
        ("thesis/chapter.tex", "it holds chapter.tex, which is no part of a model folder"),
        ("notes/list.txt", "it has no config.json, so it is no model folder"),
        ("object", "is an object; choose another path"),
    ):
        (folder_at(BUCKET) / path).write_text("years of work")
        target = f"{BUCKET}/{path.split('/')[0]}"
        assert prune("--model", model, *PRUNE, "--output", target, "--overwrite") == 2
        assert message in capsys.readouterr().err
        assert (folder_at(BUCKET) / path).read_text() == "years of work"


KILLED = """
import os, signal, sys
import {module} as module
module.{function} = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
import gluprune_jax.prune
gluprune_jax.prune.main(sys.argv[1:])
"""


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize("killed_in", ["convert.orbax.save_orbax", "gluprune_jax.files.orbax.file_sizes"])
def test_what_a_killed_run_leaves_is_not_loaded(model: Path, killed_in: str, capsys: Capture) -> None:
    """Killed when only the small files are there, or all but the object that is written last."""
    target = ("--model", str(model), *PRUNE, "--output", f"{BUCKET}/tiny")
    assert prune(*target) == 0
    module, _, function = killed_in.rpartition(".")
    command = [sys.executable, "-c", KILLED.format(module=module, function=function), *target, "--overwrite"]
    killed = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert "config.json" in names(f"{BUCKET}/tiny")
    for name in (f"{BUCKET}/tiny", f"{BUCKET}/tiny/orbax"):
        with pytest.raises(RequestError, match=r"is no Orbax checkpoint|writing was not finished"):
            convert.load(name)
    capsys.readouterr()
    assert prune(*target) == 2
    assert "exists; choose another path or add --overwrite" in capsys.readouterr().err
    assert prune(*target, "--overwrite") == 0
    assert convert.load(f"{BUCKET}/tiny").config.intermediate_sizes == (41, 41, 41)


@pytest.mark.usefixtures("bucket")
def test_an_old_model_is_no_model_before_it_is_deleted(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert convert.__main__.main([str(model), f"{BUCKET}/tiny", "--format", "orbax"]) == 0
    before, delete, deleted = names(f"{BUCKET}/tiny"), object_store.delete, []

    def delete_one(folder: Any) -> None:
        if deleted:
            raise KeyboardInterrupt
        deleted.append(folder)
        delete(folder)

    monkeypatch.setattr(object_store, "delete", delete_one)
    with pytest.raises(KeyboardInterrupt):
        begin_in_store(folder_at(f"{BUCKET}/tiny"), {"config.json": b"{}"}, overwrite=True)
    monkeypatch.undo()
    assert before - names(f"{BUCKET}/tiny") == {"orbax/files.json"}
    with pytest.raises(RequestError, match="writing was not finished"):
        convert.load(f"{BUCKET}/tiny")


@pytest.mark.usefixtures("bucket")
def test_damage_is_named(model: Path, capsys: Capture) -> None:
    assert convert.__main__.main([str(model), f"{BUCKET}/tiny", "--format", "orbax"]) == 0
    object_store.delete(folder_at(f"{BUCKET}/tiny/orbax/params/_METADATA"))
    assert prune("--model", f"{BUCKET}/tiny", "--width", "41", "--dry-run") == 1
    assert f"the checkpoint {BUCKET}/tiny/orbax is damaged: params/_METADATA is missing" in capsys.readouterr().err


@pytest.mark.usefixtures("bucket")
def test_refusals(model: Path, capsys: Capture, tmp_path: Path) -> None:
    (folder_at(f"{BUCKET}/hf") / "config.json").write_text(json.dumps({}))
    for argv, status, message in (
        (
            ("--model", model, "--width", "41", "--output", f"{BUCKET}/new"),
            2,
            "give --format orbax, or mount the bucket",
        ),
        (("--model", f"{BUCKET}/hf", "--width", "41", "--dry-run"), 2, f"{BUCKET}/hf is no Orbax checkpoint"),
        (("--model", f"{BUCKET}/none", "--width", "41", "--dry-run"), 2, f"{BUCKET}/none is no Orbax checkpoint"),
        (("--model", model, *PRUNE, "--output", "gs://nobucket/new"), 1, "cannot use gs://nobucket/new: "),
        (("--model", model, *PRUNE, "--output", "gs://"), 2, "names no bucket"),
        (("--model", f"{BUCKET}/a/orbax", *PRUNE, "--output", f"{BUCKET}/a"), 2, "is or holds the model itself"),
        (("--model", model, *PRUNE, "--output", "s3://bucket/new"), 2, "is an address, which is not opened here"),
    ):
        assert prune(*argv) == status, argv
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert object_store.entries(folder_at(BUCKET)) == ["hf/"]


def test_addresses() -> None:
    assert str(folder_at("gs://bucket/a")) == str(folder_at(Path("gs://bucket/a"))) == "gs://bucket/a"
    assert folder_at("a/b") == Path("a/b")
