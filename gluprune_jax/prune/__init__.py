"""Prune the MLP neurons and the layers of a model: `python -m gluprune_jax.prune`.

Here are the command line and its start; the work begins in `run`, which loads JAX.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from gluprune_jax.cli import method_options, options, terminal
from gluprune_jax.cli.processes import ProcessesRequest
from gluprune_jax.errors import RequestError
from gluprune_jax.prune.request import PruneRequest
from gluprune_jax.pruning.targets import TARGETS

DESCRIPTION = """\
Removes the least important neurons of the gated MLP layers of a language model (arXiv 2512.22671), whole decoder
layers, or both, and writes a smaller checkpoint that stock transformers loads. Where the model need not run
(--evaluate, --sample, calibration text) and one device does the work, the weights of a Hugging Face folder or hub id
go from file to file, a few tensors at a time, whatever the model's size. Mixtures of experts (Qwen3-MoE, OLMoE,
Mixtral) are pruned in this way alone, each expert by itself, all to one width.

examples:
  gluprune prune --model demo --expansion-ratio 2.4 --output smollm2-2.4x
  gluprune prune --model meta-llama/Llama-3.2-1B --prune-percent 40 --output llama-1b-p40
  gluprune prune --model llama-1b --prune-percent 20 --criterion hybrid --compensate least-squares \\
      --calibration-data corpus.txt --evaluate --output llama-1b-p20
  gluprune prune --model llama-1b --width 4096 --dry-run
  gluprune prune --model llama-1b --drop-layers 11-13 --output llama-1b-13-layers
  gluprune prune --model llama-1b --expansion-ratio 2.4 --plan-out plan.json
  gluprune prune --model llama-1b --plan plan.json --output llama-1b-2.4x
"""
START = "python -m gluprune_jax.prune"


def parser(start: str = START) -> terminal.ArgumentParser:
    """The command line; `start` is what it begins with."""
    parser = terminal.ArgumentParser(start, DESCRIPTION)
    options.add_model(parser)
    parser.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="process from file to file with a few tensors in memory, or refuse; --no-stream loads the whole model; "
        "both give the same bits (default: streamed wherever possible)",
    )

    keep = parser.add_argument_group("how much to keep (one of these; --drop-layers beside a width or by itself)")
    target = keep.add_mutually_exclusive_group()
    for flag in ("--expansion-ratio", "--prune-percent", "--width"):
        options.add(target, flag, about="; prune takes one")
    options.add(target, "--target-parameters")
    options.add(target, "--target-bytes")
    options.add(target, "--plan", about="keep what this saved plan keeps")
    options.add(keep, "--target-type")
    keep.add_argument(
        "--drop-layers",
        metavar="LIST",
        help="remove these layers whole, attention and MLP, such as 20-22,-1 (write --drop-layers=-1,0 if a minus "
        "leads); a width is then that of the layers that stay",
    )
    keep.add_argument(
        "--drop-least",
        type=int,
        metavar="N",
        help="drop the N layers with the lowest block influence, 1 - cosine(input, output), on the calibration text",
    )

    method_options.add_arguments(parser)

    output = parser.add_argument_group("what to write")
    options.add(
        output, "--output", about="folder for the pruned checkpoint; of Orbax also gs://..., of GGUF also FILE.gguf"
    )
    for flag in ("--format", "--gguf-type", "--gguf-widths", "--quantize", "--pad-to", "--push-to-hub", "--private"):
        options.add(output, flag)
    output.add_argument("--plan-out", type=Path, metavar="FILE", help="save the plan")
    options.add(output, "--overwrite", about="what is at DIR and FILE")
    options.add(output, "--dry-run")
    options.add(output, "--json")

    options.add_devices(parser, "one model over all devices, or to measure as many replicas as fit")
    measure = parser.add_argument_group("what to measure, before and after")
    options.add_evaluation(measure, "of the dense and of the pruned model", " in all")
    measure.add_argument(
        "--random-baseline", action="store_true", help="also the perplexity with as many neurons removed at random"
    )
    options.add(measure, "--seed", about="the random baseline, and of criteria that draw random numbers")
    options.add(measure, "--sample")
    options.add(measure, "--sample-tokens")
    options.add(measure, "--date")
    options.add(parser, "--debug")
    return parser


def main(argv: Sequence[str] | None = None, *, start: str = START) -> int:
    """Runs the command line, which begins with `start`, and returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser(start).parse_args(argv)
    command = shlex.join([*start.split(), *argv])
    return terminal.run(
        "gluprune",
        lambda: _run(_request(args), command),
        debug=args.debug,
        processes=options.request(ProcessesRequest, args),
        flags=parser().flags,
        kept=lambda: f"nothing is left half written; to start again:\n  {command}",
    )


def _run(request: PruneRequest, command: str) -> None:
    from gluprune_jax.prune.run import run  # here: --help and what argparse refuses need no JAX

    run(request, command)


def _request(args: argparse.Namespace) -> PruneRequest:
    """What the options ask for.

    Raises:
      RequestError: several sizes.
    """
    sizes = {}
    for name in TARGETS:
        values = getattr(args, name) or (None,)
        if len(values) > 1:
            raise RequestError(
                f"`{name}` has {len(values)} values; prune takes one, and compare and sweep take several"
            )
        (sizes[name],) = values
    return options.request(
        PruneRequest, args, **sizes, eval_data=options.eval_data(args), devices=options.mesh_request(args)
    )
