"""Pruning a mixture of experts, which stays in its files."""

from collections.abc import Mapping
from typing import Any

import convert
from convert.gguf.export import prepare_gguf
from convert.huggingface.mixture_config import GROUPED, one_by_one
from convert.model_card import model_card
from gluprune_jax.cli import terminal
from gluprune_jax.cli.report import mixture_changes
from gluprune_jax.prune.checks import formats_of, gguf_options_of
from gluprune_jax.prune.in_files import prune_in_files
from gluprune_jax.prune.report import Clock, add_mixture_forecast, file_sizes
from gluprune_jax.prune.request import PLAN_FILE, PruneRequest
from gluprune_jax.pruning.one_pass import Choice, Ranking, Replay
from gluprune_jax.pruning.plan import PruningPlan
from gluprune_jax.pruning.targets import TARGETS, width_rounding


def prune_mixture(request: PruneRequest, checkpoint: convert.MixtureCheckpoint, command: str) -> None:
    """Prunes a mixture of experts as asked; `command` is what does so again.

    Raises:
      RequestError, OperationError: what cannot be done, or fails.
    """
    clock, sizes = Clock(), checkpoint.sizes
    choice: Choice
    if request.plan is None:
        choice = Ranking(sizes, request.criterion, _target(request), seed=request.seed)
    else:
        choice = Replay(sizes, PruningPlan.load(request.plan))
    formats, gguf = formats_of(request), gguf_options_of(request)
    if "gguf" in formats:  # what cannot be written is said before any work is done
        prepare_gguf(checkpoint, gguf)
    if not request.json:
        for note in checkpoint.notes:
            terminal.note(note)
        if "hf" in formats and (slower := one_by_one(choice.blank.pruned_sizes(sizes))):
            terminal.note(f"{slower}; --multiple-of {GROUPED} gives a width that needs no such thing")
    report: dict[str, Any] = {}

    def files(pruned: Any, plan: PruningPlan) -> Mapping[str, str]:
        num_bytes = {"before": checkpoint.num_bytes, "after": pruned.num_bytes}
        report.update(model=request.model, formats=formats, **mixture_changes(sizes, num_bytes, plan))
        add_mixture_forecast(request, report, checkpoint, pruned)
        card = model_card(pruned, sizes, None, command, sizes=file_sizes(report))
        return {"README.md": card, PLAN_FILE: plan.to_json()}

    prune_in_files(request, checkpoint, choice, clock, report, files)


def _target(request: PruneRequest) -> dict[str, Any]:
    target = {name: value for name in TARGETS if (value := getattr(request, name)) is not None}
    return target | width_rounding(request.runtime, request.multiple_of)
