"""Cost curves of a plan as one SVG: nodes, or GPUs where there are any, of each pool over questions per second."""

import math
from collections.abc import Sequence
from html import escape

from cluster.planning.plan import CapacityPlan

_WIDTH, _HEIGHT, _LEFT, _TOP, _PLOT_WIDTH, _PLOT_HEIGHT = 640, 400, 64, 48, 440, 290
_COLOURS = {"memory": "#1f6f8b", "retrieval": "#c06014", "generator": "#5c8d3d", "cpu": "#7a5195", "all": "#333333"}


def curve_svg(plans: Sequence[tuple[float, CapacityPlan]]) -> str:
    """`plans` by questions per second, ascending, at least two; both axes are logarithmic."""
    on_gpus = plans[-1][1].gpus > 0
    unit = "GPUs" if on_gpus else "nodes"
    series: dict[str, list[float]] = {"all": [plan.gpus if on_gpus else plan.nodes for _, plan in plans]}
    for index, pool in enumerate(plans[0][1].pools):
        series[pool.name] = [plan.pools[index].gpus if on_gpus else plan.pools[index].nodes for _, plan in plans]
    loads = [load for load, _ in plans]
    values = [value for line in series.values() for value in line if value > 0]
    low, high = min(values), max(values)

    def x(load: float) -> float:
        return _LEFT + _PLOT_WIDTH * _share(load, loads[0], loads[-1])

    def y(value: float) -> float:
        return _TOP + _PLOT_HEIGHT * (1 - _share(max(value, low), low, high))

    demand = plans[0][1].demand
    title = f"{demand.memories:,} memories of {demand.tokens:,} tokens, ratio {demand.ratio}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="28" font-size="15">{escape(title)}</text>',
        f'<rect x="{_LEFT}" y="{_TOP}" width="{_PLOT_WIDTH}" height="{_PLOT_HEIGHT}" fill="none" stroke="#999"/>',
        f'<text x="{_LEFT + _PLOT_WIDTH / 2}" y="{_HEIGHT - 12}" text-anchor="middle">questions per second</text>',
        f'<text x="16" y="{_TOP - 8}">{unit}</text>',
    ]
    for load in loads:
        parts.append(f'<text x="{x(load):.1f}" y="{_TOP + _PLOT_HEIGHT + 18}" text-anchor="middle">{load:g}</text>')
    for value in sorted({low, math.sqrt(low * high), high}):
        parts.append(f'<text x="{_LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for number, (name, line) in enumerate(series.items()):
        points = " ".join(f"{x(load):.1f},{y(value):.1f}" for load, value in zip(loads, line, strict=True))
        colour, place = _COLOURS.get(name, "#888888"), _TOP + 16 + 20 * number
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{_LEFT + _PLOT_WIDTH + 14}" y="{place}" fill="{colour}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _share(value: float, low: float, high: float) -> float:
    """Where `value` lies between two others, on a logarithmic scale."""
    return math.log(value / low) / math.log(high / low) if high > low else 0.5
