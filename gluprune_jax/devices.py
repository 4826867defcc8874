"""Where a command computes: its options `--mesh`, `--device-memory` and `--distributed`, and what becomes of them."""

import argparse
from collections.abc import Callable, Sequence

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


def capacity(args: argparse.Namespace) -> int | None:
    """Bytes of one device, as the options say or as it says itself; None where it does not.

    Raises:
      RequestError: an option that is spelled wrongly.
    """
    return device_memory() if args.device_memory is None else parse_bytes(args.device_memory)


def plan(args: argparse.Namespace, model: Llama, uses: Sequence[Evaluation | Pruning], size: int | None) -> MemoryPlan:
    """What a model takes of each device of the mesh that the options ask for. Whether it fits is for `check`.

    Args:
      args: the options.
      model: may be abstract.
      uses: what the model is to do, the most demanding first: the first that fits is planned, or else the last. No
        sequence is longer than its window.
      size: bytes of a device, from `capacity`.

    Raises:
      RequestError: an option that is spelled wrongly.
    """
    asked = parse_mesh(args.mesh)
    # CPU devices share one memory: it is no reason to divide a model.
    shared = args.device_memory is None and jax.default_backend() == "cpu"
    for use in uses:
        if isinstance(use, Evaluation):
            use = use.within(model.config.max_position_embeddings)
        shape = asked or choose_mesh(model, jax.device_count(), None if shared else size, use)
        result = plan_memory(model, shape, use)
        if size is None or result.fits(size):
            break
    return result


def check(args: argparse.Namespace, model: Llama, planned: MemoryPlan, size: int | None) -> None:
    """Makes sure that a plan fits on its devices.

    Raises:
      RequestError: it does not; with those options of the command that would help.
    """
    options = {f"--{name.replace('_', '-')}" for name in vars(args)}
    if getattr(args, "stream", None) is not False:  # where it could stream and is not told otherwise, it does
        options.discard("--stream")
    if size is not None:
        check_fits(model, planned, size, options)


def chooses(args: argparse.Namespace, uses: Sequence[Evaluation | Pruning]) -> Callable[[Llama], Mesh | None]:
    """The choice of a mesh that `convert.load` takes. All processes must call this; it raises as `plan` and `check`."""
    # What is spelled wrongly is refused before any file is opened.
    parse_mesh(args.mesh)
    own = capacity(args)
    smallest = distributed.least(-1 if own is None else own)  # all must choose the same mesh
    size = None if smallest < 0 else smallest

    def choose(model: Llama) -> Mesh | None:
        planned = plan(args, model, uses, size)
        check(args, model, planned, size)
        if planned.mesh == MeshShape(1, 1) and jax.process_count() == 1:
            return None
        return make_mesh(planned.mesh, model.config.num_key_value_heads)

    return choose
