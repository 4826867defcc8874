"""The command's work, from the model to the files."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

import convert
from convert.calibration_text import calibration_windows
from convert.chat import fix_date, template_of
from convert.gguf.export import prepare_gguf
from convert.huggingface.one_pass import can_read_once
from convert.huggingface.streamed import StreamedCheckpoint
from convert.model_card import model_card
from convert.pypi import cache_folder
from convert.sources import is_local_mixture, loaded_whole
from convert.store import save_pruned
from convert.tokenizer import has_tokenizer, load_tokenizer, tokens_beyond
from gluprune_jax.cli import method_options, terminal
from gluprune_jax.cli.report import changes, show_plan
from gluprune_jax.data.documents import contents, evaluation_text, read_calibration
from gluprune_jax.errors import RequestError
from gluprune_jax.memory.mesh_choice import MeshRequest, mesh_chooser
from gluprune_jax.memory.plan import Evaluation, Pruning
from gluprune_jax.models.config import ModelConfig
from gluprune_jax.parallel.distributed import check_same, is_main, synchronize_errors
from gluprune_jax.prune.checks import (
    check_mixture_request,
    check_outputs,
    check_preview,
    check_request,
    formats_of,
    gguf_options_of,
    method_of,
    no_random_baseline,
    with_calibration,
)
from gluprune_jax.prune.measure import Measurements
from gluprune_jax.prune.mixture import prune_mixture
from gluprune_jax.prune.report import Clock, add_forecast, add_notes, file_sizes, finish, push
from gluprune_jax.prune.request import PLAN_FILE, PruneRequest
from gluprune_jax.pruning import methods
from gluprune_jax.pruning.budget import target_within
from gluprune_jax.pruning.one_pass import Choice, Ranking, Replay
from gluprune_jax.pruning.plan import PruningPlan, blank_plan
from gluprune_jax.pruning.scores import fingerprint
from gluprune_jax.pruning.statistics import Statistics
from gluprune_jax.pruning.targets import parse_layers, width_rounding

_PROMPT_TOKENS = 1024  # that memory is planned for


def run(request: PruneRequest, command: str) -> None:
    """Prunes as asked; `command` is what does so again.

    Raises:
      RequestError, OperationError: what cannot be done, or fails.
    """
    if is_local_mixture(request.model):  # before what an option lacks is said: no mixture can have it
        check_mixture_request(request)
    completed = with_calibration(request)
    formats = check_request(completed)
    with synchronize_errors():
        if is_main():
            check_outputs(request)
        mixture = convert.open_mixture(request.model, dtype=request.dtype, revision=request.revision)
    if mixture is not None:
        check_mixture_request(request)
        prune_mixture(request, mixture, command)
    else:
        is_own_text = completed.calibration != request.calibration
        if request.dry_run and is_own_text:
            check_preview(request)
        method_options.note_own_text(request.calibration, completed.calibration, is_dry_run=request.dry_run)
        _prune_dense(completed, formats, command, is_own_text=is_own_text)


def _prune_dense(request: PruneRequest, formats: Sequence[str], command: str, *, is_own_text: bool) -> None:
    previews = request.dry_run and is_own_text  # what is asked for, without the text that the model would write
    with synchronize_errors():
        texts = [(name, evaluation_text(name, terminal.note)) for name in request.eval_data]
        documents = read_calibration(request.calibration, "--calibration-data", terminal.note)
        statistics = None if request.statistics is None else Statistics.load(request.statistics)
        plan = None if request.plan is None else PruningPlan.load(request.plan)
        if plan is not None and plan.dropped_layers and request.random_baseline:
            raise no_random_baseline()
        memory = _plan_memory(request) if request.dry_run else None
    check_same(f"--plan {request.plan}", [] if plan is None else [plan.to_json().encode()])
    check_same(f"--statistics {request.statistics}", [] if statistics is None else statistics.parts())
    check_same("the texts of --eval-data", (text.encode() for _, text in texts))
    check_same("the texts of --calibration-data", contents(documents))
    clock = Clock()
    with terminal.byte_progress() as progress:
        checkpoint = convert.load(
            request.model,
            dtype=request.dtype,
            revision=request.revision,
            stream=(request.dry_run and (previews or not request.calibration)) or _streams(request),
            mesh=mesh_chooser(MeshRequest() if request.dry_run else request.devices, [_use_in_memory(request)]),
            progress=progress,
        )
    model, dense = checkpoint.model, checkpoint.config
    if not request.json:
        for note in checkpoint.notes:
            terminal.note(note)
    gguf = gguf_options_of(request)
    if "gguf" in formats:  # what cannot be written is said before any work is done
        prepare_gguf(checkpoint, gguf)
    clock.lap("load")
    if plan is not None and plan.is_compensated and request.compensate == "none":
        plan.check_fits(dense)
        raise RequestError(
            f"--plan {request.plan} was made with refitted weights, which it does not hold; refit them again with "
            f"--compensate {plan.request['compensate']} and --calibration-data TEXT"
        )
    if isinstance(checkpoint, StreamedCheckpoint) and _reads_once(request, checkpoint, formats):
        _prune_in_one_pass(request, checkpoint, plan, statistics, clock, command)
        return

    has_chats = any(document.kind == "chat" for document in documents)
    with synchronize_errors():
        if is_own_text and not has_tokenizer(checkpoint.assets):
            raise RequestError(
                f"{request.model} has no tokenizer files, without which it neither writes calibration text nor takes "
                f"--calibration-data; put them beside the weights, or give a criterion of weights alone"
            )
        tokenizer = load_tokenizer(checkpoint, request.chat_template) if request.is_measured or documents else None
        if tokenizer is not None and (beyond := tokens_beyond(tokenizer, dense.vocab_size)):
            terminal.note(beyond)
        applies = tokenizer is not None and (has_chats or (request.sample is not None and template_of(tokenizer)))
    recorded = _recorded_dates(request, plan, statistics)
    date = fix_date(tokenizer if applies else None, request.date, recorded, terminal.note)
    with synchronize_errors():
        windows = None
        if documents and not previews:
            windows = calibration_windows(
                checkpoint,
                documents,
                tokens=request.calibration_tokens,
                sequence_length=request.sequence_length,
                chat_template=request.chat_template,
                date=date,
                progress=terminal.count_progress,
            )
    method = method_of(request)
    chooser = methods.Chooser(
        model,
        checkpoint.mlp_weights,
        windows=windows,
        names=request.calibration,
        date=date if has_chats else None,
        statistics=statistics,
        refits=method.needs_grams,
        cache=cache_folder(),
        progress=terminal.count_progress,
    )
    collected = None
    if previews:
        blank = blank_plan(dense, **_target(request, checkpoint))
        pruned = methods.Pruned(dataclasses.replace(blank, criterion=request.criterion))
    elif plan is None:
        (pruned,) = chooser.choose(method, [_target(request, checkpoint)])
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
    report = _report(request, formats, checkpoint, pruned)
    if memory:
        report["memory"] = memory
    clock.lap("score")
    if (request.output or request.is_measured) and not request.dry_run:
        measure = Measurements(request, checkpoint, texts, date) if request.is_measured else None
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
                extra_files=_files(request, checkpoint, dense, plan, report, command),
                gguf=gguf,
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


def _prune_in_one_pass(
    request: PruneRequest,
    checkpoint: StreamedCheckpoint,
    plan: PruningPlan | None,
    statistics: Statistics | None,
    clock: Clock,
    command: str,
) -> None:
    """Prunes from file to file, reading each byte once."""
    dense = checkpoint.config
    choice: Choice
    if plan is None:
        observed = statistics if method_of(request).needs_statistics else None
        choice = Ranking(dense, request.criterion, _target(request, checkpoint), statistics=observed, seed=request.seed)
    else:
        choice = Replay(dense, plan)
    report = {}

    def files(pruned: Any, plan: PruningPlan) -> Mapping[str, str]:
        report.update(_report(request, ["hf"], checkpoint, methods.Pruned(plan)))
        return _files(request, pruned, dense, plan, report, command)

    with terminal.byte_progress() as progress:
        _, plan = save_pruned(
            checkpoint,
            choice,
            str(request.output),
            overwrite=request.overwrite,
            extra_files=files,
            pad_to=request.pad_to,
            progress=progress,
        )
    clock.lap("prune")
    report["output"] = str(request.output)
    push(request, report)
    finish(request, plan, report, clock)


def _report(
    request: PruneRequest, formats: Sequence[str], checkpoint: convert.Checkpoint, pruned: methods.Pruned
) -> dict[str, Any]:
    """What pruning changes; said is what speaks against it."""
    found = changes(checkpoint.model, pruned.plan, request.pad_to)
    report = {"model": request.model, "formats": list(formats), **found, **pruned.record()}
    add_forecast(request, report, checkpoint, pruned.plan)
    return report


def _files(
    request: PruneRequest,
    pruned: convert.Checkpoint,
    dense: ModelConfig,
    plan: PruningPlan,
    report: Mapping[str, Any],
    command: str,
) -> dict[str, str]:
    """The model card and the plan, by the names of their files."""
    card = model_card(pruned, dense, report.get("evaluation"), command, sizes=file_sizes(report), pad_to=request.pad_to)
    return {"README.md": card, PLAN_FILE: plan.to_json()}


def _reads_once(request: PruneRequest, checkpoint: StreamedCheckpoint, formats: Sequence[str]) -> bool:
    """Whether what a layer keeps is known from that layer alone, and written where it can be written at once."""
    if list(formats) != ["hf"] or not request.output or request.dry_run:
        return False
    one_by_one = request.allocation == "uniform" and request.drop_least is None and not request.calibration
    return one_by_one and can_read_once(checkpoint)


def _recorded_dates(request: PruneRequest, plan: PruningPlan | None, statistics: Statistics | None) -> dict[str, str]:
    """The days of the calibration text that this builds on, by the file."""
    described = {request.plan: plan and plan.calibration, request.statistics: statistics and statistics.texts}
    return {str(path): texts["date"] for path, texts in described.items() if texts and "date" in texts}


def _streams(request: PruneRequest) -> bool:
    """Whether the weights may stay in their files: nothing asks for the model in the memory of certain devices."""
    if request.stream is not None:
        return bool(request.stream)
    if loaded_whole(request.model):
        return False
    if request.is_measured or request.calibration or request.devices.mesh != "auto" or request.distributed:
        return False
    # Orbax is written from the pruned model in memory, which several devices hold better together.
    return "orbax" not in formats_of(request) or jax.device_count() == 1


def _use_in_memory(request: PruneRequest) -> Evaluation | Pruning:
    """What the devices need memory for, where the model is loaded."""
    if not request.is_measured:
        return _pruning(request)
    decoded = 0 if request.sample is None else _PROMPT_TOKENS + request.sample_tokens
    on_cpu = request.devices.device_memory is None and jax.default_backend() == "cpu"
    return Evaluation(cached=max(request.sequence_length, decoded), decoded=decoded, slots=1, on_cpu=on_cpu)


def _pruning(request: PruneRequest) -> Pruning:
    if not request.calibration:
        return Pruning(stream=_streams(request))
    method = method_of(request)
    return Pruning(
        calibration=request.calibration_tokens,
        window=request.sequence_length,
        is_compensated=method.is_compensated,
        folds=max(method.folds, 1),
        reconstructs=method.reconstructs,
    )


def _plan_memory(request: PruneRequest) -> dict[str, Any]:
    """Shows what the model will take of each device, before any of it is loaded."""
    model = convert.describe(request.model, dtype=request.dtype, revision=request.revision)
    size = request.devices.capacity()
    plan = request.devices.plan(model, [_pruning(request)], size)  # a dry run measures nothing
    if not request.json:
        show_plan(plan, size, terminal.console())
    request.devices.check(model, plan, size)
    return plan.summary(size)


def _target(request: PruneRequest, checkpoint: convert.Checkpoint) -> dict[str, Any]:
    """What `methods.Chooser` takes for a target."""
    target: dict[str, Any] = {
        "expansion_ratio": request.expansion_ratio,
        "prune_percent": request.prune_percent,
        "width": request.width,
    }
    target = {name: value for name, value in target.items() if value is not None}
    rounding = width_rounding(request.runtime, request.multiple_of)
    L = checkpoint.config.num_hidden_layers
    if request.layers is not None:
        target["layers"] = parse_layers(request.layers, L)
    if request.drop_layers is not None:
        target["drop_layers"] = parse_layers(request.drop_layers, L, "--drop-layers")
    if request.drop_least is not None:
        target["drop_least"] = request.drop_least
    target |= _target_within(request, checkpoint, rounding["multiple_of"], target)
    return {**target, **rounding}


def _target_within(
    request: PruneRequest, checkpoint: convert.Checkpoint, multiple_of: int, others: dict[str, Any]
) -> dict[str, Any]:
    """The width that --target-parameters or --target-bytes means, if one of them is given; `others` names layers."""
    if request.target_parameters is None and request.target_bytes is None:
        return {}
    from_folder, target_type = "gguf" not in formats_of(request), request.target_type or "hf"
    is_padded = request.target_bytes is not None and target_type != "orbax" and (from_folder or target_type == "hf")
    if is_padded and request.allocation != "uniform" and not request.json:
        terminal.note(
            "a Hugging Face folder has one width for all layers, so that --target-bytes counts them padded to the "
            "widest; --target-type orbax counts true widths, and so do types of GGUF files where --format is gguf"
        )
    layers, dropped = others.get("layers"), others.get("drop_layers", ())
    if count := others.get("drop_least", 0):  # which layers go does not matter here, only how many
        free = [i for i in range(checkpoint.config.num_hidden_layers) if i not in (layers or ())]
        dropped = free[-count:]
    return target_within(
        checkpoint.config,
        target_parameters=request.target_parameters,
        target_bytes=request.target_bytes,
        file_size=checkpoint.file_size(
            target_type,
            request.pad_to,
            from_folder=from_folder,
            gguf_widths=request.gguf_widths,
        ),
        multiple_of=multiple_of,
        pad_to=request.pad_to,
        layers=layers,
        drop_layers=dropped,
        allocation=request.allocation,
    )
