"""What the command refuses before any work, and what an option means beside others."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from convert.gguf.export import GGUFOptions, gguf_options
from convert.gguf.sizes import check_file_type
from convert.huggingface.push import check_options, check_push
from convert.output import FORMATS, check_format, check_not_own_folder, check_padding, check_target, parse_formats
from convert.sources import loaded_whole
from gluprune_jax.cli import method_options
from gluprune_jax.errors import GlupruneError, RequestError, check_at_least
from gluprune_jax.files.atomic import check_file
from gluprune_jax.files.object_store import in_store
from gluprune_jax.prune.request import PLAN_FILE, PruneRequest
from gluprune_jax.pruning import methods
from gluprune_jax.pruning.budget import ALL_TARGETS, parse_parameters, parse_target_bytes
from gluprune_jax.pruning.choices import MIN_KEEP, WEIGHT_CRITERION_NAMES, is_data_driven
from gluprune_jax.pruning.plan import PruningPlan
from gluprune_jax.pruning.statistics import Statistics
from gluprune_jax.pruning.targets import WIDTHLESS, width_for_expansion_ratio, width_for_percent, width_rounding


def with_calibration(request: PruneRequest) -> PruneRequest:
    """The request with the calibration text that it means: the model's own, where it needs text and names none.

    A model that stays in its files writes none, and what a plan was refitted to may have been another text.
    """
    if request.stream or request.plan:
        return request
    texts = methods.calibration_texts(
        [method_options.spelled_method(request)],
        request.calibration,
        has_statistics=request.statistics is not None,
        needs_text=request.drop_least is not None,
    )
    return dataclasses.replace(request, calibration=texts)


def check_preview(request: PruneRequest) -> None:
    """Refuses a dry run of what only text decides, where the model would have to write it.

    Raises:
      RequestError: as said.
    """
    if request.allocation != "uniform" or request.drop_least is not None:
        what = "--drop-least" if request.drop_least is not None else f"--allocation {request.allocation}"
        raise RequestError(
            f"what {what} gives depends on text, and a dry run writes none; give --calibration-data TEXT"
        )


def check_request(request: PruneRequest) -> list[str]:
    """Refuses early what could only fail late."""
    formats = formats_of(request)
    gguf_options_of(request)
    check_padding(request.pad_to, formats)
    drops = request.drop_layers is not None or request.drop_least is not None
    has_width = any(getattr(request, name) is not None for name in ALL_TARGETS)
    if not (has_width or drops or request.plan):
        raise RequestError(
            "nothing says what to prune: give --expansion-ratio, --prune-percent, --width, --target-parameters or "
            "--target-bytes, with or without --drop-layers, or --drop-layers alone, or --plan"
        )
    if request.target_parameters is not None:
        parse_parameters(request.target_parameters)
    if request.target_bytes is not None:
        parse_target_bytes(request.target_bytes)
        if request.target_type not in (None, *FORMATS):
            check_file_type(str(request.target_type))
    elif request.target_type is not None:
        raise RequestError("--target-type says what files --target-bytes is of; give that too, or leave it out")
    width_rounding(request.runtime, request.multiple_of)
    if not (request.output or request.plan_out or request.dry_run or request.is_measured):
        raise RequestError("nothing to do: give --output DIR, --plan-out FILE, --evaluate or --dry-run")
    if request.plan and request.plan_out:
        raise RequestError("--plan-out would copy --plan; give one of them")
    makes_plan = (
        request.layers,
        request.multiple_of,
        request.runtime,
        request.criterion,
        request.allocation,
        request.min_keep,
        request.sequential,
    )
    statistics = request.statistics or request.statistics_out
    if request.plan and (drops or statistics or makes_plan != (None, 1, None, "ppm", "uniform", MIN_KEEP, False)):
        raise RequestError(
            "--plan decides what is kept; --criterion, --layers, --drop-layers, --drop-least, --multiple-of, "
            "--for, --allocation, --min-keep, --sequential, --statistics and --statistics-out go with making one"
        )
    if drops and not has_width and (request.layers is not None or request.multiple_of != 1 or request.runtime):
        raise RequestError(WIDTHLESS)
    if request.drop_layers is not None and request.drop_least is not None:
        raise RequestError("--drop-layers names layers and --drop-least finds them; give one of them")
    method = method_of(request)
    if drops and method.needs_text:
        raise RequestError(
            "--compensate, --sequential and --allocation measured prune the layers of one model, and --drop-layers "
            "makes it another; drop layers first, then prune what comes out"
        )
    if request.random_baseline and not request.eval_data:
        raise RequestError("--random-baseline compares perplexities; give --evaluate too")
    if request.random_baseline and drops:
        raise no_random_baseline()
    if request.dry_run and request.is_measured:
        raise RequestError("--dry-run measures nothing; leave out --evaluate and --sample")
    if request.chat_template is not None and request.sample is None and not request.calibration:
        raise RequestError(
            "--chat-template has no effect; give --sample, or --calibration-data with conversations, or leave it out"
        )
    if request.stream:
        _check_streaming(request, formats)
    check_at_least(2, eval_tokens=request.eval_tokens)
    check_at_least(1, sample_tokens=request.sample_tokens, multiple_of=request.multiple_of)
    if not 0 <= request.seed < 1 << 32:
        raise RequestError(f"--seed is {request.seed}; it must lie between 0 and {(1 << 32) - 1}")
    if request.expansion_ratio is not None:
        width_for_expansion_ratio(request.expansion_ratio, 1)
    if request.prune_percent is not None:
        width_for_percent(request.prune_percent, 1)
    return formats


def no_random_baseline() -> RequestError:
    """The refusal of --random-baseline where layers are dropped."""
    return RequestError(
        "--random-baseline masks neurons, and a mask cannot drop layers; leave it out where layers are dropped"
    )


def check_outputs(request: PruneRequest) -> None:
    """Refuses what could not be written."""
    check_options(request.push_to_hub, request.private, request.output)
    if request.dry_run:
        return
    if request.push_to_hub is not None:
        check_push(request.push_to_hub, private=request.private, overwrite=request.overwrite)
    if request.output:
        check_format(request.output, formats_of(request))
        check_target(request.output, request.overwrite)
        check_not_own_folder(request.model, request.output)
    for flag, path, load, kind in (
        ("--plan-out", request.plan_out, PruningPlan.load, "plan"),
        ("--statistics-out", request.statistics_out, Statistics.load, "statistics file"),
    ):
        if path is not None:
            _check_file_out(request, flag, path, load, kind)
    if request.plan_out and request.statistics_out and request.plan_out.resolve() == request.statistics_out.resolve():
        raise RequestError(f"--plan-out and --statistics-out both name {request.plan_out}; give each its own path")


def _check_streaming(request: PruneRequest, formats: Sequence[str]) -> None:
    """Refuses what needs all of the model in memory."""
    if request.eval_data or request.sample is not None:
        raise RequestError("--stream leaves the model in its files, where --evaluate and --sample cannot run it")
    if request.calibration:
        raise RequestError("--stream leaves the model in its files, where --calibration-data cannot run it")
    if "orbax" in formats and request.output and not request.dry_run:
        raise RequestError("--stream writes --format hf; orbax is written from the whole model in memory")
    if request.devices.mesh != "auto" or request.distributed:
        raise RequestError(
            "--stream is the work of one process, with no model in memory to divide; leave out --mesh and --distributed"
        )
    if kind := loaded_whole(request.model):
        raise RequestError(
            f"--stream reads Hugging Face folders and hub ids; {request.model} is {kind}, which is loaded whole"
        )


def _check_file_out(request: PruneRequest, flag: str, path: Path, load: Callable[[Path], Any], kind: str) -> None:
    """Refuses a file beside the output that would replace something of another kind, or land within a model."""
    file = check_file(path, request.overwrite)
    if file.is_file():  # --overwrite replaces a plan by a plan, never a model or a text
        try:
            load(file)
        except GlupruneError as error:
            raise RequestError(f"{flag} {file} is no {kind} and is not replaced; choose another path") from error
    model = Path(request.model).expanduser()
    if model.is_dir() and file.is_relative_to(model.resolve()):
        raise RequestError(f"{flag} {file} lies in the model {request.model}, which is only read; choose another path")
    if request.output and not in_store(request.output):
        output = request.output.resolve()
        if file.is_relative_to(output) or output.is_relative_to(file):
            raise RequestError(
                f"{flag} {file} and --output {output} collide; choose another path (the output has the plan as "
                f"{PLAN_FILE} anyway)"
            )


def check_mixture_request(request: PruneRequest) -> None:
    """Refuses what a mixture of experts cannot have."""
    given = {
        "--calibration-data": bool(request.calibration),
        f"--criterion {request.criterion}": is_data_driven(request.criterion),
        "--statistics": request.statistics is not None,
        "--statistics-out": request.statistics_out is not None,
        f"--compensate {request.compensate}": request.compensate != "none",
        "--sequential": request.sequential,
        "--evaluate": bool(request.eval_data),
        "--sample": request.sample is not None,
        "--random-baseline": request.random_baseline,
        "--chat-template": request.chat_template is not None,
        "--date": request.date is not None,
        "--drop-layers": request.drop_layers is not None,
        "--drop-least": request.drop_least is not None,
        "--layers": request.layers is not None,
        f"--allocation {request.allocation}": request.allocation != "uniform",
        "--min-keep": request.min_keep != MIN_KEEP,
        "--pad-to": request.pad_to != 1,
        "--target-parameters": request.target_parameters is not None,
        "--target-bytes": request.target_bytes is not None,
        "--format orbax": "orbax" in formats_of(request),
        "--no-stream": request.stream is False,
        "--mesh": request.devices.mesh != "auto",
        "--device-memory": request.devices.device_memory is not None,
        "--distributed": request.distributed,
    }
    if flags := [flag for flag, is_given in given.items() if is_given]:
        raise RequestError(
            f"{' and '.join(flags[:3])} cannot be given for {request.model}: a mixture of experts is pruned from file "
            f"to file, without running it, all experts to one width; possible are criteria of weights alone "
            f"({', '.join(WEIGHT_CRITERION_NAMES)}, random), --prune-percent, --expansion-ratio, --width, "
            f"--multiple-of, --for, --plan, and --format hf or gguf"
        )


def method_of(request: PruneRequest) -> methods.Method:
    """The method that the options spell."""
    return method_options.method_of(request, needs_statistics=request.drop_least is not None)


def gguf_options_of(request: PruneRequest) -> GGUFOptions:
    """How GGUF is written, if it is."""
    return gguf_options(formats_of(request), request.output, request.gguf_type, request.gguf_widths, request.quantize)


def formats_of(request: PruneRequest) -> list[str]:
    """The formats of the output."""
    return parse_formats(request.format, request.output)
