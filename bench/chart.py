"""The chart: a bar for each ratio against the best qemu-storage-daemon, on a logarithmic scale, as an SVG of text.

Above 1, to the right of the line, Fleecer is better. A whisker goes from the worst round to the best; a tick shows the
aim. Bars whose rounds are on both sides of the aim are pale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.sax.saxutils import escape

from bench.figures import Row

BYTES_MAX = 100_000
ROWS_MAX = 150
"""More would make the chart larger than `BYTES_MAX`; those after are left out, and the chart says so."""

_LOW, _HIGH = 1 / 4, 16.0
_LABEL_WIDTH, _PLOT_WIDTH, _ROW_HEIGHT, _TOP = 380, 420, 18, 46
_COLOURS = {"met": "#2a7f3f", "better": "#2a7f3f", "missed": "#b3402a", "worse": "#b3402a", "unclear": "#b9b9b9"}


def position(ratio: float) -> float:
    """Where a ratio is drawn, in pixels from the left; ratios beyond the scale are drawn at its end."""
    inside = min(max(ratio, _LOW), _HIGH)
    return _LABEL_WIDTH + _PLOT_WIDTH * math.log(inside / _LOW) / math.log(_HIGH / _LOW)


def svg(rows: Sequence[Row], title: str) -> str:
    """The chart of those rows that have a ratio against a qemu-storage-daemon. At most `BYTES_MAX` bytes of ASCII."""
    drawn = [row for row in rows if row.ratio is not None and row.against == "qsd"]
    left_out = len(drawn) - ROWS_MAX
    drawn = drawn[:ROWS_MAX]
    height = _TOP + _ROW_HEIGHT * len(drawn) + 24
    bottom = height - 20
    width = _LABEL_WIDTH + _PLOT_WIDTH + 60
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
            'font-family="sans-serif" font-size="11">'
        ),
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text x="8" y="16" font-size="13">{_text(title)}</text>',
    ]
    tick = _LOW
    while tick <= _HIGH:
        x = position(tick)
        colour = "#444" if tick == 1 else "#ddd"
        parts.append(f'<path d="M{x:.0f} {_TOP - 6}V{bottom}" stroke="{colour}"/>')
        parts.append(f'<text x="{x:.0f}" y="{_TOP - 10}" text-anchor="middle" fill="#555">{tick:g}x</text>')
        tick *= 2
    for index, row in enumerate(drawn):
        parts += _bar(row, _TOP + _ROW_HEIGHT * index)
    if left_out > 0:
        parts.append(f'<text x="8" y="{height - 6}">{left_out} more ratios are in the table.</text>')
    parts.append("</svg>\n")
    return "\n".join(parts)


def _bar(row: Row, top: int) -> list[str]:
    if row.ratio is None:
        return []
    middle = top + _ROW_HEIGHT / 2
    one, end = position(1.0), position(row.ratio.median)
    low, high = position(row.ratio.low), position(row.ratio.high)
    left, width = min(one, end), abs(end - one)
    label = f"{row.cell} {row.measure.name}"
    parts = [
        f'<text x="{_LABEL_WIDTH - 8}" y="{middle + 4:.0f}" text-anchor="end">{_text(label[:64])}</text>',
        (
            f'<rect x="{left:.1f}" y="{top + 4}" width="{width:.1f}" height="{_ROW_HEIGHT - 8}" '
            f'fill="{_COLOURS.get(row.verdict, "#888")}"/>'
        ),
        f'<path d="M{low:.1f} {middle:.0f}H{high:.1f}" stroke="#000"/>',
        f'<text x="{_LABEL_WIDTH + _PLOT_WIDTH + 8}" y="{middle + 4:.0f}">{row.ratio.median:.2f}x</text>',
    ]
    if row.aim is not None:
        x = position(row.aim)
        parts.append(f'<path d="M{x:.1f} {top + 1}V{top + _ROW_HEIGHT - 1}" stroke="#06c" stroke-width="2"/>')
    return parts


def _text(text: str) -> str:
    return escape(text.encode("ascii", "replace").decode())
