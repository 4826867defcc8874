"""The command-line options of pruning methods and of calibration text, and what becomes of them."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from convert import Checkpoint
from convert.tokenizer import encode_documents, load_tokenizer, separator
from gluprune_jax.allocation import ALLOCATIONS, FLOOR
from gluprune_jax.criteria import CRITERIA, find_criterion, inputs_of
from gluprune_jax.documents import DATA_HELP, Messages
from gluprune_jax.errors import RequestError
from gluprune_jax.methods import Method
from gluprune_jax.packing import pack

COMPENSATIONS = ("none", "least-squares")
# Calibration windows are taken out of up to so many times as much text.
_SPREAD = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a method to a command line."""
    which = parser.add_argument_group("which neurons")
    which.add_argument(
        "--criterion",
        default="ppm",
        metavar="NAME",
        help=f"how neurons are ranked: {', '.join(CRITERIA)}, or your own function as package.module:function",
    )
    which.add_argument("--multiple-of", type=int, default=1, metavar="M", help="floor the width to a multiple of M")
    which.add_argument(
        "--layers",
        metavar="LIST",
        help="prune only these layers, such as 0-3,8,-1 (write --layers=-1,0 if a minus leads)",
    )
    which.add_argument(
        "--allocation",
        choices=ALLOCATIONS,
        default="uniform",
        help="the same width for all layers, or one budget over them: by score, or by the measured cost of each layer",
    )
    which.add_argument(
        "--floor", type=float, default=FLOOR, metavar="X", help="the least share a layer keeps, if they differ"
    )
    which.add_argument(
        "--compensate",
        choices=COMPENSATIONS,
        default="none",
        help="refit down_proj so that the kept neurons do what the removed ones did",
    )
    which.add_argument(
        "--in-order", action="store_true", help="later layers are pruned for what the pruned earlier ones give"
    )
    add_calibration_arguments(parser)
    calibration = parser.add_argument_group("calibration")
    calibration.add_argument("--statistics", type=Path, metavar="FILE", help="use these, collected before")
    calibration.add_argument("--statistics-out", type=Path, metavar="FILE", help="save what was collected (.npz)")


def add_calibration_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of calibration text to a command line."""
    calibration = parser.add_argument_group("calibration text")
    calibration.add_argument("--calibration", nargs="+", metavar="TEXT", help=DATA_HELP)
    calibration.add_argument("--calibration-tokens", type=int, default=32768, metavar="N", help="how many to use")
    calibration.add_argument("--calibration-window", type=int, default=512, metavar="N", help="tokens of a window")


def method_of(args: argparse.Namespace, *, needs_statistics: bool = False) -> Method:
    """The method that the options ask for.

    Args:
      args: the options.
      needs_statistics: whether something else looks at calibration text too.

    Raises:
      RequestError: options that do not go together.
    """
    find_criterion(args.criterion)
    method = Method(
        args.criterion,
        args.allocation,
        args.floor,
        args.compensate == "least-squares",
        args.in_order,
        args.seed,
    )
    check_calibration_request(args, [method])
    if args.statistics_out and args.statistics:
        raise RequestError(
            "--statistics-out saves what is collected, and --statistics gives what was; give one of them"
        )
    if args.statistics_out and not args.calibration:
        raise RequestError("--statistics-out saves what --calibration collects; give --calibration TEXT too")
    if needs_statistics and not (args.calibration or args.statistics):
        raise RequestError("--drop-least looks at what layers do to text; give --calibration TEXT or --statistics FILE")
    looks_at_statistics = method.needs_statistics or needs_statistics
    if args.statistics and not looks_at_statistics:
        raise RequestError(
            "nothing looks at --statistics; give a criterion that does (hybrid, activation, wanda, taylor), or leave "
            "it out"
        )
    # Sensitivities are another pass over the text: statistics may be without.
    may_add = "sensitivity" in inputs_of(find_criterion(args.criterion)[1])
    needs_text = method.needs_text or (looks_at_statistics and (may_add or not args.statistics))
    if args.calibration and not (needs_text or args.statistics_out):
        raise RequestError(
            "nothing looks at --calibration; give a criterion that does (hybrid, activation, wanda, taylor), "
            "--compensate or --statistics-out, or leave it out"
        )
    return method


def check_calibration_request(args: argparse.Namespace, methods: Sequence[Method]) -> None:
    """Refuses methods that lack what they look at.

    Raises:
      RequestError: as said.
    """
    statistics = getattr(args, "statistics", None)
    if not 0 <= args.floor < 1:
        raise RequestError(f"--floor is {args.floor:g}; it must be a share from 0 and below 1")
    for flag in ("calibration_tokens", "calibration_window"):
        if getattr(args, flag) < 2:
            raise RequestError(f"--{flag.replace('_', '-')} is {getattr(args, flag)}; it must be at least 2")
    if args.calibration_tokens < args.calibration_window:
        raise RequestError(
            f"--calibration-tokens is {args.calibration_tokens}, less than the {args.calibration_window} of one "
            f"window; give more, or a smaller --calibration-window"
        )
    if args.floor != FLOOR and all(method.allocation == "uniform" for method in methods):
        raise RequestError(
            f"nothing looks at --floor, which is {args.floor:g}: without an allocation (global, measured) all layers "
            f"keep the same share"
        )
    for method in methods:
        if method.in_order and not method.depends_on_order:
            raise RequestError(
                f"in order, {method.criterion} chooses the same neurons; add least squares, or leave the order out"
            )
        if method.needs_text and not args.calibration:
            what = "--in-order" if method.in_order else "--allocation measured"
            what = "--compensate least-squares" if method.is_compensated else what
            raise RequestError(f"{what} runs the model on calibration text; give --calibration TEXT")
        if method.needs_statistics and not (args.calibration or statistics):
            raise RequestError(
                f"--criterion {method.criterion} looks at activations; give --calibration TEXT or --statistics FILE"
            )


def calibration_windows(
    checkpoint: Checkpoint, documents: Sequence[str | Messages], args: argparse.Namespace
) -> NDArray[np.int32]:
    """The calibration text as windows of token ids `[N, W]`, of `--calibration-tokens` in all, or fewer.

    They are spread evenly over the text, or over its first part, so that they are of many kinds and not of the few
    documents that it begins with.

    Raises:
      RequestError: too little text, or conversations for a model without a chat template.
    """
    tokenizer = load_tokenizer(checkpoint)
    encoded = encode_documents(tokenizer, documents, most_tokens=_SPREAD * args.calibration_tokens)
    windows = pack(encoded, args.calibration_window, separator(checkpoint, tokenizer))
    wanted = args.calibration_tokens // args.calibration_window
    return windows[spread(len(windows), wanted)]


def spread(count: int, wanted: int) -> NDArray[np.int64]:
    """`wanted` indices below `count`, evenly spread and ascending; all where there are no more."""
    return np.arange(count) if count <= wanted else np.arange(wanted) * count // wanted
