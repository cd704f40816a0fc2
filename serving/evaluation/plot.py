"""A report as one SVG: a panel for each figure, in it each method's mean and 95 % interval."""

from collections.abc import Mapping
from typing import Any

from cluster.svg import Axis, Drawing

_WIDTH, _LEFT, _RIGHT, _ROW, _GAP, _TOP = 720, 150, 570, 20, 46, 48
_COLOURS = ("#1f6f8b", "#c06014", "#5c8d3d", "#7a5195", "#b5446e", "#666666", "#333333")


def report_svg(title: str, figures: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """`figures` are those of one part: `{figure: {method: {mean, low, high, n}}}`, all 0 to 1."""
    methods = list(dict.fromkeys(method for values in figures.values() for method in values))
    colours = {method: _COLOURS[place % len(_COLOURS)] for place, method in enumerate(methods)}
    picture = Drawing(_WIDTH, _TOP + sum(_GAP + _ROW * len(values) for values in figures.values()))
    picture.text(16, 28, title, font_size=15)
    x, top = Axis(0, 1, _LEFT, _RIGHT), _TOP
    for figure, values in figures.items():
        bottom = top + 18 + _ROW * len(values)
        picture.text(16, top + 10, figure, font_weight="bold")
        for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
            picture.line(x(tick), top + 16, x(tick), bottom)
            picture.text(x(tick), bottom + 13, f"{tick:g}", "middle", fill="#777", font_size=10)
        for place, (method, value) in enumerate(values.items()):
            y, colour = top + 18 + _ROW * place + _ROW / 2, colours[method]
            picture.text(_LEFT - 10, y + 4, method, "end")
            if value["low"] is not None:
                picture.line(x(value["low"]), y, x(value["high"]), y, colour, stroke_width=2)
            picture.add("circle", cx=x(value["mean"]), cy=y, r=4, fill=colour)
            picture.text(_RIGHT + 14, y + 4, f"{value['mean']:.3f} (n = {value['n']})")
        top += _GAP + _ROW * len(values)
    return picture.render()
