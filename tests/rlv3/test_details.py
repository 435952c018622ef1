"""The details that PPO implementations get wrong: one test per row of the peers' list.

Rows are those of Huang et al., "The 37 implementation details of PPO", as far as they concern
discrete actions and separate networks, and the four faults that rlox names as the way to parity
with Stable-Baselines3. They run on the plain torch path and, where the compiled path has its own
code, on both.
"""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from rlv3.agent import PPOAgent
from rlv3.buffer import Rollout
from rlv3.config import RLv3Config
from rlv3.env import make_padded
from rlv3.features import CLIP, N_FEATURES, Normaliser
from rlv3.manager import RLv3Manager
from rlv3.policy import Policy
from rlv3.scaling import ObsScale, ReturnScale
from rlv3.trainer import PPOTrainer, Update, ppo_loss, value_loss

BOTH = pytest.mark.parametrize("backend", ["torch", "auto"])
SHAPE: dict[str, Any] = {"buffer_size": 64, "batch_size": 16, "n_epochs": 2, "hidden_dim": 16}


class Walk(gym.Env[np.ndarray, np.int64]):
    """Two observations of very different size; pays its first one; 37 steps an episode."""

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (64,), dtype=np.float32)
        self.action_space = spaces.Discrete(6)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed, options=options)
        self.t = 0
        return self._see(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        assert 0 <= action < 6
        self.t += 1
        obs = self._see()
        return obs, float(obs[0]), False, self.t == 37, {}

    def _see(self) -> np.ndarray:
        obs = np.zeros(64, dtype=np.float32)
        obs[0] = self.np_random.normal(3.0, 1.0)
        obs[1] = self.np_random.normal(-500.0, 100.0)
        return obs


def trainer(backend: str = "torch", **settings: Any) -> PPOTrainer:
    config = RLv3Config(**{**SHAPE, "backend": backend, "seed": 3, **settings})
    return PPOTrainer(PPOAgent(config), Walk() if config.n_envs == 1 else [Walk(), Walk()])


def rollout(n: int = 64, *, advantage: float | None = None, agent: PPOAgent) -> Rollout:
    """Return invented experience whose log-probabilities are the agent's own."""
    rng = np.random.default_rng(1)
    obs = rng.normal(size=(n, 64)).astype(np.float32)
    masks = np.ones((n, 6), dtype=np.bool_)
    actions, log_probs = agent.sample(obs, masks, rng.random(n))
    values = agent.values(obs)
    advantages = rng.normal(size=n).astype(np.float32)
    if advantage is not None:
        advantages = np.full(n, advantage, dtype=np.float32)
    return Rollout(obs, actions, masks, log_probs, values, advantages, advantages + values)


def weights(network: torch.nn.Module) -> np.ndarray:
    return torch.cat([p.detach().ravel() for p in network.parameters()]).numpy().copy()


@BOTH
def test_segments_have_one_length_and_episodes_go_on_across_them(backend: str) -> None:
    learner = trainer(backend)
    sizes = [len(learner.collect().obs) for _ in range(3)]
    assert sizes == [64, 64, 64]
    assert len(learner.episode_returns) == 3 * 64 // 37  # and not one per segment


def test_layers_begin_orthogonal_with_zero_biases() -> None:
    agent = PPOAgent()
    for network, head in ((agent.policy, 0.01), (agent.value, 1.0)):
        for layer, gain in ((0, math.sqrt(2)), (2, math.sqrt(2)), (4, head)):
            linear = network.network[layer]
            values = torch.linalg.svdvals(linear.weight.detach()).numpy()
            assert values == pytest.approx(np.full(len(values), gain), rel=1e-4)
            assert not linear.bias.detach().any()


@BOTH
def test_the_networks_learn_apart(backend: str) -> None:
    found = []
    for value_coef in (0.5, 50.0):
        learner = trainer(backend, value_coef=value_coef)
        learner.learn(rollout(agent=learner.agent))
        found.append(weights(learner.agent.policy))
    assert np.array_equal(*found)


def test_adam_has_the_small_epsilon_of_the_original() -> None:
    learner = trainer()
    for optimiser in (learner.policy_optimiser, learner.value_optimiser):
        group = optimiser.param_groups[0]
        assert (group["eps"], group["lr"], group["betas"]) == (1e-5, 3e-4, (0.9, 0.999))


def test_the_learning_rate_falls_linearly_and_is_never_below_zero() -> None:
    learner = trainer(learning_rate=0.1, learning_rate_schedule="linear")
    rates: list[float] = []

    def note(done: int, update: Update) -> None:
        assert done == 64 * (len(rates) + 1)
        assert update.steps_per_s > 0.0
        rates.append(learner.policy_optimiser.param_groups[0]["lr"])

    learner.train(steps=4 * 64, on_update=note)
    assert rates == pytest.approx([0.1, 0.075, 0.05, 0.025])


@BOTH
def test_targets_are_advantages_plus_values(backend: str) -> None:
    found = trainer(backend).collect()
    assert found.returns == pytest.approx(found.advantages + found.values, abs=1e-6)
    assert found.advantages.std() > 0.0


@pytest.mark.parametrize("n_envs", [1, 2])
@BOTH
def test_a_truncated_episode_is_bootstrapped_from_its_own_last_observation(
    backend: str, n_envs: int
) -> None:
    class Short(Walk):
        """Ends after two steps by a time limit; the observation counts the steps."""

        def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
            assert 0 <= action < 6
            self.t += 1
            return self._see(), 0.0, False, self.t == 2, {}

        def _see(self) -> np.ndarray:
            return np.full(64, self.t, dtype=np.float32)

    config = RLv3Config(
        **{**SHAPE, "buffer_size": 8}, backend=backend, gamma=0.5, lambda_gae=0.0, n_envs=n_envs,
        normalise_rewards=False,
    )  # fmt: skip
    agent = PPOAgent(config)
    with torch.no_grad():  # a value that tells the observations apart
        agent.value.network[4].bias.fill_(1.0)
    worth = agent.values(np.array([[t] * 64 for t in range(3)], dtype=np.float32))
    found = PPOTrainer(agent, [Short() for _ in range(n_envs)]).collect()
    # the value that follows step 1 is that of observation 2, never of the next episode's first
    first = found.returns[::n_envs][:2]
    assert first == pytest.approx([0.5 * worth[1], 0.5 * worth[2]], rel=1e-5)


def test_every_epoch_sees_every_sample_once_in_an_order_of_its_own() -> None:
    orders: list[np.ndarray] = []

    class Spy(PPOTrainer):
        def _learn(self, rollout: Rollout, order: Any, rate: float, clip: float) -> list[float]:
            orders.extend(order)
            return super()._learn(rollout, order, rate, clip)

    learner = Spy(PPOAgent(RLv3Config(**SHAPE, backend="torch")), Walk())
    learner.train(steps=2 * 64)
    assert len(orders) == 2 * 2
    assert all(sorted(order) == list(range(64)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


@BOTH
def test_advantages_are_normalised_in_every_minibatch(backend: str) -> None:
    found = []
    for scale, shift in ((1.0, 0.0), (100.0, 7.0)):
        learner = trainer(backend, entropy_coef=0.0)
        data = rollout(agent=learner.agent)
        learner.learn(data._replace(advantages=scale * data.advantages + np.float32(shift)))
        found.append(weights(learner.agent.policy))
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_no_gradient_beyond_the_clip() -> None:
    ratios = torch.tensor([0.5, 0.5, 1.5, 1.5])
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    logs = ratios.log().requires_grad_()
    ppo_loss(logs, torch.zeros(4), advantages, 0.2)[0].backward()  # type: ignore[no-untyped-call]
    # where the ratio already left the interval in the advantage's direction nothing pulls further
    assert logs.grad is not None
    assert logs.grad.tolist() == pytest.approx([-0.5 / 4, 0.0, 0.0, 1.5 / 4])


def test_values_are_clipped_only_where_asked_for() -> None:
    assert RLv3Config().value_clip == 0.0
    values, old, returns = torch.tensor([2.0]), torch.tensor([0.0]), torch.tensor([3.0])
    assert float(value_loss(values, old, returns, 0.0)) == 1.0
    # the clipped value 0.5 is farther off than 2: the worse of the two counts
    assert float(value_loss(values, old, returns, 0.5)) == 2.5**2


@BOTH
def test_entropy_is_rewarded_and_nothing_else_moves_without_advantage(backend: str) -> None:
    moved = []
    for coefficient in (0.0, 0.1):
        learner = trainer(backend, entropy_coef=coefficient)
        with torch.no_grad():
            learner.agent.policy.network[4].bias[0] = 2.0
        before = weights(learner.agent.policy)
        data = rollout(advantage=0.0, agent=learner.agent)
        first = learner.learn(data).entropy
        last = learner.learn(data).entropy
        moved.append(np.abs(weights(learner.agent.policy) - before).max())
        assert (last > first + 1e-4) == bool(coefficient)
    assert moved[0] < 1e-6
    assert moved[1] > 1e-3


def test_gradients_are_clipped_per_network() -> None:
    learner = trainer(max_grad_norm=0.5, batch_size=64, n_epochs=1)
    data = rollout(agent=learner.agent)
    learner.learn(data._replace(returns=data.returns + 1_000.0))
    norms = [
        math.hypot(*(float(p.grad.norm()) for p in network.parameters() if p.grad is not None))
        for network in (learner.agent.policy, learner.agent.value)
    ]
    assert norms[1] == pytest.approx(0.5, rel=1e-3)
    # a joint clip would have shrunk the policy's with the value's
    assert 0.01 < norms[0] <= 0.5 + 1e-6


@BOTH
def test_what_is_logged_at_the_old_policy(backend: str) -> None:
    learner = trainer(backend, batch_size=64, n_epochs=1)
    update = learner.learn(rollout(agent=learner.agent))
    assert update.approx_kl == pytest.approx(0.0, abs=1e-6)
    assert update.clip_fraction == 0.0
    assert update.entropy == pytest.approx(math.log(6), abs=1e-3)
    assert update.policy_loss == pytest.approx(0.0, abs=1e-5)  # normalised advantages sum to 0
    # k3 is never negative, whichever way the policy moved
    many = trainer(backend, learning_rate=0.01, n_epochs=8)
    assert many.learn(rollout(agent=many.agent)).approx_kl > 0.0


def test_observations_are_scaled_per_dimension() -> None:
    rng = np.random.default_rng(0)
    rows = np.zeros((4_000, 64), dtype=np.float32)
    rows[:, 0], rows[:, 1] = rng.normal(3, 1, 4_000), rng.normal(-500, 100, 4_000)
    scale = ObsScale(64)
    for part in np.split(rows, 8):
        scale.fold(part)
    seen = scale.apply(rows)
    assert seen[:, :2].mean(axis=0) == pytest.approx([0.0, 0.0], abs=1e-3)
    assert seen[:, :2].std(axis=0) == pytest.approx([1.0, 1.0], abs=1e-3)
    assert not seen[:, 2:].any()
    assert scale.mean[:2] == pytest.approx(rows[:, :2].mean(axis=0), rel=1e-5)
    raw = np.zeros((1, N_FEATURES))
    raw[0, 0] = 1e9
    assert Normaliser.identity().apply(raw, [0])[0, 0] == CLIP  # the market's, frozen and clipped


def test_rewards_are_scaled_by_the_deviation_of_the_return() -> None:
    # +1 and -1 by turns: rewards deviate by 1, discounted returns by about a half
    scale = ReturnScale(gamma=0.99)
    for k in range(10_000):
        last = scale.scale((-1.0) ** k, False)
    assert abs(last) == pytest.approx(2.0, abs=0.05)
    # 1 for ever: rewards do not deviate, and the mean is not taken off
    steady = ReturnScale(gamma=0.9)
    found = [steady.scale(1.0, False) for _ in range(10_000)]
    assert found[-1] > 0.0
    assert math.isfinite(found[-1])


@BOTH
def test_collected_log_probabilities_are_those_of_the_stored_observations(backend: str) -> None:
    learner = trainer(backend, normalise_obs=True)
    for _ in range(2):
        found = learner.collect()
        logs = learner.agent.log_probs(found.obs, found.masks)
        taken = logs[np.arange(64), found.actions]
        assert taken == pytest.approx(found.log_probs, abs=1e-5)
        assert np.abs(found.obs).max() < 70.0  # not the -500 of the environment
        assert learner.agent.values(found.obs) == pytest.approx(found.values, abs=1e-5)


def test_what_is_served_scales_as_training_did() -> None:
    config = RLv3Config(**SHAPE, normalise_obs=True)
    manager = RLv3Manager(config)
    manager.train(steps=128, env_id="CartPole-v1")
    env = make_padded("CartPole-v1")
    obs, info = env.reset(seed=1)
    policy = Policy(manager.artifact())
    for _ in range(8):
        action, _, value = manager.agent.act(obs, info["action_mask"], deterministic=True)
        served, _, values = policy.decide(obs[None], [info["action_mask"]])
        assert (int(served[0]), float(values[0])) == (action, pytest.approx(value, abs=1e-4))
        obs, _, _, _, info = env.step(action)
    env.close()


@pytest.mark.parametrize(("activation", "kind"), [("relu", torch.nn.ReLU), ("tanh", torch.nn.Tanh)])
def test_either_activation(activation: str, kind: type) -> None:
    agent = PPOAgent(RLv3Config(activation=activation))
    assert isinstance(agent.policy.network[1], kind)
    assert isinstance(agent.value.network[3], kind)
    assert RLv3Config().activation == "relu"


@BOTH
def test_an_update_stops_where_the_policy_moved_too_far(backend: str) -> None:
    def steps_taken(target_kl: float) -> float:
        learner = trainer(backend, target_kl=target_kl, learning_rate=0.01, n_epochs=10)
        learner.learn(rollout(agent=learner.agent))
        first = next(iter(learner.agent.policy.parameters()))
        return float(learner.policy_optimiser.state[first]["step"])

    assert steps_taken(0.0) == 40.0
    assert steps_taken(1e9) == 40.0
    assert 0.0 < steps_taken(1e-3) < 20.0
