"""Pictures of measurements as SVG, without a plotting library: text, shapes and curves, and axes to place them by."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar
from xml.sax.saxutils import escape, quoteattr

T = TypeVar("T")


class Drawing:
    """One picture; what is added later lies above. Coordinates are pixels from the upper left corner."""

    def __init__(self, width: float, height: float) -> None:
        self._size = f"{width:g} {height:g}"
        self._parts: list[str] = []
        self.add("rect", width=width, height=height, fill="white")

    def add(self, tag: str, words: str = "", /, **attributes: str | float) -> None:
        """An element of SVG; in names of attributes `_` stands for `-`."""
        pairs = (
            f" {name.replace('_', '-')}={quoteattr(value if isinstance(value, str) else f'{round(value, 1):g}')}"
            for name, value in attributes.items()
        )
        self._parts.append(f"<{tag}{''.join(pairs)}" + (f">{escape(words)}</{tag}>" if words else "/>"))

    def text(self, x: float, y: float, words: str, anchor: str = "start", **attributes: str | float) -> None:
        """One line; `anchor` says which part of it lies at `x`: start, middle or end."""
        self.add("text", words, x=x, y=y, text_anchor=anchor, **attributes)

    def line(self, x1: float, y1: float, x2: float, y2: float, colour: str = "#ddd", **attributes: str | float) -> None:
        self.add("line", x1=x1, y1=y1, x2=x2, y2=y2, stroke=colour, **attributes)

    def curve(self, points: Iterable[tuple[float, float]], colour: str, width: float = 1.5) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.add("polyline", points=path, fill="none", stroke=colour, stroke_width=width)

    def render(self) -> str:
        """The file's content."""
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self._size}" font-family="sans-serif"'
        return "\n".join([f'{head} font-size="12">', *self._parts, "</svg>", ""])


@dataclass(frozen=True, slots=True)
class Axis:
    """Places values from `low` to `high` at pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low) if self.high > self.low else 0.5
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + (self.end - self.start) * share


def thin_out(items: Sequence[T], most: int) -> Sequence[T]:
    """At most so many of them, evenly spread: more than a picture has pixels only make it large."""
    return items[:: max(1, -(-len(items) // most))]
