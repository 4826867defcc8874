"""A study of what pruning does to a model: `gluprune sweep`, `python -m evals.sweep`."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import shlex
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import convert
from convert.calibration_text import calibration_windows
from convert.chat import fix_date
from convert.pypi import cache_folder
from convert.tokenizer import load_tokenizer, tokens_beyond
from evals.cli import options as eval_options
from evals.harness.suites import SUITES, Benchmark, choose_benchmarks, find_suite
from evals.results.outcomes import SHARES, Outcomes, check_is_mean, outcomes_of_items
from evals.results.store import Result, SettingFolder, check_output, load_result, open_setting
from evals.study.folder import (
    BASELINES_FILE,
    RESULTS_FOLDER,
    SWEEP_FILE,
    SWEEP_FORMAT,
    VERSION,
    baselines_of,
    has_baselines,
    is_sweep_row,
    load_baselines,
    save_baselines,
)
from evals.study.rows import ResumableRows, check_rows, check_texts, recorded_dates
from evals.study.study import DENSE, MARGIN, Score, StoppingRule, StudiedBenchmark, Study, Variant
from gluprune_jax.cli import method_options, options, terminal
from gluprune_jax.cli.processes import ProcessesRequest
from gluprune_jax.data.documents import contents, read_calibration
from gluprune_jax.errors import RequestError, check_at_least
from gluprune_jax.files.atomic import check_file
from gluprune_jax.parallel.distributed import check_same, is_main, synchronize_errors
from gluprune_jax.pruning.statistics import describe_windows

if TYPE_CHECKING:  # help and a refused argument need no JAX: what does is imported where it is used
    from gluprune_jax.memory.mesh_choice import MeshRequest
    from gluprune_jax.pruning.methods import Method, Pruned

PERCENTS = (0.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0)
KEPT_BINS = 64  # of neurons of a layer, in the picture of which were kept


@dataclasses.dataclass(frozen=True)
class Preset:
    """A study of the paper; the fields are options of the same names."""

    model: str
    suite: str
    dtype: str
    prune_percent: tuple[float, ...]


PRESETS: Mapping[str, Preset] = {
    "paper-1b": Preset("meta-llama/Llama-3.2-1B", "paper", "bfloat16", PERCENTS),
    "paper-3b": Preset("meta-llama/Llama-3.2-3B", "paper", "bfloat16", PERCENTS),
    "paper-1b-instruct": Preset(
        "meta-llama/Llama-3.2-1B-Instruct", "paper-instruct", "bfloat16", (0.0, 10.0, 40.0, 60.0)
    ),
}

DESCRIPTION = """\
Prunes a model to several sizes, evaluates each on a suite of benchmarks, tests what differs, and writes a report.
Neurons are scored once and masked, so that all sizes run in the same compiled programs. The same command resumes an
interrupted run.

examples:
  gluprune sweep --model demo --prune-percent 0,10,20,40 --suite quick --benchmark-data demo --output study
  gluprune sweep --preset paper-1b --output study
  gluprune sweep --model llama-1b --methods ppm,hybrid+least-squares --calibration-data corpus.txt \\
      --prune-percent 10,20,40 --suite paper --limit 200,wikitext=20 --output study
"""
START = "python -m evals.sweep"


@dataclasses.dataclass(frozen=True)
class SweepRequest:
    """Which model is studied, on what and how; the fields are options of the same names, after the preset."""

    model: str | None
    revision: str | None
    dtype: str | None
    methods: tuple[str, ...]
    prune_percent: tuple[float, ...] | None
    expansion_ratio: tuple[str, ...] | None
    width: tuple[int, ...] | None
    multiple_of: int
    min_keep: float
    slice: bool
    calibration: tuple[str, ...]
    calibration_tokens: int
    sequence_length: int
    suite: str | None
    tasks: str | None
    limit: str | None
    apply_chat_template: bool
    chat_template: str | None
    thinking: str | None
    date: datetime.date | None
    benchmark_data: str | None
    include_path: Path | None
    until_decided: float | None
    output: Path
    overwrite: bool
    resume: bool
    batch_size: int | None
    context_length: int | None
    json: bool
    devices: MeshRequest


def parser(start: str = START) -> terminal.ArgumentParser:
    """The command line; `start` is what it begins with."""
    parser = terminal.ArgumentParser(start, DESCRIPTION)
    options.add_model(parser, required=False)
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        help="model, suite, sizes and dtype of the paper; explicit options override the preset",
    )
    which = parser.add_argument_group("what is studied")
    options.add(which, "--methods", default=("ppm",))
    targets = which.add_mutually_exclusive_group()
    spelled = ",".join(f"{percent:g}" for percent in PERCENTS)
    options.add(targets, "--prune-percent", about=f"; 0 is the dense model (default: {spelled})")
    options.add(targets, "--expansion-ratio")
    options.add(targets, "--width")
    options.add(which, "--multiple-of")
    options.add(which, "--min-keep")
    which.add_argument(
        "--slice", action="store_true", help="evaluate models that are really smaller, each in programs of its own"
    )
    options.add_calibration(parser)
    what = parser.add_argument_group("what is evaluated")
    eval_options.add_suite(what, required=False)
    options.add(what, "--limit")
    eval_options.add_harness(what)
    what.add_argument(
        "--until-decided",
        nargs="?",
        type=float,
        const=MARGIN,
        metavar="MARGIN",
        help="ask items in random order, and stop a benchmark of a model when its verdict is settled: worse or better "
        f"than dense, or less than MARGIN away (default: {MARGIN:g}); perplexities run in full",
    )
    how = parser.add_argument_group("how")
    options.add(how, "--output", about="folder of the study", type=Path, default=Path("study"))
    options.add(how, "--overwrite", about=f"what is in DIR, if it has another {SWEEP_FILE}")
    options.add(how, "--resume")
    options.add(how, "--batch-size", about=" in each replica (default: by the memory there is)")
    options.add(how, "--context-length")
    options.add(how, "--json")
    options.add(how, "--debug")
    options.add_devices(parser, "as many replicas as fit")
    return parser


def main(argv: Sequence[str] | None = None, *, start: str = START) -> int:
    """Runs the command line, which begins with `start`, and returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser(start).parse_args(argv)
    command = shlex.join([*start.split(), *argv])
    request = _with_preset(options.request(SweepRequest, args, devices=options.mesh_request(args)), args.preset)
    return terminal.run(
        "gluprune",
        lambda: _sweep(request, command),
        debug=args.debug,
        processes=options.request(ProcessesRequest, args),
        flags=parser().flags,
        kept=lambda: f"what was measured so far is saved in {request.output}; to resume:\n  {command}",
    )


def _with_preset(request: SweepRequest, name: str | None) -> SweepRequest:
    """A request with what a preset says and no option says otherwise; without both, the sizes of the paper."""
    has_size = request.prune_percent or request.expansion_ratio or request.width
    if name is None:
        return request if has_size else dataclasses.replace(request, prune_percent=PERCENTS)
    preset = PRESETS[name]
    return dataclasses.replace(
        request,
        model=request.model or preset.model,
        dtype=request.dtype or preset.dtype,
        suite=request.suite if request.suite or request.tasks else preset.suite,
        prune_percent=request.prune_percent if has_size else preset.prune_percent,
    )


def _sweep(request: SweepRequest, command: str) -> None:
    from evals.cli.study import print_study
    from evals.harness.footprint import evaluation_uses
    from evals.harness.run import check_testable, load_benchmarks
    from evals.report.files import write_report
    from evals.study.folder import load_study
    from evals.study.grid import Grid, smaller_sizes
    from gluprune_jax.memory.mesh_choice import mesh_chooser
    from gluprune_jax.pruning.chooser import Chooser
    from gluprune_jax.pruning.plan import check_targets

    given = request.calibration
    request, wanted, targets, model = _check_request(request)
    method_options.note_own_text(given, request.calibration)
    with synchronize_errors():
        if is_main():
            check_output(request.output / RESULTS_FOLDER)
            check_file(request.output / SWEEP_FILE, overwrite=True)
            if request.resume:
                check_rows(request.output / SWEEP_FILE)
            if not request.overwrite:
                check_texts(request.output / SWEEP_FILE, request.calibration)
        benchmarks, manager = choose_benchmarks(request.suite, request.tasks, request.include_path)
        items = _items(request.limit, [benchmark.name for benchmark in benchmarks])
        with terminal.count_progress("loading the data", len(benchmarks), "benchmarks") as progress:
            loaded = load_benchmarks(
                benchmarks,
                manager,
                benchmark_data=eval_options.data_folder(request.benchmark_data),
                note=terminal.note,
                on_loaded=progress,
            )
        suite_limit = find_suite(request.suite).limit if request.suite and items is None else None
        limits = {
            one.benchmark.name: suite_limit if items is None else eval_options.items_per_task(items, one, loaded)
            for one in loaded
        }
        keys = {} if request.until_decided is None else _stopping(loaded, limits)
        for one in loaded:
            check_testable(one, limits[one.benchmark.name], some=one.benchmark.name in keys)
        documents = read_calibration(request.calibration, "--calibration-data", terminal.note)
    check_same("the texts of --calibration-data", contents(documents))
    eval_options.use_compilation_cache()
    with terminal.byte_progress() as progress:
        checkpoint = convert.load(
            model,
            dtype=request.dtype,
            revision=request.revision,
            mesh=mesh_chooser(
                request.devices,
                evaluation_uses(request.batch_size, request.context_length, request.devices.device_memory),
            ),
            progress=progress,
        )
    for text in checkpoint.notes:
        terminal.note(text)
    has_chats = any(document.kind == "chat" for document in documents)
    with synchronize_errors():
        tokenizer = load_tokenizer(checkpoint, request.chat_template)
    has_prompts = has_chats or request.apply_chat_template
    recorded = recorded_dates(request.output / SWEEP_FILE)
    date = fix_date(tokenizer if has_prompts else None, request.date, recorded, terminal.note)
    text_date, prompt_date = date if has_chats else None, date if request.apply_chat_template else None
    with synchronize_errors():
        targets = smaller_sizes(checkpoint.config, targets)
        check_targets(checkpoint.config, targets)
        if beyond := tokens_beyond(tokenizer, checkpoint.config.vocab_size):
            terminal.note(beyond)
        windows = None
        if documents:
            windows = calibration_windows(
                checkpoint,
                documents,
                tokens=request.calibration_tokens,
                sequence_length=request.sequence_length,
                chat_template=request.chat_template,
                date=text_date,
                progress=terminal.count_progress,
            )
    calibration = None if windows is None else describe_windows(windows, request.calibration, text_date)
    about = _about(request, prompt_date, checkpoint, benchmarks, items, calibration)
    if request.until_decided is not None:
        there_are = {name: len(found) for name, found in keys.items()}
        rule = StoppingRule(request.until_decided, len(targets), len(loaded), there_are)
        about["until_decided"] = dataclasses.asdict(rule)
    rows = ResumableRows.open(
        request.output / SWEEP_FILE,
        about,
        is_row=is_sweep_row,
        overwrite=request.overwrite,
        optional=("calibration",),
        resume=request.resume,
    )
    chooser = Chooser(
        checkpoint.model,
        checkpoint.mlp_weights,
        windows=windows,
        names=request.calibration,
        date=text_date,
        refits=any(method.needs_grams for method in wanted),
        cache=cache_folder(),
        progress=terminal.count_progress,
    )
    opened = functools.partial(_opened, request, prompt_date, checkpoint)
    ask = functools.partial(_ask, request, command, limits)
    if keys:
        _write_baselines(request, checkpoint, loaded, limits, rows)  # verdicts need them
    known = load_baselines(request.output / BASELINES_FILE) if keys else {}
    grid = Grid(wanted, targets, {"method": DENSE, "level": DENSE}, "level")
    for key, _, pruned in grid.missing(chooser, rows):
        terminal.note(f"evaluating {key['method']}{'' if pruned is None else ', ' + key['level']}")
        for note in [] if pruned is None else pruned.notes():
            terminal.note(note)
        with contextlib.ExitStack() as stack:
            own = stack.enter_context(opened(pruned))
            models = [own] if pruned is None or not keys else [stack.enter_context(opened(None)), own]
            stems = {}
            whole = ask(own, [one for one in loaded if one.benchmark.name not in keys])
            for one in loaded:
                name = one.benchmark.name
                result = _ask_until_decided(ask, rows, known, models, one, keys[name]) if name in keys else next(whole)
                stored = own.folder.save(result)
                stems[name] = stored.file_stem
                of = f" of {len(keys[name]):,}" if name in keys else ""
                terminal.note(f"{stored.title}: {stored.metric} {stored.value:.4f} ({stored.num_items:,}{of} items)")
            setting = own.folder.path.name
        rows.add({**key, **_describe(checkpoint, pruned), "setting": setting, "results": stems})
        _write_baselines(request, checkpoint, loaded, limits, rows)  # early, so that what is there can be reported
    _write_baselines(request, checkpoint, loaded, limits, rows)  # where a run was killed before it got to them
    with synchronize_errors():
        if is_main():
            study = load_study(request.output)
            write_report(study, request.output)
            print_study(study, as_json=request.json)
            if not request.json:
                print(f"report: {request.output / 'report.html'}")


# ------------------------------------------------------------------------------------------------- what is asked


def _check_request(request: SweepRequest) -> tuple[SweepRequest, list[Method], list[dict[str, Any]], str]:
    """Refuses early what could only fail late; returns the request with its text, methods, sizes and the model."""
    import jax

    from evals.study.grid import parse_methods, sizes
    from gluprune_jax.pruning.methods import calibration_texts

    if (model := request.model) is None:
        raise RequestError("no model: give --model MODEL or --preset NAME")
    if request.suite is None and request.tasks is None:
        raise RequestError(f"no benchmarks: give --suite NAME ({', '.join(SUITES)}) or --tasks LIST")
    if request.until_decided is not None and not 0 < request.until_decided < 1:
        raise RequestError(f"--until-decided is {request.until_decided:g}; give a margin between 0 and 1, such as 0.05")
    if request.until_decided is not None and jax.process_count() > 1:
        raise RequestError("--until-decided runs in one process; leave it out, or --distributed")
    check_at_least(1, batch_size=request.batch_size, multiple_of=request.multiple_of)
    check_at_least(2, context_length=request.context_length)
    wanted = parse_methods(request.methods, request.min_keep)
    request = dataclasses.replace(request, calibration=calibration_texts(wanted, request.calibration))
    method_options.check_calibration(request, wanted)
    if request.calibration and not any(method.needs_text or method.needs_statistics for method in wanted):
        raise RequestError(
            f"--calibration-data has no effect with --methods {','.join(request.methods)}; give a method that uses "
            f"activations, or leave it out"
        )
    if request.chat_template is not None and not (request.apply_chat_template or request.calibration):
        raise RequestError(
            "--chat-template has no effect; give --apply-chat-template, or --calibration-data with conversations, or "
            "leave it out"
        )
    if request.thinking is not None and not request.apply_chat_template:
        raise RequestError("--thinking is a mode of the chat template; give --apply-chat-template too, or leave it out")
    eval_options.check_include_path(request.include_path)
    eval_options.check_installed(is_study=True)
    targets = sizes(
        multiple_of=request.multiple_of,
        prune_percent=request.prune_percent,
        expansion_ratio=request.expansion_ratio,
        width=request.width,
    )
    return request, wanted, targets, model


def _items(limit: str | None, benchmarks: Sequence[str]) -> dict[str, int] | None:
    """Items of each benchmark that `--limit` asks for; None leaves them to the suite."""
    found = eval_options.parse_limit(limit, benchmarks)
    if found is None:
        return None
    items = {name: int(value) for name, value in found.items()}
    if 0 in items.values():
        raise RequestError(f"--limit is {limit}; a sweep takes whole numbers from 1")
    return items


def _stopping(
    loaded: Sequence[Any], limits: Mapping[str, eval_options.Limit | None]
) -> dict[str, list[tuple[str, int]]]:
    """The items, by task and position, of each benchmark that can stop before all of them were asked."""
    from evals.harness.run import task_documents

    found = {}
    for one in loaded:
        name, title = one.benchmark.name, one.benchmark.title
        if one.rehearsal is None:
            raise RequestError(f"--until-decided: what {title} reports is known only once it was run; leave it out")
        metric = one.rehearsal.metric.partition(",")[0]
        if metric in SHARES:
            documents = task_documents(one, limits[name])
            found[name] = [(task, doc_id) for task, items in documents for doc_id, _ in items]
        else:
            terminal.note(f"{title} runs in full: {metric} has no known bounds, which stopping early needs")
    if not found:
        raise RequestError("--until-decided has no effect: all of the benchmarks run in full; leave it out")
    return found


def _about(
    request: SweepRequest,
    date: datetime.date | None,
    checkpoint: convert.Checkpoint,
    benchmarks: Sequence[Benchmark],
    items: Mapping[str, int] | None,
    calibration: Mapping[str, Any] | None,
) -> dict[str, Any]:
    from gluprune_jax.models.parameters import checksum
    from gluprune_jax.pruning.scores import fingerprint

    return {
        "format": SWEEP_FORMAT,
        "version": VERSION,
        "model": request.model,
        "weights": [fingerprint(checkpoint.model), checksum(checkpoint.model, mlps=False), request.dtype],
        "hidden_size": checkpoint.config.hidden_size,
        "gluprune_jax": importlib.metadata.version("gluprune-jax"),
        "benchmarks": [benchmark.name for benchmark in benchmarks],
        "items": items,
        "suite": request.suite,
        "data_dir": request.benchmark_data,
        "apply_chat_template": request.chat_template or request.apply_chat_template,
        **({} if date is None else {"date": date.isoformat()}),
        **({} if request.thinking is None else {"thinking": request.thinking}),
        "max_length": request.context_length,
        "calibration": calibration,
        "multiple_of": request.multiple_of,
        "floor": request.min_keep,
        "slice": request.slice,
    }


# ------------------------------------------------------------------------------------------------------- measuring


def _describe(checkpoint: convert.Checkpoint, pruned: Pruned | None) -> dict[str, Any]:
    config = checkpoint.config
    widths = config.intermediate_sizes if pruned is None else pruned.plan.widths
    kept: Sequence[NDArray[Any]] = (
        [np.arange(size) for size in config.intermediate_sizes] if pruned is None else list(pruned.plan.kept)
    )
    return {
        "removed": 1 - sum(widths) / sum(config.intermediate_sizes),
        "expansion_ratio": sum(widths) / len(widths) / config.hidden_size,
        "widths": list(widths),
        "kept": [_density(one, size) for one, size in zip(kept, config.intermediate_sizes, strict=True)],
        **({} if pruned is None else pruned.record()),
    }


def _density(kept: NDArray[Any], size: int) -> list[float]:
    """The share of neurons kept in each of equal parts of a layer."""
    bins = min(KEPT_BINS, size)
    part = np.arange(size) * bins // size
    return [round(float(x), 4) for x in np.bincount(part[kept], minlength=bins) / np.bincount(part, minlength=bins)]


class _Model(NamedTuple):
    """A model that answers, with the folder of its results."""

    lm: Any
    folder: SettingFolder


@contextlib.contextmanager
def _opened(
    request: SweepRequest, date: datetime.date | None, checkpoint: convert.Checkpoint, pruned: Pruned | None
) -> Iterator[_Model]:
    """A model that is asked on from where an interrupted run left it; `None` is the dense one."""
    from evals.harness.backend import GlupruneLM
    from evals.results.describe import describe_setting

    plan = None if pruned is None else pruned.plan
    if pruned is not None:
        checkpoint = checkpoint.with_model(pruned.apply(checkpoint.model))
    if plan is not None and request.slice:
        checkpoint, plan = checkpoint.pruned(plan), None
    with terminal.byte_progress() as progress:
        setting = describe_setting(
            checkpoint,
            load_tokenizer(checkpoint, request.chat_template, request.thinking),
            plan=plan,
            context_length=request.context_length,
            apply_chat_template=request.apply_chat_template,
            date=date,
            progress=progress,
        )
    with open_setting(request.output / RESULTS_FOLDER, setting) as folder:
        GlupruneLM.progress = staticmethod(terminal.count_progress)
        lm = GlupruneLM.from_checkpoint(
            checkpoint,
            neuron_masks=None if plan is None else plan.masks(checkpoint.config),
            batch_size=request.batch_size,
            context_length=request.context_length,
            date=date,
            # No BOS is the paper's protocol; `describe_setting` records which.
            add_bos_token=checkpoint.family.needs_bos,
            journal=folder.journal,
            note=terminal.note,
            chat_template=request.chat_template,
            thinking=request.thinking,
        )
        yield _Model(lm, folder)


def _ask(
    request: SweepRequest,
    command: str,
    limits: Mapping[str, eval_options.Limit | None],
    model: _Model,
    benchmarks: Sequence[Any],
    chosen: Collection[tuple[str, int]] | None = None,
) -> Iterator[Result]:
    """Evaluates a model on benchmarks, or on the items of them that are chosen, as their results are asked for."""
    from evals.harness.run import evaluate

    for result in evaluate(
        model.lm,
        benchmarks,
        limit=limits,
        apply_chat_template=request.apply_chat_template,
        journal=model.folder.journal,
        about={"command": command, "revision": request.revision, "data": request.benchmark_data},
        chosen=chosen,
    ):
        check_is_mean(result)
        yield result


def _ask_until_decided(
    ask: Callable[..., Iterator[Result]],
    rows: ResumableRows,
    baselines: Mapping[str, Mapping[str, Outcomes]],
    models: Sequence[_Model],
    benchmark: Any,
    keys: Sequence[tuple[str, int]],
) -> Result:
    """Evaluates the last of some models, of which the first is the dense one, until its verdict is settled.

    The dense model is asked the same items; its stored result, and row, are replaced where that is more than before.
    """
    from evals.study.analysis import is_settled
    from evals.study.sequential import draw_order, looks

    name = benchmark.benchmark.name
    points = [Variant(DENSE, DENSE, 0.0, 0.0), Variant("pruned", "", 0.0, 0.0)][: len(models)]
    for chosen in looks(draw_order(keys)):
        results = [next(ask(model, [benchmark], frozenset(chosen))) for model in models]
        scores = [Score.of(outcomes_of_items(result.items, result.metric)) for result in results]
        studied = StudiedBenchmark(
            name,
            results[0].title,
            results[0].metric,
            results[0].higher_is_better,
            is_perplexity=False,
            measured=dict(zip(points, scores, strict=True)),
            baselines={rule: Score.of(found) for rule, found in baselines[name].items()},
        )
        if is_settled(Study("", points, [studied], rows.document), studied, points[-1]):
            break
    if len(models) > 1:
        row, folder = rows.document["rows"][0], models[0].folder
        if results[0].num_items > load_result(folder.path / f"{row['results'][name]}.json").num_items:
            row["results"][name] = folder.save(results[0]).file_stem
            rows.write()
    return results[-1]


def _write_baselines(
    request: SweepRequest,
    checkpoint: convert.Checkpoint,
    loaded: Sequence[Any],
    limits: Mapping[str, eval_options.Limit | None],
    rows: ResumableRows,
) -> None:
    """Computes the no-knowledge baselines, unless that was done before."""
    from evals.study.baselines import baselines

    with synchronize_errors():
        if not is_main():
            return
        path = request.output / BASELINES_FILE
        if request.until_decided is None:
            dense = rows.document["rows"][0]
            folder = request.output / RESULTS_FOLDER / dense["setting"]
            results = {name: load_result(folder / f"{stem}.json") for name, stem in dense["results"].items()}
        else:
            results = {one.benchmark.name: one.rehearsal for one in loaded}
        of = baselines_of(rows.document, {name: result.data for name, result in results.items()})
        if has_baselines(path, of):
            return
        tokenizer, vocab_size = load_tokenizer(checkpoint), checkpoint.config.vocab_size
        tokenize = functools.partial(tokenizer.encode, add_special_tokens=False)
        found = {}
        with terminal.count_progress("no-knowledge baselines", len(loaded), "benchmarks") as progress:
            for number, benchmark in enumerate(loaded, start=1):
                name = benchmark.benchmark.name
                metric = results[name].metric
                found[name] = (
                    metric,
                    baselines(benchmark, metric, limit=limits[name], tokenize=tokenize, vocab_size=vocab_size),
                )
                progress(number)
        save_baselines(path, found, of)


if __name__ == "__main__":
    sys.exit(main())
