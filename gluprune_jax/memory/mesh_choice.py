"""The mesh of a model: the one that was asked for, or the one that what it is to do fits on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from gluprune_jax.parallel import distributed
from gluprune_jax.parallel.machine import device_memory, parse_bytes

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from gluprune_jax.memory.plan import Evaluation, MemoryPlan, Pruning
    from gluprune_jax.models.decoder import Decoder

# What may make a model fit, as parameters of whoever asks.
REMEDIES = ("mesh", "stream", "batch_size", "context_length", "dtype")


@dataclasses.dataclass(frozen=True)
class MeshRequest:
    """Where a model is to be.

    Attributes:
      mesh: sizes such as "data=2,model=4", or "auto": chosen by what the model is to do.
      device_memory: plans with devices of so much memory, such as "16GiB"; None for those that are there.
      remedies: what can be changed if the model does not fit, of `REMEDIES`: an error proposes no others.
    """

    mesh: str = "auto"
    device_memory: str | None = None
    remedies: Collection[str] = REMEDIES

    def capacity(self) -> int | None:
        """Bytes of one device, as asked for or as it says itself; None where it does not.

        Raises:
          RequestError: a size that is spelled wrongly.
        """
        return device_memory() if self.device_memory is None else parse_bytes(self.device_memory)

    def plan(self, model: Decoder, uses: Sequence[Evaluation | Pruning], size: int | None) -> MemoryPlan:
        """What a model takes of each device of the mesh. Whether it fits is for `check`.

        Args:
          model: may be abstract.
          uses: what the model is to do, the most demanding first: the first that fits is planned, or else the last. No
            sequence is longer than its context.
          size: bytes of a device, from `capacity`.

        Raises:
          RequestError: a mesh that is spelled wrongly.
        """
        import jax  # here, as in what follows: a request alone needs no JAX

        from gluprune_jax.memory.plan import Evaluation, choose_mesh, plan_memory
        from gluprune_jax.parallel.mesh import parse_mesh

        asked = parse_mesh(self.mesh)
        # CPU devices share one memory: it is no reason to divide a model.
        shared = self.device_memory is None and jax.default_backend() == "cpu"
        for use in uses:
            if isinstance(use, Evaluation):
                use = use.within(model.config.context_length)
            shape = asked or choose_mesh(model, jax.device_count(), None if shared else size, use)
            result = plan_memory(model, shape, use)
            if size is None or result.fits(size):
                break
        return result

    def check(self, model: Decoder, planned: MemoryPlan, size: int | None) -> None:
        """Makes sure that a plan fits on its devices.

        Raises:
          RequestError: it does not; with those changes that would help.
        """
        from gluprune_jax.memory.plan import check_fits

        if size is not None:
            check_fits(model, planned, size, self.remedies)


def mesh_chooser(request: MeshRequest, uses: Sequence[Evaluation | Pruning]) -> Callable[[Decoder], Mesh | None]:
    """The choice of a mesh that `convert.load` takes. All processes must call this.

    Raises:
      RequestError: as `MeshRequest.plan` and `MeshRequest.check`, at once or when the choice is made.
    """
    from gluprune_jax.parallel.mesh import MeshShape, make_mesh, parse_mesh

    # What is spelled wrongly is refused before any file is opened.
    parse_mesh(request.mesh)
    own = request.capacity()
    smallest = distributed.min_over_processes(-1 if own is None else own)  # all must choose the same mesh
    size = None if smallest < 0 else smallest

    def choose(model: Decoder) -> Mesh | None:
        planned = request.plan(model, uses, size)
        request.check(model, planned, size)
        if planned.mesh == MeshShape(1, 1) and not distributed.is_joined():
            return None
        return make_mesh(planned.mesh, model.config.num_key_value_heads)

    return choose
