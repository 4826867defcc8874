"""The command's work: reads what it is asked for, and prunes from file to file where that is all.

JAX is imported for what only a model in memory has (`in_memory`), and for criteria other than `ppm`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import convert
from convert.gguf.export import prepare_gguf
from convert.huggingface.streamed import StreamedCheckpoint
from convert.sources import is_local_mixture, loaded_whole
from gluprune_jax.cli import method_options, terminal
from gluprune_jax.data.documents import contents, evaluation_text, read_calibration
from gluprune_jax.errors import RequestError
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
from gluprune_jax.prune.in_files import prune_in_files
from gluprune_jax.prune.mixture import prune_mixture
from gluprune_jax.prune.report import Clock, files_beside, report_of
from gluprune_jax.prune.request import Inputs, PruneRequest
from gluprune_jax.prune.target import target_of
from gluprune_jax.pruning.methods import Pruned
from gluprune_jax.pruning.one_pass import Choice, Ranking, Replay
from gluprune_jax.pruning.plan import PruningPlan
from gluprune_jax.pruning.statistics import Statistics


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
        memory = None
        if request.dry_run:
            from gluprune_jax.prune.memory import show_memory  # here: devices are asked for their memory through JAX

            memory = show_memory(request, streams=streams(request))
    check_same(f"--plan {request.plan}", [] if plan is None else [plan.to_json().encode()])
    check_same(f"--statistics {request.statistics}", [] if statistics is None else statistics.parts())
    check_same("the texts of --eval-data", (text.encode() for _, text in texts))
    check_same("the texts of --calibration-data", contents(documents))
    clock = Clock()
    in_files = request.dry_run and (previews or not request.calibration)
    stays, mesh = _stays_in_files(request, formats), None
    if not stays or request.devices.device_memory is not None:  # a size that is spelled wrongly is refused
        from gluprune_jax.prune.memory import mesh_for  # here: as above

        mesh = mesh_for(request, streams=streams(request))
    with terminal.byte_progress() as progress:
        checkpoint = convert.load(
            request.model,
            dtype=request.dtype,
            revision=request.revision,
            stream=in_files or streams(request),
            mesh=mesh,
            progress=progress,
        )
    if not request.json:
        for note in checkpoint.notes:
            terminal.note(note)
    if "gguf" in formats:  # what cannot be written is said before any work is done
        prepare_gguf(checkpoint, gguf_options_of(request))
    clock.lap("load")
    if plan is not None and plan.is_compensated and request.compensate == "none":
        plan.check_fits(checkpoint.config)
        raise RequestError(
            f"--plan {request.plan} was made with refitted weights, which it does not hold; refit them again with "
            f"--compensate {plan.request['compensate']} and --calibration-data TEXT"
        )
    if stays and isinstance(checkpoint, StreamedCheckpoint):
        report = {} if memory is None else {"memory": memory}
        choice = _choice(request, checkpoint, plan, statistics)

        def describe(pruned: Any, plan: PruningPlan) -> Mapping[str, str]:
            report.update(report_of(request, formats, checkpoint, Pruned(plan)))
            return files_beside(request, pruned, checkpoint.config, plan, report, command)

        prune_in_files(request, checkpoint, choice, clock, report, describe)
        return
    from gluprune_jax.prune.in_memory import prune  # here: it runs models, which needs JAX

    inputs = Inputs(texts, documents, statistics, plan, memory)
    prune(request, formats, command, checkpoint, inputs, clock, is_own_text=is_own_text)


def _choice(
    request: PruneRequest, checkpoint: StreamedCheckpoint, plan: PruningPlan | None, statistics: Statistics | None
) -> Choice:
    """How the neurons of one layer after the other are chosen."""
    if plan is not None:
        return Replay(checkpoint.config, plan)
    observed = statistics if method_of(request).needs_statistics else None
    target = target_of(request, checkpoint)
    return Ranking(checkpoint.config, request.criterion, target, statistics=observed, seed=request.seed)


def _stays_in_files(request: PruneRequest, formats: Sequence[str]) -> bool:
    """Whether all of the work is one layer after the other, in the memory of the host."""
    one_by_one = request.allocation == "uniform" and request.drop_least is None and not request.calibration
    return one_by_one and "orbax" not in formats and streams(request)


def streams(request: PruneRequest) -> bool:
    """Whether the weights may stay in their files: nothing asks for the model in the memory of certain devices."""
    if request.stream is not None:
        return bool(request.stream)
    if loaded_whole(request.model):
        return False
    if request.is_measured or request.calibration or request.devices.mesh != "auto" or request.distributed:
        return False
    if "orbax" not in formats_of(request):
        return True
    import jax  # here: as in what it is for

    # Orbax is written from the pruned model in memory, which several devices hold better together.
    return jax.device_count() == 1
