"""A report as one SVG: a panel for each figure, in it each method's mean and 95 % interval."""

from collections.abc import Mapping
from html import escape
from typing import Any

_WIDTH, _LEFT, _PLOT, _ROW, _GAP, _TOP = 720, 150, 420, 20, 46, 48
_COLOURS = ("#1f6f8b", "#c06014", "#5c8d3d", "#7a5195", "#b5446e", "#666666", "#333333")


def report_svg(title: str, figures: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """`figures` are those of one part: `{figure: {method: {mean, low, high, n}}}`, all 0 to 1."""
    methods = list(dict.fromkeys(method for values in figures.values() for method in values))
    colours = {method: _COLOURS[place % len(_COLOURS)] for place, method in enumerate(methods)}
    parts, y = [f'<text x="16" y="28" font-size="15">{escape(title)}</text>'], _TOP
    for figure, values in figures.items():
        parts += _panel(figure, values, colours, y)
        y += _GAP + _ROW * len(values)
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y}" font-family="sans-serif" font-size="12">'
    )
    return "\n".join([opening, f'<rect width="{_WIDTH}" height="{y}" fill="white"/>', *parts, "</svg>", ""])


def _panel(figure: str, values: Mapping[str, Mapping[str, Any]], colours: Mapping[str, str], top: int) -> list[str]:
    bottom = top + 18 + _ROW * len(values)
    lines = [f'<text x="16" y="{top + 10}" font-weight="bold">{escape(figure)}</text>']
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = _LEFT + _PLOT * tick
        lines.append(f'<line x1="{x:g}" y1="{top + 16}" x2="{x:g}" y2="{bottom}" stroke="#ddd"/>')
        lines.append(
            f'<text x="{x:g}" y="{bottom + 13}" text-anchor="middle" fill="#777" font-size="10">{tick:g}</text>'
        )
    for place, (method, value) in enumerate(values.items()):
        y, colour = top + 18 + _ROW * place + _ROW / 2, colours[method]
        mean, low, high = (_LEFT + _PLOT * (value[name] or 0) for name in ("mean", "low", "high"))
        lines.append(f'<text x="{_LEFT - 10}" y="{y + 4:g}" text-anchor="end">{escape(method)}</text>')
        if value["low"] is not None:
            lines.append(
                f'<line x1="{low:.1f}" y1="{y:g}" x2="{high:.1f}" y2="{y:g}" stroke="{colour}" stroke-width="2"/>'
            )
        lines.append(f'<circle cx="{mean:.1f}" cy="{y:g}" r="4" fill="{colour}"/>')
        lines.append(f'<text x="{_LEFT + _PLOT + 14}" y="{y + 4:g}">{value["mean"]:.3f} (n = {value["n"]})</text>')
    return lines
