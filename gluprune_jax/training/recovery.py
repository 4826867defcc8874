"""Recovery training: what pruning took from a model, trained back, as in knowledge distillation after pruning (arXiv
2407.14679).

    recovery = Recovery(student, teacher, windows, Recipe(objective=Objective(kl=1), schedule=Schedule(steps=1000)))
    while recovery.step < 1000:
        print(recovery.advance())
    model = recovery.model()

A step is a function of the state before it, of the settings and of its number, so that a run resumed from a
checkpoint gives the bits of one that was never interrupted.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from gluprune_jax.data.packing import PADDING, window_indices
from gluprune_jax.errors import OperationError, RequestError
from gluprune_jax.files.atomic import check_file, write_file_atomic
from gluprune_jax.models.config import ModelConfig
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.models.parameters import parameters_of
from gluprune_jax.parallel.distributed import is_main
from gluprune_jax.parallel.mesh import mesh_of, place, shape_of, use_mesh
from gluprune_jax.training.checkpoints import Restored, TrainingCheckpoints
from gluprune_jax.training.choices import COMPUTE_DTYPES
from gluprune_jax.training.step import Objective, Schedule, compile_step, new_state
from gluprune_jax.training.trainable import Trainable, layout_of, merged, split


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Attributes:
      schedule: the optimiser and how many steps it takes.
      objective: the losses.
      trainable: what is trained.
      batch_size: windows of a micro-batch, B.
      accumulate: micro-batches of a step, A.
      compute_dtype: "float32" or "bfloat16".
      seed: of the order of the data, and of adapters.
    """

    schedule: Schedule
    objective: Objective = dataclasses.field(default_factory=Objective)
    trainable: Trainable = dataclasses.field(default_factory=Trainable)
    batch_size: int = 8
    accumulate: int = 1
    compute_dtype: str = "float32"
    seed: int = 0

    @property
    def windows_per_step(self) -> int:
        """A x B."""
        return self.batch_size * self.accumulate

    def check(self, student: ModelConfig, teacher: ModelConfig | None, sequence_length: int, replicas: int) -> None:
        """Makes sure that these models can be trained so.

        Args:
          student: the model.
          teacher: what it is compared with, if anything.
          sequence_length: tokens of a window.
          replicas: of the mesh.

        Raises:
          RequestError: they cannot.
        """
        for flag, value in (("`batch_size`", self.batch_size), ("`accumulate`", self.accumulate)):
            if value < 1:
                raise RequestError(f"{flag} is {value}; it must be at least 1")
        if self.seed < 0:
            raise RequestError(f"`seed` is {self.seed}; it must be at least 0")
        if self.compute_dtype not in COMPUTE_DTYPES:
            raise RequestError(f"`compute_dtype` is {self.compute_dtype}; choose from {', '.join(COMPUTE_DTYPES)}")
        self.schedule.check()
        self.objective.check(student, teacher)
        longest = min(config.context_length for config in (student, teacher) if config is not None)
        if not 2 <= sequence_length <= longest:
            raise RequestError(
                f"`sequence_length` is {sequence_length}; it must lie between 2 and the {longest} tokens of the models"
            )
        if self.batch_size % replicas:
            raise RequestError(
                f"`batch_size` is {self.batch_size}, which does not divide over the {replicas} replicas of the mesh; "
                f"choose a multiple, or a `mesh` with another data="
            )


class Recovery:
    """A model in training.

    Attributes:
      recipe: how it is trained.
      step: how many steps are done.
      tokens: how many tokens were trained on.
      seconds: how long that took, in all runs together.
      last_checkpoint: the checkpoint that was resumed from or saved last.
      state: what is trained, and the optimiser's state.
    """

    def __init__(self, student: Decoder, teacher: Decoder | None, windows: NDArray[np.int32], recipe: Recipe):
        """Prepares training; nothing is computed yet.

        Args:
          student: the model, on the mesh to train on; only what is not trained of it is held on to.
          teacher: the dense model on the same devices, or None.
          windows: `[windows, W]` int32 from `packing.pack`.
          recipe: how to train.

        Raises:
          RequestError: the models, the data and the recipe do not go together.
        """
        self._mesh = mesh_of(student)
        self.recipe, self._windows, self._config = recipe, windows, student.config
        teacher_config = None if teacher is None else teacher.config
        recipe.check(student.config, teacher_config, windows.shape[1], shape_of(self._mesh).data)
        student.config.check_tokens(windows[windows != PADDING])
        self._layout = layout_of(student)
        trained, self._frozen = split(student, recipe.trainable, recipe.seed)
        self._teacher = {} if teacher is None else parameters_of(teacher)
        self.state = new_state(trained, recipe.schedule, self._mesh)
        self._step = compile_step(
            self.state,
            student.config,
            teacher_config,
            recipe.objective,
            recipe.schedule,
            recipe.trainable,
            jnp.dtype(recipe.compute_dtype),
            self._mesh,
        )
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.last_checkpoint: Path | None = None

    def advance(self) -> dict[str, float]:
        """Takes a step.

        Returns:
          What the log holds of it: the number of the step (from 1), `loss` and its terms before the step, the learning
          rate, the norm of the gradients, tokens and seconds so far.
        """
        start, recipe = time.perf_counter(), self.recipe
        chosen = window_indices(len(self._windows), recipe.windows_per_step, self.step, recipe.seed)
        tokens = self._windows[chosen].reshape(recipe.accumulate, recipe.batch_size, -1)
        with use_mesh(self._mesh):
            placed = place(self._mesh, tokens, None, "batch", None)
            self.state, terms = self._step(self.state, self._frozen, self._teacher, placed)
        values = {name: float(value) for name, value in sorted(terms.items())}
        rate = float(f"{recipe.schedule.rate(self.step):.6g}")
        self.step += 1
        self.tokens += int((tokens != PADDING).sum())
        self.seconds += time.perf_counter() - start
        loss = values.pop("loss")
        counts = {"tokens": self.tokens, "seconds": round(self.seconds, 3)}
        return {"step": self.step, "loss": loss, **values, "learning_rate": rate, **counts}

    def resume(self, found: Restored) -> None:
        """Goes on from a checkpoint."""
        self.state, self.step = found.state, found.step
        self.tokens, self.seconds = int(found.counts["tokens"]), float(found.counts["seconds"])
        self.last_checkpoint = found.path

    def model(self) -> Decoder:
        """The model as trained so far, in the dtypes that it had."""
        scale = self.recipe.trainable.scale
        return merged(self._config, self._layout, self.state.trained, self._frozen, scale)


def train(
    recovery: Recovery,
    *,
    checkpoints: TrainingCheckpoints | None = None,
    checkpoint_every: int = 0,
    log: Path | None = None,
    on_step: Callable[[Mapping[str, float]], None] | None = None,
) -> dict[str, float]:
    """Takes all steps that are left.

    Args:
      recovery: not begun, or resumed from one of the checkpoints.
      checkpoints: where to save.
      checkpoint_every: steps from one checkpoint to the next; 0 saves none.
      log: a file of JSON lines, one for each step (see `Recovery.advance`). What it says of steps that are taken
        again is replaced.
      on_step: called with each line.

    Returns:
      The last line, or an empty one where all steps were done before.

    Raises:
      OperationError: the loss is NaN or Inf; a checkpoint or the log cannot be written or read.
    """
    line: dict[str, float] = {}
    steps = recovery.recipe.schedule.steps
    with _Log(log if is_main() else None, recovery.step) as write:
        while recovery.step < steps:
            line = recovery.advance()
            if bad := [name for name in ("loss", "grad_norm") if not math.isfinite(line[name])]:
                what = {"loss": "loss", "grad_norm": "norm of the gradients"}[bad[0]]
                good = recovery.last_checkpoint
                kept = f"the last good checkpoint is {good}" if good else "there is no checkpoint before it"
                raise OperationError(
                    f"the {what} is {line[bad[0]]:g} at step {recovery.step}, and training stops; {kept}; try a lower "
                    f"`learning_rate` or more `warmup_steps`"
                )
            write(line)
            if checkpoints is not None and checkpoint_every and recovery.step % checkpoint_every == 0:
                counts = {"tokens": recovery.tokens, "seconds": recovery.seconds}
                recovery.last_checkpoint = checkpoints.save(recovery.step, recovery.state, counts)
            if on_step:
                on_step(line)
    return line


class _Log:
    """Appends lines to a log of which those up to a step are kept; does nothing without a path."""

    def __init__(self, path: Path | None, step: int):
        self._path, self._step = path, step

    def __enter__(self) -> Callable[[Mapping[str, float]], None]:
        if self._path is None:
            self._file = None
            return lambda line: None
        path = check_file(self._path, overwrite=True)
        # A killed run can have written more than its last checkpoint knows, and half a line.
        kept = "".join(_lines(path, self._step))
        write_file_atomic(path, kept.encode(), overwrite=True)
        self._file = path.open("a", encoding="utf-8")
        return self._write

    def _write(self, line: Mapping[str, float]) -> None:
        assert self._file is not None
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise OperationError(f"cannot write the log {self._path}: {error.strerror}") from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


def read_log(path: Path, step: int) -> list[dict[str, float]]:
    """The lines of a log up to a step; none where there is no log."""
    return [json.loads(line) for line in _lines(path, step)]


def _lines(path: Path, step: int) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if _step_of(line) <= step]


def _step_of(line: str) -> float:
    """The step of a line of a log; infinite for what is no whole line of one."""
    try:
        record = json.loads(line)
    except ValueError:
        return math.inf
    step = record.get("step") if isinstance(record, dict) and line.endswith("\n") else None
    return step if isinstance(step, int) else math.inf
