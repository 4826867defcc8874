"""Orbax checkpoints that describe themselves: the parameters, the architecture and the caller's own metadata.

    <checkpoint>/                 an Orbax v1 checkpoint
      params/                     nested dictionary of `nnx.Param` arrays: layers / 0 / mlp / gate_proj
      _CHECKPOINT_METADATA        holds, as custom metadata, format, version, config and the caller's metadata
      files.json                  ours, written last: size and CRC-32 of every other file

The arrays have the shapes that the config says, whatever mesh the model was on: storage padding is not saved.

The folder may be an `etils.epath.Path` in an object store. Orbax renames nothing there: `files.json` alone says that
all is written.

Orbax answers a missing or shortened file with hundreds of log lines and an error that names none, and a changed byte
with other weights or none of these; `files.json` lets us name the file. Checksums are taken and checked of files on a
disk. In an object store, which keeps its own and compares them at every transfer, they would cost a second download:
there the sizes are compared.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from convert.card_header import read_header
from convert.checkpoint import MeshChoice, Progress, too_large
from convert.huggingface.folder import read_assets
from convert.loaded import LoadedCheckpoint, choose_mesh
from gluprune_jax.errors import OperationError, RequestError, listed, shortened
from gluprune_jax.files.object_store import Folder, reaching
from gluprune_jax.files.orbax import (
    absolute,
    calling_orbax,
    check_contents,
    check_files,
    deferring_interrupts,
    write_commit_file,
)
from gluprune_jax.files.records import (
    ANYTHING,
    FLAG,
    NUMBER,
    OBJECT,
    WHOLE,
    Kind,
    check,
    list_of,
    optional,
    problem,
    record_of,
)
from gluprune_jax.models.config import (
    LayerAttention,
    LinearRope,
    Llama3Rope,
    LongRope,
    ModelConfig,
    Rope,
    YarnRope,
    name_of,
)
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.models.parameters import abstract_model, parameters_of, with_parameters
from gluprune_jax.parallel.distributed import synchronize_errors
from gluprune_jax.parallel.mesh import parameter_sharding, to_host

_FORMAT, _VERSION = "gluprune-orbax", 2
_ITEM = "params"

# What the config of a checkpoint must look like.
_POSITIVE = Kind("a whole number from 1", lambda value: WHOLE.holds(value) and value > 0)
_FINITE = Kind("a finite number", lambda value: NUMBER.holds(value) and math.isfinite(value))
_KINDS: dict[Any, Kind] = {int: _POSITIVE, float: _FINITE, bool: FLAG, tuple[float, ...]: list_of(_FINITE)}
_KINDS |= {kind | None: optional(_KINDS[kind]) for kind in (int, float)}
_KINDS |= {tuple[int, ...]: list_of(_POSITIVE)}
# By what `rope_type` says.
_SCALINGS: dict[str, type[Any]] = {"llama3": Llama3Rope, "linear": LinearRope, "yarn": YarnRope, "longrope": LongRope}
# The fields of `ModelConfig` that are stored as they are. In version 1 there was one RoPE, and all else was Llama's.
_LAYERS = {"rope": optional(WHOLE), "window": optional(_POSITIVE)}
_LLAMAS = tuple(
    field.name
    for field in dataclasses.fields(ModelConfig)
    if (field.default is dataclasses.MISSING and field.name != "attention")
    or field.name in ("tie_word_embeddings", "width_multiple")
)


# (path of a parameter, such as ("layers", 3, "mlp", "gate_proj"), its stored shape and dtype) -> its sharding
ShardingRule = Callable[[tuple[Any, ...], jax.ShapeDtypeStruct], Sharding]


def save_orbax(path: Folder, model: Decoder, metadata: Mapping[str, Any]) -> None:
    """Saves the parameters of `model` with its config.

    Storage padding is stripped: arrays stay divided, along their other axis, and every process writes its own parts.
    On the devices, stripped copies of the padded arrays are there until all is written.

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

    path = absolute(path)
    if path.exists():
        raise RequestError(f"{path} exists; an Orbax checkpoint is written to a new folder")
    config = dataclasses.replace(model.config, width_multiple=1)
    own = {"format": _FORMAT, "version": _VERSION, "config": _config_record(config)}
    if taken := sorted(own.keys() & metadata.keys()):
        raise ValueError(f"metadata has the keys {taken}, which the checkpoint uses itself")
    shapes = {name: leaf.shape for name, leaf in parameters_of(abstract_model(config)).items()}
    arrays = {name: without_padding(array, shapes[name]) for name, array in parameters_of(model).items()}
    with calling_orbax(f"cannot write the Orbax checkpoint {path}"), deferring_interrupts():
        ocp.save_checkpointables(path, {_ITEM: _nested(arrays)}, custom_metadata={**metadata, **own})
    write_commit_file(path)


def without_padding(array: Array, shape: tuple[int, ...]) -> Array:
    """An array cut to `shape` where its storage padding is.

    The axis that was padded may not be divisible any more. What divided it divides the other axis then, as far as
    that is divisible.
    """
    if array.shape == shape:
        return array
    sharding = array.sharding
    if isinstance(sharding, NamedSharding):
        mesh, spec = sharding.mesh, (*sharding.spec, *[None] * (array.ndim - len(sharding.spec)))
        sharding = NamedSharding(mesh, PartitionSpec(*_moved(spec, array.shape, shape, mesh.shape)))  # type: ignore[no-untyped-call]
    cut: Array = jax.jit(lambda x: x[tuple(map(slice, shape))], out_shardings=sharding)(array)
    # One after the other: on simulated devices, several such programs at once can wait for each other for ever.
    return jax.block_until_ready(cut)  # type: ignore[no-any-return, no-untyped-call]


def _moved(
    spec: tuple[Any, ...], padded: tuple[int, ...], shape: tuple[int, ...], mesh: Mapping[str, int]
) -> list[Any]:
    """How an array is divided after axes of it were cut: what divided these divides the first one that it can."""
    parts: list[Any] = []
    free: list[str] = []
    for names, before, after in zip(spec, padded, shape, strict=True):
        was_cut = before != after
        free += (names if isinstance(names, tuple) else (names,)) if names is not None and was_cut else ()
        parts.append(None if was_cut else names)
    for axis, size in enumerate(shape):
        names = tuple(free)
        while names and size % math.prod(mesh[name] for name in names):
            names = names[:-1]
        if names and parts[axis] is None:
            parts[axis] = names
            break
    return parts


@dataclasses.dataclass(frozen=True)
class OpenedOrbax:
    """A checkpoint of which everything but the arrays has been read and checked.

    Attributes:
      path: its folder.
      config: the architecture, with the `width_multiple` that it was saved with.
      metadata: the caller's.
      dtypes: of the arrays, by name of the parameter, such as "layers.3.mlp.gate_proj".
      unchecked: checksums of files that are compared when the arrays are loaded, by name.
    """

    path: Folder
    config: ModelConfig
    metadata: Mapping[str, Any]
    dtypes: Mapping[str, Any]
    unchecked: Mapping[str, str]

    def abstract_model(self, dtype: DTypeLike | None = None) -> Decoder:
        """The model with shapes and dtypes in place of arrays, without storage padding; all of one dtype, if given."""
        model = abstract_model(dataclasses.replace(self.config, width_multiple=1))
        leaves: dict[str, Any] = dict(parameters_of(model))
        return with_parameters(
            model, {name: leaf.update(dtype=dtype or self.dtypes[name]) for name, leaf in leaves.items()}
        )

    def load(self, shardings: ShardingRule | None = None, width_multiple: int | None = None) -> Decoder:
        """Loads the arrays, bit for bit and in the dtypes that they were saved in.

        Args:
          shardings: says where each parameter goes; a process reads only its own shards. None puts everything on the
            default device, wherever it was saved from.
          width_multiple: of the loaded model, whatever it was saved with (see `ModelConfig`); None keeps that.

        Raises:
          OperationError: the checkpoint is damaged.
        """
        from orbax.checkpoint import v1 as ocp  # here: as above

        # Given where arrays go, all processes load together, and each of them checks its share of the files.
        if shardings is None:
            check_contents(self.path, self.unchecked)
        else:
            names = sorted(self.unchecked)[jax.process_index() :: jax.process_count()]
            with synchronize_errors():  # by itself: Orbax makes processes wait for each other
                check_contents(self.path, {name: self.unchecked[name] for name in names})
        config = self.config
        if width_multiple is not None:
            config = dataclasses.replace(config, width_multiple=width_multiple)
        rule = shardings or _default_device()
        wanted = {}
        for path, leaf in _parameters(config).items():
            leaf = leaf.update(dtype=self.dtypes[name_of(path)])
            wanted[name_of(path)] = leaf.update(sharding=rule(path, leaf))
        # What is stored has the shapes of the checkpoint's own config (`open_orbax`): where those of the model differ,
        # it is in storage padding, and Orbax cuts it off or fills it up with zeros as it reads.
        context = ocp.Context()
        context.array.loading.enable_padding_and_truncation = config != self.config
        with calling_orbax(_unreadable(self.path)), context:
            arrays = _flat(ocp.load_checkpointables(self.path, {_ITEM: _nested(wanted)})[_ITEM])
        return with_parameters(abstract_model(config), arrays)


def open_orbax(path: Folder) -> OpenedOrbax:
    """Reads what is to be known of a checkpoint before its arrays are loaded.

    Raises:
      RequestError: `path` is no Orbax checkpoint, not one of ours, or one of a version or config that we do not know.
      OperationError: it is damaged.
    """
    from orbax.checkpoint import v1 as ocp  # here: as above

    path = absolute(path)
    unchecked = check_files(path)
    with calling_orbax(_unreadable(path)):
        stored = ocp.checkpointables_metadata(path)
        if stored.metadata.get(_ITEM) is None:  # Orbax logs the reason and goes on
            raise ValueError(f"Orbax finds no arrays in {_ITEM}")
        found = _flat(stored.metadata[_ITEM])
    config, metadata = _read_metadata(path, stored.custom_metadata)
    shapes = {name: leaf.shape for name, leaf in parameters_of(abstract_model(config)).items()}
    _check_parameters(path, shapes, found)
    return OpenedOrbax(path, config, metadata, {name: leaf.dtype for name, leaf in found.items()}, unchecked)


# ----------------------------------------------------------------------------------------------- a source of models


@dataclasses.dataclass(frozen=True)
class OrbaxSource:
    """An opened Orbax checkpoint as a source of models (`convert.sources.Source`).

    Attributes:
      opened: the checkpoint.
      assets: the folder that holds the tokenizer and its like, if any does.
      name: what the user calls the model.
      dtype: what every array is cast to; None keeps each as it is stored.
    """

    opened: OpenedOrbax
    assets: Folder
    name: str
    dtype: np.dtype[Any] | None = None

    @property
    def abstract_model(self) -> Decoder:
        """The model with shapes and dtypes in place of arrays."""
        return self.opened.abstract_model(self.dtype)

    @property
    def identity(self) -> str:
        """Tells the model from others of the same name."""
        return f"{self.opened.config} {self.opened.metadata}"

    def stream(self) -> None:
        """Orbax is loaded whole."""

    def load(self, progress: Progress | None = None, mesh: MeshChoice | None = None) -> LoadedCheckpoint:
        """Loads the model; nothing is told of its progress, for Orbax tells nothing.

        Raises:
          RequestError: a weight that is too large for the dtype it is cast to.
          OperationError: damaged files; NaN or Inf weights.
        """
        path, metadata = self.opened.path, self.opened.metadata
        chosen, config = choose_mesh(mesh, self.abstract_model)
        # The padding is that of the mesh it is loaded onto, not of the one it was saved from.
        rule = None if chosen is None else lambda at, leaf: parameter_sharding(chosen, at, leaf.shape)
        model = self.opened.load(rule, config.width_multiple)
        if bad := _not_finite(model):
            raise OperationError(f"{path} has NaN or Inf weights in {', '.join(bad)}")
        if self.dtype is not None:
            arrays = parameters_of(model)
            model = with_parameters(
                model, {name: _cast_to(self.dtype, array.sharding)(array) for name, array in arrays.items()}
            )
            if bad := _not_finite(model):
                raise too_large(f"{path}: {', '.join(bad)}", self.dtype)
        check(metadata, record_of({"hf_config": OBJECT, "history": list_of(OBJECT)}), f"the metadata of {path}")
        with reaching(self.assets):
            files, card = read_assets(self.assets), read_header(self.assets)
        history = tuple(metadata["history"])
        return LoadedCheckpoint(
            model=model,
            source=self.name,
            hf_config=metadata["hf_config"],
            assets=files,
            history=history,
            card=card,
        )


def _not_finite(model: Decoder) -> list[str]:
    return [name for name, array in parameters_of(model).items() if not to_host(_all_finite(array))]


@functools.lru_cache(maxsize=64)
def _cast_to(dtype: np.dtype[Any], sharding: Sharding) -> Callable[[Array], Array]:
    # Cached: one program for all arrays of a shape. Without the sharding, XLA chooses one that is spelled otherwise.
    return jax.jit(lambda array: array.astype(dtype), out_shardings=sharding)


@jax.jit
def _all_finite(array: Array) -> Array:
    # Inf and NaN times 0 are NaN; of what `isfinite` says XLA's CPU compiler makes an array first (as in `scores`).
    return jnp.sum(array * 0) == 0


# ------------------------------------------------------------------------------------------------------- names


def _unreadable(path: Folder) -> str:
    return f"the checkpoint {path} is damaged or cannot be read"


def _parameters(config: ModelConfig) -> dict[tuple[Any, ...], Any]:
    """Shapes of the parameters of a model, by path."""
    _, state = nnx.split(abstract_model(config))
    return {at: variable.get_value() for at, variable in nnx.to_flat_state(state)}


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays by the parts of their names, as a tree: layers / 3 / mlp / gate_proj."""
    nested: dict[str, Any] = {}
    for name, leaf in flat.items():
        *above, last = name.split(".")
        node = nested
        for part in above:
            node = node.setdefault(part, {})
        node[last] = leaf
    return nested


def _flat(nested: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """The inverse of `_nested`."""
    flat: dict[str, Any] = {}
    for part, node in nested.items():
        name = f"{above}{part}"
        flat |= _flat(node, f"{name}.") if isinstance(node, Mapping) else {name: node}
    return flat


def _default_device() -> ShardingRule:
    (device,) = jax.device_put(0).devices()
    return lambda path, leaf: SingleDeviceSharding(device)


def _read_metadata(path: Folder, stored: Any) -> tuple[ModelConfig, dict[str, Any]]:
    metadata = dict(stored or {})
    if metadata.pop("format", None) != _FORMAT:
        raise RequestError(f"{path} is not an Orbax checkpoint of gluprune: its metadata has no format {_FORMAT!r}")
    if (version := metadata.pop("version", None)) not in (1, _VERSION):
        raise RequestError(
            f"{path} has version {shortened(version)} of the format {_FORMAT}; this gluprune reads 1 and {_VERSION}"
        )
    return _read_config(path, metadata.pop("config", None), version), metadata


def _config_record(config: ModelConfig) -> dict[str, Any]:
    """A config as it is stored: each RoPE once, and for each layer its index and window."""
    record = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    ropes = list(dict.fromkeys(attention.rope for attention in record.pop("attention") if attention.rope))
    layers = [
        {"rope": None if attention.rope is None else ropes.index(attention.rope), "window": attention.window}
        for attention in config.attention
    ]
    return record | {"ropes": [_rope_record(rope) for rope in ropes], "layers": layers}


def _rope_record(rope: Rope) -> dict[str, Any]:
    record = {field.name: getattr(rope, field.name) for field in dataclasses.fields(rope)}
    if rope.scaling is not None:
        kind = next(name for name, scaling in _SCALINGS.items() if isinstance(rope.scaling, scaling))
        record["scaling"] = {"rope_type": kind, **dataclasses.asdict(rope.scaling)}
    return record


def _read_config(path: Folder, stored: Any, version: int) -> ModelConfig:
    if not isinstance(stored, dict):
        raise OperationError(
            f"the config of the checkpoint {path} cannot be read: it is {shortened(stored)}; it must be an object"
        )
    attention = {"rope_theta": NUMBER, "rope_scaling": optional(OBJECT)}
    plain = _LLAMAS
    if version > 1:
        attention = {"ropes": list_of(OBJECT), "layers": list_of(record_of(_LAYERS))}
        plain = tuple(field.name for field in dataclasses.fields(ModelConfig) if field.name != "attention")
    _check_fields(path, "config", (*plain, *attention), stored)
    types = get_type_hints(ModelConfig)
    _check(path, "config", stored, {**{name: _kind_of(types[name]) for name in plain}, **attention})
    if version == 1:
        scaling = stored["rope_scaling"] and {"rope_type": "llama3", **stored["rope_scaling"]}
        rope = {"theta": stored["rope_theta"], "scaling": scaling, "rotary_dim": None, "in_float32": False}
        layers = [{"rope": 0, "window": None}] * len(stored["intermediate_sizes"])
        stored = {**stored, "ropes": [rope], "layers": layers}
    ropes = [_read_rope(path, f"config.ropes[{i}]", rope) for i, rope in enumerate(stored["ropes"])]
    if missing := [i for layer in stored["layers"] if (i := layer["rope"]) is not None and i >= len(ropes)]:
        raise OperationError(
            f"the config of the checkpoint {path} cannot be read: a layer has rope {missing[0]} of {len(ropes)}"
        )
    fields: dict[str, Any] = {name: _hashable(stored[name]) for name in plain}
    fields["attention"] = tuple(
        LayerAttention(None if layer["rope"] is None else ropes[layer["rope"]], layer["window"])
        for layer in stored["layers"]
    )
    return ModelConfig(**fields)


def _read_rope(path: Folder, where: str, stored: Mapping[str, Any]) -> Rope:
    scaling = stored.get("scaling")
    if scaling is not None:
        kind = scaling.get("rope_type") if isinstance(scaling, dict) else None
        if kind not in _SCALINGS:
            raise RequestError(
                f"the {where} of the checkpoint {path} has rope_type {shortened(kind)}; known: {', '.join(_SCALINGS)}"
            )
        own = {name: value for name, value in scaling.items() if name != "rope_type"}
        scaling = _read_fields(path, f"{where}.scaling", _SCALINGS[kind], own)
    rope: Rope = _read_fields(path, where, Rope, {**stored, "scaling": None})
    return dataclasses.replace(rope, scaling=scaling)


def _read_fields(path: Folder, where: str, kind: type[Any], stored: Mapping[str, Any]) -> Any:
    """An object of a dataclass whose fields are stored as they are."""
    _check_fields(path, where, {field.name for field in dataclasses.fields(kind)}, stored)
    types = get_type_hints(kind)
    _check(path, where, stored, {name: _kind_of(types[name]) for name in stored})
    return kind(**{name: _hashable(value) for name, value in stored.items()})


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _kind_of(annotation: Any) -> Kind:
    if get_origin(annotation) is Literal:
        return Kind(" or ".join(map(repr, get_args(annotation))), lambda value: value in get_args(annotation))
    return _KINDS.get(annotation, ANYTHING)


def _check(path: Folder, where: str, values: Mapping[str, Any], kinds: Mapping[str, Kind]) -> None:
    if found := problem(dict(values), record_of(kinds)):
        raise OperationError(f"the {where} of the checkpoint {path} cannot be read: {found}")


def _check_fields(path: Folder, where: str, known: Collection[str], fields: Mapping[str, Any]) -> None:
    problems = [f"no {name}" for name in sorted(set(known) - fields.keys())]
    problems += [f"an unknown {name}" for name in sorted(fields.keys() - set(known))]
    if problems:
        raise RequestError(f"the {where} of the checkpoint {path} has {listed(problems)}")


def _check_parameters(path: Folder, shapes: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    def in_order(names: Iterable[str]) -> list[str]:
        return sorted(names, key=lambda name: name.split("."))

    problems = [f"{name} is missing" for name in in_order(shapes.keys() - found.keys())]
    problems += [f"{name} is unexpected" for name in in_order(found.keys() - shapes.keys())]
    problems += [
        f"{name} is {list(found[name].shape)} instead of {list(shapes[name])}"
        for name in in_order(shapes.keys() & found.keys())
        if found[name].shape != shapes[name]
    ]
    if problems:
        raise OperationError(f"the checkpoint {path} does not fit its own config: {listed(problems)}")
