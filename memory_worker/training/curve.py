"""The loss curve as a picture: one SVG file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.svg import Axis, Drawing, thin_out

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 900, 420, 60, 840, 40, 370
_LOSS, _ACCURACY = "#b3402a", "#2a6fb3"
_POINTS = 1500


def write_curve(file: Path, progress: Sequence[Mapping[str, Any]]) -> None:
    """Draws loss (left scale, nats) and accuracy (right scale) over tokens, with the stages' beginnings."""
    lines = thin_out(progress, _POINTS)
    if len(lines) < 2:
        return
    picture = Drawing(_WIDTH, _HEIGHT)
    most, high = (max(line[name] for line in lines) for name in ("tokens", "loss"))
    x, loss, accuracy = Axis(0, most, _LEFT, _RIGHT), Axis(0, high, _BOTTOM, _TOP), Axis(0, 1, _BOTTOM, _TOP)
    for step in range(5):
        share = step / 4
        y = accuracy(share)
        picture.line(_LEFT, y, _RIGHT, y)
        picture.text(_LEFT - 8, y + 4, f"{high * share:.2f}", "end", fill=_LOSS)
        picture.text(_RIGHT + 8, y + 4, f"{share:.0%}", fill=_ACCURACY)
        picture.text(x(most * share), _BOTTOM + 20, f"{most * share / 1e6:.2f} M", "middle")
    seen = ""
    for line in lines:
        if line["stage"] != seen:
            seen, at = line["stage"], x(line["tokens"])
            picture.line(at, _TOP, at, _BOTTOM, "#999", stroke_dasharray="3 3")
            picture.text(at + 4, _TOP - 6, seen)
    picture.curve([(x(line["tokens"]), loss(line["loss"])) for line in lines], _LOSS)
    picture.curve([(x(line["tokens"]), accuracy(line["accuracy"])) for line in lines], _ACCURACY)
    picture.text(_LEFT, _HEIGHT - 10, "loss, nats a target", fill=_LOSS)
    picture.text(_WIDTH / 2, _HEIGHT - 10, "tokens", "middle")
    picture.text(_RIGHT, _HEIGHT - 10, "targets predicted right", "end", fill=_ACCURACY)
    file.write_text(picture.render(), "utf-8")
