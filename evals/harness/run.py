"""Runs lm-eval's tasks on a model, benchmark by benchmark, and turns what comes out into results.

The tasks, few-shot rules, answer checkers and aggregation are lm-eval's. One call of lm-eval a benchmark (a group such
as mmlu is one): the model sees all of a benchmark's requests together, so that it can share their prefixes, a finished
benchmark is stored before the next begins, and its random state does not depend on what else was run.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import itertools
import logging
import math
import numbers
import os
import platform
import random
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from lm_eval.api.model import LM, TemplateLM

from evals.harness.bootstrap import ITERATIONS, standard_errors
from evals.harness.suites import Benchmark, find_benchmark
from evals.harness.task_data import check_examples, task_datasets
from evals.results.degeneration import describe_text
from evals.results.describe import SEEDS
from evals.results.journal import Journal, request_key
from evals.results.outcomes import check_is_mean
from evals.results.store import Result
from gluprune_jax.errors import GlupruneError, OperationError, RequestError, is_out_of_memory, shortened
from gluprune_jax.files.records import json_digest

Limit = int | float  # items of each task, or below 1 a share of them

_REHEARSED = 2  # items of each task
_TEMPLATES = 1024  # kept compiled; a task has about five
_PACKAGES = ("gluprune-jax", "jax", "lm_eval", "datasets", "transformers")


class LoadedBenchmark(NamedTuple):
    """A benchmark with its data, ready to be run on any number of models: each run is as if it were the first.

    Attributes:
      benchmark: what it is.
      tasks: as lm-eval's `TaskManager.load` returns them.
      random_state: Python's and NumPy's, as loading left them.
      prompts: the requests of all items, by task and options, once some of the items were evaluated.
      group: the group without a score of its own in whose place it stands, if it does.
      rehearsal: what the first items give with made-up answers; None where lm-eval cannot score those.
    """

    benchmark: Benchmark
    tasks: Mapping[str, Any]
    random_state: tuple[Any, Any]
    prompts: dict[Any, list[Any]]
    group: str | None = None
    rehearsal: Result | None = None

    @property
    def asked_for(self) -> str:
        """The name that was asked for."""
        return self.group or self.benchmark.name


def load_benchmarks(
    benchmarks: Iterable[Benchmark],
    task_manager: Any,
    *,
    benchmark_data: Path | None = None,
    note: Callable[[str], None] | None = None,
    on_loaded: Callable[[int], None] | None = None,
) -> list[LoadedBenchmark]:
    """Loads the data of all benchmarks and rehearses each on made-up answers to its first items.

    So what is absent is found out before anything is computed: data, packages that a metric needs, the score of a group
    none of whose tasks reports what the group says. In place of such a group stand its members, and a note says so.

    Args:
      benchmarks: which.
      task_manager: lm-eval's, see `evals.harness.suites.task_manager`.
      benchmark_data: folder with local copies of the data sets (see `evals.harness.task_data`); None: the Hub.
      note: called with what the user should know.
      on_loaded: called with the number of benchmarks loaded so far.

    Raises:
      RequestError: a task that needs images or runs the model's answers as programs, a metric that there is not, too
        few few-shot examples, or wrong local data.
      OperationError: the data of a task cannot be had, or something that its checker needs.
    """
    loaded: list[LoadedBenchmark] = []
    with task_datasets(benchmark_data):
        for number, benchmark in enumerate(benchmarks, start=1):
            with quiet_lm_eval():
                one = _load(benchmark, task_manager, note)
            loaded += _rehearsed(one, note)
            if on_loaded:
                on_loaded(number)
    return loaded


def evaluate(
    lm: Any,
    loaded: Iterable[LoadedBenchmark],
    *,
    limit: Limit | Mapping[str, Limit | None] | None = None,
    apply_chat_template: bool = False,
    journal: Journal | None = None,
    bootstrap_iterations: int = ITERATIONS,
    about: Mapping[str, Any] | None = None,
    chosen: Collection[tuple[str, int]] | None = None,
) -> Iterator[Result]:
    """Runs benchmarks on a model and yields each result as soon as it is there.

    Where several ask the same questions and offer other answers (TruthfulQA MC1 and MC2), the first has the answers of
    all scored, so that each question is run once; the journal keeps them for the others. The seconds and the computed
    requests of all are then those of the first.

    An item's outcome is a mapping: "task", "doc_id" (position in its split), "doc_hash" and "target_hash" (SHA-256 of
    item and answer, as lm-eval computes them), "responses" (for each request the responses, one unless the task asks
    several times), "metrics" (by lm-eval's key) and, for generated text, "filtered" (what each filter made of it) and
    "text" (see `evals.results.degeneration.describe_text`).

    Args:
      lm: an `lm_eval.api.model.LM`.
      loaded: from `load_benchmarks`.
      limit: the first so many items of each task; below 1, this share of them; or of each benchmark, by its name.
      apply_chat_template: wraps requests in the model's chat template, few-shot examples as turns of the conversation.
      journal: the one that `lm` writes its responses to, if it does.
      bootstrap_iterations: draws behind the standard errors that come by resampling.
      about: what else the results shall say of the run, beside versions and devices.
      chosen: the only items to evaluate, at least one of each task, by task and position; each is asked the same as
        among all of them. None: all.

    Raises:
      GlupruneError: as `lm` raises it.
    """
    facts = _versions_and_devices() | dict(about or {})
    waiting = list(loaded)

    def limit_of(item: LoadedBenchmark) -> Limit | None:
        return limit[item.benchmark.name] if isinstance(limit, Mapping) else limit

    while waiting:
        item = waiting.pop(0)
        alike = [other for other in waiting if _ask_the_same(item, other)]
        if chosen is not None or journal is None:
            alike = []
        requests = [_log_likelihoods(other, lm, limit_of(other), apply_chat_template) for other in alike]
        with _scoring_too(lm, list(itertools.chain(*requests)), journal), _asking(item, chosen):
            yield _evaluate(item, lm, limit_of(item), apply_chat_template, journal, bootstrap_iterations, facts)


# ------------------------------------------------------------------------------------------------------- loading


def _load(benchmark: Benchmark, task_manager: Any, note: Callable[[str], None] | None) -> LoadedBenchmark:
    random.seed(SEEDS["python"])
    np.random.seed(SEEDS["numpy"])
    try:
        tasks = task_manager.load([benchmark.name])
    except ModuleNotFoundError as error:
        raise OperationError(f"{benchmark.name} needs {_missing(error)}") from error
    except GlupruneError:
        raise
    except (Exception, SystemExit) as error:  # task definitions run code of their own, which may exit
        if is_out_of_memory(error):
            raise
        raise OperationError(f"lm-eval cannot load {benchmark.name}: {_spelled(error)}") from error
    wanted = benchmark.num_fewshot
    fixed = []
    for name, task in tasks["tasks"].items():
        _check_task(name, task)
        # lm-eval's rule: a task that sets its number to 0 itself keeps it.
        own = task.get_config("num_fewshot")
        if own == 0 and wanted:
            fixed.append(name)
        elif wanted is not None or own is None:
            task.set_config(key="num_fewshot", value=wanted or 0)
        check_examples(task)
    if fixed and note:
        note(f"{benchmark.name} takes no few-shot examples but its own: {wanted} were asked for, and none are added")
    return LoadedBenchmark(benchmark, tasks, (random.getstate(), np.random.get_state()), {})


def _check_task(name: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise RequestError(f"{name} runs what the model writes as a program, which is not supported; leave it out")
    if getattr(task, "MULTIMODAL", False):
        raise RequestError(f"{name} shows the model images or sounds; accepted: tasks of text alone")
    if task.OUTPUT_TYPE == "generate_until" and not callable(task.get_config("process_results")):
        for metric, function in getattr(task, "_metric_fn_list", {}).items():
            if function is None:
                raise RequestError(
                    f"{name} reports {metric}, which lm-eval does not have and cannot get from the Hugging Face hub "
                    f"here; leave the task out"
                )
    if task.get_config("dataset_path") == "google/IFEval":
        import nltk

        try:
            nltk.data.find("tokenizers/punkt_tab")
        except LookupError as error:
            raise OperationError(
                f"the checker of {name} needs NLTK's punkt_tab, which cannot be downloaded; on a connected machine run "
                f"`python -m nltk.downloader punkt_tab`, and set NLTK_DATA to the folder that holds it"
            ) from error


# ----------------------------------------------------------------------------------------------------- rehearsing


class _MadeUp(LM):  # type: ignore[misc]
    """Answers without a model."""

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return [(-1.0 - len(request.args[1]), False) for request in requests]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        return [-1.0 - len(request.args[0]) for request in requests]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        return ["1"] * len(requests)


class _NoGroupScoreError(OperationError):
    """None of a group's tasks reports the metrics that the group is the mean of."""


def _rehearsed(loaded: LoadedBenchmark, note: Callable[[str], None] | None) -> list[LoadedBenchmark]:
    """A benchmark with its rehearsal, or in place of a group that has no score its members with theirs."""
    name = loaded.benchmark.name
    try:
        result = _evaluate(loaded, _MadeUp(), _REHEARSED, False, None, 0, {})
    except _NoGroupScoreError:
        group = loaded.tasks["groups"][name]
        if _may_have_score(group):
            return [loaded]
        metrics = ", ".join(dict.fromkeys(shortened(wanted.metric) for wanted in group.aggregate_metric_list))
        if note:
            note(f"the group {name} has no score, as none of its tasks reports {metrics}; its members stand for it")
        members = [_member(loaded, child) for child in group]
        return [one for member in members for one in _rehearsed(member, note)]
    except OperationError as error:
        cause = error.__cause__
        if isinstance(cause, ImportError):
            raise OperationError(f"the metrics of {name} need {_missing(cause)}") from cause
        if isinstance(cause, OSError) or type(cause) is LookupError:  # the network, NLTK's data
            raise OperationError(f"the metrics of {name} need what cannot be had here: {_spelled(cause)}") from cause
        if cause is not None:  # the answers may be at fault
            return [loaded]
        raise
    return [loaded._replace(rehearsal=result)]


def _may_have_score(group: Any) -> bool:
    """Whether a task of a group declares what the group is the mean of, even if its first items lack it."""
    return any(
        wanted.metric in (task.aggregation() or {})
        and (wanted.filter_list is None or {made.name for made in task._filters} & set(wanted.filter_list))
        for wanted in group.aggregate_metric_list
        for task in group.get_all_tasks()
    )


def _member(loaded: LoadedBenchmark, child: Any) -> LoadedBenchmark:
    """A task or group of a group, as a benchmark of its own."""
    if hasattr(child, "get_all_tasks"):
        name, groups = child.name, {one.name: one for one in (child, *child.get_all_groups())}
        tasks = {task.task_name: task for task in child.get_all_tasks()}
    else:
        name, groups, tasks = child.task_name, {}, {child.task_name: child}
    benchmark = dataclasses.replace(find_benchmark(name), num_fewshot=loaded.benchmark.num_fewshot)
    return loaded._replace(benchmark=benchmark, tasks={"tasks": tasks, "groups": groups}, group=loaded.asked_for)


def check_testable(loaded: LoadedBenchmark, limit: int | float | None, *, some: bool = False) -> None:
    """Makes sure, as far as can be told without a model, that a study can test a benchmark item by item.

    Args:
      loaded: the benchmark.
      limit: as for `evaluate`.
      some: whether some of its items will be evaluated, of each task another number.

    Raises:
      RequestError: its headline is no mean over items.
    """
    if loaded.rehearsal is None:
        return
    with contextlib.suppress(OperationError):  # values that are no numbers may come of the made-up answers
        check_is_mean(loaded.rehearsal)
    group = loaded.tasks["groups"].get(loaded.benchmark.name)
    if group is None:
        return
    metric = loaded.rehearsal.metric.partition(",")[0]
    sizes = {sum(1 for _ in documents) for _, documents in task_documents(loaded, limit)}
    if not any(one.metric == metric and not one.weight_by_size for one in group.aggregate_metric_list):
        return
    title = loaded.benchmark.title
    if len(sizes) > 1:
        raise RequestError(
            f"{title}: {metric} is the mean over tasks of different sizes, and no mean over items: a study cannot test "
            f"it; give the tasks of the group one by one"
        )
    if some:
        raise RequestError(
            f"{title}: {metric} is the mean over tasks, and no mean over items as long as some are missing: it cannot "
            f"stop early; give the tasks of the group one by one"
        )


def task_documents(
    loaded: LoadedBenchmark, limit: int | float | None
) -> Iterator[tuple[str, Iterator[tuple[int, Any]]]]:
    """Of each task the items that are evaluated, by their position in the split."""
    for name, task in loaded.tasks["tasks"].items():
        share = math.ceil(len(task.eval_docs) * limit) if limit is not None and limit < 1 else limit
        yield name, task.doc_iterator(limit=share)


# ------------------------------------------------------------------------------------------------------- running


def _evaluate(
    loaded: LoadedBenchmark,
    lm: Any,
    limit: int | float | None,
    apply_chat_template: bool,
    journal: Journal | None,
    bootstrap_iterations: int,
    about: Mapping[str, Any],
) -> Result:
    import lm_eval

    start, answered = time.perf_counter(), 0 if journal is None else journal.answered
    random.setstate(loaded.random_state[0])
    np.random.set_state(loaded.random_state[1])
    for task in loaded.tasks["tasks"].values():
        task.set_fewshot_seed(seed=SEEDS["fewshot"])
    with quiet_lm_eval(), standard_errors():
        _fix_language_detection()
        try:
            outcome = lm_eval.evaluate(
                lm,
                loaded.tasks,
                limit=limit,
                bootstrap_iters=bootstrap_iterations,
                apply_chat_template=apply_chat_template,
                fewshot_as_multiturn=apply_chat_template,
            )
        except GlupruneError:
            raise
        except (Exception, SystemExit) as error:  # metrics are programs
            if is_out_of_memory(error) or _is_from(error, lm):
                raise
            raise OperationError(f"lm-eval fails on {loaded.benchmark.name}: {_spelled(error)}") from error
    seconds = time.perf_counter() - start
    benchmark, tasks = loaded.benchmark, loaded.tasks["tasks"]
    metrics = _metrics(outcome["results"][benchmark.name])
    if not metrics and benchmark.name in loaded.tasks["groups"]:
        raise _NoGroupScoreError(f"none of the tasks of {benchmark.name} reports a metric of the group")
    headline = benchmark.headline(metrics)
    higher = benchmark.higher_is_better
    if higher is None:
        higher = outcome["higher_is_better"].get(benchmark.name, {}).get(headline.partition(",")[0]) is not False
    instances = [instance for task in tasks.values() for instance in task.instances]
    keys = [request_key(instance.request_type, instance.args) for instance in instances]
    items = [item for task in tasks for item in _items(task, outcome["samples"][task], lm)]
    data = _data_digest(outcome, with_prompts=not apply_chat_template)
    return Result(
        benchmark=benchmark.name,
        title=benchmark.title,
        metric=headline,
        higher_is_better=higher,
        shots=_shots(outcome["n-shot"][task] for task in tasks),
        limit=limit,
        identity=json_digest([data, keys]),
        data=data,
        metrics=metrics,
        tasks=_task_records(outcome),
        num_items=len(items),
        requests=len(keys),
        computed=len(set(keys)) if journal is None else journal.answered - answered,
        truncated=_truncated(journal, instances),
        seconds=round(seconds, 3),
        bootstrap_iterations=bootstrap_iterations,
        about=about,
        items=items,
    )


class _HeardError(Exception):
    """Carries the requests of a benchmark, instead of having them answered."""

    def __init__(self, requests: Sequence[Any]) -> None:
        super().__init__()
        self.requests = requests


class _Listener:
    """A model that only hears which log-likelihoods it is asked for."""

    def __init__(self, lm: Any) -> None:
        self._lm = lm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lm, name)

    def loglikelihood(self, requests: Sequence[Any], **_: Any) -> None:
        raise _HeardError(requests)


def _log_likelihoods(loaded: LoadedBenchmark, lm: Any, limit: Limit | None, apply_chat_template: bool) -> Sequence[Any]:
    """The requests for log-likelihoods that a benchmark will make."""
    try:
        _evaluate(loaded, _Listener(lm), limit, apply_chat_template, None, 0, {})
    except _HeardError as heard:
        requests: Sequence[Any] = heard.requests
        return requests
    return []


@contextlib.contextmanager
def _scoring_too(lm: Any, more: Sequence[Any], journal: Journal | None) -> Iterator[None]:
    """In the block, a model that must compute log-likelihoods computes these too, and its journal keeps them."""
    if not more or journal is None:
        yield
        return
    compute = lm.loglikelihood

    def compute_more(requests: Sequence[Any], **options: Any) -> Sequence[Any]:
        is_known = all(journal.get("loglikelihood", request.args) is not None for request in requests)
        answers: Sequence[Any] = compute([*requests, *([] if is_known else more)], **options)
        return answers[: len(requests)]

    lm.loglikelihood = compute_more
    try:
        yield
    finally:
        del lm.loglikelihood  # the class has the original


def _ask_the_same(one: LoadedBenchmark, other: LoadedBenchmark) -> bool:
    """Whether two benchmarks have log-likelihoods after the same questions."""
    return not _questions(one).isdisjoint(_questions(other))


def _questions(loaded: LoadedBenchmark) -> set[tuple[Any, ...]]:
    """For each task that only scores answers, the data and the template of its questions."""
    tasks = [task for task in loaded.tasks["tasks"].values() if task.OUTPUT_TYPE == "multiple_choice"]
    names = ("dataset_path", "dataset_name", "test_split", "validation_split", "num_fewshot", "doc_to_text")
    templated = [task for task in tasks if isinstance(task.get_config("doc_to_text"), str)]
    return {tuple(task.get_config(name) for name in names) for task in templated}


@contextlib.contextmanager
def _asking(loaded: LoadedBenchmark, chosen: Collection[tuple[str, int]] | None) -> Iterator[None]:
    """Has a benchmark's tasks ask some of their items only.

    The requests of all items are made, once: few-shot examples are drawn from one item to the next.
    """
    if chosen is None:
        yield
        return
    tasks = loaded.tasks["tasks"]

    def build(name: str, task: Any, **options: Any) -> None:
        asked = (name, options["limit"], options["apply_chat_template"], options["tokenizer_name"])
        if asked not in loaded.prompts:
            type(task).build_all_requests(task, **options)
            loaded.prompts[asked] = task.instances
        instances = (one for one in loaded.prompts[asked] if (name, one.doc_id) in chosen)
        task._instances = [dataclasses.replace(one, resps=[], filtered_resps={}) for one in instances]
        task.doc_iterator = functools.partial(iterate, name, task)

    def iterate(name: str, task: Any, **options: Any) -> Iterator[tuple[int, Any]]:
        return (pair for pair in type(task).doc_iterator(task, **options) if (name, pair[0]) in chosen)

    for name, task in tasks.items():
        task.build_all_requests = functools.partial(build, name, task)
    try:
        yield
    finally:
        for task in tasks.values():
            del task.build_all_requests
            vars(task).pop("doc_iterator", None)


def _is_from(error: BaseException, lm: Any) -> bool:
    """Whether an exception passed through a method of the model."""
    return any(frame.f_locals.get("self") is lm for frame, _ in traceback.walk_tb(error.__traceback__))


def _missing(error: ImportError) -> str:
    return f"the Python package {error.name}, which is not installed" if error.name else f"more ({_spelled(error)})"


def _spelled(error: BaseException) -> str:
    first_line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first_line[:200]}" if first_line else type(error).__name__


def _versions_and_devices() -> dict[str, Any]:
    devices = jax.devices()
    return {
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES}
        | {"python": platform.python_version()},
        "devices": f"{len(devices)} x {devices[0].device_kind}",
    }


@contextlib.contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """lm-eval without its bars, notes and prints at the terminal, and with each prompt template compiled once.

    It compiles its templates anew for every document, which takes three quarters of the time that prompts take.
    """
    import datasets
    import lm_eval.api.task
    import lm_eval.utils

    logger, module, templates = logging.getLogger("lm_eval"), lm_eval.api.task, lm_eval.utils.env
    level, bar, bars = logger.level, module.tqdm, datasets.are_progress_bars_disabled()
    logger.setLevel(os.environ.get("LMEVAL_LOG_LEVEL", "ERROR").upper())
    module.tqdm = lambda iterable, **_: iterable
    templates.from_string = functools.lru_cache(_TEMPLATES)(templates.from_string)
    datasets.disable_progress_bars()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)
        module.tqdm = bar
        del templates.from_string  # the class has the original
        if not bars:
            datasets.enable_progress_bars()


def _fix_language_detection() -> None:
    # IFEval's checker guesses languages with a generator that is seeded anew from the clock for every text.
    if "langdetect" in sys.modules:
        sys.modules["langdetect"].DetectorFactory.seed = 0


# ------------------------------------------------------------------------------------------------------ outcomes


def _metrics(results: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """lm-eval's flat results as value and standard error by metric."""
    metrics = {}
    for key, value in results.items():
        metric, comma, filter_name = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, numbers.Real):
            stderr = results.get(f"{metric}_stderr,{filter_name}")  # "N/A" where there is none
            metrics[key] = {
                "value": float(value),
                "stderr": float(stderr) if isinstance(stderr, numbers.Real) else None,
            }
    return metrics


def _task_records(outcome: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "version": str(outcome["versions"].get(name)),
            "num_fewshot": outcome["n-shot"].get(name),
            "items": results.get("sample_len"),
            "metrics": _metrics(results),
        }
        for name, results in outcome["results"].items()
    }


def _shots(numbers: Iterable[int]) -> str:
    low, *_, high = sorted([*numbers] * 2)
    return str(low) if low == high else f"{low}-{high}"


def _data_digest(outcome: Mapping[str, Any], *, with_prompts: bool) -> str:
    """Identifies tasks and data, the same for all models: in a chat template even the prompts are the model's own."""
    digest = hashlib.sha256()
    for task, samples in sorted(outcome["samples"].items()):
        digest.update(f"{task} {outcome['versions'][task]} {outcome['n-shot'][task]}\n".encode())
        for sample in samples:
            hashes = [sample["doc_hash"], sample["target_hash"]] + [sample["prompt_hash"]] * with_prompts
            digest.update(f"{' '.join(hashes)}\n".encode())
    return digest.hexdigest()


def _items(task: str, samples: Sequence[Mapping[str, Any]], lm: Any) -> list[dict[str, Any]]:
    """lm-eval's samples, one for each item and filter, as one outcome for each item, without the data's text."""
    items: dict[int, dict[str, Any]] = {}
    for sample in samples:
        item = items.setdefault(
            sample["doc_id"],
            {
                "task": task,
                "doc_id": sample["doc_id"],
                "doc_hash": sample["doc_hash"],
                "target_hash": sample["target_hash"],
                "responses": _plain(sample["resps"]),
                "metrics": {},
            },
        )
        item["metrics"] |= {f"{metric},{sample['filter']}": _outcome(sample[metric]) for metric in sample["metrics"]}
        if isinstance(sample["resps"][0][0], str):
            item.setdefault("filtered", {})[sample["filter"]] = _plain(sample["filtered_resps"])
            if "text" not in item:
                prompt, decoding = sample["arguments"][0]
                most = decoding.get("max_gen_toks") or getattr(lm, "max_gen_toks", None)
                tokenize = _tokenizes(lm)
                item["text"] = describe_text(prompt, sample["resps"][0][0], tokenize, most)
    return list(items.values())


def _tokenizes(lm: Any) -> Callable[[str], Sequence[int]] | None:
    """What makes tokens of a text, without the special ones that may stand around a prompt."""
    tokenize: Callable[[str], Sequence[int]] | None = getattr(lm, "tok_encode", None)
    return functools.partial(lm.tok_encode, add_special_tokens=False) if isinstance(lm, TemplateLM) else tokenize


def _outcome(value: Any) -> Any:
    """What a metric keeps of an item until all are there, without the data's text: of that its SHA-256 is kept."""
    plain = _plain(value)
    if isinstance(plain, list):
        return [_outcome(part) for part in plain]
    return f"sha256:{json_digest(plain)}" if isinstance(plain, str | dict) else plain


def _plain(value: Any) -> Any:
    """A value as JSON has it: tuples are lists, NumPy's scalars and arrays Python's, and others their text."""
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, set | frozenset):
        return sorted(map(_plain, value), key=str)
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    return value if isinstance(value, str | int | float | None) else str(value)


def _truncated(journal: Journal | None, instances: Iterable[Any]) -> int | None:
    if journal is None:
        return None
    answers = (journal.answer(instance.request_type, instance.args) for instance in instances)
    return sum(answer is not None and answer.truncated for answer in answers)
