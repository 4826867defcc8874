"""Between `config.json` and what pruning needs to know of a mixture of experts.

Nothing here runs the model, so a key that does not say which tensors there are is kept as it is, whatever it means to
`transformers`: without some of its experts' neurons, the model still is what the key makes of it.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from convert.families.family import FULL
from convert.families.mixtures import COUNTS, MIXTURES, Mixture
from convert.huggingface.config import ROPE_KEYS
from convert.huggingface.rope import read_ropes, write_flat_rope
from convert.values import integer, shown
from gluprune_jax.errors import OperationError, RequestError
from gluprune_jax.models.config import Rope
from gluprune_jax.pruning.mixture import MixtureSizes

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
      tensors: the shape of each tensor by its name in files, in the order of the forward pass.
      mlps: the names of the gate, up and down projection of each MLP.
      tied: whether the output projection is the embedding.
      num_key_value_heads: K.
      head_dim: H.
      max_position_embeddings: the longest text.
      rope: how its layers rotate.
    """

    data: Mapping[str, Any]
    mixture: Mixture
    sizes: MixtureSizes
    tensors: Mapping[str, tuple[int, ...]]
    mlps: tuple[tuple[str, str, str], ...]
    tied: bool
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope: Rope


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
    tensors = dict(_tensors(mixture, sizes, dimensions, fields))
    return MixtureConfig(
        data=data,
        mixture=mixture,
        sizes=dataclasses.replace(sizes, num_parameters=sum(map(math.prod, tensors.values()))),
        tensors=tensors,
        mlps=tuple(names for i in range(len(experts)) for names in _mlps(mixture, sizes, i)),
        tied=tied,
        num_key_value_heads=K,
        head_dim=H,
        max_position_embeddings=integer(known, "max_position_embeddings", where),
        rope=read_ropes(data, family, H, where, ROPE_KEYS)[FULL],
    )


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


def _tensors(
    mixture: Mixture, sizes: MixtureSizes, dimensions: Mapping[str, int], fields: Mapping[str, object]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The names and shapes of all tensors, in the order of the forward pass."""
    rows = [row for row in mixture.family.tensors if row.needs is None or fields.get(row.needs[0]) in row.needs[1]]
    rows = [row for row in rows if "F" not in row.shape.split()]
    shapes = {row.hf: tuple(dimensions[axis] for axis in row.shape.split()) for row in rows}
    per_layer = [row.hf for row in rows if "{i}" in row.hf]
    for hf in shapes:
        if hf == per_layer[0]:
            for i, count in enumerate(sizes.experts):
                yield from ((name.format(i=i), shapes[name]) for name in per_layer)
                D, F = sizes.hidden_size, sizes.intermediate_sizes[i]
                if count:
                    yield f"model.layers.{i}.{mixture.block}.gate.weight", (count, D)
                for names in _mlps(mixture, sizes, i):
                    yield from zip(names, ((F, D), (F, D), (D, F)), strict=True)
        elif hf not in per_layer:
            yield hf, shapes[hf]


def _mlps(mixture: Mixture, sizes: MixtureSizes, i: int) -> Iterator[tuple[str, str, str]]:
    """The names of the matrices of each MLP of a layer."""
    if not sizes.experts[i]:
        gate, up, down = (f"model.layers.{i}.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
        yield gate, up, down
    for e in range(sizes.experts[i]):
        gate, up, down = (f"model.layers.{i}.{mixture.block}.experts.{e}.{name}.weight" for name in mixture.matrices)
        yield gate, up, down
