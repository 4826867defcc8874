"""What the devices need memory for, and the mesh that has it."""

from typing import Any

import jax

import convert
from convert.checkpoint import MeshChoice
from gluprune_jax.cli import terminal
from gluprune_jax.cli.memory import show_plan
from gluprune_jax.memory.mesh_choice import MeshRequest, mesh_chooser
from gluprune_jax.memory.plan import Evaluation, Pruning
from gluprune_jax.prune.checks import method_of
from gluprune_jax.prune.request import PruneRequest

_PROMPT_TOKENS = 1024  # that memory is planned for


def mesh_for(request: PruneRequest, *, streams: bool) -> MeshChoice:
    """The choice of the mesh that the model is loaded onto; all processes must call it."""
    return mesh_chooser(MeshRequest() if request.dry_run else request.devices, [_use_in_memory(request, streams)])


def _use_in_memory(request: PruneRequest, streams: bool) -> Evaluation | Pruning:
    """What the devices need memory for, where the model is loaded."""
    if not request.is_measured:
        return _pruning(request, streams)
    decoded = 0 if request.sample is None else _PROMPT_TOKENS + request.sample_tokens
    on_cpu = request.devices.device_memory is None and jax.default_backend() == "cpu"
    return Evaluation(cached=max(request.sequence_length, decoded), decoded=decoded, slots=1, on_cpu=on_cpu)


def _pruning(request: PruneRequest, streams: bool) -> Pruning:
    if not request.calibration:
        return Pruning(stream=streams)
    method = method_of(request)
    return Pruning(
        calibration=request.calibration_tokens,
        window=request.sequence_length,
        is_compensated=method.is_compensated,
        folds=max(method.folds, 1),
        reconstructs=method.reconstructs,
    )


def show_memory(request: PruneRequest, *, streams: bool) -> dict[str, Any]:
    """Shows what the model will take of each device, before any of it is loaded."""
    model = convert.describe(request.model, dtype=request.dtype, revision=request.revision)
    size = request.devices.capacity()
    plan = request.devices.plan(model, [_pruning(request, streams)], size)  # a dry run measures nothing
    if not request.json:
        show_plan(plan, size, terminal.console())
    request.devices.check(model, plan, size)
    return plan.summary(size)
