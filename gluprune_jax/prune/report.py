"""What the command says and leaves beside the weights."""

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import convert
from convert.gguf.sizes import (
    FILE_TYPES,
    forecast,
    forecast_mixture,
    metadata_bytes,
    mixture_metadata_bytes,
    mixture_tensor_bytes,
    quantisation_warning,
    tensor_bytes,
    with_width,
)
from convert.gguf.widths import choose_widths
from convert.gguf.writer import plan_gguf_mixture
from convert.huggingface.push import push_to_hub
from convert.model_card import model_card
from gluprune_jax.cli import terminal
from gluprune_jax.cli.report import FORMAT_NAMES, changes, show
from gluprune_jax.errors import RequestError, spelled
from gluprune_jax.models.config import ModelConfig
from gluprune_jax.parallel.distributed import is_main, synchronize_errors
from gluprune_jax.prune import parser
from gluprune_jax.prune.request import PLAN_FILE, PruneRequest
from gluprune_jax.pruning.methods import Pruned
from gluprune_jax.pruning.plan import PruningPlan


def finish(request: PruneRequest, plan: PruningPlan, report: dict[str, Any], clock: "Clock") -> None:
    """Saves the plan where that is asked for, and prints the report."""
    if request.plan_out and not request.dry_run:
        with synchronize_errors():
            if is_main():
                plan.save(request.plan_out, overwrite=request.overwrite)
        report["plan_out"] = str(request.plan_out)
    report["seconds"] = clock.seconds
    if request.json:
        print(json.dumps(report, indent=1))
    else:
        show(report, terminal.console())


def report_of(
    request: PruneRequest, formats: Sequence[str], checkpoint: convert.Checkpoint, pruned: Pruned
) -> dict[str, Any]:
    """What pruning changes; said is what speaks against it."""
    found = changes(checkpoint.config, checkpoint.num_bytes, pruned.plan, request.pad_to)
    report = {"model": request.model, "formats": list(formats), **found, **pruned.record()}
    add_forecast(request, report, checkpoint, pruned.plan)
    return report


def files_beside(
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


class Clock:
    """Seconds spent in each named part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        """Counts the time since the last lap to a part."""
        now = time.perf_counter()
        self.seconds[part] = round(self.seconds.get(part, 0) + now - self._last, 3)
        self._last = now


def add_forecast(
    request: PruneRequest, report: dict[str, Any], checkpoint: convert.Checkpoint, plan: PruningPlan
) -> None:
    """Adds to a report what the dense and the pruned model take as GGUF files, and says so if pruning does not help."""
    dense, family = checkpoint.config, checkpoint.family
    metadata = metadata_bytes(dense, family, checkpoint.assets)
    table = family.gguf if "gguf" in report["formats"] else None
    file_type = None if table is None else _gguf_file_type(request, _matrix_dtypes(checkpoint))
    widths = {}
    for when, config, pad_to in (("before", dense, 1), ("after", plan.pruned_config(dense), request.pad_to)):
        # As llama.cpp's converter finds them in the folder, or as we write them.
        found = with_width(config, report[when]["file_width"])
        if table is not None:
            multiple = None if pad_to == 1 else pad_to
            _, sizes, _ = choose_widths(table, config, request.gguf_widths, multiple)
            found = dataclasses.replace(found, intermediate_sizes=sizes)
        widths[when] = found.intermediate_sizes
        report[when]["gguf_bytes"] = forecast(found, family, metadata)
        if file_type:
            report[when]["file_bytes"]["gguf"] = tensor_bytes(found, family, file_type)
    _warn(request, report, widths["after"], max(widths["before"]), file_type)


def add_mixture_forecast(
    request: PruneRequest, report: dict[str, Any], dense: convert.MixtureCheckpoint, pruned: convert.MixtureCheckpoint
) -> None:
    """As `add_forecast`, of a mixture of experts; nothing is forecast of one that llama.cpp cannot express."""
    try:
        plan_gguf_mixture(dense)
    except RequestError:
        return
    file_type = None
    if "gguf" in report["formats"]:
        tensors = dense.tensors().values()
        file_type = _gguf_file_type(request, {dtype.name for dtype, shape in tensors if len(shape) > 1})
    metadata = mixture_metadata_bytes(dense.config, dense.assets)
    for when, of in (("before", dense), ("after", pruned)):
        report[when]["gguf_bytes"] = forecast_mixture(dense.config, of.sizes, metadata)
        if file_type:
            report[when]["file_bytes"]["gguf"] = mixture_tensor_bytes(dense.config, of.sizes, file_type)
    _warn(request, report, [pruned.sizes.expert_size], 0, file_type)  # 0: experts are not padded


def _warn(
    request: PruneRequest, report: dict[str, Any], widths: Sequence[int], dense_width: int, file_type: str | None
) -> None:
    """Says so where pruning does not make quantised files smaller; see `quantisation_warning`."""
    before, after = (report[when]["gguf_bytes"] for when in ("before", "after"))
    if warning := quantisation_warning(before, after, widths, dense_width, file_type):
        report["warning"] = spelled(warning, parser().flags)
        if not request.json:
            terminal.note(warning)


def _gguf_file_type(request: PruneRequest, dtypes: Set[str]) -> str | None:
    """What matrices of these dtypes become in the GGUF file, one of `FILE_TYPES`; None where its size is not known."""
    if asked := request.quantize or request.gguf_type:
        return asked if asked in FILE_TYPES else None
    names = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    return names[next(iter(dtypes))] if len(dtypes) == 1 else None


def _matrix_dtypes(checkpoint: convert.Checkpoint) -> Set[str]:
    return {checkpoint.dtypes[name.name].name for name in checkpoint.tensor_names if len(name.shape) > 1}


def add_notes(request: PruneRequest, report: dict[str, Any], notes: Sequence[str]) -> None:
    """Adds to a report what the writer said, and says it."""
    if notes:
        report["notes"] = list(notes)
    if not request.json:
        for note in notes:
            terminal.note(note)


def push(request: PruneRequest, report: dict[str, Any]) -> None:
    """Uploads what was written, where that is asked for."""
    if request.push_to_hub is None:
        return
    with synchronize_errors():
        if is_main():
            push_to_hub(
                Path(str(request.output)), request.push_to_hub, private=request.private, overwrite=request.overwrite
            )
    report["pushed_to"] = request.push_to_hub


def file_sizes(report: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """The bytes of the dense and of the pruned model, by what people call the files."""
    before, after = report["before"], report["after"]
    written = [key for key in report["formats"] if key in after["file_bytes"]]
    forecasts = after.get("gguf_bytes", ())
    return {FORMAT_NAMES[key]: (before["file_bytes"][key], after["file_bytes"][key]) for key in written} | {
        f"GGUF {key}, forecast": (before["gguf_bytes"][key], after["gguf_bytes"][key]) for key in forecasts
    }
