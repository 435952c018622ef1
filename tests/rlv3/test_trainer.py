"""PPO: the loss by hand, an environment whose answer is known, the same seed, the same weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from rlv3.agent import PPOAgent
from rlv3.config import RLv3Config
from rlv3.env import TradingEnvV3
from rlv3.market import simulate
from rlv3.networks import PolicyNetwork, ValueNetwork
from rlv3.scaling import ReturnScale
from rlv3.trainer import PPOTrainer, explained_variance, ppo_loss

SMALL = RLv3Config(
    buffer_size=256, n_epochs=4, hidden_dim=32, learning_rate=3e-3, max_steps_per_episode=64, seed=5
)


class Signpost(gym.Env[np.ndarray, np.int64]):
    """The observation says which action pays 1: 1 where it is positive, else 2; the rest pays 0.

    Action 3 would pay 5 and is masked, so whoever takes it has ignored the mask.
    """

    def __init__(self, episode: int = 16, truncated: bool = True) -> None:
        self.observation_space = spaces.Box(-1.0, 1.0, (64,), dtype=np.float32)
        self.action_space = spaces.Discrete(6)
        self.episode, self.truncated = episode, truncated
        self.masked_taken = 0
        self.seeds: list[int | None] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed, options=options)
        self.seeds.append(seed)
        self.t = 0
        return self._see(), self._info()

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        right = 1 if self.sign > 0 else 2
        reward = 5.0 if action == 3 else float(action == right)
        self.masked_taken += action == 3
        self.t += 1
        end = self.t == self.episode
        return self._see(), reward, end and not self.truncated, end and self.truncated, self._info()

    def _see(self) -> np.ndarray:
        self.sign = float(self.np_random.choice([-1.0, 1.0]))
        obs = np.zeros(64, dtype=np.float32)
        obs[7] = self.sign
        return obs

    def _info(self) -> dict:
        return {"action_mask": np.array([True, True, True, False, True, True])}


def weights(agent: PPOAgent) -> str:
    parts = [*agent.policy.parameters(), *agent.value.parameters()]
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in parts)).hexdigest()


def test_clipped_loss_by_hand() -> None:
    ratios = torch.tensor([0.5, 1.0, 1.5, 1.5])
    advantages = torch.tensor([-1.0, 2.0, 1.0, -1.0])
    loss, found = ppo_loss(ratios.log(), torch.zeros(4), advantages, 0.2)
    # min(-0.5, -0.8), 2, min(1.5, 1.2), min(-1.5, -1.2) -> -(-0.8 + 2 + 1.2 - 1.5) / 4
    assert float(loss) == pytest.approx(-0.9 / 4)
    assert found.tolist() == pytest.approx([0.5, 1.0, 1.5, 1.5])


def test_return_scale_by_hand() -> None:
    scale = ReturnScale(gamma=0.5)
    assert scale.scale(2.0, False) == 2.0  # one value has no deviation
    # running returns 2, 3: population deviation 0.5 -> 2 / 0.5
    assert scale.scale(2.0, True) == pytest.approx(4.0)
    # begins anew: 2, 3, 1: deviation sqrt(2/3)
    assert scale.scale(1.0, False) == pytest.approx(1 / (2 / 3) ** 0.5)
    assert scale.scale(1e6, False) <= 10.0
    assert scale.scale(-1e9, False) >= -10.0


def test_explained_variance_of_perfect_useless_and_constant_values() -> None:
    returns = np.array([1.0, 2.0, 3.0])
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(np.zeros(3), returns) == 0.0
    assert explained_variance(-returns, returns) == pytest.approx(-3.0)
    assert explained_variance(returns, np.ones(3)) == 0.0


def test_networks_begin_orthogonal_with_the_right_gains() -> None:
    before = torch.random.get_rng_state().clone()
    policy, value = PolicyNetwork(seed=1), ValueNetwork(seed=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert list(policy.state_dict()) == [
        f"network.{k}.{p}" for k in (0, 2, 4) for p in ("weight", "bias")
    ]
    for network, head in ((policy, 0.01), (value, 1.0)):
        for k, gain in ((0, 2**0.5), (2, 2**0.5), (4, head)):
            weight = network.network[k].weight.detach()
            assert torch.linalg.svdvals(weight).numpy() == pytest.approx(gain, rel=1e-4)
            assert not network.network[k].bias.any()
    assert sum(p.numel() for p in policy.parameters()) == 25_606
    assert sum(p.numel() for p in value.parameters()) == 24_961


def test_agent_samples_by_its_probabilities_and_never_a_masked_action() -> None:
    agent = PPOAgent(RLv3Config(seed=1))
    with torch.no_grad():
        agent.policy.network[4].bias.copy_(torch.tensor([2.0, 1.0, 0.0, 9.0, 0.0, 0.0]))
        agent.policy.network[4].weight.zero_()
    mask = np.array([True, True, True, False, False, False])
    obs = np.zeros(64, dtype=np.float32)
    drawn = [agent.act(obs, mask) for _ in range(4_000)]
    odds = np.exp([2.0, 1.0, 0.0])
    odds /= odds.sum()
    counts = np.bincount([action for action, _, _ in drawn], minlength=6) / 4_000
    assert counts[:3] == pytest.approx(odds, abs=0.03)
    assert not counts[3:].any()
    for action, log_prob, _ in drawn[:20]:
        assert log_prob == pytest.approx(np.log(odds[action]), abs=1e-5)
    assert agent.act(obs, mask, deterministic=True)[0] == 0
    assert agent.act(obs, deterministic=True)[0] == 3


def test_evaluate_agrees_with_act() -> None:
    agent = PPOAgent(RLv3Config(seed=2))
    rng = np.random.default_rng(0)
    obs = rng.normal(size=(50, 64)).astype(np.float32)
    masks = rng.random((50, 6)) < 0.5
    masks[:, 2] = True
    taken = [agent.act(o, m) for o, m in zip(obs, masks, strict=True)]
    actions = torch.tensor([a for a, _, _ in taken])
    logs, entropy, values = agent.evaluate(torch.from_numpy(obs), actions, torch.from_numpy(masks))
    assert logs.detach().numpy() == pytest.approx([lp for _, lp, _ in taken], abs=1e-5)
    assert values.detach().numpy() == pytest.approx([v for _, _, v in taken], abs=1e-5)
    bound = np.log(masks.sum(axis=1)) + 1e-5
    assert (entropy.detach().numpy() <= bound).all()
    assert torch.isfinite(entropy).all()


@pytest.mark.parametrize("truncated", [True, False])
def test_a_known_answer_is_learned(truncated: bool) -> None:
    env = Signpost(truncated=truncated)
    agent = PPOAgent(SMALL)
    trainer = PPOTrainer(agent, env)
    first = trainer.train(steps=256)[0]
    trainer.train(steps=20 * 256)
    last = trainer.train(steps=256)[0]
    assert np.mean(trainer.episode_returns[:10]) < 8.0  # of 16: chance is 3.2
    assert np.mean(trainer.episode_returns[-10:]) > 15.0
    assert env.masked_taken == 0
    for sign, right in ((1.0, 1), (-1.0, 2)):
        obs = np.zeros(64, dtype=np.float32)
        obs[7] = sign
        assert agent.act(obs, env._info()["action_mask"], deterministic=True)[0] == right
    assert last.entropy < first.entropy
    assert first.entropy == pytest.approx(np.log(5), abs=0.05)  # five valid actions


def test_metrics_of_an_update_are_sane() -> None:
    trainer = PPOTrainer(PPOAgent(SMALL), Signpost())
    updates = trainer.train(episodes=100)
    assert len(trainer.episode_returns) >= 100
    assert trainer.steps == 256 * len(updates)
    for update in updates:
        assert -1e-3 < update.approx_kl < 0.5
        assert 0.0 <= update.clip_fraction <= 1.0
        assert update.explained_variance <= 1.0
        assert update.value_loss >= 0.0
        assert update.steps_per_s > 0.0
    assert updates[-1].value_loss < updates[0].value_loss


class Constant(gym.Env[np.ndarray, np.int64]):
    """Pays 1 at every step and ends after four; the observation never changes."""

    def __init__(self, truncated: bool) -> None:
        self.observation_space = spaces.Box(-1.0, 1.0, (64,), dtype=np.float32)
        self.action_space = spaces.Discrete(6)
        self.truncated = truncated

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed, options=options)
        self.t = 0
        return np.ones(64, dtype=np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        assert 0 <= action < 6
        self.t += 1
        end = self.t == 4
        return (
            np.ones(64, dtype=np.float32),
            1.0,
            end and not self.truncated,
            end and self.truncated,
            {},
        )


@pytest.mark.parametrize(("truncated", "last"), [(True, 1.0 + 0.5 * 7.0), (False, 1.0)])
def test_a_time_limit_is_bootstrapped_and_death_is_not(truncated: bool, last: float) -> None:
    config = RLv3Config(buffer_size=8, gamma=0.5, lambda_gae=1.0, normalise_rewards=False, seed=1)
    agent = PPOAgent(config)
    with torch.no_grad():
        for parameter in agent.value.parameters():
            parameter.zero_()
        agent.value.network[4].bias.fill_(7.0)
    trainer = PPOTrainer(agent, Constant(truncated))
    returns = trainer.collect().returns
    expected = [last]
    for _ in range(3):
        expected.insert(0, 1.0 + 0.5 * expected[0])
    assert returns.tolist() == pytest.approx(expected * 2)


def run(seed: int, updates: int = 2) -> tuple[str, Sequence[float]]:
    config = RLv3Config(buffer_size=256, n_epochs=2, max_steps_per_episode=100, seed=seed)
    agent = PPOAgent(config)
    trainer = PPOTrainer(agent, TradingEnvV3(config, simulate("regime_switching", 800, seed=1)))
    trainer.train(steps=256 * updates)
    return weights(agent), trainer.episode_returns


def test_same_seed_same_weights_and_no_global_randomness() -> None:
    torch_before = torch.random.get_rng_state().clone()
    numpy_before = np.random.get_state()[1].tolist()  # noqa: NPY002 (it must not move)
    threads = torch.get_num_threads()
    first, returns = run(3)
    torch.manual_seed(99)
    second, again = run(3)
    torch.random.set_rng_state(torch_before)
    assert (first, returns) == (second, again)
    assert run(4)[0] != first
    assert torch.equal(torch.random.get_rng_state(), torch_before)
    assert np.random.get_state()[1].tolist() == numpy_before  # noqa: NPY002
    assert torch.get_num_threads() == threads


def test_environment_is_seeded_once() -> None:
    env = Signpost(episode=100)
    PPOTrainer(PPOAgent(SMALL), env).train(steps=256)
    assert env.seeds[0] is not None
    assert env.seeds[1:] == [None] * (len(env.seeds) - 1)


def test_training_needs_one_goal() -> None:
    trainer = PPOTrainer(PPOAgent(SMALL), Signpost())
    with pytest.raises(ValueError, match="either steps or episodes"):
        trainer.train()
    with pytest.raises(ValueError, match="either steps or episodes"):
        trainer.train(steps=1, episodes=1)
