"""What the command says and leaves beside the weights."""

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import convert
from convert.gguf.sizes import (
    FILE_TYPES,
    forecast,
    metadata_bytes,
    quantisation_warning,
    tensor_bytes,
    with_width,
)
from convert.gguf.writer import choose_widths
from convert.huggingface.push import push_to_hub
from gluprune_jax.cli import terminal
from gluprune_jax.cli.report import show
from gluprune_jax.errors import spelled
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.models.parameters import parameters_of
from gluprune_jax.parallel.distributed import is_main, synchronize_errors
from gluprune_jax.prune import parser
from gluprune_jax.prune.request import PruneRequest
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
    file_type = None if table is None else _gguf_file_type(request, checkpoint.model)
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
    before, after = (report[when]["gguf_bytes"] for when in ("before", "after"))
    if warning := quantisation_warning(before, after, widths["after"], max(widths["before"]), file_type):
        report["warning"] = spelled(warning, parser().flags)
        if not request.json:
            terminal.note(warning)


def _gguf_file_type(request: PruneRequest, model: Decoder) -> str | None:
    """What the matrices of the GGUF file become, one of `FILE_TYPES`; None where it is not known how large that is."""
    if asked := request.quantize or request.gguf_type:
        return asked if asked in FILE_TYPES else None
    arrays = parameters_of(model)
    dtypes = {arrays[name].dtype.name for name in arrays if arrays[name].ndim > 1 and not name.endswith("bias")}
    names = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    return names[dtypes.pop()] if len(dtypes) == 1 else None


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


def before_and_after(report: Mapping[str, Any], key: str, name: str) -> tuple[int, int]:
    """A figure of the dense and of the pruned model."""
    return report["before"][key][name], report["after"][key][name]
