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
    within: tuple[float, float] | None = None,
    quiet_until_us: int | None = None,
    marks_us: Sequence[int] = (),
) -> str:
    """Draw curves over time as one SVG element.

    Args:
        times_us: ascending epoch microseconds, at least one.
        lines: drawn in this order, the last on top; `low` and `high` are shaded where they differ.
        title: what a screen reader says.
        text: (value, step between labels) -> label of the value axis.
        within: values to show; what lies beyond is cut off. All of them for None.
        quiet_until_us: times before it are shaded: they carry no conclusion yet.
        marks_us: times with a vertical rule.
    """
    low = min(min(line.low) for line in lines) if within is None else within[0]
    high = max(max(line.high) for line in lines) if within is None else within[1]
    ticks, step = value_ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    start, span_us = times_us[0], max(times_us[-1] - times_us[0], 1)
    inner_width, inner_height = WIDTH - LEFT - RIGHT, height - TOP - BOTTOM

    def x(ts_us: int) -> float:
        return LEFT + inner_width * (ts_us - start) / span_us

    def y(value: float) -> float:
        inside = min(max(value, low), high)
        return TOP + inner_height * (high - inside) / (high - low)

    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">']
    if quiet_until_us is not None:
        width = min(max(x(quiet_until_us) - LEFT, 0.0), inner_width)
        parts.append(
            f'<rect class="early" x="{LEFT}" y="{TOP}" width="{width:.1f}" '
            f'height="{inner_height}"/>'
        )
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
    parts += [
        f'<path class="mark" d="M{x(ts_us):.1f} {TOP}V{height - BOTTOM}"/>' for ts_us in marks_us
    ]
    xs = [x(ts_us) for ts_us in times_us]
    for number, line in enumerate(lines):
        parts.append(_band(xs, line, y))
        points = [(at, y(value)) for at, value in zip(xs, line.last, strict=True)]
        parts.append(f'<path class="line arm-{line.key}" d="{_path(points)}"/>')
        parts += [marker(line.key, *point) for point in _spread(points, number / len(lines))]
    parts.append("</svg>")
    return "".join(parts)


def number_line(
    sequence: tuple[float, float, float],
    one_look: tuple[float, float, float] | None,
    *,
    margin: float,
    title: str,
) -> str:
    """Draw the effect on a line: confidence sequence thick, interval of one look thin, 0, margin.

    Args:
        sequence: value, lower and upper end; `one_look` too.
        margin: marked on both sides of 0.
    """
    ends = [*sequence[1:], *(one_look or ())[1:], 0.0, -margin, margin]
    ticks, step = value_ticks(min(ends), max(ends))
    low, high = ticks[0], ticks[-1]
    left, right, height = 20, 20, 96

    def x(value: float) -> float:
        return left + (WIDTH - left - right) * (value - low) / (high - low)

    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">']
    parts.append(f'<path class="grid" d="M{left} 66H{WIDTH - right}"/>')
    parts += [
        f'<path class="grid" d="M{x(value):.1f} 62v8"/><text x="{x(value):.1f}" y="86" '
        f'text-anchor="middle">{value:+.{places(step)}f}</text>'
        for value in ticks
    ]
    parts += [f'<path class="mark" d="M{x(value):.1f} 8V66"/>' for value in (-margin, margin)]
    parts.append(f'<path class="zero" d="M{x(0.0):.1f} 4V70"/>')
    kind = _side(sequence[1], sequence[2])
    parts.append(
        f'<path class="sequence {kind}" d="M{x(sequence[1]):.1f} 26H{x(sequence[2]):.1f}"/>'
        f'<circle class="point {kind}" cx="{x(sequence[0]):.1f}" cy="26" r="6.5"/>'
    )
    if one_look is not None:
        parts.append(
            f'<path class="thin" d="M{x(one_look[1]):.1f} 48H{x(one_look[2]):.1f}'
            f'M{x(one_look[1]):.1f} 43v10M{x(one_look[2]):.1f} 43v10"/>'
            f'<circle class="hollow" cx="{x(one_look[0]):.1f}" cy="48" r="4"/>'
        )
    parts.append("</svg>")
    return "".join(parts)


def interval_bar(
    value: float, low: float, high: float, reach: float, *, more_is_better: bool = True
) -> str:
    """Draw a value and its interval inside a table cell, on a scale from -reach to reach.

    What lies wholly above 0 points up, wholly below points down, else it is hollow; the colour
    says whether that is better.
    """
    reach = reach or 1.0

    def x(at: float) -> float:
        return 60.0 + 56.0 * min(max(at / reach, -1.0), 1.0)

    side, at = _side(low, high), x(value)
    kind = "open" if side == "open" else "above" if (side == "above") == more_is_better else "below"
    shape = {
        "above": f'<path class="point {kind}" d="M{at - 4:.1f} 11h8l-4 -8z"/>',
        "below": f'<path class="point {kind}" d="M{at - 4:.1f} 3h8l-4 8z"/>',
        "open": f'<circle class="hollow" cx="{at:.1f}" cy="7" r="3.2"/>',
    }[side]
    return (
        '<svg class="interval" viewBox="0 0 120 14" aria-hidden="true">'
        '<path class="zero" d="M60 0V14"/>'
        f'<path class="thin {kind}" d="M{x(low):.1f} 7H{x(high):.1f}"/>{shape}</svg>'
    )


def strip(times_us: Sequence[int], shares: Sequence[float], *, title: str) -> str:
    """Draw how complete something was over time: darker where more is missing."""
    inner = WIDTH - LEFT - RIGHT
    width = inner / max(len(shares), 1)
    parts = [f'<svg viewBox="0 0 {WIDTH} 46" role="img" aria-label="{escape(title)}">']
    parts.append(f'<rect class="whole" x="{LEFT}" y="4" width="{inner}" height="18"/>')
    for number, share in enumerate(shares):
        if share < 0.9995:
            opacity = 0.25 + 0.75 * (1.0 - share)
            parts.append(
                f'<rect class="missing" x="{LEFT + number * width:.1f}" y="4" '
                f'width="{max(width, 1.0):.1f}" height="18" opacity="{opacity:.2f}"/>'
            )
    span = max(times_us[-1] - times_us[0], 1) * len(times_us) / max(len(times_us) - 1, 1)
    for ts_us, label in time_ticks(times_us[0], times_us[-1]):
        at = LEFT + inner * (ts_us - times_us[0]) / span
        parts.append(f'<text x="{at:.1f}" y="40" text-anchor="{_anchor(at)}">{label}</text>')
    parts.append("</svg>")
    return "".join(parts)


class Bin(NamedTuple):
    """One point of a reliability diagram; all are shares of 1."""

    confidence: float
    share: float
    low: float
    """Where the share of a calibrated confidence may well lie."""
    high: float


def reliability(bins: Sequence[Bin], *, title: str) -> str:
    """Draw how often something came true against how sure it was said to be."""
    size, left, top = 340, 52, 10
    inner = size - left - top

    def x(share: float) -> float:
        return left + inner * share

    def y(share: float) -> float:
        return top + inner * (1.0 - share)

    parts = [
        f'<svg class="square" viewBox="0 0 {size} {size + 4}" role="img" '
        f'aria-label="{escape(title)}">'
    ]
    for tenth in range(0, 11, 2):
        at = tenth / 10
        parts.append(
            f'<path class="grid" d="M{x(at):.1f} {top}V{top + inner}M{left} {y(at):.1f}h{inner}"/>'
            f'<text x="{x(at):.1f}" y="{top + inner + 16}" text-anchor="middle">{at:.1f}</text>'
            f'<text x="{left - 6}" y="{y(at) + 4:.1f}" text-anchor="end">{at:.1f}</text>'
        )
    parts.append(f'<path class="mark" d="M{x(0.0)} {y(0.0)}L{x(1.0)} {y(1.0)}"/>')
    upper = [(x(item.confidence), y(item.high)) for item in bins]
    lower = [(x(item.confidence), y(item.low)) for item in bins]
    points = [(x(item.confidence), y(item.share)) for item in bins]
    parts.append(f'<path class="band fill-flat" d="{_path(upper + lower[::-1])}Z"/>')
    parts.append(f'<path class="line arm-v3" d="{_path(points)}"/>')
    parts += [f'<circle class="hollow" cx="{at:.1f}" cy="{up:.1f}" r="3"/>' for at, up in points]
    parts.append(
        f'<text x="{left + inner / 2:.0f}" y="{size}" text-anchor="middle">confidence</text></svg>'
    )
    return "".join(parts)


def _side(low: float, high: float) -> str:
    """Return on which side of 0 an interval lies."""
    return "above" if low > 0.0 else "below" if high < 0.0 else "open"


def places(step: float) -> int:
    """Return how many decimals tell neighbouring labels apart without rounding them."""
    return next((n for n in range(6) if abs(step - round(step, n)) < 1e-6 * step), 6)


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
