"""RoPE between `config.json` and our config, in the three spellings that there are.

Transformers 4 knows `rope_theta`, `rope_scaling` and other keys at the top level. Transformers 5 has all of that in
`rope_parameters`, in families with two RoPEs one such object for each kind of layer (`full_attention`,
`sliding_attention`). Where old and new keys are there, they must mean the same: the two versions take one of them each.
"""

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from convert.families.family import FULL, SLIDING, Family
from convert.values import integer, named, number, shown
from gluprune_jax.errors import RequestError, listed
from gluprune_jax.models.config import LinearRope, Llama3Rope, LongRope, ModelConfig, Rope, RopeScaling, YarnRope

_ORIGINAL = "original_max_position_embeddings"
_PARTIAL = "partial_rotary_factor"

# The parameters of each type, beside its name, the base and the part of a head that rotates.
_PARAMETERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
    "yarn": (
        "factor",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
        _ORIGINAL,
    ),
    "longrope": ("factor", "attention_factor", "short_factor", "long_factor", _ORIGINAL),
}


def read_ropes(
    data: Mapping[str, Any], family: Family, head_dim: int, where: str, keys: frozenset[str]
) -> dict[str, Rope]:
    """The RoPE of either kind of layer.

    Args:
      data: the config as the file has it: what is absent counts.
      family: whose it is.
      head_dim: H.
      where: the file, for errors.
      keys: those that any type of RoPE has in transformers. Others mean nothing.

    Raises:
      RequestError: a type that we do not implement, a wrong number, or two spellings that mean two things.
    """
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(data.get(key), Mapping | None):
            raise RequestError(f"{where} has {key} = {shown(data[key])}; it must be an object or null")

    def read(rope: Mapping[str, Any], at: str) -> Rope:
        return _rope(rope, data, family, head_dim, at, keys)

    if family.thetas:
        return _nested(data, family, where, read)
    return dict.fromkeys((FULL, SLIDING), _flat(data, family, where, read))


def _flat(data: Mapping[str, Any], family: Family, where: str, read: Callable[[Mapping[str, Any], str], Rope]) -> Rope:
    """One RoPE for all layers.

    Transformers 5 takes a `rope_scaling` in place of all that `rope_parameters` say, and `rope_theta` for the base that
    the one it takes lacks.
    """
    flat, scaling = data.get("rope_parameters"), data.get("rope_scaling")
    theta = {"rope_theta": data.get("rope_theta", family.defaults["rope_theta"])}
    if flat and theta["rope_theta"] is None:
        del theta["rope_theta"]
    readings = []
    if flat:
        readings.append(read({**theta, **flat}, f"{where}: rope_parameters"))
    if scaling or not flat or data.get("rope_theta") is not None:
        readings.append(read({**theta, **(scaling or {})}, f"{where}: rope_scaling"))
        _check_theta_within(scaling, theta.get("rope_theta"), where)
    _check_same(readings[0], readings[-1], "rope_parameters", "rope_theta and rope_scaling", where)
    return readings[0]


def _nested(
    data: Mapping[str, Any], family: Family, where: str, read: Callable[[Mapping[str, Any], str], Rope]
) -> dict[str, Rope]:
    """A RoPE for each kind of layer.

    Flat `rope_parameters`, as transformers 5.2 wrote them for OLMo 3, are those of the full layers, and their base is
    that of all; later ones lose them. An entry without a base has the one of the old key, and one beside a
    `rope_scaling` of null is right about the scaling (TranslateGemma), though transformers 4 does not see it.
    """
    entries, scaling = data.get("rope_parameters") or {}, data.get("rope_scaling")
    if entries and not family.thetas.keys() & entries.keys():
        if len({*family.thetas.values()}) > 1:
            raise RequestError(
                f"{where} has rope_parameters without {FULL} and {SLIDING}; {family.name} has a RoPE for each, and "
                f"transformers ignores any other"
            )
        entries = {FULL: entries, SLIDING: {key: entries[key] for key in ("rope_theta",) if key in entries}}
    beside = [key for key in entries.keys() - family.thetas.keys() if isinstance(entries[key], Mapping)]
    if beside or entries.get("truncate", True) is not True:
        raise RequestError(
            f"{where}: rope_parameters has {listed([named(key) for key in sorted(beside) or ['truncate']])} beside "
            f"{FULL} and {SLIDING}; supported are these two"
        )
    ropes = {}
    for kind, key in family.thetas.items():
        entry, old = entries.get(kind), scaling if kind == FULL else None
        if not isinstance(entry, Mapping | None):
            raise RequestError(f"{where}: rope_parameters has {kind} = {shown(entry)}; it must be an object or null")
        theta = {"rope_theta": data.get(key, family.defaults[key])}
        at = f"{where}: rope_parameters.{kind}"
        new = read({**({} if theta["rope_theta"] is None and entry else theta), **(entry or {})}, at)
        if entry and data.get(key) is not None and new.theta != data[key]:
            raise RequestError(
                f"{at} has rope_theta {new.theta}, and the config {key} {shown(data[key])}; transformers 5 takes the "
                f"first, transformers 4 the second, so they must be the same"
            )
        if old:
            by_scaling = read({**theta, **old}, f"{where}: rope_scaling")
            _check_theta_within(old, theta["rope_theta"], where)
            if entry:
                _check_same(new, by_scaling, f"rope_parameters.{kind}", "rope_theta and rope_scaling", where)
            new = by_scaling
        if isinstance(new.scaling, YarnRope) and not new.scaling.truncate:
            raise RequestError(
                f"{at if entry else f'{where}: rope_scaling'} has truncate = False, which transformers 5 does not read "
                f"there; supported is True"
            )
        ropes[kind] = new
    return ropes


def _check_theta_within(scaling: Mapping[str, Any] | None, outside: Any, where: str) -> None:
    if scaling and scaling.get("rope_theta", outside) != outside:
        raise RequestError(
            f"{where}: rope_scaling has rope_theta {shown(scaling['rope_theta'])}, which transformers 5 takes and "
            f"transformers 4 does not; beside rope_scaling it must be {shown(outside)}"
        )


def _check_same(new: Rope, old: Rope, new_keys: str, old_keys: str, where: str) -> None:
    if new != old:
        raise RequestError(
            f"{where} says two things about RoPE: {new_keys} mean {_meaning(new)}, {old_keys} mean {_meaning(old)}"
        )


def _meaning(rope: Rope) -> str:
    text = f"base {rope.theta}, {rope.scaling or 'no scaling'}"
    return text if len(text) <= 110 else f"{text[:107]}..."


def _rope(
    rope: Mapping[str, Any], data: Mapping[str, Any], family: Family, head_dim: int, where: str, keys: frozenset[str]
) -> Rope:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("type", kind) != kind:
        raise RequestError(
            f"{where} has rope_type {shown(kind)} and type {shown(rope['type'])}; transformers 5 takes the first, "
            f"transformers 4 the second, so they must be the same"
        )
    meant = family.rope_types.get(kind) if isinstance(kind, str) else None
    if meant is None:
        supported = listed([repr(name) for name in family.rope_types], 200)
        raise RequestError(f"{where} has rope_type {shown(kind)}; supported are {supported}")
    theta = number(rope, "rope_theta", where)
    partial = rope.get(_PARTIAL, 1)
    if _PARTIAL in family.defaults:
        partial = number({_PARTIAL: data.get(_PARTIAL, 1), **rope}, _PARTIAL, where)
        if partial > 1:
            raise RequestError(f"{where} has {_PARTIAL} = {partial}; it must be a number from 0 to 1")
    elif partial != 1:
        raise RequestError(f"{where} has {_PARTIAL} {shown(partial)}; supported is 1")
    rotary_dim = int(head_dim * partial)
    expected = {"rope_type", "type", "rope_theta", _PARTIAL, *_PARAMETERS[meant]}
    # One that no RoPE type has means nothing, unless it holds the parameters of a layer type, or should.
    layers = {name for name in family.thetas if rope.get(name) is not None}
    if unknown := sorted(k for k in rope.keys() - expected if k in keys | layers or isinstance(rope[k], Mapping)):
        raise RequestError(f"{where} has keys that rope_type {kind!r} does not: {listed([named(k) for k in unknown])}")
    return Rope(
        theta=theta,
        scaling=_READERS[meant](rope, {**family.defaults, **data}, where, _ORIGINAL in family.defaults),
        rotary_dim=None if rotary_dim == head_dim else rotary_dim,
        in_float32=family.rope_in_float32,
    )


def _default(rope: Mapping[str, Any], data: Mapping[str, Any], where: str, outside: bool) -> None:
    return None


def _linear(rope: Mapping[str, Any], data: Mapping[str, Any], where: str, outside: bool) -> LinearRope:
    return LinearRope(number(rope, "factor", where))


def _llama3(rope: Mapping[str, Any], data: Mapping[str, Any], where: str, outside: bool) -> Llama3Rope:
    factor, low, high = (number(rope, key, where) for key in _PARAMETERS["llama3"][:3])
    if factor < 1 or high <= low:
        raise RequestError(
            f"{where} has factor {factor}, low_freq_factor {low} and high_freq_factor {high}; "
            f"llama3 needs a factor of at least 1 and a high above the low"
        )
    return Llama3Rope(factor, low, high, _original(rope, data, where))


def _yarn(rope: Mapping[str, Any], data: Mapping[str, Any], where: str, outside: bool) -> YarnRope:
    factor = number(rope, "factor", where)

    def grown(multiplier: float = 1.0) -> float:
        return 0.1 * multiplier * math.log(factor) + 1 if factor > 1 else 1.0

    attention_factor = grown()
    if rope.get("attention_factor") is not None:
        attention_factor = number(rope, "attention_factor", where)
    elif rope.get("mscale") and rope.get("mscale_all_dim"):
        attention_factor = grown(number(rope, "mscale", where)) / grown(number(rope, "mscale_all_dim", where))
    truncate = rope.get("truncate", True)
    if type(truncate) is not bool:
        raise RequestError(f"{where} has truncate = {shown(truncate)}; it must be true or false")
    # transformers takes a null or a zero of these as if it were not there.
    fast, slow = ({**rope, key: rope.get(key) or default} for key, default in (("beta_fast", 32.0), ("beta_slow", 1.0)))
    return YarnRope(
        factor=factor,
        original_max_position_embeddings=_original(rope, data, where),
        attention_factor=attention_factor,
        beta_fast=number(fast, "beta_fast", where),
        beta_slow=number(slow, "beta_slow", where),
        truncate=truncate,
    )


def _longrope(rope: Mapping[str, Any], data: Mapping[str, Any], where: str, outside: bool) -> LongRope:
    factors = {}
    for key in ("short_factor", "long_factor"):
        values = rope.get(key)
        if not isinstance(values, list) or not all(
            type(value) in (int, float) and 0 < value <= sys.float_info.max for value in values
        ):
            raise RequestError(f"{where} has {key} = {shown(values)}; it must be a list of positive numbers")
        factors[key] = tuple(map(float, values))
    # In a class that has it at the top level, that one counts, and one within does not.
    original = integer(data, _ORIGINAL, where) if outside else _original(rope, data, where)
    attention_factor = rope.get("attention_factor")
    if attention_factor is None:
        longest = integer(data, "max_position_embeddings", where)
        factor = longest / original if rope.get("factor") is None else number(rope, "factor", where)
        attention_factor = longrope_attention_factor(factor, original)
    else:
        attention_factor = number(rope, "attention_factor", where)
    return LongRope(factors["short_factor"], factors["long_factor"], original, attention_factor)


def longrope_attention_factor(factor: float, original: int) -> float:
    """What multiplies cosines and sines of a LongRoPE that does not say so itself."""
    return math.sqrt(1 + math.log(factor) / math.log(max(original, 2))) if factor > 1 else 1.0


def _original(rope: Mapping[str, Any], data: Mapping[str, Any], where: str) -> int:
    original = integer({_ORIGINAL: data.get("max_position_embeddings"), **rope}, _ORIGINAL, where)
    if data.get(_ORIGINAL, original) != original:
        raise RequestError(
            f"{where} has {_ORIGINAL} {original}, and the config {shown(data[_ORIGINAL])}; transformers 5 takes the "
            f"second, transformers 4 the first, so they must be the same"
        )
    return original


_READERS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any], str, bool], RopeScaling | None]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}

# --------------------------------------------------------------------------------------------------- writing


class HeadSizes(Protocol):
    """What the spelling of a RoPE depends on."""

    @property
    def head_dim(self) -> int:
        """H."""

    @property
    def max_position_embeddings(self) -> int:
        """The longest text."""


def write_ropes(config: ModelConfig, family: Family) -> dict[str, Any]:
    """The keys that say how the layers rotate, in old and new spelling.

    What the old one cannot say of a family with two RoPEs (a scaling in its layers with a window, or two bases where it
    has one key) is written in the new one alone.
    """
    found = _by_kind(config)
    full, sliding = found[FULL], found[SLIDING]
    if not family.thetas:
        return write_flat_rope(full or sliding or Rope(family.defaults["rope_theta"]), config)
    if len({*family.thetas.values()}) == 1:  # layers of a kind that is not there have the base of the other
        full = full or (Rope(sliding.theta) if sliding else None)
        sliding = sliding or (Rope(full.theta) if full else None)
    full = full or Rope(family.defaults[family.thetas[FULL]])
    sliding = sliding or Rope(family.defaults[family.thetas[SLIDING]])
    scaling, entry = _spelt(full, config)
    keys: dict[str, Any] = {
        "rope_parameters": {
            FULL: entry | {"rope_theta": full.theta},
            SLIDING: _spelt(sliding, config)[1] | {"rope_theta": sliding.theta},
        }
    }
    thetas = {family.thetas[SLIDING]: sliding.theta, family.thetas[FULL]: full.theta}
    if sliding.scaling is None and thetas[family.thetas[SLIDING]] == sliding.theta:
        keys |= thetas | {"rope_scaling": scaling}
    return keys


def _by_kind(config: ModelConfig) -> dict[str, Rope | None]:
    """The RoPE of the first layer of either kind that has one."""
    kinds: dict[str, Rope | None] = {FULL: None, SLIDING: None}
    for layer in config.attention:
        kind = FULL if layer.window is None else SLIDING
        kinds[kind] = kinds[kind] or layer.rope
    return kinds


def write_flat_rope(rope: Rope, config: HeadSizes) -> dict[str, Any]:
    """The keys that say how the layers rotate, all alike, in old and new spelling."""
    old, new = _spelt(rope, config)
    keys: dict[str, Any] = {}
    if rope.rotary_dim is not None:
        partial = rope.rotary_dim / config.head_dim
        if int(config.head_dim * partial) != rope.rotary_dim:  # rounded down below it
            partial = math.nextafter(partial, 1)
        keys, new = {_PARTIAL: partial}, new | {_PARTIAL: partial}
    if isinstance(rope.scaling, LongRope):
        keys[_ORIGINAL] = rope.scaling.original_max_position_embeddings
    return keys | {
        "rope_theta": rope.theta,
        "rope_scaling": old,
        "rope_parameters": new | {"rope_theta": rope.theta},
    }


def _spelt(rope: Rope, config: HeadSizes) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """`rope_scaling`, and `rope_parameters` without the base."""
    scaling = rope.scaling
    match scaling:
        case None:
            return None, {"rope_type": "default"}
        case LinearRope():
            both = {"rope_type": "linear", "factor": scaling.factor}
        case Llama3Rope():
            both = {"rope_type": "llama3"} | {key: getattr(scaling, key) for key in _PARAMETERS["llama3"]}
        case YarnRope():
            keys = ("factor", "attention_factor", "beta_fast", "beta_slow", _ORIGINAL)
            both = {"rope_type": "yarn"} | {key: getattr(scaling, key) for key in keys}
            both |= {} if scaling.truncate else {"truncate": False}
        case LongRope():
            lists = {key: list(getattr(scaling, key)) for key in ("short_factor", "long_factor")}
            original = scaling.original_max_position_embeddings
            implied = longrope_attention_factor(config.max_position_embeddings / original, original)
            # Transformers 4 takes three keys, and refuses more: rather than that it took another factor.
            further = {} if scaling.attention_factor == implied else {"attention_factor": scaling.attention_factor}
            old = {"type": "longrope", **lists, **further}
            return old, {"rope_type": "longrope", **lists, **further, _ORIGINAL: original}
    return both, both
