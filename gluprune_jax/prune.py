"""Prune the MLP neurons and the layers of a Llama-family model: `python -m gluprune_jax.prune`."""

import argparse
import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray
from rich.console import Console

import convert
from convert.model_card import model_card
from convert.store import (
    DTYPE_NAMES,
    FORMATS,
    MODEL_HELP,
    loaded_whole,
    parse_formats,
    refuse_format,
    refuse_own_folder,
)
from convert.tokenizer import encode_prompt, encode_text, end_of_sequence_ids, load_tokenizer
from evals.perplexity import Perplexity, perplexity
from gluprune_jax import devices, method_options, methods, terminal
from gluprune_jax.activation_statistics import Statistics
from gluprune_jax.allocation import FLOOR
from gluprune_jax.atomic import check_file, check_target
from gluprune_jax.distributed import check_same, failing_together, is_main
from gluprune_jax.documents import DATA_HELP, evaluation_text, read_documents
from gluprune_jax.errors import GlupruneError, RequestError
from gluprune_jax.generation import generate
from gluprune_jax.importance import Scores, fingerprint, select_neurons
from gluprune_jax.memory import Evaluation, Pruning, show_plan
from gluprune_jax.model import Llama
from gluprune_jax.object_store import folder_at, in_store
from gluprune_jax.plan import (
    WIDTHLESS,
    PruningPlan,
    parse_layers,
    width_for_expansion_ratio,
    width_for_percent,
)
from gluprune_jax.report import changes, show

PLAN_FILE = "gluprune_plan.json"
_PROMPT_TOKENS = 1024  # that memory is planned for

Masks = tuple[NDArray[np.float32], ...] | None

DESCRIPTION = """\
Removes the least important neurons of the gated MLP layers of a Llama-family model (arXiv 2512.22671), whole decoder
layers, or both, and writes a smaller checkpoint that stock transformers loads. Where the model need not run
(--evaluate, --sample, --calibration) and one device does the work, the weights of a Hugging Face folder or hub id go
from file to file, a few tensors at a time, whatever the model's size.

examples:
  python -m gluprune_jax.prune --model demo --expansion-ratio 2.4 --output smollm2-2.4x
  python -m gluprune_jax.prune --model meta-llama/Llama-3.2-1B --prune-percent 40 --output llama-1b-p40
  python -m gluprune_jax.prune --model llama-1b --width 4096 --dry-run
  python -m gluprune_jax.prune --model llama-1b --drop-layers 11-13 --output llama-1b-13-layers
  python -m gluprune_jax.prune --model llama-1b --expansion-ratio 2.4 --plan-out plan.json
  python -m gluprune_jax.prune --model llama-1b --plan plan.json --output llama-1b-2.4x
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = terminal.ArgumentParser("python -m gluprune_jax.prune", DESCRIPTION)
    parser.add_argument("--model", required=True, metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    parser.add_argument(
        "--dtype", choices=DTYPE_NAMES, help="cast all weights as they are read (otherwise each stays as it is stored)"
    )
    parser.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="from file to file with a few tensors in memory, or refuse; --no-stream loads the whole model; both give "
        "the same bits (otherwise streamed wherever it can be)",
    )

    keep = parser.add_argument_group("how much to keep (one of these; --drop-layers beside a width or by itself)")
    target = keep.add_mutually_exclusive_group()
    target.add_argument(
        "--expansion-ratio", metavar="R", help="intermediate size over hidden size: keep ceil(R x hidden size)"
    )
    target.add_argument(
        "--prune-percent", type=float, metavar="P", help="remove int(P %% of the neurons) of each layer"
    )
    target.add_argument("--width", type=int, metavar="N", help="keep N neurons in each layer")
    target.add_argument("--plan", type=Path, metavar="FILE", help="keep what this saved plan keeps")
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
        help="remove the N layers that turn their input least on the calibration text: 1 - cos(input, output)",
    )

    method_options.add_arguments(parser)

    output = parser.add_argument_group("what to write")
    output.add_argument(
        "--output", type=folder_at, metavar="DIR", help="folder for the pruned checkpoint; of Orbax also gs://..."
    )
    output.add_argument(
        "--format",
        default="hf",
        metavar="LIST",
        help=f"{' and/or '.join(FORMATS)}, comma-separated; orbax goes to DIR/orbax",
    )
    output.add_argument("--plan-out", type=Path, metavar="FILE", help="save the plan")
    output.add_argument("--overwrite", action="store_true", help="replace what is at DIR and FILE")
    output.add_argument("--dry-run", action="store_true", help="show what would change and write nothing")
    output.add_argument("--json", action="store_true", help="print one JSON document instead of tables")

    devices.add_arguments(parser, "one model over all devices, or to measure as many replicas as fit")
    measure = parser.add_argument_group("what to measure, before and after")
    measure.add_argument(
        "--evaluate",
        nargs="+",
        metavar="TEXT",
        help=f"token perplexity on these: {DATA_HELP}",
    )
    measure.add_argument("--evaluate-tokens", type=int, default=8192, metavar="N", help="tokens of the texts to use")
    measure.add_argument("--window", type=int, default=512, metavar="N", help="tokens a perplexity window holds")
    measure.add_argument(
        "--random-baseline", action="store_true", help="also the perplexity with as many neurons removed at random"
    )
    measure.add_argument(
        "--seed", type=int, default=0, help="of the random baseline, and of criteria that draw random numbers"
    )
    measure.add_argument("--sample", metavar="PROMPT", help="greedy answer, in the chat template if the model has one")
    measure.add_argument("--sample-tokens", type=int, default=64, metavar="N", help="most tokens of the answer")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    command = shlex.join(["python", "-m", "gluprune_jax.prune", *argv])
    return terminal.run("gluprune", lambda: _prune(args, command), debug=args.debug, processes=args)


def _prune(args: argparse.Namespace, command: str) -> None:
    formats = _check_request(args)
    measuring = bool(args.evaluate) or args.sample is not None
    with failing_together():
        if is_main():
            _check_outputs(args)
        texts = [evaluation_text(name) for name in args.evaluate or ()]
        documents = [document for name in args.calibration or () for document in read_documents(name, "--calibration")]
        statistics = None if args.statistics is None else Statistics.load(args.statistics)
        plan = None if args.plan is None else PruningPlan.load(args.plan)
        if plan is not None and plan.dropped_layers and args.random_baseline:
            raise _no_random_baseline()
        memory = _plan_memory(args) if args.dry_run else None
    check_same(f"--plan {args.plan}", [] if plan is None else [plan.to_json().encode()])
    check_same(f"--statistics {args.statistics}", [] if statistics is None else statistics.parts())
    check_same("the texts of --evaluate", (text.encode() for text in texts))
    check_same("the texts of --calibration", (json.dumps(document).encode() for document in documents))
    clock = _Clock()
    with terminal.byte_progress() as progress:
        checkpoint = convert.load(
            args.model,
            dtype=args.dtype,
            revision=args.revision,
            stream=(args.dry_run and not args.calibration) or _streams(args),
            mesh=devices.chooses(_devices_there(args) if args.dry_run else args, [_use_in_memory(args)]),
            progress=progress,
        )
    model, dense = checkpoint.model, checkpoint.config
    if not args.json:
        for note in checkpoint.notes:
            terminal.stderr().print(f"note: {note}", style="dim", markup=False)
    clock.lap("load")

    with failing_together():
        windows = method_options.calibration_windows(checkpoint, documents, args) if documents else None
    chooser = methods.Chooser(
        model,
        checkpoint.mlp_weights,
        windows=windows,
        names=args.calibration or (),
        statistics=statistics,
        refits=args.compensate != "none" and not args.in_order,
    )
    collected = None
    if plan is None:
        pruned = _choose(args, checkpoint, chooser)
        # All compute it together, while the dense model is there: slicing takes it apart.
        collected = chooser.statistics() if args.statistics_out and not args.dry_run else None
    else:
        plan.check_fits(dense)
        with terminal.count_progress("checking the plan", dense.num_hidden_layers, "layers") as progress:
            weights = checkpoint.mlp_weights()
            plan.check_fits(dense, fingerprint(model, weights=weights, on_layer=lambda i: progress(i + 1)))
        pruned = chooser.compensated([plan])[0] if args.compensate != "none" else methods.Pruned(plan)
    plan = pruned.plan
    report = {"model": args.model, **changes(model, plan), **pruned.record()}
    if memory:
        report["memory"] = memory
    clock.lap("score")
    if args.output and not args.dry_run:
        measure = _Measurements(args, checkpoint, texts) if measuring else None
        if measure:
            measure.take("dense", model)
            if args.random_baseline:
                measure.take_random(model, plan, chooser.scores("random", args.seed))
            clock.lap("measure")
        if pruned.compensation is not None:
            checkpoint = dataclasses.replace(checkpoint, model=pruned.apply(model))
        checkpoint = checkpoint.pruned(plan, donate=True)
        if pruned.compensation is not None:
            *earlier, last = checkpoint.history
            checkpoint = dataclasses.replace(checkpoint, history=(*earlier, {**last, **pruned.record()}))
        clock.lap("slice")
        if measure:
            measure.take("pruned", checkpoint.model)
            report |= measure.report()
            clock.lap("measure")
        card = model_card(checkpoint, dense, report.get("evaluation"), command)
        with terminal.byte_progress() as progress:
            convert.save(
                checkpoint,
                args.output,
                formats=formats,
                overwrite=args.overwrite,
                extra_files={"README.md": card, PLAN_FILE: plan.to_json()},
                progress=progress,
            )
        clock.lap("save")
        report |= {"output": str(args.output), "formats": formats}
    if args.plan_out and not args.dry_run:
        with failing_together():
            if is_main():
                plan.save(args.plan_out, overwrite=args.overwrite)
        report["plan_out"] = str(args.plan_out)
    if args.statistics_out and not args.dry_run:
        assert collected is not None  # there is calibration text
        with failing_together():
            if is_main():
                collected.save(args.statistics_out, overwrite=args.overwrite)
        report["statistics_out"] = str(args.statistics_out)
    report["seconds"] = clock.seconds
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        show(report, _console())


def _streams(args: argparse.Namespace) -> bool:
    """Whether the weights may stay in their files: nothing asks for the model in the memory of certain devices."""
    if args.stream is not None:
        return bool(args.stream)
    if loaded_whole(args.model):
        return False
    if args.evaluate or args.sample is not None or args.calibration or args.mesh != "auto" or args.distributed:
        return False
    # Orbax is written from the pruned model in memory, which several devices hold better together.
    return "orbax" not in parse_formats(args.format) or jax.device_count() == 1


def _use_in_memory(args: argparse.Namespace) -> Evaluation | Pruning:
    """What the devices need memory for, where the model is loaded."""
    if not args.evaluate and args.sample is None:
        return _pruning(args)
    decoded = 0 if args.sample is None else _PROMPT_TOKENS + args.sample_tokens
    on_cpu = args.device_memory is None and jax.default_backend() == "cpu"
    return Evaluation(cached=max(args.window, decoded), decoded=decoded, slots=1, on_cpu=on_cpu)


def _pruning(args: argparse.Namespace) -> Pruning:
    if not args.calibration:
        return Pruning(stream=_streams(args))
    return Pruning(
        calibration=args.calibration_tokens,
        window=args.calibration_window,
        is_compensated=args.compensate != "none",
    )


def _plan_memory(args: argparse.Namespace) -> dict[str, Any]:
    """Shows what the model will take of each device, before any of it is loaded."""
    model = convert.describe(args.model, dtype=args.dtype, revision=args.revision)
    size = devices.capacity(args)
    plan = devices.plan(args, model, [_pruning(args)], size)  # a dry run measures nothing
    if not args.json:
        show_plan(plan, size, _console())
    devices.check(args, model, plan, size)
    return plan.summary(size)


def _devices_there(args: argparse.Namespace) -> argparse.Namespace:
    """The options for the devices that there are: a dry run may plan for others, but scores on these."""
    return argparse.Namespace(**vars(args) | {"mesh": "auto", "device_memory": None})


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True, emoji=False)


class _Clock:
    """Seconds spent in each named part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part] = round(self.seconds.get(part, 0) + now - self._last, 3)
        self._last = now


def _check_request(args: argparse.Namespace) -> list[str]:
    """Refuses early what could only fail late."""
    formats = parse_formats(args.format)
    drops = args.drop_layers is not None or args.drop_least is not None
    has_width = any(target is not None for target in (args.expansion_ratio, args.prune_percent, args.width))
    if not (has_width or drops or args.plan):
        raise RequestError(
            "nothing says what to prune: give --expansion-ratio, --prune-percent or --width, with or without "
            "--drop-layers, or --drop-layers alone, or --plan"
        )
    if not (args.output or args.plan_out or args.dry_run):
        raise RequestError("nothing to do: give --output DIR, --plan-out FILE or --dry-run")
    if args.plan and args.plan_out:
        raise RequestError("--plan-out would copy --plan; give one of them")
    makes_plan = (args.layers, args.multiple_of, args.criterion, args.allocation, args.floor, args.in_order)
    statistics = args.statistics or args.statistics_out
    if args.plan and (drops or statistics or makes_plan != (None, 1, "ppm", "uniform", FLOOR, False)):
        raise RequestError(
            "--plan decides what is kept; --criterion, --layers, --drop-layers, --drop-least, --multiple-of, "
            "--allocation, --floor, --in-order, --statistics and --statistics-out go with making one"
        )
    if drops and not has_width and (args.layers is not None or args.multiple_of != 1):
        raise RequestError(WIDTHLESS)
    if args.drop_layers is not None and args.drop_least is not None:
        raise RequestError("--drop-layers names layers and --drop-least finds them; give one of them")
    method = _method(args)
    if drops and method.needs_text:
        raise RequestError(
            "--compensate, --in-order and --allocation measured prune the layers of one model, and --drop-layers makes "
            "it another; drop layers first, then prune what comes out"
        )
    if args.random_baseline and not args.evaluate:
        raise RequestError("--random-baseline compares perplexities; give --evaluate too")
    if args.random_baseline and drops:
        raise _no_random_baseline()
    measuring = args.evaluate or args.sample is not None
    if measuring and not args.output:
        raise RequestError("--evaluate and --sample compare the model with the pruned one; give --output too")
    if args.dry_run and measuring:
        raise RequestError("--dry-run measures nothing; leave out --evaluate and --sample")
    if args.stream:
        _check_streaming(args, formats)
    for flag, least in (("evaluate_tokens", 2), ("window", 2), ("sample_tokens", 1), ("multiple_of", 1)):
        if getattr(args, flag) < least:
            raise RequestError(f"--{flag.replace('_', '-')} is {getattr(args, flag)}; it must be at least {least}")
    if not 0 <= args.seed < 1 << 32:
        raise RequestError(f"--seed is {args.seed}; it must lie between 0 and {(1 << 32) - 1}")
    if args.expansion_ratio is not None:
        width_for_expansion_ratio(args.expansion_ratio, 1)
    if args.prune_percent is not None:
        width_for_percent(args.prune_percent, 1)
    return formats


def _no_random_baseline() -> RequestError:
    return RequestError(
        "--random-baseline masks neurons, and a mask cannot drop layers; leave it out where layers are dropped"
    )


def _check_outputs(args: argparse.Namespace) -> None:
    """Refuses what could not be written."""
    if args.dry_run:
        return
    if args.output:
        refuse_format(args.output, parse_formats(args.format))
        check_target(args.output, args.overwrite)
        refuse_own_folder(args.model, args.output)
    for flag, path, load, kind in (
        ("--plan-out", args.plan_out, PruningPlan.load, "plan"),
        ("--statistics-out", args.statistics_out, Statistics.load, "statistics file"),
    ):
        if path is not None:
            _check_file_out(args, flag, path, load, kind)
    if args.plan_out and args.statistics_out and args.plan_out.resolve() == args.statistics_out.resolve():
        raise RequestError(f"--plan-out and --statistics-out both name {args.plan_out}; give each its own path")


def _check_streaming(args: argparse.Namespace, formats: Sequence[str]) -> None:
    """Refuses what needs all of the model in memory."""
    if args.evaluate or args.sample is not None:
        raise RequestError("--stream leaves the model in its files, where --evaluate and --sample cannot run it")
    if args.calibration:
        raise RequestError("--stream leaves the model in its files, where --calibration cannot run it")
    if "orbax" in formats and args.output and not args.dry_run:
        raise RequestError("--stream writes --format hf; orbax is written from the whole model in memory")
    if args.mesh != "auto" or args.distributed:
        raise RequestError(
            "--stream is the work of one process, with no model in memory to divide; leave out --mesh and --distributed"
        )
    if kind := loaded_whole(args.model):
        raise RequestError(
            f"--stream reads Hugging Face folders and hub ids; {args.model} is {kind}, which is loaded whole"
        )


def _check_file_out(args: argparse.Namespace, flag: str, path: Path, load: Callable[[Path], Any], kind: str) -> None:
    """Refuses a file beside the output that would replace something of another kind, or land within a model."""
    file = check_file(path, args.overwrite)
    if file.is_file():  # --overwrite replaces a plan by a plan, never a model or a text
        try:
            load(file)
        except GlupruneError as error:
            raise RequestError(f"{flag} {file} is no {kind} and is not replaced; choose another path") from error
    model = Path(args.model).expanduser()
    if model.is_dir() and file.is_relative_to(model.resolve()):
        raise RequestError(f"{flag} {file} lies in the model {args.model}, which is only read; choose another path")
    if args.output and not in_store(args.output):
        output = args.output.resolve()
        if file.is_relative_to(output) or output.is_relative_to(file):
            raise RequestError(
                f"{flag} {file} and --output {output} collide; choose another path (the output has the plan as "
                f"{PLAN_FILE} anyway)"
            )


def _method(args: argparse.Namespace) -> methods.Method:
    return method_options.method_of(args, needs_statistics=args.drop_least is not None)


def _choose(args: argparse.Namespace, checkpoint: convert.Checkpoint, chooser: methods.Chooser) -> methods.Pruned:
    target: dict[str, Any] = {
        "expansion_ratio": args.expansion_ratio,
        "prune_percent": args.prune_percent,
        "width": args.width,
    }
    target = {name: value for name, value in target.items() if value is not None}
    L = checkpoint.config.num_hidden_layers
    if args.layers is not None:
        target["layers"] = parse_layers(args.layers, L)
    if args.drop_layers is not None:
        target["drop_layers"] = parse_layers(args.drop_layers, L, "--drop-layers")
    if args.drop_least is not None:
        target["drop_layers"] = chooser.least_influential(args.drop_least)
    (pruned,) = chooser.choose(_method(args), [{**target, "multiple_of": args.multiple_of}])
    if args.drop_least is not None and (found := chooser.statistics()):
        found.check_fits(checkpoint.config, pruned.plan.fingerprint)
        calibration = pruned.plan.calibration or dict(found.texts)
        pruned = dataclasses.replace(pruned, plan=dataclasses.replace(pruned.plan, calibration=calibration))
    return pruned


class _Measurements:
    """Perplexities and sample answers of one model at its stages."""

    def __init__(self, args: argparse.Namespace, checkpoint: convert.Checkpoint, texts: Sequence[str]):
        self._args = args
        self._tokenizer = load_tokenizer(checkpoint)
        self._eos = end_of_sequence_ids(checkpoint)
        self._perplexity: dict[str, Perplexity] = {}
        self._answers: dict[str, str] = {}
        self._tokens: list[int] = []
        self._texts: list[str] = []  # those that the tokens are of
        for name, text in zip(args.evaluate or (), texts, strict=True):
            if len(self._tokens) == args.evaluate_tokens:
                terminal.stderr().print(
                    f"note: {name} is not looked at: the texts before it have the {args.evaluate_tokens:,} tokens of "
                    f"--evaluate-tokens",
                    style="dim",
                    markup=False,
                )
                continue
            self._texts.append(name)
            self._tokens += encode_text(self._tokenizer, text)[: args.evaluate_tokens - len(self._tokens)]

    def take(self, stage: str, model: Llama, masks: Masks = None) -> None:
        self._take_perplexity(stage, model, masks)
        if self._args.sample is not None:
            prompt, steps = encode_prompt(self._tokenizer, self._args.sample), self._args.sample_tokens
            with terminal.count_progress(f"sample answer ({stage})", steps, "tokens") as progress:
                (answer,) = generate(model, [prompt], max_new_tokens=steps, eos_ids=self._eos, on_tokens=progress)
            self._answers[stage] = self._tokenizer.decode(answer, skip_special_tokens=True)

    def take_random(self, model: Llama, plan: PruningPlan, random: Scores) -> None:
        """The perplexity with as many neurons of each layer masked as the plan removes, chosen at random."""
        kept = tuple(select_neurons(v, width) for v, width in zip(random.values, plan.widths, strict=True))
        masks = dataclasses.replace(plan, kept=kept).masks(model.config)
        self._take_perplexity(f"random neurons (seed {self._args.seed})", model, masks)

    def _take_perplexity(self, stage: str, model: Llama, masks: Masks) -> None:
        if not self._args.evaluate:
            return
        with terminal.count_progress(f"perplexity ({stage})", len(self._tokens), "tokens") as progress:
            self._perplexity[stage] = perplexity(
                model,
                self._tokens,
                window=self._args.window,
                neuron_masks=masks,
                texts=self._texts,
                on_tokens=progress,
            )

    def report(self) -> dict[str, Any]:
        """What was measured, by stage."""
        report: dict[str, Any] = {}
        if self._perplexity:
            report["evaluation"] = {
                "definition": next(iter(self._perplexity.values())).definition,
                "perplexity": {stage: result.value for stage, result in self._perplexity.items()},
            }
        if self._answers:
            report["sample"] = {"prompt": self._args.sample, "answers": self._answers}
        return report


if __name__ == "__main__":
    sys.exit(main())
