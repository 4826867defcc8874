"""The collectives in the text of a compiled XLA program: what moves between chips.

    %all-gather.5 = f32[8192]{0:T(1024)} all-gather(%fusion), channel_id=1, ...

An asynchronous collective is counted once: where it starts, or where it stands in the computation that is started.
The TPU's compiler also spreads one over several fusions, to compute meanwhile: each of them repeats its instruction,
with the same channel. A collective in a loop is counted once, and marked: the text does not say how often a loop runs.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast"
_INSTRUCTION = re.compile(rf"^\s*(?:ROOT )?%?[\w.\-]+ = (?P<type>.*?) (?P<kind>{_KINDS})(?P<start>-start)?\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_FUSED = re.compile(r" fusion\(.*?calls=%?([\w.\-]+)")
_BODY = re.compile(r" while\(.*?body=%?([\w.\-]+)")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_SHAPE = re.compile(r"(\w+)\[([0-9,]*)\]")
_BITS = re.compile(r"\d+")


class Shape(NamedTuple):
    """An array of one chip."""

    dtype: str
    sizes: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its bytes; of a `pred` one for each."""
        bits = _BITS.search(self.dtype)
        return math.prod(self.sizes) * (int(bits[0]) if bits else 8) // 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.sizes))}]"


class Collective(NamedTuple):
    """One collective operation.

    Attributes:
      kind: its name in XLA.
      shapes: what each chip has of its results.
      in_loop: whether it is part of a loop.
    """

    kind: str
    shapes: tuple[Shape, ...]
    in_loop: bool

    @property
    def nbytes(self) -> int:
        """Bytes of the results on one chip."""
        return sum(shape.nbytes for shape in self.shapes)


def collectives(text: str) -> list[Collective]:
    """The collectives of a program, in the order of its text."""
    computations = dict(_computations(text))
    fused = set(_FUSED.findall(text))
    looping = _reached(computations, set(_BODY.findall(text)))
    found, spread = [], set()
    for name, lines in computations.items():
        for line in lines:
            match = _INSTRUCTION.match(line)
            if match is None:
                continue
            shapes = _results(match["type"], match["kind"] if match["start"] else "")
            channel = _CHANNEL.search(line)
            if name in fused and channel is not None:
                part = match["kind"], shapes, channel[1]
                if part in spread:
                    continue
                spread.add(part)
            found.append(Collective(match["kind"], shapes, name in looping))
    return found


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    lines: list[str] = []
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            lines = []
            yield header[1], lines
        else:
            lines.append(line)


def _reached(computations: dict[str, list[str]], names: set[str]) -> set[str]:
    """These computations, and all that they call."""
    reached: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in reached:
            continue
        reached.add(name)
        for line in computations.get(name, ()):
            waiting += _CALLED.findall(line)
            for branches in _BRANCHES.findall(line):
                waiting += [branch.strip().lstrip("%") for branch in branches.split(",")]
    return reached


def _results(type_: str, started: str) -> tuple[Shape, ...]:
    """The results among the arrays of an instruction's type, which where it only starts has the operands before them.

    Args:
      type_: as written.
      started: the kind of a collective that is started, else "".
    """
    shapes = tuple(
        Shape(dtype, tuple(map(int, filter(None, sizes.split(","))))) for dtype, sizes in _SHAPE.findall(type_)
    )
    if started == "collective-permute":
        return shapes[1:2]  # then come the numbers that the hardware waits for
    return shapes[len(shapes) // 2 :] if started == "all-gather" else shapes
