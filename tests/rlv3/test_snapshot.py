"""Checkpoints: a resumed run ends in the bits of an undisturbed one; a bad file is one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from safetensors.numpy import load, save

from rlv3.config import RLv3Config
from rlv3.errors import ConfigError, DataError, PolicyError
from rlv3.manager import RLv3Manager
from rlv3.market import simulate
from rlv3.snapshot import read_checkpoint

STEPS = 128
CONFIG = RLv3Config(
    buffer_size=STEPS, n_envs=2, n_epochs=2, batch_size=32, hidden_dim=16,
    learning_rate_schedule="linear", max_steps_per_episode=50, seed=3,
)  # fmt: skip


def interrupted(path: Path, config: RLv3Config = CONFIG, **place: Any) -> RLv3Manager:
    """Train five updates and leave a checkpoint of the second."""
    manager = RLv3Manager(config)

    def keep(done: int, _: Any) -> None:
        if done == 2 * STEPS:
            manager.save_checkpoint(path, {"note": "hello"})

    manager.train(steps=5 * STEPS, on_update=keep, **place)
    return manager


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize(
    "place", [{"market": "momentum"}, {"env_id": "CartPole-v1"}], ids=["trading", "cartpole"]
)
def test_a_resumed_run_ends_in_the_undisturbed_weights(
    tmp_path: Path, backend: str, place: dict[str, Any]
) -> None:
    path = tmp_path / "c.safetensors"
    config = RLv3Config(
        **{name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__}
        | {"backend": backend, "normalise_obs": "env_id" in place}
    )
    alone = interrupted(path, config, **place)
    snapshot = read_checkpoint(path)
    assert snapshot.about["caller"] == {"note": "hello"}
    resumed = RLv3Manager()
    assert resumed.resume(snapshot, **place) == 2 * STEPS
    seen: list[int] = []
    resumed.finish(lambda done, _: seen.append(done))
    assert seen == [3 * STEPS, 4 * STEPS, 5 * STEPS]
    assert resumed.artifact() == alone.artifact()
    assert resumed.episode_returns == alone.episode_returns
    with pytest.raises(ConfigError, match="expected an interrupted run"):
        resumed.finish()


def test_other_data_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    first, second = (simulate("momentum", 400, seed=seed) for seed in (1, 2))
    interrupted(path, price_data=first, shares=(1.0,))
    RLv3Manager().resume(read_checkpoint(path), price_data=first, shares=(1.0,))
    with pytest.raises(DataError, match="expected training data with sha256"):
        RLv3Manager().resume(read_checkpoint(path), price_data=second, shares=(1.0,))


class Restless(gym.Env[np.ndarray, np.int64]):
    """Draws from a source that no checkpoint knows."""

    hidden = np.random.default_rng(0)

    def __init__(self) -> None:
        self.observation_space = gym.spaces.Box(0.0, 1.0, (3,), dtype=np.float32)
        self.action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed, options=options)
        return self.hidden.random(3, dtype=np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        reward = float(action)
        return self.hidden.random(3, dtype=np.float32), reward, False, False, {}


def test_an_environment_that_does_not_replay_is_refused(tmp_path: Path) -> None:
    gym.register("Restless-v0", Restless)
    path = tmp_path / "c.safetensors"
    interrupted(path, env_id="Restless-v0")
    with pytest.raises(PolicyError, match="expected the environments to replay"):
        RLv3Manager().resume(read_checkpoint(path), env_id="Restless-v0")
    gym.registry.pop("Restless-v0")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("checkpoint") / "c.safetensors"
    interrupted(path, env_id="CartPole-v1")
    return path.read_bytes()


def refusal(path: Path, source: bytes) -> str:
    path.write_bytes(source)
    with pytest.raises(PolicyError) as caught:
        RLv3Manager().resume(read_checkpoint(path), env_id="CartPole-v1")
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("keep", [0, 7, 100, 5_000, -1])
def test_a_truncated_checkpoint_is_refused(tmp_path: Path, checkpoint: bytes, keep: int) -> None:
    assert "is not a checkpoint: expected" in refusal(tmp_path / "c", checkpoint[:keep])


@pytest.mark.parametrize("source", [b"\x80\x04]q\x00.", b"PK\x03\x04" + b"\0" * 500])
def test_a_pickle_is_not_run(tmp_path: Path, source: bytes) -> None:
    assert "is not a checkpoint: expected" in refusal(tmp_path / "c", source)


def edited(source: bytes, tensors: dict[str, Any] | None = None, text: str | None = None) -> bytes:
    size = int.from_bytes(source[:8], "little")
    metadata = json.loads(source[8 : 8 + size])["__metadata__"]
    if text is not None:
        metadata["rlv3_checkpoint"] = text
    return save(load(source) | (tensors or {}), metadata=metadata)


def test_changed_tensors_and_metadata_are_refused(tmp_path: Path, checkpoint: bytes) -> None:
    other = {"policy.network.0.bias": np.ones(16, np.float32)}
    assert "expected tensors with sha256" in refusal(tmp_path / "c", edited(checkpoint, other))
    size = int.from_bytes(checkpoint[:8], "little")
    text = json.loads(checkpoint[8 : 8 + size])["__metadata__"]["rlv3_checkpoint"]
    wider = text.replace('"hidden_dim": 16', '"hidden_dim": 32')
    assert wider != text
    found = refusal(tmp_path / "c", edited(checkpoint, text=wider))
    assert "expected metadata with sha256" in found
    assert "expected metadata version" in refusal(tmp_path / "c", edited(checkpoint, text="{}"))


def test_a_checkpoint_of_another_network_size_is_refused(tmp_path: Path, checkpoint: bytes) -> None:
    path = tmp_path / "c"
    path.write_bytes(checkpoint)
    snapshot = read_checkpoint(path)
    config = RLv3Config(
        **{name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__} | {"hidden_dim": 32}
    )
    with pytest.raises(PolicyError, match=r"policy.network.0.weight of shape \(32, 64\), found"):
        RLv3Manager().resume(snapshot._replace(config=config), env_id="CartPole-v1")


def test_a_missing_checkpoint_and_an_early_one_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="cannot be read: No such file"):
        read_checkpoint(tmp_path / "none")
    with pytest.raises(ConfigError, match="expected a call of train"):
        RLv3Manager().save_checkpoint(tmp_path / "none")
    assert list(tmp_path.iterdir()) == []
