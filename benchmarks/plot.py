"""Plot: points over time with steps of a bound, as one SVG file in the chart's colours.

Owns the axes and their ticks. Knows nothing of what the numbers mean.
"""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from jilju.bench.chart import COLOURS, WIDTH

LEFT, TOP, RIGHT, HEIGHT = 70, 100, 30, 320
TICKS = 5


class Series(NamedTuple):
    name: str
    points: Sequence[tuple[float, float]]
    is_line: bool  # a line that holds each value until the next; else dots


def plot(title: str, note: str, units: tuple[str, str], series: Sequence[Series]) -> str:
    """The SVG's text; both axes begin at 0. `units` of x and y."""
    width = WIDTH - LEFT - RIGHT
    most_x, most_y = (round_up(max(point[axis] for one in series for point in one.points)) for axis in (0, 1))

    def at(x: float, y: float) -> tuple[float, float]:
        return LEFT + x / most_x * width, TOP + HEIGHT - y / most_y * HEIGHT

    parts = [_text(16, 28, title, "title"), _text(16, 48, note, "note")]
    for tick in range(TICKS + 1):
        x, y = at(most_x * tick / TICKS, most_y * tick / TICKS)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}h{width}"/>')
        parts.append(_text(LEFT - 8, y + 4, f"{most_y * tick / TICKS:g}", "end"))
        parts.append(_text(x, TOP + HEIGHT + 18, f"{most_x * tick / TICKS:g}", "middle"))
    parts.append(_text(LEFT - 8, TOP - 14, units[1], "end"))
    parts.append(_text(WIDTH - RIGHT, TOP + HEIGHT + 36, units[0], "end"))
    for index, one in enumerate(series):
        colour = f"s{index % len(COLOURS)}"
        parts.append(f'<rect class="{colour}" x="{16 + index * 250}" y="62" width="12" height="12"/>')
        parts.append(_text(34 + index * 250, 73, one.name, ""))
        places = [at(*point) for point in one.points]
        if one.is_line:
            path = "".join(f"H{x:.1f}V{y:.1f}" for x, y in places[1:])
            parts.append(
                f'<path class="line l{index % len(COLOURS)}" d="M{places[0][0]:.1f} {places[0][1]:.1f}{path}"/>'
            )
        else:
            parts += [f'<circle class="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="1.6"/>' for x, y in places]
    height = TOP + HEIGHT + 48
    light, dark = (
        "".join(f".s{i}{{fill:{pair[ground]}}}.l{i}{{stroke:{pair[ground]}}}" for i, pair in enumerate(COLOURS))
        for ground in (0, 1)
    )
    style = (
        "text{font:12px system-ui,sans-serif;fill:#1b1b1b}.title{font-size:16px;font-weight:600}.note{fill:#555}.end{text-anchor:end}"
        ".middle{text-anchor:middle}.ground{fill:#fff}.grid{stroke:#8884;fill:none}.line{fill:none;stroke-width:1.5}"
        f"{light}@media(prefers-color-scheme:dark){{text{{fill:#eee}}.note{{fill:#aaa}}.ground{{fill:#16181c}}{dark}}}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img">'
        f'<title>{escape(title)}</title><style>{style}</style><rect class="ground" width="100%" height="100%"/>{"".join(parts)}</svg>\n'
    )


def round_up(value: float) -> float:
    """The next of 1, 1.5, 2, 3, 5, 7.5 and 10 times a power of ten."""
    power = 1.0
    while power * 10 <= value:
        power *= 10
    while power > value:
        power /= 10
    return next(power * step for step in (1, 1.5, 2, 3, 5, 7.5, 10) if power * step >= value)


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(text)}</text>'
