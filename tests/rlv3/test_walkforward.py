"""Folds that leak nothing, and the arithmetic of what they add up to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rlv3.config import RLv3Config
from rlv3.errors import ConfigError
from rlv3.evaluation import Curve
from rlv3.features import US, WARM_BARS
from rlv3.market import simulate
from rlv3.metrics import deflated_sharpe
from rlv3.policy import Policy
from rlv3.runs import config_toml
from rlv3.walkforward import WalkForward, deflated, joined, purged_folds
from tests.rlv3.test_cli import call, refused, write_bars

FAST = RLv3Config(buffer_size=256, n_epochs=1, max_steps_per_episode=100, hidden_dim=16)
MINUTE = 60 * US


def test_folds_follow_one_another_and_leave_the_embargo_out() -> None:
    series = [simulate("momentum", 1_000, seed=1), simulate("momentum", 960, seed=2, symbol="B")]
    folds = purged_folds(series, 4, embargo=50)
    assert len(folds) == 4
    ends = series[0].end_us
    for k, fold in enumerate(folds, start=1):
        edge = ends[round(k * 999 / 5)]
        assert [bars.end_us[-1] for bars in fold.train] == [min(edge, b.end_us[-1]) for b in series]
        assert all(bars.end_us[0] == ends[0] for bars in fold.train)
        decided = fold.test[0].end_us[WARM_BARS - 1]
        assert decided == edge + 50 * MINUTE
        assert fold.test[0].end_us[0] > edge  # not even warm-up is shared
        assert fold.test[0].end_us[-1] == ends[round((k + 1) * 999 / 5)]


def test_a_rolling_window_forgets() -> None:
    (series,) = [simulate("momentum", 1_000, seed=1)]
    folds = purged_folds([series], 4, embargo=50, rolling=2)
    assert [len(fold.train[0].close) for fold in folds[:2]] == [201, 401]
    edges = series.end_us[[200, 599]]
    # two stretches, and the bars that warm up the first decision
    assert folds[2].train[0].end_us[WARM_BARS - 1] == edges[0] + MINUTE
    assert folds[2].train[0].end_us[-1] == edges[1]


def test_folds_that_cannot_be_are_refused() -> None:
    series = [simulate("momentum", 400, seed=1)]
    with pytest.raises(ConfigError, match="folds must be >= 2, was 1"):
        purged_folds(series, 1)
    with pytest.raises(ConfigError, match="embargo must be >= 31 bars, was 10"):
        purged_folds(series, 2, embargo=10)


def test_joined_curves_add_profits_up() -> None:
    def curve(first: int, equity: list[float]) -> Curve:
        n = len(equity)
        return Curve(
            "A", np.arange(first, first + n), np.ones(n), np.array(equity), np.zeros(n - 1)
        )

    (found,) = joined([[curve(0, [100.0, 90.0])], [curve(5, [100.0, 130.0])]])
    assert found.equity.tolist() == [100.0, 90.0, 90.0, 120.0]
    assert found.time_us.tolist() == [0, 1, 5, 6]


def test_the_best_of_several_is_deflated() -> None:
    rng = np.random.default_rng(0)
    returns = {name: rng.normal(mean, 0.01, 500) for name, mean in (("a", 0.0), ("b", 0.001))}

    def result(name: str, ratio: float) -> WalkForward:
        return WalkForward(name, {}, [], 0.0, 0.0, ratio, (0.0, 0.0), ratio, 0.5)

    found = deflated([result("a", 0.01), result("b", 0.09)], returns, 5)
    # the variance of 0.01 and 0.09 with ddof 1: 2 * 0.04^2
    assert found["variance_of_sharpes"] == pytest.approx(0.0032)
    assert found["best"] == "b"
    assert found["deflated_sharpe"] == deflated_sharpe(
        returns["b"], 5, found["variance_of_sharpes"]
    )
    alone = deflated([result("a", 0.01)], returns, 1)
    assert alone["luckiest_sharpe"] == 0.0
    assert alone["variance_of_sharpes"] == pytest.approx(1 / 499)


def test_walkforward_from_the_command_line(tmp_path: Path) -> None:
    data = write_bars(tmp_path / "abc_1m.csv", 900)
    for name, rate in (("slow", 1e-4), ("fast", 1e-2)):
        text = config_toml(FAST).replace("learning_rate = 0.0003", f"learning_rate = {rate}")
        (tmp_path / f"{name}.toml").write_text(text)
    options = (
        "walkforward", "--data", data, "--folds", 2, "--steps", 256, "--seeds", 2,
        "--config", tmp_path / "slow.toml", "--config", tmp_path / "fast.toml",
    )  # fmt: skip
    result = call(*options, "--out", tmp_path / "w")
    assert "fold 2" in result.stdout
    assert "fast: fold 2 of 2, seed 1: " in result.stderr
    assert "training 2,048 of 2,048 steps" in result.stderr  # 2 configurations, folds and seeds
    assert "best of 2 configurations tried" in result.stdout
    assert result.stdout.count("trained for the reward net_return") == 2
    found = json.loads((tmp_path / "w" / "walkforward.json").read_text())
    assert [one["name"] for one in found["configurations"]] == ["slow", "fast"]
    assert [one["config"]["learning_rate"] for one in found["configurations"]] == [1e-4, 1e-2]
    first, second = found["configurations"][0]["folds"]
    assert first["train_to"] < first["test_from"] < first["test_to"] < second["test_from"]
    assert 0.0 <= found["deflated_sharpe"] <= 1.0
    total = found["configurations"][0]["net_profit"]
    assert total == pytest.approx(first["net_profit"] + second["net_profit"])
    assert (tmp_path / "w" / "equity.png").exists()
    policy = Policy.load(tmp_path / "w" / "fast" / "fold-2" / "seed-1" / "policy.safetensors")
    assert policy.metadata["training"]["data_end"][:16] == second["train_to"][:16]
    assert policy.metadata["training"]["config"]["learning_rate"] == 1e-2
    again = json.loads(call(*options, "--out", tmp_path / "again", "--json").stdout)
    assert again["configurations"] == found["configurations"]
    assert "trials must be >= 2 configurations, was 1" in refused(*options, "--trials", 1)
