"""Figures as files: their colours, and what draws a Vega-Lite specification without a browser."""

from typing import Any

import vl_convert

# Okabe and Ito's, which colour-blind readers can tell apart, without black and yellow: on light and dark they vanish.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
SHAPES = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down")

_SCALE = 2  # pixels of a PNG for each of the figure's
_SHARED: dict[str, Any] = {"font": "sans-serif", "legend": {"orient": "bottom"}, "axis": {"titleFontWeight": "normal"}}
# PNGs are for print and slides. SVGs stand on pages, light or dark, so they have no background, and a grey that reads
# on both.
_PRINT = _SHARED | {"background": "white"}
_GREY, _FAINT = "#767676", "#76767655"
_ON_ANY: dict[str, Any] = _SHARED | {
    "background": "transparent",
    "view": {"stroke": _FAINT},
    "axis": _SHARED["axis"]
    | {"labelColor": _GREY, "titleColor": _GREY, "gridColor": _FAINT, "domainColor": _GREY, "tickColor": _GREY},
    "legend": _SHARED["legend"] | {"labelColor": _GREY, "titleColor": _GREY},
    "header": {"labelColor": _GREY, "titleColor": _GREY},
    "title": {"color": _GREY},
    "text": {"fill": _GREY},
}


def drawings(spec: dict[str, Any]) -> dict[str, bytes]:
    """A Vega-Lite specification as "svg", which reads on light and dark pages, and as "png", for print."""
    return {
        "svg": vl_convert.vegalite_to_svg(spec, config=_ON_ANY).encode(),
        "png": vl_convert.vegalite_to_png(spec, scale=_SCALE, config=_PRINT),
    }
