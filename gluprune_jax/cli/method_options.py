"""The command-line options of one pruning method, and what becomes of them."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from gluprune_jax.cli import options, terminal
from gluprune_jax.errors import RequestError, check_at_least
from gluprune_jax.pruning.choices import ALLOCATIONS, MIN_KEEP, inputs_of_criterion
from gluprune_jax.pruning.methods import Method
from gluprune_jax.pruning.statistics import SENSITIVITIES

COMPENSATIONS = (
    "none",
    "least-squares",
    "cv-least-squares",
    "reconstruct",
    "least-squares+reconstruct",
    "cv-least-squares+reconstruct",
)


class CalibrationRequest(Protocol):
    """What a request says of calibration text."""

    @property
    def calibration(self) -> Sequence[str]: ...
    @property
    def calibration_tokens(self) -> int: ...
    @property
    def sequence_length(self) -> int: ...
    @property
    def min_keep(self) -> float: ...


class MethodRequest(CalibrationRequest, Protocol):
    """What a request says of the one method of the command `prune`."""

    @property
    def criterion(self) -> str: ...
    @property
    def allocation(self) -> str: ...
    @property
    def compensate(self) -> str: ...
    @property
    def sequential(self) -> bool: ...
    @property
    def seed(self) -> int: ...
    @property
    def statistics(self) -> Path | None: ...
    @property
    def statistics_out(self) -> Path | None: ...


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a method to a command line."""
    which = parser.add_argument_group("pruning method")
    options.add(which, "--criterion")
    options.add(which, "--multiple-of")
    options.add(which, "--for")
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
    options.add(which, "--min-keep")
    which.add_argument(
        "--compensate",
        choices=COMPENSATIONS,
        default="none",
        metavar="REPAIR",
        help="least-squares refits down_proj, so that the kept neurons reproduce the output of all of them, "
        "cv-least-squares only as far as that helps on calibration windows that are held out; reconstruct fits the MLP "
        "of each layer to the dense one's outputs by gradient steps; least-squares+reconstruct and "
        "cv-least-squares+reconstruct do both (default: none)",
    )
    which.add_argument(
        "--sequential",
        action="store_true",
        help="prune layers sequentially, each on the outputs of the layers already pruned",
    )
    text = options.add_calibration(parser)
    options.add(text, "--chat-template")
    text.add_argument("--statistics", type=Path, metavar="FILE", help="calibration statistics that were saved before")
    text.add_argument(
        "--statistics-out", type=Path, metavar="FILE", help="save the statistics of the calibration text (.npz)"
    )


def spelled_method(request: MethodRequest) -> Method:
    """The method that a request spells, whatever it lacks."""
    return Method(
        request.criterion,
        request.allocation,
        request.min_keep,
        is_compensated="least-squares" in request.compensate,  # cross-validated or not
        sequential=request.sequential,
        seed=request.seed,
        cross_validates="cv-least-squares" in request.compensate,
        reconstructs="reconstruct" in request.compensate,
    )


def note_own_text(given: Sequence[str], texts: Sequence[str], *, is_dry_run: bool = False) -> None:
    """Says that the model writes its calibration text, where `texts` (`calibration_texts`) are not what was given."""
    if tuple(given) == tuple(texts):
        return
    if is_dry_run:
        terminal.note("no --calibration-data: the model would write its own text (self); sizes do not depend on it")
    else:
        terminal.note(
            "no --calibration-data: the model writes its own text (self), once for these weights; text of the kind it "
            "is for may serve better"
        )


def method_of(request: MethodRequest, *, needs_statistics: bool = False) -> Method:
    """The method that a request asks for.

    Args:
      request: what is asked for.
      needs_statistics: whether something else needs calibration statistics too.

    Raises:
      RequestError: options that do not go together.
    """
    inputs_of_criterion(request.criterion)  # refuses what is none
    method = spelled_method(request)
    check_calibration(request, [method], request.statistics)
    if request.statistics_out and request.statistics:
        raise RequestError(
            "--statistics-out saves what is collected, and --statistics gives what was; give one of them"
        )
    if request.statistics_out and not request.calibration:
        raise RequestError("--statistics-out saves statistics of calibration text; give --calibration-data TEXT too")
    if needs_statistics and not (request.calibration or request.statistics):
        raise RequestError(
            "--drop-least needs the block influence on text; give --calibration-data TEXT or --statistics FILE"
        )
    has_use = method.needs_statistics or needs_statistics
    remedy = "give a criterion that uses activations (hybrid, activation, wanda, taylor, entropy)"
    if request.statistics and not has_use:
        raise RequestError(f"--statistics has no effect with --criterion {method.criterion}; {remedy}, or leave it out")
    # Sensitivities are another pass over the text: statistics may be without.
    may_add = not set(SENSITIVITIES).isdisjoint(inputs_of_criterion(request.criterion))
    needs_text = method.needs_text or (has_use and (may_add or not request.statistics))
    if request.calibration and not (needs_text or request.statistics_out):
        what = "with --statistics" if request.statistics else f"with --criterion {method.criterion}"
        raise RequestError(
            f"--calibration-data has no effect {what}; {remedy}, --compensate or --statistics-out, or leave it out"
        )
    return method


def check_calibration(
    request: CalibrationRequest,
    methods: Sequence[Method],
    statistics: Path | None = None,
) -> None:
    """Refuses methods that lack the text or the statistics that they need.

    Args:
      request: what is asked for.
      methods: those that are wanted.
      statistics: a file in place of the text, if there is one.

    Raises:
      RequestError: as said.
    """
    if not 0 <= request.min_keep < 1:
        raise RequestError(f"--min-keep is {request.min_keep:g}; it must be a share from 0 and below 1")
    check_at_least(2, calibration_tokens=request.calibration_tokens, sequence_length=request.sequence_length)
    if request.calibration and request.calibration_tokens < request.sequence_length:
        raise RequestError(
            f"--calibration-tokens is {request.calibration_tokens}, less than the {request.sequence_length} of one "
            f"window; give more, or a smaller --sequence-length"
        )
    if request.min_keep != MIN_KEEP and all(method.allocation == "uniform" for method in methods):
        raise RequestError(
            f"--min-keep {request.min_keep:g} has no effect without an allocation (global, measured): all layers keep "
            f"the same share"
        )
    for method in methods:
        if method.sequential and not method.depends_on_order:
            raise RequestError(
                f"layer by layer, {method.criterion} chooses the same neurons as at once; add least squares, or leave "
                f"sequential out"
            )
        if method.needs_text and not request.calibration:
            what = "sequential pruning" if method.sequential else "the measured allocation"
            what = "reconstruction" if method.reconstructs else what
            what = "refitting by least squares" if method.is_compensated else what
            raise RequestError(f"{what} runs the model on calibration text; give --calibration-data TEXT")
        if method.needs_statistics and not (request.calibration or statistics):
            raise RequestError(
                f"criterion {method.criterion} needs activations on text; give --calibration-data TEXT or --statistics "
                f"FILE"
            )
