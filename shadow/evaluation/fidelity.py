"""Is the simulation true to life? A question of days, where the edge takes months.

Three answers: does a recording, folded again, give what the worker said live; does the simulated
account fill at production's real prices; does the market still look like the one in training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import duckdb
import msgspec
import numpy as np

from rlv3.features import CLIP, FEATURES, MARKET
from rlv3.policy import QUANTILE_LEVELS, Policy, shipped_policy
from shadow.evaluation.batches import Floats
from shadow.evaluation.effect import Range
from shadow.evaluation.measures import SEED
from shadow.evaluation.replayed import Replayed
from shadow.statistics.agreement import psi
from shadow.statistics.inference import bootstrap_length, bootstrap_means, estimate, interval, mean

_EDGES = (0.1, 0.25, 0.5, 0.75, 0.9)
"""Quantiles of training between the cells of a drift index."""
_LEAST_CLOSES = 8
_DRAWS = 499
_HOUR_US = 3_600_000_000


class Bias(msgspec.Struct, frozen=True):
    """Real closes against what the simulator would have paid at the same moment."""

    closes: int
    """With an exit price, inside a bar of the report."""
    bps: Range
    """Of the traded amount; above 0 the simulator is too kind."""


class FeatureDrift(msgspec.Struct, frozen=True):
    """One feature of the policy, live against training."""

    feature: str
    n: int
    """Bars in which it was known."""
    psi: Range


class Fidelity(msgspec.Struct, frozen=True):
    """Is the simulation true to life?"""

    replay: Replayed | None
    """Null: no recording was audited into this store."""
    bias: Bias
    drift: tuple[FeatureDrift, ...]
    """Largest first; empty where the artifact is not in the store."""
    drift_missing: str
    """Why there is none; empty otherwise."""


def examine(
    db: duckdb.DuckDBPyConnection,
    *,
    step_us: int,
    slippage_bps: float,
    policy: Policy | None,
    replay: Replayed | None,
) -> Fidelity:
    """Compare the simulation of a scope with what else is known.

    Args:
        db: the cursor on which `Bars.load` ran.
        slippage_bps: what the simulated v2 paid on average, beside fees, bps of its turnover.
        policy: the artifact that decided.
    """
    drift = () if policy is None else tuple(_drift(db, policy))
    return Fidelity(
        replay=replay,
        bias=_bias(db, step_us, slippage_bps),
        drift=tuple(sorted(drift, key=lambda item: -(item.psi.value or 0.0))),
        drift_missing="" if drift else "no bar" if policy else "the artifact is not in the store",
    )


def find_policy(store: Path | None, digest: str | None) -> Policy | None:
    """Return the artifact with this digest from the store, or the one that ships; None else.

    Raises:
        PolicyError: the store's copy is damaged.
    """
    places = [shipped_policy()]
    if store is not None:
        places.insert(0, store / "artifacts" / f"{digest}.safetensors")
    for path in places:
        if path.is_file() and (policy := Policy.load(path)).digest == digest:
            return policy
    return None


def _bias(db: duckdb.DuckDBPyConnection, step_us: int, slippage_bps: float) -> Bias:
    """Compare exit prices with the simulated fill, at a price between the bar's open and close."""
    rows = db.execute(
        """
        SELECT closed_side, exit_price,
               open + (close - open) * (outcome.event_ts_us - bar.event_ts_us + $1) / $1 AS price
        FROM scoped_outcomes AS outcome
        ASOF JOIN (SELECT symbol, event_ts_us, open, close FROM scoped_bars) AS bar
        ON outcome.symbol = bar.symbol AND outcome.event_ts_us <= bar.event_ts_us
        WHERE exit_price > 0 AND closed_side <> 0 AND outcome.event_ts_us > bar.event_ts_us - $1
        ORDER BY outcome.event_ts_us, outcome.symbol, outcome.record_id
        """,
        [step_us],
    ).fetchnumpy()
    side = np.asarray(rows["closed_side"], np.float64)
    price, paid = (np.asarray(rows[name], np.float64) for name in ("price", "exit_price"))
    kind = 1e4 * side * (price - paid) / price - slippage_bps if len(side) else side
    return Bias(len(side), _with_interval(kind))


def _with_interval(values: Floats) -> Range:
    if not len(values):
        return Range(None)
    if len(values) < _LEAST_CLOSES:
        return Range(float(values.mean()))
    return Range(*estimate(values, mean, rng=np.random.default_rng(SEED)))


def _drift(db: duckdb.DuckDBPyConnection, policy: Policy) -> list[FeatureDrift]:
    """Return the drift index of every market feature whose training quantiles differ."""
    quantiles: Mapping[str, Sequence[float]] = policy.metadata["quantiles"]
    columns = ", ".join(f"obs[{i + 1}]::FLOAT AS f{i}" for i in MARKET)
    data = db.execute(
        f"""
        SELECT event_ts_us // {_HOUR_US} AS hour, missing_mask, {columns} FROM scoped_bars
        WHERE len(obs) > 0 AND warm ORDER BY event_ts_us, symbol
        """
    ).fetchnumpy()
    missing = np.asarray(data["missing_mask"], np.int64)
    if not len(missing):
        return []
    _, hour = np.unique(np.asarray(data["hour"]), return_inverse=True)
    found = []
    levels = [QUANTILE_LEVELS.index(level) for level in _EDGES]
    for i in MARKET:
        name = FEATURES[i].name
        if name not in quantiles:
            continue
        raw = np.asarray(quantiles[name])[levels]
        edges = np.clip((raw - policy.normaliser.mean[i]) / policy.normaliser.scale[i], -CLIP, CLIP)
        known = (missing >> i) & 1 == 0
        if len(np.unique(edges)) < len(edges) or not known.any():
            continue
        values = np.asarray(data[f"f{i}"], np.float64)[known]
        cells = hour[known] * (len(edges) + 1) + np.searchsorted(edges, values)
        counts = np.bincount(cells, minlength=(hour.max() + 1) * (len(edges) + 1))
        found.append(FeatureDrift(name, len(values), _index(counts.reshape(-1, len(edges) + 1))))
    return found


def _index(counts: np.ndarray) -> Range:
    """Return the index of hourly counts against training, hours resampled in blocks."""
    shares = np.diff([0.0, *_EDGES, 1.0])
    expected = shares * 1e9  # training is taken as known
    total = counts.sum(axis=0).astype(np.float64)
    value = psi(expected, total)
    if len(counts) < _LEAST_CLOSES:
        return Range(value)
    rng = np.random.default_rng(SEED)
    length = bootstrap_length(*counts.T.astype(np.float64))
    draws = bootstrap_means(counts, length, _DRAWS, rng) * len(counts)
    return Range(*interval(value, [psi(expected, row) for row in draws]))
