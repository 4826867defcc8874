"""Recovery training of a pruned model: `python -m gluprune_jax.recover`."""

import argparse
import dataclasses
import hashlib
import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from numpy.typing import NDArray
from rich.console import Console

import convert
from convert.model_card import recovery_card
from convert.store import FORMATS, MODEL_HELP, parse_formats, refuse_own_folder
from convert.tokenizer import encode_documents, load_tokenizer, separator
from gluprune_jax import devices, terminal
from gluprune_jax.atomic import check_file, check_target, refuse_address
from gluprune_jax.distributed import check_same, failing_together, is_main, least
from gluprune_jax.documents import DATA_HELP, read_documents
from gluprune_jax.errors import RequestError
from gluprune_jax.mesh import mesh_of, parse_mesh, shape_of
from gluprune_jax.model import Llama, abstract_model
from gluprune_jax.packing import pack
from gluprune_jax.recovery import COMPUTE_DTYPES, Recipe, Recovery, train
from gluprune_jax.trainable import WHAT, Trainable, check_rank, checksum
from gluprune_jax.training import Objective, Schedule
from gluprune_jax.training_checkpoints import TrainingCheckpoints
from gluprune_jax.training_memory import choose_training_mesh

LORA_RANK, LORA_ALPHA = 16, 32.0

DESCRIPTION = """\
Trains a pruned model so that it recovers: by distillation from the dense model (--teacher), or by plain language
modelling. All windows of the data are shuffled anew in every epoch. A run that was killed goes on from its last
checkpoint when the same command is given again, with the numbers of an unbroken run.

examples:
  python -m gluprune_jax.recover --model smollm2-2.4x --teacher demo --data corpus.txt --steps 500 --output recovered
  python -m gluprune_jax.recover --model llama-1b-2.4x --teacher meta-llama/Llama-3.2-1B --data chats.jsonl \\
      --train lora --lora-rank 32 --learning-rate 2e-4 --compute-dtype bfloat16 --tokens 20000000 --output recovered
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = terminal.ArgumentParser("python -m gluprune_jax.recover", DESCRIPTION)
    parser.add_argument("--model", required=True, metavar="MODEL", help=f"the pruned model: {MODEL_HELP}")
    parser.add_argument("--teacher", metavar="MODEL", help="the dense model to learn from (otherwise plain text)")
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="TEXT",
        help=DATA_HELP,
    )
    output = parser.add_argument_group("what to write")
    output.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the trained model")
    output.add_argument(
        "--format",
        default="hf",
        metavar="LIST",
        help=f"{' and/or '.join(FORMATS)}, comma-separated; orbax goes to DIR/orbax",
    )
    output.add_argument(
        "--overwrite", action="store_true", help="replace the model that is at DIR, and what --log names"
    )
    output.add_argument("--log", type=Path, metavar="FILE", help="JSON lines, one a step (default: DIR.recovery.jsonl)")
    output.add_argument(
        "--checkpoints", type=Path, metavar="DIR", help="to go on from (default: the output's .recovery)"
    )
    output.add_argument("--checkpoint-every", type=int, default=500, metavar="N", help="steps between them; 0: none")
    output.add_argument("--keep-checkpoints", action="store_true", help="also when the model is written")
    output.add_argument("--json", action="store_true", help="print one JSON document at the end")

    what = parser.add_argument_group("what is trained")
    what.add_argument("--train", choices=WHAT, default="all", help="all weights, those of the MLPs, or adapters")
    what.add_argument(
        "--lora-rank", type=int, default=LORA_RANK, metavar="R", help="of the adapters, which the output has merged"
    )
    what.add_argument("--lora-alpha", type=float, default=LORA_ALPHA, metavar="A", help="adapters are scaled by A / R")

    losses = parser.add_argument_group("losses")
    losses.add_argument("--kl-weight", type=float, metavar="W", help="of the distillation (1 with a teacher, else 0)")
    losses.add_argument("--ce-weight", type=float, metavar="W", help="of the cross-entropy (0 with a teacher, else 1)")
    losses.add_argument(
        "--hidden-weight", type=float, default=0.0, metavar="W", help="of the distance of hidden states"
    )
    losses.add_argument("--temperature", type=float, default=1.0, metavar="T", help="of the distillation")

    steps = parser.add_argument_group("steps")
    count = steps.add_mutually_exclusive_group(required=True)
    count.add_argument("--steps", type=int, metavar="N", help="how many")
    count.add_argument("--tokens", type=int, metavar="N", help="as many steps as take N tokens")
    steps.add_argument("--window", type=int, default=512, metavar="N", help="tokens that a window holds")
    steps.add_argument("--batch-size", type=int, default=8, metavar="N", help="windows computed together")
    steps.add_argument("--accumulate", type=int, default=1, metavar="N", help="such batches in a step")
    steps.add_argument("--learning-rate", type=float, default=1e-4, metavar="X", help="the highest; it falls to 0")
    steps.add_argument("--warmup-steps", type=int, default=0, metavar="N", help="steps in which it rises")
    steps.add_argument("--clip", type=float, default=1.0, metavar="X", help="the largest norm of the gradients")
    steps.add_argument("--weight-decay", type=float, default=0.0, metavar="X", help="of AdamW, for matrices")
    steps.add_argument("--compute-dtype", choices=COMPUTE_DTYPES, default="float32", help="what is trained is float32")
    steps.add_argument("--seed", type=int, default=0, help="of the order of the data, and of adapters")
    devices.add_arguments(parser, "as many replicas as fit and divide the batch")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    command = shlex.join(["python", "-m", "gluprune_jax.recover", *argv])
    return terminal.run("gluprune-recover", lambda: _recover(args, command), debug=args.debug, processes=args)


def _recover(args: argparse.Namespace, command: str) -> None:
    formats, recipe = parse_formats(args.format), make_recipe(args)
    checkpoints_at = args.checkpoints or args.output.with_name(f"{args.output.name}.recovery")
    log = args.log or args.output.with_name(f"{args.output.name}.recovery.jsonl")
    with failing_together():
        if is_main():
            _check_outputs(args, checkpoints_at, log)
        documents = [document for name in args.data for document in read_documents(name, "--data")]
        models, own = _describe(args, recipe), devices.capacity(args)
    # Between the two: one that fails in a block must not do so while the others tell each other something else.
    smallest = least(-1 if own is None else own)  # all must choose the same mesh
    with failing_together():
        mesh = _choose_mesh(args, recipe, models, None if smallest < 0 else smallest)
    check_same("the training data", (json.dumps(document).encode() for document in documents))
    with terminal.byte_progress() as progress:
        checkpoint = convert.load(args.model, mesh=lambda model: mesh, progress=progress)
        teacher = _load_teacher(args, mesh, progress)
    with failing_together():
        tokenizer = load_tokenizer(checkpoint)
        if teacher is not None:
            _check_vocabularies(args, tokenizer, teacher)
        with terminal.count_progress("tokenizing", len(documents), "documents") as progress_of_tokens:
            encoded = encode_documents(tokenizer, documents, on_document=progress_of_tokens)
        windows = pack(encoded, args.window, separator(checkpoint, tokenizer))
    student, teacher_model = checkpoint.model, None if teacher is None else teacher.model
    settings = run_settings(args.train, recipe, student, teacher_model, windows)
    recovery = Recovery(student, teacher_model, windows, recipe)
    checkpoint = dataclasses.replace(checkpoint, model=abstract_model(student.config))
    del student, teacher, teacher_model  # what is trained has copies of its own
    checkpoints = TrainingCheckpoints(checkpoints_at, settings)
    found = checkpoints.restore(recovery.state)
    if found is not None:
        recovery.resume(found)
        if not args.json:
            terminal.stderr().print(f"goes on from {found.path}, step {found.step}", markup=False)
    elif args.log is not None:  # the default one belongs to the output, which is not there or is replaced
        with failing_together():
            if is_main():
                check_file(log, args.overwrite)
    lines: list[Mapping[str, float]] = []
    with terminal.training_progress(recipe.schedule.steps) as progress_of_training:

        def show(line: Mapping[str, float]) -> None:
            before = lines[-1] if lines else {"tokens": 0, "seconds": 0}
            rate = (line["tokens"] - before["tokens"]) / max(line["seconds"] - before["seconds"], 1e-3)
            progress_of_training(int(line["step"]), line["loss"], rate)
            lines[:] = [*lines[:1], line]

        every = args.checkpoint_every
        train(recovery, checkpoints=checkpoints, checkpoint_every=every, log=log, on_step=show)
    record = {"steps": recovery.step, "tokens": recovery.tokens, "teacher": args.teacher, "settings": settings}
    history = (*checkpoint.history, {"recovery": record})
    checkpoint = dataclasses.replace(checkpoint, model=recovery.model(), history=history)
    card = recovery_card(checkpoint, record, lines[-1] if lines else {}, command)
    with terminal.byte_progress() as progress:
        convert.save(
            checkpoint,
            args.output,
            formats=formats,
            overwrite=args.overwrite,
            extra_files={"README.md": card},
            progress=progress,
        )
    if not args.keep_checkpoints:
        checkpoints.remove()
    report = {
        "model": args.model,
        "teacher": args.teacher,
        "output": str(args.output),
        "formats": formats,
        "log": str(log),
        "resumed_from": None if found is None else found.step,
        "steps": recovery.step,
        "tokens": recovery.tokens,
        "seconds": round(recovery.seconds, 3),
        "first": lines[0] if lines else None,
        "last": lines[-1] if lines else None,
    }
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        _show(report)


# ------------------------------------------------------------------------------------------------- what is asked


def make_recipe(args: argparse.Namespace) -> Recipe:
    """How to train, as the options say.

    Raises:
      RequestError: options that make no sense by themselves.
    """
    if args.checkpoint_every < 0:
        raise RequestError(f"--checkpoint-every is {args.checkpoint_every}; it must be at least 0")
    for flag, value in (
        ("--window", args.window),
        ("--batch-size", args.batch_size),
        ("--accumulate", args.accumulate),
    ):
        if value < 1:
            raise RequestError(f"{flag} is {value}; it must be at least 1")
    if args.tokens is not None and args.tokens < 1:
        raise RequestError(f"--tokens is {args.tokens}; it must be at least 1")
    per_step = args.window * args.batch_size * args.accumulate
    steps = args.steps if args.tokens is None else math.ceil(args.tokens / per_step)
    schedule = Schedule(steps, args.learning_rate, args.warmup_steps, args.weight_decay, args.clip)
    schedule.check()
    if not 0 < args.lora_alpha < math.inf:
        raise RequestError(f"--lora-alpha is {args.lora_alpha:g}; it must be a finite number above 0")
    if args.lora_rank < 1:
        raise RequestError(f"--lora-rank is {args.lora_rank}; it must be at least 1")
    if args.train != "lora" and (args.lora_rank, args.lora_alpha) != (LORA_RANK, LORA_ALPHA):
        raise RequestError(f"--lora-rank and --lora-alpha are of adapters, and --train is {args.train}; leave them out")
    objective = Objective(
        kl=float(args.teacher is not None) if args.kl_weight is None else args.kl_weight,
        ce=float(args.teacher is None) if args.ce_weight is None else args.ce_weight,
        hidden=args.hidden_weight,
        temperature=args.temperature,
    )
    if objective.temperature != 1 and not objective.kl:
        raise RequestError("--temperature is of the distillation, which has no weight; give --teacher or leave it out")
    return Recipe(
        schedule=schedule,
        objective=objective,
        trainable=Trainable(args.train, args.lora_rank, args.lora_alpha),
        batch_size=args.batch_size,
        accumulate=args.accumulate,
        compute_dtype=args.compute_dtype,
        seed=args.seed,
    )


def _check_outputs(args: argparse.Namespace, checkpoints: Path, log: Path) -> None:
    """Refuses what could not be written."""
    check_target(args.output, args.overwrite)
    for model in (args.model, args.teacher):
        if model is not None:
            refuse_own_folder(model, args.output)
    output = args.output.resolve()
    for flag, path in (("--checkpoints", checkpoints), ("--log", log)):
        refuse_address(path)
        if path.resolve().is_relative_to(output):
            raise RequestError(
                f"{flag} {path} lies in --output {args.output}, which is written at the end; choose another"
            )
    check_file(log, overwrite=True)


def _describe(args: argparse.Namespace, recipe: Recipe) -> tuple[Llama, Llama | None]:
    """The model and its teacher without their weights, after what can be checked before one is read."""
    parse_mesh(args.mesh)
    student = convert.describe(args.model)
    teacher = None if args.teacher is None else convert.describe(args.teacher, dtype=_teacher_dtype(args))
    recipe.check(student.config, None if teacher is None else teacher.config, args.window, 1)
    if args.train == "lora":
        check_rank(student.config, args.lora_rank)
    return student, teacher


def _choose_mesh(
    args: argparse.Namespace, recipe: Recipe, models: tuple[Llama, Llama | None], capacity: int | None
) -> Mesh | None:
    return choose_training_mesh(
        *models,
        recipe,
        args.window,
        asked=parse_mesh(args.mesh),
        capacity=capacity,
        is_shared=args.device_memory is None and jax.default_backend() == "cpu",
    )


def _teacher_dtype(args: argparse.Namespace) -> str | None:
    return "bfloat16" if args.compute_dtype == "bfloat16" else None  # it is computed in that anyway


def _load_teacher(args: argparse.Namespace, mesh: Mesh | None, progress: Any) -> convert.Checkpoint | None:
    if args.teacher is None:
        return None
    return convert.load(args.teacher, dtype=_teacher_dtype(args), mesh=lambda model: mesh, progress=progress)


def _check_vocabularies(args: argparse.Namespace, tokenizer: Any, teacher: convert.Checkpoint) -> None:
    """Refuses a teacher that means other tokens by the same ids."""
    if any(name.startswith(("tokenizer", "vocab")) for name in teacher.assets):
        theirs, ours = load_tokenizer(teacher).get_vocab(), tokenizer.get_vocab()
        if different := sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)):
            token = different[0]
            raise RequestError(
                f"the tokenizer of --teacher {args.teacher} is another one: the token {token!r} is {theirs.get(token)} "
                f"there and {ours.get(token)} in --model; give the model that was pruned as --teacher"
            )


def run_settings(
    train: str, recipe: Recipe, student: Llama, teacher: Llama | None, windows: NDArray[np.int32]
) -> dict[str, Any]:
    """All that decides what the steps compute, by the name of the option: what a run that goes on must have too."""
    schedule, objective, trainable = recipe.schedule, recipe.objective, recipe.trainable
    adapters = {"--lora-rank": trainable.rank, "--lora-alpha": trainable.alpha} if train == "lora" else {}
    return {
        "--model": f"with weights {checksum(student)}",
        "--teacher": None if teacher is None else f"with weights {checksum(teacher)}",
        "--data": f"with tokens {hashlib.sha256(windows.tobytes()).hexdigest()[:16]}",
        "--train": train,
        **adapters,
        "--kl-weight": objective.kl,
        "--ce-weight": objective.ce,
        "--hidden-weight": objective.hidden,
        "--temperature": objective.temperature,
        "--steps": schedule.steps,
        "--window": windows.shape[1],
        "--batch-size": recipe.batch_size,
        "--accumulate": recipe.accumulate,
        "--learning-rate": schedule.learning_rate,
        "--warmup-steps": schedule.warmup_steps,
        "--clip": schedule.clip,
        "--weight-decay": schedule.weight_decay,
        "--compute-dtype": recipe.compute_dtype,
        "--seed": recipe.seed,
        "--mesh": str(shape_of(mesh_of(student))),
    }


def _show(report: Mapping[str, Any]) -> None:
    console = Console(highlight=False, soft_wrap=True, emoji=False)
    first, last = report["first"], report["last"]
    if last is not None:
        since = f"step {first['step']:,}"
        console.print(f"loss {first['loss']:.4f} at {since}, {last['loss']:.4f} at step {last['step']:,}", markup=False)
    console.print(
        f"wrote {' and '.join(report['formats'])} to {report['output']} ({report['tokens']:,} tokens in "
        f"{report['seconds']:.1f} s; log {report['log']})",
        markup=False,
    )


if __name__ == "__main__":
    sys.exit(main())
