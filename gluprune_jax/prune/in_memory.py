"""Pruning a model that is run, scored across layers, or written in several formats."""

import dataclasses
from collections.abc import Sequence

import convert
from convert.calibration_text import calibration_windows
from convert.chat import fix_date, template_of
from convert.pypi import cache_folder
from convert.tokenizer import has_tokenizer, load_tokenizer, tokens_beyond
from gluprune_jax.cli import terminal
from gluprune_jax.errors import RequestError
from gluprune_jax.parallel.distributed import is_main, synchronize_errors
from gluprune_jax.prune.checks import gguf_options_of, method_of
from gluprune_jax.prune.measure import Measurements
from gluprune_jax.prune.report import Clock, add_notes, files_beside, finish, push, report_of
from gluprune_jax.prune.request import Inputs, PruneRequest
from gluprune_jax.prune.target import target_of
from gluprune_jax.pruning.chooser import Chooser
from gluprune_jax.pruning.methods import Pruned
from gluprune_jax.pruning.plan import PruningPlan, blank_plan
from gluprune_jax.pruning.scores import fingerprint
from gluprune_jax.pruning.statistics import Statistics


def prune(
    request: PruneRequest,
    formats: Sequence[str],
    command: str,
    checkpoint: convert.Checkpoint,
    inputs: Inputs,
    clock: Clock,
    *,
    is_own_text: bool,
) -> None:
    """Prunes a model that was opened, and measures and writes what was asked for.

    Args:
      request: what is asked for.
      formats: of the output.
      command: what does so again.
      checkpoint: the dense model.
      inputs: what was read beside it.
      clock: counts the time of each part.
      is_own_text: whether the calibration text is the model's own because none was given.

    Raises:
      RequestError, OperationError: what cannot be done, or fails.
    """
    previews = request.dry_run and is_own_text  # what is asked for, without the text that the model would write
    model, dense, plan = checkpoint.model, checkpoint.config, inputs.plan
    has_chats = any(document.kind == "chat" for document in inputs.documents)
    with synchronize_errors():
        if is_own_text and not has_tokenizer(checkpoint.assets):
            raise RequestError(
                f"{request.model} has no tokenizer files, without which it neither writes calibration text nor takes "
                f"--calibration-data; put them beside the weights, or give a criterion of weights alone"
            )
        tokenizer = (
            load_tokenizer(checkpoint, request.chat_template) if request.is_measured or inputs.documents else None
        )
        if tokenizer is not None and (beyond := tokens_beyond(tokenizer, dense.vocab_size)):
            terminal.note(beyond)
        applies = tokenizer is not None and (has_chats or (request.sample is not None and template_of(tokenizer)))
    recorded = _recorded_dates(request, plan, inputs.statistics)
    date = fix_date(tokenizer if applies else None, request.date, recorded, terminal.note)
    with synchronize_errors():
        windows = None
        if inputs.documents and not previews:
            windows = calibration_windows(
                checkpoint,
                inputs.documents,
                tokens=request.calibration_tokens,
                sequence_length=request.sequence_length,
                chat_template=request.chat_template,
                date=date,
                progress=terminal.count_progress,
            )
    method = method_of(request)
    chooser = Chooser(
        model,
        checkpoint.mlp_weights,
        windows=windows,
        names=request.calibration,
        date=date if has_chats else None,
        statistics=inputs.statistics,
        refits=method.needs_grams,
        cache=cache_folder(),
        progress=terminal.count_progress,
    )
    collected = None
    if previews:
        blank = blank_plan(dense, **target_of(request, checkpoint))
        pruned = Pruned(dataclasses.replace(blank, criterion=request.criterion))
    elif plan is None:
        (pruned,) = chooser.choose(method, [target_of(request, checkpoint)])
        # All compute it together, while the dense model is there: slicing takes it apart.
        collected = chooser.statistics() if request.statistics_out and not request.dry_run else None
    else:
        plan.check_fits(dense)
        with terminal.count_progress("checking the plan", dense.num_hidden_layers, "layers") as progress:
            weights = checkpoint.mlp_weights()
            plan.check_fits(dense, fingerprint(model, weights=weights, on_layer=lambda i: progress(i + 1)))
        (pruned,) = chooser.repaired([plan], method)
    plan = pruned.plan
    if not request.json:
        for note in pruned.notes():
            terminal.note(note)
    report = report_of(request, formats, checkpoint, pruned)
    if inputs.memory:
        report["memory"] = inputs.memory
    clock.lap("score")
    if (request.output or request.is_measured) and not request.dry_run:
        measure = Measurements(request, checkpoint, inputs.texts, date) if request.is_measured else None
        if measure:
            measure.take("dense", model)
            if request.random_baseline:
                measure.take_random(model, plan, chooser.scores("random", request.seed))
            clock.lap("measure")
        checkpoint = checkpoint.pruned(pruned, donate=True)
        clock.lap("slice")
        if measure:
            measure.take("pruned", checkpoint.model)
            report |= measure.report()
            clock.lap("measure")
    if request.output and not request.dry_run:
        with terminal.byte_progress() as progress:
            notes = convert.save(
                checkpoint,
                request.output,
                formats=formats,
                overwrite=request.overwrite,
                extra_files=files_beside(request, checkpoint, dense, plan, report, command),
                gguf=gguf_options_of(request),
                pad_to=request.pad_to,
                progress=progress,
            )
        add_notes(request, report, notes)
        clock.lap("save")
        report["output"] = str(request.output)
        push(request, report)
    if request.statistics_out and not request.dry_run:
        assert collected is not None  # there is calibration text
        with synchronize_errors():
            if is_main():
                collected.save(request.statistics_out, overwrite=request.overwrite)
        report["statistics_out"] = str(request.statistics_out)
    finish(request, plan, report, clock)


def _recorded_dates(request: PruneRequest, plan: PruningPlan | None, statistics: Statistics | None) -> dict[str, str]:
    """The days of the calibration text that this builds on, by the file."""
    described = {request.plan: plan and plan.calibration, request.statistics: statistics and statistics.texts}
    return {str(path): texts["date"] for path, texts in described.items() if texts and "date" in texts}
