"""The loss curve as a picture: one SVG file, drawn without a plotting library."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 900, 420, 60, 60, 40, 50
_LOSS, _ACCURACY = "#b3402a", "#2a6fb3"
_POINTS = 1500


def write_curve(file: Path, progress: Sequence[Mapping[str, Any]]) -> None:
    """Draws loss (left scale, nats) and accuracy (right scale) over tokens, with the stages' beginnings."""
    every = max(1, len(progress) // _POINTS)
    lines = [*progress[::every]]
    if len(lines) < 2:
        return
    most = max(line["tokens"] for line in lines)
    high = max(line["loss"] for line in lines)
    right, low = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def x(tokens: float) -> float:
        return round(_LEFT + (right - _LEFT) * tokens / most, 1)

    def y(share: float) -> float:
        return round(low - (low - _TOP) * share, 1)

    def curve(colour: str, points: list[tuple[float, float]]) -> str:
        path = " ".join(f"{a},{b}" for a, b in points)
        return f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{path}"/>'

    def text(at: tuple[float, float], words: str, anchor: str = "middle", colour: str = "#444") -> str:
        return f'<text x="{at[0]}" y="{at[1]}" text-anchor="{anchor}" fill="{colour}">{escape(words)}</text>'

    parts = [f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>']
    for step in range(5):
        share = step / 4
        parts.append(f'<line x1="{_LEFT}" x2="{right}" y1="{y(share)}" y2="{y(share)}" stroke="#ddd"/>')
        parts.append(text((_LEFT - 8, y(share) + 4), f"{high * share:.2f}", "end", _LOSS))
        parts.append(text((right + 8, y(share) + 4), f"{share:.0%}", "start", _ACCURACY))
        parts.append(text((x(most * share), low + 20), f"{most * share / 1e6:.2f} M"))
    seen = ""
    for line in lines:
        if line["stage"] != seen:
            seen, at = line["stage"], x(line["tokens"])
            parts.append(f'<line x1="{at}" x2="{at}" y1="{_TOP}" y2="{low}" stroke="#999" stroke-dasharray="3 3"/>')
            parts.append(text((at + 4, _TOP - 6), seen, "start"))
    parts.append(curve(_LOSS, [(x(line["tokens"]), y(line["loss"] / high)) for line in lines]))
    parts.append(curve(_ACCURACY, [(x(line["tokens"]), y(line["accuracy"])) for line in lines]))
    parts.append(text((_LEFT, _HEIGHT - 10), "loss, nats a target", "start", _LOSS))
    parts.append(text((_WIDTH / 2, _HEIGHT - 10), "tokens"))
    parts.append(text((right, _HEIGHT - 10), "targets predicted right", "end", _ACCURACY))
    body = "\n".join(parts)
    file.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'font-family="sans-serif" font-size="12">\n{body}\n</svg>\n',
        "utf-8",
    )
