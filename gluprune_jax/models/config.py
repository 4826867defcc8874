"""The architecture of a model."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gluprune_jax.errors import RequestError

# Of each matrix of an MLP the axis that counts its neurons, in the order of the forward pass.
NEURON_AXES = {"gate_proj": 0, "up_proj": 0, "down_proj": 1}


def name_of(path: tuple[Any, ...]) -> str:
    """The name of the parameter at a path: "layers.3.mlp.gate_proj" of ("layers", 3, "mlp", "gate_proj")."""
    return ".".join(map(str, path))


# ----------------------------------------------------------------------------------------------------- rope


@dataclasses.dataclass(frozen=True)
class Llama3Rope:
    """The frequency scaling of Llama 3.1 and later (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class LinearRope:
    """Position interpolation (arXiv 2306.15595; `rope_type: linear`): every frequency divided by `factor`."""

    factor: float


@dataclasses.dataclass(frozen=True)
class YarnRope:
    """YaRN (arXiv 2309.00071; `rope_type: yarn`): low frequencies are divided by `factor`, high ones are left.

    Attributes:
      factor: of the low frequencies.
      original_max_position_embeddings: the context window that the model was trained with first.
      attention_factor: multiplies cosines and sines, so that scores are multiplied by its square.
      beta_fast: rotations within the original window from which on a frequency is left.
      beta_slow: rotations down to which it is divided.
      truncate: whether the two borders are rounded outwards to whole dimensions.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclasses.dataclass(frozen=True)
class LongRope:
    """LongRoPE (arXiv 2402.13753; `rope_type: longrope`): each frequency has two divisors of its own.

    Attributes:
      short_factor: R / 2 divisors, for rows of at most `original_max_position_embeddings` tokens.
      long_factor: R / 2 divisors, for longer rows: of all their tokens.
      original_max_position_embeddings: where they change.
      attention_factor: multiplies cosines and sines, for short rows too.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    attention_factor: float


RopeScaling = Llama3Rope | LinearRope | YarnRope | LongRope


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding (RoFormer, arXiv 2104.09864) of a layer.

    Attributes:
      theta: base of the frequencies.
      scaling: None for `rope_type: default`.
      rotary_dim: R, how many dimensions of a head rotate, its first ones; None for all.
      in_float32: whether queries and keys are rotated in float32 and rounded afterwards (OLMo), instead of cosines and
        sines being rounded to their dtype.
    """

    theta: float
    scaling: RopeScaling | None = None
    rotary_dim: int | None = None
    in_float32: bool = False


@dataclasses.dataclass(frozen=True)
class LayerAttention:
    """Which keys the attention of a layer sees, and how it rotates.

    Attributes:
      rope: None for none (NoPE).
      window: how many tokens each sees at most, itself among them; None for all before it.
    """

    rope: Rope | None
    window: int | None = None


# --------------------------------------------------------------------------------------------------- config


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture of a model: everything the forward pass depends on, and nothing else.

    What differs between families is a value of one of these fields; the defaults are Llama's.

    Attributes:
      vocab_size: V.
      hidden_size: D.
      intermediate_sizes: the logical F of each layer; its length is the number of layers.
      num_attention_heads: N.
      num_key_value_heads: K, a divisor of N.
      head_dim: H; need not be D / N.
      max_position_embeddings: the context window in tokens.
      rms_norm_eps: added to the variance in every RMSNorm.
      attention: window and RoPE of each layer.
      tie_word_embeddings: whether the output projection is the embedding; then it is stored once.
      width_multiple: the stored arrays are zero-padded along F to a multiple of this, so that they divide over
        devices. Padding neurons compute `act(0) * 0` and meet a zero column, and no export contains them.
      norm: how an RMSNorm rounds: "cast_first" rounds the normalised input before it is multiplied by the weight,
        "float32" once behind that, and "float32_plus_one" (Gemma) multiplies by 1 + weight and rounds once.
      pre_norm: whether attention and MLP read a normalised residual stream.
      post_norm: whether what they give is normalised before it is added to the residual stream.
      qk_norm: RMSNorm of queries and keys before RoPE: of each "head", or of the whole "projection".
      qkv_bias: whether the projections to queries, keys and values have biases.
      output_bias: whether the projection behind the attention has one.
      activation: of the gate.
      attention_scale: multiplies the scores; None for `H**-0.5`.
      attention_soft_cap: scores become `cap * tanh(scores / cap)` (Gemma 2).
      embedding_scale: multiplies the embedding, rounded to its dtype.
      residual_scale: multiplies what attention and MLP add to the residual stream (Granite).
      logit_scale: multiplies the logits (Granite).
      logit_soft_cap: logits become `cap * tanh(logits / cap)`, after that.
    """

    vocab_size: int
    hidden_size: int
    intermediate_sizes: tuple[int, ...]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    attention: tuple[LayerAttention, ...]
    tie_word_embeddings: bool = False
    width_multiple: int = 1
    norm: Literal["cast_first", "float32", "float32_plus_one"] = "cast_first"
    pre_norm: bool = True
    post_norm: bool = False
    qk_norm: Literal["none", "head", "projection"] = "none"
    qkv_bias: bool = False
    output_bias: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    attention_scale: float | None = None
    attention_soft_cap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_soft_cap: float | None = None

    def __post_init__(self) -> None:
        sizes = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.type in (int, "int")}
        sizes |= {f"intermediate_sizes[{i}]": size for i, size in enumerate(self.intermediate_sizes)}
        sizes |= {f"the window of layer {i}": a.window for i, a in enumerate(self.attention) if a.window is not None}
        for name, size in sizes.items():
            if size < 1:
                raise RequestError(f"the config says {name} = {size}; it must be at least 1")
        if not self.intermediate_sizes:
            raise RequestError("the config says num_hidden_layers = 0; a model has at least one layer")
        if len(self.attention) != len(self.intermediate_sizes):
            raise RequestError(
                f"the config says how {len(self.attention)} layers attend, and the widths of "
                f"{len(self.intermediate_sizes)}; both must be given for every layer"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise RequestError(
                f"the config says num_attention_heads = {self.num_attention_heads} and num_key_value_heads = "
                f"{self.num_key_value_heads}; the second must divide the first"
            )
        for rope in {attention.rope for attention in self.attention} - {None}:
            assert rope is not None
            rotary_dim = self.head_dim if rope.rotary_dim is None else rope.rotary_dim
            if rope.rotary_dim is None and rotary_dim % 2:
                raise RequestError(f"the config says head_dim = {self.head_dim}; rotary embeddings need an even one")
            if rotary_dim % 2 or not 0 < rotary_dim <= self.head_dim:
                raise RequestError(
                    f"the config says that {rotary_dim} of {self.head_dim} dimensions of a head rotate; it must be an "
                    f"even number, and not more than there are"
                )
            if isinstance(rope.scaling, LongRope):
                for name in ("short_factor", "long_factor"):
                    if (count := len(getattr(rope.scaling, name))) != rotary_dim // 2:
                        raise RequestError(
                            f"the config has {count} numbers in {name}; {rotary_dim} rotary dimensions need "
                            f"{rotary_dim // 2}"
                        )

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        # Compiled code asks at every call, and the attention of 100 layers takes a while.
        return hash(tuple(getattr(self, field.name) for field in dataclasses.fields(self)))

    @property
    def num_hidden_layers(self) -> int:
        """The number of decoder layers, L."""
        return len(self.intermediate_sizes)

    @property
    def stored_intermediate_sizes(self) -> tuple[int, ...]:
        """F of each layer as stored: the logical size rounded up to `width_multiple`."""
        return tuple(-(-size // self.width_multiple) * self.width_multiple for size in self.intermediate_sizes)

    @property
    def expansion_ratio(self) -> float:
        """Mean intermediate size over hidden size."""
        return sum(self.intermediate_sizes) / self.num_hidden_layers / self.hidden_size

    @property
    def num_parameters(self) -> int:
        """Parameters of the logical model: tied embeddings counted once, width padding not at all."""
        D, H, N, K = self.hidden_size, self.head_dim, self.num_attention_heads, self.num_key_value_heads
        attention = 2 * D * H * (N + K) + H * (N + 2 * K) * self.qkv_bias + D * self.output_bias
        attention += {"none": 0, "head": 2 * H, "projection": H * (N + K)}[self.qk_norm]
        norms = 2 * D * (self.pre_norm + self.post_norm)
        embeddings = self.vocab_size * D * (1 if self.tie_word_embeddings else 2)
        layers = sum(attention + norms + 3 * D * size for size in self.intermediate_sizes)
        return embeddings + layers + D

    @property
    def context_length(self) -> int:
        """The longest row of tokens that is computed in one way, however it is cut into parts and cached.

        A model with `LongRope` rotates longer rows otherwise, from their first token on: what is cached would not fit.
        """
        ropes = {attention.rope for attention in self.attention}
        originals = [
            rope.scaling.original_max_position_embeddings
            for rope in ropes
            if rope is not None and isinstance(rope.scaling, LongRope)
        ]
        return min(self.max_position_embeddings, *originals) if originals else self.max_position_embeddings

    def with_layers(self, layers: Sequence[int], intermediate_sizes: Sequence[int] | None = None) -> "ModelConfig":
        """The architecture with only some of the layers, by index, and other widths for these if they are given."""
        widths = [self.intermediate_sizes[i] for i in layers] if intermediate_sizes is None else intermediate_sizes
        attention = tuple(self.attention[i] for i in layers)
        return dataclasses.replace(self, intermediate_sizes=tuple(widths), attention=attention)

    def check_tokens(self, tokens: NDArray[np.int32]) -> None:
        """Makes sure that token ids lie in the vocabulary: compiled code would quietly take others for one that does.

        Raises:
          RequestError: one does not.
        """
        outside = tokens[(tokens < 0) | (tokens >= self.vocab_size)]
        if outside.size:
            raise RequestError(
                f"token id {outside[0]} lies outside the model's vocabulary of {self.vocab_size}; tokenizer and model "
                f"do not belong together"
            )
