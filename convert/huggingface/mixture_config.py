"""Between `config.json` and what pruning needs to know of a mixture of experts.

Nothing here runs the model, so a key that does not say which tensors there are is kept as it is, whatever it means to
`transformers`: without some of its experts' neurons, the model still is what the key makes of it.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from convert.families.family import FULL, TensorRow
from convert.families.mixtures import COUNTS, MIXTURES, Mixture
from convert.families.names import TensorName
from convert.huggingface.config import ROPE_KEYS
from convert.huggingface.rope import read_ropes, write_flat_rope
from convert.values import integer, number, shown
from gluprune_jax.errors import OperationError, RequestError
from gluprune_jax.models.config import NEURON_AXES, LayerAttention, ModelConfig, Rope
from gluprune_jax.pruning.mixture import MixtureSizes

# What GGUF files call the matrices of an MLP, and which of their axes counts neurons.
_GGUF_AXES = dict(zip(("gate", "up", "down"), NEURON_AXES.values(), strict=True))

_MOST_LAYERS, _MOST_MLPS = 10_000, 1_000_000  # a damaged config must not cost the memory of names so many

# Null is what an absent key is, and of a type that transformers 5 refuses, or takes for a number.
_ABSENT_IF_NULL = frozenset(
    "attention_bias head_dim norm_topk_prob output_router_logits tie_word_embeddings use_cache "
    "use_sliding_window".split()
)

# transformers 5 multiplies all experts at once, by `torch.nn.functional.grouped_mm`, which refuses strides that are no
# multiple of 16 bytes: 8 elements of bfloat16 or float16.
GROUPED = 8


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """A mixture of experts as its `config.json` describes it.

    Attributes:
      data: all of the file.
      mixture: the table of its family.
      sizes: of its MLPs.
      names: of its tensors, in the order of the forward pass.
      tied: whether the output projection is the embedding.
      num_key_value_heads: K.
      head_dim: H.
      max_position_embeddings: the longest text.
      rope: how its layers rotate.
    """

    data: Mapping[str, Any]
    mixture: Mixture
    sizes: MixtureSizes
    names: tuple[TensorName, ...]
    tied: bool
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope: Rope

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor by its name in Hugging Face files."""
        return {name.hf: name.shape for name in self.names}

    @property
    def mlps(self) -> tuple[tuple[str, str, str], ...]:
        """The names of the gate, up and down projection of each MLP, in Hugging Face files."""
        matrices = (name.hf for name in self.names if name.neuron_axis is not None)
        return tuple(zip(matrices, matrices, matrices, strict=True))

    def names_with(self, sizes: MixtureSizes) -> Iterator[TensorName]:
        """The tensors of the model whose MLPs are cut to these sizes."""
        for name in self.names:
            if (axis := name.neuron_axis) is None:
                yield name
                continue
            width = sizes.intermediate_sizes[int(name.path[1])]
            yield dataclasses.replace(name, shape=(*name.shape[:axis], width, *name.shape[axis + 1 :]))


def is_mixture(data: Any) -> bool:
    """Whether a parsed `config.json` is that of a mixture of experts that can be pruned."""
    return isinstance(data, Mapping) and isinstance(data.get("model_type"), str) and data["model_type"] in MIXTURES


def read_mixture_config(data: Any, where: str = "config.json") -> MixtureConfig:
    """What a parsed `config.json` says of the tensors of a mixture of experts.

    Raises:
      RequestError: a value that cannot be, or that is not supported.
      OperationError: it is not that of a mixture.
    """
    if not is_mixture(data):
        raise OperationError(f"{where} is no config of a mixture of experts: it holds {shown(data)}")
    mixture = MIXTURES[data["model_type"]]
    family = mixture.family
    known = {**family.defaults, **data}
    _check_supported(data, mixture, where)
    D, N = integer(known, "hidden_size", where), integer(known, "num_attention_heads", where)
    K = N if known["num_key_value_heads"] is None else integer(known, "num_key_value_heads", where)
    if known["head_dim"] is None and D % N:
        raise RequestError(f"{where} has hidden_size {D}, which {N} heads do not divide, and no head_dim; give one")
    H = D // N if known["head_dim"] is None else integer(known, "head_dim", where)
    if family.model_type == "olmoe" and H * N != D:
        raise RequestError(
            f"{where} has head_dim {H}, which transformers 4 does not read; it must be hidden_size over heads, {D / N}"
        )
    experts = _experts(known, data, mixture, where)
    widths = {True: integer(known, mixture.width, where)}
    if 0 in experts:
        assert mixture.dense_width is not None  # there are dense layers in families that have a key for them
        widths[False] = integer(known, mixture.dense_width, where)
    sizes = MixtureSizes(D, experts, tuple(widths[count > 0] for count in experts), 0)
    tied = bool(known.get("tie_word_embeddings"))
    dimensions = {"V": integer(known, "vocab_size", where), "D": D, "H": H, "NH": N * H, "KH": K * H}
    fields = {
        "pre_norm": True,
        "qk_norm": "none",
        **family.fields,
        **{field: bool(known.get(key)) for field, key in family.flags.items()},
        "tie_word_embeddings": tied,
    }
    names = tuple(_names(mixture, sizes, dimensions, fields))
    return MixtureConfig(
        data=data,
        mixture=mixture,
        sizes=dataclasses.replace(sizes, num_parameters=sum(math.prod(name.shape) for name in names)),
        names=names,
        tied=tied,
        num_key_value_heads=K,
        head_dim=H,
        max_position_embeddings=integer(known, "max_position_embeddings", where),
        rope=read_ropes(data, family, H, where, ROPE_KEYS)[FULL],
    )


def as_dense(config: MixtureConfig, sizes: MixtureSizes) -> ModelConfig:
    """The architecture with one MLP of the width of an expert in place of the experts of each layer.

    What stands around the MLPs, and how many layers there are, is the same.

    Args:
      config: of the mixture.
      sizes: of its MLPs.

    Raises:
      RequestError: a value that cannot be.
    """
    family = config.mixture.family
    known, where = {**family.defaults, **config.data}, "config.json"
    slides = known.get("sliding_window") is not None and known.get("use_sliding_window", True)
    window = integer(known, "sliding_window", where) if slides else None
    flags: dict[str, Any] = {field: bool(known.get(key)) for field, key in family.flags.items()}
    return ModelConfig(
        vocab_size=config.names[0].shape[0],
        hidden_size=sizes.hidden_size,
        intermediate_sizes=sizes.intermediate_sizes,
        num_attention_heads=integer(known, "num_attention_heads", where),
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=number(known, "rms_norm_eps", where),
        attention=(LayerAttention(config.rope, window),) * sizes.num_hidden_layers,
        tie_word_embeddings=config.tied,
        **family.fields,
        **flags,
    )


def used_experts(config: MixtureConfig) -> int:
    """How many experts each token goes to.

    Raises:
      RequestError: none, or more than there are.
    """
    known = {**config.mixture.family.defaults, **config.data}
    return integer(known, "num_experts_per_tok", "config.json", most=max(config.sizes.experts))


def write_mixture_config(config: MixtureConfig, sizes: MixtureSizes, dtype: np.dtype[Any]) -> dict[str, Any]:
    """`config.json` for a mixture of experts of other widths, in both spellings.

    Where the experts' width keeps transformers 5 from multiplying them all at once, its default, it is told to take one
    after the other.

    Args:
      config: what was read.
      sizes: of the model that is written.
      dtype: of the weights.
    """
    mixture, count = config.mixture, max(sizes.experts)
    kept = {key: value for key, value in config.data.items() if value is not None or key not in _ABSENT_IF_NULL}
    kept.pop("auto_map", None)  # it names code that is not copied
    if sizes.expert_size % GROUPED:
        kept["experts_implementation"] = "eager"
    elif config.sizes.expert_size % GROUPED and kept.get("experts_implementation") == "eager":
        del kept["experts_implementation"]  # it was there for a width that is gone
    widths = {mixture.width: sizes.expert_size}
    if mixture.dense_width is not None and 0 in sizes.experts:
        widths[mixture.dense_width] = sizes.intermediate_sizes[sizes.experts.index(0)]
    data = {
        **kept,
        "architectures": [mixture.family.architecture],
        **dict.fromkeys(COUNTS, count),
        **widths,
        "num_key_value_heads": config.num_key_value_heads,
        **write_flat_rope(config.rope, config),
        "dtype": str(dtype),
        "torch_dtype": str(dtype),
    }
    return dict(sorted(data.items()))


def one_by_one(sizes: MixtureSizes) -> str | None:
    """What the width of the experts means for transformers 5, where it is one that it cannot multiply all at once."""
    if sizes.expert_size % GROUPED == 0:
        return None
    return (
        f"{sizes.expert_size} neurons an expert are no multiple of {GROUPED}, which transformers 5 needs to multiply "
        f'all experts at once: config.json makes it take one after the other (experts_implementation "eager"), which '
        f"is slower"
    )


def _check_supported(data: Mapping[str, Any], mixture: Mixture, where: str) -> None:
    ours = mixture.family.architecture
    architectures = data.get("architectures") or [ours]
    if architectures != [ours]:
        raise RequestError(
            f"{where} has architectures {shown(architectures)}; supported is {[ours]} for {mixture.family.model_type}"
        )
    if data.get("quantization_config") is not None:
        raise RequestError(
            f"{where} asks for what is not supported: quantization_config = {shown(data['quantization_config'])} "
            f"(supported: None)"
        )


def _experts(known: Mapping[str, Any], data: Mapping[str, Any], mixture: Mixture, where: str) -> tuple[int, ...]:
    """How many experts each layer has."""
    layers = integer(known, "num_hidden_layers", where, most=_MOST_LAYERS)
    counts = {key: integer(data, key, where) for key in COUNTS if data.get(key) is not None}
    if len({*counts.values()}) > 1:
        raise RequestError(
            f"{where} has {' and '.join(f'{key} {count}' for key, count in counts.items())}, which must be the same: "
            f"transformers 4 and 5 take one of them each"
        )
    count = next(iter(counts.values()), known["num_experts"])
    if layers * count > _MOST_MLPS:
        raise RequestError(f"{where} has {count} experts in {layers} layers; supported are {_MOST_MLPS:,} in all")
    if mixture.dense_width is None:
        return (count,) * layers
    step = integer({"decoder_sparse_step": 1, **known}, "decoder_sparse_step", where)
    dense = [] if known.get("mlp_only_layers") is None else known["mlp_only_layers"]
    if not isinstance(dense, list) or not all(type(i) is int for i in dense):
        raise RequestError(f"{where} has mlp_only_layers = {shown(dense)}; it must be a list of layers, or null")
    experts = tuple(0 if i in dense or (i + 1) % step else count for i in range(layers))
    if not any(experts):
        raise RequestError(
            f"{where} has mlp_only_layers and decoder_sparse_step that leave no layer with experts; at least one of "
            f"{layers} must have them"
        )
    return experts


def _names(
    mixture: Mixture, sizes: MixtureSizes, dimensions: Mapping[str, int], fields: Mapping[str, object]
) -> Iterator[TensorName]:
    """All tensors, in the order of the forward pass."""
    rows = [row for row in mixture.family.tensors if row.needs is None or fields.get(row.needs[0]) in row.needs[1]]
    rows = [row for row in rows if "F" not in row.shape.split()]

    def named(row: TensorRow, i: int | None = None) -> TensorName:
        path = tuple(int(part) if part.isdigit() else part for part in row.ours.format(i=i).split("."))
        shape = tuple(dimensions[axis] for axis in row.shape.split())
        return TensorName(path, row.hf.format(i=i), row.gguf.format(i=i), shape, None)

    per_layer = [row for row in rows if "{i}" in row.ours]
    for row in rows:
        if row is per_layer[0]:
            for i in range(sizes.num_hidden_layers):
                yield from (named(layer_row, i) for layer_row in per_layer)
                yield from _mlp_names(mixture, sizes, i)
        elif row not in per_layer:
            yield named(row)


def _mlp_names(mixture: Mixture, sizes: MixtureSizes, i: int) -> Iterator[TensorName]:
    """The router of a layer and the matrices of each of its MLPs, of a dense layer those of its one MLP."""
    count, D, F = sizes.experts[i], sizes.hidden_size, sizes.intermediate_sizes[i]
    block = f"model.layers.{i}.{mixture.block}" if count else f"model.layers.{i}.mlp"
    if count:
        yield TensorName(
            ("layers", i, "mlp", "gate"), f"{block}.gate.weight", f"blk.{i}.ffn_gate_inp.weight", (count, D), None
        )
    for e in range(max(1, count)):
        where = f"{block}.experts.{e}" if count else block
        matrices = mixture.matrices if count else tuple(NEURON_AXES)
        for ours, theirs, (name, axis) in zip(NEURON_AXES, matrices, _GGUF_AXES.items(), strict=True):
            path = ("layers", i, "mlp", "experts", e, ours) if count else ("layers", i, "mlp", ours)
            gguf = f"blk.{i}.ffn_{name}_exps.weight" if count else f"blk.{i}.ffn_{name}.weight"
            yield TensorName(path, f"{where}.{theirs}.weight", gguf, (D, F) if axis else (F, D), axis)
