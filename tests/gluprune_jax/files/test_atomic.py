"""Output is there whole or not at all: under exceptions, kills, full and read-only disks."""

import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from convert.output import check_target, staged_model
from gluprune_jax.errors import OperationError, RequestError
from gluprune_jax.files import atomic
from gluprune_jax.files.atomic import check_file, scratch_directory, write_file_atomic

FILES = ("config.json", "model.safetensors", "tokenizer.json")


def write_model(folder: Path, text: str) -> None:
    folder.mkdir(exist_ok=True)
    for name in FILES:
        (folder / name).write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


OLD = dict.fromkeys(FILES, "old")
NEW = dict.fromkeys(FILES, "new")


# ------------------------------------------------------------------------------------------------ the plain way


def test_a_folder_appears_only_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "model"
    with staged_model(target, overwrite=False) as stage:
        write_model(stage, "new")
        assert not target.exists()
        assert stage.parent == target.parent
        assert f".{target.name}." in stage.name
        assert f".{os.getpid()}@" in stage.name
    assert contents(target) == NEW
    assert os.listdir(target.parent) == ["model"]


def test_the_folder_has_the_permissions_of_any_new_folder(tmp_path: Path) -> None:
    with staged_model(tmp_path / "model", overwrite=False):
        pass
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "model").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_an_old_folder_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    write_model(target, "old")
    (target / "orbax").mkdir()
    (target / "orbax" / "_CHECKPOINT_METADATA").touch()
    (target / "chat_template.jinja").write_text("only in the old one")
    with staged_model(target, overwrite=True) as stage:
        write_model(stage, "new")
        assert (target / "config.json").read_text() == "old"
    assert contents(target) == NEW
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("exception", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_folder_and_nothing_else(tmp_path: Path, exception: type[BaseException]) -> None:
    target = tmp_path / "model"
    write_model(target, "old")

    def write_and_fail() -> None:
        with staged_model(target, overwrite=True) as stage:
            write_model(stage, "new")
            raise exception("mine")

    with pytest.raises(exception, match="mine"):
        write_and_fail()
    assert contents(target) == OLD
    assert os.listdir(tmp_path) == ["model"]


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    write_model(tmp_path / "disk", "old")
    (tmp_path / "model").symlink_to(tmp_path / "disk")
    with staged_model(tmp_path / "model", overwrite=True) as stage:
        write_model(stage, "new")
    assert (tmp_path / "model").is_symlink()
    assert contents(tmp_path / "disk") == NEW


def test_a_file_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "plans" / "plan.json"
    write_file_atomic(path, b"1", overwrite=False)
    with pytest.raises(RequestError, match=r"plan\.json exists; .*`overwrite`"):
        write_file_atomic(path, b"2", overwrite=False)
    assert path.read_bytes() == b"1"
    write_file_atomic(path, b"2", overwrite=True)
    assert path.read_bytes() == b"2"
    assert os.listdir(path.parent) == ["plan.json"]


# ------------------------------------------------------------------------------------------------- refusals


def both_refuse(target: Path, overwrite: bool, match: str) -> None:
    with pytest.raises(RequestError, match=match):
        check_target(target, overwrite)
    with pytest.raises(RequestError, match=match), staged_model(target, overwrite=overwrite):
        pytest.fail("the block must not run")


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    write_model(tmp_path / "model", "old")
    both_refuse(tmp_path / "model", False, "exists; choose another path or add `overwrite`")
    assert contents(tmp_path / "model") == OLD


@pytest.mark.parametrize("name", ["thesis.docx", ".ssh/", ".bashrc", "Documents/", "model.safetensors/", "weights.bin"])
def test_a_folder_with_anything_else_is_never_overwritten(tmp_path: Path, name: str) -> None:
    target = tmp_path / "home"
    write_model(target, "old")
    if name.endswith("/"):
        (target / "model.safetensors").unlink()
        (target / name).mkdir()
    else:
        (target / name).write_text("precious")
    both_refuse(target, True, f"it holds {name}, which is no part of a model folder")
    assert (target / name).exists()


def test_a_folder_without_config_is_never_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "data"
    target.mkdir()
    (target / "results.json").write_text("precious")
    both_refuse(target, True, r"no config\.json")
    assert (target / "results.json").exists()


def test_a_folder_without_weights_is_never_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "website"
    target.mkdir()
    for name in ("config.json", "package.json", "README.md"):
        (target / name).write_text("precious")
    both_refuse(target, True, r"no config\.json with weights beside it")
    assert sorted(os.listdir(target)) == ["README.md", "config.json", "package.json"]


def test_a_folder_called_orbax_is_looked_into(tmp_path: Path) -> None:
    target = tmp_path / "project"
    (target / "orbax").mkdir(parents=True)
    (target / "config.json").write_text("precious")
    (target / "orbax" / "thesis.tex").write_text("precious")
    both_refuse(target, True, "orbax/, which is no part of a model folder")
    assert (target / "orbax" / "thesis.tex").exists()


def test_an_empty_folder_may_be_overwritten(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    both_refuse(tmp_path / "model", False, "exists")
    with staged_model(tmp_path / "model", overwrite=True) as stage:
        write_model(stage, "new")
    assert contents(tmp_path / "model") == NEW


def test_files_and_folders_are_not_mixed_up(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    both_refuse(tmp_path / "file", True, "is a file")
    both_refuse(tmp_path / "file" / "model", True, r"file is a file, not a folder")
    with pytest.raises(RequestError, match="is not a file"):
        check_file(tmp_path, True)
    assert (tmp_path / "file").read_text() == "precious"


def test_the_working_folder_and_those_above_it_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path, "old")
    (tmp_path / "orbax").mkdir()
    monkeypatch.chdir(tmp_path / "orbax")
    for target in (Path(), Path(".."), Path("/"), tmp_path):
        both_refuse(target, True, "is the working folder or holds it")


def test_a_target_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with pytest.raises(RequestError, match="exists"), staged_model(target, overwrite=False):
        write_model(target, "old")
    assert contents(target) == OLD


def test_checking_leaves_no_trace(tmp_path: Path) -> None:
    assert check_target(tmp_path / "a" / "model", False) == tmp_path / "a" / "model"
    assert check_file(tmp_path / "a" / "plan.json", False) == tmp_path / "a" / "plan.json"
    assert os.listdir(tmp_path) == []


# --------------------------------------------------------------------------------------------------- kills

CHILD = """
import pathlib, sys, time, types

package = types.ModuleType("gluprune_jax")  # the real one imports jax, which takes a second
package.__path__ = [sys.argv[3]]
sys.modules["gluprune_jax"] = package
from gluprune_jax.files import atomic

target, point = pathlib.Path(sys.argv[1]), sys.argv[2]
rename, renames, rmtree = pathlib.Path.rename, 0, atomic.shutil.rmtree

def stop():
    print("here", flush=True)
    time.sleep(60)

def counting_rename(self, other):
    global renames
    rename(self, other)
    renames += 1
    if point == f"rename {renames}":
        stop()

def half_rmtree(path, *args, **kwargs):  # temporary folders are removed by it too
    path = pathlib.Path(path)
    if point == "half deleted" and path.suffix == ".new":
        (path / "model.safetensors").unlink()
        stop()
    rmtree(path, *args, **kwargs)

pathlib.Path.rename = counting_rename
atomic.shutil.rmtree = half_rmtree
with atomic.staged_directory(target, lambda target: None) as stage:
    for i, name in enumerate(("config.json", "model.safetensors", "tokenizer.json")):
        if point == f"file {i}":
            stop()
        (stage / name).write_text("new")
"""


def start_child(target: Path, point: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", CHILD, target, point, Path(atomic.__file__).parents[1]]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    if child.stdout.readline() != "here\n":
        with child:
            pytest.fail(f"the child never came to {point}")
    return child


def kill(child: "subprocess.Popen[str]") -> None:
    with child:
        child.kill()
    assert child.returncode == -signal.SIGKILL


# What stands at the target after the kill, and after the recovery by the next run. None: nothing.
KILLS = [
    ("file 0", None, None, None),
    ("file 2", None, None, None),
    ("rename 1", None, NEW, NEW),
    ("file 0", OLD, OLD, OLD),
    ("file 2", OLD, OLD, OLD),
    ("rename 1", OLD, None, OLD),
    ("rename 2", OLD, NEW, NEW),
    ("rename 3", OLD, NEW, NEW),
    ("half deleted", OLD, NEW, NEW),
]


@pytest.mark.parametrize(("point", "before", "killed", "recovered"), KILLS)
def test_a_killed_run_leaves_the_old_or_the_new(
    tmp_path: Path,
    point: str,
    before: dict[str, str] | None,
    killed: dict[str, str] | None,
    recovered: dict[str, str] | None,
) -> None:
    target = tmp_path / "model"
    if before:
        write_model(target, "old")
    kill(start_child(target, point))
    assert (contents(target) if target.exists() else None) == killed
    check_target(target, overwrite=True)
    assert (contents(target) if target.exists() else None) == recovered
    assert os.listdir(tmp_path) == ["model"] * (recovered is not None), "rubbish is left"


def test_recovery_comes_before_the_refusal(tmp_path: Path) -> None:
    target = tmp_path / "model"
    write_model(target, "old")
    kill(start_child(target, "rename 1"))
    both_refuse(target, False, "exists")
    assert contents(target) == OLD


def test_a_half_deleted_old_folder_never_comes_back(tmp_path: Path) -> None:
    target = tmp_path / "model"
    write_model(target, "old")
    kill(start_child(target, "half deleted"))
    target.rename(tmp_path / "moved")
    check_target(target, overwrite=True)
    assert not target.exists()


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "model"
    child = start_child(target, "file 2")
    try:
        with staged_model(target, overwrite=True) as stage:
            write_model(stage, "new")
        hidden = [name for name in os.listdir(tmp_path) if f".{child.pid}@" in name]
        assert len(hidden) == 1
        assert sorted(os.listdir(tmp_path / hidden[0])) == ["config.json", "model.safetensors"]
    finally:
        kill(child)


@pytest.mark.parametrize(("point", "recovered"), [("file 2", OLD), ("rename 1", OLD), ("rename 2", NEW)])
def test_the_next_run_beside_it_tidies_up_after_a_killed_one(
    tmp_path: Path, point: str, recovered: dict[str, str]
) -> None:
    write_model(tmp_path / "model", "old")
    kill(start_child(tmp_path / "model", point))
    (tmp_path / ".gluprune-ab12_xyz").mkdir()  # as version 0.1 tried whether it could write
    (tmp_path / f".gluprune-01234567.{2**22 + 1}@{atomic._HOST}").mkdir()
    check_target(tmp_path / "another", overwrite=False)
    assert os.listdir(tmp_path) == ["model"]
    assert contents(tmp_path / "model") == recovered


def test_what_only_looks_like_ours_is_left_alone(tmp_path: Path) -> None:
    names = [".gluprune-full_one", ".gluprune-notes", ".model.01234567.new", ".x.0123.1@host.new", "gluprune-abcdefgh"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "work").write_text("of years")
    check_target(tmp_path / "model", overwrite=False)
    write_file_atomic(tmp_path / "file", b"", overwrite=False)
    assert sorted(os.listdir(tmp_path)) == sorted([*names, "file"])


def test_a_lock_says_that_a_process_lives_that_cannot_be_seen(tmp_path: Path) -> None:
    """As of another container with the name of this host: its number is of no process here, or of another one."""
    target = tmp_path / "model"
    child = start_child(target, "file 2")
    try:
        (hidden,) = os.listdir(tmp_path)
        for process, host in ((2**22 + 1, atomic._HOST), (1, "elsewhere")):
            name = re.sub(r"\d+@.*\.new", f"{process}@{host}.new", hidden)
            stage = tmp_path / hidden
            hidden = name
            stage.rename(tmp_path / name)
            two_days_ago = time.time() - 2 * 24 * 3600
            os.utime(tmp_path / name, (two_days_ago, two_days_ago))
            check_target(target, overwrite=False)
            assert sorted(os.listdir(tmp_path / name)) == ["config.json", "model.safetensors"]
    finally:
        kill(child)
    check_target(target, overwrite=False)
    assert os.listdir(tmp_path) == []


def test_a_process_number_used_again_does_not_hide_what_was_left(tmp_path: Path) -> None:
    stage = tmp_path / f".model.01234567.{os.getpid()}@{atomic._HOST}.new"
    write_model(stage, "new")
    check_target(tmp_path / "model", overwrite=False)
    assert not stage.exists()


def test_other_hosts_are_given_a_day(tmp_path: Path) -> None:
    stage = tmp_path / f".model.01234567.{os.getpid()}@elsewhere.new"
    write_model(stage, "new")
    check_target(tmp_path / "model", overwrite=False)
    assert stage.exists()
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(stage, (two_days_ago, two_days_ago))
    check_target(tmp_path / "model", overwrite=False)
    assert not stage.exists()


def test_two_scratch_folders_for_one_target_live_side_by_side(tmp_path: Path) -> None:
    with scratch_directory(tmp_path / "x") as first, scratch_directory(tmp_path / "x") as second:
        assert first != second
        assert first.is_dir()
    assert os.listdir(tmp_path) == []


# --------------------------------------------------------------------------------------------------- disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if mounted.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def write_plainly(stage: Path) -> None:
    (stage / "model.safetensors").write_bytes(bytes(2 << 20))


def write_through_rust(stage: Path) -> None:
    save_file({"x": np.zeros(1 << 20, np.float32)}, stage / "model.safetensors")


@pytest.mark.parametrize("write", [write_plainly, write_through_rust])
def test_a_full_disk_is_one_sentence(small_disk: Path, write: object) -> None:
    assert callable(write)
    target = small_disk / "model"
    write_model(target, "old")
    full = r"cannot write .*/disk/model: the disk is full \(1\.0 MB are free there without it\); .*"
    with pytest.raises(OperationError, match=full), staged_model(target, overwrite=True) as stage:
        write(stage)
    assert contents(target) == OLD
    assert os.listdir(small_disk) == ["model"]


def test_a_file_on_a_full_disk(small_disk: Path) -> None:
    path = small_disk / "plan.json"
    write_file_atomic(path, b"old", overwrite=False)
    with pytest.raises(OperationError, match=r"plan\.json: the disk is full \(1\.0 MB are free"):
        write_file_atomic(path, bytes(2 << 20), overwrite=True)
    assert path.read_bytes() == b"old"
    assert os.listdir(small_disk) == ["plan.json"]


def test_a_read_only_disk_is_found_before_the_work(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    message = r"model: Read-only file system; choose a path that you can write to"
    with pytest.raises(OperationError, match=message):
        check_target(small_disk / "a" / "model", False)
    with pytest.raises(OperationError, match=message):
        check_file(small_disk / "model", False)


def test_a_mount_point_is_refused(small_disk: Path) -> None:
    both_refuse(small_disk, True, "is a mount point and cannot be replaced; choose a folder inside it")


def test_a_failed_rename_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model"
    write_model(target, "old")
    rename = Path.rename

    def failing(self: Path, other: Path) -> Path:
        if self.suffix == ".new":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self), None, str(other))
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", failing)
    with (
        pytest.raises(OperationError, match="model: Input/output error"),
        staged_model(target, overwrite=True) as stage,
    ):
        write_model(stage, "new")
    assert contents(target) == OLD
    assert os.listdir(tmp_path) == ["model"]


def test_a_failure_to_read_is_not_reported_as_one_to_write(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), staged_model(tmp_path / "model", overwrite=False):
        (tmp_path / "source.safetensors").read_bytes()
    message = r"cannot write .*/model: No such file or directory"
    with pytest.raises(OperationError, match=message), staged_model(tmp_path / "model", overwrite=False) as stage:
        (stage / "orbax" / "file").write_bytes(b"")
    assert os.listdir(tmp_path) == []


def test_bytes_are_on_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    fsync = os.fsync

    def watching(descriptor: int) -> None:
        assert not (tmp_path / "model").exists()
        flushed.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "fsync", watching)
    with staged_model(tmp_path / "model", overwrite=False) as stage:
        write_model(stage, "new")
    assert sorted(flushed) == sorted(FILES)
