"""Evaluation: deterministic, by the account's own figures, on unseen prices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlv3.config import RLv3Config
from rlv3.errors import DataError
from rlv3.evaluation import (
    Curve,
    config_of,
    evaluate_bars,
    evaluate_env,
    evaluate_market,
    portfolio_returns,
    shuffled,
)
from rlv3.events import Action
from rlv3.manager import RLv3Manager
from rlv3.market import bars_from_closes, simulate
from rlv3.policy import Policy, shipped_policy


def preferring(*order: Action) -> Policy:
    """Return a policy with one fixed order of preference, whatever it sees."""
    manager = RLv3Manager(RLv3Config(hidden_dim=8))
    with torch.no_grad():
        for parameter in manager.agent.policy.parameters():
            parameter.zero_()
        for rank, action in enumerate(order):
            manager.agent.policy.network[4].bias[int(action)] = 10.0 - rank
    return manager.policy


def test_a_policy_that_holds_earns_nothing() -> None:
    result = evaluate_bars(preferring(Action.HOLD), [simulate("momentum", 200, seed=0)] * 2)
    assert result.returns == [0.0, 0.0]
    assert (result.net_profit, result.fees, result.trades, result.max_drawdown) == (
        0.0,
        0.0,
        0,
        0.0,
    )
    assert result.action_mix["HOLD"] == 1.0
    assert result.episodes == 2
    # rows 30 to 197 of 200 are acted on: the last two have no bar, or no open, after them
    assert result.steps == 2 * 168


def test_buying_and_holding_by_hand() -> None:
    bars = bars_from_closes([100.0] * 33 + [110.0] * 3)
    result = evaluate_bars(preferring(Action.LONG, Action.HOLD), [bars])
    # enters at row 31's open: 1,000 at 100, costs 0.5, then 10 units gain 10 each
    assert result.trades == 1
    assert result.net_profit == pytest.approx(99.5, abs=1e-9)
    assert result.fees == pytest.approx(0.5, abs=1e-9)
    assert result.mean_return == pytest.approx(np.log(10_099.5 / 10_000), abs=1e-12)
    assert result.max_drawdown == pytest.approx(0.5 / 10_000, abs=1e-12)
    assert result.action_mix["LONG"] == pytest.approx(1 / result.steps)
    assert result.to_dict()["trades"] == 1


def test_the_same_evaluation_twice() -> None:
    policy = Policy.load(shipped_policy())
    first = evaluate_market(policy, "regime_switching", episodes=2, seed=1, n_bars=200)
    assert first == evaluate_market(policy, "regime_switching", episodes=2, seed=1, n_bars=200)
    assert first != evaluate_market(policy, "regime_switching", episodes=2, seed=2, n_bars=200)


def test_the_shipped_policy_trades_and_earns_on_unseen_series() -> None:
    policy = Policy.load(shipped_policy())
    result = evaluate_market(policy, "regime_switching", episodes=8, seed=424_242)
    assert result.trades is not None
    assert result.net_profit is not None
    assert result.trades / result.episodes >= 10
    assert sum(share > 0.0 for share in result.action_mix.values()) >= 3
    assert result.net_profit > 0.0
    assert result.mean_return > 0.005


def test_environments_are_evaluated_by_their_own_reward() -> None:
    policy = preferring(Action.LONG)  # in CartPole: always push right
    result = evaluate_env(policy, "CartPole-v1", episodes=3, seed=0)
    assert len(result.returns) == 3
    assert all(7 <= r <= 12 for r in result.returns)
    assert result.net_profit is result.trades is None
    assert result.action_mix["LONG"] == 1.0


def test_our_own_environment_is_scaled_as_the_policy_was() -> None:
    result = evaluate_env(Policy.load(shipped_policy()), "rlv3/Trading-v3", episodes=1, seed=3)
    assert result.trades is not None
    assert result.trades >= 5


def test_configuration_of_an_artifact() -> None:
    manager = RLv3Manager(RLv3Config(fee_bps=9.0, reward="seed", hidden_dim=8))
    config = config_of(manager.policy)
    assert config.fee_bps == 9.0
    assert config.reward == "net_return"  # figures are money, whatever was trained for


def test_bars_that_do_not_fit_are_refused() -> None:
    policy = preferring(Action.HOLD)
    with pytest.raises(DataError, match="expected at least one series"):
        evaluate_bars(policy, [])
    with pytest.raises(DataError, match="expected bars of 60 s"):
        evaluate_bars(policy, [simulate("momentum", 100, seed=0, step_seconds=300)])


def test_metrics_of_one_round_trip_by_hand() -> None:
    # enters at 100 (row 31's open, the first warm one), 1,000 of notional, and holds to the end
    bars = bars_from_closes([100.0] * 33 + [110.0] * 3)
    result = evaluate_bars(preferring(Action.LONG, Action.HOLD), [bars])
    assert result.turnover == pytest.approx(0.1)
    assert result.half_spread == pytest.approx(0.1)
    assert result.in_market == 1.0
    assert result.hit_rate is None  # nothing was closed
    (curve,) = result.curves
    # a price of row t is the open of bar t + 1, known when bar t has ended
    assert curve.price.tolist() == [100.0, 100.0, 100.0, 110.0, 110.0]
    assert curve.time_us.tolist() == bars.end_us[30:35].tolist()
    assert curve.equity.tolist() == pytest.approx([10_000, 9_999.5, 9_999.5, 10_099.5, 10_099.5])
    steps = np.diff(curve.equity) / curve.equity[:-1]
    assert result.sharpe == pytest.approx(steps.mean() / steps.std() * np.sqrt(525_600))
    assert result.sharpe_interval is not None
    assert result.sharpe_interval.low <= result.sharpe <= result.sharpe_interval.high
    assert "curves" not in result.to_dict()


def test_a_closed_position_that_costs_more_than_it_earns_is_no_hit() -> None:
    churn = preferring(Action.CLOSE, Action.LONG)
    flat = evaluate_bars(churn, [bars_from_closes([100.0] * 60)])
    assert flat.hit_rate == 0.0
    rising = evaluate_bars(churn, [bars_from_closes(100.0 * 1.01 ** np.arange(60))])
    assert rising.hit_rate == 1.0


def test_baselines_on_the_same_prices() -> None:
    series = [simulate("regime_switching", 400, seed=s) for s in (1, 2)]
    result = evaluate_bars(Policy.load(shipped_policy()), series, random_runs=5)
    flat, held, random = (result.baselines[k] for k in ("flat", "buy_and_hold", "random"))
    assert (flat.net_profit, flat.turnover) == (0.0, 0.0)
    long = evaluate_bars(preferring(Action.LONG, Action.HOLD), series)
    assert (held.net_profit, held.fees) == (long.net_profit, long.fees)
    assert result.turnover is not None
    assert random.turnover == pytest.approx(result.turnover, rel=0.1)
    assert random.runs == 5
    assert result.beats_random == 1.0  # the shipped policy knows this world
    again = evaluate_bars(Policy.load(shipped_policy()), series, random_runs=5)
    assert again == result


def test_shuffled_positions_keep_their_holding_times() -> None:
    sides = [0, 0, 1, 1, 1, 0, -1, 0, 0, 0, 1]
    found = shuffled(sides, np.random.default_rng(3))
    assert len(found) == len(sides)

    def lengths(plan: list[int]) -> list[int]:
        text = "".join(str(abs(side)) for side in plan)
        return sorted(len(run) for run in text.split("0") if run)

    assert lengths(found) == lengths(sides) == [1, 1, 3]


def test_a_portfolio_is_the_sum_of_its_accounts_on_one_time_axis() -> None:
    def curve(times: list[int], equity: list[float]) -> Curve:
        prices = np.ones(len(times))
        return Curve("A", np.array(times), prices, np.array(equity), prices[1:])

    # 100 + 100, 110 + 100, 110 + 80 (the second account begins later and has a step of its own)
    found = portfolio_returns([curve([1, 2], [100.0, 110.0]), curve([2, 3], [100.0, 80.0])])
    assert found.tolist() == pytest.approx([10 / 200, -20 / 210])
