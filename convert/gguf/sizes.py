"""How large a GGUF file of a model is in the types that llama.cpp quantises to, from the shapes of its tensors alone.

llama.cpp quantises rows: those of `ffn_down` are as long as the MLP is wide. K-quants (Q4_K and the like) take a row in
blocks of 256 values, the plain types (Q8_0, Q4_0) in blocks of 32. A row that is no whole number of blocks gets a type
of smaller blocks, which has more bits, and one that 32 does not divide stays in F16: a narrower MLP can make a larger
file. The rules are those of `llama-quantize` without an importance matrix, as of November 2026.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from convert.families.family import Family
from convert.families.names import TensorName, file_shape, grouped, is_router, tensor_names
from convert.huggingface.mixture_config import MixtureConfig, as_dense
from gluprune_jax.errors import RequestError, format_bytes
from gluprune_jax.models.config import ModelConfig
from gluprune_jax.pruning.mixture import MixtureSizes
from gluprune_jax.pruning.targets import padded_width

# Values and bytes of a block of each type of a tensor. (Importing `gguf` for them takes most of a second.)
BLOCKS: Mapping[str, tuple[int, int]] = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q8_0": (32, 34),
    "Q5_1": (32, 24),
    "Q5_0": (32, 22),
    "Q4_0": (32, 18),
    "Q6_K": (256, 210),
    "Q5_K": (256, 176),
    "Q4_K": (256, 144),
}
# What files are called by, and the type of most of their matrices.
FILE_TYPES: Mapping[str, str] = {
    "F32": "F32",
    "F16": "F16",
    "BF16": "BF16",
    "Q8_0": "Q8_0",
    "Q6_K": "Q6_K",
    "Q5_K_M": "Q5_K",
    "Q4_K_M": "Q4_K",
    "Q4_0": "Q4_0",
}
SHOWN = ("F16", "Q8_0", "Q4_K_M")  # by reports
BLOCK = 256  # values of a K-quant: rows of a multiple of it suit every type
_QUANTISED = tuple(name for name, kind in FILE_TYPES.items() if BLOCKS[kind][0] > 1)
_MIXED = ("Q5_K_M", "Q4_K_M")  # the M: some matrices of some layers get Q6_K
# What a row gets that blocks of 256 do not divide.
_SMALLER_BLOCKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_SENSITIVE = ("attn_v.weight", "attn_qkv.weight")
_DOWN = ("ffn_down.weight", "ffn_down_exps.weight")
_LAYERS_OF_70B = 80
# Beside so many experts attention is a small part of a layer, so that finer types cost little there.
_EXPERTS_OF_MIXTRAL = 8
_ALIGNMENT = 32
_HARDLY = 0.02  # a quantised model that is less than so much smaller than the dense one is hardly so


def check_file_type(name: str) -> None:
    """Refuses a file type whose size is not known.

    Raises:
      RequestError: it is none of `FILE_TYPES`.
    """
    if name not in FILE_TYPES:
        raise RequestError(f"`target_type` is {name}; choose from hf, orbax, {', '.join(FILE_TYPES)}")


def forecast(config: ModelConfig, family: Family, metadata: int) -> dict[str, int]:
    """The bytes of a model's files, by file type: those of `SHOWN`.

    Args:
      config: the architecture as the file has it, so with the widths after any padding.
      family: its family.
      metadata: the bytes of what is no tensor (`metadata_bytes`).
    """
    return {file_type: metadata + tensor_bytes(config, family, file_type) for file_type in SHOWN}


def forecast_mixture(config: MixtureConfig, sizes: MixtureSizes, metadata: int) -> dict[str, int]:
    """As `forecast`, of a mixture of experts.

    Args:
      config: of the mixture.
      sizes: of its MLPs, as the file has them.
      metadata: the bytes of what is no tensor (`mixture_metadata_bytes`).
    """
    return {file_type: metadata + mixture_tensor_bytes(config, sizes, file_type) for file_type in SHOWN}


def with_width(config: ModelConfig, width: int) -> ModelConfig:
    """The architecture with one width for all layers, as a Hugging Face folder has it and what is converted from it."""
    return dataclasses.replace(config, intermediate_sizes=(width,) * config.num_hidden_layers, width_multiple=1)


def tensor_bytes(config: ModelConfig, family: Family, file_type: str) -> int:
    """The bytes of all tensors of a file, each filled up to the alignment.

    Args:
      config: the architecture as the file has it.
      family: its family, which says what tensors there are.
      file_type: one of `FILE_TYPES`.
    """
    return _bytes_of(tensor_names(config, family), config, file_type)


def mixture_tensor_bytes(config: MixtureConfig, sizes: MixtureSizes, file_type: str) -> int:
    """As `tensor_bytes`, of a mixture of experts.

    Args:
      config: of the mixture.
      sizes: of its MLPs, as the file has them.
      file_type: one of `FILE_TYPES`.
    """
    return _bytes_of(config.names_with(sizes), as_dense(config, sizes), file_type, max(sizes.experts))


def _bytes_of(names: Iterable[TensorName], config: ModelConfig, file_type: str, experts: int = 0) -> int:
    total = 0
    for name, parts in grouped(names, "gguf").items():
        shape = file_shape(parts)
        kind = tensor_type(name, shape, file_type, config, experts)
        total += _aligned(math.prod(shape[:-1]) * row_bytes(kind, shape[-1]))
    return total


def row_bytes(kind: str, length: int) -> int:
    """The bytes of a row of `length` values, a whole number of blocks."""
    values, nbytes = BLOCKS[kind]
    return length // values * nbytes


def tensor_type(name: str, shape: Sequence[int], file_type: str, config: ModelConfig, experts: int = 0) -> str:
    """The type that llama.cpp gives a tensor of a file.

    Args:
      name: of the tensor in the file.
      shape: outermost axis first.
      file_type: one of `FILE_TYPES`.
      config: the architecture of the model.
      experts: how many a layer has.
    """
    default = FILE_TYPES[file_type]
    if len(shape) < 2 or is_router(name):
        return "F32"  # norms, biases and what chooses among experts, always
    if file_type not in _QUANTISED:
        return default
    return _fitting(_wanted_type(name, shape[-1], file_type, config, experts), shape[-1])


def _wanted_type(name: str, length: int, file_type: str, config: ModelConfig, experts: int) -> str:
    """The type of a matrix as far as its place in the model decides, whatever the length of its rows allows."""
    default, layers = FILE_TYPES[file_type], config.num_hidden_layers
    if name == "output.weight" or (name == "token_embd.weight" and config.tie_word_embeddings):
        fits = length % BLOCKS[default][0] == 0
        return "Q6_K" if fits and default != "Q8_0" else "Q8_0"
    if not name.startswith("blk."):
        return default
    _, layer, tensor = name.split(".", 2)
    if experts == _EXPERTS_OF_MIXTRAL and tensor in ("attn_k.weight", "attn_v.weight"):
        return "Q8_0"
    if experts == _EXPERTS_OF_MIXTRAL and tensor == "attn_output.weight" and file_type == "Q4_K_M":
        return "Q5_K"
    if file_type not in _MIXED:
        return default
    is_sensitive = tensor in _SENSITIVE
    if (is_sensitive or tensor in _DOWN) and _gets_more_bits(int(layer), layers):
        return "Q6_K"
    # Eight heads share each value head of the 70B models, so that better ones cost little.
    return "Q5_K" if is_sensitive and layers == _LAYERS_OF_70B and default == "Q4_K" else default


def _gets_more_bits(layer: int, layers: int) -> bool:
    """Whether it is one of the first or last eighth of the layers, or every third between them."""
    first, last = layers // 8, 7 * layers // 8
    return layer < first or layer >= last or (layer - first) % 3 == 2


def _fitting(kind: str, length: int) -> str:
    """The type itself where rows of `length` are whole blocks, else one that they are whole blocks of."""
    tried = kind if length % BLOCKS[kind][0] == 0 else _SMALLER_BLOCKS.get(kind, "F16")
    return tried if length % BLOCKS[tried][0] == 0 else "F16"


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT


# ------------------------------------------------------------------------------------------------ what is no tensor


def metadata_bytes(config: ModelConfig, family: Family, assets: Mapping[str, bytes]) -> int:
    """About the bytes of a file that are no tensor: the tokenizer, and where each tensor lies.

    Args:
      config: the architecture.
      family: its family.
      assets: the files of the tokenizer by name; without any of them, none is counted.
    """
    return _metadata_bytes(tensor_names(config, family), assets, config.vocab_size)


def mixture_metadata_bytes(config: MixtureConfig, assets: Mapping[str, bytes]) -> int:
    """As `metadata_bytes`, of a mixture of experts."""
    return _metadata_bytes(config.names, assets, config.names[0].shape[0])


def _metadata_bytes(names: Iterable[TensorName], assets: Mapping[str, bytes], vocab_size: int) -> int:
    shapes = {name: file_shape(parts) for name, parts in grouped(names, "gguf").items()}
    # A name with its length, the number of axes and each of them, the type, the offset.
    infos = sum(8 + len(name) + 4 + 8 * len(shape) + 4 + 8 for name, shape in shapes.items())
    return infos + _tokenizer_bytes(assets, vocab_size) + len(assets.get("chat_template.jinja", b""))


def _tokenizer_bytes(assets: Mapping[str, bytes], vocab_size: int) -> int:
    """Tokens and merges are texts with their lengths; each token has a type, and in SentencePiece a score."""
    if "tokenizer.json" not in assets:
        return len(assets.get("tokenizer.model", b""))
    try:
        data = json.loads(assets["tokenizer.json"])
        model, added = data["model"], data.get("added_tokens", [])
        tokens = {*_texts(model["vocab"]), *(token["content"] for token in added)}
        has_scores = bool(model.get("byte_fallback"))  # such a file has no merges
        merges = [] if has_scores else [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return len(assets["tokenizer.json"])  # of another kind, or damaged: whoever reads it says so
    each = 8 + 4 + 4 * has_scores
    texts = sum(each + len(token.encode(errors="replace")) for token in tokens)
    unused = max(0, vocab_size - len(tokens)) * (each + len("[PAD100000]"))
    return texts + unused + sum(8 + len(merge.encode(errors="replace")) for merge in merges)


def _texts(vocab: Any) -> list[str]:
    """The tokens of a BPE vocabulary, a table, or of a unigram one, which lists them with scores."""
    return list(vocab) if isinstance(vocab, dict) else [token for token, _ in vocab]


# ---------------------------------------------------------------------------------------------------------- warning


def quantisation_warning(
    dense: Mapping[str, int],
    pruned: Mapping[str, int],
    widths: Sequence[int],
    dense_width: int,
    made: str | None = None,
) -> str | None:
    """What to say of widths with which a quantised model is larger than the dense one, or hardly smaller; else None.

    Args:
      dense: bytes of the dense model's files (`forecast`).
      pruned: those of the pruned model's.
      widths: of its layers, as the files have them.
      dense_width: of the dense model's widest layer; what would be padded to it is not proposed.
      made: the type of the file that is written, if it is: where it is a quantised one, the others do not matter.
    """
    quantised = [name for name in dense if name in _QUANTISED]
    blocks = {name: BLOCKS[FILE_TYPES[name]][0] for name in ([made] if made in quantised else quantised)}
    change = {name: pruned[name] / dense[name] - 1 for name in blocks if any(width % blocks[name] for width in widths)}
    bad = {name: by for name, by in change.items() if by > -_HARDLY}
    if not bad:
        return None
    name, by = max(bad.items(), key=lambda item: item[1])
    block = max(blocks[name] for name in bad)  # suits all of them
    unsuited = sorted({width for width in widths if width % block})
    how = f"{by:.0%} larger than the dense one" if by > 0 else "hardly smaller than the dense one"
    which = f"width {unsuited[0]} is" if len(unsuited) == 1 else f"{len(unsuited)} widths of layers are"
    remedy = f"`multiple_of` {block}"
    if padded_width(max(widths), block) < dense_width:
        remedy = f"`pad_to` {block}, which loses no neuron, or {remedy}"
    return (
        f"quantised by llama.cpp the pruned model would be {how} ({name}: {format_bytes(pruned[name])}, dense "
        f"{format_bytes(dense[name])}), because {which} no multiple of {block}; give {remedy}"
    )
