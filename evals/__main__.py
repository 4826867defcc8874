"""Evaluate a model on benchmarks: `gluprune evaluate`, `python -m evals`."""

import dataclasses
import datetime
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evals.cli import options as eval_options
from evals.cli.tables import results_json, results_table
from evals.results.store import load_results
from gluprune_jax.cli import options, terminal
from gluprune_jax.cli.processes import ProcessesRequest

if TYPE_CHECKING:
    from gluprune_jax.memory.mesh_choice import MeshRequest

DESCRIPTION = """\
Evaluates a model on the tasks of lm-evaluation-harness, in JAX, and stores the results with the outcome
of every item. An interrupted run resumes where it was: give the same command again.

examples:
  gluprune evaluate --model demo --suite quick --benchmark-data demo
  gluprune evaluate --model meta-llama/Llama-3.2-1B --suite paper --output results
  gluprune evaluate --model llama-1b --plan plan.json --tasks mmlu,arc_challenge --limit 100,mmlu=10
  gluprune evaluate show results                   the table of everything in a results folder
  gluprune evaluate lm-eval run --help             lm-eval's own command line, with our models as 'gluprune'
"""


SHOW_DESCRIPTION = """\
Prints the table of a results folder: a column for each model and setting, a row for each benchmark, headline metrics
with standard errors.

examples:
  gluprune evaluate show results
  gluprune evaluate show results/smollm2-135m-instruct.float32-1a2b3c4d --json
"""


START = "python -m evals"


@dataclasses.dataclass(frozen=True)
class EvaluateRequest:
    """Which model is to be evaluated, on what and how; the fields are options of the same names."""

    model: str
    revision: str | None
    dtype: str | None
    plan: Path | None
    suite: str | None
    tasks: str | None
    limit: str | None
    num_fewshot: int | None
    apply_chat_template: bool
    chat_template: str | None
    thinking: str | None
    date: datetime.date | None
    benchmark_data: str | None
    include_path: Path | None
    output: Path
    resume: bool
    batch_size: int | None
    context_length: int | None
    dry_run: bool
    json: bool
    devices: "MeshRequest"


def parser(start: str = START) -> terminal.ArgumentParser:
    """The command line of an evaluation; `start` is what it begins with."""
    parser = terminal.ArgumentParser(start, DESCRIPTION)
    options.add_model(parser)
    options.add(parser, "--plan", about="mask the neurons that this pruning plan removes")

    what = parser.add_argument_group("what to evaluate")
    eval_options.add_suite(what, required=True)
    options.add(what, "--limit")
    what.add_argument(
        "--num-fewshot",
        type=int,
        metavar="N",
        help="few-shot examples (default: 5 for mmlu and gsm8k; the other benchmarks of the paper are zero-shot)",
    )
    eval_options.add_harness(what)

    how = parser.add_argument_group("how")
    options.add(how, "--output", about="results folder", type=Path, default=Path("results"))
    options.add(how, "--resume")
    options.add(how, "--batch-size", about=" in each replica (default: by the memory there is)")
    options.add(how, "--context-length")
    options.add(how, "--dry-run")
    options.add(how, "--json")
    options.add(how, "--debug")
    options.add_devices(parser, "as many replicas as fit")
    return parser


def show_parser(start: str = START) -> terminal.ArgumentParser:
    """The command line of `show`."""
    parser = terminal.ArgumentParser(f"{start} show", SHOW_DESCRIPTION)
    parser.add_argument("folder", type=Path, metavar="DIR", help="results folder, or the folder of one model in it")
    options.add(parser, "--json")
    options.add(parser, "--debug")
    return parser


def main(argv: Sequence[str] | None = None, *, start: str = START) -> int:
    """Runs the command line, which begins with `start`, and returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["show"]:
        args = show_parser(start).parse_args(argv[1:])
        return terminal.run("gluprune", lambda: _show(args.folder, as_json=args.json), debug=args.debug)
    if argv[:1] == ["lm-eval"]:
        return terminal.run("gluprune", eval_options.check_installed, debug=False) or _lm_eval(argv[1:])
    args = parser(start).parse_args(argv)
    from evals.cli.evaluate import evaluate_model  # here: help, a refused argument and `show` need no JAX

    command = shlex.join([*start.split(), *argv])
    request = options.request(EvaluateRequest, args, devices=options.mesh_request(args))
    return terminal.run(
        "gluprune",
        lambda: evaluate_model(request, command),
        debug=args.debug,
        processes=options.request(ProcessesRequest, args),
        flags=parser().flags,
        kept=lambda: f"what was answered so far is saved in {request.output}; to resume:\n  {command}",
    )


def _lm_eval(argv: Sequence[str]) -> int:
    from evals.lm_eval_command import run_lm_eval

    eval_options.use_compilation_cache()
    return run_lm_eval(argv)


def _show(folder: Path, *, as_json: bool) -> None:
    stored = load_results(folder)
    if as_json:
        print(json.dumps(results_json(stored), indent=1))
    else:
        terminal.console().print(results_table(stored))


if __name__ == "__main__":
    sys.exit(main())
