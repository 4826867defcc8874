"""Compares ways to prune one model: `gluprune compare`, `python -m evals.compare`."""

import dataclasses
import datetime
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evals.cli import options as eval_options
from gluprune_jax.cli import options, terminal
from gluprune_jax.cli.processes import ProcessesRequest

if TYPE_CHECKING:
    from gluprune_jax.memory.mesh_choice import MeshRequest

RESULTS_FILE, TABLE_FILE = "comparison.json", "comparison.csv"
PLOT_FILES = ("comparison.png", "comparison.svg")
FORMAT, VERSION = "gluprune-comparison", 1

DESCRIPTION = f"""\
Prunes one model in several ways to several sizes, and compares the perplexities (and benchmarks) of all of them.
Nothing is sliced: neurons are scored once, each choice is a mask of the same compiled programs. A method is
{options.METHOD_GRAMMAR}, such as hybrid, ppm+least-squares or
hybrid+global+least-squares+sequential.

With --output, each model's numbers are saved as soon as they are known; the same command resumes an interrupted run.

examples:
  gluprune compare --model demo --methods ppm,l2,random --prune-percent 10,20,40 --evaluate
  gluprune compare --model demo --methods ppm,hybrid,hybrid+least-squares --prune-percent 20,40 \\
      --calibration-data corpus.txt --eval-data held-out.txt --tasks piqa --limit 100 --benchmark-data demo \\
      --output comparison
"""
START = "python -m evals.compare"


@dataclasses.dataclass(frozen=True)
class CompareRequest:
    """Which model is pruned, in which ways, and what is measured; the fields are options of the same names."""

    model: str
    revision: str | None
    dtype: str | None
    methods: tuple[str, ...]
    prune_percent: tuple[float, ...] | None
    expansion_ratio: tuple[str, ...] | None
    width: tuple[int, ...] | None
    multiple_of: int
    min_keep: float
    by_layer: bool
    seeds: int
    calibration: tuple[str, ...]
    calibration_tokens: int
    sequence_length: int
    chat_template: str | None
    date: datetime.date | None
    eval_data: tuple[str, ...]
    eval_tokens: int
    tasks: str | None
    tasks_for: tuple[str, ...] | None
    sample: str | None
    sample_tokens: int
    limit: str | None
    benchmark_data: str | None
    output: Path | None
    overwrite: bool
    resume: bool
    json: bool
    devices: "MeshRequest"


def parser(start: str = START) -> terminal.ArgumentParser:
    """The command line; `start` is what it begins with."""
    parser = terminal.ArgumentParser(start, DESCRIPTION)
    options.add_model(parser)
    ways = parser.add_argument_group("what is compared")
    options.add(ways, "--methods", required=True)
    targets = ways.add_mutually_exclusive_group(required=True)
    options.add(targets, "--prune-percent", about="; 0 is the dense model")
    options.add(targets, "--expansion-ratio")
    options.add(targets, "--width")
    options.add(ways, "--multiple-of")
    options.add(ways, "--min-keep")
    ways.add_argument("--by-layer", action="store_true", help="prune each layer alone: which layers a method harms")
    ways.add_argument(
        "--seeds", type=int, default=5, metavar="N", help="seeds of random neurons; tables show the median"
    )
    text = options.add_calibration(parser)
    options.add(text, "--chat-template")
    options.add(text, "--date")
    measure = parser.add_argument_group("what is measured")
    options.add_evaluation(measure, "of every model", " of each text")
    eval_options.add_tasks(measure)
    options.add(measure, "--limit")
    eval_options.add_benchmark_data(measure)
    measure.add_argument(
        "--tasks-for",
        type=options.list_of(str, "ppm,hybrid+least-squares"),
        metavar="METHOD[,METHOD]",
        help="methods that are asked the benchmarks (default: all)",
    )
    options.add(measure, "--sample")
    options.add(measure, "--sample-tokens")
    output = parser.add_argument_group("what to write")
    options.add(output, "--output", about=f"folder for {RESULTS_FILE}, {TABLE_FILE} and {PLOT_FILES[0]}", type=Path)
    options.add(output, "--overwrite", about=f"what is in DIR, if it has another {RESULTS_FILE}")
    options.add(output, "--resume")
    options.add(output, "--json")
    options.add_devices(parser, "as many replicas as fit")
    options.add(parser, "--debug")
    return parser


def main(argv: Sequence[str] | None = None, *, start: str = START) -> int:
    """Runs the command line, which begins with `start`, and returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser(start).parse_args(argv)
    from evals.cli.compare import compare  # here: help and a refused argument need no JAX

    command = shlex.join([*start.split(), *argv])
    request = options.request(
        CompareRequest, args, eval_data=options.eval_data(args), devices=options.mesh_request(args)
    )
    return terminal.run(
        "gluprune",
        lambda: compare(request),
        debug=args.debug,
        processes=options.request(ProcessesRequest, args),
        flags=parser().flags,
        kept=lambda: _kept(request, command),
    )


def _kept(request: CompareRequest, command: str) -> str:
    """What is there after an interruption, and how to resume."""
    if request.output is None:
        return f"nothing is kept without --output DIR; to start again:\n  {command}"
    return f"what was measured so far is saved in {request.output}; to resume:\n  {command}"


if __name__ == "__main__":
    sys.exit(main())
