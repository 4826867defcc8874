"""Layers that a long repair has finished, kept on disk until all are, so that an interrupted one goes on from there."""

import contextlib
import hashlib
import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gluprune_jax.errors import GlupruneError
from gluprune_jax.files.atomic import write_file_atomic


class KeptLayers:
    """The finished layers of one piece of work, a file for each.

    Nothing here fails: what cannot be written or read is computed again.

    Args:
      folder: of all such work; each has a folder of its own there.
      about: all that the layers depend on, as JSON holds it: other work has another folder.
    """

    def __init__(self, folder: Path, about: Any):
        self._folder = folder / hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]

    def load(self, i: int) -> tuple[dict[str, NDArray[Any]], dict[str, Any]] | None:
        """The arrays of layer `i` by name and what goes with them; None if they are not there whole.

        Of dtypes that numpy does not know, such as bfloat16, come the bits, as its dtype of bytes of that size.
        """
        try:
            data = self._path(i).read_bytes()
        except OSError:  # mostly there is none yet
            return None
        if hashlib.sha256(data[32:]).digest() != data[:32]:
            return None
        with np.load(io.BytesIO(data[32:]), allow_pickle=False) as stored:
            arrays = dict(stored)
        return arrays, json.loads(arrays.pop("about").tobytes())

    def save(self, i: int, arrays: Mapping[str, NDArray[Any]], about: Mapping[str, Any]) -> None:
        """Keeps the arrays of layer `i`, and what goes with them as JSON holds it."""
        buffer = io.BytesIO()
        contents: dict[str, Any] = {**arrays, "about": np.frombuffer(json.dumps(about).encode(), np.uint8)}
        np.savez(buffer, **contents)
        data = buffer.getvalue()
        with contextlib.suppress(GlupruneError):  # nothing is lost but time
            write_file_atomic(self._path(i), hashlib.sha256(data).digest() + data, overwrite=True)

    def clear(self) -> None:
        """Removes them: the work is done."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, i: int) -> Path:
        return self._folder / f"layer-{i:04d}"
