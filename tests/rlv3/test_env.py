"""The environment: Gymnasium's contract, fills by hand, starts and ends, live prices."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_env_sb3

from rlv3.config import RLv3Config
from rlv3.env import ENV_ID, PaddedEnv, TradingEnvV3, make_padded
from rlv3.errors import ConfigError, DataError
from rlv3.events import Action
from rlv3.features import WARM_BARS, Normaliser, feature_matrix
from rlv3.market import Bars, bars_from_closes, simulate

INFO = {
    "equity", "balance", "unrealized_pnl", "position_size", "position_side", "fees_paid", "price",
    "action_mask",
}  # fmt: skip


def quiet_then(*tail: tuple[float, float]) -> Bars:
    """Return bars at 100 that end in given (open, close) rows; row 30 is the first warm one."""
    closes = [100.0] * (WARM_BARS + 1) + [c for _, c in tail]
    opens = [100.0] * (WARM_BARS + 1) + [o for o, _ in tail]
    bars = bars_from_closes(closes)
    open_ = np.array(opens)
    return bars._replace(
        open=open_, high=np.maximum(open_, bars.close), low=np.minimum(open_, bars.close)
    )


def ordered(config: RLv3Config | None = None, **arguments: Any) -> TradingEnvV3:
    return TradingEnvV3(config, random_start=False, **arguments)


@pytest.mark.parametrize("normaliser", [None, Normaliser.identity()])
@pytest.mark.parametrize("reward", ["net_return", "seed"])
def test_environment_checker_finds_nothing(normaliser: Normaliser | None, reward: str) -> None:
    config = RLv3Config(reward=reward, max_steps_per_episode=50)
    check_env(TradingEnvV3(config, normaliser=normaliser))
    check_env(TradingEnvV3(config, simulate("momentum", 200, seed=0), normaliser=normaliser))


@pytest.mark.parametrize("reward", ["net_return", "seed"])
def test_stable_baselines_finds_nothing_either(reward: str) -> None:
    config = RLv3Config(reward=reward, max_steps_per_episode=50)
    normaliser = Normaliser.identity()
    for env in (
        TradingEnvV3(config, normaliser=normaliser),
        TradingEnvV3(config, simulate("momentum", 200, seed=0), normaliser=normaliser),
        TradingEnvV3(config),
    ):
        check_env_sb3(env)  # a warning is an error here


def test_an_episode_can_be_drawn() -> None:
    bars = quiet_then((102.0, 104.0), (106.0, 103.0), (99.0, 98.0))
    env = gym.make(
        ENV_ID, price_data=bars, random_start=False, render_mode="rgb_array"
    )  # what RecordVideo does
    check_env(env.unwrapped)
    env.reset(seed=0)
    frames = [env.render()]
    for action in (Action.LONG, Action.HOLD, Action.CLOSE):
        env.step(int(action))
        frames.append(env.render())
    for frame in frames:
        assert isinstance(frame, np.ndarray)
        assert (frame.shape, frame.dtype) == ((480, 640, 3), np.uint8)
    assert len({frame.tobytes() for frame in frames if isinstance(frame, np.ndarray)}) == 4
    env.close()
    with pytest.raises(ConfigError, match="render_mode must be None or rgb_array, was 'human'"):
        TradingEnvV3(render_mode="human")
    with pytest.warns(UserWarning, match="draws nothing without render_mode"):
        assert ordered(price_data=bars).render() is None


def test_environment_is_registered() -> None:
    env = gym.make(ENV_ID)
    assert isinstance(env.unwrapped, TradingEnvV3)
    check_env(env.unwrapped)
    env.close()


def test_a_long_trade_by_hand() -> None:
    # rows 30 and 31 are flat; then bars (open, close): 102 -> 104, 106 -> 103, 99 -> 98
    env = ordered(price_data=quiet_then((102.0, 104.0), (106.0, 103.0), (99.0, 98.0)))
    obs, info = env.reset(seed=0)
    assert set(info) == INFO
    assert info["price"] == 100.0  # open of row 31
    assert info["action_mask"].tolist() == [True, True, True, False, False, False]
    assert obs[:18].tolist()[:4] == [0.0, 0.0, 0.0, 0.0]
    # LONG fills at the open of row 31: 1,000 / 100 = 10 units, 0.4 fee, 0.1 half-spread;
    # the next step begins at the open of row 32: 102
    _, reward, terminated, truncated, info = env.step(int(Action.LONG))
    assert info["price"] == 102.0
    assert info["balance"] == pytest.approx(9_999.5, abs=1e-9)
    assert info["unrealized_pnl"] == pytest.approx(20.0, abs=1e-9)
    assert info["fees_paid"] == pytest.approx(0.4, abs=1e-12)
    assert reward == pytest.approx(math.log(10_019.5 / 10_000))
    assert (info["position_side"], terminated, truncated) == (1, False, False)
    assert info["position_size"] == pytest.approx(1_020 / 10_019.5)
    assert info["action_mask"].tolist() == [True, False, False, True, True, True]
    # REDUCE at 102: 5 units, profit 10, notional 510 -> fee 0.204, half-spread 0.051; then 106
    _, reward, _, _, info = env.step(int(Action.REDUCE))
    assert info["balance"] == pytest.approx(9_999.5 + 10 - 0.255, abs=1e-9)
    assert info["equity"] == pytest.approx(10_009.245 + 5 * 6, abs=1e-9)
    assert reward == pytest.approx(math.log(10_039.245 / 10_019.5))
    # CLOSE at 106: profit 30, notional 530 -> 0.265; flat, nothing moves until 99
    obs, _, terminated, truncated, info = env.step(int(Action.CLOSE))
    assert info["equity"] == info["balance"] == pytest.approx(10_038.98, abs=1e-9)
    assert (terminated, truncated) == (False, True)  # the bar after the next has no open
    assert obs[6:10].tolist() == [0.0, 0.0, 1.0, 0.0]
    assert env.account.max_drawdown > 0.0


def test_rewards_add_up_to_the_log_return_of_equity() -> None:
    env = TradingEnvV3(price_data=simulate("momentum", 1_500, seed=4))
    env.reset(seed=1)
    rng = np.random.default_rng(2)
    total, truncated = 0.0, False
    while not truncated:
        action = int(rng.choice(np.flatnonzero(env.action_masks())))
        _, reward, terminated, truncated, info = env.step(action)
        total += reward
        assert not terminated
    assert total == pytest.approx(math.log(info["equity"] / 10_000.0), abs=1e-9)


def test_observation_is_the_closed_row_and_never_later_data(gappy_bars: Bars) -> None:
    bars = gappy_bars.rows(0, 300)
    raw, missing = feature_matrix(bars.end_us, bars.close, bars.volume, bars.spread)
    normaliser = Normaliser.fit(raw, missing)
    env = ordered(price_data=bars, normaliser=normaliser)
    expected = normaliser.apply(raw, missing.tolist())
    later = ordered(
        price_data=bars._replace(close=np.where(np.arange(300) > 100, 1.0, bars.close)),
        normaliser=normaliser,
    )
    obs, _ = env.reset(seed=0)
    other, _ = later.reset(seed=0)
    for t in range(WARM_BARS - 1, 101):
        assert np.array_equal(obs, expected[t])
        assert np.array_equal(other, expected[t])
        obs, *_ = env.step(int(Action.HOLD))
        other, *_ = later.step(int(Action.HOLD))


def test_bars_with_quotes_pay_half_their_spread() -> None:
    bars = quiet_then((100.0, 100.0), (100.0, 100.0))
    spread = np.full(len(bars.close), np.nan)
    spread[5] = 0.004
    env = ordered(price_data=bars._replace(spread=spread))
    env.reset(seed=0)
    env.step(int(Action.LONG))
    # 1,000 of notional: 20 bp half-spread (the last quote stands), 4 bp fee
    assert env.account.slippage_paid == pytest.approx(2.0, abs=1e-9)
    assert env.account.fees_paid == pytest.approx(0.4, abs=1e-9)


def test_configured_costs_are_charged() -> None:
    config = RLv3Config(fee_bps=10.0, half_spread_bps=5.0)
    env = ordered(config, price_data=quiet_then((100.0, 100.0), (100.0, 100.0)))
    env.reset(seed=0)
    env.step(int(Action.SHORT))
    assert env.account.fees_paid == pytest.approx(1.0, abs=1e-9)
    assert env.account.slippage_paid == pytest.approx(0.5, abs=1e-9)


def test_ruin_terminates_and_is_not_a_time_limit() -> None:
    rows = [(100.0, 100.0), (1_000.0, 1_000.0), (1_000.0, 1_000.0), (1_000.0, 1_000.0)]
    env = ordered(price_data=quiet_then(*rows))
    env.reset(seed=0)
    env.step(int(Action.SHORT))
    _, reward, terminated, truncated, info = env.step(int(Action.HOLD))
    # 10 units lose 900 each: equity 999.5 of 10,000, below a fifth; closing costs 5 more
    assert (terminated, truncated) == (True, False)
    assert info["position_side"] == 0
    assert info["equity"] == pytest.approx(9_999.5 - 9_000 - 5.0, abs=1e-6)
    assert reward < -2.0


def test_time_limit_truncates() -> None:
    env = TradingEnvV3(RLv3Config(max_steps_per_episode=3))
    env.reset(seed=0)
    flags = [env.step(0)[2:4] for _ in range(3)]
    assert flags == [(False, False), (False, False), (False, True)]


def test_flatten_holds_for_fifteen_steps() -> None:
    env = ordered(price_data=quiet_then(*[(100.0, 100.0)] * 30))
    env.reset(seed=0)
    env.step(int(Action.LONG))
    env.step(int(Action.EMERGENCY_FLATTEN))
    for _ in range(15):
        assert env.action_masks().tolist() == [True] + [False] * 5
        env.step(int(Action.LONG))
        assert env.account.quantity == 0.0
    assert env.action_masks().tolist() == [True, True, True, False, False, False]


def test_nobody_enters_while_cold() -> None:
    closes = bars_from_closes([100.0 + k % 3 for k in range(200)])
    end_us = closes.end_us + np.where(np.arange(200) >= 100, 100 * 60_000_000, 0)
    config = RLv3Config(use_action_masks=False)
    env = ordered(config, price_data=closes._replace(end_us=end_us))
    env.reset(seed=0)
    cold = 0
    for _ in range(150):
        mask = env.action_masks().tolist()
        env.step(int(Action.LONG) if env.account.quantity == 0.0 else int(Action.CLOSE))
        if mask[1]:
            assert mask == [True] * 6
        else:
            assert env.account.quantity == 0.0
            cold += 1
    # when the row after the silence begins the indicators have restarted: 31 rows until warm
    assert cold == WARM_BARS


def test_random_starts_come_from_the_environments_own_generator() -> None:
    bars = simulate("random_walk", 5_000, seed=0)
    config = RLv3Config(max_steps_per_episode=100)
    first = TradingEnvV3(config, bars)
    second = TradingEnvV3(config, bars)
    prices = [first.reset(seed=5)[1]["price"]] + [first.reset()[1]["price"] for _ in range(20)]
    again = [second.reset(seed=5)[1]["price"]] + [second.reset()[1]["price"] for _ in range(20)]
    assert prices == again
    assert len(set(prices)) > 15
    for _ in range(20):
        first.reset()
        assert [first.step(0)[3] for _ in range(100)] == [False] * 99 + [True]


def test_several_assets_take_turns_in_one_run() -> None:
    cheap, dear = (
        simulate("momentum", 400, seed=k, start_price=p) for k, p in ((1, 1.0), (2, 9e4))
    )
    config = RLv3Config(max_steps_per_episode=50)
    env = TradingEnvV3(config, [cheap, dear])
    prices = [env.reset(seed=7)[1]["price"]] + [env.reset()[1]["price"] for _ in range(30)]
    assert 5 < sum(price > 1_000.0 for price in prices) < 26
    again = TradingEnvV3(config, [cheap, dear])
    assert prices[:2] == [again.reset(seed=7)[1]["price"], again.reset()[1]["price"]]
    # sizes are fractions of equity, whatever a unit costs
    for seed in range(6):
        env.reset(seed=seed)
        size = env.step(int(Action.LONG))[4]["position_size"]
        assert size == pytest.approx(0.1, rel=0.02)
    other = simulate("momentum", 400, seed=3, step_seconds=300)
    with pytest.raises(DataError, match="expected bars of 60 s, the configured step, found 300 s"):
        TradingEnvV3(config, [cheap, other])


def test_synthetic_worlds_are_new_at_every_reset() -> None:
    env = TradingEnvV3(RLv3Config(max_steps_per_episode=20))
    first, second = env.reset(seed=3)[0], env.reset()[0]
    assert not np.array_equal(first, second)
    assert np.array_equal(first, env.reset(seed=3)[0])


def test_price_data_in_every_form(tmp_path: Path) -> None:
    bars = simulate("momentum", 300, seed=1)
    path = tmp_path / "x.csv"
    stamps = (bars.end_us // 1_000_000).tolist()
    path.write_text(
        "timestamp,close\n"
        + "".join(f"{t},{c!r}\n" for t, c in zip(stamps, bars.close.tolist(), strict=True))
    )
    for data in (bars, path, str(path), bars.close, bars.close.tolist(), {"close": bars.close},
                 [bars, bars]):  # fmt: skip
        env = ordered(price_data=data)
        env.reset(seed=0)
        env.step(0)
        assert env.account.mark == pytest.approx(bars.close[WARM_BARS], rel=1e-3)


def test_prices_that_cannot_be_used() -> None:
    with pytest.raises(DataError, match=r"expected at least 33 bars .*, found 32"):
        TradingEnvV3(price_data=np.full(32, 100.0))
    with pytest.raises(DataError, match=r"expected prices with a close column, found \['price'\]"):
        TradingEnvV3(price_data={"price": [1.0]})
    with pytest.raises(DataError, match="expected bars of 60 s, the configured step, found 300 s"):
        TradingEnvV3(price_data=simulate("momentum", 100, seed=0, step_seconds=300))


def test_actions_outside_the_table_are_refused() -> None:
    env = TradingEnvV3()
    with pytest.raises(gym.error.ResetNeeded):
        env.step(0)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="action must be 0 to 5, was 6"):
        env.step(6)


class Feed:
    """A feed of fixed prices."""

    def __init__(self, prices: list[float]) -> None:
        self.prices = iter(prices)
        self.asked = 0

    def get_price(self) -> float | None:
        self.asked += 1
        return next(self.prices, None)


def test_live_prices_step_as_they_arrive() -> None:
    feed = Feed([100.0] * WARM_BARS + [110.0, 121.0])
    env = TradingEnvV3(price_source="live", market_feed=feed)
    _, info = env.reset(seed=0)
    assert feed.asked == WARM_BARS
    assert info["price"] == 100.0
    _, _, _, truncated, info = env.step(int(Action.LONG))  # fills at 100, then 110 arrives
    assert feed.asked == WARM_BARS + 1
    assert info["unrealized_pnl"] == pytest.approx(100.0)
    obs, _, _, truncated, info = env.step(int(Action.HOLD))
    assert info["unrealized_pnl"] == pytest.approx(210.0)
    assert obs[0] == pytest.approx(0.1)
    assert not truncated
    same, reward, terminated, truncated, info = env.step(int(Action.CLOSE))
    assert (reward, terminated, truncated) == (0.0, False, True)  # no price to fill at
    assert info["position_side"] == 1
    assert np.array_equal(same, obs)


def test_live_and_historical_prices_give_the_same_steps() -> None:
    closes = simulate("momentum", 120, seed=2).close
    bars = bars_from_closes(closes)
    history = ordered(price_data=bars._replace(open=np.append(closes[0], closes[:-1])))
    live = TradingEnvV3(market_feed=Feed(closes.tolist()))
    clock = 17  # a feed does not know the time of day
    first, second = history.reset(seed=0)[0], live.reset(seed=0)[0]
    rng = np.random.default_rng(0)
    for _ in range(80):
        first[clock] = second[clock]
        assert np.array_equal(first, second)
        action = int(rng.integers(6))
        first, reward, *_ = history.step(action)
        second, live_reward, *_ = live.step(action)
        assert reward == live_reward


def test_live_feeds_that_do_not_work() -> None:
    with pytest.raises(
        ConfigError, match=r"needs a market_feed with get_price\(\), found NoneType"
    ):
        TradingEnvV3(price_source="live")
    with pytest.raises(ConfigError, match="price_source must be synthetic or live, was 'file'"):
        TradingEnvV3(price_source="file")
    with pytest.raises(DataError, match="expected 31 prices to warm up, found 5"):
        TradingEnvV3(market_feed=Feed([100.0] * 5)).reset(seed=0)
    with pytest.raises(DataError, match=r"expected a price > 0, found -1\.0"):
        TradingEnvV3(market_feed=Feed([-1.0])).reset(seed=0)


def test_other_environments_are_padded_and_masked() -> None:
    env = make_padded("CartPole-v1")
    obs, info = env.reset(seed=0)
    assert obs.shape == (64,)
    assert obs.dtype == np.float32
    assert not obs[4:].any()
    assert info["action_mask"].tolist() == [True, True] + [False] * 4
    obs, reward, terminated, truncated, info = env.step(1)
    assert (reward, terminated, truncated) == (1.0, False, False)
    assert info["action_mask"].sum() == 2
    env.close()


def test_environments_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="environment Nope-v0 cannot be made"):
        make_padded("Nope-v0")
    for env_id, message in (
        ("Pendulum-v1", "expected at most 6 discrete actions"),
        ("FrozenLake-v1", "expected a Box observation space"),
    ):
        env = gym.make(env_id)
        with pytest.raises(ConfigError, match=message):
            PaddedEnv(env)
        env.close()
