"""Loads an Orbax checkpoint as a model and the caller's metadata, as only tests want them."""

from typing import Any

from convert.orbax import ShardingRule, open_orbax
from gluprune_jax.files.object_store import Folder
from gluprune_jax.models.decoder import Decoder


def load_orbax(
    path: Folder, shardings: ShardingRule | None = None, width_multiple: int | None = None
) -> tuple[Decoder, dict[str, Any]]:
    """What `save_orbax` wrote; for the arguments see `OpenedOrbax.load`."""
    opened = open_orbax(path)
    return opened.load(shardings, width_multiple), dict(opened.metadata)
