"""What happened in an episode? Price with entries and exits, position, equity: one picture.

Matplotlib comes with the extra `train`; nothing here needs or opens a display.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

WIDTH, HEIGHT, DPI = 640, 480, 100
_STYLE: dict[Any, Any] = {
    "axes.grid": True, "axes.spines.right": False, "axes.spines.top": False, "font.size": 8,
    "grid.alpha": 0.3, "lines.linewidth": 1.0, "axes.formatter.useoffset": False,
}  # fmt: skip
_LONG, _SHORT, _FLAT = "#0072b2", "#d55e00", "#555555"  # told apart by all eyes


class Moment(NamedTuple):
    """The account at the start of one step."""

    price: float
    exposure: float
    """Signed notional as a fraction of equity."""
    equity: float


def episode_figure(moments: Sequence[Moment], title: str = "") -> Figure:
    """Return a figure of an episode so far: price and fills, exposure, equity."""
    price, exposure, equity = (np.array(column) for column in zip(*moments, strict=True))
    step = np.arange(len(moments))
    side = np.sign(exposure)
    turned = np.flatnonzero(np.diff(side)) + 1
    with rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI, layout="constrained")
        top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 2))
        top.plot(step, price, color=_FLAT)
        for value, marker, colour, name in (
            (1.0, "^", _LONG, "long"), (-1.0, "v", _SHORT, "short"), (0.0, "o", _FLAT, "flat"),
        ):  # fmt: skip
            at = turned[side[turned] == value]
            top.scatter(at, price[at], marker=marker, color=colour, s=16, label=name, zorder=3)
        top.legend(loc="upper left", ncols=3, frameon=False)
        top.set_title(title, loc="left")
        top.set_ylabel("price")
        for sign, colour in ((1.0, _LONG), (-1.0, _SHORT)):
            held = np.where(side == sign, exposure, 0.0)
            middle.fill_between(step, held, step="post", color=colour, linewidth=0)
        middle.set_ylabel("position")
        bottom.plot(step, equity, color=_LONG)
        bottom.set_ylabel("equity")
        bottom.set_xlabel("step")
    return figure


def rgb_array(figure: Figure) -> NDArray[np.uint8]:
    """Return the pixels of a figure, uint8[480, 640, 3]."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    pixels = np.asarray(canvas.buffer_rgba())  # type: ignore[no-untyped-call]
    return pixels[:, :, :3].copy()
