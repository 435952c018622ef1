"""The optimum against every sequence of actions, by hand, and in the environment."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest

from rlv3.config import RLv3Config
from rlv3.env import TradingEnvV3
from rlv3.errors import ConfigError
from rlv3.events import Action
from rlv3.features import WARM_BARS
from rlv3.market import WORLDS, Bars, bars_from_closes, simulate
from rlv3.oracle import optimal_actions, optimal_net_profit
from rlv3.portfolio import Costs


def series(prices: list[float]) -> Bars:
    """Return bars whose fills happen at the given prices, one per step, the last one a mark."""
    bars = bars_from_closes([100.0] * WARM_BARS + prices)
    return bars._replace(open=np.array([100.0] * WARM_BARS + prices))


def trading(bars: Bars) -> TradingEnvV3:
    return TradingEnvV3(RLv3Config(max_steps_per_episode=10_000), bars, random_start=False)


def played(env: TradingEnvV3, actions: Sequence[int]) -> float:
    """Return the net profit of a sequence of actions in the environment."""
    env.reset(seed=0)
    for action in actions:
        _, _, terminated, _, _ = env.step(action)
        assert not terminated
    return env.account.equity - env.account.initial


@pytest.mark.parametrize("seed", range(3))
def test_no_sequence_of_all_six_actions_is_better(seed: int) -> None:
    rng = np.random.default_rng(seed)
    prices = (100.0 * np.exp(np.cumsum(rng.normal(0.0, 0.002, 6)))).tolist()
    bars = series(prices)
    env = trading(bars)
    best = max(played(env, actions) for actions in itertools.product(range(6), repeat=5))
    found = optimal_actions(bars)
    assert len(found.actions) == 5
    assert found.net_profit == pytest.approx(best, abs=1e-9)
    assert found.net_profit >= 0.0


def test_two_trades_by_hand() -> None:
    # long from 100 to 101, one step to turn round, short from 101 to 99
    costs = Costs(fee_rate=1e-4)
    prices = [100.0, 101.0, 101.0, 99.0]
    found = optimal_actions(series(prices), costs, half_spread=1e-4)
    assert found.actions.tolist() == [Action.LONG, Action.CLOSE, Action.SHORT]
    first = 0.1 * (0.01 - 2e-4 - 2e-4 * 1.01)
    second = 0.1 * (2.0 / 101.0 - 2e-4)  # open at the end: no exit to pay
    assert found.log_growth == pytest.approx(math.log1p(first) + math.log1p(second), abs=1e-12)
    assert found.net_profit == pytest.approx(10_000.0 * ((1 + first) * (1 + second) - 1), abs=1e-9)


def test_costs_above_every_move_leave_nothing_to_do() -> None:
    prices = [100.0, 100.05, 100.0, 99.95, 100.0]
    assert optimal_net_profit(series(prices), Costs(fee_rate=1e-3)) == 0.0


@pytest.mark.parametrize("world", WORLDS)
def test_the_environment_pays_the_optimum(world: str) -> None:
    bars = simulate(world, 400, seed=2)
    found = optimal_actions(bars)
    assert found.first == WARM_BARS - 1
    assert played(trading(bars), found.actions.tolist()) == pytest.approx(
        found.net_profit, abs=1e-6
    )
    assert found.net_profit > 0.0


def test_the_environment_pays_the_optimum_across_gaps_and_quotes(gappy_bars: Bars) -> None:
    found = optimal_actions(gappy_bars)
    assert played(trading(gappy_bars), found.actions.tolist()) == pytest.approx(
        found.net_profit, abs=1e-6
    )


def test_a_planted_signal_is_worth_much_more_than_standing_still() -> None:
    for seed in range(5):
        bars = simulate("planted_signal", 1_000 + WARM_BARS, seed=seed)
        best = optimal_net_profit(bars)
        steps = len(bars.close) - WARM_BARS - 1
        constants = [played(trading(bars), [action] * steps) for action in range(6)]
        assert max(constants) <= 0.2 * best


def test_a_planted_signal_is_seen_in_the_spread_alone() -> None:
    bars = simulate("planted_signal", 4_000, seed=1)
    assert bars.spread is not None
    change = np.diff(np.log(bars.close))  # of the bar after the row
    told = np.sign(bars.spread[:-1] - 2e-4)
    assert np.corrcoef(told, change)[0, 1] > 0.9
    # the rule that reads it earns most of the hindsight optimum: what training can aim at
    side, actions = 0, []
    for tell in told[WARM_BARS - 1 : -1].astype(int):
        if side == 0:
            actions.append(int(Action.LONG if tell > 0 else Action.SHORT))
            side = tell
        elif side != tell:
            actions.append(int(Action.CLOSE))
            side = 0
        else:
            actions.append(int(Action.HOLD))
    assert played(trading(bars), actions) > 0.93 * optimal_net_profit(bars)


def test_what_the_formula_does_not_cover_is_refused_or_empty() -> None:
    bars = simulate("momentum", 100, seed=0)
    with pytest.raises(ConfigError, match="on_opposite must be ignore here, was 'reverse'"):
        optimal_net_profit(bars, Costs(on_opposite="reverse"))
    cold = optimal_actions(bars.rows(0, WARM_BARS))
    assert (cold.net_profit, len(cold.actions)) == (0.0, 0)
