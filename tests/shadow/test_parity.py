"""What is trained is what is served: the environment and the fold see and earn the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from rlv3.config import RLv3Config
from rlv3.env import TradingEnvV3
from rlv3.features import feature_matrix
from rlv3.market import Bars, read_bars, simulate
from rlv3.policy import Policy
from shadow import history
from shadow.pipeline import Pipeline, Settings
from shadow.records import BarRow, decode_comparison

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "btc_perp_1m.csv"


def btc() -> Bars:
    bars = read_bars(DATA) if DATA.exists() else simulate("momentum", 4_000, seed=1)
    return cut(bars, slice(0, 4_000))


def cut(bars: Bars, rows: slice | np.ndarray) -> Bars:
    columns = {
        name: None if column is None else column[rows]
        for name, column in bars._asdict().items()
        if isinstance(column, np.ndarray) or column is None
    }
    return bars._replace(**columns)


def gapped() -> Bars:
    """Rows missing here and there, and twice for longer than the indicators survive."""
    bars = simulate("regime_switching", 3_000, seed=2)
    keep = np.random.default_rng(3).random(3_000) > 0.05
    keep[900:905] = False
    keep[1500:1600] = False
    keep[2200:2261] = False
    return cut(bars, keep)


@pytest.mark.parametrize("series", [btc, gapped])
def test_environment_and_fold_agree_step_by_step(
    make_policy: Callable[..., Policy], series: Callable[[], Bars]
) -> None:
    bars = series()
    policy = make_policy(4, 1.0)
    settings = Settings(latency_ms=0, rl_v2="off", max_event_age_s=None)
    pipeline = Pipeline(policy, None, settings, history.STREAMS)
    entries = list(history.entries([bars], signals=False))
    rows: list[BarRow] = []
    while entries:
        commit = pipeline.run(entries, now_ms=0.0)
        entries = entries[commit.taken :]
        for output in commit.outputs:
            if output.event_type == "rl_v3.comparison":
                row = decode_comparison(output.payload)
                if isinstance(row, BarRow):
                    rows.append(row)

    config = RLv3Config(max_steps_per_episode=len(bars.close))
    env = TradingEnvV3(config, price_data=bars, normaliser=policy.normaliser, random_start=False)
    obs, info = env.reset(seed=0)
    first = next(i for i, row in enumerate(rows) if row.warm)
    held = []
    for t in range(first, len(rows) - 1):
        assert tuple(obs.tolist()) == rows[t].obs, f"row {t}"
        actions, _, _ = policy.decide(obs[None], [info["action_mask"]])
        obs, _, terminated, truncated, info = env.step(int(actions[0]))
        account = env.account
        close = rows[t + 1].close
        equity = account.balance + account.quantity * (close - account.entry_price)
        assert equity == pytest.approx(rows[t + 1].arms["v3"].equity, rel=1e-12)
        held.append(account.quantity)
        assert not terminated
        if truncated:
            break
    assert t >= len(rows) - 3
    assert len(np.unique(np.sign(held))) > 1, "the policy never traded: nothing was compared"
    assert account.fees_paid > 0.0


def test_features_of_the_fold_equal_the_bulk_path(make_policy: Callable[..., Policy]) -> None:
    """The fold is fed with late and duplicate ticks as well; the bulk path never sees them."""
    bars = gapped()
    raw, missing = feature_matrix(bars.end_us, bars.close, bars.volume, bars.spread)
    policy = make_policy(0)
    expected = policy.normaliser.apply(raw, missing.tolist())
    pipeline = Pipeline(policy, None, Settings(rl_v2="off", max_event_age_s=None), history.STREAMS)
    entries = []
    ticks_per_bar = 6  # real highs and lows
    for entry in history.entries([bars], signals=False, ticks_per_bar=ticks_per_bar, seed=5):
        entries.append(entry)
        if len(entries) % 50 == 0:
            entries.append(replace(entry, entry_id=entry.entry_id + "1"))  # a duplicate
        if len(entries) % 70 == 0:
            old = entries[-30]
            late = old.fields[b"payload"].replace(b'"price": ', b'"price": 1')
            entries.append(
                replace(old, entry_id=entry.entry_id + "2", fields={**old.fields, b"payload": late})
            )
    rows = {}
    while entries:
        commit = pipeline.run(entries, now_ms=0.0)
        entries = entries[commit.taken :]
        for output in commit.outputs:
            if output.event_type == "rl_v3.comparison":
                row = decode_comparison(output.payload)
                if isinstance(row, BarRow):
                    rows[row.event_ts_us] = row
    assert pipeline.counts[("market.tick", "late")] > 20
    assert pipeline.counts[("market.tick", "duplicate")] > 20
    market = [i for i in range(18) if not 6 <= i <= 9]
    compared = 0
    for t, end_us in enumerate(bars.end_us.tolist()[:-1]):
        row = rows[end_us]
        assert row.missing_mask == missing[t]
        found = np.array(row.obs)[market]
        np.testing.assert_allclose(found, expected[t, market], atol=1e-6)
        compared += 1
    assert compared == len(bars.close) - 1
