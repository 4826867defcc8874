"""The names of all tensors of a model: our parameters, Hugging Face, GGUF. They drive loading and saving alike.

The rows stand in the tables of the families; here they meet a config, and names that files spell otherwise.
"""

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal

from convert.families.family import Family, TensorRow
from convert.families.registry import TENSORS
from gluprune_jax.errors import listed
from gluprune_jax.models.config import ModelConfig, name_of

_BASE = "model."
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"

# A name of the table behind any prefix, the shortest that leaves one; that of the base model may be missing.
_SPELLING = re.compile(
    r"(?P<prefix>(?:.+?\.)??)(?:model\.)?(?P<name>"
    + "|".join(re.escape(row.hf.removeprefix(_BASE)).replace(r"\{i\}", r"(?:0|[1-9]\d*)") for row in TENSORS)
    + ")"
)

# What the config determines: transformers has kept it in files, and ignores it there. In a layer or in the model.
_DERIVED = re.compile(r"(?:.+\.)?rotary_emb\.(?:(?:original_)?inv_freq|cos_cached|sin_cached)")

# Levels that wrappers of modules put into names, anywhere: torch.compile; DDP, DataParallel and DeepSpeed; FSDP;
# activation checkpointing; Lightning.
_WRAPPERS = re.compile(
    r"(?:(?<=^)|(?<=\.))(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)

_QUANTISED = re.compile(
    r".*\.(?:qweight|qzeros|g_idx|weight_packed|weight_scale|weight_scale_inv|weight_zero_point|input_scale|SCB|"
    r"weight\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+)|weight_format)|.*[:_](?:qdata|scale)"
)
_ADAPTER = re.compile(r".*\.(?:lora_[A-Za-z_]+|base_layer|modules_to_save|original_module)(?:\..*)?")


@dataclasses.dataclass(frozen=True)
class TensorName:
    """One tensor of a model.

    Attributes:
      path: where it stands in the model's state, such as `("layers", 3, "mlp", "gate_proj")`.
      hf: its name in Hugging Face files. Tensors with the same one lie one under the other in it (`grouped`).
      gguf: its name in GGUF files, as `hf`; experts are stacked there.
      shape: its logical shape in Hugging Face files, or of its part of one.
      neuron_axis: the axis of `shape` that counts MLP neurons, or None.
    """

    path: tuple[str | int, ...]
    hf: str
    gguf: str
    shape: tuple[int, ...]
    neuron_axis: int | None

    @property
    def name(self) -> str:
        """The name of our parameter, such as "layers.3.mlp.gate_proj"."""
        return name_of(self.path)


def tensor_names(config: ModelConfig, family: Family) -> list[TensorName]:
    """All tensors of a model, in the order of the forward pass. A tied output projection is not one of them."""
    names = []

    def add(row: TensorRow, i: int | None) -> None:
        H = config.head_dim
        sizes = {
            "V": config.vocab_size,
            "D": config.hidden_size,
            "H": H,
            "NH": config.num_attention_heads * H,
            "KH": config.num_key_value_heads * H,
            "F": 0 if i is None else config.intermediate_sizes[i],
        }
        axes = row.shape.split()
        names.append(
            TensorName(
                path=tuple(int(part) if part.isdigit() else part for part in row.ours.format(i=i).split(".")),
                hf=row.hf.format(i=i),
                gguf=row.gguf.format(i=i),
                shape=tuple(sizes[axis] for axis in axes),
                neuron_axis=axes.index("F") if "F" in axes else None,
            )
        )

    rows = [row for row in family.tensors if row.needs is None or getattr(config, row.needs[0]) in row.needs[1]]
    per_layer = [row for row in rows if "{i}" in row.ours]
    for row in rows:
        if row is per_layer[0]:
            for i in range(config.num_hidden_layers):
                for layer_row in per_layer:
                    add(layer_row, i)
        elif row not in per_layer:
            add(row, None)
    return names


def grouped(names: Iterable[TensorName], file: Literal["hf", "gguf"]) -> dict[str, list[TensorName]]:
    """The tensors of our models in each tensor of a file, one under the other, by its name there."""
    groups: dict[str, list[TensorName]] = {}
    for name in names:
        groups.setdefault(getattr(name, file), []).append(name)
    return groups


def file_shape(parts: Sequence[TensorName]) -> tuple[int, ...]:
    """The shape of a tensor of a GGUF file that holds these: one under the other, of experts stacked."""
    if "experts" in parts[0].path:
        return (len(parts), *parts[0].shape)
    return (sum(part.shape[0] for part in parts), *parts[0].shape[1:])


def is_router(name: str) -> bool:
    """Whether a tensor of a GGUF file chooses among experts; llama.cpp keeps it in float32 in every type of file."""
    return name.endswith(".ffn_gate_inp.weight")


def is_derived(name: str) -> bool:
    """Whether a tensor of a Hugging Face file is one that the config determines."""
    return _DERIVED.fullmatch(_WRAPPERS.sub("", name)) is not None


def not_plain_weights(names: Iterable[str]) -> str | None:
    """What tensor names show a file to hold instead of a model's weights, with what would do; None if nothing."""
    names = list(names)
    if adapters := [name for name in names if _ADAPTER.fullmatch(name)]:
        return (
            f"{len(adapters)} of {len(names)} tensors belong to an adapter ({listed(adapters, 100)}); merge it into "
            f"the model first, with merge_and_unload of peft, and save that"
        )
    if quantised := [name for name in names if _QUANTISED.fullmatch(name)]:
        return (
            f"{len(quantised)} of {len(names)} tensors belong to quantised weights ({listed(quantised, 100)}); give "
            f"the model that was quantised, in float32, float16 or bfloat16"
        )
    return None


def standard_names(names: Collection[str], tied: bool) -> tuple[dict[str, str], list[str]]:
    """Finds the tensors that names of a Hugging Face file mean.

    transformers 5 loads names whose prefix `model.` is missing or there twice. It does not load, and silently gives
    random weights for, names with anything else before them, which are clear all the same: levels that wrappers of
    modules leave (`_orig_mod.`, `module.`) and one prefix that all names have (`base_model.model.`,
    `language_model.`). Of tied tensors it loads whichever name is there.

    Args:
      names: of all tensors but derived ones.
      tied: whether the output projection is the embedding.

    Returns:
      For each name the one of `tensor_names`, or itself if it is none; and what was changed, one sentence each.

    Raises:
      ValueError: two names for one tensor, or the tensors of two models; the message says which.
    """
    found = {name: match for name in names if (match := _SPELLING.fullmatch(_WRAPPERS.sub("", name)))}
    body = {match["prefix"] for match in found.values() if match["name"] != _HEAD}
    if len(body) > 1:
        kinds = listed([repr(prefix) for prefix in sorted(body)], 120)
        raise ValueError(f"names of tensors have {len(body)} different prefixes, {kinds}; accepted: one model")
    prefix = next(iter(body), "")
    standard, notes = {}, []
    for name in names:
        match = found.get(name)
        # The head stands beside the base model, or where one has been wrapped further out.
        if match and match["name"] == _HEAD and not (prefix + _BASE).startswith(match["prefix"]):
            match = None
        standard[name] = name if match is None else match["name"] if match["name"] == _HEAD else _BASE + match["name"]
    heads = [name for name, meant in standard.items() if meant == _HEAD]
    if tied and heads and _EMBEDDING not in standard.values():
        standard[heads[0]] = _EMBEDDING
        notes.append(f"{listed([heads[0]])} was read as the embedding that it is tied to")
    first: dict[str, str] = {}
    for name, meant in standard.items():
        if meant in first:
            raise ValueError(f"{listed([first[meant], name])} are two tensors for {meant}; accepted: one")
        first[meant] = name
    return standard, notes + _changes(found, prefix)


def _changes(found: Mapping[str, re.Match[str]], prefix: str) -> list[str]:
    """What `standard_names` dropped from names and put before them."""
    notes = []
    dropped = {name: [*_WRAPPERS.findall(name), *[prefix] * (match["prefix"] != "")] for name, match in found.items()}
    if names := [name for name, parts in dropped.items() if parts]:
        parts = sorted({part for name in names for part in dropped[name]})
        notes.append(f"{listed([repr(part) for part in parts])} was dropped from the names of {len(names)} tensors")
    inner = [match[0].removeprefix(match["prefix"]) for match in found.values() if match["name"] != _HEAD]
    if bare := [name for name in inner if not name.startswith(_BASE)]:
        notes.append(f"{_BASE!r} was put before the names of {len(bare)} tensors")
    return notes
