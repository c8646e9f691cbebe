"""The chart: well-formed, every bar with its value beside it, text escaped."""

import re
import xml.etree.ElementTree as ElementTree

from jilju.bench.chart import Bar, Group, draw

SVG = "{http://www.w3.org/2000/svg}"
GROUPS = [
    Group("first & <only>", [Bar("ours", 10.0, "10 tok/s"), Bar("theirs", 5.0, "5 tok/s")]),
    Group("second", [Bar("ours", 0.0, "none")]),
    Group("third", []),
]


def test_bars_are_as_long_as_their_values_within_a_group():
    root = ElementTree.fromstring(draw("title", "note", GROUPS))
    texts = [text.text for text in root.iter(SVG + "text")]
    for wanted in ("title", "note", "ours", "theirs", "first & <only>", "10 tok/s", "5 tok/s", "none", "third"):
        assert wanted in texts
    widths = [float(r.get("width")) for r in root.iter(SVG + "rect") if r.get("height") not in ("12", "100%")]
    assert len(widths) == 3
    assert abs(widths[0] - 2 * widths[1]) < 0.2 and widths[2] == 1.0


def test_a_series_keeps_its_colour_and_both_grounds_have_one_for_each():
    text = draw("title", "note", GROUPS)
    assert text.count('class="s0"') == 3 and text.count('class="s1"') == 2, "bars and legend"
    light, _, dark = re.search(r"<style>(.*)</style>", text)[1].partition("prefers-color-scheme:dark")
    for name in (".s0", ".s1", "text", ".ground"):
        assert name in light and name in dark
