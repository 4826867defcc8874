"""Pruning in one pass over the files: what is kept of a layer is written while the next one is read and scored.

Every byte of the model is read once, where scoring first and writing afterwards read the MLPs, most of a model, twice.
"""

import contextlib
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from convert.checkpoint import Progress
from convert.families.names import TensorName
from convert.huggingface.folder import write_assets, write_weights_of
from convert.huggingface.mixture import MixtureCheckpoint
from convert.huggingface.streamed import StreamedCheckpoint
from gluprune_jax.models.config import NEURON_AXES
from gluprune_jax.pruning.one_pass import Choice
from gluprune_jax.pruning.plan import PruningPlan
from gluprune_jax.pruning.scores import MLPWeights


def can_read_once(checkpoint: StreamedCheckpoint | MixtureCheckpoint) -> bool:
    """Whether the MLPs stand in the order of the layers in the files to be written.

    Wide elements stand first there: matrices of several dtypes would have to wait in memory for their turn.
    """
    if checkpoint.dtype is not None:
        return True
    if isinstance(checkpoint, MixtureCheckpoint):
        names = [name for names in checkpoint.config.mlps for name in names]
    else:
        names = [name.name for name in checkpoint.tensor_names if name.neuron_axis is not None]
    return len({checkpoint.stored[name].dtype for name in names}) == 1


def write_pruned(
    checkpoint: StreamedCheckpoint,
    choice: Choice,
    folder: Path,
    progress: Progress | None = None,
    *,
    pad_to: int = 1,
) -> tuple[StreamedCheckpoint, PruningPlan]:
    """Chooses neurons and writes what is kept as a Hugging Face folder, to the same bits as doing one after the other.

    Args:
      checkpoint: the dense model.
      choice: of its neurons.
      folder: an existing one, whose files are of no use if this fails.
      progress: called with what is being done, the bytes done and the bytes in all.
      pad_to: as of `write_huggingface`.

    Returns:
      The pruned checkpoint and the plan.

    Raises:
      OperationError: the disk refuses; the model's files cannot be read, have changed, or have NaN or Inf.
      RequestError: values too large for the dtype they are cast to; a plan or statistics of other weights.
    """
    with _kept_neurons(checkpoint, choice) as kept:
        old = choice.blank.remaining_layers

        def array(name: TensorName) -> NDArray[Any]:
            if name.neuron_axis is None:
                return shapes.array(name)
            return kept.matrix(old[int(name.path[1])], str(name.path[-1]))

        shapes = checkpoint.pruned(choice.blank)
        write_weights_of(shapes, folder, progress, pad_to=pad_to, array=array)
        kept.finish()
    plan = choice.plan()
    pruned = checkpoint.pruned(plan)
    write_assets(pruned, folder, pad_to)
    return pruned, plan


def write_pruned_mixture(
    checkpoint: MixtureCheckpoint, choice: Choice, folder: Path, progress: Progress | None = None
) -> tuple[MixtureCheckpoint, PruningPlan]:
    """As `write_pruned`, of a mixture of experts."""
    with _kept_neurons(checkpoint, choice) as kept:
        places = {
            tensor: (i, name)
            for i, tensors in enumerate(checkpoint.config.mlps)
            for tensor, name in zip(tensors, NEURON_AXES, strict=True)
        }

        def values(tensor: str) -> NDArray[Any]:
            if tensor not in places:
                return checkpoint.read(tensor)
            return kept.matrix(*places[tensor])

        checkpoint.pruned(choice.blank).write_weights(folder, progress, values)
        kept.finish()
    plan = choice.plan()
    pruned = checkpoint.pruned(plan)
    pruned.write_assets(folder)
    return pruned, plan


@contextlib.contextmanager
def _kept_neurons(checkpoint: StreamedCheckpoint | MixtureCheckpoint, choice: Choice) -> Iterator["KeptNeurons"]:
    with contextlib.closing(checkpoint.mlp_weights()) as weights:  # it reads ahead on threads, which end with it
        yield KeptNeurons(weights, choice)


class KeptNeurons:
    """What is kept of the MLPs of a model, each chosen when one of its matrices is first asked for.

    Args:
      weights: the matrices of one MLP after the other.
      choice: is shown each of them in this order.
    """

    def __init__(self, weights: Iterable[MLPWeights[NDArray[Any]]], choice: Choice):
        self._weights, self._choice, self._count = iter(weights), choice, 0
        self._held: dict[tuple[int, str], NDArray[Any]] = {}
        self._lock = threading.Lock()  # writers ask on several threads
        self._refused: Exception | None = None  # the others are told the same: what would follow is not theirs

    def matrix(self, mlp: int, name: str) -> NDArray[Any]:
        """A matrix of an MLP, by its index, cut to the neurons that are kept; each can be asked for once.

        Raises:
          OperationError: the files cannot be read; NaN or Inf.
        """
        with self._lock:
            if self._refused:
                raise self._refused
            try:
                while (mlp, name) not in self._held:
                    self._choose_next()
            except Exception as error:
                self._refused = error
                raise
            return self._held.pop((mlp, name))

    def finish(self) -> None:
        """Shows the choice the MLPs of which nothing was asked for: dropped layers have a say in the fingerprint."""
        with contextlib.suppress(StopIteration):
            while True:
                self._choose_next()

    def _choose_next(self) -> None:
        mlp = next(self._weights)
        kept = self._choice.keep(mlp)
        matrices = list(mlp)
        del mlp  # each matrix is let go as soon as it is cut
        for name, axis in NEURON_AXES.items():
            values = matrices.pop(0)
            if len(kept) == values.shape[axis]:
                self._held[self._count, name] = values
            elif len(kept):
                self._held[self._count, name] = values.take(kept, axis)
        self._count += 1
