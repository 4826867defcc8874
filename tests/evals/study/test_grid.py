"""The grid of methods, sizes and seeds that `compare` and `sweep` walk, and what it resumes from."""

import json
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from evals.cli.options import items_per_task, parse_limit
from evals.study.grid import Grid, parse_methods, sizes, smaller_sizes
from evals.study.rows import ResumableRows
from gluprune_jax.errors import RequestError
from gluprune_jax.models.config import ModelConfig
from gluprune_jax.pruning.methods import Method, Pruned

DENSE = {"method": "dense", "size": None, "seed": None}


class Asked:
    """Stands for a chooser: remembers what was asked for at once."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, list[Any]]] = []

    def choose(self, method: Method, targets: Sequence[Mapping[str, Any]], /) -> list[Pruned]:
        self.calls.append((str(method), method.seed, [target["width"] for target in targets]))
        return [cast("Pruned", object())] * len(targets)


def open_rows(path: Path | None, *, resume: bool = False) -> ResumableRows:
    about = {"format": "gluprune-comparison"}
    return ResumableRows.open(path, about, is_row=lambda number, row: True, overwrite=False, resume=resume)


def walk(grid: Grid, rows: ResumableRows, most: int = 99) -> Asked:
    asked = Asked()
    for number, cell in enumerate(grid.missing(asked, rows)):
        rows.add(dict(cell.key))
        if number + 1 == most:
            break
    return asked


def test_every_cell_once_and_only_what_draws_has_seeds() -> None:
    targets = sizes(multiple_of=1, width=(8, 4))
    grid = Grid(
        parse_methods(["ppm", "random", "hybrid+ls+sequential", "ppm+reconstruct"], 0.2), targets, DENSE, "size", 2
    )
    rows = open_rows(None)
    assert walk(grid, rows).calls == [
        ("ppm", 0, [8, 4]),
        ("random", 0, [8, 4]),
        ("random", 1, [8, 4]),
        ("hybrid+least-squares+sequential", 0, [8]),  # nothing is shared between sizes: one after the other
        ("hybrid+least-squares+sequential", 0, [4]),
        ("ppm+reconstruct", 0, [8]),
        ("ppm+reconstruct", 0, [4]),
    ]
    keys = [(row["method"], row["size"], row["seed"]) for row in rows.document["rows"]]
    assert keys[:4] == [("dense", None, None), ("ppm", "8", None), ("ppm", "4", None), ("random", "8", 0)]
    assert len(keys) == len(set(keys)) == 11


def test_what_is_known_is_not_computed_again() -> None:
    grid = Grid(parse_methods(["ppm", "l2"], 0.2), sizes(multiple_of=1, width=(8, 4)), DENSE, "size")
    rows = open_rows(None)
    walk(grid, rows, most=2)
    assert walk(grid, rows).calls == [("ppm", 0, [4]), ("l2", 0, [8, 4])]
    assert walk(grid, rows).calls == []


def test_rows_of_methods_in_order_are_found_as_sequential_ones(tmp_path: Path) -> None:
    path = tmp_path / "comparison.json"
    grid = Grid(parse_methods(["hybrid+ls+sequential"], 0.2), sizes(multiple_of=1, width=(8,)), DENSE, "size", 1)
    former = {"method": "hybrid+least-squares+in-order", "size": "8", "seed": None}
    path.write_text(json.dumps({"format": "gluprune-comparison", "rows": [DENSE, former]}))
    assert walk(grid, open_rows(path)).calls == []


def test_resuming_needs_rows(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"nothing to resume: .*comparison\.json is missing; leave out `resume`"):
        open_rows(tmp_path / "comparison.json", resume=True)
    with pytest.raises(RequestError, match="nothing to resume: no `output` is given"):
        open_rows(None, resume=True)


def test_sizes_are_those_asked_for_without_the_dense_one() -> None:
    assert sizes(multiple_of=2, prune_percent=(0.0, 10.0)) == [{"prune_percent": 10.0, "multiple_of": 2}]
    # Of a config, only the sizes are looked at.
    config = cast("ModelConfig", types.SimpleNamespace(hidden_size=10, intermediate_sizes=(25, 25)))
    asked = sizes(multiple_of=1, expansion_ratio=("2.5", "2.0"))
    assert [target["expansion_ratio"] for target in smaller_sizes(config, asked)] == ["2.0"]
    for wrong, message in (
        ({"prune_percent": (10.0, 10.0)}, "`prune_percent` has 10.0 twice"),
        ({"expansion_ratio": ("2.0", "2")}, "`expansion_ratio` has 2 twice"),
    ):
        with pytest.raises(RequestError, match=message):
            sizes(multiple_of=1, **cast("dict[str, Any]", wrong))


def test_a_limit_is_a_number_for_all_and_others_for_some() -> None:
    names = ("piqa", "wikitext")
    assert parse_limit(None, names) is None
    assert parse_limit("50", names) == {"piqa": 50, "wikitext": 50}
    assert parse_limit("50, wikitext=10", names) == {"piqa": 50, "wikitext": 10}
    assert parse_limit("0.1,piqa=3", names) == {"piqa": 3, "wikitext": 0.1}
    for text in ("0", "1.5", "ten", "nan", "-1", "5,=3", "5,6", "inf"):
        with pytest.raises(RequestError, match=f"^--limit is {text}; give "):
            parse_limit(text, names)


def test_the_items_of_a_benchmark_are_spread_over_its_tasks() -> None:
    """One meaning in evaluate, compare and sweep: at least N in all, wherever its tasks stand."""

    def part(asked_for: str, tasks: int) -> Any:
        return types.SimpleNamespace(asked_for=asked_for, tasks={"tasks": dict.fromkeys(map(str, range(tasks)))})

    mmlu, first, second = part("mmlu", 57), part("glue", 2), part("glue", 1)
    loaded = [mmlu, first, second]
    assert items_per_task(None, mmlu, loaded) is None
    assert [items_per_task({"mmlu": 100, "glue": 4}, one, loaded) for one in loaded] == [2, 2, 2]
    assert items_per_task({"mmlu": 57, "glue": 1}, mmlu, loaded) == 1
    assert items_per_task({"mmlu": 0.1, "glue": 1}, mmlu, loaded) == 0.1
