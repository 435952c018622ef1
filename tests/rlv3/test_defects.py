"""The defects of the system this one replaces, S1 to S16: each has a test that fails if it returns.

What they were stands above each test. Several have more tests where their module is tested.
"""

from __future__ import annotations

import inspect
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from rlv3.agent import PPOAgent
from rlv3.audit import audit_reward
from rlv3.checkpoint import import_checkpoint
from rlv3.config import RLv3Config
from rlv3.env import TradingEnvV3
from rlv3.errors import DataError, PolicyError
from rlv3.events import Action
from rlv3.features import (
    FEATURES,
    MARKET,
    N_FEATURES,
    WARM_BARS,
    Normaliser,
    build_feature_vector,
    feature_matrix,
)
from rlv3.manager import RLv3Manager
from rlv3.market import Bars, bars_from_closes, simulate
from rlv3.policy import Policy, shipped_policy
from rlv3.trainer import PPOTrainer


def after_warm_up(*prices: float, config: RLv3Config | None = None) -> TradingEnvV3:
    """Return an environment whose steps fill at the given prices, the first one at 100."""
    bars = bars_from_closes([100.0] * WARM_BARS + list(prices))
    bars = bars._replace(open=np.array([100.0] * WARM_BARS + list(prices)))
    env = TradingEnvV3(config, bars, random_start=False)
    env.reset(seed=0)
    return env


# S1: every step added the profit since entry again


def test_s1_profit_is_booked_once() -> None:
    env = after_warm_up(100.0, *[101.0] * 102)
    env.step(int(Action.LONG))  # 10 units at 100, 0.5 of costs
    for _ in range(100):
        _, _, _, _, info = env.step(int(Action.HOLD))
    assert info["equity"] == pytest.approx(10_000.0 - 0.5 + 10.0, abs=1e-9)


# S2: HOLD earned 1.6 a step


def test_s2_doing_nothing_is_worth_nothing() -> None:
    env = TradingEnvV3(RLv3Config(max_steps_per_episode=300))
    env.reset(seed=0)
    assert [env.step(int(Action.HOLD))[1] for _ in range(300)] == [0.0] * 300
    series = [simulate("regime_switching", 300, seed=1)]
    assert audit_reward(series, RLv3Config()).sane
    assert not audit_reward(series, RLv3Config(reward="seed")).sane  # kept, and found out


# S3: one closed trade of +0.7 % paid 6.6 on every later step


@pytest.mark.parametrize(("reward", "later"), [("net_return", 0.0), ("seed", 0.1)])
def test_s3_a_target_that_was_met_pays_nothing_later(reward: str, later: float) -> None:
    env = after_warm_up(100.0, *[100.8] * 60, config=RLv3Config(reward=reward))
    env.step(int(Action.LONG))
    env.step(int(Action.CLOSE))
    assert [env.step(int(Action.HOLD))[1] for _ in range(50)] == pytest.approx(
        [later] * 50, abs=1e-6
    )


# S4: leaving a position was free


@pytest.mark.parametrize(
    ("action", "notional"),
    [(Action.REDUCE, 500.0), (Action.CLOSE, 1_000.0), (Action.EMERGENCY_FLATTEN, 1_000.0)],
)
def test_s4_every_fill_costs_fee_and_half_spread(action: Action, notional: float) -> None:
    env = after_warm_up(*[100.0] * 5)
    env.step(int(Action.LONG))
    before = env.account.equity
    env.step(int(action))
    assert env.account.fees_paid == pytest.approx((1_000.0 + notional) * 4e-4)
    assert env.account.slippage_paid == pytest.approx((1_000.0 + notional) * 1e-4)
    assert env.account.equity == pytest.approx(before - notional * 5e-4)


# S5: reset returned the observation alone, step four values, without seed or options


def test_s5_the_interface_is_gymnasiums() -> None:
    env = TradingEnvV3()
    assert isinstance(env, gym.Env)
    assert list(inspect.signature(env.reset).parameters) == ["seed", "options"]
    obs, info = env.reset(seed=1, options={})
    assert env.observation_space.contains(obs)
    assert isinstance(info, dict)
    obs, reward, terminated, truncated, info = env.step(int(Action.HOLD))
    assert [type(x) for x in (reward, terminated, truncated)] == [float, bool, bool]


# S6: every series began with np.random.seed(None)


def test_s6_a_series_follows_its_seed_and_touches_no_global_state() -> None:
    before = np.random.get_state()[1].tolist()  # noqa: NPY002 (it must not move)
    assert simulate("momentum", 200, seed=5).sha256() == simulate("momentum", 200, seed=5).sha256()
    first, second = TradingEnvV3(), TradingEnvV3()
    assert np.array_equal(first.reset(seed=5)[0], second.reset(seed=5)[0])
    assert np.array_equal(first.reset()[0], second.reset()[0])
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002


# S7: 9 of 64 inputs varied in training


def test_s7_every_feature_varies_in_training() -> None:
    bars = [simulate(world, 700, seed=1) for world in ("regime_switching", "planted_signal")]
    env = TradingEnvV3(RLv3Config(max_steps_per_episode=600), bars, normaliser=None)
    rng = np.random.default_rng(0)
    rows = []
    for seed in range(4):
        obs, info = env.reset(seed=seed)
        for _ in range(400):
            obs, _, _, _, info = env.step(int(rng.choice(np.flatnonzero(info["action_mask"]))))
            rows.append(obs)
    varies = np.std(rows, axis=0) > 0.0
    assert [f.name for f, v in zip(FEATURES, varies[:N_FEATURES], strict=True) if not v] == []
    assert not varies[N_FEATURES:].any()


# S8: live features had other names, units and sizes than those of training


def test_s8_the_live_dictionary_gives_the_observation_of_training() -> None:
    bars = simulate("planted_signal", 200, seed=3)
    env = TradingEnvV3(price_data=bars, random_start=False)
    env.reset(seed=0)
    env.step(int(Action.LONG))
    obs, *_ = env.step(int(Action.HOLD))
    t, account = env.row, env.account
    raw, _ = feature_matrix(bars.end_us, bars.close, bars.volume, bars.spread)
    regimes = ("TREND", "RANGE", "BREAKOUT", "MEAN_REVERSION")
    live = {
        "price_change_1m": raw[t, 0], "price_change_5m": raw[t, 1], "price_change_15m": raw[t, 2],
        "volatility": raw[t, 3], "rsi": 100.0 * raw[t, 4], "macd": raw[t, 5] * bars.close[t],
        "price": bars.close[t], "position_size": abs(account.quantity) * account.mark
        / account.equity, "position_side": 1, "equity": account.equity, "balance": account.balance,
        "regime": regimes[int(np.argmax(raw[t, 10:14]))], "trend_strength": raw[t, 14],
        "volume_ratio": raw[t, 15], "bid_ask_spread": raw[t, 16], "hour_of_day": raw[t, 17] * 24.0,
    }  # fmt: skip
    assert build_feature_vector(live) == pytest.approx(obs, rel=1e-6, abs=1e-9)
    renamed = live | {"spread": live["bid_ask_spread"], "time_of_day": raw[t, 17]}
    del renamed["bid_ask_spread"], renamed["hour_of_day"]
    assert build_feature_vector(renamed) == pytest.approx(obs, rel=1e-6, abs=1e-9)


# S9: nothing was normalised; position_size entered as 1,000


def test_s9_what_the_network_sees_is_of_order_one() -> None:
    bars = simulate("regime_switching", 600, seed=2)._replace(
        open=simulate("regime_switching", 600, seed=2).open * 400.0,
        close=simulate("regime_switching", 600, seed=2).close * 400.0,
    )
    raw, missing = feature_matrix(bars.end_us, bars.close, bars.volume, bars.spread)
    env = TradingEnvV3(
        RLv3Config(initial_balance=1e6), bars, normaliser=Normaliser.fit(raw, missing)
    )
    obs, info = env.reset(seed=0)
    rng = np.random.default_rng(1)
    seen = []
    for _ in range(400):
        obs, _, _, _, info = env.step(int(rng.choice(np.flatnonzero(info["action_mask"]))))
        seen.append(obs)
    rows = np.array(seen)
    assert np.abs(rows).max() <= 5.0
    assert 0.05 < rows[:, 6].max() < 0.2  # a tenth of equity
    known = [i for i in MARKET if FEATURES[i].name not in ("spread", "time_of_day")]
    assert (np.abs(rows[:, known].mean(axis=0)) < 1.5).all()
    assert (rows[:, known].std(axis=0) > 0.2).all()


# S10: a gain of 0.01 on every policy layer


def test_s10_only_the_policys_head_begins_small() -> None:
    agent = PPOAgent()
    gains = [
        float(torch.linalg.svdvals(agent.policy.network[k].weight.detach()).mean())
        for k in (0, 2, 4)
    ]
    assert gains == pytest.approx([math.sqrt(2.0), math.sqrt(2.0), 0.01], rel=1e-4)


# S11: a time limit was taken for death


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_s11_a_time_limit_is_worth_what_would_have_followed(backend: str) -> None:
    config = RLv3Config(
        buffer_size=8, max_steps_per_episode=4, gamma=0.5, lambda_gae=1.0, backend=backend
    )
    agent = PPOAgent(config)
    with torch.no_grad():
        agent.value.network[4].weight.zero_()
        agent.value.network[4].bias.fill_(8.0)
        agent.policy.network[4].bias.copy_(torch.tensor([50.0, 0, 0, 0, 0, 0]))  # HOLD
    flat = bars_from_closes([100.0] * 200)
    returns = PPOTrainer(agent, TradingEnvV3(config, flat)).collect().returns
    # no reward anywhere: 8 is discounted from the step after the limit
    assert returns.tolist() == pytest.approx([0.5, 1.0, 2.0, 4.0] * 2)


# S12: replay was a constant, or the first 1,000 candles padded with invented ones


def test_s12_replay_reaches_every_row_and_invents_none(real_bars: Bars) -> None:
    bars = real_bars.rows(0, 5_000)
    env = TradingEnvV3(RLv3Config(max_steps_per_episode=50), bars)
    known = set(bars.open.tolist())
    starts = []
    for seed in range(60):
        _, info = env.reset(seed=seed)
        starts.append(env.row)
        for _ in range(5):
            assert info["price"] in known
            info = env.step(int(Action.HOLD))[4]
    assert min(starts) < 1_000
    assert max(starts) > 4_000
    with pytest.raises(DataError, match="expected at least 33 bars"):
        TradingEnvV3(price_data=bars.rows(0, 20))


# S13: loading a checkpoint ran the code in it


class Exploit:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


def test_s13_no_loader_runs_code(tmp_path: Path) -> None:
    trace = tmp_path / "it ran"
    pickled, checkpoint = tmp_path / "policy.safetensors", tmp_path / "ppo_model.pt"
    pickled.write_bytes(pickle.dumps(Exploit(trace)))
    torch.save({"policy_state_dict": Exploit(trace)}, checkpoint)
    for load, path in (
        (Policy.load, pickled), (RLv3Manager().load, pickled), (import_checkpoint, pickled),
        (import_checkpoint, checkpoint), (Policy.load, checkpoint),
    ):  # fmt: skip
        with pytest.raises(PolicyError) as caught:
            load(path)  # type: ignore[operator]
        assert str(path) in str(caught.value)
    assert not trace.exists()


# S14: "confidence" was |value| / 10


def test_s14_confidence_is_the_probability_of_the_action() -> None:
    found = Policy.load(shipped_policy()).predict({"price_change_1m": 0.002, "rsi": 70.0})
    assert found["confidence"] == found["action_probs"][found["action"]]
    assert sum(found["action_probs"]) == pytest.approx(1.0)
    assert found["confidence"] == max(found["action_probs"])


# S15: an "episode" of training was a buffer


def test_s15_an_episode_is_an_episode_and_speed_is_in_steps() -> None:
    config = RLv3Config(buffer_size=256, max_steps_per_episode=100, n_epochs=1)
    metrics = RLv3Manager(config).train(num_episodes=7, price_data=np.full(500, 100.0))
    # seven episodes of 100 steps end within three buffers of 256
    assert (metrics["steps"], metrics["episodes"]) == (768.0, 7.0)
    assert metrics["steps_per_s"] > 0.0


# S16: drawdown was measured from the initial balance


def test_s16_drawdown_is_measured_from_the_peak() -> None:
    env = after_warm_up(100.0, 120.0, 110.0, 110.0)
    env.step(int(Action.LONG))
    env.step(int(Action.HOLD))
    account = env.account
    assert account.equity > account.initial
    assert account.drawdown == pytest.approx(100.0 / (10_000.0 + 200.0 - 0.5))
