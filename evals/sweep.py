"""A study of what pruning does to a model: `python -m evals.sweep`."""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import math
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import convert
from convert.store import DTYPE_NAMES, MODEL_HELP
from convert.tokenizer import load_tokenizer
from evals.__main__ import (
    add_suite_arguments,
    add_task_arguments,
    check_installed,
    data_folder,
    use_compilation_cache,
)
from evals.footprint import evaluation_uses
from evals.results import check_output, open_setting
from evals.setting import describe_setting
from evals.study import DENSE
from evals.study_files import (
    FLOORS_FILE,
    RESULTS_FOLDER,
    SWEEP_FILE,
    SWEEP_FORMAT,
    VERSION,
    floors_of,
    has_floors,
    is_sweep_row,
    save_floors,
)
from evals.suites import SUITES, Benchmark, choose_benchmarks, find_suite
from gluprune_jax import devices, method_options, terminal
from gluprune_jax.activation_statistics import describe_windows
from gluprune_jax.allocation import FLOOR
from gluprune_jax.atomic import check_file
from gluprune_jax.distributed import check_same, failing_together, is_main
from gluprune_jax.documents import read_documents
from gluprune_jax.errors import RequestError
from gluprune_jax.importance import fingerprint
from gluprune_jax.methods import Chooser, Method, Pruned
from gluprune_jax.plan import check_targets, spell_target, target_width
from gluprune_jax.rows import Rows
from gluprune_jax.trainable import checksum

LEVELS = "0,10,20,30,40,50,60"
KEPT_BINS = 64  # of neurons of a layer, in the picture of which were kept

PRESETS: Mapping[str, Mapping[str, str]] = {
    "paper-1b": {"model": "meta-llama/Llama-3.2-1B", "suite": "paper", "dtype": "bfloat16", "levels": LEVELS},
    "paper-3b": {"model": "meta-llama/Llama-3.2-3B", "suite": "paper", "dtype": "bfloat16", "levels": LEVELS},
    "paper-1b-instruct": {
        "model": "meta-llama/Llama-3.2-1B-Instruct",
        "suite": "paper-instruct",
        "dtype": "bfloat16",
        "levels": "0,10,40,60",
    },
}

DESCRIPTION = """\
Prunes a model to several sizes, evaluates each on a suite of benchmarks, tests what differs, and writes a report.
Neurons are scored once and masked, so that all sizes run in the same compiled programs. The same command goes on
where it was, whatever interrupted it.

examples:
  python -m evals.sweep --model demo --levels 0,10,20,40 --suite quick --data-dir demo --output study
  python -m evals.sweep --preset paper-1b --output study
  python -m evals.sweep --model llama-1b --methods ppm hybrid+least-squares --calibration corpus.txt \\
      --levels 10,20,40 --suite paper --items 200 --output study
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = terminal.ArgumentParser("python -m evals.sweep", DESCRIPTION)
    parser.add_argument("--model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, help="cast all weights as they are read, and compute in it")
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        help="model, suite, levels and dtype of the paper; options beside it count more",
    )
    which = parser.add_argument_group("what is studied")
    which.add_argument(
        "--methods",
        nargs="+",
        default=["ppm"],
        metavar="METHOD",
        help="criterion, and behind it what else is done, such as hybrid+least-squares (as for gluprune_jax.compare)",
    )
    sizes = which.add_mutually_exclusive_group()
    sizes.add_argument(
        "--levels", metavar="LIST", help=f"percent of the neurons to remove, comma-separated (default: {LEVELS})"
    )
    sizes.add_argument("--expansion-ratio", metavar="LIST", help="or intermediate size over hidden size")
    which.add_argument("--multiple-of", type=int, default=1, metavar="M", help="floor widths to a multiple of M")
    which.add_argument(
        "--floor", type=float, default=FLOOR, metavar="X", help="the least share a layer keeps, if they differ"
    )
    which.add_argument(
        "--slice", action="store_true", help="evaluate models that are really smaller, each in programs of its own"
    )
    method_options.add_calibration_arguments(parser)
    what = parser.add_argument_group("what is evaluated")
    add_suite_arguments(what, required=False)
    what.add_argument(
        "--items",
        metavar="N",
        help="items of each benchmark, divided over its tasks: at least N in all, the first ones of each (default: the "
        "suite's own number); benchmarks whose items are large may have their own, such as 50,wikitext=10",
    )
    add_task_arguments(what)
    how = parser.add_argument_group("how")
    how.add_argument("--output", type=Path, default=Path("study"), metavar="DIR", help="folder of the study")
    how.add_argument("--overwrite", action="store_true", help=f"start anew where DIR has another {SWEEP_FILE}")
    how.add_argument("--batch-size", type=int, metavar="N", help="rows of a batch (otherwise by the memory there is)")
    how.add_argument("--max-length", type=int, metavar="N", help="tokens of the window, if fewer than the model's")
    how.add_argument("--json", action="store_true", help="print what the study says as one JSON document")
    how.add_argument("--debug", action="store_true", help="show the traceback of an error")
    devices.add_arguments(parser, "as many replicas as fit")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    for name, value in PRESETS.get(args.preset, {}).items():
        is_given = getattr(args, name) is not None
        replaced = {"levels": args.expansion_ratio, "suite": args.tasks}.get(name) is not None
        if not (is_given or replaced):
            setattr(args, name, value)
    command = shlex.join(["python", "-m", "evals.sweep", *argv])
    return terminal.run("evals.sweep", lambda: _run(args, command), debug=args.debug, processes=args)


def _run(args: argparse.Namespace, command: str) -> None:
    try:
        _sweep(args, command)
    except KeyboardInterrupt:
        message = f"what was measured so far is saved in {args.output}; to go on from there:\n  {command}"
        terminal.stderr().print(message, markup=False)
        raise


def _sweep(args: argparse.Namespace, command: str) -> None:
    from evals.report.files import print_study, write_report
    from evals.run import load_benchmarks
    from evals.study_files import load_study

    wanted, targets = _check_request(args)
    with failing_together():
        if is_main():
            check_output(args.output / RESULTS_FOLDER)
            check_file(args.output / SWEEP_FILE, overwrite=True)
        benchmarks, manager = choose_benchmarks(args.suite, args.tasks, args.include_path)
        items = _items(args.items, [benchmark.name for benchmark in benchmarks])
        with terminal.count_progress("loading the data", len(benchmarks), "benchmarks") as progress:
            loaded = load_benchmarks(
                benchmarks, manager, data_dir=data_folder(args.data_dir), note=_note, on_loaded=progress
            )
        limits = {one.benchmark.name: _limit(args.suite, items, one) for one in loaded}
        documents = [document for name in args.calibration or () for document in read_documents(name, "--calibration")]
    check_same("the texts of --calibration", (json.dumps(document).encode() for document in documents))
    use_compilation_cache()
    with terminal.byte_progress() as progress:
        checkpoint = convert.load(
            args.model,
            dtype=args.dtype,
            revision=args.revision,
            mesh=devices.chooses(args, evaluation_uses(args.batch_size, args.max_length, args.device_memory)),
            progress=progress,
        )
    for text in checkpoint.notes:
        _note(text)
    with failing_together():
        targets = _smaller(checkpoint, targets)
        check_targets(checkpoint.config, targets)
        windows = method_options.calibration_windows(checkpoint, documents, args) if documents else None
    rows = Rows.open(
        args.output / SWEEP_FILE,
        _about(args, checkpoint, benchmarks, items, windows),
        is_row=is_sweep_row,
        overwrite=args.overwrite,
        optional=("calibration",),
    )
    chooser = Chooser(
        checkpoint.model,
        checkpoint.mlp_weights,
        windows=windows,
        names=args.calibration or (),
        refits=any(method.needs_grams for method in wanted),
    )
    measure = functools.partial(_measure, args, command, checkpoint, loaded, limits)
    for key, pruned in _models(wanted, targets, chooser, rows):
        _note(f"evaluating {key['method']}{'' if pruned is None else ', ' + key['level']}")
        rows.add({**key, **_describe(checkpoint, pruned), **measure(pruned)})
        _write_floors(args, checkpoint, loaded, limits, rows)  # early, so that what is there can be reported
    _write_floors(args, checkpoint, loaded, limits, rows)  # where a run was killed before it got to them
    with failing_together():
        if is_main():
            study = load_study(args.output)
            write_report(study, args.output)
            print_study(study, as_json=args.json)
            if not args.json:
                print(f"report: {args.output / 'report.html'}")


# ------------------------------------------------------------------------------------------------- what is asked


def _check_request(args: argparse.Namespace) -> tuple[list[Method], list[dict[str, Any]]]:
    """Refuses early what could only fail late; returns methods and sizes."""
    if args.model is None:
        raise RequestError("no model: give --model MODEL or --preset NAME")
    if args.suite is None and args.tasks is None:
        raise RequestError(f"no benchmarks: give --suite NAME ({', '.join(SUITES)}) or --tasks LIST")
    for flag, least in (("batch_size", 1), ("max_length", 2), ("multiple_of", 1)):
        value = getattr(args, flag)
        if value is not None and value < least:
            raise RequestError(f"--{flag.replace('_', '-')} is {value}; it must be at least {least}")
    if doubled := [text for text in args.methods if args.methods.count(text) > 1]:
        raise RequestError(f"--methods has {doubled[0]} twice; give each once")
    wanted = [Method.parse(text, floor=args.floor) for text in args.methods]
    method_options.check_calibration_request(args, wanted)
    if args.calibration and not any(method.needs_text or method.needs_statistics for method in wanted):
        raise RequestError("nothing looks at --calibration; give a method that does, or leave it out")
    if args.include_path is not None and not args.include_path.is_dir():
        raise RequestError(f"--include-path {args.include_path} is no folder; give one with task definitions")
    check_installed(is_study=True)
    return wanted, _targets(args)


def _targets(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The sizes that were asked for, none of which is the dense model's by its number alone."""
    if args.expansion_ratio is not None:
        kind, flag, texts = "expansion_ratio", "--expansion-ratio", args.expansion_ratio.split(",")
    else:
        kind, flag, texts = "prune_percent", "--levels", (args.levels or LEVELS).split(",")
    targets: list[dict[str, Any]] = []
    for text in texts:
        try:
            number = float(text)
        except ValueError:
            raise RequestError(
                f"{flag} has {text.strip()!r}; give numbers, comma-separated, such as {LEVELS}"
            ) from None
        if not math.isfinite(number) or number < 0:
            raise RequestError(f"{flag} has {text.strip()}; numbers from 0 are accepted")
        value = number if kind == "prune_percent" else text.strip()
        target: dict[str, Any] = {kind: value, "multiple_of": args.multiple_of}
        if number == 0 and kind == "prune_percent":
            continue  # the dense model is always there
        # What is no such number is refused before a model is loaded.
        target_width(100, 100, **{name: target[name] for name in (kind,)})
        if spell_target(target) in map(spell_target, targets):
            raise RequestError(f"{flag} has {text.strip()} twice; give each size once")
        targets.append(target)
    return targets


def _smaller(checkpoint: convert.Checkpoint, targets: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The sizes without the model's own, which an expansion ratio may name."""
    sizes, hidden_size = checkpoint.config.intermediate_sizes, checkpoint.config.hidden_size

    def is_own(target: Mapping[str, Any]) -> bool:
        share = {key: value for key, value in target.items() if key != "multiple_of"}
        return all(target_width(size, hidden_size, **share) == size for size in sizes)

    return [target for target in targets if not is_own(target)]


def _items(text: str | None, benchmarks: Sequence[str]) -> dict[str, int] | None:
    """Items of each benchmark that `--items` asks for: a number, and others for some of them; None leaves it open."""
    if text is None:
        return None
    found: dict[str, int] = {}
    common = None
    for part in text.split(","):
        name, equals, number = part.strip().rpartition("=")
        if not (number.isdecimal() and int(number)) or (equals and not name):
            raise RequestError(f"--items is {text}; give a whole number from 1, or with others such as 50,wikitext=10")
        if equals and name not in benchmarks:
            raise RequestError(f"--items names {name}, which is not evaluated; there are {', '.join(benchmarks)}")
        if name in found or (not equals and common is not None):
            raise RequestError(f"--items is {text}; give one number for all, and one for each benchmark that is named")
        if equals:
            found[name] = int(number)
        else:
            common = int(number)
    if common is None and (missing := [name for name in benchmarks if name not in found]):
        raise RequestError(f"--items has no number for {missing[0]}; give one for all, such as 50,{text}")
    return {name: found.get(name, common or 0) for name in benchmarks}


def _limit(suite: str | None, items: Mapping[str, int] | None, loaded: Any) -> int | None:
    """Items of each task of a benchmark."""
    if items is not None:
        return math.ceil(items[loaded.benchmark.name] / len(loaded.tasks["tasks"]))
    return None if suite is None else find_suite(suite).limit


def _about(
    args: argparse.Namespace,
    checkpoint: convert.Checkpoint,
    benchmarks: Sequence[Benchmark],
    items: Mapping[str, int] | None,
    windows: NDArray[np.int32] | None,
) -> dict[str, Any]:
    return {
        "format": SWEEP_FORMAT,
        "version": VERSION,
        "model": args.model,
        "weights": [fingerprint(checkpoint.model), checksum(checkpoint.model, mlps=False), args.dtype],
        "hidden_size": checkpoint.config.hidden_size,
        "gluprune_jax": importlib.metadata.version("gluprune-jax"),
        "benchmarks": [benchmark.name for benchmark in benchmarks],
        "items": items,
        "suite": args.suite,
        "data_dir": args.data_dir,
        "apply_chat_template": args.apply_chat_template,
        "max_length": args.max_length,
        "calibration": None if windows is None else describe_windows(windows, args.calibration),
        "multiple_of": args.multiple_of,
        "floor": args.floor,
        "slice": args.slice,
    }


# ------------------------------------------------------------------------------------------------------- measuring


def _models(
    wanted: Sequence[Method], targets: Sequence[Mapping[str, Any]], chooser: Chooser, rows: Rows
) -> Iterator[tuple[dict[str, Any], Pruned | None]]:
    """The models that are not finished: the dense one, and each method at each size."""
    dense = {"method": DENSE, "level": DENSE}
    if rows.find(dense) is None:
        yield dense, None
    for method in wanted:
        keys = [{"method": str(method), "level": spell_target(target)} for target in targets]
        missing = [number for number, key in enumerate(keys) if rows.find(key) is None]
        # In order, nothing is shared between sizes: each is measured before the next is computed.
        batches = [[number] for number in missing] if method.in_order else [missing] * bool(missing)
        for batch in batches:
            for number, pruned in zip(batch, chooser.choose(method, [targets[n] for n in batch]), strict=True):
                yield keys[number], pruned


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


def _measure(
    args: argparse.Namespace,
    command: str,
    checkpoint: convert.Checkpoint,
    loaded: Sequence[Any],
    limits: Mapping[str, int | None],
    pruned: Pruned | None,
) -> dict[str, Any]:
    """Evaluates one model on all benchmarks, from where an interrupted run left it."""
    from evals.backend import GlupruneLM
    from evals.outcomes import check_is_mean
    from evals.run import evaluate

    plan = None if pruned is None else pruned.plan
    if pruned is not None:
        checkpoint = dataclasses.replace(checkpoint, model=pruned.apply(checkpoint.model))
    if plan is not None and args.slice:
        checkpoint, plan = checkpoint.pruned(plan), None
    with terminal.byte_progress() as progress:
        setting = describe_setting(
            checkpoint,
            load_tokenizer(checkpoint),
            plan=plan,
            max_length=args.max_length,
            apply_chat_template=args.apply_chat_template,
            progress=progress,
        )
    stems = {}
    with open_setting(args.output / RESULTS_FOLDER, setting) as folder:
        lm = GlupruneLM.from_checkpoint(
            checkpoint,
            neuron_masks=None if plan is None else plan.masks(checkpoint.config),
            batch_size=args.batch_size,
            max_length=args.max_length,
            journal=folder.journal,
            note=_note,
        )
        for benchmark in loaded:
            (result,) = evaluate(
                lm,
                [benchmark],
                limit=limits[benchmark.benchmark.name],
                apply_chat_template=args.apply_chat_template,
                journal=folder.journal,
                about={"command": command, "revision": args.revision, "data": args.data_dir},
            )
            check_is_mean(result)
            stored = folder.save(result)
            stems[stored.benchmark] = stored.file_stem
            _note(f"{stored.title}: {stored.metric} {stored.value:.4f} ({stored.num_items:,} items)")
        return {"setting": folder.path.name, "results": stems}


def _write_floors(
    args: argparse.Namespace,
    checkpoint: convert.Checkpoint,
    loaded: Sequence[Any],
    limits: Mapping[str, int | None],
    rows: Rows,
) -> None:
    """Computes what responders that know nothing score, unless that was done before."""
    from evals.floors import floors
    from evals.results import load_result

    with failing_together():
        if not is_main():
            return
        path = args.output / FLOORS_FILE
        dense = rows.document["rows"][0]
        folder = args.output / RESULTS_FOLDER / dense["setting"]
        results = {name: load_result(folder / f"{stem}.json") for name, stem in dense["results"].items()}
        of = floors_of(rows.document, {name: result.data for name, result in results.items()})
        if has_floors(path, of):
            return
        tokenizer, vocab_size = load_tokenizer(checkpoint), checkpoint.config.vocab_size
        tokenize = functools.partial(tokenizer.encode, add_special_tokens=False)
        found = {}
        with terminal.count_progress("floors", len(loaded), "benchmarks") as progress:
            for number, benchmark in enumerate(loaded, start=1):
                name = benchmark.benchmark.name
                metric = results[name].metric
                responders = floors(benchmark, metric, limit=limits[name], tokenize=tokenize, vocab_size=vocab_size)
                found[name] = metric, responders
                progress(number)
        save_floors(path, found, of)


def _note(text: str) -> None:
    terminal.stderr().print(f"note: {text}", style="dim", markup=False)


if __name__ == "__main__":
    sys.exit(main())
