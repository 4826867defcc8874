"""The figure of `evals.compare`: a panel for each text or benchmark, a line for each method."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import altair as alt

from evals.report.drawing import COLOURS, SHAPES

_NEUTRAL = "#767676"  # reads on light and dark
_WIDTH, _HEIGHT = 440, 280
# Multipliers of powers of ten that a logarithmic axis shows, by how far apart its ends are.
_DIGITS = ((2.0, [i / 4 for i in range(4, 40)]), (10.0, [1, 1.5, 2, 3, 4, 5, 7]), (1e3, [1, 2, 5]), (math.inf, [1]))


@dataclasses.dataclass(frozen=True)
class Panel:
    """What one text or benchmark says of all models.

    Attributes:
      title: says of what model, and on what.
      dense: the score of the dense model.
      rows: of the others, each with "method", "place" (expansion ratio or layer) and "value".
      is_perplexity: shown on a logarithmic axis.
    """

    title: str
    dense: float
    rows: Sequence[dict[str, Any]]
    is_perplexity: bool


def comparison(panels: Sequence[Panel], *, by_layer: bool) -> dict[str, Any]:
    """The figure as Vega-Lite.

    Args:
      panels: from the top.
      by_layer: places are layers, not expansion ratios.
    """
    drawn = alt.vconcat(*(_drawn(panel, by_layer) for panel in panels))
    spec: dict[str, Any] = drawn.resolve_scale(color="independent", shape="independent").to_dict()
    spec.pop("config", None)
    return spec


def _drawn(panel: Panel, by_layer: bool) -> Any:
    if by_layer:
        x = alt.X("place:Q", title="layer", axis=alt.Axis(format="d", tickMinStep=1))
    else:
        scale = alt.Scale(zero=False, reverse=True)
        x = alt.X("place:Q", title="expansion ratio (intermediate size / hidden size)", scale=scale)
    if panel.is_perplexity:
        ticks = plain_ticks([panel.dense, *(row["value"] for row in panel.rows)])
        axis = alt.Axis(values=ticks, format="~r") if ticks else alt.Axis(format="~r")
        y = alt.Y("value:Q", title="token perplexity", scale=alt.Scale(type="log"), axis=axis)
    else:
        y = alt.Y("value:Q", title="score", scale=alt.Scale(zero=False))
    methods = list(dict.fromkeys(row["method"] for row in panel.rows))
    colour = alt.Color("method:N", title=None, scale=alt.Scale(domain=methods, range=list(COLOURS)))
    shape = alt.Shape("method:N", title=None, scale=alt.Scale(domain=methods, range=list(SHAPES)))
    lines = alt.Chart(alt.InlineData(list(panel.rows))).encode(x=x, y=y, color=colour)
    dense = alt.Chart(alt.InlineData([{"value": panel.dense, "name": f"dense {panel.dense:,.4g}"}])).encode(y=y)
    return alt.layer(
        dense.mark_rule(strokeDash=[4, 3], color=_NEUTRAL),
        dense.mark_text(align="left", dx=4, dy=-7, color=_NEUTRAL).encode(x=alt.value(0), text="name:N"),
        lines.mark_line(),
        lines.mark_point(filled=True, size=60, opacity=1).encode(shape=shape),
    ).properties(title=panel.title, width=_WIDTH, height=_HEIGHT)


def plain_ticks(values: Sequence[float]) -> list[float]:
    """Round numbers over the range of positive ones, for a logarithmic axis; none where a number is not finite."""
    low, high = min(values), max(values)
    if not (low > 0 and math.isfinite(high)):
        return []
    digits = next(digits for most, digits in _DIGITS if high / low < most or most == math.inf)
    powers = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    ticks = [digit * 10.0**power for power in powers for digit in digits]
    return [tick for tick in ticks if low * 0.9 <= tick <= high * 1.1]
