"""Values out of other people's JSON: checked one by one, and shown in one short line whatever they are."""

import reprlib
import sys
from collections.abc import Mapping
from typing import Any

from gluprune_jax.errors import RequestError

MOST = 2**31 - 1

_REPR = reprlib.Repr()  # for values of any length and depth
_REPR.maxlevel = 2
_REPR.maxstring = 80


def integer(data: Mapping[str, Any], key: str, where: str, most: int = MOST, least: int = 1) -> int:
    """A whole number of an object.

    Raises:
      RequestError: it is absent, or something else, or out of range.
    """
    value = data.get(key)
    if type(value) is not int or not least <= value <= most:
        found = f"no {key}" if value is None else f"{key} = {shown(value)}"
        raise RequestError(f"{where} has {found}; it must be a whole number from {least} to {most}")
    return value


def number(data: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    """A positive finite number of an object.

    Raises:
      RequestError: it is absent and there is no default, or it is something else.
    """
    value = data.get(key, default)
    if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
        raise RequestError(f"{where} has {key} = {shown(value)}; it must be a positive number")
    return float(value)


def shown(value: Any) -> str:
    """A value as an error says it, in at most 100 characters."""
    text = _REPR.repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def named(key: str) -> str:
    """A key of the file as it stands there, or as text if it has no end or no face."""
    return key if key.isprintable() and 0 < len(key) <= 60 else shown(key)
