"""How does a policy learn? PPO with a clipped objective, on one page.

Each update: collect `buffer_size` steps with the current policy, estimate advantages, then make
`n_epochs` passes in shuffled minibatches over policy and value network, each with its own Adam and
its own gradient clip. Nothing touches a global random state: the same seed gives the same weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rlv3.agent import PPOAgent
from rlv3.buffer import PPOBuffer, Rollout
from rlv3.config import RLv3Config

ADAM_EPS = 1e-5
REWARD_CLIP = 10.0


class Update(NamedTuple):
    """What one update measured, averaged over its minibatches."""

    policy_loss: float
    value_loss: float
    approx_kl: float
    """mean((ratio - 1) - log ratio): how far the policy moved."""
    clip_fraction: float
    """Share of samples whose ratio left 1 +- clip_range."""
    explained_variance: float
    """1 - Var(returns - values) / Var(returns), before the update."""
    entropy: float
    steps_per_s: float
    """Environment steps per second of wall time, update included."""


class Minibatch(NamedTuple):
    """The columns of a `Rollout` that learning reads, as tensors; B rows."""

    obs: Tensor  # (B, state_dim)
    actions: Tensor  # (B,)
    masks: Tensor  # (B, action_dim)
    log_probs: Tensor  # (B,)
    advantages: Tensor  # (B,)
    returns: Tensor  # (B,)

    def rows(self, index: Tensor | slice) -> Minibatch:
        """Return the chosen rows."""
        return Minibatch(*(column[index] for column in self))


class ReturnScale:
    """Running standard deviation of the discounted return, by which rewards are divided."""

    def __init__(self, gamma: float) -> None:
        self.gamma = gamma
        self.n = 0
        self.mean = self.m2 = self.running = 0.0

    def scale(self, reward: float, ended: bool) -> float:
        """Fold one reward and return it scaled, within +-10 (Welford's update)."""
        self.running = self.gamma * self.running + reward
        self.n += 1
        delta = self.running - self.mean
        self.mean += delta / self.n
        self.m2 += delta * (self.running - self.mean)
        if ended:
            self.running = 0.0
        if self.m2 <= 0.0:
            return reward
        scaled = reward / (self.m2 / self.n) ** 0.5
        return min(max(scaled, -REWARD_CLIP), REWARD_CLIP)


def ppo_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip_range: float
) -> tuple[Tensor, Tensor]:
    """Return the clipped surrogate loss and the ratios.

    L = -mean(min(ratio * A, clip(ratio, 1 - eps, 1 + eps) * A)), ratio = pi(a|s) / pi_old(a|s)

    Source: Schulman et al., arXiv:1707.06347, eq. 7.
    """
    ratio = (log_probs - old_log_probs).exp()
    clipped = ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    return -torch.min(ratio * advantages, clipped * advantages).mean(), ratio


def explained_variance(values: NDArray[Any], returns: NDArray[Any]) -> float:
    """Return 1 - Var(returns - values) / Var(returns); 0 where the returns do not vary."""
    variance = float(returns.var())
    return 0.0 if variance == 0.0 else 1.0 - float((returns - values).var()) / variance


@contextmanager
def single_thread() -> Iterator[None]:
    """Let torch compute in one thread: sums have one order, and small networks are faster."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class PPOTrainer:
    """Trains an agent in an environment; keeps the episode going from one update to the next.

    Args:
        stream: tells the random streams of a continued run from those of its first part.

    Attributes:
        steps: environment steps so far.
        episode_returns: undiscounted, unscaled return of every finished episode.
        running_return: the same of the episode that is going on.
    """

    def __init__(
        self,
        agent: PPOAgent,
        env: gym.Env[Any, Any],
        config: RLv3Config | None = None,
        *,
        stream: int = 0,
    ) -> None:
        self.agent = agent
        self.env = env
        self.config = config = config or agent.config
        self.buffer = PPOBuffer(
            config.buffer_size, config.state_dim, config.gamma, config.lambda_gae, config.action_dim
        )
        self.policy_optimiser = self._adam(agent.policy)
        self.value_optimiser = self._adam(agent.value)
        shuffle, env_seed = np.random.SeedSequence([config.seed, 1, stream]).spawn(2)
        self._rng = np.random.default_rng(shuffle)
        self._env_seed: int | None = int(env_seed.generate_state(1)[0])
        self._scale = ReturnScale(config.gamma)
        self._obs: Any = None
        self._mask: Any = None
        self.running_return = 0.0
        self.steps = 0
        self.episode_returns: list[float] = []

    def _adam(self, network: nn.Module) -> torch.optim.Adam:
        return torch.optim.Adam(
            network.parameters(), lr=self.config.learning_rate, eps=ADAM_EPS, fused=True
        )

    def train(
        self,
        *,
        steps: int | None = None,
        episodes: int | None = None,
        on_update: Callable[[int, Update], None] | None = None,
    ) -> list[Update]:
        """Run updates until so many steps were taken or episodes finished.

        Args:
            steps: rounded up to whole buffers.
            on_update: called after every update with the steps of this call so far.
        """
        if (steps is None) == (episodes is None):
            raise ValueError("expected either steps or episodes")
        steps_before, episodes_before = self.steps, len(self.episode_returns)
        updates: list[Update] = []

        def finished() -> bool:
            if steps is not None:
                return self.steps - steps_before >= steps
            return len(self.episode_returns) - episodes_before >= (episodes or 0)

        while not finished():
            updates.append(self.update())
            if on_update is not None:
                on_update(self.steps - steps_before, updates[-1])
        return updates

    def update(self) -> Update:
        """Collect one buffer and learn from it."""
        started = time.perf_counter()
        with single_thread():
            self.collect()
            losses = self.learn(self.buffer.get())
        seconds = time.perf_counter() - started
        return losses._replace(steps_per_s=self.config.buffer_size / seconds)

    def collect(self) -> None:
        """Fill the buffer with the current policy."""
        while self.buffer.ptr < self.buffer.size:
            if self._obs is None:
                self._reset()
            obs, mask = self._obs, self._mask
            action, log_prob, value = self.agent.act(obs, mask)
            self._obs, reward, terminated, truncated, info = self.env.step(action)
            self._mask = info.get("action_mask")
            ended = terminated or truncated
            scaled = self._scale.scale(float(reward), ended)
            self.buffer.store(obs, action, scaled, value, log_prob, mask)
            self.steps += 1
            self.running_return += float(reward)
            if ended or self.buffer.ptr == self.buffer.size:
                self.buffer.finish_path(0.0 if terminated else self._value_now())
            if ended:
                self.episode_returns.append(self.running_return)
                self._obs = None

    def _reset(self) -> None:
        self._obs, info = self.env.reset(seed=self._env_seed)
        self._env_seed = None  # later episodes continue the environment's own stream
        self._mask = info.get("action_mask")
        self.running_return = 0.0

    def _value_now(self) -> float:
        obs = np.asarray(self._obs, dtype=np.float32)
        return float(self.agent.values(obs[None])[0])

    def learn(self, rollout: Rollout) -> Update:
        """Make `n_epochs` passes over a rollout in shuffled minibatches."""
        config, device = self.config, self.agent.device
        data = Minibatch(
            *(torch.from_numpy(getattr(rollout, name)).to(device) for name in Minibatch._fields)
        )
        totals = np.zeros(5)
        count = 0
        for _ in range(config.n_epochs):
            order = torch.from_numpy(self._rng.permutation(len(rollout.obs))).to(device)
            shuffled = data.rows(order)
            for start in range(0, len(order), config.batch_size):
                totals += self._minibatch(shuffled.rows(slice(start, start + config.batch_size)))
                count += 1
        variance = explained_variance(rollout.values, rollout.returns)
        policy_loss, value_loss, kl, clipped, entropy = (totals / count).tolist()
        return Update(policy_loss, value_loss, kl, clipped, variance, entropy, 0.0)

    def _minibatch(self, batch: Minibatch) -> NDArray[Any]:
        """Take one gradient step of both networks; return losses, k3, clip fraction, entropy."""
        config = self.config
        advantages = batch.advantages
        if len(advantages) > 1:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        log_probs, entropies, values = self.agent.evaluate(batch.obs, batch.actions, batch.masks)
        policy_loss, ratio = ppo_loss(log_probs, batch.log_probs, advantages, config.clip_range)
        entropy = entropies.mean()
        self._step(
            self.policy_optimiser, self.agent.policy, policy_loss - config.entropy_coef * entropy
        )
        value_loss = (values - batch.returns).square().mean()
        self._step(self.value_optimiser, self.agent.value, config.value_coef * value_loss)
        with torch.no_grad():
            kl = ((ratio - 1.0) - ratio.log()).mean()
            clipped = ((ratio - 1.0).abs() > config.clip_range).float().mean()
            facts = torch.stack([policy_loss, value_loss, kl, clipped, entropy])
        return facts.cpu().numpy()

    def _step(self, optimiser: torch.optim.Adam, network: nn.Module, loss: Tensor) -> None:
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), self.config.max_grad_norm)
        optimiser.step()
