"""The researcher's door: train, save, load, predict, and what the artifact says about it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rlv3 import RLv3Config, RLv3Manager
from rlv3.errors import ConfigError, DataError, PolicyError
from rlv3.features import Normaliser, feature_matrix
from rlv3.market import Bars, simulate
from rlv3.policy import Policy

FAST = RLv3Config(buffer_size=256, n_epochs=2, max_steps_per_episode=100, hidden_dim=32, seed=2)
OBS = {
    "price_change_1m": 0.001, "price_change_5m": 0.005, "volatility": 0.02, "rsi": 55.0,
    "position_size": 0.0, "balance": 10_000.0, "equity": 10_000.0, "regime": "TREND",
}  # fmt: skip


@pytest.fixture(autouse=True)
def short_worlds(monkeypatch: pytest.MonkeyPatch) -> None:
    """One synthetic series a world instead of eight."""
    monkeypatch.setattr("rlv3.manager.SERIES_PER_WORLD", 1)
    monkeypatch.setattr("rlv3.manager.SERIES_BARS", 1_500)


def bars(n: int = 1_000, seed: int = 1) -> Bars:
    return simulate("regime_switching", n, seed=seed)


def test_the_seeds_quick_start(tmp_path: Path) -> None:
    manager = RLv3Manager(FAST)
    metrics = manager.train(num_episodes=3)
    assert isinstance(metrics["avg_reward"], float)
    assert metrics["episodes"] >= 3
    assert set(metrics) >= {
        "avg_reward", "final_reward", "episodes", "steps", "policy_loss", "value_loss",
        "approx_kl", "clip_fraction", "explained_variance", "entropy", "steps_per_s",
        "avg_policy_loss", "avg_value_loss",
    }  # fmt: skip
    path = manager.save(tmp_path / "p.safetensors")
    result = manager.predict(OBS)
    assert result["action"] in (0, 1, 2)
    assert 1 / 3 - 1e-9 <= result["confidence"] <= 1.0
    assert result["tp_zone_multiplier"] == pytest.approx(
        float(np.clip(1 + result["value"] / 20, 0.5, 1.5))
    )
    assert result["suggested_tp_pct"] == pytest.approx(0.06 * result["tp_zone_multiplier"])
    other = RLv3Manager()
    other.load(path)
    assert other.predict(OBS) == result
    assert other.config.hidden_dim == 32


def test_predict_agrees_with_the_agents_own_network() -> None:
    manager = RLv3Manager(FAST)
    manager.train(steps=256, price_data=bars())
    policy = manager.policy
    obs = np.random.default_rng(0).normal(size=(40, 64)).astype(np.float32)
    actions, probs, values = policy.decide(obs, np.ones((40, 6), dtype=bool))
    for i in range(40):
        action, log_prob, value = manager.agent.act(obs[i], deterministic=True)
        assert action == actions[i]
        assert np.exp(log_prob) == pytest.approx(probs[i, action], abs=1e-5)
        assert value == pytest.approx(values[i], abs=1e-5)


def test_artifact_says_what_the_policy_was_trained_on(tmp_path: Path) -> None:
    series = bars(1_000)
    manager = RLv3Manager(FAST)
    manager.train(steps=300, price_data=series)
    policy = manager.policy
    training = policy.metadata["training"]
    assert training["steps"] == policy.trained_steps == 512  # two whole buffers
    assert training["seed"] == 2
    assert training["reward"] == "net_return"
    assert training["env"] == "rlv3/Trading-v3"
    assert training["markets"] == ["SIMUSDT"]
    assert training["config"]["buffer_size"] == 256
    # 700 of 1,000 bars from 2026-01-01T00:00Z on: 11 h 40 min
    assert training["data_end"] == "2026-01-01T11:40:00+00:00"
    cut = series.rows(0, 700)
    raw, missing = feature_matrix(cut.end_us, cut.close, cut.volume)
    expected = Normaliser.fit(raw, missing)
    assert np.array_equal(policy.normaliser.mean, expected.mean)
    assert np.array_equal(policy.normaliser.scale, expected.scale)
    known = raw[(missing >> 4) & 1 == 0, 4]
    assert policy.metadata["quantiles"]["rsi"][4] == np.median(known)
    assert "spread" not in policy.metadata["quantiles"]
    # an embargo of 60 bars precedes each first decision; the last 31 of them are warm-up
    assert manager.split is not None
    assert [len(part[0].close) for part in manager.split] == [700, 121, 121]


def test_held_out_data_leave_no_trace_in_the_artifact() -> None:
    series = bars(1_000)
    changed = series._replace(close=np.where(np.arange(1_000) >= 800, 50.0, series.close))
    sources = []
    for data in (series, changed):
        manager = RLv3Manager(FAST)
        manager.train(steps=256, price_data=data)
        sources.append(manager.artifact())
    assert sources[0] == sources[1]


def test_same_seed_same_artifact() -> None:
    def build(seed: int) -> bytes:
        manager = RLv3Manager(RLv3Config(**{**_values(FAST), "seed": seed}))
        manager.train(steps=256, market=("momentum", "random_walk"))
        return manager.artifact()

    assert build(1) == build(1)
    assert build(1) != build(2)


def test_one_or_two_threads_give_the_same_artifact() -> None:
    def build(threads: int) -> bytes:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        manager = RLv3Manager(replace(FAST, hidden_dim=128))
        manager.train(steps=256, env_id="CartPole-v1")
        torch.set_num_threads(before)
        return manager.artifact()

    assert build(1) == build(2)


def _values(config: RLv3Config) -> dict[str, object]:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def test_synthetic_training_has_no_end_time_and_a_fingerprint() -> None:
    manager = RLv3Manager(FAST)
    manager.train(steps=256, market="momentum")
    training = manager.policy.metadata["training"]
    assert training["markets"] == ["momentum"]
    assert training["data_end"] is None
    assert len(training["data_sha256"]) == 64


def test_untrained_policies_predict_and_say_so() -> None:
    manager = RLv3Manager()
    result = manager.predict(OBS)
    assert result["confidence"] == pytest.approx(1 / 3, abs=0.02)
    assert manager.policy.trained_steps == 0


def test_training_continues(tmp_path: Path) -> None:
    manager = RLv3Manager(FAST)
    manager.train(steps=256, price_data=bars())
    before = manager.predict(OBS)
    manager.train(steps=256)
    assert manager.steps == manager.policy.trained_steps == 512
    assert manager.predict(OBS)["value"] != before["value"]
    path = manager.save(tmp_path / "p.safetensors")
    again = RLv3Manager(FAST)
    again.load(path)
    mean = again.policy.normaliser.mean
    again.train(steps=256, price_data=bars(seed=9))
    assert again.policy.trained_steps == 768
    assert np.array_equal(again.policy.normaliser.mean, mean)  # the weights were made for it


def test_masks_of_the_configuration_are_in_the_artifact() -> None:
    plain = RLv3Manager(RLv3Config(use_action_masks=False))
    assert plain.policy.metadata["mask_rule"] == "none"
    assert RLv3Manager().policy.metadata["mask_rule"] == "design"


def test_wrong_uses_are_refused(tmp_path: Path) -> None:
    manager = RLv3Manager(FAST)
    with pytest.raises(ConfigError, match="expected one of price_data, market and env_id"):
        manager.train(steps=1, price_data=bars(), market="momentum")
    with pytest.raises(ConfigError, match="market must be one of"):
        manager.train(steps=1, market="mars")
    with pytest.raises(DataError, match="expected bars of 60 s"):
        manager.train(steps=1, price_data=simulate("momentum", 500, seed=0, step_seconds=300))
    with pytest.raises(PolicyError, match="cannot be read"):
        manager.load(tmp_path / "none.safetensors")


def test_training_in_a_gymnasium_environment() -> None:
    manager = RLv3Manager(FAST)
    metrics = manager.train(steps=512, env_id="CartPole-v1")
    assert metrics["avg_reward"] > 5.0
    training = manager.policy.metadata["training"]
    assert training["env"] == "CartPole-v1"
    assert manager.policy.metadata["quantiles"] == {}


def test_saving_needs_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    manager = RLv3Manager(FAST)
    assert manager.save() == Path("runs/rl_v3/policy.safetensors")
    manager.load()
    assert Policy.load("runs/rl_v3/policy.safetensors").digest == manager.policy.digest


def test_global_random_state_is_left_alone() -> None:
    before = torch.random.get_rng_state().clone()
    RLv3Manager(FAST).train(steps=256)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("place", [{"env_id": "CartPole-v1"}, {"market": "momentum"}])
def test_several_environments_share_out_the_buffer(place: dict[str, str]) -> None:
    manager = RLv3Manager(replace(FAST, n_envs=4))
    assert manager.train(steps=256, **place)["steps"] == 256
