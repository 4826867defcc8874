"""Between other people's files and our model: Hugging Face safetensors, Orbax and GGUF, each both ways."""

from convert.checkpoint import Checkpoint
from convert.gguf.export import GGUFOptions
from convert.huggingface.mixture import MixtureCheckpoint
from convert.sources import open_mixture
from convert.store import describe, load, save

__all__ = ["Checkpoint", "GGUFOptions", "MixtureCheckpoint", "describe", "load", "open_mixture", "save"]
