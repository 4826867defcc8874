"""Between other people's files and our model: Hugging Face safetensors, Orbax and GGUF, each both ways."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convert.checkpoint import Checkpoint
    from convert.gguf.export import GGUFOptions
    from convert.huggingface.mixture import MixtureCheckpoint
    from convert.loaded import LoadedCheckpoint
    from convert.sources import open_mixture
    from convert.store import describe, load, save

__all__ = [
    "Checkpoint",
    "GGUFOptions",
    "LoadedCheckpoint",
    "MixtureCheckpoint",
    "describe",
    "load",
    "open_mixture",
    "save",
]

# Where each of these is: they are imported when they are first asked for, as those of `gluprune_jax` are.
_HOME = {
    "Checkpoint": "checkpoint",
    "LoadedCheckpoint": "loaded",
    "GGUFOptions": "gguf.export",
    "MixtureCheckpoint": "huggingface.mixture",
    "open_mixture": "sources",
    "describe": "store",
    "load": "store",
    "save": "store",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
