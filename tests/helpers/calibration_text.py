"""A text to calibrate on, and its windows."""

from pathlib import Path

import numpy as np

import convert
from convert.calibration_text import spread
from convert.tokenizer import encode_documents, load_tokenizer, separator
from gluprune_jax.data.documents import Document
from gluprune_jax.data.packing import pack

TEXT = "".join(f"The square of {i} is {i * i}. " for i in range(60))


def windows_of(folder: Path, text: str = TEXT) -> tuple[convert.Checkpoint, np.ndarray]:
    checkpoint = convert.load(folder / "model")
    tokenizer = load_tokenizer(checkpoint)
    windows = pack(encode_documents(tokenizer, [Document(text, "text", "")]), 32, separator(checkpoint, tokenizer))
    return checkpoint, windows[spread(len(windows), 640 // 32)]
