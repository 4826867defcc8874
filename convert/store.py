"""Loading a model by whatever name the user has for it, and saving one as an output folder.

An output folder is a Hugging Face folder that stock `transformers` loads, an Orbax checkpoint in its sub-folder
`orbax/`, a GGUF file `model.gguf`, or several of these side by side. A GGUF file is also written by itself.
"""

import contextlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from convert.checkpoint import Checkpoint, MeshChoice, Progress
from convert.gguf.export import GGUFOptions, prepare_gguf
from convert.gguf.quantize import quantize_into
from convert.gguf.writer import GGUFPlan, write_gguf
from convert.huggingface.folder import write_assets, write_huggingface
from convert.huggingface.mixture import MixtureCheckpoint
from convert.huggingface.one_pass import write_pruned, write_pruned_mixture
from convert.huggingface.streamed import StreamedCheckpoint
from convert.output import (
    GGUF_FILE,
    begin_in_store,
    check_format,
    check_padding,
    is_gguf_file,
    parse_formats,
    shared_stage,
    staged_gguf,
    staged_model,
)
from convert.sources import Source, open_any, open_source
from gluprune_jax.errors import RequestError
from gluprune_jax.files.object_store import Folder, folder_at, in_store
from gluprune_jax.parallel.distributed import check_same, is_joined, is_main, process_count, synchronize_errors
from gluprune_jax.pruning.one_pass import Choice
from gluprune_jax.pruning.plan import PruningPlan

if TYPE_CHECKING:
    from gluprune_jax.models.decoder import Decoder


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
        shapes and dtypes are known yet, it gives a mesh of `gluprune_jax.parallel.mesh`, or None for the default
        device. Given a choice, every process must call `load`, each reads the parts of its own devices, and if one
        fails all do. Weights that `stream` leaves in their files are on no mesh.

    Raises:
      RequestError: no such model, or one of a family, dtype or format that is not supported.
      OperationError: damaged files, tensors missing or too many, NaN or Inf weights, no network.
    """
    with _together(mesh):  # by itself: Orbax makes processes wait for each other while it loads
        source = open_source(name, dtype, revision)
    return _loaded(source, name, stream, progress, mesh)


def load_or_open(
    name: str | Path,
    *,
    dtype: str | None = None,
    revision: str | None = None,
    stream: bool = False,
    progress: Progress | None = None,
    mesh: MeshChoice | None = None,
) -> Checkpoint | MixtureCheckpoint:
    """As `load`; a mixture of experts stays in its files, whatever `stream` and `mesh` say (see `open_mixture`)."""
    with _together(mesh):
        source = open_any(name, dtype, revision)
    return source if isinstance(source, MixtureCheckpoint) else _loaded(source, name, stream, progress, mesh)


def _together(mesh: MeshChoice | None) -> contextlib.AbstractContextManager[None]:
    return synchronize_errors() if mesh else contextlib.nullcontext()


def _loaded(
    source: Source, name: str | Path, stream: bool, progress: Progress | None, mesh: MeshChoice | None
) -> Checkpoint:
    if mesh:
        check_same(f"the model {name}", [source.identity.encode(errors="backslashreplace")])
    with _together(mesh):
        streamed = source.stream() if stream else None
        return source.load(progress, mesh) if streamed is None else streamed


def describe(name: str | Path, *, dtype: str | None = None, revision: str | None = None) -> "Decoder":
    """The model with shapes and dtypes in place of arrays: of the files no weight is read.

    Raises:
      RequestError, OperationError: as `load`, as far as headers show it.
    """
    return open_source(name, dtype, revision).abstract_model


def save(
    checkpoint: Checkpoint | MixtureCheckpoint,
    output: str | Path,
    *,
    formats: Sequence[str] = ("hf",),
    overwrite: bool = False,
    extra_files: Mapping[str, str] | None = None,
    gguf: GGUFOptions | None = None,
    pad_to: int = 1,
    progress: Progress | None = None,
) -> tuple[str, ...]:
    """Writes a model as a folder or a GGUF file, whole or not at all.

    With several processes all of them must call it. The first one writes, and all write Orbax, each the parts of its
    own devices, for which the folder must be on storage that they share.

    Args:
      checkpoint: the model and what travels with it.
      output: the folder to make; for Orbax alone also in an object store (`gs://bucket/folder`); for GGUF alone also a
        file, whose name ends in `.gguf`.
      formats: some of "hf" (safetensors that stock `transformers` loads), "orbax" (in the sub-folder `orbax`) and
        "gguf" (in the folder as `model.gguf`).
      overwrite: replaces a model folder or GGUF file that is there.
      extra_files: text files to put beside the weights, by name (model card, plan), where the output is a folder.
      gguf: how a GGUF file is written; None for the defaults.
      pad_to: the width of the layers in safetensors and GGUF files is rounded up to a multiple of this, with neurons of
        zeros: the model computes the same, and reading it takes them away. Orbax always has the true widths.
      progress: called with what is being done, the bytes done and the bytes in all.

    Returns:
      What of a GGUF file is stored in another way than one would expect, one sentence each.

    Raises:
      RequestError: an unknown format, or one that is not written there; `output` exists (and is not a model folder, or
        `overwrite` is false); with several processes, GGUF, or Orbax of a model on one device or into a folder that
        they do not share; GGUF of a model that llama.cpp has no architecture or no form of its tokenizer for; Orbax
        or padding of a mixture of experts; a `pad_to` that is none, or for Orbax alone.
      OperationError: the disk refuses.
    """
    check_padding(pad_to, parse_formats(",".join(formats)))
    if isinstance(checkpoint, MixtureCheckpoint):
        if pad_to != 1:
            raise RequestError("`pad_to` pads no experts: transformers has one width for them; give `multiple_of`")
        return _save_mixture(checkpoint, output, formats, overwrite, extra_files or {}, gguf or GGUFOptions(), progress)
    if isinstance(checkpoint, StreamedCheckpoint) and "orbax" in formats:
        checkpoint = checkpoint.load(progress)
    if "orbax" in formats and is_joined() and not _is_on_mesh(checkpoint):
        raise RequestError(
            f"with {process_count()} processes an Orbax checkpoint is written from a model that lies on a mesh of "
            f"their devices, and this one lies on one device; give `mesh`, or write `format` hf"
        )
    check_format(output, formats)
    gguf = gguf or GGUFOptions()
    plan = prepare_gguf(checkpoint, gguf, pad_to) if "gguf" in formats else None
    if plan is not None and is_gguf_file(output):
        with staged_gguf(Path(output), overwrite=overwrite) as file:
            _write_gguf(checkpoint, plan, file, gguf.quantize, progress)
        return plan.notes
    folder = folder_at(output)
    files = {name: text.encode() for name, text in (extra_files or {}).items()}
    if in_store(folder):
        with synchronize_errors():
            if is_main():
                begin_in_store(folder, _assets(checkpoint) | files, overwrite=overwrite)
        _write_orbax(checkpoint, folder, progress)  # last: nothing is loaded before it is whole
        return ()
    with shared_stage(folder, overwrite=overwrite, all_write="orbax" in formats) as folder:
        if "hf" in formats:
            write_huggingface(checkpoint, folder, progress, pad_to=pad_to)
        elif is_main():
            write_assets(checkpoint, folder)
        if "orbax" in formats:
            _write_orbax(checkpoint, folder, progress)
        if plan is not None:
            _write_gguf(checkpoint, plan, folder / GGUF_FILE, gguf.quantize, progress)
        if is_main():
            for name, content in files.items():
                (folder / name).write_bytes(content)
    return () if plan is None else plan.notes


def save_pruned(
    checkpoint: StreamedCheckpoint | MixtureCheckpoint,
    choice: Choice,
    output: str | Path,
    *,
    overwrite: bool = False,
    extra_files: Callable[[Checkpoint | MixtureCheckpoint, PruningPlan], Mapping[str, str]] | None = None,
    pad_to: int = 1,
    progress: Progress | None = None,
) -> tuple[Checkpoint | MixtureCheckpoint, PruningPlan]:
    """Prunes from file to file: chooses neurons and writes them as a Hugging Face folder, whole or not at all.

    The model's files are read once; scoring, `pruned` and `save` read its MLPs twice, and write the same bits.

    Args:
      checkpoint: the dense model, whose weights are in their files (see `can_read_once`).
      choice: of its neurons: `gluprune_jax.pruning.one_pass.Ranking` or `Replay`.
      output, overwrite, pad_to, progress: as for `save`.
      extra_files: gives text files to put beside the weights, by name, of the pruned model and the plan.

    Returns:
      The pruned model and the plan.

    Raises:
      RequestError, OperationError: as `save`; also a plan or statistics of other weights, for which nothing is left
        behind either.
    """
    check_padding(pad_to, ["hf"])
    check_format(output, ["hf"])
    with staged_model(Path(output), overwrite=overwrite) as folder:
        pruned: Checkpoint | MixtureCheckpoint
        if isinstance(checkpoint, MixtureCheckpoint):
            pruned, plan = write_pruned_mixture(checkpoint, choice, folder, progress)
        else:
            pruned, plan = write_pruned(checkpoint, choice, folder, progress, pad_to=pad_to)
        for name, text in (extra_files(pruned, plan) if extra_files else {}).items():
            (folder / name).write_bytes(text.encode())
    return pruned, plan


def _write_gguf(
    checkpoint: Checkpoint | MixtureCheckpoint,
    plan: GGUFPlan,
    path: Path,
    quantize: str | None,
    progress: Progress | None,
) -> None:
    if quantize is None:
        write_gguf(checkpoint, plan, path, progress=progress)
        return
    plain = path.with_name(f"{path.stem}-unquantised.gguf")
    write_gguf(checkpoint, plan, plain, progress=progress)
    quantize_into(plain, path, quantize)
    plain.unlink()


def _save_mixture(
    checkpoint: MixtureCheckpoint,
    output: str | Path,
    formats: Sequence[str],
    overwrite: bool,
    extra_files: Mapping[str, str],
    gguf: GGUFOptions,
    progress: Progress | None,
) -> tuple[str, ...]:
    if "orbax" in formats:
        raise RequestError(
            f"`format` orbax is written of dense models, and {checkpoint.source} is a mixture of experts; give "
            f"`format` hf or gguf"
        )
    check_format(output, formats)
    plan = prepare_gguf(checkpoint, gguf) if "gguf" in formats else None
    if plan is not None and is_gguf_file(output):
        with staged_gguf(Path(output), overwrite=overwrite) as file:
            _write_gguf(checkpoint, plan, file, gguf.quantize, progress)
        return plan.notes
    with shared_stage(folder_at(output), overwrite=overwrite, all_write=False) as folder:
        if is_main():
            if "hf" in formats:
                checkpoint.write_weights(folder, progress, checkpoint.values)
            checkpoint.write_assets(folder)
            if plan is not None:
                _write_gguf(checkpoint, plan, folder / GGUF_FILE, gguf.quantize, progress)
            for name, text in extra_files.items():
                (folder / name).write_bytes(text.encode())
    return () if plan is None else plan.notes


def _write_orbax(checkpoint: Checkpoint, folder: Folder, progress: Progress | None) -> None:
    metadata = {"hf_config": dict(checkpoint.hf_config), "history": list(checkpoint.history)}
    from convert.orbax import save_orbax  # here: it needs JAX

    nbytes = checkpoint.num_bytes()
    if progress:
        progress("writing Orbax", 0, nbytes)
    with synchronize_errors():
        save_orbax(folder / "orbax", checkpoint.model, metadata)
    if progress:
        progress("writing Orbax", nbytes, nbytes)


def _is_on_mesh(checkpoint: Checkpoint) -> bool:
    from gluprune_jax.parallel.mesh import mesh_of  # here: as above

    return mesh_of(checkpoint.model) is not None


def _assets(checkpoint: Checkpoint) -> dict[str, bytes]:
    """What `write_assets` writes, by name."""
    with tempfile.TemporaryDirectory() as name:
        write_assets(checkpoint, Path(name))
        files = [path for path in Path(name).rglob("*") if path.is_file()]
        return {path.relative_to(name).as_posix(): path.read_bytes() for path in files}
