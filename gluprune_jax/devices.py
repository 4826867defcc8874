"""Where a command computes: its options `--mesh`, `--device-memory` and `--distributed`, and what becomes of them."""

import argparse
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from gluprune_jax import distributed
from gluprune_jax.memory import (
    Evaluation,
    MemoryPlan,
    Pruning,
    check_fits,
    choose_mesh,
    device_memory,
    parse_bytes,
    plan_memory,
)
from gluprune_jax.mesh import MeshShape, make_mesh, parse_mesh
from gluprune_jax.model import Llama


def add_arguments(parser: argparse.ArgumentParser, auto: str) -> None:
    """Adds the options to a command line; `auto` says what `--mesh auto` means to the command."""
    group = parser.add_argument_group("devices")
    group.add_argument(
        "--mesh",
        default="auto",
        metavar="MESH",
        help=f"such as data=2,model=4: replicas of the model, and the devices that each is divided over; auto: {auto}",
    )
    group.add_argument(
        "--device-memory",
        metavar="SIZE",
        help="plan with devices of so much memory, such as 16GiB (otherwise those that are there)",
    )
    distributed.add_arguments(parser)


def plan(args: argparse.Namespace, model: Llama, use: Evaluation | Pruning) -> tuple[MemoryPlan, int | None]:
    """What a model takes of each device of the mesh that the options ask for, and what a device has, if it is known.

    Args:
      args: the options.
      model: may be abstract.
      use: what the model is to do; no sequence is longer than its window.

    Raises:
      RequestError: options that are spelled wrongly, or memory that does not suffice; with what would.
    """
    if isinstance(use, Evaluation):
        use = use.within(model.config.max_position_embeddings)
    shape = parse_mesh(args.mesh)
    capacity = device_memory() if args.device_memory is None else parse_bytes(args.device_memory)
    if shape is None:
        # CPU devices share one memory: it is no reason to divide a model.
        shared = args.device_memory is None and jax.default_backend() == "cpu"
        shape = choose_mesh(model, jax.device_count(), None if shared else capacity, use)
    result = plan_memory(model, shape, use)
    if capacity is not None:
        check_fits(model, result, capacity)
    return result, capacity


def chooses(args: argparse.Namespace, use: Evaluation | Pruning) -> Callable[[Llama], Mesh | None]:
    """The choice of a mesh that `convert.load` takes; raises as `plan` does."""
    # What is spelled wrongly is refused before any file is opened.
    parse_mesh(args.mesh)
    if args.device_memory is not None:
        parse_bytes(args.device_memory)

    def choose(model: Llama) -> Mesh | None:
        shape = plan(args, model, use)[0].mesh
        if shape == MeshShape(1, 1) and jax.process_count() == 1:
            return None
        return make_mesh(shape, model.config.num_key_value_heads)

    return choose
