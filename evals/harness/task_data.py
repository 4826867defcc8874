"""Where lm-eval's tasks get their questions: from local JSON-lines files, or from the Hugging Face Hub.

The local layout is one folder a data set and one file a split, one JSON object a line, in the schema of the data set
on the Hub that the task names:

    DATA/wikitext/test.jsonl        DATA/piqa/validation.jsonl          DATA/gsm8k/{test,train}.jsonl
    DATA/lambada_openai/test.jsonl  DATA/boolq/validation.jsonl         DATA/ifeval/train.jsonl
    DATA/mmlu/{test,dev}.jsonl      DATA/truthfulqa/validation.jsonl    DATA/musr/{murder_mysteries,...}.jsonl
    DATA/arc_challenge/test.jsonl   DATA/hellaswag/validation.jsonl     DATA/winogrande/validation.jsonl

A `train.jsonl` beside them, where there is one, serves few-shot examples.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gluprune_jax.errors import OperationError, RequestError, is_out_of_memory, unreadable

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _LocalSet:
    """A data set of the Hub in the local layout.

    Attributes:
      folder: inside the data folder.
      config: the configuration that the folder holds; None if the data set has only one, or one for each subject.
      splits: those that must be there.
      columns: those that lm-eval's tasks read.
      config_column: the column that names the configuration of a row, where one file holds them all.
    """

    folder: str
    config: str | None
    splits: tuple[str, ...]
    columns: tuple[str, ...]
    config_column: str | None = None


_LOCAL_SETS: Mapping[str, _LocalSet] = {
    "EleutherAI/wikitext_document_level": _LocalSet("wikitext", "wikitext-2-raw-v1", ("test",), ("page",)),
    "EleutherAI/lambada_openai": _LocalSet("lambada_openai", "default", ("test",), ("text",)),
    "cais/mmlu": _LocalSet("mmlu", None, ("test", "dev"), ("question", "choices", "answer"), config_column="subject"),
    "allenai/ai2_arc": _LocalSet("arc_challenge", "ARC-Challenge", ("test",), ("question", "choices", "answerKey")),
    "Rowan/hellaswag": _LocalSet(
        "hellaswag", None, ("validation",), ("activity_label", "ctx_a", "ctx_b", "endings", "label")
    ),
    "allenai/winogrande": _LocalSet(
        "winogrande", "winogrande_xl", ("validation",), ("sentence", "option1", "option2", "answer")
    ),
    "baber/piqa": _LocalSet("piqa", None, ("validation",), ("goal", "sol1", "sol2", "label")),
    "aps/super_glue": _LocalSet("boolq", "boolq", ("validation",), ("question", "passage", "label")),
    "truthfulqa/truthful_qa": _LocalSet(
        "truthfulqa", "multiple_choice", ("validation",), ("question", "mc1_targets", "mc2_targets")
    ),
    "openai/gsm8k": _LocalSet("gsm8k", "main", ("test", "train"), ("question", "answer")),
    "google/IFEval": _LocalSet("ifeval", None, ("train",), ("key", "prompt", "instruction_id_list", "kwargs")),
    "TAUR-Lab/MuSR": _LocalSet(
        "musr",
        None,
        ("murder_mysteries", "object_placements", "team_allocation"),
        ("narrative", "question", "choices", "answer_choice"),
    ),
}


@contextlib.contextmanager
def task_datasets(benchmark_data: Path | None = None) -> Iterator[None]:
    """While it is active, the data of lm-eval's tasks comes from `benchmark_data`, or from the Hub if that is None.

    A task loads its data when it is constructed, so what is raised comes from there too. Files are read when they are
    asked for, and each once.

    Raises:
      RequestError: `benchmark_data` is no folder, lacks a file or has a malformed one, or the local layout has no place
        for the data set of a task.
      OperationError: a data set cannot be had from the Hub, or a file cannot be read.
    """
    import datasets

    if benchmark_data is not None and not benchmark_data.is_dir():
        raise RequestError(
            f"`benchmark_data` {benchmark_data} is not a folder; give one with folders such as piqa and mmlu in it"
        )
    from_hub = datasets.load_dataset
    datasets.load_dataset = _hub_loader(from_hub) if benchmark_data is None else _local_loader(benchmark_data)
    try:
        yield
    finally:
        datasets.load_dataset = from_hub


def check_examples(task: Any) -> None:
    """Makes sure that there are as many examples for few-shot prompts as a task will show.

    Args:
      task: lm-eval's task, with its `num_fewshot` set as it will be run.

    Raises:
      RequestError: there are fewer.
    """
    wanted = task.config.num_fewshot or 0
    there = len(task.sampler.df) if hasattr(task, "sampler") else 0
    if wanted > there:
        raise RequestError(
            f"{task.task_name} would show {wanted} examples before each question, and its data has {there} to choose "
            f"from; give a smaller `num_fewshot`, or add its training split to `benchmark_data`"
        )


# ---------------------------------------------------------------------------------------------------- the Hub


def _hub_loader(load_dataset: Callable[..., Any]) -> Callable[..., Any]:
    def load(path: str, name: str | None = None, **options: Any) -> Any:
        try:
            return load_dataset(path=path, name=name, **options)
        except Exception as error:  # of the data set's format, of the network, of the disk: the library has them all
            if is_out_of_memory(error):
                raise
            first_line = next(iter(str(error).splitlines()), type(error).__name__)[:200]
            raise OperationError(
                f"the data set {_named(path, name)} cannot be had from the Hugging Face Hub ({first_line}); connect "
                f"to the network once (afterwards it is in the cache), or give local copies as `benchmark_data`"
            ) from error

    return load


def _named(path: str, name: str | None) -> str:
    return path if name is None else f"{path} ({name})"


# ------------------------------------------------------------------------------------------------ local files


def _local_loader(benchmark_data: Path) -> Callable[..., Any]:
    # One file serves the 57 subjects of MMLU.
    read = functools.cache(_read_rows)

    def load(path: str, name: str | None = None, split: str | None = None, **_: Any) -> Any:
        local = _LOCAL_SETS.get(path)
        if local is None or (name != local.config and local.config_column is None):
            raise RequestError(
                f"`benchmark_data` has no place for the data set {_named(path, name)}, only for those of "
                f"{', '.join(local.folder for local in _LOCAL_SETS.values())}; leave `benchmark_data` out to have it "
                f"from the Hugging Face Hub"
            )
        splits = _LocalSplits(path, name, local, benchmark_data, read)
        return splits if split is None else splits[split]

    return load


class _LocalSplits(dict[str, Any]):
    """The splits of a local data set by name, as `datasets.Dataset`, each read when it is first asked for."""

    def __init__(
        self,
        path: str,
        config: str | None,
        local: _LocalSet,
        benchmark_data: Path,
        read: Callable[[Path, tuple[str, ...]], Sequence[Row]],
    ):
        super().__init__()
        self._path, self._config, self._local, self._folder, self._read = path, config, local, benchmark_data, read

    def __missing__(self, split: str) -> Any:
        import pyarrow
        from datasets import Dataset

        local = self._local
        file = self._folder / local.folder / f"{split}.jsonl"
        if file.exists():
            columns = local.columns if local.config_column is None else (*local.columns, local.config_column)
            rows = self._read(file, columns)
            if local.config_column is not None:
                rows = [row for row in rows if row[local.config_column] == self._config]
                if not rows:
                    raise RequestError(f"{file} has no line whose {local.config_column} is {self._config!r}")
        elif split == "train" and split not in local.splits:
            # lm-eval collects the examples for few-shot prompts when it constructs a task, whether any will be shown
            # or not. An empty split serves: other rows in their place would be shown, and are the questions.
            rows = []
        else:
            raise RequestError(
                f"{file} is missing: it is the {split} split of {_named(self._path, self._config)}; add it to "
                f"`benchmark_data`, or leave `benchmark_data` out to have it from the Hugging Face Hub"
            )
        try:
            self[split] = Dataset.from_list(rows) if rows else Dataset.from_dict({name: [] for name in local.columns})
        except pyarrow.ArrowException as error:
            raise RequestError(f"{file} has values of different kinds in one column: {error}") from error
        return self[split]


def _read_rows(file: Path, columns: tuple[str, ...]) -> list[Row]:
    try:
        lines = file.read_bytes().split(b"\n")  # not at the line ends that Unicode knows: JSON strings may hold them
    except OSError as error:
        raise unreadable(f"the data file {file}", error) from error
    if lines[-1] == b"":
        del lines[-1]
    if not lines:
        raise RequestError(f"{file} is empty; it must have one JSON object a line")
    rows = [_parse(line, f"{file} line {number}") for number, line in enumerate(lines, start=1)]
    _check_columns(rows, columns, file)
    return rows


def _parse(line: bytes, where: str) -> Row:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RequestError(f"{where} is not UTF-8 text (byte {error.start + 1})") from error
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise RequestError(f"{where} is {type(row).__name__} in JSON; it must be an object, such as {{...}}")
    return row


def _check_columns(rows: Sequence[Row], columns: tuple[str, ...], file: Path) -> None:
    first = rows[0]
    if lacking := [name for name in columns if name not in first]:
        raise RequestError(f"{file} line 1 lacks {', '.join(lacking)}; it has {', '.join(first)}")
    for number, row in enumerate(rows, start=1):
        if row.keys() != first.keys():
            names = ", ".join(sorted(row.keys() ^ first.keys()))
            raise RequestError(f"{file} line {number} does not have the columns of line 1: they differ in {names}")
        for name, value in row.items():
            if type(value) is not type(first[name]):
                raise RequestError(
                    f"{file} line {number} has {json.dumps(value)[:50]} as {name}, where line 1 has "
                    f"{json.dumps(first[name])[:50]}"
                )
