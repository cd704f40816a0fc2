"""Cost curves of a plan as one SVG: nodes, or GPUs where there are any, of each pool over questions per second."""

import math
from collections.abc import Sequence

from cluster.planning.plan import CapacityPlan
from cluster.svg import Axis, Drawing

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 640, 400, 64, 504, 48, 338
_COLOURS = {"memory": "#1f6f8b", "retrieval": "#c06014", "generator": "#5c8d3d", "cpu": "#7a5195", "all": "#333333"}


def curve_svg(plans: Sequence[tuple[float, CapacityPlan]]) -> str:
    """`plans` by questions per second, ascending, at least two; both axes are logarithmic."""
    unit = "gpus" if plans[-1][1].gpus else "nodes"
    series: dict[str, list[float]] = {"all": [getattr(plan, unit) for _, plan in plans]}
    for index, pool in enumerate(plans[0][1].pools):
        series[pool.name] = [getattr(plan.pools[index], unit) for _, plan in plans]
    loads = [load for load, _ in plans]
    values = [value for line in series.values() for value in line if value]
    low, high = min(values), max(values)
    x, y = Axis(loads[0], loads[-1], _LEFT, _RIGHT, log=True), Axis(low, high, _BOTTOM, _TOP, log=True)

    picture, demand = Drawing(_WIDTH, _HEIGHT), plans[0][1].demand
    title = f"{demand.memories:,} memories of {demand.tokens:,} tokens, ratio {demand.ratio}"
    picture.text(_LEFT, 28, title, font_size=15)
    picture.add("rect", x=_LEFT, y=_TOP, width=_RIGHT - _LEFT, height=_BOTTOM - _TOP, fill="none", stroke="#999")
    picture.text((_LEFT + _RIGHT) / 2, _HEIGHT - 12, "questions per second", "middle")
    picture.text(16, _TOP - 8, "GPUs" if unit == "gpus" else unit)
    for load in loads:
        picture.text(x(load), _BOTTOM + 18, f"{load:g}", "middle")
    for value in sorted({low, math.sqrt(low * high), high}):
        picture.text(_LEFT - 8, y(value) + 4, f"{value:.3g}", "end")
    for number, (name, line) in enumerate(series.items()):
        colour = _COLOURS[name]
        picture.curve([(x(load), y(max(value, low))) for load, value in zip(loads, line, strict=True)], colour, 2)
        picture.text(_RIGHT + 14, _TOP + 16 + 20 * number, name, fill=colour)
    return picture.render()
