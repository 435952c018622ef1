"""Evaluation: deterministic, by the account's own figures, on unseen prices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlv3.config import RLv3Config
from rlv3.errors import DataError
from rlv3.evaluation import config_of, evaluate_bars, evaluate_env, evaluate_market
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
