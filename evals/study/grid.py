"""Methods x sizes x seeds of one model: the grid that `evals.compare` and `evals.sweep` walk, and resume."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from evals.study.rows import ResumableRows
from gluprune_jax.errors import RequestError
from gluprune_jax.models.config import ModelConfig
from gluprune_jax.pruning.choices import inputs_of_criterion
from gluprune_jax.pruning.methods import Method, Pruned
from gluprune_jax.pruning.targets import TARGETS, format_target, target_width


class Chooses(Protocol):
    """What prunes by a method to each size, as `gluprune_jax.pruning.chooser.Chooser` does."""

    def choose(self, method: Method, targets: Sequence[Mapping[str, Any]], /) -> list[Pruned]: ...


class Cell(NamedTuple):
    """A place of a grid whose row is missing.

    Attributes:
      key: what tells its row from others.
      target: the size, as arguments of `make_plan`; empty for the dense model.
      pruned: the pruned model; None stands for the dense one.
    """

    key: dict[str, Any]
    target: Mapping[str, Any]
    pruned: Pruned | None


@dataclasses.dataclass(frozen=True)
class Grid:
    """What is compared: the dense model, and each method at each size, with each seed where it draws.

    Attributes:
      methods: without seeds.
      targets: sizes, as arguments of `make_plan`.
      dense: the key of the dense model's row.
      size_key: the entry of a row's key that holds the size, as `format_target` writes it.
      seeds: how many seeds a method has whose criterion draws; None where rows have no seed.
    """

    methods: Sequence[Method]
    targets: Sequence[Mapping[str, Any]]
    dense: Mapping[str, Any]
    size_key: str
    seeds: int | None = None

    def missing(self, chooser: Chooses, rows: ResumableRows) -> Iterator[Cell]:
        """The cells that have no row yet, the dense model first; each wants its row added before the next is asked for.

        What can be shared between sizes is, but for sequential methods and reconstruction, in which what takes long
        cannot: there each size is measured before the next is computed.

        Args:
          chooser: prunes the model.
          rows: those that are known.

        Raises:
          RequestError, OperationError: as `Chooser.choose`.
        """
        if rows.find(self.dense) is None:
            yield Cell(dict(self.dense), {}, None)
        for method in self.methods:
            draws = self.seeds is not None and "key" in inputs_of_criterion(method.criterion)
            for seed in range(self.seeds or 0) if draws else (None,):
                keys = [self._key(method, target, seed) for target in self.targets]
                missing = [number for number, key in enumerate(keys) if rows.find(key) is None]
                seeded = dataclasses.replace(method, seed=seed or 0)
                for batch in _batches(missing, one_by_one=method.sequential or method.reconstructs):
                    chosen = chooser.choose(seeded, [self.targets[number] for number in batch])
                    for number, pruned in zip(batch, chosen, strict=True):
                        yield Cell(keys[number], self.targets[number], pruned)

    def _key(self, method: Method, target: Mapping[str, Any], seed: int | None) -> dict[str, Any]:
        key = {"method": str(method), self.size_key: format_target(target)}
        return key if self.seeds is None else {**key, "seed": seed}


def _batches(numbers: Sequence[int], *, one_by_one: bool) -> Iterator[Sequence[int]]:
    if one_by_one:
        yield from ([number] for number in numbers)
    elif numbers:
        yield numbers


def parse_methods(texts: Sequence[str], min_keep: float) -> list[Method]:
    """The methods that `methods` names.

    Raises:
      RequestError: a name that is none, or one that is there twice.
    """
    if doubled := [text for text in texts if texts.count(text) > 1]:
        raise RequestError(f"`methods` has {doubled[0]} twice; give each once")
    return [Method.parse(text, min_keep=min_keep) for text in texts]


def sizes(*, multiple_of: int, **asked: Sequence[Any] | None) -> list[dict[str, Any]]:
    """The sizes that were asked for, as arguments of `make_plan`; 0 percent is the dense model, which is always there.

    Args:
      multiple_of: widths are multiples of it.
      asked: `prune_percent`, `expansion_ratio` or `width`: one of them, the others None.

    Raises:
      RequestError: a number that is no such size, or one that is there twice.
    """
    targets: list[dict[str, Any]] = []
    for kind in TARGETS:
        for value in asked.get(kind) or ():
            if kind == "prune_percent" and value == 0:
                continue
            target_width(100, 100, **{kind: value})  # what is no such number is refused before a model is loaded
            target = {kind: value, "multiple_of": multiple_of}
            if format_target(target) in map(format_target, targets):
                raise RequestError(f"`{kind}` has {value} twice; give each size once")
            targets.append(target)
    return targets


def smaller_sizes(config: ModelConfig, targets: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The sizes without the model's own, which an expansion ratio may name."""

    def is_own(target: Mapping[str, Any]) -> bool:
        share = {key: value for key, value in target.items() if key in TARGETS}
        widths = (target_width(size, config.hidden_size, **share) for size in config.intermediate_sizes)
        return list(widths) == list(config.intermediate_sizes)

    return [target for target in targets if not is_own(target)]
