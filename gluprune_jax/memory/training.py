"""What recovery training takes of each device's memory, worked out before anything is loaded.

Weights, master weights, moments and gradients are exact; the activations are an estimate (`_activations`).
"""

import dataclasses
import math
from collections.abc import Callable

import jax
from jax.sharding import AbstractMesh, Mesh

from gluprune_jax.errors import RequestError, format_bytes
from gluprune_jax.memory.plan import USABLE, parameter_bytes
from gluprune_jax.models.config import ModelConfig
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.models.parameters import abstract_model
from gluprune_jax.parallel.mesh import MeshShape, axis_sizes, make_mesh
from gluprune_jax.parallel.sharding import MESH_AXES
from gluprune_jax.training.recovery import Recipe
from gluprune_jax.training.step import LOGITS_TOKENS


@dataclasses.dataclass(frozen=True)
class TrainingMemory:
    """Bytes on each device.

    Attributes:
      mesh: replicas, and devices of each.
      parts: what takes how much.
    """

    mesh: MeshShape
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """All bytes on one device."""
        return sum(self.parts.values())

    def check_fits(self, capacity: int) -> None:
        """Makes sure that devices of `capacity` bytes hold it.

        Raises:
          RequestError: they do not.
        """
        if self.total > USABLE * capacity:
            spelled = ", ".join(f"{name} {format_bytes(size)}" for name, size in self.parts.items() if size)
            raise RequestError(
                f"on the mesh {self.mesh} training needs {format_bytes(self.total)} of each device ({spelled}), and of "
                f"the {format_bytes(capacity)} that one has at most {float(USABLE):.0%} are used; try `train` lora, a "
                f"smaller `batch_size` with more `accumulate`, a smaller `sequence_length`, or a `mesh` with a "
                f"larger model="
            )


def plan_training(
    student: Decoder, teacher: Decoder | None, shape: MeshShape, recipe: Recipe, sequence_length: int
) -> TrainingMemory:
    """What training takes of each device of a mesh.

    Args:
      student: may be abstract; its dtypes count.
      teacher: the same.
      shape: of the mesh.
      recipe: how to train.
      sequence_length: tokens of a window.
    """
    config, what = student.config, recipe.trainable.what
    mesh = AbstractMesh(axis_sizes(shape, config.num_key_value_heads), MESH_AXES)

    def held(model: Decoder, is_counted: Callable[[tuple[object, ...]], bool] = lambda path: True) -> int:
        padded = dataclasses.replace(model.config, width_multiple=shape.model)
        return sum(size for path, size in parameter_bytes(model, padded, mesh) if is_counted(path))

    def is_trained(path: tuple[object, ...]) -> bool:
        return what == "all" or (what == "mlp" and "mlp" in path)

    masters = held(abstract_model(config), is_trained)  # float32
    if what == "lora":
        D, N, K, H = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        sides = sum(2 * D + 2 * N * H + 2 * (D + K * H) + 3 * (D + size) for size in config.intermediate_sizes)
        masters = 4 * recipe.trainable.rank * sides
    return TrainingMemory(
        shape,
        {
            "weights": held(student, lambda path: not is_trained(path)),
            "teacher": 0 if teacher is None else held(teacher),
            "master weights and moments": 3 * masters,
            "gradients": masters * (2 if recipe.accumulate > 1 else 1),
            "activations": _activations(
                config, None if teacher is None else teacher.config, shape, recipe, sequence_length
            ),
        },
    )


def _activations(
    config: ModelConfig, teacher: ModelConfig | None, shape: MeshShape, recipe: Recipe, sequence_length: int
) -> int:
    """What a micro-batch holds, roughly: the inputs of all layers (of the teacher's too, where its hidden states are
    compared), all of one layer in its backward pass, and six arrays of float32 logits.

    All of one layer: four arrays of float32 scores, eight of the MLP's width, twelve of the hidden size, and a
    float32 copy and gradient of its matrices.
    """
    itemsize = 2 if recipe.compute_dtype == "bfloat16" else 4
    rows = math.ceil(recipe.batch_size / shape.data)
    tokens, width = rows * sequence_length, max((teacher or config).intermediate_sizes)
    streams = (config.num_hidden_layers + 2) * (2 if recipe.objective.hidden else 1)
    inputs = streams * tokens * config.hidden_size * itemsize
    scores = 4 * 4 * rows * config.num_attention_heads * sequence_length**2
    matrices = 2 * 4 * 3 * config.hidden_size * max(config.intermediate_sizes)
    layer = tokens * itemsize * (8 * width // shape.model + 12 * config.hidden_size)
    logits = 6 * 4 * LOGITS_TOKENS * config.vocab_size
    return inputs + layer + (scores + matrices + logits) // shape.model


def choose_training_mesh(
    student: Decoder,
    teacher: Decoder | None,
    recipe: Recipe,
    sequence_length: int,
    *,
    asked: MeshShape | None,
    capacity: int | None,
    is_shared: bool,
) -> Mesh | None:
    """The mesh to train on: as many replicas as fit and divide the batch.

    Args:
      student: may be abstract.
      teacher: the same.
      recipe: how to train.
      sequence_length: tokens of a window.
      asked: the mesh that the user names.
      capacity: bytes of each device, where they are known.
      is_shared: whether devices share one memory, which is then no reason to divide a model.

    Returns:
      None for one device.

    Raises:
      RequestError: what was asked for does not fit, nor anything else does.
    """
    devices = jax.device_count()
    sizes = [size for size in range(1, devices + 1) if devices % size == 0]
    shapes = [MeshShape(math.gcd(devices // size, recipe.batch_size), size) for size in sizes]
    if jax.process_count() > 1:  # all devices must be used
        shapes = [shape for shape in shapes if shape.devices == devices] or shapes[-1:]
    plans = [
        plan_training(student, teacher, shape, recipe, sequence_length) for shape in ([asked] if asked else shapes)
    ]
    plan = min(plans, key=lambda plan: plan.total)
    if is_shared or capacity is None:
        plan = plans[0]
    elif fitting := [plan for plan in plans if plan.total <= USABLE * capacity]:
        plan = fitting[0]
    if capacity is not None:
        plan.check_fits(capacity)
    if plan.mesh == MeshShape(1, 1) and jax.process_count() == 1:
        return None
    return make_mesh(plan.mesh, student.config.num_key_value_heads)
