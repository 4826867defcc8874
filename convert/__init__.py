"""Between other people's files and our model: Hugging Face safetensors both ways, GGUF in, Orbax both ways."""

from convert.checkpoint import Checkpoint
from convert.store import describe, load, save

__all__ = ["Checkpoint", "describe", "load", "save"]
