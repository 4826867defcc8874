"""How the keys of `config.json` say which layers have a window and which rotate, in the ways that families share."""

from collections.abc import Callable, Sequence
from typing import Any

from convert.families.family import FULL, SLIDING, Config, Rotation
from convert.values import integer, shown
from gluprune_jax.errors import RequestError


def periodic(period: int | str) -> Callable[[Config, int, str], list[str]]:
    """Every so many layers one that is full, the others slide: a number, or the key that holds it."""

    def kinds(config: Config, layers: int, where: str) -> list[str]:
        every = integer(config, period, where) if isinstance(period, str) else period
        return [SLIDING if (i + 1) % every else FULL for i in range(layers)]

    return kinds


def all_if_given(config: Config, layers: int, _: str) -> list[str]:
    """All slide if there is a window at all."""
    return [FULL if config["sliding_window"] is None else SLIDING] * layers


def upper_layers(config: Config, layers: int, where: str) -> list[str]:
    """Those from `max_window_layers` on slide, if the window is switched on; the lower ones are full."""
    if not config["use_sliding_window"] or config["sliding_window"] is None:
        return [FULL] * layers
    first = integer(config, "max_window_layers", where, least=0)
    return [SLIDING if i >= first else FULL for i in range(layers)]


def _no_rope_layers(config: Config, layers: int, where: str) -> list[bool]:
    """`no_rope_layers` hold 1 for a layer that rotates, despite the name; transformers takes a longer list as well."""
    rotate = config["no_rope_layers"]
    if rotate is None:
        every = integer(config, "no_rope_layer_interval", where)
        return [(i + 1) % every != 0 for i in range(layers)]
    if (
        not isinstance(rotate, list)
        or len(rotate) < layers
        or not all(type(one) is int and one in (0, 1) for one in rotate)
    ):
        raise RequestError(
            f"{where} has no_rope_layers = {shown(rotate)}; it must be a list of 1 (rotates) or 0 for {layers} layers"
        )
    return [one == 1 for one in rotate[:layers]]


def _write_no_rope_layers(rotate: Sequence[bool]) -> dict[str, Any]:
    return {"no_rope_layers": [int(one) for one in rotate]}


NO_ROPE_LAYERS = Rotation(_no_rope_layers, _write_no_rope_layers)


def layers_without_rope(config: Config, layers: int, where: str) -> list[str]:
    """The layers that do not rotate slide, if the window is switched on (SmolLM3)."""
    slide = config["use_sliding_window"] and config["sliding_window"] is not None
    return [FULL if rotates or not slide else SLIDING for rotates in _no_rope_layers(config, layers, where)]


# One key for all layers. Absent, it means that none rotates.
POSITION_EMBEDDING_TYPE = Rotation(
    lambda config, layers, _: [config["position_embedding_type"] == "rope"] * layers,
    lambda rotate: {"position_embedding_type": "rope" if any(rotate) else "nope"},
)
