"""Orbax checkpoints that describe themselves: the parameters, the architecture and the caller's own metadata.

    <checkpoint>/                 an Orbax v1 checkpoint
      params/                     nested dictionary of `nnx.Param` arrays: layers / 0 / mlp / gate_proj
      _CHECKPOINT_METADATA        holds, as custom metadata, format, version, config and the caller's metadata
      files.json                  ours, written last: the size of every other file

The folder may be an `etils.epath.Path` in an object store. Orbax renames nothing there: `files.json` alone says that
all is written.

Orbax answers a missing or shortened file with hundreds of log lines and an error that names none; `files.json` lets
us name it. It says nothing about bytes changed in place, which cost a full read to find.
"""

import contextlib
import dataclasses
import gc
import json
import logging
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from gluprune_jax.errors import OperationError, RequestError
from gluprune_jax.model import Llama, Llama3Rope, ModelConfig, abstract_model
from gluprune_jax.object_store import Folder, in_store, sizes

_FORMAT = "gluprune-orbax"
_VERSION = 1
_ITEM = "params"
COMMIT_FILE = "files.json"
_ORBAX_MARKER = "_CHECKPOINT_METADATA"

# (path of a parameter, such as ("layers", 3, "mlp", "gate_proj"), its stored shape and dtype) -> its sharding
ShardingRule = Callable[[tuple[Any, ...], jax.ShapeDtypeStruct], Sharding]


def is_orbax(path: Folder) -> bool:
    """Whether `path` is the folder of an Orbax checkpoint, ours or not; on a disk, of one that is committed."""
    return (path / _ORBAX_MARKER).is_file()


def save_orbax(path: Folder, model: Llama, metadata: Mapping[str, Any]) -> None:
    """Saves the parameters of `model`, as stored, with its config.

    Call it on every process. It returns when all is on the disk.

    Args:
      path: a folder that does not exist.
      model: arrays of any dtype and sharding.
      metadata: JSON to keep beside the arrays. The keys format, version and config are taken.

    Raises:
      RequestError: `path` exists.
      OperationError: it cannot be written.
    """
    from orbax.checkpoint import v1 as ocp  # here: it costs a third of a second, to those who use it

    path = _absolute(path)
    if path.exists():
        raise RequestError(f"{path} exists; an Orbax checkpoint is written to a new folder")
    own = {"format": _FORMAT, "version": _VERSION, "config": dataclasses.asdict(model.config)}
    if taken := sorted(own.keys() & metadata.keys()):
        raise ValueError(f"metadata has the keys {taken}, which the checkpoint uses itself")
    arrays = {_names(at): variable.get_value() for at, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    with calling_orbax(f"cannot write the Orbax checkpoint {path}"):
        ocp.save_checkpointables(path, {_ITEM: _nested(arrays)}, custom_metadata={**metadata, **own})
        if jax.process_index() == 0:
            (path / COMMIT_FILE).write_text(json.dumps(_sizes(path), indent=1), encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class OpenedOrbax:
    """A checkpoint of which everything but the arrays has been read and checked.

    Attributes:
      path: its folder.
      config: the architecture, with the `width_multiple` that it was saved with.
      metadata: the caller's.
      dtypes: of the arrays, by path of the parameter.
    """

    path: Folder
    config: ModelConfig
    metadata: Mapping[str, Any]
    dtypes: Mapping[tuple[str, ...], Any]

    def abstract_model(self, dtype: DTypeLike | None = None) -> Llama:
        """The model with shapes and dtypes in place of arrays, without storage padding; all of one dtype, if given."""
        config = dataclasses.replace(self.config, width_multiple=1)
        leaves = {_names(at): leaf for at, leaf in _parameters(config).items()}
        return _filled(config, {at: leaf.update(dtype=dtype or self.dtypes[at]) for at, leaf in leaves.items()})

    def load(self, shardings: ShardingRule | None = None, width_multiple: int | None = None) -> Llama:
        """Loads the arrays; for the arguments and errors see `load_orbax`."""
        from orbax.checkpoint import v1 as ocp  # here: as above

        config = self.config
        if width_multiple is not None:
            config = dataclasses.replace(config, width_multiple=width_multiple)
        rule = shardings or _default_device()
        wanted = {}
        for at, leaf in _parameters(config).items():
            leaf = leaf.update(dtype=self.dtypes[_names(at)])
            wanted[_names(at)] = leaf.update(sharding=rule(at, leaf))
        # What is stored has the shapes of the checkpoint's own config (`open_orbax`): where those of the model differ,
        # it is in storage padding, and Orbax cuts it off or fills it up with zeros as it reads.
        context = ocp.Context()
        context.array.loading.enable_padding_and_truncation = config != self.config
        with calling_orbax(_unreadable(self.path)), context:
            arrays = _flat(ocp.load_checkpointables(self.path, {_ITEM: _nested(wanted)})[_ITEM])
        return _filled(config, arrays)


def open_orbax(path: Folder) -> OpenedOrbax:
    """Reads what is to be known of a checkpoint before its arrays are loaded.

    Raises:
      RequestError, OperationError: as `load_orbax`.
    """
    from orbax.checkpoint import v1 as ocp  # here: as above

    path = _absolute(path)
    _check_files(path)
    with calling_orbax(_unreadable(path)):
        stored = ocp.checkpointables_metadata(path)
        if stored.metadata.get(_ITEM) is None:  # Orbax logs the reason and goes on
            raise ValueError(f"Orbax finds no arrays in {_ITEM}")
        found = _flat(stored.metadata[_ITEM])
    config, metadata = _read_metadata(path, stored.custom_metadata)
    _check_parameters(path, {_names(at): leaf.shape for at, leaf in _parameters(config).items()}, found)
    return OpenedOrbax(path, config, metadata, {name: leaf.dtype for name, leaf in found.items()})


def load_orbax(
    path: Folder, shardings: ShardingRule | None = None, width_multiple: int | None = None
) -> tuple[Llama, dict[str, Any]]:
    """Loads what `save_orbax` wrote, bit for bit and in the dtypes it was saved in.

    Args:
      path: the folder of the checkpoint.
      shardings: says where each parameter goes; a process reads only its own shards. None puts everything on the
        default device, wherever it was saved from.
      width_multiple: of the loaded model, whatever it was saved with (see `ModelConfig`); None keeps that.

    Returns:
      The model, and the caller's metadata.

    Raises:
      RequestError: `path` is no Orbax checkpoint, not one of ours, or one of a version or config that we do not know.
      OperationError: it is damaged.
    """
    opened = open_orbax(path)
    return opened.load(shardings, width_multiple), dict(opened.metadata)


def _filled(config: ModelConfig, arrays: Mapping[tuple[str, ...], Any]) -> Llama:
    graphdef, state = nnx.split(abstract_model(config))
    flat = [(at, variable.replace(arrays[_names(at)])) for at, variable in nnx.to_flat_state(state)]
    model: Llama = nnx.merge(graphdef, nnx.from_flat_state(flat))
    return model


@contextlib.contextmanager
def calling_orbax(failure: str) -> Iterator[None]:
    """Reports whatever Orbax and its storage layers raise as one sentence, and keeps their logs off the terminal."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    except Exception as error:
        # asyncio logs every other read or write that failed when its future is collected: have that done here.
        cause: BaseException | None = error
        while cause is not None:
            traceback.clear_frames(cause.__traceback__)
            cause = cause.__cause__ or cause.__context__
        gc.collect()
        raise OperationError(f"{failure}: {_first_line(error)}") from error
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


def _unreadable(path: Folder) -> str:
    return f"the checkpoint {path} is damaged or cannot be read"


def _parameters(config: ModelConfig) -> dict[tuple[Any, ...], Any]:
    """Shapes of the parameters of a model, by path."""
    _, state = nnx.split(abstract_model(config))
    return {at: variable.get_value() for at, variable in nnx.to_flat_state(state)}


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(part) for part in path)


def _nested(flat: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for (*above, last), leaf in flat.items():
        node = nested
        for name in above:
            node = node.setdefault(name, {})
        node[last] = leaf
    return nested


def _flat(nested: Mapping[str, Any], above: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    flat: dict[tuple[str, ...], Any] = {}
    for name, node in nested.items():
        flat |= _flat(node, (*above, name)) if isinstance(node, Mapping) else {(*above, name): node}
    return flat


def _default_device() -> ShardingRule:
    (device,) = jax.device_put(0).devices()
    return lambda path, leaf: SingleDeviceSharding(device)


# ----------------------------------------------------------------------------------------------------- checks


def _absolute(path: Folder) -> Folder:
    return path if in_store(path) else path.absolute()


def _sizes(path: Folder) -> dict[str, int]:
    if in_store(path):
        return {name: size for name, size in sizes(path).items() if name != COMMIT_FILE}
    files = (file for file in sorted(path.rglob("*")) if file.is_file() and file != path / COMMIT_FILE)
    return {file.relative_to(path).as_posix(): file.stat().st_size for file in files}


def _check_files(path: Folder) -> None:
    if not is_orbax(path):
        raise RequestError(
            f"{path} is not an Orbax checkpoint, or one whose writing was not finished: it has no {_ORBAX_MARKER}"
        )
    try:
        expected = json.loads((path / COMMIT_FILE).read_text(encoding="utf-8"))
        actual = _sizes(path)
    except FileNotFoundError as error:
        raise RequestError(
            f"{path} is not an Orbax checkpoint of gluprune, or one whose writing was not finished: it has no "
            f"{COMMIT_FILE}"
        ) from error
    except (OSError, ValueError) as error:
        raise OperationError(f"{path / COMMIT_FILE} cannot be read: {_first_line(error)}") from error
    for name, size in expected.items():
        if actual.get(name) != size:
            found = f"has {actual[name]:,} bytes instead of {size:,}" if name in actual else "is missing"
            raise OperationError(f"the checkpoint {path} is damaged: {name} {found}; copy or write it again")


def _read_metadata(path: Folder, stored: Any) -> tuple[ModelConfig, dict[str, Any]]:
    metadata = dict(stored or {})
    if metadata.pop("format", None) != _FORMAT:
        raise RequestError(f"{path} is not an Orbax checkpoint of gluprune: its metadata has no format {_FORMAT!r}")
    if (version := metadata.pop("version", None)) != _VERSION:
        raise RequestError(f"{path} has version {version} of the format {_FORMAT}; this gluprune reads {_VERSION}")
    fields = metadata.pop("config", None)
    try:
        return _read_config(path, fields), metadata
    except (TypeError, AttributeError) as error:
        raise OperationError(f"the config of the checkpoint {path} cannot be read: {error}") from error


def _read_config(path: Folder, fields: dict[str, Any]) -> ModelConfig:
    _check_fields(path, "config", ModelConfig, fields)
    rope = fields["rope_scaling"]
    if rope is not None:
        _check_fields(path, "config.rope_scaling", Llama3Rope, rope)
        rope = Llama3Rope(**rope)
    sizes = tuple(fields["intermediate_sizes"])
    return ModelConfig(**{**fields, "intermediate_sizes": sizes, "rope_scaling": rope})


def _check_fields(path: Folder, where: str, kind: type, fields: Mapping[str, Any]) -> None:
    known = {field.name for field in dataclasses.fields(kind)}
    problems = [f"no {name}" for name in sorted(known - fields.keys())]
    problems += [f"an unknown {name}" for name in sorted(fields.keys() - known)]
    if problems:
        raise RequestError(f"the {where} of the checkpoint {path} has {', '.join(problems)}")


def _check_parameters(
    path: Folder, shapes: Mapping[tuple[str, ...], Any], found: Mapping[tuple[str, ...], Any]
) -> None:
    problems = [f"{'.'.join(name)} is missing" for name in sorted(shapes.keys() - found.keys())]
    problems += [f"{'.'.join(name)} is unexpected" for name in sorted(found.keys() - shapes.keys())]
    problems += [
        f"{'.'.join(name)} is {list(found[name].shape)} instead of {list(shapes[name])}"
        for name in sorted(shapes.keys() & found.keys())
        if found[name].shape != shapes[name]
    ]
    if problems:
        raise OperationError(f"the checkpoint {path} does not fit its own config: {'; '.join(problems)}")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
