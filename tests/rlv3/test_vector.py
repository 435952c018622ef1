"""Many environments in lockstep: bit for bit what each would be alone."""

from __future__ import annotations

import numpy as np
import pytest

from rlv3.agent import PPOAgent
from rlv3.config import RLv3Config
from rlv3.env import TradingEnvV3, make_padded
from rlv3.errors import ConfigError, PolicyError
from rlv3.features import Normaliser
from rlv3.market import Bars, simulate
from rlv3.trainer import PPOTrainer
from rlv3.vector import VectorEnv, replicate

CONFIG = RLv3Config(max_steps_per_episode=40)
N = 3


def trading(bars: Bars) -> TradingEnvV3:
    """Two assets, random windows."""
    other = simulate("momentum", 400, seed=2, symbol="OTHER")
    return TradingEnvV3(CONFIG, [bars.rows(0, 600), other], normaliser=Normaliser.identity())


def test_vector_and_scalar_agree_bit_for_bit(gappy_bars: Bars) -> None:
    vector = VectorEnv(replicate(trading(gappy_bars), N))
    obs, info = vector.reset(seed=[11, 12, 13])
    alone = [trading(gappy_bars) for _ in range(N)]
    seen = [env.reset(seed=11 + i) for i, env in enumerate(alone)]
    rng = np.random.default_rng(0)
    ends = 0
    for _ in range(200):
        for i in range(N):
            assert obs[i].tobytes() == seen[i][0].tobytes()
            assert np.array_equal(info["action_mask"][i], seen[i][1]["action_mask"])
        actions = np.array([rng.choice(np.flatnonzero(mask)) for mask in info["action_mask"]])
        obs, rewards, terminated, truncated, info = vector.step(actions)
        for i, env in enumerate(alone):
            one, reward, dead, late, facts = env.step(actions[i])
            assert (rewards[i], terminated[i], truncated[i]) == (reward, dead, late)
            seen[i] = (one, facts)
            if dead or late:
                ends += 1
                assert info["_final_obs"][i]
                assert info["final_obs"][i].tobytes() == one.tobytes()
                seen[i] = env.reset()
    assert ends >= 3 * 4


def test_replicas_share_prices_and_nothing_else(gappy_bars: Bars) -> None:
    first, second = replicate(trading(gappy_bars), 2)
    assert first._tracks is second._tracks
    first.reset(seed=1)
    second.reset(seed=2)
    assert first.account is not second.account
    assert first.np_random is not second.np_random


def test_a_live_feed_has_one_reader() -> None:
    class Feed:
        def get_price(self) -> float:
            return 100.0

    env = TradingEnvV3(CONFIG, price_source="live", market_feed=Feed())
    assert replicate(env, 1) == [env]
    with pytest.raises(ConfigError, match="n_envs must be 1, was 2"):
        replicate(env, 2)
    vector = VectorEnv(env)
    vector.reset(seed=1)
    with pytest.raises(ConfigError, match="found a live feed"):
        vector.state()


def test_a_state_is_played_again() -> None:
    vector = VectorEnv([make_padded("CartPole-v1") for _ in range(2)])
    vector.reset(seed=3)
    for t in range(60):
        vector.step(np.array([t % 2, t % 3 > 0], dtype=np.int64))
    again = VectorEnv([make_padded("CartPole-v1") for _ in range(2)])
    again.restore(vector.state(), vector.obs)
    for t in range(60):
        actions = np.array([t % 2, t % 3 > 0], dtype=np.int64)
        found, expected = again.step(actions), vector.step(actions)
        for one, other in zip(found[:4], expected[:4], strict=True):
            assert np.array_equal(one, other)
    with pytest.raises(PolicyError, match="expected 1 environments, found 2"):
        VectorEnv(make_padded("CartPole-v1")).restore(vector.state(), vector.obs)


def test_the_configuration_says_how_many() -> None:
    with pytest.raises(ConfigError, match="expected n_envs = 1 environments, found 2"):
        PPOTrainer(PPOAgent(CONFIG), [make_padded("CartPole-v1") for _ in range(2)])
    with pytest.raises(ConfigError, match="buffer_size must be a multiple of n_envs"):
        RLv3Config(n_envs=3)
