"""Where models are written: formats, folders, and what may be replaced.

On a disk a folder takes its place by one rename (`gluprune_jax.files.atomic`). Object stores rename nothing: there a
model is loaded only if the object that is written last is there, and an old one loses that before anything else. A
process killed at any moment leaves the old model, the new one, or none.
"""

import contextlib
import fnmatch
import functools
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from gluprune_jax.errors import RequestError
from gluprune_jax.files import object_store
from gluprune_jax.files.atomic import already_exists, check_directory, check_file, staged_directory, staged_file
from gluprune_jax.files.object_store import Folder, folder_at, in_store
from gluprune_jax.files.orbax import COMMIT_FILE, is_orbax
from gluprune_jax.parallel.distributed import broadcast_from_main, is_main, synchronize_errors
from gluprune_jax.pruning.targets import check_pad_to

FORMATS = ("hf", "orbax", "gguf")
GGUF_FILE = "model.gguf"  # in an output folder

# All that a model folder written by us, or one downloaded from the Hub, may hold. `--overwrite` deletes a folder
# only if nothing else is in it, so that a wrong path can cost a model but never somebody's home.
MODEL_FILES = (
    "*.json",
    "*.safetensors",
    "*.gguf",
    "*.jinja",
    "*.txt",
    "*.model",
    "README.md",
    "LICENSE*",
    "USE_POLICY*",
    "NOTICE*",
)
MODEL_FOLDERS = ("orbax",)
CHAT_TEMPLATE_FOLDER = "additional_chat_templates"  # holds *.jinja, besides the template in chat_template.jinja


def parse_formats(text: str | None, output: Folder | None = None) -> list[str]:
    """Output formats from a comma-separated list.

    Args:
      text: the list; None for "gguf" where the output is a GGUF file by its name, and for "hf" elsewhere.
      output: what is to be written.

    Raises:
      RequestError: it names something else than `FORMATS`.
    """
    if text is None:
        return ["gguf"] if output is not None and is_gguf_file(output) else ["hf"]
    formats = list(dict.fromkeys(part.strip() for part in text.split(",")))
    if set(formats) - set(FORMATS):
        raise RequestError(f"`format` is {text!r}; choose from {', '.join(FORMATS)}, comma-separated")
    return formats


def is_gguf_file(output: str | Folder) -> bool:
    """Whether an output is a single GGUF file and no folder: its name says so."""
    return str(output).endswith(".gguf")


def check_format(output: str | Path, formats: Sequence[str]) -> None:
    """Refuses what is not written where `output` is.

    Raises:
      RequestError: safetensors or GGUF into an object store; something else than GGUF into a file.
    """
    if in_store(folder_at(output)) and set(formats) != {"orbax"}:
        refused = next(name for name in formats if name != "orbax")
        raise RequestError(
            f"{output} is in an object store, where `format` orbax is written and {refused} is not; give `format` "
            f"orbax, or mount the bucket and give its folder"
        )
    if is_gguf_file(output) and set(formats) != {"gguf"}:
        refused = next(name for name in formats if name != "gguf")
        raise RequestError(
            f"{output} is a GGUF file by its name, and `format` {refused} is written as a folder; give the name of a "
            f"folder, or `format` gguf"
        )


def check_padding(pad_to: int, formats: Sequence[str]) -> None:
    """Refuses padding that would be none.

    Raises:
      RequestError: `pad_to` is no such number; or none of the formats has padded widths.
    """
    check_pad_to(pad_to)
    if pad_to != 1 and set(formats) <= {"orbax"}:
        raise RequestError(
            f"`pad_to` {pad_to} has no effect with `format` {','.join(formats)}: Orbax has the true widths; leave it "
            f"out, or give `format` hf or gguf"
        )


def check_not_own_folder(model: str, output: Folder) -> None:
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
        raise RequestError(f"the output {output} is or holds the model itself; write to another place")


# ------------------------------------------------------------------------------------------- what may be replaced


def check_target(target: Folder, overwrite: bool) -> Folder:
    """Refuses an output that could not be written, before any work is done, and returns its full path.

    What killed runs left behind beside the target is put right first.

    Raises:
      RequestError: the target exists and `overwrite` is not given; or it is something else than a model folder
        (see `MODEL_FILES`), an empty folder or, where it is called so, a GGUF file; or it cannot be replaced at all
        (the working folder or one above it, a mount point).
      OperationError: the folder it goes into cannot be written to.
    """
    if object_store.in_store(target):
        with object_store.reaching(target):
            _refuse_to_lose_in_store(target, overwrite)
            _try_to_write_in_store(target)
        return target
    if is_gguf_file(target):
        file = check_file(target, overwrite)
        _refuse_to_lose_file(file)
        return file
    return check_directory(target, functools.partial(_refuse_to_lose, overwrite=overwrite))


def staged_model(target: Path, *, overwrite: bool) -> contextlib.AbstractContextManager[Path]:
    """A fresh folder that takes the place of `target` if the block ends without an exception.

    Args:
      target: the folder to write. A symbolic link is followed.
      overwrite: whether an existing model folder is replaced.

    Raises:
      RequestError, OperationError: as `check_target`; also what the block found out of the disk.
    """
    return staged_directory(target, functools.partial(_refuse_to_lose, overwrite=overwrite))


def staged_gguf(target: Path, *, overwrite: bool) -> contextlib.AbstractContextManager[Path]:
    """The path of a fresh file that takes the place of the GGUF file `target` if the block ends without an exception.

    Raises:
      RequestError, OperationError: as `check_target`; also what the block found out of the disk.
    """
    return staged_file(Path(check_target(target, overwrite)), overwrite=overwrite)


def begin_in_store(target: Folder, files: Mapping[str, bytes], *, overwrite: bool) -> None:
    """Makes way for a model in an object store and writes the small files of it. The Orbax checkpoint is to follow.

    Until that is whole nothing can be loaded, also from a folder that held a model before.

    Args:
      target: a folder in an object store.
      files: contents by name; config.json must be among them.
      overwrite: whether an existing model folder is replaced.

    Raises:
      RequestError: as `check_target`.
      OperationError: the store refuses, or cannot be reached.
    """
    with object_store.reaching(target):
        _refuse_to_lose_in_store(target, overwrite)  # again: hours may have passed
        commit = target / "orbax" / COMMIT_FILE
        if commit.exists():
            object_store.delete(commit)
        # config.json comes first and never goes: should this process be killed, `--overwrite` knows the folder by it.
        for name in object_store.entries(target):
            if name != "config.json":
                object_store.delete(target / name)
        for name in sorted(files, key=lambda name: name != "config.json"):
            (target / name).write_bytes(files[name])


def _refuse_to_lose(target: Path, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise RequestError(f"{target} is a file; choose another path for the output folder")
    if not overwrite:
        raise already_exists(target)
    entries = sorted(target.iterdir())
    foreign = [entry.name + "/" * entry.is_dir() for entry in entries if not _belongs_to_a_model(entry)]
    if foreign:
        raise _holds_foreign(target, foreign)
    if entries and not _is_model(target):
        raise RequestError(
            f"{target} is not replaced: it has no config.json with weights beside it, so it is no model folder; choose "
            "another path"
        )


def _begins_as_gguf(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(4) == b"GGUF"


def _refuse_to_lose_file(path: Path) -> None:
    try:
        if not path.exists() or _begins_as_gguf(path):
            return
    except OSError as error:
        raise RequestError(f"{path} cannot be read ({error.strerror}), and is not replaced") from error
    raise RequestError(f"{path} is not replaced: it is no GGUF file; choose another path")


def _refuse_to_lose_in_store(target: Folder, overwrite: bool) -> None:
    names = object_store.entries(target)
    if "" in names:
        raise RequestError(f"{target} is an object; choose another path for the output folder")
    if names and not overwrite:
        raise already_exists(target)
    known = (*MODEL_FILES, *(f"{folder}/" for folder in (*MODEL_FOLDERS, CHAT_TEMPLATE_FOLDER)))
    if foreign := [name for name in names if not any(fnmatch.fnmatchcase(name, pattern) for pattern in known)]:
        raise _holds_foreign(target, foreign)
    if names and "config.json" not in names:  # weights there need not be: a killed run may have left none
        raise RequestError(
            f"{target} is not replaced: it has no config.json, so it is no model folder; choose another path"
        )


def _holds_foreign(target: Folder, names: Sequence[str]) -> RequestError:
    more = f" and {len(names) - 1} more" * (len(names) > 1)
    return RequestError(
        f"{target} is not replaced: it holds {names[0]}{more}, which is no part of a model folder; move it away or "
        "choose another path"
    )


def _is_model(folder: Path) -> bool:
    files = any(folder.glob("*.safetensors")) or any(folder.glob("*.gguf"))
    weights = files or any((folder / name).is_dir() for name in MODEL_FOLDERS)
    return weights and (folder / "config.json").is_file()


def _belongs_to_a_model(entry: Path) -> bool:
    if entry.is_dir() and entry.name == CHAT_TEMPLATE_FOLDER:
        return all(child.suffix == ".jinja" and child.is_file() for child in entry.iterdir())
    if entry.is_dir():
        return entry.name in MODEL_FOLDERS and is_orbax(entry)
    return any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in MODEL_FILES)


def _try_to_write_in_store(target: Folder) -> None:
    # It also finds a bucket that is missing, which Orbax would try to make.
    # Always the same one, so that the next run takes away what a killed one has left.
    probe = target.parent / ".gluprune-probe"
    probe.write_bytes(b"")
    with contextlib.suppress(FileNotFoundError):  # another run has
        object_store.delete(probe)


# ------------------------------------------------------------------------------------------ several processes


@contextlib.contextmanager
def shared_stage(output: Path, *, overwrite: bool, all_write: bool) -> Iterator[Path]:
    """`staged_model` for all processes: the first makes the folder and puts it into place.

    Args:
      output: the folder to write.
      overwrite: whether an existing model folder is replaced.
      all_write: refuses a folder that is not seen by all processes.

    Raises:
      RequestError, OperationError: as `staged_model`, on every process.
    """
    with synchronize_errors(), contextlib.ExitStack() as stack:
        stage = None
        with synchronize_errors():
            if is_main():
                stage = stack.enter_context(staged_model(output, overwrite=overwrite))
        stage = Path(os.fsdecode(broadcast_from_main(os.fsencode(stage or ""))))
        with synchronize_errors():
            if all_write and not stage.is_dir():
                raise RequestError(
                    f"{output} is not on storage that all processes share: what the first one made there is not to be "
                    f"seen on {socket.gethostname()}; Orbax writes from all of them, so choose a shared folder, or "
                    f"`format` hf"
                )
        with synchronize_errors():
            yield stage
