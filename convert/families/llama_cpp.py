"""What GGUF files of several architectures have in common, as a `config.json` in the spelling of transformers 4.

What a file does not say is what llama.cpp does without being told, in the version of October 2026.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from convert.families.family import FULL, SLIDING
from convert.gguf.metadata import Metadata
from gluprune_jax.errors import OperationError, RequestError, shortened
from gluprune_jax.models.config import LinearRope, Llama3Rope, ModelConfig, Rope, YarnRope
from gluprune_jax.models.frequencies import rope_frequencies

# Q and K of architectures whose RoPE pairs neighbouring dimensions of a head in llama.cpp: rows in another order.
PERMUTED = frozenset({"q_proj", "k_proj", "q_bias", "k_bias"})

ROPE_FREQS = "rope_freqs.weight"

# ---------------------------------------------------------------------------------------------------- reading


def scaled(own: Metadata) -> dict[str, Any]:
    """`rope_scaling`: none, linear or YaRN.

    Raises:
      RequestError: another one.
    """
    kind, factor = own.get("rope.scaling.type", "linear"), _factor(own)
    if kind not in ("none", "linear", "yarn"):
        raise RequestError(
            f"{own.named('rope.scaling.type')} is {shortened(kind)}; accepted: 'none', 'linear' or 'yarn'"
        )
    if kind == "none" or factor == 1:
        return {}
    if kind == "linear":
        return {"rope_scaling": {"rope_type": "linear", "factor": factor}}
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": own.integer(
            "rope.scaling.original_context_length", own.integer("context_length")
        ),
    }
    for key, name in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
        if own.get(f"rope.scaling.{key}") is not None:
            scaling[name] = own.positive(f"rope.scaling.{key}")
    implied = _yarn_attention_factor(factor)
    return {"rope_scaling": scaling | attention_factor(own, "rope.scaling.yarn_attn_factor", implied, implied)}


def _yarn_attention_factor(factor: float) -> float:
    """What transformers and llama.cpp multiply cosines and sines by, where nothing says otherwise."""
    return 0.1 * math.log(factor) + 1 if factor > 1 else 1.0


def _factor(own: Metadata) -> float:
    """The factor of a linear scaling or of YaRN; 1 for none. Without a type, llama.cpp takes it as linear."""
    key = "rope.scaling.factor" if own.get("rope.scaling.factor") is not None else "rope.scale_linear"
    return 1.0 if own.get(key) in (None, 0.0) else own.positive(key)


def attention_factor(own: Metadata, key: str, default: float, implied: float) -> dict[str, float]:
    """`attention_factor` where it is not the one that transformers computes, up to the rounding of the file."""
    found = default if own.get(key) is None else own.positive(key)
    return {} if np.float32(found) == np.float32(implied) else {"attention_factor": found}


def llama3_or_scaled(own: Metadata) -> dict[str, Any]:
    """`rope_scaling` that may be Llama 3's too, which a file has as divisors of the frequencies.

    Raises:
      RequestError: other divisors.
    """
    scaling = scaled(own)
    if (found := own.vectors.get(ROPE_FREQS)) is None or set(found) == {1.0}:
        return scaling
    head_dim, theta, divisors = own.head_dim, own.positive("rope.freq_base", 10000.0), np.array(found, np.float32)
    if len(divisors) != head_dim // 2:
        raise OperationError(f"{ROPE_FREQS} has shape ({len(divisors)},); expected ({head_dim // 2},)")
    if scaling:
        raise RequestError(
            f"{ROPE_FREQS} scales the RoPE, and {own.named('rope.scaling.factor')} does; accepted: one of them"
        )
    factor = float(str(divisors.max()))
    if factor > 1:
        llama3 = Llama3Rope(factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
        plain, slow = (rope_frequencies(Rope(theta, one), head_dim) for one in (None, llama3))
        if np.allclose(plain / slow, divisors, rtol=1e-4, atol=0):
            return {"rope_scaling": {"rope_type": "llama3", **dataclasses.asdict(llama3)}}
    raise RequestError(
        f"{ROPE_FREQS} is not the RoPE scaling of Llama 3 (low 1, high 4, original length 8192, factor {factor}), "
        "which is the only one supported"
    )


def layer_types(slides: Sequence[bool]) -> dict[str, list[str]]:
    """`layer_types` of layers with and without a window."""
    return {"layer_types": [SLIDING if one else FULL for one in slides]}


def gemma_scale(own: Metadata, largest: int) -> dict[str, int]:
    """`query_pre_attn_scalar`, which no file says: llama.cpp knows the largest model by its number of layers."""
    scalar = own.integer("embedding_length") // own.heads if own.layers == largest else own.head_dim
    return {"query_pre_attn_scalar": scalar}


# ---------------------------------------------------------------------------------------------------- writing


def present(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The keys whose value is not None."""
    return {key: value for key, value in keys.items() if value is not None}


def main_rope(config: ModelConfig) -> Rope | None:
    """The RoPE that a file's keys without a suffix are about: of the layers without a window, where there are any."""
    layers = sorted(config.attention, key=lambda layer: layer.window is not None)
    return next((layer.rope for layer in layers if layer.rope is not None), None)


def write_scaled(config: ModelConfig) -> dict[str, Any]:
    """The keys of a linear scaling or of YaRN; none of another scaling."""
    rope = main_rope(config)
    scaling = None if rope is None else rope.scaling
    if isinstance(scaling, LinearRope):
        return {"rope.scaling.type": "linear", "rope.scaling.factor": scaling.factor}
    if not isinstance(scaling, YarnRope):
        return {}
    own_factor = {} if _has_implied_factor(scaling) else {"rope.scaling.yarn_attn_factor": scaling.attention_factor}
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": scaling.factor,
        "rope.scaling.original_context_length": scaling.original_max_position_embeddings,
        "rope.scaling.yarn_beta_fast": scaling.beta_fast,
        "rope.scaling.yarn_beta_slow": scaling.beta_slow,
        **own_factor,
    }


def is_own_yarn(scaling: YarnRope) -> bool:
    """Whether YaRN is another than llama.cpp computes in architectures of ours, whatever the keys of a file say."""
    return (scaling.beta_fast, scaling.beta_slow) != (32.0, 1.0) or not _has_implied_factor(scaling)


def _has_implied_factor(scaling: YarnRope) -> bool:
    return bool(np.float32(scaling.attention_factor) == np.float32(_yarn_attention_factor(scaling.factor)))


def llama3_divisors(config: ModelConfig) -> dict[str, tuple[float, ...]]:
    """`rope_freqs.weight` of a model with Llama 3's scaling: what each of H/2 frequencies is divided by.

    In the precision of llama.cpp's converter: frequencies in float32, all else in float64.
    """
    rope = main_rope(config)
    scaling = None if rope is None else rope.scaling
    if rope is None or not isinstance(scaling, Llama3Rope):
        return {}
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = (1 / np.float32(rope.theta) ** exponents).astype(np.float64)
    rotations = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)  # within the old window
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = np.clip((rotations - low) / (high - low), 0, 1)
    divisors = 1 / ((1 - smooth) / scaling.factor + smooth)
    return {ROPE_FREQS: tuple(divisors.astype(np.float32).tolist())}


def write_windows(config: ModelConfig, period: int) -> dict[str, Any]:
    """The keys of layers with a window; which ones these are only if it is not all but one of every `period`."""
    windows = [layer.window for layer in config.attention]
    window = next((one for one in windows if one is not None), None)
    if window is None:
        return {}
    slides = [one is not None for one in windows]
    periods = (period, *range(1, len(windows) + 1))
    found = next((one for one in periods if slides == [(i + 1) % one != 0 for i in range(len(slides))]), None)
    keys: dict[str, Any] = {"attention.sliding_window": window}
    return keys if found == period else {**keys, "attention.sliding_window_pattern": found or slides}
