"""Turns the metadata of a GGUF file into the `config.json` of its family, and so into our config; and the way back.

Whatever a family's config means then stands once, in `convert.huggingface.config`. What the metadata leave out has a
default in llama.cpp, so that a key with a misspelt name would change the model without a word: keys that are not
understood are refused. What is written is read back, so that nothing is lost that the architecture cannot express.
"""

import dataclasses
import difflib
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import gguf
import numpy as np

from convert.families.family import Family, GGUFTable
from convert.families.llama_cpp import main_rope
from convert.families.mixtures import COUNTS, GGUF_MIXTURES, Mixture
from convert.families.registry import FAMILIES, GGUF_TABLES
from convert.gguf.file import GGUFTensor, printable, read_rows, some
from convert.gguf.metadata import Metadata
from convert.gguf.tokenizer import TOKENIZER_KEYS, check_tokenizer_keys
from convert.huggingface.config import read_config
from convert.huggingface.mixture_config import MixtureConfig, as_dense, read_mixture_config, used_experts
from convert.values import integer, shown
from gluprune_jax.errors import OperationError, RequestError, shortened
from gluprune_jax.models.config import ModelConfig
from gluprune_jax.pruning.mixture import MixtureSizes

# Ours: the widths without the zero neurons that layers were padded with, one for each layer.
TRUE_WIDTHS = "gluprune.feed_forward_length"
_MEANING = "what the metadata mean"  # of the config that is made of them, in errors
# Ours: what the model has been through, as JSON.
HISTORY = "gluprune.history"

# Keys that matter outside `<architecture>.` and `tokenizer.`.
_GENERAL_KEYS = frozenset(
    {
        "general.alignment",
        "general.architecture",
        "general.quantization_version",
        "general.type",
        TRUE_WIDTHS,
        HISTORY,
        "split.count",
        "split.no",
        "split.tensors.count",
    }
)

# Keys that all architectures have.
_KEYS = frozenset(
    {
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.layer_norm_rms_epsilon",
        "attention.value_length",
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scale_linear",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.type",
        "rope.scaling.yarn_attn_factor",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
        "vocab_size",
    }
)
# What is not implemented, where a family's table does not name it, with the values that switch it off.
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "tensor_data_layout": ("Meta AI original pth",),
}
_INERT = frozenset({"rope.scaling.finetuned"})


def find_mixture(fields: Mapping[str, Any]) -> Mixture | None:
    """The table of the family of mixtures of experts that a file is of; None where it is of none."""
    name = fields.get("general.architecture")
    mixture = GGUF_MIXTURES.get(name) if isinstance(name, str) else None
    return mixture if name not in GGUF_TABLES or fields.get(f"{name}.expert_count") else None


def find_table(fields: Mapping[str, Any]) -> GGUFTable:
    """The table of the architecture of a file that holds a dense model.

    Raises:
      RequestError: there is none, or the file is no model, or of another version of the quantised types, or holds a
        mixture of experts.
    """
    if mixture := find_mixture(fields):
        key = f"{mixture.gguf.architecture}.expert_count"
        raise RequestError(
            f"{key} is {shortened(fields.get(key))}: a mixture of experts ({mixture.family.name}), which is pruned "
            f"from file to file by its weights alone (gluprune prune, or convert.open_mixture), converted (gluprune "
            f"convert), and not run or trained"
        )
    check_model(fields)
    _, table = GGUF_TABLES[fields["general.architecture"]]
    return table


def check_model(fields: Mapping[str, Any]) -> None:
    """Refuses files that are no models, or not of an architecture that is known.

    Raises:
      RequestError: as said, or the quantised types are of another version.
    """
    known = [*GGUF_TABLES, *(name for name in GGUF_MIXTURES if name not in GGUF_TABLES)]
    for key, default, accepted, meaning in (
        ("general.architecture", None, tuple(known), ", ".join(map(repr, known))),
        ("general.type", "model", ("model",), "'model'"),
        ("general.quantization_version", None, (None, gguf.GGML_QUANT_VERSION), str(gguf.GGML_QUANT_VERSION)),
    ):
        if (value := fields.get(key, default)) not in accepted:
            raise RequestError(f"{key} is {shortened(value)}; accepted: {meaning}")


def check_keys(table: GGUFTable, fields: Mapping[str, Any]) -> list[str]:
    """Notes for the keys that were left out.

    Raises:
      RequestError: keys that are not understood and could matter.
    """
    prefix, understood, only = f"{table.architecture}.", _understood(table), _only(table)
    if (experts := fields.get(f"{prefix}expert_count")) and "expert_count" not in table.keys:
        raise RequestError(
            f"{prefix}expert_count is {shortened(experts)}: mixtures of experts are not supported in this architecture"
        )
    for name, value in fields.items():
        if not name.startswith(prefix):
            continue
        key = name.removeprefix(prefix)
        if key in only and value not in only[key]:
            raise RequestError(f"{name} is {shortened(value)}; accepted: {' or '.join(map(repr, only[key]))}")
        if key not in understood:
            raise RequestError(f"{printable(name)} is {shortened(value)}, and this key is not supported")
    check_tokenizer_keys(fields)

    known = [*_GENERAL_KEYS, *TOKENIZER_KEYS, *(f"{prefix}{key}" for key in understood)]
    apart = ("split.count", TRUE_WIDTHS, HISTORY)
    inert = [key for key in fields if not key.startswith(("general.", prefix, "tokenizer.")) and key not in apart]
    described = set(vars(gguf.Keys.General).values())
    for key in [*inert, *(key for key in fields if key.startswith("general.") and key not in described)]:
        _refuse_misspelt(key, known, table)
    notes = ["the general.* metadata (name, licence, file type, ...) was left out"]
    if inert:
        notes.append(f"metadata without effect was left out: {some([printable(key) for key in inert], 4)}")
    return notes


def _only(table: GGUFTable) -> dict[str, tuple[Any, ...]]:
    return {key: values for key, values in {**_ONLY, **table.only}.items() if key not in table.keys}


def _understood(table: GGUFTable) -> frozenset[str]:
    return _KEYS | table.keys | _only(table).keys() | _INERT | table.inert


def _refuse_misspelt(key: str, known: Sequence[str], table: GGUFTable) -> None:
    """Tools and people add keys of their own; a key that is nearly one that matters is none of these."""
    _, _, rest = key.partition(".")
    of_another = [f"{table.architecture}.{rest}"] if rest in _understood(table) else []
    meant = of_another or difflib.get_close_matches(key[:100], known, 1, 0.85)
    if key not in _GENERAL_KEYS and meant:
        raise RequestError(f"the metadata key {printable(key)} is not known, and looks like a misspelt {meant[0]}")


def read_metadata(
    table: GGUFTable,
    fields: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    tied: bool,
    vectors: Mapping[str, tuple[float, ...]],
) -> tuple[Family, ModelConfig]:
    """The family and the config of a file.

    Args:
      table: of its architecture.
      fields: the metadata as Python values.
      shapes: of all its tensors, by name.
      tied: whether the output projection is the embedding (`is_tied`).
      vectors: the values of those in `table.vectors` that it has.

    Raises:
      RequestError: something that is not supported.
      OperationError: a value that is missing, or none that it could be.
    """
    own = _own(table, fields, shapes, vectors)
    if TRUE_WIDTHS in fields:
        widths = _true_widths(fields[TRUE_WIDTHS], own.per_layer("feed_forward_length"))
        own = dataclasses.replace(own, values={**own.values, "feed_forward_length": widths})
    family, _ = GGUF_TABLES[table.architecture]
    config, rest = read_config(_data(own, table, family, fields, shapes, tied), _MEANING)
    return FAMILIES[rest["model_type"]], config


def read_mixture_metadata(
    mixture: Mixture,
    fields: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    tied: bool,
    vectors: Mapping[str, tuple[float, ...]],
) -> MixtureConfig:
    """As `read_metadata`, of a mixture of experts.

    Args:
      mixture: the table of its family.
      fields, shapes, tied, vectors: as of `read_metadata`.
    """
    own, family = _own(mixture.gguf, fields, shapes, vectors), mixture.family
    own.same_in_all_layers("feed_forward_length")
    said = {key: values[0] for key, values in mixture.computed.items() if None not in values}
    data = {
        **_data(own, mixture.gguf, family, fields, shapes, tied),
        **dict.fromkeys(COUNTS, own.integer("expert_count")),
        "num_experts_per_tok": own.integer("expert_used_count"),
        mixture.width: own.integer(mixture.gguf_width),
        "hidden_act": "silu",
        **said,
    }
    if "attention_bias" not in mixture.computed:
        del data["attention_bias"]  # the class knows no such key
    return read_mixture_config(data, _MEANING)


def _data(
    own: Metadata,
    table: GGUFTable,
    family: Family,
    fields: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    tied: bool,
) -> dict[str, Any]:
    """What a `config.json` of the family would say."""
    return {
        "model_type": family.model_type,
        **_common(own, table),
        "vocab_size": _vocab_size(own, fields, shapes),
        "tie_word_embeddings": tied,
        **table.config(own),
    }


def stored_widths(table: GGUFTable, fields: Mapping[str, Any], names: Collection[str]) -> tuple[int, ...]:
    """The width of each layer as the file holds it: with the zero neurons that it may have been padded with.

    Args:
      table: of its architecture.
      fields: the metadata as Python values.
      names: of its tensors.

    Raises:
      OperationError: they are missing, or something else than widths.
    """
    return tuple(_own(table, fields, names).per_layer("feed_forward_length"))


def _own(
    table: GGUFTable,
    fields: Mapping[str, Any],
    names: Collection[str],
    vectors: Mapping[str, tuple[float, ...]] | None = None,
) -> Metadata:
    prefix = f"{table.architecture}."
    values = {key.removeprefix(prefix): value for key, value in fields.items() if key.startswith(prefix)}
    return Metadata(table.architecture, values, vectors or {}, names)


def _true_widths(found: Any, stored: Sequence[int]) -> list[int]:
    if (
        not isinstance(found, list)
        or len(found) != len(stored)
        or not all(type(one) is int and 0 < one <= most for one, most in zip(found, stored, strict=True))
    ):
        raise OperationError(
            f"{TRUE_WIDTHS} is {shortened(found)}; it must hold a whole number for {len(stored)} layers, from 1 to the "
            f"width that the layer has in the file"
        )
    return found


def _common(own: Metadata, table: GGUFTable) -> dict[str, Any]:
    """What stands in the config of every family, as `config.json` has it."""
    widths, head_dim = own.per_layer("feed_forward_length"), own.head_dim
    for key in ("attention.value_length", "rope.dimension_count"):
        if key not in table.keys and own.integer(key, head_dim) != head_dim:
            raise RequestError(f"{own.named(key)} is {own.get(key)}; accepted: the size of a key, {head_dim}")
    config = {
        "num_hidden_layers": own.layers,
        "hidden_size": own.integer("embedding_length"),
        "intermediate_size": max(widths),
        "num_attention_heads": own.heads,
        "num_key_value_heads": own.same_in_all_layers("attention.head_count_kv", own.heads),
        "head_dim": head_dim,
        "max_position_embeddings": own.integer("context_length"),
        "rms_norm_eps": own.positive("attention.layer_norm_rms_epsilon"),
        "rope_theta": own.positive("rope.freq_base", 10000.0),
        # Their converter knows no key for the biases; in the families that have them by choice, the output has one too.
        "attention_bias": "blk.0.attn_output.bias" in own.tensors,
    }
    return config if len(set(widths)) == 1 else {**config, "gluprune": {"intermediate_sizes": widths}}


def _vocab_size(own: Metadata, fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> int:
    if "token_embd.weight" not in shapes:
        # Any size will do: the tensor is about to be reported as missing, along with all others.
        return 1
    size = shapes["token_embd.weight"][0]
    tokens = fields.get("tokenizer.ggml.tokens", range(size))
    if not isinstance(tokens, list | range):
        raise OperationError("tokenizer.ggml.tokens is not a list")
    for key, stated in (
        ("tokenizer.ggml.tokens", len(tokens)),
        (own.named("vocab_size"), own.get("vocab_size", size)),
    ):
        if stated != size:
            raise OperationError(f"token_embd.weight holds {size} tokens, but {key} says {shortened(stated)}")
    return size


def is_tied(table: GGUFTable, tensors: Mapping[str, GGUFTensor]) -> bool:
    """Whether the output projection of a file is its embedding; where both are there, their bytes are compared."""
    output, embedding = tensors.get("output.weight"), tensors.get("token_embd.weight")
    if table.output != "optional":
        return table.output == "never"
    if output is None:
        return True
    if embedding is None or (output.kind, output.shape) != (embedding.kind, embedding.shape):
        return False
    return all(
        np.array_equal(read_rows(output, begin, end), read_rows(embedding, begin, end))
        for begin, end in output.chunks()
    )


# ----------------------------------------------------------------------------------------------------- writing


def write_metadata(
    table: GGUFTable, config: ModelConfig, widths: Sequence[int], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """The metadata of a file that is read as this config, `general.architecture` among them.

    Args:
      table: of the architecture.
      config: of the model.
      widths: of each layer in the file, zero neurons included.
      shapes: of all tensors of the file, by name.

    Raises:
      RequestError: the architecture cannot express the config; the message names the field.
    """
    fields = _fields(table, config, widths, {})
    if tuple(widths) != config.intermediate_sizes:
        fields[TRUE_WIDTHS] = list(config.intermediate_sizes)
    _, read = read_metadata(table, fields, shapes, config.tie_word_embeddings, _divisors(table, config))
    if table.output != "optional":  # there a file's tensors do not say it
        read = dataclasses.replace(read, tie_word_embeddings=table.output == "never")
    _refuse_lost(table, _lost(table, read, config))
    return fields


def write_mixture_metadata(
    config: MixtureConfig, sizes: MixtureSizes, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """As `write_metadata`, of a mixture of experts.

    Args:
      config: of the mixture.
      sizes: of its MLPs.
      shapes: of all tensors of the file, by name.

    Raises:
      RequestError: the architecture cannot express the config; the message names the field.
    """
    mixture, table, dense = config.mixture, config.mixture.gguf, as_dense(config, sizes)
    known = {**mixture.family.defaults, **config.data}
    computed = {**mixture.family.only, **mixture.computed}
    lost = [f"{key} = {shown(known[key])}" for key, of in computed.items() if known.get(key, of[0]) not in of]
    if 0 in sizes.experts:
        lost.append(f"mlp_only_layers or decoder_sparse_step (layer {sizes.experts.index(0)} has no experts)")
    if not mixture.is_grouped and dense.num_key_value_heads != dense.num_attention_heads:
        lost.append(f"num_key_value_heads = {dense.num_key_value_heads} for {dense.num_attention_heads} heads")
    _refuse_lost(table, lost)
    widths = {"feed_forward_length": sizes.expert_size, mixture.gguf_width: sizes.expert_size}
    if mixture.dense_width is not None:
        widths["feed_forward_length"] = integer(known, mixture.dense_width, "config.json")
    counts = {"expert_count": max(sizes.experts), "expert_used_count": used_experts(config)}
    fields = _fields(table, dense, dense.intermediate_sizes, {**widths, **counts})
    read = read_mixture_metadata(mixture, fields, shapes, config.tied, _divisors(table, dense))
    assert read.sizes.experts == sizes.experts
    again = as_dense(read, read.sizes)
    if table.output != "optional":
        again = dataclasses.replace(again, tie_word_embeddings=table.output == "never")
    _refuse_lost(table, _lost(table, again, dense))
    return fields


def _fields(table: GGUFTable, config: ModelConfig, widths: Sequence[int], further: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of an architecture; `further` replaces some."""
    rope = main_rope(config)
    values = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": widths[0] if len(set(widths)) == 1 else list(widths),
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        **({} if rope is None else {"rope.freq_base": rope.theta}),
        "vocab_size": config.vocab_size,
        **table.metadata(config),
        **further,
    }
    return {
        "general.architecture": table.architecture,
        **{f"{table.architecture}.{key}": value for key, value in values.items()},
    }


def _divisors(table: GGUFTable, config: ModelConfig) -> dict[str, tuple[float, ...]]:
    """The divisors of RoPE frequencies as they are read from a file."""
    return {name: tuple(float(str(np.float32(one))) for one in v) for name, v in table.divisors(config).items()}


def _lost(table: GGUFTable, read: ModelConfig, config: ModelConfig) -> list[str]:
    """The fields of a config that a file does not keep, of which `read` is what it says."""
    lost = _differing_fields(read, config)
    return [*lost, "output_bias"] if config.output_bias and not table.output_bias else lost


def _refuse_lost(table: GGUFTable, lost: Sequence[str]) -> None:
    if lost:
        raise RequestError(
            f"a GGUF file of llama.cpp's architecture {table.architecture!r} cannot express {some(lost)} of this "
            f"model; write `format` hf"
        )


def _differing_fields(first: ModelConfig, second: ModelConfig) -> list[str]:
    """The fields whose values differ, numbers by more than the float32 of a file does."""
    fields = (field.name for field in dataclasses.fields(ModelConfig) if field.name != "width_multiple")
    return [name for name in fields if not _same(getattr(first, name), getattr(second, name))]


def _same(first: Any, second: Any) -> bool:
    if dataclasses.is_dataclass(first) and type(first) is type(second):
        names = (field.name for field in dataclasses.fields(first))
        return all(_same(getattr(first, name), getattr(second, name)) for name in names)
    if isinstance(first, tuple) and isinstance(second, tuple):
        return len(first) == len(second) and all(map(_same, first, second))
    if isinstance(first, float) and isinstance(second, float):
        return math.isclose(first, second, rel_tol=2.0**-22)
    return bool(first == second)
