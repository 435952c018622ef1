"""How does a run look? Learning curve, equity and importances as PNG or SVG, by the file's suffix.

Matplotlib comes with the extra `train`; nothing here needs or opens a display.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.dates import ConciseDateFormatter
from matplotlib.figure import Figure

from rlv3.errors import ConfigError
from rlv3.features import US

if TYPE_CHECKING:
    from rlv3.evaluation import Curve

SUFFIXES = (".png", ".svg")
POINTS = 4_000  # of a drawn line: more than a screen is wide
_STYLE: dict[Any, Any] = {
    "axes.grid": True, "axes.spines.right": False, "axes.spines.top": False, "font.size": 9,
    "grid.alpha": 0.3, "legend.frameon": False, "lines.linewidth": 1.2, "svg.hashsalt": "rlv3",
}  # fmt: skip


def check_suffix(path: Path) -> None:
    """Refuse a file that is neither PNG nor SVG, before anything is computed for it.

    Raises:
        ConfigError: another suffix.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"expected a plot file ending in .png or .svg, found {path.name}")


def learning_curve(path: Path, rows: Sequence[Mapping[str, float | None]]) -> None:
    """Draw what `metrics.csv` holds: return, validation score, entropy, explained variance, KL."""
    panels = (
        ("return per episode", ("mean_return",), "-"),
        ("validation score", ("validation",), "o-"),
        ("entropy", ("entropy",), "-"),
        ("explained variance", ("explained_variance",), "-"),
        ("approx. KL, clip fraction", ("approx_kl", "clip_fraction"), "-"),
        ("steps/s", ("steps_per_s",), "-"),
    )
    with rc_context(_STYLE):
        figure = Figure(figsize=(10, 8), layout="constrained")
        axes = figure.subplots(3, 2, sharex=True)
        for ax, (title, names, style) in zip(axes.flat, panels, strict=True):
            ax.set_title(title, loc="left")
            for name in names:
                known = [(row["steps"], row[name]) for row in rows if row[name] is not None]
                if known:
                    ax.plot(*zip(*known, strict=True), style, markersize=3, label=name)
            if len(names) > 1:
                ax.legend()
        for ax in axes[-1]:
            ax.set_xlabel("environment steps")
        _save(figure, path)


def equity(path: Path, lines: Mapping[str, Sequence[Curve]]) -> None:
    """Draw profit, drawdown and the price below it.

    Args:
        lines: per name, curves whose accounts are added up; the first name's exposure is drawn.
    """
    from rlv3.evaluation import portfolio_equity

    with rc_context(_STYLE):
        figure = Figure(figsize=(10, 8), layout="constrained")
        top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1.5))
        for i, (name, curves) in enumerate(lines.items()):
            times, money = portfolio_equity(curves)
            x = _moments(times)
            style = {"color": f"C{i}", "alpha": 1.0 if i == 0 else 0.7}
            _line(top, x, (money / money[0] - 1.0) * 100.0, label=name, **style)
            fall = (money / np.maximum.accumulate(money) - 1.0) * 100.0
            _line(middle, x, fall, **style)
        first = next(iter(lines.values()))
        for curve in first:
            x = _moments(curve.time_us)
            _line(bottom, x, curve.price / curve.price[0], label=curve.symbol)
        top.set_ylabel("profit, % of capital")
        top.legend(loc="best")
        middle.set_ylabel("drawdown, %")
        bottom.set_ylabel("price, 1 at the start")
        if 1 < len(first) <= 8:
            bottom.legend(loc="best")
        if _is_time(first[0]):
            locator = bottom.xaxis.get_major_locator()
            bottom.xaxis.set_major_formatter(ConciseDateFormatter(locator, tz=UTC))  # type: ignore[no-untyped-call]
        _save(figure, path)


def importances(path: Path, shares: Mapping[str, float]) -> None:
    """Draw how much each hyperparameter matters for the score."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(7, 1.5 + 0.35 * len(shares)), layout="constrained")
        ax = figure.subplots()
        names = list(shares)[::-1]
        bars = ax.barh(names, [shares[name] for name in names], color="C0")
        ax.bar_label(bars, fmt="%.2f", padding=3)
        ax.set_xlabel("importance for the validation score (PED-ANOVA, they add up to 1)")
        _save(figure, path)


def _is_time(curve: Curve) -> bool:
    return bool(curve.time_us[0] > 10**12)  # else step numbers


def _moments(times: Any) -> Any:
    """Return microseconds as dates, and step numbers as they are."""
    if len(times) == 0 or times[0] <= 10**12:
        return times
    return np.array([datetime.fromtimestamp(t / US, UTC) for t in times.tolist()])


def _line(ax: Axes, x: Any, y: Any, **style: Any) -> None:
    """Draw a line of at most `POINTS` points: the lowest and the highest of every stretch."""
    if len(y) > POINTS:
        pieces = np.array_split(np.arange(len(y)), POINTS // 2)
        ends = [sorted({int(p[y[p].argmin()]), int(p[y[p].argmax()])}) for p in pieces]
        keep = [0, *(i for pair in ends for i in pair), len(y) - 1]
        x, y = x[keep], y[keep]
    ax.plot(x, y, **style)


def _save(figure: Figure, path: Path) -> None:
    check_suffix(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    stamp = {"Date": None} if path.suffix == ".svg" else None  # the same figures, the same bytes
    figure.savefig(part, format=path.suffix[1:], dpi=120, metadata=stamp)
    part.replace(path)
