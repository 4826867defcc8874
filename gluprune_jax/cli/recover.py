"""What `gluprune recover` does once it has been understood: see `gluprune_jax.recover`."""

import dataclasses
import datetime
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from numpy.typing import NDArray

import convert
from convert.chat import fix_date
from convert.gguf.export import GGUFOptions, prepare_gguf
from convert.model_card import recovery_card
from convert.output import check_format, check_not_own_folder, check_target, parse_formats
from convert.tokenizer import (
    beginning,
    check_ids,
    encode_documents,
    has_tokenizer,
    load_tokenizer,
    separator,
    tokens_beyond,
)
from evals.perplexity import Perplexity, text_perplexity
from gluprune_jax.cli import terminal
from gluprune_jax.data.documents import contents, evaluation_text, read_documents
from gluprune_jax.data.packing import pack
from gluprune_jax.errors import RequestError, check_at_least
from gluprune_jax.files.atomic import check_file, check_no_address
from gluprune_jax.memory.training import choose_training_mesh
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.models.parameters import abstract_model, checksum
from gluprune_jax.parallel.distributed import check_same, is_main, min_over_processes, synchronize_errors
from gluprune_jax.parallel.mesh import mesh_of, parse_mesh, shape_of
from gluprune_jax.recover import LORA_ALPHA, LORA_RANK, RecoverRequest
from gluprune_jax.training.checkpoints import TrainingCheckpoints, list_checkpoints, recorded_dates
from gluprune_jax.training.recovery import Recipe, Recovery, read_log, train
from gluprune_jax.training.step import Objective, Schedule
from gluprune_jax.training.trainable import Trainable, check_rank

# What settings in training checkpoints were called.
FORMER_SETTINGS = {"--data": "--train-data", "--window": "--sequence-length"}


def kept(request: RecoverRequest, command: str) -> str:
    """What is there after an interruption, and how to resume."""
    found = list_checkpoints(request.checkpoints_at)
    if not found:
        every = request.checkpoint_every
        return f"no checkpoint was saved yet (--checkpoint-every is {every}); to start again:\n  {command}"
    return f"the last checkpoint is {found[-1]}; to resume from it:\n  {command}"


def recover(request: RecoverRequest, command: str) -> None:
    """Trains the model, measures it before and after, writes it, and reports; `command` is for its card.

    Raises:
      RequestError, OperationError: it cannot be done as asked, or something underneath failed.
    """
    formats, recipe = parse_formats(request.format, request.output), make_recipe(request)
    checkpoints_at, log = request.checkpoints_at, request.log_at
    with synchronize_errors():
        if is_main():
            _check_outputs(request, checkpoints_at, log)
        texts = [(name, evaluation_text(name, terminal.note)) for name in request.eval_data]
        documents = read_documents(request.train_data, "--train-data", terminal.note)
        models, own = _describe(request, recipe), request.devices.capacity()
    # Between the two: one that fails in a block must not do so while the others tell each other something else.
    smallest = min_over_processes(-1 if own is None else own)  # all must choose the same mesh
    with synchronize_errors():
        mesh = _choose_mesh(request, recipe, models, None if smallest < 0 else smallest)
    check_same("the texts of --eval-data", (text.encode() for _, text in texts))
    check_same("the training data", contents(documents))
    with terminal.byte_progress() as progress:
        checkpoint = convert.load(
            request.model,
            dtype=request.dtype,
            revision=request.revision,
            mesh=lambda model: mesh,
            progress=progress,
        )
        teacher = _load_teacher(request, mesh, progress)
    with synchronize_errors():
        if "gguf" in formats:  # what cannot be written is said before any training
            prepare_gguf(checkpoint, GGUFOptions())
        tokenizer = load_tokenizer(checkpoint, request.chat_template)
        if beyond := tokens_beyond(tokenizer, checkpoint.config.vocab_size):
            terminal.note(beyond)
        if teacher is not None:
            _check_vocabularies(request, tokenizer, teacher)
    has_chats = any(document.kind == "chat" for document in documents)
    recorded = recorded_dates(checkpoints_at, "--date") if is_main() else {}
    date = fix_date(tokenizer if has_chats else None, request.date, recorded, terminal.note)
    with synchronize_errors():
        with terminal.count_progress("tokenizing", len(documents), "documents") as progress_of_tokens:
            encoded = encode_documents(tokenizer, documents, date=date, on_document=progress_of_tokens)
        windows = pack(
            encoded, request.sequence_length, separator(checkpoint, tokenizer), beginning(checkpoint, tokenizer)
        )
        check_ids(tokenizer, windows, checkpoint.config.vocab_size)
        meter = text_perplexity(
            tokenizer,
            texts,
            vocab_size=checkpoint.config.vocab_size,
            eval_tokens=request.eval_tokens,
            sequence_length=request.sequence_length,
            begin=beginning(checkpoint, tokenizer),
            note=terminal.note,
            progress=terminal.count_progress,
        )
    student, teacher_model = checkpoint.model, None if teacher is None else teacher.model
    settings = run_settings(request.train, recipe, student, teacher_model, windows, date)
    measured: dict[str, Perplexity] = {}
    if texts:
        if teacher_model is not None:
            measured["teacher"] = meter(teacher_model, "teacher", None)
        measured["before"] = meter(student, "before", None)
    recovery = Recovery(student, teacher_model, windows, recipe)
    checkpoint = checkpoint.with_model(abstract_model(student.config))
    del student, teacher, teacher_model  # what is trained has copies of its own
    checkpoints = TrainingCheckpoints(checkpoints_at, settings, former=FORMER_SETTINGS, later=("--date",))
    found = checkpoints.restore(recovery.state)
    if found is not None:
        recovery.resume(found)
        if not request.json:
            terminal.note(f"resumes from {found.path}, step {found.step}")
    elif request.log is not None:  # the default one belongs to the output, which is not there or is replaced
        with synchronize_errors():
            if is_main():
                check_file(log, request.overwrite)
    # The first and the last line of the whole run, also of what was trained before it was resumed.
    logged = read_log(log, recovery.step) if found is not None else []
    lines: list[Mapping[str, float]] = [logged[0], logged[-1]] if logged else []
    with terminal.training_progress(recipe.schedule.steps) as progress_of_training:

        def show(line: Mapping[str, float]) -> None:
            before = lines[-1] if lines else {"tokens": 0, "seconds": 0}
            rate = (line["tokens"] - before["tokens"]) / max(line["seconds"] - before["seconds"], 1e-3)
            progress_of_training(int(line["step"]), line["loss"], rate)
            lines[:] = [*lines[:1], line]

        every = request.checkpoint_every
        train(recovery, checkpoints=checkpoints, checkpoint_every=every, log=log, on_step=show)
    record = {"steps": recovery.step, "tokens": recovery.tokens, "teacher": request.teacher, "settings": settings}
    history = (*checkpoint.history, {"recovery": record})
    checkpoint = dataclasses.replace(checkpoint.with_model(recovery.model()), history=history)
    if texts:
        measured["after"] = meter(checkpoint.model, "after", None)
    card = recovery_card(checkpoint, record, lines[-1] if lines else {}, command)
    with terminal.byte_progress() as progress:
        notes = convert.save(
            checkpoint,
            request.output,
            formats=formats,
            overwrite=request.overwrite,
            extra_files={"README.md": card},
            progress=progress,
        )
    if not request.json:
        for text in notes:
            terminal.note(text)
    if not request.keep_checkpoints:
        checkpoints.remove()
    report: dict[str, Any] = {
        "model": request.model,
        "teacher": request.teacher,
        "date": None if date is None else date.isoformat(),
        "output": str(request.output),
        "formats": formats,
        **({"notes": list(notes)} if notes else {}),
        "log": str(log),
        "resumed_from": None if found is None else found.step,
        "steps": recovery.step,
        "tokens": recovery.tokens,
        "seconds": round(recovery.seconds, 3),
        "first": lines[0] if lines else None,
        "last": lines[-1] if lines else None,
    }
    if measured:
        report["evaluation"] = {
            "definition": measured["after"].definition,
            "perplexity": {stage: result.value for stage, result in measured.items()},
        }
    if request.json:
        print(json.dumps(report, indent=1))
    else:
        _show(report)


# ------------------------------------------------------------------------------------------------- what is asked


def make_recipe(request: RecoverRequest) -> Recipe:
    """How to train, as the options say.

    Raises:
      RequestError: options that make no sense by themselves.
    """
    check_at_least(0, checkpoint_every=request.checkpoint_every)
    check_at_least(
        1,
        sequence_length=request.sequence_length,
        batch_size=request.batch_size,
        accumulate=request.accumulate,
        tokens=request.tokens,
    )
    check_at_least(2, eval_tokens=request.eval_tokens)
    per_step = request.sequence_length * request.batch_size * request.accumulate
    steps = math.ceil(request.tokens / per_step) if request.tokens is not None else request.steps or 0
    schedule = Schedule(steps, request.learning_rate, request.warmup_steps, request.weight_decay, request.clip)
    schedule.check()
    if not 0 < request.lora_alpha < math.inf:
        raise RequestError(f"--lora-alpha is {request.lora_alpha:g}; it must be a finite number above 0")
    if request.lora_rank < 1:
        raise RequestError(f"--lora-rank is {request.lora_rank}; it must be at least 1")
    if request.train != "lora" and (request.lora_rank, request.lora_alpha) != (LORA_RANK, LORA_ALPHA):
        raise RequestError(
            f"--lora-rank and --lora-alpha are of adapters, and --train is {request.train}; leave them out"
        )
    objective = Objective(
        kl=float(request.teacher is not None) if request.kl_weight is None else request.kl_weight,
        ce=float(request.teacher is None) if request.ce_weight is None else request.ce_weight,
        hidden=request.hidden_weight,
        temperature=request.temperature,
    )
    if objective.temperature != 1 and not objective.kl:
        raise RequestError("--temperature is of the distillation, which has no weight; give --teacher or leave it out")
    return Recipe(
        schedule=schedule,
        objective=objective,
        trainable=Trainable(request.train, request.lora_rank, request.lora_alpha),
        batch_size=request.batch_size,
        accumulate=request.accumulate,
        compute_dtype=request.compute_dtype,
        seed=request.seed,
    )


def _check_outputs(request: RecoverRequest, checkpoints: Path, log: Path) -> None:
    """Refuses what could not be written, and to resume what was not begun."""
    if request.resume and not list_checkpoints(checkpoints):
        raise RequestError(
            f"there is nothing to resume: no checkpoint is in {checkpoints}; leave out --resume to begin"
        )
    check_format(request.output, parse_formats(request.format, request.output))
    check_target(request.output, request.overwrite)
    for model in (request.model, request.teacher):
        if model is not None:
            check_not_own_folder(model, request.output)
    output = request.output.resolve()
    for flag, path in (("--checkpoints", checkpoints), ("--log", log)):
        check_no_address(path)
        if path.resolve().is_relative_to(output):
            raise RequestError(
                f"{flag} {path} lies in --output {request.output}, which is written at the end; choose another"
            )
    check_file(log, overwrite=True)


def _describe(request: RecoverRequest, recipe: Recipe) -> tuple[Decoder, Decoder | None]:
    """The model and its teacher without their weights, after what can be checked before one is read."""
    parse_mesh(request.devices.mesh)
    student = convert.describe(request.model, dtype=request.dtype, revision=request.revision)
    teacher = None if request.teacher is None else convert.describe(request.teacher, dtype=_teacher_dtype(request))
    recipe.check(student.config, None if teacher is None else teacher.config, request.sequence_length, 1)
    if request.train == "lora":
        check_rank(student.config, request.lora_rank)
    return student, teacher


def _choose_mesh(
    request: RecoverRequest, recipe: Recipe, models: tuple[Decoder, Decoder | None], capacity: int | None
) -> Mesh | None:
    return choose_training_mesh(
        *models,
        recipe,
        request.sequence_length,
        asked=parse_mesh(request.devices.mesh),
        capacity=capacity,
        is_shared=request.devices.device_memory is None and jax.default_backend() == "cpu",
    )


def _teacher_dtype(request: RecoverRequest) -> str | None:
    return "bfloat16" if request.compute_dtype == "bfloat16" else None  # it is computed in that anyway


def _load_teacher(request: RecoverRequest, mesh: Mesh | None, progress: Any) -> convert.Checkpoint | None:
    if request.teacher is None:
        return None
    return convert.load(request.teacher, dtype=_teacher_dtype(request), mesh=lambda model: mesh, progress=progress)


def _check_vocabularies(request: RecoverRequest, tokenizer: Any, teacher: convert.Checkpoint) -> None:
    """Refuses a teacher that means other tokens by the same ids."""
    if has_tokenizer(teacher.assets):
        theirs, ours = load_tokenizer(teacher).get_vocab(), tokenizer.get_vocab()
        if different := sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)):
            token = different[0]
            raise RequestError(
                f"the tokenizer of --teacher {request.teacher} is another one: the token {token!r} is "
                f"{theirs.get(token)} there and {ours.get(token)} in --model; give the model that was pruned as "
                f"--teacher"
            )


def run_settings(
    train: str,
    recipe: Recipe,
    student: Decoder,
    teacher: Decoder | None,
    windows: NDArray[np.int32],
    date: datetime.date | None = None,
) -> dict[str, Any]:
    """All that decides what the steps compute, by the name of the option: what a resumed run must have too."""
    schedule, objective, trainable = recipe.schedule, recipe.objective, recipe.trainable
    adapters = {"--lora-rank": trainable.rank, "--lora-alpha": trainable.alpha} if train == "lora" else {}
    return {
        "--model": f"with weights {checksum(student)}",
        "--teacher": None if teacher is None else f"with weights {checksum(teacher)}",
        **({} if date is None else {"--date": date.isoformat()}),
        "--train-data": f"with tokens {hashlib.sha256(windows.tobytes()).hexdigest()[:16]}",
        "--train": train,
        **adapters,
        "--kl-weight": objective.kl,
        "--ce-weight": objective.ce,
        "--hidden-weight": objective.hidden,
        "--temperature": objective.temperature,
        "--steps": schedule.steps,
        "--sequence-length": windows.shape[1],
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
    console = terminal.console()
    first, last = report["first"], report["last"]
    if last is not None:
        since = f"step {first['step']:,}"
        console.print(f"loss {first['loss']:.4f} at {since}, {last['loss']:.4f} at step {last['step']:,}", markup=False)
    if evaluation := report.get("evaluation"):
        values = [f"{stage} {value:,.2f}" for stage, value in evaluation["perplexity"].items()]
        console.print(f"perplexity: {', '.join(values)}", markup=False)
        console.print(evaluation["definition"], style="dim", markup=False)
    console.print(
        f"wrote {' and '.join(report['formats'])} to {report['output']} ({report['tokens']:,} tokens in "
        f"{report['seconds']:.1f} s; log {report['log']})",
        markup=False,
    )
