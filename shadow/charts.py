"""How does a curve become a picture that needs no script, no font and no network?

Pure functions from numbers to SVG text. Colours, dashes and text sizes come from the page's style
sheet by class (`arm-v3` …), so that light, dark and print need no second drawing; every arm also
has a marker of its own shape, so that nothing depends on colour.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from html import escape
from typing import NamedTuple

WIDTH = 760
LEFT, RIGHT, TOP, BOTTOM = 74, 12, 10, 26
"""Margins around the plot, in user units."""
MARKERS = 7
"""Markers along a line."""
_DAY = 86_400
_STEPS_S = (
    60, 120, 300, 600, 900, 1800, 3600, 7200, 10_800, 21_600, 43_200, _DAY, 2 * _DAY, 7 * _DAY,
    14 * _DAY, 28 * _DAY, 91 * _DAY, 364 * _DAY,
)  # fmt: skip

Points = list[tuple[float, float]]


class Line(NamedTuple):
    """One curve; the lists have one element per time."""

    key: str
    """Selects colour, dash and marker: v3, v2, follow_signal, flat or difference."""
    last: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def line_chart(
    times_us: Sequence[int],
    lines: Sequence[Line],
    *,
    title: str,
    height: int,
    text: Callable[[float, float], str],
) -> str:
    """Draw curves over time as one SVG element.

    Args:
        times_us: ascending epoch microseconds, at least one.
        lines: drawn in this order, the last on top; `low` and `high` are shaded where they differ.
        title: what a screen reader says.
        text: (value, step between labels) -> label of the value axis.
    """
    low = min(min(line.low) for line in lines)
    high = max(max(line.high) for line in lines)
    ticks, step = value_ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    start, span_us = times_us[0], max(times_us[-1] - times_us[0], 1)
    inner_width, inner_height = WIDTH - LEFT - RIGHT, height - TOP - BOTTOM

    def x(ts_us: int) -> float:
        return LEFT + inner_width * (ts_us - start) / span_us

    def y(value: float) -> float:
        return TOP + inner_height * (high - value) / (high - low)

    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">']
    for value in ticks:
        at, kind = y(value), "zero" if value == 0.0 else "grid"
        parts.append(
            f'<path class="{kind}" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>'
            f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{text(value, step)}</text>'
        )
    for ts_us, label in time_ticks(times_us[0], times_us[-1]):
        at = x(ts_us)
        parts.append(
            f'<path class="grid" d="M{at:.1f} {TOP}V{height - BOTTOM}"/>'
            f'<text x="{at:.1f}" y="{height - 8}" text-anchor="{_anchor(at)}">{label}</text>'
        )
    xs = [x(ts_us) for ts_us in times_us]
    for number, line in enumerate(lines):
        parts.append(_band(xs, line, y))
        points = [(at, y(value)) for at, value in zip(xs, line.last, strict=True)]
        parts.append(f'<path class="line arm-{line.key}" d="{_path(points)}"/>')
        parts += [marker(line.key, *point) for point in _spread(points, number / len(lines))]
    parts.append("</svg>")
    return "".join(parts)


def swatch(key: str) -> str:
    """Draw the legend's sample of an arm: its dash and its marker."""
    return (
        '<svg class="swatch" viewBox="0 0 40 12" aria-hidden="true">'
        f'<path class="line arm-{key}" d="M1 6H39"/>{marker(key, 20, 6)}</svg>'
    )


def bar(share: float, key: str) -> str:
    """Draw a share of 1 as a bar inside a table cell."""
    return (
        '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="fill-{key}" width="{100 * share:.1f}" height="10"/></svg>'
    )


def marker(key: str, x: float, y: float) -> str:
    """Draw an arm's marker: circle, square, triangle; the flat arm has none."""
    match key:
        case "v3" | "difference":
            return f'<circle class="fill-{key}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>'
        case "v2":
            return (
                f'<rect class="fill-{key}" x="{x - 3.2:.1f}" y="{y - 3.2:.1f}" '
                'width="6.4" height="6.4"/>'
            )
        case "follow_signal":
            return f'<path class="fill-{key}" d="M{x - 4:.1f} {y + 3.5:.1f}h8l-4 -7.5z"/>'
        case _:
            return ""


def value_ticks(low: float, high: float) -> tuple[list[float], float]:
    """Return about five round values from at or below `low` to at or above `high`, and their step.

    Equal bounds get room on both sides.
    """
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-9):
        room = abs(high) * 1e-3 or 1.0
        low, high = low - room, high + room
    rough = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)], step


def time_ticks(start_us: int, end_us: int) -> list[tuple[int, str]]:
    """Return at most nine round UTC times within the bounds, with labels."""
    start, end = start_us / 1e6, end_us / 1e6
    step = next((s for s in _STEPS_S if (end - start) / s <= 8), _STEPS_S[-1])
    found = range(math.ceil(start / step), math.floor(end / step) + 1)
    if step >= _DAY:
        return [(n * step * 1_000_000, f"{_utc(n * step):%Y-%m-%d}") for n in found]
    ticks = []
    for place, n in enumerate(found):
        at = n * step
        named = place == 0 or at % _DAY == 0
        ticks.append((at * 1_000_000, f"{_utc(at):%m-%d %H:%M}" if named else f"{_utc(at):%H:%M}"))
    return ticks


def _utc(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _anchor(x: float) -> str:
    if x < LEFT + 30:
        return "start"
    return "end" if x > WIDTH - RIGHT - 30 else "middle"


def _path(points: Points) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _band(xs: Sequence[float], line: Line, y: Callable[[float], float]) -> str:
    if all(low == high for low, high in zip(line.low, line.high, strict=True)):
        return ""
    upper = [(at, y(value)) for at, value in zip(xs, line.high, strict=True)]
    lower = [(at, y(value)) for at, value in zip(xs, line.low, strict=True)]
    return f'<path class="band fill-{line.key}" d="{_path(upper + lower[::-1])}Z"/>'


def _spread(points: Points, shift: float) -> Points:
    """Return a few points along a line; lines get different ones, so markers do not hide others."""
    count = min(MARKERS, len(points))
    return [points[int((place + shift) * len(points) / count)] for place in range(count)]
