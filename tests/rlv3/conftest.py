"""Series that the tests of this package share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rlv3.market import Bars, read_bars, simulate

DATA = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.fixture(scope="session")
def real_bars() -> Bars:
    """Bitcoin, one-minute bars; where the file is not at hand, a seeded world of the same shape."""
    path = DATA / "btc_perp_1m.csv"
    if path.is_file():
        return read_bars(path)
    return simulate("regime_switching", 30_000, seed=1, symbol="BTCPERP", start_price=46_000.0)


@pytest.fixture(scope="session")
def gappy_bars() -> Bars:
    """A seeded series with every kind of hole: short gaps, long ones, unknown volume and spread."""
    bars = simulate("regime_switching", 3_000, seed=11)
    rng = np.random.default_rng(12)
    gaps = rng.choice([0, 1, 3, 60, 61, 200], size=3_000, p=[0.96, 0.02, 0.01, 0.005, 0.003, 0.002])
    gaps[:80] = 0
    volume = np.where(rng.random(3_000) < 0.1, np.nan, bars.volume)
    spread = np.where(rng.random(3_000) < 0.2, np.nan, rng.uniform(1e-4, 5e-4, 3_000))
    end_us = bars.end_us + np.cumsum(gaps) * 60_000_000
    return bars._replace(end_us=end_us, volume=volume, spread=spread)
