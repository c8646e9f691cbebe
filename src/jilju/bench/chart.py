"""Chart: grouped horizontal bars as one SVG file that needs nothing else.

Owns the drawing: every bar says its own value, groups stand under each other, colours and text are readable on a light and on a
dark ground (the file asks the viewer which it is). Knows nothing of what the numbers mean.
"""

from collections.abc import Sequence
from html import escape

import msgspec

WIDTH, LEFT, BAR, GAP = 900, 210, 16, 14
COLOURS = (
    ("#2563a8", "#6aa9f0"),
    ("#b3541e", "#f0a06a"),
    ("#3d7a3d", "#7fc97f"),
    ("#7a4a9c", "#c39be0"),
    ("#6b6b6b", "#b5b5b5"),
)


class Bar(msgspec.Struct, frozen=True):
    series: str
    value: float
    label: str  # what is written at its end


class Group(msgspec.Struct, frozen=True):
    label: str
    bars: list[Bar]


def draw(title: str, note: str, groups: Sequence[Group]) -> str:
    """The SVG's text. Each group has its own scale: its longest bar fills the width."""
    series = list(dict.fromkeys(bar.series for group in groups for bar in group.bars))
    y = 64
    parts = [_text(16, 28, title, "title"), _text(16, 48, note, "note")]
    for index, name in enumerate(series):
        x = 16 + index * 180
        parts.append(f'<rect class="s{index % len(COLOURS)}" x="{x}" y="{y}" width="12" height="12"/>')
        parts.append(_text(x + 18, y + 11, name, ""))
    y += 32
    for group in groups:
        longest = max((bar.value for bar in group.bars), default=1.0) or 1.0
        parts.append(_text(LEFT - 12, y + len(group.bars) * BAR / 2 + 4, group.label, "end"))
        for bar in group.bars:
            length = max(1.0, bar.value / longest * (WIDTH - LEFT - 190))
            colour = series.index(bar.series) % len(COLOURS)
            parts.append(f'<rect class="s{colour}" x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR - 3}"/>')
            parts.append(_text(LEFT + length + 6, y + 11, bar.label, ""))
            y += BAR
        y += GAP
    light = "".join(f".s{i}{{fill:{pair[0]}}}" for i, pair in enumerate(COLOURS))
    dark = "".join(f".s{i}{{fill:{pair[1]}}}" for i, pair in enumerate(COLOURS))
    style = (
        "text{font:12px system-ui,sans-serif;fill:#1b1b1b}.title{font-size:16px;font-weight:600}.note{fill:#555}"
        f".end{{text-anchor:end}}.ground{{fill:#fff}}{light}"
        f"@media(prefers-color-scheme:dark){{text{{fill:#eee}}.note{{fill:#aaa}}.ground{{fill:#16181c}}{dark}}}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 8}" width="{WIDTH}" height="{y + 8}" role="img">'
        f'<title>{escape(title)}</title><style>{style}</style><rect class="ground" width="100%" height="100%"/>{"".join(parts)}</svg>\n'
    )


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(text)}</text>'
