"""Pictures: values lie where the axis puts them, words are escaped, and long series are thinned."""

import xml.etree.ElementTree as ET

import pytest

from cluster.svg import Axis, Drawing, thin_out


def test_an_axis_places_values() -> None:
    linear, log = Axis(0, 4, 100, 20), Axis(1, 100, 0, 200, log=True)
    assert [linear(value) for value in (0, 1, 4)] == [100, 80, 20]
    assert [log(value) for value in (1, 10, 100)] == pytest.approx([0, 100, 200])
    assert Axis(5, 5, 0, 10, log=True)(5) == 5, "one value alone lies in the middle"


def test_what_is_drawn_is_well_formed() -> None:
    picture = Drawing(40, 30)
    picture.text(1.26, 2, 'a < b & "c"', fill='"')
    picture.line(0, 0, 1, 1, stroke_dasharray="3 3")
    picture.curve([(0, 0), (1.04, 2)], "#333")
    _, text, line, curve = ET.fromstring(picture.render())
    assert text.text == 'a < b & "c"' and text.attrib["x"] == "1.3" and text.attrib["fill"] == '"'
    assert line.attrib["stroke-dasharray"] == "3 3" and curve.attrib["points"] == "0.0,0.0 1.0,2.0"


@pytest.mark.parametrize("count", [0, 1, 299, 300, 301, 2708])
def test_a_series_is_thinned_evenly(count: int) -> None:
    kept = thin_out(range(count), 300)
    assert len(kept) <= 300 and len(kept) >= min(count, 150)
    assert not count or kept[0] == 0
