"""Prune the MLP neurons and the layers of a model: `python -m gluprune_jax.prune`."""

import argparse
import dataclasses
import datetime
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

import convert
from convert.calibration_text import calibration_windows
from convert.chat import fix_date, template_of
from convert.gguf.export import GGUFOptions, gguf_options, prepare_gguf
from convert.gguf.sizes import (
    FILE_TYPES,
    SHOWN,
    check_file_type,
    forecast,
    metadata_bytes,
    quantisation_warning,
    tensor_bytes,
    with_width,
)
from convert.gguf.writer import Widths, choose_widths
from convert.huggingface.mixture_config import GROUPED, one_by_one
from convert.huggingface.push import check_options, check_push, push_to_hub
from convert.model_card import model_card
from convert.output import FORMATS, check_format, check_not_own_folder, check_padding, check_target, parse_formats
from convert.sources import is_mixture_folder, loaded_whole
from convert.tokenizer import (
    beginning,
    check_ids,
    encode_prompt,
    end_of_sequence_ids,
    load_tokenizer,
    tokens_beyond,
)
from evals.perplexity import Masks, Perplexity, text_perplexity
from gluprune_jax.cli import method_options, options, terminal
from gluprune_jax.cli.processes import ProcessesRequest
from gluprune_jax.cli.report import FORMAT_NAMES, changes, mixture_changes, show, show_plan
from gluprune_jax.data.documents import contents, evaluation_text, read_documents
from gluprune_jax.errors import GlupruneError, RequestError, check_at_least, spelled
from gluprune_jax.files.atomic import check_file
from gluprune_jax.files.object_store import Folder, in_store
from gluprune_jax.inference.generation import generate
from gluprune_jax.memory.mesh_choice import MeshRequest, mesh_chooser
from gluprune_jax.memory.plan import Evaluation, Pruning
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.models.parameters import parameters_of
from gluprune_jax.parallel.distributed import check_same, is_main, synchronize_errors
from gluprune_jax.pruning import methods
from gluprune_jax.pruning.allocation import MIN_KEEP
from gluprune_jax.pruning.budget import (
    ALL_TARGETS,
    check_budget_allowed,
    parse_parameters,
    parse_target_bytes,
    target_within,
)
from gluprune_jax.pruning.criteria import WEIGHT_CRITERIA, find_criterion
from gluprune_jax.pruning.plan import PruningPlan, check_targets, make_plan
from gluprune_jax.pruning.scores import (
    Scores,
    fingerprint,
    is_data_driven,
    mixture_fingerprint,
    score_mixture,
    select_neurons,
)
from gluprune_jax.pruning.statistics import Statistics
from gluprune_jax.pruning.targets import (
    TARGETS,
    WIDTHLESS,
    parse_layers,
    width_for_expansion_ratio,
    width_for_percent,
    width_rounding,
)

PLAN_FILE = "gluprune_plan.json"
_PROMPT_TOKENS = 1024  # that memory is planned for

DESCRIPTION = """\
Removes the least important neurons of the gated MLP layers of a language model (arXiv 2512.22671), whole decoder
layers, or both, and writes a smaller checkpoint that stock transformers loads. Where the model need not run
(--evaluate, --sample, --calibration-data) and one device does the work, the weights of a Hugging Face folder or hub id
go from file to file, a few tensors at a time, whatever the model's size. Mixtures of experts (Qwen3-MoE, OLMoE,
Mixtral) are pruned in this way alone, each expert by itself, all to one width.

examples:
  gluprune prune --model demo --expansion-ratio 2.4 --output smollm2-2.4x
  gluprune prune --model meta-llama/Llama-3.2-1B --prune-percent 40 --output llama-1b-p40
  gluprune prune --model llama-1b --prune-percent 20 --criterion hybrid --compensate least-squares \\
      --calibration-data corpus.txt --evaluate --output llama-1b-p20
  gluprune prune --model llama-1b --width 4096 --dry-run
  gluprune prune --model llama-1b --drop-layers 11-13 --output llama-1b-13-layers
  gluprune prune --model llama-1b --expansion-ratio 2.4 --plan-out plan.json
  gluprune prune --model llama-1b --plan plan.json --output llama-1b-2.4x
"""
START = "python -m gluprune_jax.prune"


@dataclasses.dataclass(frozen=True)
class PruneRequest:
    """What is to be pruned, how, and what is measured and written; the fields are options of the same names."""

    model: str
    revision: str | None
    dtype: str | None
    stream: bool | None
    expansion_ratio: str | None
    prune_percent: float | None
    width: int | None
    target_parameters: str | None
    target_bytes: str | None
    target_type: str | None
    plan: Path | None
    drop_layers: str | None
    drop_least: int | None
    criterion: str
    multiple_of: int
    runtime: str | None
    layers: str | None
    allocation: str
    min_keep: float
    compensate: str
    sequential: bool
    calibration: tuple[str, ...]
    calibration_tokens: int
    sequence_length: int
    chat_template: str | None
    date: datetime.date | None
    statistics: Path | None
    statistics_out: Path | None
    output: Folder | None
    format: str | None
    gguf_type: str | None
    gguf_widths: Widths | None
    quantize: str | None
    pad_to: int
    push_to_hub: str | None
    private: bool
    plan_out: Path | None
    overwrite: bool
    dry_run: bool
    json: bool
    eval_data: tuple[str, ...]
    eval_tokens: int
    random_baseline: bool
    seed: int
    sample: str | None
    sample_tokens: int
    devices: MeshRequest
    distributed: bool

    @property
    def is_measured(self) -> bool:
        """Whether the model runs before and after."""
        return bool(self.eval_data) or self.sample is not None


def parser(start: str = START) -> terminal.ArgumentParser:
    """The command line; `start` is what it begins with."""
    parser = terminal.ArgumentParser(start, DESCRIPTION)
    options.add_model(parser)
    parser.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="process from file to file with a few tensors in memory, or refuse; --no-stream loads the whole model; "
        "both give the same bits (default: streamed wherever possible)",
    )

    keep = parser.add_argument_group("how much to keep (one of these; --drop-layers beside a width or by itself)")
    target = keep.add_mutually_exclusive_group()
    for flag in ("--expansion-ratio", "--prune-percent", "--width"):
        options.add(target, flag, about="; prune takes one")
    options.add(target, "--target-parameters")
    options.add(target, "--target-bytes")
    options.add(target, "--plan", about="keep what this saved plan keeps")
    options.add(keep, "--target-type")
    keep.add_argument(
        "--drop-layers",
        metavar="LIST",
        help="remove these layers whole, attention and MLP, such as 20-22,-1 (write --drop-layers=-1,0 if a minus "
        "leads); a width is then that of the layers that stay",
    )
    keep.add_argument(
        "--drop-least",
        type=int,
        metavar="N",
        help="drop the N layers with the lowest block influence, 1 - cosine(input, output), on the calibration text",
    )

    method_options.add_arguments(parser)

    output = parser.add_argument_group("what to write")
    options.add(
        output, "--output", about="folder for the pruned checkpoint; of Orbax also gs://..., of GGUF also FILE.gguf"
    )
    for flag in ("--format", "--gguf-type", "--gguf-widths", "--quantize", "--pad-to", "--push-to-hub", "--private"):
        options.add(output, flag)
    output.add_argument("--plan-out", type=Path, metavar="FILE", help="save the plan")
    options.add(output, "--overwrite", about="what is at DIR and FILE")
    options.add(output, "--dry-run")
    options.add(output, "--json")

    options.add_devices(parser, "one model over all devices, or to measure as many replicas as fit")
    measure = parser.add_argument_group("what to measure, before and after")
    options.add_evaluation(measure, "of the dense and of the pruned model", " in all")
    measure.add_argument(
        "--random-baseline", action="store_true", help="also the perplexity with as many neurons removed at random"
    )
    options.add(measure, "--seed", about="the random baseline, and of criteria that draw random numbers")
    options.add(measure, "--sample")
    options.add(measure, "--sample-tokens")
    options.add(measure, "--date")
    options.add(parser, "--debug")
    return parser


def main(argv: Sequence[str] | None = None, *, start: str = START) -> int:
    """Runs the command line, which begins with `start`, and returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser(start).parse_args(argv)
    command = shlex.join([*start.split(), *argv])
    return terminal.run(
        "gluprune",
        lambda: _prune(_request(args), command),
        debug=args.debug,
        processes=options.request(ProcessesRequest, args),
        flags=parser().flags,
        kept=lambda: f"nothing is left half written; to start again:\n  {command}",
    )


def _request(args: argparse.Namespace) -> PruneRequest:
    """What the options ask for.

    Raises:
      RequestError: several sizes.
    """
    sizes = {}
    for name in TARGETS:
        values = getattr(args, name) or (None,)
        if len(values) > 1:
            raise RequestError(
                f"`{name}` has {len(values)} values; prune takes one, and compare and sweep take several"
            )
        (sizes[name],) = values
    return options.request(
        PruneRequest, args, **sizes, eval_data=options.eval_data(args), devices=options.mesh_request(args)
    )


def _prune(request: PruneRequest, command: str) -> None:
    if is_mixture_folder(request.model):  # before what an option lacks is said: no mixture can have it
        _check_mixture_request(request)
    formats = _check_request(request)
    with synchronize_errors():
        if is_main():
            _check_outputs(request)
        mixture = convert.open_mixture(request.model, dtype=request.dtype, revision=request.revision)
    if mixture is not None:
        _check_mixture_request(request)
        _prune_mixture(request, mixture, command)
        return
    with synchronize_errors():
        texts = [(name, evaluation_text(name, terminal.note)) for name in request.eval_data]
        documents = read_documents(request.calibration, "--calibration-data", terminal.note)
        statistics = None if request.statistics is None else Statistics.load(request.statistics)
        plan = None if request.plan is None else PruningPlan.load(request.plan)
        if plan is not None and plan.dropped_layers and request.random_baseline:
            raise _no_random_baseline()
        memory = _plan_memory(request) if request.dry_run else None
    check_same(f"--plan {request.plan}", [] if plan is None else [plan.to_json().encode()])
    check_same(f"--statistics {request.statistics}", [] if statistics is None else statistics.parts())
    check_same("the texts of --eval-data", (text.encode() for _, text in texts))
    check_same("the texts of --calibration-data", contents(documents))
    clock = _Clock()
    with terminal.byte_progress() as progress:
        checkpoint = convert.load(
            request.model,
            dtype=request.dtype,
            revision=request.revision,
            stream=(request.dry_run and not request.calibration) or _streams(request),
            mesh=mesh_chooser(MeshRequest() if request.dry_run else request.devices, [_use_in_memory(request)]),
            progress=progress,
        )
    model, dense = checkpoint.model, checkpoint.config
    if not request.json:
        for note in checkpoint.notes:
            terminal.note(note)
    gguf = _gguf_options(request)
    if "gguf" in formats:  # what cannot be written is said before any work is done
        prepare_gguf(checkpoint, gguf)
    clock.lap("load")

    has_chats = any(document.kind == "chat" for document in documents)
    with synchronize_errors():
        tokenizer = load_tokenizer(checkpoint, request.chat_template) if request.is_measured or documents else None
        if tokenizer is not None and (beyond := tokens_beyond(tokenizer, dense.vocab_size)):
            terminal.note(beyond)
        applies = tokenizer is not None and (has_chats or (request.sample is not None and template_of(tokenizer)))
    recorded = _recorded_dates(request, plan, statistics)
    date = fix_date(tokenizer if applies else None, request.date, recorded, terminal.note)
    with synchronize_errors():
        windows = None
        if documents:
            windows = calibration_windows(
                checkpoint,
                documents,
                tokens=request.calibration_tokens,
                sequence_length=request.sequence_length,
                chat_template=request.chat_template,
                date=date,
            )
    chooser = methods.Chooser(
        model,
        checkpoint.mlp_weights,
        windows=windows,
        names=request.calibration,
        date=date if has_chats else None,
        statistics=statistics,
        refits=request.compensate != "none" and not request.sequential,
        progress=terminal.count_progress,
    )
    collected = None
    if plan is None:
        pruned = _choose(request, checkpoint, chooser)
        # All compute it together, while the dense model is there: slicing takes it apart.
        collected = chooser.statistics() if request.statistics_out and not request.dry_run else None
    else:
        plan.check_fits(dense)
        with terminal.count_progress("checking the plan", dense.num_hidden_layers, "layers") as progress:
            weights = checkpoint.mlp_weights()
            plan.check_fits(dense, fingerprint(model, weights=weights, on_layer=lambda i: progress(i + 1)))
        if plan.is_compensated and request.compensate == "none":
            raise RequestError(
                f"--plan {request.plan} was made with refitted down projections, which it does not hold; refit them "
                f"again with --compensate {plan.request['compensate']} and --calibration-data TEXT"
            )
        pruned = chooser.compensated([plan])[0] if request.compensate != "none" else methods.Pruned(plan)
    plan = pruned.plan
    report = {"model": request.model, "formats": formats, **changes(model, plan, request.pad_to), **pruned.record()}
    _forecast(request, report, checkpoint, plan)
    if memory:
        report["memory"] = memory
    clock.lap("score")
    if (request.output or request.is_measured) and not request.dry_run:
        measure = _Measurements(request, checkpoint, texts, date) if request.is_measured else None
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
        known = [key for key in formats if key in report["after"]["file_bytes"]]
        sizes = {FORMAT_NAMES[key]: _before_and_after(report, "file_bytes", key) for key in known}
        sizes |= {f"GGUF {key}, forecast": _before_and_after(report, "gguf_bytes", key) for key in SHOWN}
        card = model_card(checkpoint, dense, report.get("evaluation"), command, sizes=sizes, pad_to=request.pad_to)
        with terminal.byte_progress() as progress:
            notes = convert.save(
                checkpoint,
                request.output,
                formats=formats,
                overwrite=request.overwrite,
                extra_files={"README.md": card, PLAN_FILE: plan.to_json()},
                gguf=gguf,
                pad_to=request.pad_to,
                progress=progress,
            )
        if notes:
            report["notes"] = list(notes)
        if not request.json:
            for note in notes:
                terminal.note(note)
        clock.lap("save")
        report["output"] = str(request.output)
        _push(request, report)
    if request.plan_out and not request.dry_run:
        with synchronize_errors():
            if is_main():
                plan.save(request.plan_out, overwrite=request.overwrite)
        report["plan_out"] = str(request.plan_out)
    if request.statistics_out and not request.dry_run:
        assert collected is not None  # there is calibration text
        with synchronize_errors():
            if is_main():
                collected.save(request.statistics_out, overwrite=request.overwrite)
        report["statistics_out"] = str(request.statistics_out)
    report["seconds"] = clock.seconds
    if request.json:
        print(json.dumps(report, indent=1))
    else:
        show(report, terminal.console())


def _prune_mixture(request: PruneRequest, checkpoint: convert.MixtureCheckpoint, command: str) -> None:
    """Prunes a mixture of experts, which stays in its files."""
    clock, sizes, count = _Clock(), checkpoint.sizes, len(checkpoint.sizes.mlp_sizes)
    if not request.json:
        for note in checkpoint.notes:
            terminal.note(note)
    if request.plan is None:
        check_targets(sizes, [_mixture_target(request)])
        with terminal.count_progress("scoring neurons", count, "MLPs") as progress:
            scores = score_mixture(
                checkpoint.mlp_weights(),
                sizes,
                request.criterion,
                seed=request.seed,
                on_mlp=lambda i: progress(i + 1),
            )
        plan = make_plan(scores, **_mixture_target(request))
    else:
        plan = PruningPlan.load(request.plan)
        plan.check_fits(sizes)
        with terminal.count_progress("checking the plan", count, "MLPs") as progress:
            found = mixture_fingerprint(checkpoint.mlp_weights(), sizes, on_mlp=lambda i: progress(i + 1))
        plan.check_fits(sizes, found)
    clock.lap("score")
    pruned = checkpoint.pruned(plan)
    if not request.json and (slower := one_by_one(pruned.sizes)):
        terminal.note(f"{slower}; --multiple-of {GROUPED} gives a width that needs no such thing")
    num_bytes = {"before": checkpoint.num_bytes, "after": pruned.num_bytes}
    report = {"model": request.model, "formats": ["hf"], **mixture_changes(sizes, num_bytes, plan)}
    if request.output and not request.dry_run:
        written = {FORMAT_NAMES["hf"]: (num_bytes["before"], num_bytes["after"])}
        card = model_card(pruned, sizes, None, command, sizes=written)
        with terminal.byte_progress() as bytes_done:
            convert.save(
                pruned,
                request.output,
                overwrite=request.overwrite,
                extra_files={"README.md": card, PLAN_FILE: plan.to_json()},
                progress=bytes_done,
            )
        clock.lap("save")
        report["output"] = str(request.output)
        _push(request, report)
    if request.plan_out and not request.dry_run:
        plan.save(request.plan_out, overwrite=request.overwrite)
        report["plan_out"] = str(request.plan_out)
    report["seconds"] = clock.seconds
    if request.json:
        print(json.dumps(report, indent=1))
    else:
        show(report, terminal.console())


def _forecast(request: PruneRequest, report: dict[str, Any], checkpoint: convert.Checkpoint, plan: PruningPlan) -> None:
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
    if warning := quantisation_warning(before, after, widths["after"], max(widths["before"])):
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


def _push(request: PruneRequest, report: dict[str, Any]) -> None:
    """Uploads what was written, where that is asked for."""
    if request.push_to_hub is None:
        return
    with synchronize_errors():
        if is_main():
            push_to_hub(
                Path(str(request.output)), request.push_to_hub, private=request.private, overwrite=request.overwrite
            )
    report["pushed_to"] = request.push_to_hub


def _before_and_after(report: dict[str, Any], key: str, name: str) -> tuple[int, int]:
    return report["before"][key][name], report["after"][key][name]


def _mixture_target(request: PruneRequest) -> dict[str, Any]:
    target = {name: value for name in TARGETS if (value := getattr(request, name)) is not None}
    return target | width_rounding(request.runtime, request.multiple_of)


def _check_mixture_request(request: PruneRequest) -> None:
    """Refuses what a mixture of experts cannot have."""
    _, criterion = find_criterion(request.criterion)
    given = {
        "--calibration-data": bool(request.calibration),
        f"--criterion {request.criterion}": is_data_driven(criterion),
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
        **{f"--format {name}": name in _formats(request) for name in FORMATS if name != "hf"},
        "--no-stream": request.stream is False,
        "--mesh": request.devices.mesh != "auto",
        "--device-memory": request.devices.device_memory is not None,
        "--distributed": request.distributed,
    }
    if flags := [flag for flag, is_given in given.items() if is_given]:
        raise RequestError(
            f"{' and '.join(flags[:3])} cannot be given for {request.model}: a mixture of experts is pruned from file "
            f"to file, without running it, all experts to one width; possible are criteria of weights alone "
            f"({', '.join(WEIGHT_CRITERIA)}, random), --prune-percent, --expansion-ratio, --width, --multiple-of, "
            f"--for, --plan, and --format hf"
        )


def _gguf_options(request: PruneRequest) -> GGUFOptions:
    return gguf_options(_formats(request), request.output, request.gguf_type, request.gguf_widths, request.quantize)


def _formats(request: PruneRequest) -> list[str]:
    return parse_formats(request.format, request.output)


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
    return "orbax" not in _formats(request) or jax.device_count() == 1


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
    return Pruning(
        calibration=request.calibration_tokens,
        window=request.sequence_length,
        is_compensated=request.compensate != "none",
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


class _Clock:
    """Seconds spent in each named part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part] = round(self.seconds.get(part, 0) + now - self._last, 3)
        self._last = now


def _check_request(request: PruneRequest) -> list[str]:
    """Refuses early what could only fail late."""
    formats = _formats(request)
    _gguf_options(request)
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
        check_budget_allowed(request.allocation, True)
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
    method = _method(request)
    if drops and method.needs_text:
        raise RequestError(
            "--compensate, --sequential and --allocation measured prune the layers of one model, and --drop-layers "
            "makes it another; drop layers first, then prune what comes out"
        )
    if request.random_baseline and not request.eval_data:
        raise RequestError("--random-baseline compares perplexities; give --evaluate too")
    if request.random_baseline and drops:
        raise _no_random_baseline()
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


def _no_random_baseline() -> RequestError:
    return RequestError(
        "--random-baseline masks neurons, and a mask cannot drop layers; leave it out where layers are dropped"
    )


def _check_outputs(request: PruneRequest) -> None:
    """Refuses what could not be written."""
    check_options(request.push_to_hub, request.private, request.output)
    if request.dry_run:
        return
    if request.push_to_hub is not None:
        check_push(request.push_to_hub, private=request.private, overwrite=request.overwrite)
    if request.output:
        check_format(request.output, _formats(request))
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


def _method(request: PruneRequest) -> methods.Method:
    return method_options.method_of(request, needs_statistics=request.drop_least is not None)


def _choose(request: PruneRequest, checkpoint: convert.Checkpoint, chooser: methods.Chooser) -> methods.Pruned:
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
    (pruned,) = chooser.choose(_method(request), [{**target, **rounding}])
    return pruned


def _target_within(
    request: PruneRequest, checkpoint: convert.Checkpoint, multiple_of: int, others: dict[str, Any]
) -> dict[str, Any]:
    """The width that --target-parameters or --target-bytes means, if one of them is given; `others` names layers."""
    if request.target_parameters is None and request.target_bytes is None:
        return {}
    layers, dropped = others.get("layers"), others.get("drop_layers", ())
    if count := others.get("drop_least", 0):  # which layers go does not matter here, only how many
        free = [i for i in range(checkpoint.config.num_hidden_layers) if i not in (layers or ())]
        dropped = free[-count:]
    return target_within(
        checkpoint.config,
        target_parameters=request.target_parameters,
        target_bytes=request.target_bytes,
        file_size=checkpoint.file_size(request.target_type or "hf", request.pad_to),
        multiple_of=multiple_of,
        pad_to=request.pad_to,
        layers=layers,
        drop_layers=dropped,
    )


class _Measurements:
    """Perplexities and sample answers of one model at its stages."""

    def __init__(
        self,
        request: PruneRequest,
        checkpoint: convert.Checkpoint,
        texts: Sequence[tuple[str, str]],
        date: datetime.date | None,
    ) -> None:
        self._request, self._date = request, date
        self._tokenizer = load_tokenizer(checkpoint, request.chat_template)
        self._eos = end_of_sequence_ids(checkpoint)
        self._perplexity: dict[str, Perplexity] = {}
        self._answers: dict[str, str] = {}
        self._meter = text_perplexity(
            self._tokenizer,
            texts,
            vocab_size=checkpoint.config.vocab_size,
            eval_tokens=request.eval_tokens,
            sequence_length=request.sequence_length,
            begin=beginning(checkpoint, self._tokenizer),
            note=terminal.note,
            progress=terminal.count_progress,
        )

    def take(self, stage: str, model: Decoder, masks: Masks = None) -> None:
        self._take_perplexity(stage, model, masks)
        if self._request.sample is not None:
            prompt, steps = (
                encode_prompt(self._tokenizer, self._request.sample, self._date),
                self._request.sample_tokens,
            )
            check_ids(self._tokenizer, prompt, model.config.vocab_size)
            with terminal.count_progress(f"sample answer ({stage})", steps, "tokens") as progress:
                (answer,) = generate(model, [prompt], max_new_tokens=steps, eos_ids=self._eos, on_tokens=progress)
            self._answers[stage] = self._tokenizer.decode(answer, skip_special_tokens=True)

    def take_random(self, model: Decoder, plan: PruningPlan, random: Scores) -> None:
        """The perplexity with as many neurons of each layer masked as the plan removes, chosen at random."""
        kept = tuple(select_neurons(v, width) for v, width in zip(random.values, plan.widths, strict=True))
        masks = dataclasses.replace(plan, kept=kept).masks(model.config)
        self._take_perplexity(f"random neurons (seed {self._request.seed})", model, masks)

    def _take_perplexity(self, stage: str, model: Decoder, masks: Masks) -> None:
        if not self._request.eval_data:
            return
        self._perplexity[stage] = self._meter(model, stage, masks)

    def report(self) -> dict[str, Any]:
        """What was measured, by stage."""
        report: dict[str, Any] = {}
        if self._perplexity:
            report["evaluation"] = {
                "definition": next(iter(self._perplexity.values())).definition,
                "perplexity": {stage: result.value for stage, result in self._perplexity.items()},
            }
        if self._answers:
            date = {} if self._date is None else {"date": self._date.isoformat()}
            report["sample"] = {"prompt": self._request.sample, **date, "answers": self._answers}
        return report


if __name__ == "__main__":
    sys.exit(main())
