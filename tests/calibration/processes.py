"""Seven kinds of per-bar differences between two equal policies, as batch means.

Runs lie side by side in one array and bars are simulated one after the other, so that only batch
means are kept. Every process has mean 0, is symmetric, and has unit variance per innovation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

ALPHA, BETA = 0.08, 0.90  # GARCH(1, 1)
SWITCH, CALM, WILD = 1.0 / 600.0, 1.0, 4.0  # a regime lasts ten hours on average
ACTIVE = 0.01


class Bars(Protocol):
    """Continues every run by some bars."""

    def __call__(self, bars: int, rng: np.random.Generator) -> Floats: ...


def _t(dof: int, size: tuple[int, int], rng: np.random.Generator) -> Floats:
    return rng.standard_t(dof, size=size) * np.sqrt((dof - 2) / dof)


class Iid:
    """Student t with 3 degrees of freedom."""

    def __init__(self, runs: int) -> None:
        self.runs = runs

    def __call__(self, bars: int, rng: np.random.Generator) -> Floats:
        return _t(3, (bars, self.runs), rng)


class Garch:
    """GARCH(0.08, 0.90) with t4 innovations."""

    def __init__(self, runs: int) -> None:
        self.runs = runs
        self.variance = np.ones(runs)

    def __call__(self, bars: int, rng: np.random.Generator) -> Floats:
        shocks = _t(4, (bars, self.runs), rng)
        for shock in shocks:
            shock *= np.sqrt(self.variance)
            self.variance = (1.0 - ALPHA - BETA) + ALPHA * shock**2 + BETA * self.variance
        return shocks


class Linear:
    """y[t] = ar y[t-1] + e[t] + ma e[t-1], e GARCH."""

    def __init__(self, runs: int, ar: float = 0.0, ma: float = 0.0) -> None:
        self.shocks = Garch(runs)
        self.ar, self.ma = ar, ma
        self.last, self.last_shock = np.zeros(runs), np.zeros(runs)

    def __call__(self, bars: int, rng: np.random.Generator) -> Floats:
        shocks = self.shocks(bars, rng)
        values = np.empty_like(shocks)
        for shock, value in zip(shocks, values, strict=True):
            value[:] = self.ar * self.last + shock + self.ma * self.last_shock
            self.last, self.last_shock = value, shock
        return values


class Switching:
    """Normal, with a standard deviation that jumps between 1 and 4."""

    def __init__(self, runs: int) -> None:
        self.wild = np.arange(runs) % 2 == 1

    def __call__(self, bars: int, rng: np.random.Generator) -> Floats:
        flips = np.logical_xor.accumulate(rng.random((bars, len(self.wild))) < SWITCH, axis=0)
        wild = flips ^ self.wild
        self.wild = wild[-1]
        return rng.normal(size=wild.shape) * np.where(wild, WILD, CALM)


class Sparse:
    """Zero in 99 of 100 bars, t3 in the others."""

    def __init__(self, runs: int) -> None:
        self.runs = runs

    def __call__(self, bars: int, rng: np.random.Generator) -> Floats:
        active = rng.random((bars, self.runs)) < ACTIVE
        return np.where(active, _t(3, active.shape, rng), 0.0)


PROCESSES: Mapping[str, Callable[[int], Bars]] = {
    "iid t3": Iid,
    "GARCH t4": Garch,
    "AR(1) 0.2": lambda runs: Linear(runs, ar=0.2),
    "AR(1) 0.5": lambda runs: Linear(runs, ar=0.5),
    "MA(1) -0.3": lambda runs: Linear(runs, ma=-0.3),
    "volatility regimes": Switching,
    "99 % zeros": Sparse,
}


def simulate(process: Bars, batches: int, length: int, rng: np.random.Generator) -> Floats:
    """Return float64[runs, batches]: means of `length` bars, after ten batches that are dropped."""
    process(10 * length, rng)
    return np.stack([process(length, rng).mean(axis=0) for _ in range(batches)], axis=1)


class Trades(NamedTuple):
    """Profit per trade of two equal models, float64[runs, trades]."""

    champion: Floats
    challenger: Floats


def equal_models(
    runs: int, trades: int, rng: np.random.Generator, *, ar: float = 0.0, correlation: float = 0.0
) -> Trades:
    """Return trades with mean 5 and standard deviation 120, AR(1) within a model."""
    common, *own = (_ar(ar, (runs, trades), rng) for _ in range(3))
    shared, rest = np.sqrt(correlation), np.sqrt(1.0 - correlation)
    first, second = (5.0 + 120.0 * (shared * common + rest * alone) for alone in own)
    return Trades(first, second)


def _ar(ar: float, shape: tuple[int, int], rng: np.random.Generator) -> Floats:
    values = rng.normal(size=shape)
    values[:, 1:] *= np.sqrt(1.0 - ar**2)  # the first value is drawn from the stationary law
    for t in range(1, shape[1] if ar else 0):
        values[:, t] += ar * values[:, t - 1]
    return values
