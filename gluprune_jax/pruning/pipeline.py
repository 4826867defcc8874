"""Pruning in one call: what `python -m gluprune_jax.prune` does between reading a checkpoint and writing one.

import convert
from gluprune_jax import prune_model

pruned = prune_model(convert.load("demo"), "hybrid+least-squares", prune_percent=20, calibration=["python-reference"])
convert.save(pruned, "smollm2-p20")
"""

import datetime
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from gluprune_jax.data.documents import Document, read_calibration
from gluprune_jax.errors import RequestError
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.progress import Progress, no_progress
from gluprune_jax.pruning.budget import ALL_TARGETS, SizeOf, target_within
from gluprune_jax.pruning.choices import MIN_KEEP, inputs_of_criterion
from gluprune_jax.pruning.chooser import Chooser
from gluprune_jax.pruning.methods import Method, Pruned, calibration_texts
from gluprune_jax.pruning.plan import PruningPlan
from gluprune_jax.pruning.scores import MLPWeights
from gluprune_jax.pruning.statistics import SENSITIVITIES, Statistics
from gluprune_jax.pruning.targets import width_rounding

CALIBRATION_TOKENS, SEQUENCE_LENGTH = 32768, 512


class Prunable(Protocol):
    """A model and what travels with it, as `prune_model` takes and returns it: `convert.Checkpoint` is one.

    This package knows neither file formats nor tokenizers; what pruning needs of them is here.
    """

    @property
    def model(self) -> Decoder:
        """The model; abstract where its weights stay in their files."""

    def mlp_weights(self) -> Iterator[MLPWeights[Any]]:
        """The MLP matrices, layer by layer, wherever they are."""

    def runnable_model(self) -> Decoder:
        """The model with its weights in memory."""

    def chat_date(self, documents: Sequence[Document], given: datetime.date | None) -> datetime.date | None:
        """The day that the chat template writes into these documents, if any is a conversation and it writes one."""

    def calibration_windows(
        self,
        documents: Sequence[Document],
        *,
        tokens: int,
        sequence_length: int,
        date: datetime.date | None,
        progress: Progress,
    ) -> NDArray[np.int32]:
        """Texts as windows of token ids `[N, W]`, W = `sequence_length`, of at most `tokens` in all."""

    def file_size(self, file_type: str, pad_to: int = 1) -> SizeOf:
        """What gives its bytes in files of a type ("hf", "orbax", or one of GGUF), for the neurons left of layers."""

    def pruned(self, pruned: Pruned | PruningPlan) -> Self:
        """The checkpoint with its model pruned, and a record of that in its history."""


C = TypeVar("C", bound=Prunable)


def prune_model(
    checkpoint: C,
    method: str | Method = "ppm",
    *,
    prune_percent: float | None = None,
    expansion_ratio: str | float | None = None,
    width: int | None = None,
    target_parameters: str | int | None = None,
    target_bytes: str | int | None = None,
    target_type: str = "hf",
    layers: Sequence[int] | None = None,
    multiple_of: int = 1,
    runtime: str | None = None,
    pad_to: int = 1,
    drop_layers: Sequence[int] = (),
    min_keep: float = MIN_KEEP,
    calibration: Sequence[str | PathLike[str]] | None = None,
    calibration_tokens: int = CALIBRATION_TOKENS,
    sequence_length: int = SEQUENCE_LENGTH,
    statistics: Statistics | str | PathLike[str] | None = None,
    seed: int = 0,
    date: datetime.date | None = None,
    cache: str | PathLike[str] | None = None,
    progress: Progress = no_progress,
) -> C:
    """Prunes a model: weights, architecture and history of the result are those that the command writes.

    Args:
      checkpoint: from `convert.load`. It is left as it is, and shares all arrays that do not change with the result.
      method: the criterion and what follows it, such as "hybrid+global+least-squares" (see `Method.parse`), or a
        `Method`, which has its own `min_keep` and `seed`.
      prune_percent: share of each layer's neurons to remove, in percent. One target is given, or at most one where
        layers are dropped.
      expansion_ratio: target of intermediate size over hidden size; a string keeps its decimal digits.
      width: target intermediate size.
      target_parameters: how many parameters the model may have, such as "1.0B": the width is the largest with which it
        has no more; with an allocation, the share of neurons is.
      target_bytes: how large its files may be, such as "700MB", likewise.
      target_type: of the files that `target_bytes` is of: "hf", in which layers of different widths are padded to the
        widest, "orbax", or of GGUF files as `convert.save` writes them, such as "Q4_K_M".
      layers: indices of the layers to prune; all that stay when None.
      multiple_of: widths are rounded down to a multiple of this.
      runtime: rounds widths to the nearest multiple that this one takes well, one of `targets.RUNTIMES`.
      pad_to: what the files that `target_bytes` is of will be padded to; as of `convert.save`.
      drop_layers: indices of the layers to remove whole.
      min_keep: the least share of its neurons that a layer keeps, where layers differ in width.
      calibration: texts, each a file, a folder, a hub data set (`hub:OWNER/NAME`) or `self`, which the model writes
        itself; with weights (`["self:0.5", "corpus.txt:0.5"]`) or without. See `data.documents`. Where the method needs
        text, and there are no `statistics`, `self` is the default.
      calibration_tokens: how many tokens of them are used.
      sequence_length: tokens of a calibration window.
      statistics: of this model on these texts, collected before: a file, or what it holds.
      seed: of criteria that draw random numbers.
      date: the day that a chat template writes into conversations, where it writes one; otherwise today, which the
        history says.
      cache: a folder where reconstruction keeps finished layers until all are, so that the same call goes on after an
        interruption.
      progress: is told what is being done.

    Raises:
      RequestError: a request that cannot be met, naming the parameter; a text that is not there.
      OperationError: weights or statistics that are not finite.
    """
    if isinstance(method, str):
        method = Method.parse(method, min_keep=min_keep, seed=seed)
    rounding, found = width_rounding(runtime, multiple_of), {}
    if target_bytes is None and (target_type, pad_to) != ("hf", 1):
        raise RequestError("`target_type` and `pad_to` say what files `target_bytes` is of; give that too, or neither")
    if target_parameters is not None or target_bytes is not None:
        if (prune_percent, expansion_ratio, width) != (None, None, None):
            raise RequestError(f"one target is given alone: {' or '.join(f'`{name}`' for name in ALL_TARGETS)}")
        found = target_within(
            checkpoint.model.config,
            target_parameters=None if target_parameters is None else str(target_parameters),
            target_bytes=None if target_bytes is None else str(target_bytes),
            file_size=checkpoint.file_size(target_type, pad_to),
            multiple_of=rounding["multiple_of"],
            pad_to=pad_to,
            layers=layers,
            drop_layers=drop_layers,
            allocation=method.allocation,
        )
    names = calibration_texts(
        [method], [str(name) for name in calibration or ()], has_statistics=statistics is not None
    )
    if isinstance(statistics, str | PathLike):
        statistics = Statistics.load(str(statistics))
    _check_request(method, bool(names), statistics is not None, bool(drop_layers), calibration_tokens, sequence_length)
    documents = read_calibration(names, "`calibration`")
    date = checkpoint.chat_date(documents, date)
    windows = None
    if documents:
        windows = checkpoint.calibration_windows(
            documents, tokens=calibration_tokens, sequence_length=sequence_length, date=date, progress=progress
        )
    chooser = Chooser(
        checkpoint.model if windows is None else checkpoint.runnable_model(),
        checkpoint.mlp_weights,
        windows=windows,
        names=names,
        date=date,
        statistics=statistics,
        refits=method.needs_grams,
        cache=None if cache is None else Path(cache),
        progress=progress,
    )
    # 20 and 20.0 are the same request, and read the same in the history.
    percent = None if prune_percent is None else float(prune_percent)
    target: dict[str, Any] = {"prune_percent": percent, "expansion_ratio": expansion_ratio, "width": width}
    target |= {"layers": layers, "drop_layers": drop_layers}
    target = {name: value for name, value in target.items() if value is not None}
    (pruned,) = chooser.choose(method, [{**target, **found, **rounding}])
    return checkpoint.pruned(pruned)


def _check_request(
    method: Method,
    has_text: bool,
    has_statistics: bool,
    drops_layers: bool,
    calibration_tokens: int,
    sequence_length: int,
) -> None:
    """Refuses what could only fail late, and what would silently have no effect.

    Raises:
      RequestError: as said.
    """
    inputs = inputs_of_criterion(method.criterion)
    if not 0 <= method.min_keep < 1:
        raise RequestError(f"`min_keep` is {method.min_keep:g}; it must be a share from 0 and below 1")
    if method.min_keep != MIN_KEEP and method.allocation == "uniform":
        raise RequestError(
            f"`min_keep` is {method.min_keep:g} and has no effect: without an allocation (global, measured) all layers "
            f"keep the same share"
        )
    if method.sequential and not method.depends_on_order:
        raise RequestError(
            f"`method` is {method}: {method.criterion} chooses the same neurons in any order; add least-squares, or "
            f"leave the order out"
        )
    if method.needs_text and drops_layers:
        raise RequestError(
            f"`method` {method} prunes the layers of one model, and `drop_layers` makes it another; drop layers first, "
            f"then prune what comes out"
        )
    if method.needs_text and not has_text:
        raise RequestError(
            f"`method` {method} runs the model on calibration text; give as `calibration` what `statistics` are of"
        )
    if has_statistics and not method.needs_statistics:
        raise RequestError(f"`statistics` have no effect with `method` {method}; leave them out")
    # Sensitivities are another pass over the text: statistics may be without.
    may_add = not set(SENSITIVITIES).isdisjoint(inputs)
    if has_text and not (method.needs_text or (method.needs_statistics and (may_add or not has_statistics))):
        raise RequestError(f"`calibration` has no effect with `method` {method}; leave it out")
    for name, value in (("calibration_tokens", calibration_tokens), ("sequence_length", sequence_length)):
        if value < 2:
            raise RequestError(f"`{name}` is {value}; it must be at least 2")
    if calibration_tokens < sequence_length:
        raise RequestError(
            f"`calibration_tokens` is {calibration_tokens}, less than the {sequence_length} of one window; give more, "
            f"or a smaller `sequence_length`"
        )
