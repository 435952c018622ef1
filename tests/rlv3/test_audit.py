"""Rewards against net profit: the seed's formula is caught, the net return is not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from rlv3.audit import SCRIPTS, audit_reward, command, play, script, spearman, verdict
from rlv3.config import RLv3Config
from rlv3.events import Action
from rlv3.features import WARM_BARS
from rlv3.market import bars_from_closes, simulate
from rlv3.oracle import optimal_net_profit
from rlv3.reward import SANE_REWARDS

app = typer.Typer()
app.command()(command)
SERIES = [simulate("regime_switching", 400 + WARM_BARS, seed=seed) for seed in range(3)]


def test_rank_correlation_by_hand() -> None:
    assert spearman([1, 2, 3], [10, 100, 1_000]) == pytest.approx(1.0)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    # ranks 1.5, 1.5, 3 against 1, 2, 3: covariance 1.5, variances 1.5 and 2
    assert spearman([5, 5, 9], [1, 2, 3]) == pytest.approx(1.5 / (1.5 * 2.0) ** 0.5)
    assert spearman([1, 1, 1], [1, 2, 3]) == 0.0


def test_the_net_return_is_sane() -> None:
    audit = audit_reward(SERIES, RLv3Config())
    assert audit.sane
    assert audit.reward in SANE_REWARDS
    assert audit.correlation == pytest.approx(1.0)
    assert audit.idle_reward == 0.0
    assert audit.best_rewarded == "oracle"
    assert set(audit.policies) == set(SCRIPTS)
    assert "is sane" in verdict(audit)


def test_the_seeds_reward_pays_for_doing_nothing() -> None:
    audit = audit_reward(SERIES, RLv3Config(reward="seed"))
    assert not audit.sane
    assert audit.reward not in SANE_REWARDS
    assert audit.idle_reward == pytest.approx(0.1)  # the survival term, every step
    # who does as the regime term says is rewarded above the best that was possible
    assert audit.best_rewarded != "oracle"
    assert audit.policies["oracle"].net_profit > audit.policies[audit.best_rewarded].net_profit
    # churning through 200 trades of pure cost still earns most of what doing nothing earns
    assert audit.policies["churn"].net_profit < -100.0
    assert audit.policies["churn"].reward > 0.5 * audit.policies["hold"].reward
    found = verdict(audit)
    assert found.startswith("seed is not sane: doing nothing earns +0.1 a step; ")


def test_scripts_do_what_they_are_called() -> None:
    rng = np.random.default_rng(0)
    best = np.array([Action.LONG, Action.CLOSE, Action.SHORT] + [Action.HOLD] * 7)
    bars = bars_from_closes([100.0] * (WARM_BARS + 11))
    found = {name: play(bars, script(name, best, rng), RLv3Config()) for name in SCRIPTS}
    assert (found["hold"].exposed, found["hold"].trades, found["hold"].net_profit) == (0.0, 0, 0.0)
    assert (found["always_long"].exposed, found["always_long"].trades) == (1.0, 1)
    assert (found["always_short"].exposed, found["always_short"].trades) == (1.0, 1)
    assert (found["churn"].exposed, found["churn"].trades) == (0.5, 5)
    # 5 round trips at 5 bp a side on a tenth of equity
    assert found["churn"].net_profit == pytest.approx(-5.0, rel=1e-3)
    assert (found["oracle"].trades, found["oracle"].steps) == (2, 10)
    assert found["trend"].trades == found["aligned"].trades == 0  # nothing moves
    assert found["random"].trades > 0


def test_the_oracle_earns_the_optimum() -> None:
    audit = audit_reward(SERIES[:1], RLv3Config())
    assert audit.policies["oracle"].net_profit == pytest.approx(optimal_net_profit(SERIES[0]))


def test_the_command_prints_and_fails_where_the_reward_does(tmp_path: Path) -> None:
    runner = CliRunner()
    result = runner.invoke(app, ["--episodes", "1", "--json"])
    found = json.loads(result.stdout)
    assert (result.exit_code, found["net_return"]["sane"], found["seed"]["sane"]) == (
        0,
        True,
        False,
    )
    assert runner.invoke(app, ["--episodes", "1", "--reward", "seed"]).exit_code == 4
    bars = SERIES[0]
    path = tmp_path / "x.csv"
    rows = zip((bars.end_us // 1_000_000).tolist(), bars.close.tolist(), strict=True)
    path.write_text("timestamp,close\n" + "".join(f"{t},{c!r}\n" for t, c in rows))
    result = runner.invoke(app, ["--reward", "net_return", "--data", str(path)])
    assert result.exit_code == 0
    assert "net_return is sane" in result.stdout
