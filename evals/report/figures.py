"""The figures of a study, each one Vega-Lite specification: interactive on the page, and drawn as PNG and SVG."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import altair as alt

from evals.report.drawing import COLOURS, SHAPES
from evals.study.analysis import GROUPS, KNOWLEDGE, TRUTHFULNESS, Analysis, analyse, retention
from evals.study.paper import paper_study, published
from evals.study.significance import Comparison
from evals.study.study import DENSE, StudiedBenchmark, Study, name_variant
from gluprune_jax.pruning.choices import ALLOCATIONS

_GROUPS = (*GROUPS, "not tested")
_NEUTRAL = "#8a8a8a"
_ENERGY = "J per token"
_LABEL_SIZE, _LABELLED_HEIGHT = 10, 300  # pixels, of names beside lines
_SAME_SIZE = 1e-3  # by which shares of removed neurons may differ
# Of models in the picture of kept neurons, and of its cells in all.
_MOST_MAPS, _MOST_CELLS = 12, 8192


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure.

    Attributes:
      name: of its files.
      title: one line.
      caption: how to read it; also what a screen reader says.
      spec: Vega-Lite, as JSON.
    """

    name: str
    title: str
    caption: str
    spec: dict[str, Any]


def study_figures(study: Study, analysis: Analysis) -> list[Figure]:
    """All figures that a study has something for."""
    found = [
        dichotomy(study, analysis),
        fragile_and_robust(study, analysis),
        perplexities(study),
        knowledge_and_truthfulness(study),
        kept_neurons(study),
        quality_and_speed(study, analysis),
        against_paper(study, analysis),
    ]
    return [figure for figure in found if figure is not None]


def dichotomy(study: Study, analysis: Analysis) -> Figure | None:
    """Every benchmark relative to the dense model, with intervals and the no-knowledge baselines."""
    data = relative(study, analysis, with_zero=True)
    if not data:
        return None
    base = alt.Chart().encode(x=_ratio_axis())
    band = (
        alt.Chart()
        .transform_aggregate(low="min(baseline_low)", high="max(baseline_high)", groupby=["benchmark"])
        .mark_rect(aria=False, color=_NEUTRAL, opacity=0.3, stroke=_NEUTRAL)
        .encode(y="low:Q", y2="high:Q")
    )
    dense = alt.Chart().mark_rule(aria=False, color=_NEUTRAL, strokeDash=[4, 3]).encode(y=alt.datum(100))
    error = base.mark_rule().encode(y=_relative_axis("low:Q"), y2="high:Q", color=_methods(study))
    line = base.mark_line().encode(y=_relative_axis(), color=_methods(study))
    point = base.mark_point(filled=True, size=45, opacity=1).encode(
        y=_relative_axis(), color=_methods(study), shape=_shapes(study), tooltip=_tooltip()
    )
    chart = _by_benchmark(study, data, band, dense, error, line, point)
    caption = (
        "Over the expansion ratio (intermediate size over hidden size), each benchmark as a share of the dense score "
        "(of perplexities the inverse), with 95 % intervals of the difference. Grey: the range of the "
        "no-knowledge baselines. Only a score above the grey band can hold or improve."
    )
    dense_of = {one.title: one.measured[study.dense].value for one in study.benchmarks if study.dense in one.measured}
    if zero := [title for title, value in dense_of.items() if not value]:
        caption += f" The dense model has nothing right in {', '.join(zero)}: there 100 % is one right item."
    return Figure("dichotomy", "All benchmarks against the expansion ratio", caption, _spec(chart, caption))


def fragile_and_robust(study: Study, analysis: Analysis) -> Figure | None:
    """All benchmarks in one panel for each method, coloured by what became of them."""
    data = [row | {"group": _group(analysis, row)} for row in relative(study, analysis) if row["method"] != DENSE]
    if not data:
        return None
    chosen = alt.selection_point(fields=["benchmark"], on="pointerover", nearest=True, empty=False)
    colours = [COLOURS[1], COLOURS[0], *COLOURS[2:5], _NEUTRAL]
    colour = alt.Color("group:N", title="group", scale=alt.Scale(domain=list(_GROUPS), range=colours))
    base = alt.Chart().encode(x=_ratio_axis(), y=_relative_axis(), color=colour, detail="benchmark:N")
    line = base.mark_line().encode(size=alt.condition(chosen, alt.value(4), alt.value(1.5)))
    point = base.mark_point(filled=True, size=50, opacity=1).encode(
        shape=alt.Shape("group:N", title="group", scale=alt.Scale(domain=list(_GROUPS), range=list(SHAPES))),
        tooltip=_tooltip(),
    )
    rule = alt.Chart().mark_rule(aria=False, color=_NEUTRAL, strokeDash=[4, 3]).encode(y=alt.datum(100))
    names = (
        alt.Chart()
        .transform_filter("isValid(datum.label_at)")
        .mark_text(align="left", dx=8, fontSize=_LABEL_SIZE)
        .encode(x=_ratio_axis(), y="label_at:Q", text="benchmark:N", color=colour)
    )
    chart = (
        alt.layer(rule, line, point.add_params(chosen), names, data=alt.InlineData(_with_labels(data)))
        .properties(width=380, height=_LABELLED_HEIGHT)
        .facet(facet=alt.Facet("method:N", title=None), columns=2)
    )
    caption = (
        "All benchmarks in one panel for each method. Fragile: some level is significantly worse than dense. "
        "At or below the baseline: the dense model is not above every no-knowledge baseline."
    )
    return Figure("fragile_robust", "Fragile against robust", caption, _spec(chart, caption))


def _with_labels(data: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with `label_at`: where the name of a line stands beside its end, far enough from the next one to be read."""
    values = [row["relative"] for row in data] + [100]
    step = (max(values) - min(values)) * (_LABEL_SIZE + 1) / _LABELLED_HEIGHT
    labelled = []
    for method in dict.fromkeys(row["method"] for row in data):
        own = [row for row in data if row["method"] == method]
        ends = {row["benchmark"]: row for row in sorted(own, key=lambda row: row["removed"])}  # the last one stays
        names = sorted(ends, key=lambda name: ends[name]["relative"])
        places: dict[str, float] = {}
        above = -math.inf
        for name in names:  # upwards, each above the one before
            above = places[name] = max(ends[name]["relative"], above + step)
        below = max(values) + step
        for name in reversed(names):  # and back down, where the panel ended before they did
            below = places[name] = min(places[name], below - step)
        labelled += [
            row | {"label_at": places[row["benchmark"]] if row is ends[row["benchmark"]] else None} for row in own
        ]
    return labelled


def perplexities(study: Study) -> Figure | None:
    """Perplexities on a logarithmic axis."""
    data = [
        {
            "benchmark": benchmark.title,
            "method": method,
            "level": point.level,
            "expansion_ratio": point.expansion_ratio,
            "value": measured.value,
            "baseline": benchmark.best_baseline[1].value if benchmark.best_baseline else None,
        }
        for benchmark in study.benchmarks
        if benchmark.is_perplexity
        for method in study.methods
        for point in study.of_method(method)
        if (measured := benchmark.measured.get(point)) is not None and math.isfinite(measured.value)
    ]
    if not data:
        return None
    y = alt.Y("value:Q", title="perplexity", scale=alt.Scale(type="log"))
    base = alt.Chart().encode(x=_ratio_axis(), y=y, color=_methods(study))
    point = base.mark_point(filled=True, size=50, opacity=1).encode(
        shape=_shapes(study), tooltip=["benchmark:N", "method:N", "level:N", alt.Tooltip("value:Q", format=",.2f")]
    )
    baseline = (
        alt.Chart()
        .transform_filter("isValid(datum.baseline)")
        .mark_rule(aria=False, color=_NEUTRAL, strokeDash=[2, 2])
        .encode(y=alt.Y("min(baseline):Q", scale=alt.Scale(type="log")))
    )
    chart = (
        alt.layer(baseline, base.mark_line(), point, data=alt.InlineData(data))
        .properties(width=320, height=240)
        .facet(facet=alt.Facet("benchmark:N", title=None), columns=2)
        .resolve_scale(y="independent")
    )
    caption = "Perplexities; the dotted line is that of a model to which all tokens are equally likely."
    return Figure("perplexity", "Perplexity", caption, _spec(chart, caption))


def knowledge_and_truthfulness(study: Study) -> Figure | None:
    """MMLU against TruthfulQA MC2, level by level."""
    found = {benchmark.name: benchmark for benchmark in study.benchmarks}
    if not {KNOWLEDGE, TRUTHFULNESS} <= found.keys():
        return None
    knowledge, truth = found[KNOWLEDGE], found[TRUTHFULNESS]
    data = [
        {
            "method": method,
            "level": point.level,
            "removed": point.removed,
            "knowledge": knowledge.measured[point].value,
            "truthfulness": truth.measured[point].value,
        }
        for method in study.methods
        for point in study.of_method(method)
        if point in knowledge.measured and point in truth.measured
    ]
    if not data:
        return None
    x = alt.X("knowledge:Q", title=knowledge.title, scale=alt.Scale(zero=False))
    y = alt.Y("truthfulness:Q", title=truth.title, scale=alt.Scale(zero=False))
    base = alt.Chart(alt.InlineData(data)).encode(x=x, y=y, color=_methods(study), order="removed:Q")
    layers = [base.mark_line(opacity=0.6)]
    for benchmark, channel in ((knowledge, "x"), (truth, "y")):
        if (best := benchmark.best_baseline) and (worst := benchmark.worst_baseline):
            low, high = sorted((worst[1].value, best[1].value))
            box = alt.Chart(alt.InlineData([{"low": low, "high": high}])).mark_rect(
                aria=False, color=_NEUTRAL, opacity=0.25
            )
            layers.insert(0, box.encode(**{channel: "low:Q", f"{channel}2": "high:Q"}))
    tooltip = ["method:N", "level:N", "knowledge:Q", "truthfulness:Q"]
    layers.append(base.mark_point(filled=True, size=60, opacity=1).encode(shape=_shapes(study), tooltip=tooltip))
    layers.append(base.mark_text(dy=-10, fontSize=10).encode(text="level:N"))
    chart = alt.layer(*layers).properties(width=460, height=320)
    caption = (
        "One point for each level. Grey: the range of the no-knowledge baselines, on each axis. A path "
        "that ends where the bands cross is a model whose answers carry nothing, however the two scores correlate on "
        "the way."
    )
    return Figure("knowledge_truthfulness", "Knowledge against truthfulness", caption, _spec(chart, caption))


def kept_neurons(study: Study) -> Figure | None:
    """Which neurons were kept, by layer."""
    order = [name_variant(point) for point in study.points if point.method != DENSE][:_MOST_MAPS]
    maps = {name: layers for name, layers in study.kept.items() if name in order}
    while sum(parts := [len(shares) for layers in maps.values() for shares in layers]) > _MOST_CELLS and max(parts) > 1:
        maps = {name: [_halved(shares) for shares in layers] for name, layers in maps.items()}
    data = [
        {"model": name, "layer": layer, "part": 100 * part / len(shares), "next": 100 * (part + 1) / len(shares)}
        | {"kept": share}
        for name, layers in maps.items()
        for layer, shares in enumerate(layers)
        for part, share in enumerate(shares)
    ]
    if not data:
        return None
    chart = (
        alt.Chart()
        .mark_rect()
        .encode(
            x=alt.X("part:Q", title="position in the layer, %", scale=alt.Scale(domain=[0, 100], nice=False)),
            x2="next:Q",
            y=alt.Y("layer:O", title="layer", axis=alt.Axis(labelOverlap=True)),
            color=alt.Color("kept:Q", title="share kept", scale=alt.Scale(domain=[0, 1], scheme="viridis")),
            tooltip=["model:N", "layer:O", alt.Tooltip("kept:Q", format=".0%")],
        )
        .properties(width=190, height=180)
        .facet(facet=alt.Facet("model:N", title=None, sort=order), columns=3, data=alt.InlineData(data))
    )
    caption = "The share of neurons that was kept, by layer and by their place in it."
    return Figure("kept", "Which neurons were kept", caption, _spec(chart, caption))


def _halved(shares: Sequence[float]) -> list[float]:
    """Shares of parts of a layer twice as large."""
    return [round(sum(pair) / len(pair), 4) for pair in (shares[i : i + 2] for i in range(0, len(shares), 2))]


def quality_and_speed(study: Study, analysis: Analysis) -> Figure | None:
    """What is left of the model against how fast it is, or what energy it takes, and the Pareto front of both."""
    report = study.efficiency or {"rows": []}
    data = []
    for row in report["rows"]:
        for point in study.points:
            left = retention(study, analysis, point)
            # Speeds are of layers of one width.
            is_uneven = any(part in ALLOCATIONS[1:] for part in point.method.split("+"))
            if row["aligned"] or left is None or is_uneven or abs(point.removed - row["removed"]) > _SAME_SIZE:
                continue
            place = {"method": point.method, "level": point.level, "left": 100 * left}
            setting = f"{row['workload']}, batch {row['batch']}"
            costs = {"decode tokens/s": row["decode_tokens_per_second"], _ENERGY: row["energy_per_token"]}
            data += [
                place | {"setting": setting, "cost": cost, "value": value}
                for cost, value in costs.items()
                if value is not None
            ]
    if not data:
        return None
    data = [place | {"front": not any(_beats(other, place) for other in data)} for place in data]
    methods = [DENSE, *study.methods]
    colour = alt.Color("method:N", title="method", scale=alt.Scale(domain=methods, range=[_NEUTRAL, *COLOURS]))
    base = alt.Chart().encode(
        x=alt.X("value:Q", title=None, scale=alt.Scale(zero=False)),
        y=alt.Y("left:Q", title="% left above the baseline"),
    )
    point_marks = base.mark_point(filled=True, size=60, opacity=1).encode(
        color=colour,
        shape=alt.Shape("method:N", title="method", scale=alt.Scale(domain=methods, range=list(SHAPES))),
        tooltip=[
            "method:N",
            "level:N",
            "setting:N",
            alt.Tooltip("value:Q", format=",.2f"),
            alt.Tooltip("left:Q", format=".1f"),
        ],
    )
    front = base.transform_filter("datum.front").mark_line(strokeDash=[4, 3], color=_NEUTRAL).encode(order="value:Q")
    labels = base.mark_text(dy=-10, fontSize=10).encode(text="level:N")
    chart = (
        alt.layer(front, point_marks, labels, data=alt.InlineData(data))
        .transform_calculate(panel="datum.cost + ': ' + datum.setting")
        .properties(width=300, height=220)
        .facet(facet=alt.Facet("panel:N", title=None), columns=2)
        .resolve_scale(x="independent")
    )
    caption = (
        "How much of the dense model's distance from the no-knowledge baseline is left, in the mean over the "
        "benchmarks on which it is above the baseline, against speed (and energy, where hardware counters exist). The "
        "line is the Pareto front: the models that no other one beats in one of the two without losing in the other."
    )
    return Figure("quality_speed", "Quality against speed and energy", caption, _spec(chart, caption))


def _beats(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether a model is better than another in quality or cost, and worse in neither; in the same panel."""
    if (one["setting"], one["cost"]) != (other["setting"], other["cost"]):
        return False
    sign = -1 if one["cost"] == _ENERGY else 1
    gains = (one["left"] - other["left"], sign * (one["value"] - other["value"]))
    return bool(min(gains) >= 0 and max(gains) > 0)


def against_paper(study: Study, analysis: Analysis) -> Figure | None:
    """Our relative scores beside the published ones, over the share of neurons removed."""
    names = {benchmark.title for benchmark in study.benchmarks}
    if "source" in study.about:  # it is the published one
        return None
    data = [row | {"model": f"ours, {row['method']}"} for row in relative(study, analysis)]
    for model in published()["models"]:
        theirs = paper_study(model)
        data += [row | {"model": model} for row in relative(theirs, analyse(theirs)) if row["benchmark"] in names]
    if len({row["model"] in published()["models"] for row in data}) < 2:  # ours alone, or theirs
        return None
    models = list(dict.fromkeys(row["model"] for row in data))
    colour = alt.Color("model:N", title="model", sort=models, scale=alt.Scale(domain=models, range=list(COLOURS)))
    base = alt.Chart().encode(x=alt.X("removed:Q", title="neurons removed, %"), y=_relative_axis(), color=colour)
    point = base.mark_point(filled=True, size=35, opacity=1).encode(
        shape=alt.Shape("model:N", title="model", sort=models, scale=alt.Scale(domain=models, range=list(SHAPES))),
        tooltip=["model:N", "benchmark:N", "level:N", alt.Tooltip("relative:Q", format=".1f")],
    )
    chart = _by_benchmark(study, data, base.mark_line(), point)
    caption = "Shares of the dense score over the share of neurons removed, beside the published values of the paper."
    return Figure("paper", "Against the paper", caption, _spec(chart, caption))


def relative(study: Study, analysis: Analysis, *, with_zero: bool = False) -> list[dict[str, Any]]:
    """Scores as percent of the dense model's, a row for each method, benchmark and level; the dense level included.

    Nothing is a share of zero: benchmarks of which the dense model has nothing right are left out, or are `with_zero`
    shares of one right item.
    """
    data = []
    for benchmark in study.benchmarks:
        dense = benchmark.measured.get(study.dense)
        if dense is None or not (dense.value or with_zero):
            continue
        whole = dense.value or 1 / dense.items
        ends = [one[1].value for one in (benchmark.worst_baseline, benchmark.best_baseline) if one is not None]
        bounds = sorted(share for end in ends if math.isfinite(share := _share(benchmark, whole, end)))
        for method in study.methods:
            for point in study.of_method(method):
                row = analysis.row(benchmark.name, point)
                if row is None or not math.isfinite(_share(benchmark, whole, row.measured.value)):
                    continue
                low, high = _interval(benchmark, dense.value, whole, row.from_dense)
                data.append(
                    {
                        "benchmark": benchmark.title,
                        "name": benchmark.name,
                        "method": method,
                        "level": point.level,
                        "removed": 100 * point.removed,
                        "expansion_ratio": point.expansion_ratio,
                        "value": row.measured.value,
                        "relative": _share(benchmark, whole, row.measured.value),
                        "low": low,
                        "high": high,
                        "baseline_low": bounds[0] if bounds else None,
                        "baseline_high": bounds[-1] if bounds else None,
                        "verdict": row.verdict,
                    }
                )
    return data


def _share(benchmark: StudiedBenchmark, whole: float, value: float) -> float:
    if benchmark.higher_is_better:
        return 100 * value / whole
    return 100 * whole / value if value else math.inf


def _interval(
    benchmark: StudiedBenchmark, dense: float, whole: float, found: Comparison | None
) -> tuple[float, float] | tuple[None, None]:
    """The interval of a difference as percent of the whole; of perplexities the difference is in nats.

    That of a difference from a small score may reach below zero, where no score is.
    """
    if found is None:
        return None, None
    if benchmark.is_perplexity:
        return 100 * math.exp(-found.high), 100 * math.exp(-found.low)
    return 100 * max(dense + found.low, 0) / whole, 100 * max(dense + found.high, 0) / whole


def _group(analysis: Analysis, row: dict[str, Any]) -> str:
    for group, names in analysis.groups.get(row["method"], {}).items():
        if row["name"] in names:
            return group
    return "not tested"


def _by_benchmark(study: Study, data: list[dict[str, Any]], *layers: Any) -> Any:
    """A small panel for each benchmark, with an axis of its own."""
    order = [benchmark.title for benchmark in study.benchmarks]
    return (
        alt.layer(*layers, data=alt.InlineData(data))
        .properties(width=190, height=130)
        .facet(facet=alt.Facet("benchmark:N", title=None, sort=order), columns=4)
        .resolve_scale(y="independent")
    )


def _ratio_axis() -> alt.X:
    return alt.X("expansion_ratio:Q", title="expansion ratio", scale=alt.Scale(zero=False, reverse=True))


def _relative_axis(field: str = "relative:Q") -> alt.Y:
    return alt.Y(field, title="% of dense", scale=alt.Scale(zero=False))


def _methods(study: Study) -> alt.Color:
    return alt.Color("method:N", title="method", scale=alt.Scale(domain=study.methods, range=list(COLOURS)))


def _shapes(study: Study) -> alt.Shape:
    return alt.Shape("method:N", title="method", scale=alt.Scale(domain=study.methods, range=list(SHAPES)))


def _tooltip() -> Sequence[Any]:
    return [
        "benchmark:N",
        "method:N",
        "level:N",
        alt.Tooltip("value:Q", format=",.4f"),
        alt.Tooltip("relative:Q", format=".1f", title="% of dense"),
        "verdict:N",
    ]


def _spec(chart: Any, caption: str) -> dict[str, Any]:
    spec: dict[str, Any] = chart.properties(description=caption).to_dict()
    spec.pop("config", None)  # the page and the files have their own
    return spec
