"""Latency, throughput, memory and energy of a model and its pruned versions: `python -m evals.efficiency`."""

import dataclasses
import datetime
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evals.cli import options as eval_options
from evals.efficiency.workloads import BATCHES, SYNTHETIC, SYNTHETIC_PROMPTS
from evals.study.folder import EFFICIENCY_FILE
from gluprune_jax.cli import options, terminal
from gluprune_jax.cli.processes import ProcessesRequest

if TYPE_CHECKING:
    from gluprune_jax.memory.mesh_choice import MeshRequest

ALIGNMENT = 128  # lanes of a TPU's vector unit; tensor cores too like multiples of it


PROMPT_TOKENS, NEW_TOKENS = 128, 65


PERCENTS = (0.0, 20.0, 40.0, 60.0)


DESCRIPTION = """\
Measures how fast a model and its pruned versions generate, how much memory they take, and what energy, where hardware
counters exist. Answers have a fixed length, so that all models do the same work; programs are compiled and run once
before anything is timed; numbers are medians with quartiles over repeats.

examples:
  gluprune efficiency --model demo --prune-percent 0,20,40
  gluprune efficiency --model meta-llama/Llama-3.2-1B --dtype bfloat16 --workload paper --output study
  gluprune efficiency --model llama-1b --prune-percent 40 --prompts questions.txt --new-tokens 129 --batch-sizes 1,8,32
"""
START = "python -m evals.efficiency"


@dataclasses.dataclass(frozen=True)
class EfficiencyRequest:
    """Which model is measured, in which sizes and at what work; the fields are options of the same names."""

    model: str
    revision: str | None
    dtype: str | None
    prune_percent: tuple[float, ...] | None
    expansion_ratio: tuple[str, ...] | None
    width: tuple[int, ...] | None
    criterion: str
    no_aligned: bool
    workload: str
    prompts: str | None
    prompt_tokens: int | None
    new_tokens: int | None
    batch_sizes: tuple[int, ...]
    most_prompts: int | None
    chat_template: str | None
    date: datetime.date | None
    benchmark_data: str | None
    repeats: int
    output: Path | None
    overwrite: bool
    json: bool
    devices: "MeshRequest"


def parser(start: str = START) -> terminal.ArgumentParser:
    """The command line; `start` is what it begins with."""
    parser = terminal.ArgumentParser(start, DESCRIPTION)
    options.add_model(parser)
    which = parser.add_mutually_exclusive_group()
    spelled = ",".join(f"{percent:g}" for percent in PERCENTS)
    options.add(which, "--prune-percent", about=f"; 0 is the dense model (default: {spelled})")
    options.add(which, "--expansion-ratio")
    options.add(which, "--width")
    options.add(parser, "--criterion")
    parser.add_argument(
        "--no-aligned", action="store_true", help=f"leave out the rows with widths that are multiples of {ALIGNMENT}"
    )
    work = parser.add_argument_group("what is generated")
    which = work.add_mutually_exclusive_group()
    which.add_argument(
        "--workload",
        choices=(SYNTHETIC, "paper"),
        default=SYNTHETIC,
        help="random tokens, or the paper's six workloads: prompts of HellaSwag, MMLU and IFEval at batches 1 and 8",
    )
    which.add_argument(
        "--prompts",
        metavar="TEXT",
        help='prompts of your own: a text file with one a line, a .jsonl file with {"text": ...} lines, a folder or a '
        "data set of documents",
    )
    work.add_argument(
        "--prompt-tokens", type=int, metavar="N", help=f"tokens of each random prompt (default: {PROMPT_TOKENS})"
    )
    work.add_argument(
        "--new-tokens",
        type=int,
        metavar="N",
        help=f"tokens of each answer, but for the paper's workloads, which have their own (default: {NEW_TOKENS}; one "
        f"more than a multiple of 16 is timed best)",
    )
    work.add_argument(
        "--batch-sizes",
        type=options.list_of(int, "1,8"),
        default=",".join(map(str, BATCHES)),
        metavar="N[,N]",
        help="prompts generated together",
    )
    work.add_argument(
        "--most-prompts",
        type=int,
        metavar="N",
        help=f"of each workload, no more than N prompts (random ones: {SYNTHETIC_PROMPTS}, or the largest batch)",
    )
    options.add(work, "--chat-template")
    options.add(work, "--date")
    eval_options.add_benchmark_data(work)
    how = parser.add_argument_group("how")
    how.add_argument("--repeats", type=int, default=5, metavar="N", help="repeats of every measurement")
    options.add(how, "--output", about=f"folder for {EFFICIENCY_FILE}, such as that of a study", type=Path)
    options.add(how, "--overwrite", about=EFFICIENCY_FILE)
    options.add(how, "--json")
    options.add(how, "--debug")
    options.add_devices(parser, "the fewest devices that hold the model; all of several processes")
    return parser


def main(argv: Sequence[str] | None = None, *, start: str = START) -> int:
    """Runs the command line, which begins with `start`, and returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser(start).parse_args(argv)
    from evals.cli.efficiency import measure_all  # here: help and a refused argument need no JAX

    request = options.request(EfficiencyRequest, args, devices=options.mesh_request(args))
    return terminal.run(
        "gluprune",
        lambda: measure_all(request),
        debug=args.debug,
        processes=options.request(ProcessesRequest, args),
        flags=parser().flags,
        kept=lambda: f"nothing is kept of what was measured; to start again:\n  {shlex.join([*start.split(), *argv])}",
    )


if __name__ == "__main__":
    sys.exit(main())
