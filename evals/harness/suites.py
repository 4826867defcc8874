"""Which benchmarks are run, and how: the suites of the paper (arXiv 2512.22671), and any other task of lm-eval.

A benchmark is a task or a group of tasks of lm-evaluation-harness, which defines its questions, prompts and metrics.
Here stand the number of few-shot examples and the headline metric of the paper.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gluprune_jax.errors import OperationError, RequestError

_NEAREST = 3  # names offered for one that is unknown


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A task or group of lm-eval and the way it is run.

    Attributes:
      name: lm-eval's name of the task or group.
      num_fewshot: examples before each question; None leaves the task its own number.
      metric: lm-eval's key of the headline metric, such as "acc_norm,none"; None where only its results tell.
      title: the name in tables.
      higher_is_better: of the headline metric; None where only lm-eval's results tell.
    """

    name: str
    num_fewshot: int | None
    metric: str | None
    title: str
    higher_is_better: bool | None

    def headline(self, metrics: Iterable[str]) -> str:
        """The key of the headline metric among the keys of lm-eval's results for this benchmark.

        Raises:
          OperationError: the headline metric is not among them, or there is none at all.
        """
        names = [key for key in metrics if "," in key and not key.split(",")[0].endswith("_stderr")]
        metric = self.metric or next(iter(names), None)
        if metric not in names:
            raise OperationError(
                f"lm-eval gave no {metric or 'metric'} for {self.name}, but {', '.join(names) or 'nothing'}"
            )
        return metric


@dataclasses.dataclass(frozen=True)
class Suite:
    """Benchmarks that are run together.

    Attributes:
      name: as a command is given it.
      benchmarks: in the order of the table.
      limit: questions of each task, where no other number is asked for; None runs them all.
      description: one line for the help.
    """

    name: str
    benchmarks: tuple[Benchmark, ...]
    limit: int | None
    description: str


def _accuracy(name: str, title: str, metric: str = "acc,none", num_fewshot: int = 0) -> Benchmark:
    return Benchmark(name, num_fewshot, metric, title, higher_is_better=True)


def _perplexity(name: str, title: str, metric: str) -> Benchmark:
    return Benchmark(name, 0, metric, title, higher_is_better=False)


_PAPER = (
    _accuracy("mmlu", "MMLU", num_fewshot=5),
    _accuracy("arc_challenge", "ARC-Challenge", "acc_norm,none"),
    _accuracy("hellaswag", "HellaSwag", "acc_norm,none"),
    _accuracy("winogrande", "WinoGrande"),
    _accuracy("piqa", "PIQA", "acc_norm,none"),
    _accuracy("boolq", "BoolQ"),
    _accuracy("truthfulqa_mc1", "TruthfulQA MC1"),
    _accuracy("truthfulqa_mc2", "TruthfulQA MC2"),
    _accuracy("gsm8k", "GSM8K", "exact_match,flexible-extract", num_fewshot=5),
    _accuracy("ifeval", "IFEval", "prompt_level_strict_acc,none"),
    _accuracy("leaderboard_musr", "MuSR", "acc_norm,none"),
    _perplexity("wikitext", "WikiText-2", "word_perplexity,none"),
    _perplexity("lambada_openai", "LAMBADA", "perplexity,none"),
)
_BENCHMARKS = {benchmark.name: benchmark for benchmark in _PAPER}

_INSTRUCT = ("mmlu", "gsm8k", "ifeval", "leaderboard_musr", "truthfulqa_mc1", "truthfulqa_mc2", "lambada_openai")
_QUICK = ("hellaswag", "winogrande", "piqa")

SUITES: Mapping[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite("paper", _PAPER, None, "the 13 benchmarks of the paper"),
        Suite(
            "paper-instruct",
            tuple(_BENCHMARKS[name] for name in _INSTRUCT),
            None,
            "the 7 that the paper ran on the instruct model",
        ),
        Suite(
            "quick",
            tuple(_BENCHMARKS[name] for name in _QUICK),
            100,
            "a rough picture in minutes: the first 100 questions of HellaSwag, WinoGrande and PIQA, each accuracy to "
            "within 5 points of standard error",
        ),
    )
}

# Where in lm-eval the tasks of the suites are defined. It reads the definitions of all its 14,000 tasks otherwise,
# which takes 6 s.
_FOLDERS = (
    "arc",
    "gsm8k",
    "hellaswag",
    "ifeval",
    "lambada",
    "leaderboard/musr",
    "mmlu/default",
    "piqa",
    "super_glue/boolq",
    "truthfulqa",
    "wikitext",
    "winogrande",
)


def find_suite(name: str) -> Suite:
    """The suite of that name.

    Raises:
      RequestError: there is none; the names there are, are offered.
    """
    if name not in SUITES:
        raise RequestError(f"there is no suite {name!r}; choose from {', '.join(SUITES)}")
    return SUITES[name]


def choose_benchmarks(
    suite: str | None, tasks: str | None, include_path: Path | None = None
) -> tuple[tuple[Benchmark, ...], Any]:
    """The benchmarks that a command asks for, and lm-eval's index of tasks, which loads them.

    Args:
      suite: the name of one in `SUITES`, or None.
      tasks: names of tasks between commas, if there is no suite.
      include_path: folder with task definitions of the user's own.

    Raises:
      RequestError: as `find_suite` and `resolve_tasks`.
    """
    benchmarks = () if suite is None else find_suite(suite).benchmarks
    names = [benchmark.name for benchmark in benchmarks] or (tasks or "").split(",")
    if include_path is None:
        manager = task_manager(names)
    else:
        from lm_eval.tasks import TaskManager

        # By itself at first: lm-eval takes seconds to read the definitions of its own thousands of tasks.
        try:
            manager = TaskManager(include_path=str(include_path), include_defaults=False)
            if not {name.strip() for name in names} <= set(manager.all_tasks):
                manager = TaskManager(include_path=str(include_path))
        except TypeError as error:  # of names that are none
            raise RequestError(
                f"`include_path` {include_path}: the definition of a task has no name or a tag that is none ({error})"
            ) from error
    return benchmarks or resolve_tasks(names, manager), manager


def find_benchmark(name: str) -> Benchmark:
    """A benchmark of the paper as the paper ran it, or any other task or group of lm-eval as its author defined it."""
    return _BENCHMARKS.get(name) or Benchmark(name, None, None, name, None)


def task_manager(names: Iterable[str]) -> Any:
    """lm-eval's `TaskManager` with at least the tasks, groups and tags of these names, as far as they exist."""
    import lm_eval.tasks

    names = set(names)
    root = Path(lm_eval.tasks.__file__).parent
    if names <= set(_BENCHMARKS):
        manager = lm_eval.tasks.TaskManager(
            include_defaults=False, include_path=[root / folder for folder in _FOLDERS if (root / folder).is_dir()]
        )
        if names <= set(manager.all_tasks):  # another version of lm-eval may have moved one
            return manager
    return lm_eval.tasks.TaskManager()


def resolve_tasks(names: Sequence[str], manager: Any) -> tuple[Benchmark, ...]:
    """The benchmarks that a list of lm-eval's tasks, groups and tags stands for, without repetitions.

    A tag stands for all of its tasks, as in lm-eval.

    Args:
      names: of tasks and groups.
      manager: lm-eval's index of tasks, see `task_manager`.

    Raises:
      RequestError: a name is unknown (the nearest known ones are offered), the list is empty, or a group has no
        metric of its own.
    """
    known = manager.task_index
    wanted = [name.strip() for name in names if name.strip()]
    if not wanted:
        raise RequestError(f"`tasks` is empty; give names of lm-eval's tasks, such as {','.join(_QUICK)}")
    if unknown := [name for name in wanted if name not in known]:
        raise RequestError(" ".join(_unknown_task(name, known) for name in unknown))
    resolved: list[str] = []
    for name in wanted:
        entry = known[name]
        if entry.kind.name == "TAG":
            resolved += sorted(entry.tags)
        elif entry.kind.name == "GROUP" and not entry.cfg.get("aggregate_metric_list"):
            members = [member for member in entry.cfg["task"] if isinstance(member, str)]
            remedy = f"give its members {','.join(members)}" if members else "give single tasks"
            raise RequestError(f"`tasks` has the group {name}, whose tasks have no metric in common; {remedy}")
        else:
            resolved.append(name)
    return tuple(find_benchmark(name) for name in dict.fromkeys(resolved))


def with_num_fewshot(benchmarks: Iterable[Benchmark], num_fewshot: int) -> tuple[Benchmark, ...]:
    """The same benchmarks with another number of examples before each question.

    Raises:
      RequestError: it is negative.
    """
    if num_fewshot < 0:
        raise RequestError(f"`num_fewshot` is {num_fewshot}; it must be at least 0")
    return tuple(dataclasses.replace(benchmark, num_fewshot=num_fewshot) for benchmark in benchmarks)


def _unknown_task(name: str, known: Iterable[str]) -> str:
    spelled = re.sub(r"[^a-z0-9]+", "_", name.lower())
    nearest = [benchmark for benchmark in _BENCHMARKS if spelled in benchmark]
    for names in (_BENCHMARKS, known):  # the paper's first: among thousands, some name is always nearer
        nearest += difflib.get_close_matches(spelled, names, n=_NEAREST)
    offer = ", ".join(list(dict.fromkeys(nearest))[:_NEAREST])
    return f"lm-eval has no task, group or tag {name!r}" + (f"; did you mean {offer}?" if offer else "")
