"""What a model family calls things: the shape of the tables in this folder, and nothing of any one family.

A family is data. The decoder (`gluprune_jax.models`) is one for all and knows none of them: what they differ in stands
in `ModelConfig`, and a table here says which keys of a `config.json` or of GGUF metadata become which of its fields.
How the next one is added: `docs/families.md`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from convert.gguf.metadata import Metadata
from gluprune_jax.models.config import ModelConfig

Config = Mapping[str, Any]  # a parsed `config.json`, completed by the defaults of its family

FULL, SLIDING = "full_attention", "sliding_attention"  # what `layer_types` calls layers without and with a window


@dataclasses.dataclass(frozen=True)
class TensorRow:
    """One tensor, or with `{i}` one of each layer.

    Attributes:
      ours: the path of our parameter, with dots.
      hf: its name in Hugging Face files.
      gguf: its name in GGUF files.
      shape: the axes in the order of the Hugging Face file, as products of the model's dimensions: V vocabulary, D
        hidden size, F intermediate size, H head dim, NH query heads x head dim, KH key/value heads x head dim. Our
        arrays hold the same elements in the same order (NH and KH of projections and biases are two axes in ours).
      needs: a field of `ModelConfig` and the values with which a model has this tensor; None where all have it.
    """

    ours: str
    hf: str
    gguf: str
    shape: str
    needs: tuple[str, tuple[object, ...]] | None = None


@dataclasses.dataclass(frozen=True)
class GGUFTable:
    """What llama.cpp makes of an architecture. All keys stand below `<architecture>.`.

    Attributes:
      architecture: `general.architecture`.
      config: what a `config.json` of the family would say beyond what all architectures have (`convert.gguf.config`),
        from the metadata, and what llama.cpp does without being told. A `model_type` is that of another family, which
        llama.cpp knows under the same name.
      metadata: the other way: what a file says of a config beyond what all architectures have. It need not see what
        the architecture cannot express: what is written is read back and compared.
      keys: those that it looks at.
      only: keys for what is not implemented, with the values that switch it off.
      inert: keys without effect on the function that the model computes.
      vectors: tensors that belong to the config: divisors of RoPE frequencies.
      divisors: the values of those that a config has, by name.
      permuted: the last part of the paths of our parameters whose rows llama.cpp keeps in another order: for a RoPE
        that pairs neighbouring dimensions of a head.
      norm_offset: what its converter adds to the weights of norms.
      spaces_stay_behind: of a SentencePiece tokenizer whose special tokens swallow the spaces behind them, those that
        do not; None where none swallows any. No file says so.
      output: whether `output.weight` is there only if it is not the embedding ("optional"), in no file, or in all.
      output_bias: whether llama.cpp loads a bias of the projection behind the attention.
      applies_windows: whether llama.cpp computes with the windows that a file states.
      per_layer: the table of the architecture under which llama.cpp takes layers of different widths; None where
        there is none.
    """

    architecture: str
    config: Callable[[Metadata], dict[str, Any]]
    metadata: Callable[[ModelConfig], dict[str, Any]]
    keys: frozenset[str] = frozenset()
    only: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    inert: frozenset[str] = frozenset()
    vectors: frozenset[str] = frozenset()
    divisors: Callable[[ModelConfig], dict[str, tuple[float, ...]]] = lambda _: {}
    permuted: frozenset[str] = frozenset()
    norm_offset: int = 0
    spaces_stay_behind: frozenset[str] | None = None
    output: Literal["optional", "never", "required"] = "optional"
    output_bias: bool = False
    applies_windows: bool = True
    per_layer: "GGUFTable | None" = None


@dataclasses.dataclass(frozen=True)
class Number:
    """A number of `config.json` that becomes a field of `ModelConfig`.

    Attributes:
      key: its key.
      power: the field is `number ** power`.
      optional: whether it may be null, which is None in `ModelConfig`.
      whole: whether transformers takes whole numbers only.
    """

    key: str
    power: float = 1.0
    optional: bool = False
    whole: bool = False


@dataclasses.dataclass(frozen=True)
class Rotation:
    """Which layers rotate queries and keys: those of some families have no position embedding (NoPE).

    Attributes:
      read: whether each of a number of layers does, from a config, with the name of the file for
        errors.
      write: the keys that say so.
    """

    read: Callable[[Config, int, str], Sequence[bool]]
    write: Callable[[Sequence[bool]], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Wrapper:
    """A multimodal model whose text half is one of the family.

    Attributes:
      model_type: as its `config.json` says it.
      architecture: its class of `transformers`.
      text: the key of the text half's config.
      dropped: keys of the other half.
      beside: how the names of its tensors begin, behind an optional `model.`.
    """

    model_type: str
    architecture: str
    text: str
    dropped: frozenset[str]
    beside: tuple[str, ...]


def all_full(config: Config, layers: int, where: str) -> list[str]:
    """No layer has a window."""
    return [FULL] * layers


def all_rotate(config: Config, layers: int, where: str) -> list[bool]:
    """Every layer rotates."""
    return [True] * layers


KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
}
ROPE_TYPES = {"default": "default", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}
ATTENTION_BIAS = {"qkv_bias": "attention_bias", "output_bias": "attention_bias"}


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family as Hugging Face files know it.

    Attributes:
      name: its name for people.
      covers: models of it, as the documentation lists them.
      model_type: as `config.json` says it.
      architecture: the class of `transformers` with a language-modelling head.
      heads: other classes that hold the same weights; `AutoModelForCausalLM` gives them a head of random numbers.
      defaults: what an absent key means where that is not an error, and not the same in all families. That a key
        stands here says also that the class of `transformers` knows it: `sliding_window`, `use_sliding_window`,
        `layer_types` and `partial_rotary_factor` are read and written only then. An absent `head_dim` is
        `hidden_size / num_attention_heads` if it does not stand here, and so is a null.
      only: keys whose other values would change the function that the model computes, with those that are supported.
      written: keys that an export says although no field of `ModelConfig` does, with their values: the supported one
        where the class of `transformers` has another default.
      tensors: its tensors, in the order of the forward pass.
      gguf: its GGUF table. Where llama.cpp knows several families under one name, they share it. None of
        mixtures of experts, whose table stands in `mixtures.Mixture`.
      keys: the key in `config.json` of each field of `ModelConfig` that is a plain number or flag, by field.
      widths: the key of the intermediate size, and others that an export gives the same value.
      fields: fields of `ModelConfig` that are the same in all models of it.
      flags: the key that switches on a field of `ModelConfig`, by field.
      numbers: further numbers that become fields of `ModelConfig`, by field.
      inert: keys that its class takes and that change nothing, beyond those of all families.
      layer_types: the names that `layer_types` may hold, and which of `FULL` and `SLIDING` they mean. An export uses
        the first one for either.
      layer_kinds: FULL or SLIDING for each of a number of layers, where `layer_types` is absent or null.
      rotation: which layers rotate.
      rope_types: the names that `rope_type` may have, and which type they mean.
      rope_in_float32: as `Rope.in_float32`.
      thetas: the old key of the base of the frequencies for either kind of layer, where RoPE is not the same for both
        and `rope_parameters` are nested by kind; empty where it is. `rope_scaling` is for FULL alone then.
      wrapper: the multimodal model whose text half it is, if there is one.
      needs_bos: whether its models compute nothing sensible of a text that does not begin with BOS.
    """

    name: str
    covers: str
    model_type: str
    architecture: str
    heads: tuple[str, ...]
    defaults: Mapping[str, Any]
    only: Mapping[str, tuple[Any, ...]]
    written: Mapping[str, Any]
    tensors: tuple[TensorRow, ...]
    gguf: GGUFTable | None = None
    keys: Mapping[str, str] = dataclasses.field(default_factory=lambda: KEYS)
    widths: tuple[str, ...] = ("intermediate_size",)
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    flags: Mapping[str, str] = dataclasses.field(default_factory=dict)
    numbers: Mapping[str, Number] = dataclasses.field(default_factory=dict)
    inert: frozenset[str] = frozenset()
    layer_types: Mapping[str, str] = dataclasses.field(default_factory=lambda: {FULL: FULL})
    layer_kinds: Callable[[Config, int, str], Sequence[str]] = all_full
    rotation: Rotation = Rotation(all_rotate, lambda _: {})
    rope_types: Mapping[str, str] = dataclasses.field(default_factory=lambda: ROPE_TYPES)
    rope_in_float32: bool = False
    thetas: Mapping[str, str] = dataclasses.field(default_factory=dict)
    wrapper: Wrapper | None = None
    needs_bos: bool = False
