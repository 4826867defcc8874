"""Folders in an object store, `gs://bucket/folder`: what Orbax does not do there itself.

Orbax reads and writes arrays through TensorStore and everything else through `etils.epath`, which hands `gs://` to
gcsfs. What is written by the one would not show in the listings that the other keeps, so none are kept.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

from gluprune_jax.errors import GlupruneError, OperationError, RequestError

# A `pathlib.Path`, or the `etils.epath.Path` of an address: both have `/`, `name`, `exists`, `is_file`, `read_text`.
Folder: TypeAlias = Path | Any


def folder_at(name: str | os.PathLike[str]) -> Folder:
    """The folder of that name, in an object store if it is an address that we open. Nothing is looked at."""
    text = os.fspath(name)
    if address := re.match("gs:/+", text):  # of two slashes, `pathlib.Path` keeps one
        import fsspec.config
        from etils import epath

        fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)  # before epath opens it
        return epath.Path("gs://" + text[address.end() :])
    return Path(text)


def in_store(folder: Folder) -> bool:
    """Whether a folder is in an object store."""
    return not isinstance(folder, Path)


@contextlib.contextmanager
def reaching(folder: Folder) -> Iterator[None]:
    """Reports whatever the layers below raise about a folder in an object store as one sentence.

    Raises:
      RequestError: what opens addresses is not installed, or the address has no bucket.
      OperationError: the store refuses, or cannot be reached.
    """
    if in_store(folder):
        _file_system()
        if len(folder.parts) < 3:  # /, gs, bucket
            raise RequestError(f"{folder} names no bucket; write gs://bucket/folder")
    try:
        yield
    except GlupruneError:
        raise
    except Exception as error:
        if not in_store(folder):
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise OperationError(f"cannot use {folder}: {reason}") from error


def entries(folder: Folder) -> list[str]:
    """Names of what is in a folder, those of folders with a slash at the end; "" stands for an object in its place."""
    root = _key(folder)
    try:
        listed = _file_system().ls(root, detail=True)
    except FileNotFoundError:
        return []
    names = []
    for entry in listed:
        name, is_folder = entry["name"].rstrip("/").removeprefix(root).lstrip("/"), entry["type"] == "directory"
        if name or not is_folder:  # an empty object `folder/` stands for the folder itself
            names.append(name + "/" * is_folder)
    return sorted(names)


def sizes(folder: Folder) -> dict[str, int]:
    """The size of every object in a folder and below, by path from there."""
    root = _key(folder) + "/"
    return {name.removeprefix(root): entry["size"] for name, entry in _file_system().find(root, detail=True).items()}


def delete(folder: Folder) -> None:
    """Deletes a folder or an object."""
    _file_system().rm(_key(folder), recursive=True)


def _key(folder: Folder) -> str:
    return str(folder).removeprefix("gs://")


def _file_system() -> Any:
    import fsspec

    try:
        return fsspec.filesystem("gcs", use_listings_cache=False)  # whatever the configuration says
    except ImportError as error:
        raise RequestError("gs:// addresses are opened with gcsfs; pip install 'gluprune-jax[gcs]'") from error
