"""Records that this package writes as JSON and reads again: what they must look like, and whether they still do.

A `Kind` says what is accepted in a place. `check` compares, and names the first place that holds something else. What
is written with `sealed` carries the SHA-256 of its content, so that a changed digit is found too; files of older
versions have none, and are read without.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from gluprune_jax.errors import OperationError, first_line, shortened

SEAL = "sha256"


@dataclasses.dataclass(frozen=True)
class Kind:
    """What is accepted in one place of a record.

    Attributes:
      accepted: in words, such as "a whole number".
      holds: whether a value is one, its parts left aside.
      parts: of such a value: each with its name as it is appended to that of the place, and its kind.
    """

    accepted: str
    holds: Callable[[Any], bool]
    parts: Callable[[Any], Iterator[tuple[str, Any, "Kind"]]] = lambda value: iter(())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


ANYTHING = Kind("anything", lambda value: True)
TEXT = Kind("a text", lambda value: isinstance(value, str))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
NUMBER = Kind("a number", _is_number)
WHOLE = Kind("a whole number from 0", lambda value: _is_number(value) and isinstance(value, int) and value >= 0)
OBJECT = Kind("an object", lambda value: isinstance(value, dict))


def optional(kind: Kind) -> Kind:
    """Null, or that."""
    return Kind(
        f"{kind.accepted}, or null",
        lambda value: value is None or kind.holds(value),
        lambda value: iter(()) if value is None else kind.parts(value),
    )


def either(first: Kind, second: Kind) -> Kind:
    """The one or the other."""
    return Kind(
        f"{first.accepted} or {second.accepted}",
        lambda value: first.holds(value) or second.holds(value),
        lambda value: (first if first.holds(value) else second).parts(value),
    )


def exactly(value: Any) -> Kind:
    """This very value."""
    return Kind(repr(value), lambda other: type(other) is type(value) and bool(other == value))


def list_of(kind: Kind) -> Kind:
    """A list of such."""
    return Kind(
        "a list",
        lambda value: isinstance(value, list),
        lambda value: ((f"[{i}]", part, kind) for i, part in enumerate(value)),
    )


def table_of(kind: Kind) -> Kind:
    """An object that holds such under any name."""
    return Kind(
        "an object",
        lambda value: isinstance(value, dict),
        lambda value: ((f".{name}", part, kind) for name, part in value.items()),
    )


_ABSENT = object()


def record_of(fields: Mapping[str, Kind], maybe: Mapping[str, Kind] | None = None) -> Kind:
    """An object with these fields; those of `maybe` need not be there, and others are not looked at."""

    def parts(value: Mapping[str, Any]) -> Iterator[tuple[str, Any, Kind]]:
        for name, kind in fields.items():
            yield f".{name}", value.get(name, _ABSENT), kind
        for name, kind in (maybe or {}).items():
            if name in value:
                yield f".{name}", value[name], kind

    return Kind("an object", lambda value: isinstance(value, dict), parts)


def problem(value: Any, kind: Kind, place: str = "") -> str | None:
    """What is wrong with a value, such as "request.layers is 3; it must be a list"; None where nothing is."""
    name = shortened(place.removeprefix("."))[1:-1] or "it"
    if value is _ABSENT:
        return f"{name} is missing; it must be {kind.accepted}"
    if not kind.holds(value):
        return f"{name} is {shortened(value)}; it must be {kind.accepted}"
    problems = (problem(part, of, place + suffix) for suffix, part, of in kind.parts(value))
    return next((found for found in problems if found), None)


def check(value: Any, kind: Kind, name: str, remedy: str = "") -> None:
    """Makes sure that a value is of a kind.

    Args:
      value: from a file.
      kind: what it must be.
      name: of the file.
      remedy: what can be done, for the end of the sentence.

    Raises:
      OperationError: it is not, naming the place.
    """
    if found := problem(value, kind):
        raise damaged(name, found, remedy)


def parse(data: str | bytes, name: str, remedy: str = "") -> Any:
    """What a file of JSON holds.

    Raises:
      OperationError: it is not JSON.
    """
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:  # the first also where bytes are not UTF-8
        raise damaged(name, f"it is not JSON ({first_line(error)})", remedy) from error


def json_digest(value: Any) -> str:
    """SHA-256 of a value's canonical JSON, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """A document with the digest of its content."""
    content = {name: value for name, value in document.items() if name != SEAL}
    return {**content, SEAL: json_digest(json.loads(json.dumps(content)))}


def check_seal(document: Mapping[str, Any], name: str, remedy: str = "") -> None:
    """Makes sure that a document is as it was sealed; one without a seal is taken as it is.

    Raises:
      OperationError: it is not.
    """
    content = {key: value for key, value in document.items() if key != SEAL}
    if SEAL in document and document[SEAL] != json_digest(content):
        raise damaged(name, f"its {SEAL} is not that of its content", remedy)


def damaged(name: str, reason: str, remedy: str = "") -> OperationError:
    """The error for a file that is not as it was written."""
    return OperationError(f"{name} is damaged: {reason}" + (f"; {remedy}" if remedy else ""))
