"""The values that the paper published (arXiv 2512.22671), as a study that can be analysed like one of our own."""

import functools
import importlib.resources
import json
import math
from collections.abc import Mapping
from typing import Any

from evals.harness.suites import SUITES
from evals.results.outcomes import PERPLEXITIES
from evals.study.study import DENSE, Score, StudiedBenchmark, Study, Variant
from gluprune_jax.errors import RequestError

METHOD = "ppm"


@functools.cache
def published() -> Mapping[str, Any]:
    """The file of published values: "source", "items" of each benchmark and "models".

    Each model has "hidden_size" and "levels" by percent of neurons removed; a level has "intermediate_size" and, by
    benchmark, the headline metric with its standard error: as it was published, or binomial where none was.
    """
    text = importlib.resources.files("evals").joinpath("paper_values.json").read_text(encoding="utf-8")
    values: Mapping[str, Any] = json.loads(text)
    return values


def paper_study(model: str, baselines: Mapping[str, Mapping[str, Score]] | None = None) -> Study:
    """The published values of one model.

    Args:
      model: "Llama-3.2-1B", "Llama-3.2-3B" or "Llama-3.2-1B-Instruct".
      baselines: by benchmark, the no-knowledge baselines on all of its items.

    Raises:
      RequestError: nothing was published of the model.
    """
    models = published()["models"]
    if model not in models:
        raise RequestError(f"the paper has no values of {model!r}; choose from {', '.join(models)}")
    levels = models[model]["levels"]
    points = {level: _point(level, about, models[model]["hidden_size"], levels) for level, about in levels.items()}
    found = []
    for benchmark in SUITES["paper"].benchmarks:
        measured = {
            point: _measured(benchmark.name, *levels[level]["benchmarks"][benchmark.name])
            for level, point in points.items()
            if benchmark.name in levels[level]["benchmarks"]
        }
        if measured:
            metric = benchmark.metric or ""
            found.append(
                StudiedBenchmark(
                    benchmark.name,
                    benchmark.title,
                    metric,
                    higher_is_better=benchmark.higher_is_better is not False,
                    is_perplexity=metric.partition(",")[0] in PERPLEXITIES,
                    measured=measured,
                    baselines=(baselines or {}).get(benchmark.name, {}),
                )
            )
    return Study(f"{model} (published)", list(points.values()), found, {"source": published()["source"]})


def _point(level: str, about: Mapping[str, Any], hidden_size: int, levels: Mapping[str, Any]) -> Variant:
    removed = 1 - about["intermediate_size"] / levels["0"]["intermediate_size"]
    ratio = about["intermediate_size"] / hidden_size
    return Variant(*((DENSE, DENSE) if level == "0" else (METHOD, f"{level} %")), removed, ratio)


def _measured(benchmark: str, value: float, stderr: float | None) -> Score:
    items = published()["items"][benchmark]
    if stderr is None and 0 <= value <= 1:
        # Of outcomes between 0 and 1 with that mean, none vary more than right-or-wrong ones.
        stderr = math.sqrt(value * (1 - value) / items)
    return Score(value, items, stderr)
