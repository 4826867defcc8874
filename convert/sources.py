"""Where models are read from: any source, opened as one thing.

`open_source` finds out what a name stands for (`_KINDS`, tried in order), opens it, and checks all but its weights.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from convert.checkpoint import Checkpoint, MeshChoice, Progress
from convert.demo import DEMOS, demo_path
from convert.gguf.config import find_mixture
from convert.gguf.file import read_header
from convert.huggingface.folder import HuggingFaceSource, open_huggingface, read_config_file
from convert.huggingface.hub import hub_snapshot, looks_like_hub_id
from convert.huggingface.mixture import MixtureCheckpoint, open_mixture_folder
from convert.huggingface.mixture_config import is_mixture
from convert.huggingface.safetensors import DTYPES
from convert.output import GGUF_FILE
from gluprune_jax.errors import GlupruneError, RequestError
from gluprune_jax.files.atomic import check_no_address
from gluprune_jax.files.object_store import Folder, folder_at, in_store, reaching
from gluprune_jax.files.orbax import is_orbax

if TYPE_CHECKING:
    from gluprune_jax.models.decoder import Decoder

DTYPE_NAMES = tuple(dtype.name for dtype in DTYPES.values())


class Source(Protocol):
    """An opened model: everything but its weights has been read and checked."""

    @property
    def abstract_model(self) -> "Decoder":
        """The model with shapes and dtypes in place of arrays, without storage padding."""

    @property
    def identity(self) -> str:
        """Tells the model from others of the same name, so that processes can find out that they read the same."""

    def load(self, progress: Progress | None = None, mesh: MeshChoice | None = None) -> Checkpoint:
        """Reads the weights.

        Args:
          progress: called with what is being done, the bytes done and the bytes in all.
          mesh: chooses the mesh that the weights are spread over; without one they go to the default device.

        Raises:
          RequestError: weights too large for the dtype they are cast to.
          OperationError: damaged files; NaN or Inf weights.
        """

    def stream(self) -> Checkpoint | None:
        """The model with its weights in their files until each is asked for; None where the format is loaded whole."""


def open_source(name: str | Path, dtype: str | None = None, revision: str | None = None) -> Source:
    """Opens a model by whatever name the user has for it.

    Args:
      name: see `convert.load`.
      dtype: what every weight is cast to as it is read, a name in `DTYPE_NAMES`; None keeps each as it is stored.
      revision: branch, tag or commit, for hub ids.

    Raises:
      RequestError: no such model, or one of a family, dtype or format that is not supported.
      OperationError: damaged files, tensors missing or too many, no network.
    """
    name, cast_to = str(name), _dtype_named(dtype)
    if not in_store(folder_at(name)):
        check_no_address(name)
    kind = _kind_of(name)
    if kind is None:
        raise RequestError(
            f"there is no model {name}: not a file, not a folder, not a hub id (owner/name) and not "
            f"{' or '.join(map(repr, DEMOS))}"
        )
    if revision is not None and kind is not _HUB_ID:
        raise RequestError(f"`revision` {revision} belongs to a hub id; {name} is not one")
    return kind.open(name, cast_to, revision)


def open_any(name: str | Path, dtype: str | None = None, revision: str | None = None) -> Source | MixtureCheckpoint:
    """As `open_source`; a mixture of experts is opened as `open_mixture` does.

    Raises:
      RequestError, OperationError: as they do.
    """
    name, cast_to = str(name), _dtype_named(dtype)
    if _kind_of(name) is not _HUB_ID:
        return open_mixture(name, dtype=dtype, revision=revision) or open_source(name, dtype, revision)
    folder = hub_snapshot(name, revision)  # once: the next call may give another commit
    return open_mixture_folder(folder, name, cast_to) if _holds_mixture(folder) else _in_snapshot(folder, name, cast_to)


def open_mixture(
    name: str | Path, *, dtype: str | None = None, revision: str | None = None
) -> MixtureCheckpoint | None:
    """Opens a mixture of experts, whose weights stay in their files: it can be scored, pruned and saved, and not run.

    Args:
      name: a Hugging Face folder, a hub id or a GGUF file.
      dtype: as for `open_source`.
      revision: as for `open_source`.

    Returns:
      The mixture; None where `name` stands for anything else.

    Raises:
      RequestError: a config, dtype or layout that is not supported.
      OperationError: damaged files, tensors missing or too many, no network.
    """
    name, cast_to = str(name), _dtype_named(dtype)
    kind = _kind_of(name)
    if kind is _HUB_ID:
        folder = hub_snapshot(name, revision)
        return open_mixture_folder(folder, name, cast_to) if _holds_mixture(folder) else None
    if revision is not None or not is_local_mixture(name):
        return None
    if kind is _FOLDER:
        return open_mixture_folder(_path(name), name, cast_to)
    from convert.gguf.reader import open_gguf_mixture  # here: it needs JAX, which a folder does not

    return open_gguf_mixture(_gguf_file(name), name, cast_to)


def is_local_mixture(name: str) -> bool:
    """Whether a name stands for a folder or GGUF file with a mixture of experts."""
    kind = _kind_of(name)
    if kind in (_GGUF, _GGUF_FOLDER):
        return _holds_gguf_mixture(_gguf_file(name))
    return kind is _FOLDER and _holds_mixture(_path(name))


def _gguf_file(name: str) -> Path:
    path = _path(name)
    return path / GGUF_FILE if path.is_dir() else path


def _holds_gguf_mixture(file: Path) -> bool:
    try:
        return _says_mixture(file, file.stat().st_mtime_ns)
    except (GlupruneError, OSError):  # as below
        return False


@functools.lru_cache(maxsize=1)
def _says_mixture(file: Path, modified: int) -> bool:
    # Commands ask twice, and a large vocabulary takes half a second.
    return find_mixture(read_header(file).fields) is not None


def _holds_mixture(folder: Path) -> bool:
    try:
        return is_mixture(read_config_file(folder))
    except GlupruneError:  # whoever loads it says what is wrong
        return False


def _dtype_named(dtype: str | None) -> np.dtype[Any] | None:
    if dtype is not None and dtype not in DTYPE_NAMES:
        raise RequestError(f"dtype {dtype!r} is not supported; choose from {', '.join(DTYPE_NAMES)}")
    return next((known for known in DTYPES.values() if known.name == dtype), None)


def loaded_whole(model: str) -> str | None:
    """What a model is whose weights cannot stay in their files until each is asked for; None if they can."""
    kind = _kind_of(model)
    return None if kind is None or is_local_mixture(model) else kind.loaded_whole


@dataclasses.dataclass(frozen=True)
class _Kind:
    """One kind of source.

    Attributes:
      is_one: whether a name stands for one.
      open: opens it, given the name, the dtype that weights are cast to, and the revision.
      loaded_whole: what it is, where its weights cannot stay in their files.
    """

    is_one: Callable[[str], bool]
    open: Callable[[str, np.dtype[Any] | None, str | None], Source]
    loaded_whole: str | None = None


def _kind_of(name: str) -> _Kind | None:
    return next((kind for kind in _KINDS if kind.is_one(name)), None)


def _path(name: str) -> Path:
    return Path(name).expanduser()


# --------------------------------------------------------------------------------------------- how they are opened


def _open_demo(name: str, dtype: np.dtype[Any] | None, revision: str | None) -> Source:
    return _opened_gguf(demo_path(name), f"{DEMOS[name].name} (demo)", dtype)


def _open_gguf(name: str, dtype: np.dtype[Any] | None, revision: str | None) -> Source:
    return _opened_gguf(_gguf_file(name), None, dtype)


def _open_gguf_folder(name: str, dtype: np.dtype[Any] | None, revision: str | None) -> Source:
    return _opened_gguf(_gguf_file(name), name, dtype)


def _opened_gguf(file: Path, name: str | None, dtype: np.dtype[Any] | None) -> Source:
    from convert.gguf.reader import open_gguf  # here: it needs JAX, which a folder does not

    return open_gguf(file, name, dtype)


def _not_gguf(name: str, dtype: np.dtype[Any] | None, revision: str | None) -> Source:
    raise RequestError(f"{_path(name)} is a file but not .gguf; give the folder of a Hugging Face checkpoint")


def _open_in_store(name: str, dtype: np.dtype[Any] | None, revision: str | None) -> Source:
    place = folder_at(name)
    with reaching(place):
        orbax = _orbax_folder(place)
        if orbax is None:
            raise RequestError(
                f"{place} is no Orbax checkpoint, holds none, or has safetensors beside it; to read anything else from "
                f"an object store, mount the bucket and give its folder, or copy"
            )
        return _opened_orbax(orbax, str(place), dtype)


def _open_orbax(name: str, dtype: np.dtype[Any] | None, revision: str | None) -> Source:
    orbax = _orbax_folder(_path(name))
    assert orbax is not None  # as `_is_orbax` has found
    return _opened_orbax(orbax, name, dtype)


def _opened_orbax(orbax: Folder, name: str, dtype: np.dtype[Any] | None) -> Source:
    from convert.orbax import OrbaxSource, open_orbax  # here: as above

    # Ours stand in a model folder, which holds the tokenizer; of others nothing beside them is known.
    return OrbaxSource(open_orbax(orbax), orbax.parent if orbax.name == "orbax" else orbax, name, dtype)


def _open_folder(name: str, dtype: np.dtype[Any] | None, revision: str | None) -> Source:
    return HuggingFaceSource(open_huggingface(_path(name), name, dtype))


def _open_hub_id(name: str, dtype: np.dtype[Any] | None, revision: str | None) -> Source:
    return _in_snapshot(hub_snapshot(name, revision), name, dtype)


def _in_snapshot(folder: Path, name: str, dtype: np.dtype[Any] | None) -> Source:
    return HuggingFaceSource(open_huggingface(folder, name, dtype), revision=folder.name)  # named for the commit


# ----------------------------------------------------------------------------------------- what a name stands for


def _is_orbax(name: str) -> bool:
    return _path(name).is_dir() and _orbax_folder(_path(name)) is not None


def _orbax_folder(path: Folder) -> Folder | None:
    """The Orbax checkpoint that a folder is, or holds without safetensors beside it."""
    if is_orbax(path):
        return path if in_store(path) else path.resolve()
    if is_orbax(path / "orbax") and not any(path.glob("*.safetensors")):
        return path / "orbax"
    return None


def _is_gguf_folder(name: str) -> bool:
    return (_path(name) / GGUF_FILE).is_file() and not any(_path(name).glob("*.safetensors"))


_GGUF = _Kind(lambda name: _path(name).is_file() and _path(name).suffix == ".gguf", _open_gguf, "a GGUF file")
_GGUF_FOLDER = _Kind(_is_gguf_folder, _open_gguf_folder, "a GGUF file")
_HUB_ID = _Kind(looks_like_hub_id, _open_hub_id)
_FOLDER = _Kind(lambda name: _path(name).is_dir(), _open_folder)

# The first that a name stands for: what is there on the disk comes before the hub.
_KINDS = (
    _Kind(lambda name: in_store(folder_at(name)), _open_in_store, "an Orbax checkpoint"),
    _Kind(lambda name: name in DEMOS, _open_demo, "a GGUF file"),
    _GGUF,
    _Kind(lambda name: _path(name).is_file(), _not_gguf),
    _Kind(_is_orbax, _open_orbax, "an Orbax checkpoint"),
    _GGUF_FOLDER,
    _FOLDER,
    _HUB_ID,
)
