"""Pruning from file to file, with a few tensors in memory at a time.

What is kept of an MLP is known from that MLP alone. JAX is imported for criteria other than `ppm`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import convert
from convert.huggingface.one_pass import can_read_once
from convert.huggingface.streamed import StreamedCheckpoint
from convert.store import save_pruned
from gluprune_jax.cli import terminal
from gluprune_jax.prune.checks import formats_of, gguf_options_of
from gluprune_jax.prune.report import Clock, add_notes, finish, push
from gluprune_jax.prune.request import PruneRequest
from gluprune_jax.pruning.one_pass import Choice
from gluprune_jax.pruning.plan import PruningPlan


def prune_in_files(
    request: PruneRequest,
    checkpoint: StreamedCheckpoint | convert.MixtureCheckpoint,
    choice: Choice,
    clock: Clock,
    report: dict[str, Any],
    describe: Callable[[Any, PruningPlan], Mapping[str, str]],
) -> None:
    """Chooses neurons, writes what is kept of them, and reports that.

    Args:
      request: what is asked for.
      checkpoint: the dense model.
      choice: of its neurons.
      clock: counts the time of each part.
      report: is added to.
      describe: is given the pruned model and the plan; adds to the report what that changes, and gives text files to
        put beside the weights, by name.

    Raises:
      RequestError, OperationError: what cannot be done, or fails.
    """
    formats, writes = formats_of(request), request.output is not None and not request.dry_run
    if writes and formats == ["hf"] and can_read_once(checkpoint):
        with terminal.byte_progress() as progress:
            _, plan = save_pruned(
                checkpoint,
                choice,
                str(request.output),
                overwrite=request.overwrite,
                extra_files=describe,
                pad_to=request.pad_to,
                progress=progress,
            )
        clock.lap("prune")
    else:
        unit = "MLPs" if isinstance(checkpoint, convert.MixtureCheckpoint) else "layers"
        with terminal.count_progress("scoring neurons", len(choice.blank.kept), unit) as scored:
            # By map: a loop would hold the matrices of one MLP while the next are read.
            for i, _ in enumerate(map(choice.keep, checkpoint.mlp_weights()), start=1):
                scored(i)
        plan = choice.plan()
        pruned = checkpoint.pruned(plan)
        texts = describe(pruned, plan)
        clock.lap("score")
        if writes:
            with terminal.byte_progress() as progress:
                notes = convert.save(
                    pruned,
                    str(request.output),
                    formats=formats,
                    overwrite=request.overwrite,
                    extra_files=texts,
                    gguf=gguf_options_of(request),
                    pad_to=request.pad_to,
                    progress=progress,
                )
            clock.lap("save")
            add_notes(request, report, notes)
    if writes:
        report["output"] = str(request.output)
        push(request, report)
    finish(request, plan, report, clock)
