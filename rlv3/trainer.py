"""How does a policy learn? PPO with a clipped objective, on one page.

Each update: collect `buffer_size` steps with the current policy, estimate advantages, then make
`n_epochs` passes in shuffled minibatches over policy and value network, each with its own Adam and
its own gradient clip. Nothing touches a global random state: the same seed gives the same weights.

The update stands here in torch, to be read; `rlv3.fast` is the same, compiled, and is used where
numba is installed. Torch's modules and optimisers hold the weights and moments of either.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rlv3.agent import PPOAgent
from rlv3.buffer import Rollout, gae
from rlv3.config import RLv3Config
from rlv3.errors import ConfigError
from rlv3.scaling import ReturnScale
from rlv3.vector import VectorEnv

ADAM_EPS = 1e-5
KL_MARGIN = 1.5
"""An update stops where the approximate KL exceeds this many times `target_kl`."""


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
    values: Tensor  # (B,)
    advantages: Tensor  # (B,)
    returns: Tensor  # (B,)

    def rows(self, index: Tensor | slice) -> Minibatch:
        """Return the chosen rows."""
        return Minibatch(*(column[index] for column in self))


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


def value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Return the mean squared error; with a clip, of the worse of the value and its clipped move.

    Source: openai/baselines ppo2; Huang et al., The 37 implementation details of PPO, 9.
    """
    errors = (values - returns).square()
    if clip:
        near = old + (values - old).clamp(-clip, clip)
        errors = torch.max(errors, (near - returns).square())
    return errors.mean()


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


class Goal(NamedTuple):
    """What a call of `train` is to reach, counted from where it began."""

    from_steps: int
    from_episodes: int
    steps: int | None
    episodes: int | None


class PPOTrainer:
    """Trains an agent; keeps the episodes going from one update to the next.

    Args:
        env: where to train: an environment, or `n_envs` of them.
        stream: tells the random streams of a continued run from those of its first part.

    Attributes:
        steps: environment steps so far, over all environments.
        episode_returns: undiscounted, unscaled return of every finished episode.
        running_return: the same of the episode that is going on in the first environment.
        goal: of the current call of `train`, None before the first.
    """

    def __init__(
        self,
        agent: PPOAgent,
        env: gym.Env[Any, Any] | Sequence[gym.Env[Any, Any]],
        config: RLv3Config | None = None,
        *,
        stream: int = 0,
    ) -> None:
        self.agent = agent
        self.config = config = config or agent.config
        self.env = VectorEnv(env)
        if self.env.num_envs != config.n_envs:
            raise ConfigError(
                f"expected n_envs = {config.n_envs} environments, found {self.env.num_envs}"
            )
        self.policy_optimiser = self._adam(agent.policy)
        self.value_optimiser = self._adam(agent.value)
        shuffle, env_seed = np.random.SeedSequence([config.seed, 1, stream]).spawn(2)
        self.rng = np.random.default_rng(shuffle)
        self._env_seeds = env_seed.generate_state(config.n_envs).tolist()
        self.scale = ReturnScale(config.gamma, config.n_envs)
        self.begun = False
        self.running_returns = [0.0] * config.n_envs
        self.steps = 0
        self.episode_returns: list[float] = []
        self.goal: Goal | None = None
        self._fast = use_numba(config, agent.device)
        self._threads = torch.get_num_threads()
        if self._fast:
            from rlv3 import fast

            fast.warm_up()

    @property
    def running_return(self) -> float:
        """Return of the episode that is going on in the first environment."""
        return self.running_returns[0]

    def _adam(self, network: nn.Module) -> torch.optim.Adam:
        return torch.optim.Adam(
            network.parameters(), lr=self.config.learning_rate, eps=ADAM_EPS, fused=True
        )

    def train(
        self,
        *,
        steps: int | None = None,
        episodes: int | None = None,
        on_update: Callable[[int, Update], bool | None] | None = None,
    ) -> list[Update]:
        """Run updates until so many steps were taken or episodes finished.

        With neither, after a restored checkpoint, the interrupted call is finished.

        Args:
            steps: rounded up to whole buffers.
            on_update: called after every update with the steps of this call so far; True stops.
        """
        if steps is not None or episodes is not None:
            self.goal = Goal(self.steps, len(self.episode_returns), steps, episodes)
        if self.goal is None or (self.goal.steps is None) == (self.goal.episodes is None):
            raise ValueError("expected either steps or episodes")
        from_steps = self.goal.from_steps
        updates: list[Update] = []
        while self.progress() < 1.0:
            updates.append(self.update())
            if on_update is not None and on_update(self.steps - from_steps, updates[-1]):
                break
        return updates

    def progress(self) -> float:
        """Return how much of the goal is reached: 1 or more when it is."""
        goal = self.goal
        if goal is None:
            return 0.0
        if goal.steps is not None:
            return (self.steps - goal.from_steps) / goal.steps
        return (len(self.episode_returns) - goal.from_episodes) / (goal.episodes or 1)

    def _scheduled(self, value: float, schedule: str) -> float:
        return value * (1.0 - self.progress()) if schedule == "linear" else value

    def update(self) -> Update:
        """Collect one buffer and learn from it."""
        started = time.perf_counter()
        config = self.config
        learning_rate = self._scheduled(config.learning_rate, config.learning_rate_schedule)
        clip_range = self._scheduled(config.clip_range, config.clip_range_schedule)
        with single_thread(), self._one_blas_thread():
            losses = self.learn(self.collect(), learning_rate, clip_range)
        seconds = time.perf_counter() - started
        return losses._replace(steps_per_s=config.buffer_size / seconds)

    def _one_blas_thread(self) -> AbstractContextManager[Any]:
        if not self._fast:
            return nullcontext()
        from rlv3 import fast

        return fast.one_blas_thread()

    def collect(self) -> Rollout:
        """Take `buffer_size` steps with the current policy and estimate their advantages.

        Rows of the rollout are in order of time, the environments of a step side by side. Values
        are computed once, after the last step.
        """
        config, env, agent = self.config, self.env, self.agent
        n = config.n_envs
        steps = config.buffer_size // n
        if not self.begun:
            env.reset(seed=self._env_seeds)
            self.begun = True
        obs = np.empty((steps, n, config.state_dim), dtype=np.float32)
        masks = np.empty((steps, n, config.action_dim), dtype=np.bool_)
        actions = np.empty((steps, n), dtype=np.int64)
        log_probs = np.empty((steps, n), dtype=np.float32)
        rewards = np.empty((steps, n))
        terminated, ended = np.empty((2, steps, n), dtype=np.bool_)
        uniforms = agent.rng.random((steps, n))
        cut_at: list[tuple[int, int]] = []
        cut_obs: list[NDArray[np.float32]] = []
        sample = self._sampler()
        for t in range(steps):
            obs[t] = self._seen(env.obs)
            masks[t] = env.masks
            actions[t], log_probs[t] = sample(obs[t], masks[t], uniforms[t])
            _, rewards[t], terminated[t], truncated, info = env.step(actions[t])
            np.logical_or(terminated[t], truncated, out=ended[t])
            if "final_obs" in info:
                for i in np.flatnonzero(truncated & ~terminated[t]).tolist():
                    cut_at.append((t, i))
                    cut_obs.append(info["final_obs"][i].copy())
        self.steps += config.buffer_size
        scaled = self._count(rewards, ended)
        values = self._values(obs.reshape(-1, config.state_dim)).reshape(steps, n)
        next_values = np.concatenate([values[1:], self._values(self._scaled(env.obs))[None]])
        if cut_at:
            at = tuple(np.array(cut_at).T)
            next_values[at] = self._values(self._scaled(np.array(cut_obs)))
        advantages = gae(
            scaled, values, next_values, terminated, ended, config.gamma, config.lambda_gae
        )
        return Rollout(
            obs.reshape(-1, config.state_dim), actions.ravel(), masks.reshape(-1, masks.shape[-1]),
            log_probs.ravel(), values.ravel(), advantages.ravel(), (advantages + values).ravel(),
        )  # fmt: skip

    def _seen(self, obs: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return observations as the networks see them; running statistics take them in first."""
        if self.agent.obs_scale is not None:
            self.agent.obs_scale.fold(obs)
        return self._scaled(obs)

    def _scaled(self, obs: NDArray[np.float32]) -> NDArray[np.float32]:
        scale = self.agent.obs_scale
        return obs if scale is None else scale.apply(obs)

    def _sampler(self) -> Callable[..., tuple[NDArray[np.int64], NDArray[np.float32]]]:
        if not self._fast:
            return self.agent.sample
        from rlv3 import fast

        return fast.Sampler(self.agent.policy.network, self.config).sample

    def _values(self, obs: NDArray[np.float32]) -> NDArray[np.float32]:
        if not self._fast:
            return self.agent.values(obs)
        from rlv3 import fast

        return fast.values(self.agent.value.network, self.config, obs)

    def _count(self, rewards: NDArray[np.float64], ended: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Add up episode returns; return the rewards that learning sees."""
        scaled = rewards.astype(np.float32)
        running, ends = self.running_returns, ended.tolist()
        for t, row in enumerate(rewards.tolist()):
            for i, reward in enumerate(row):
                end = ends[t][i]
                if self.config.normalise_rewards:
                    scaled[t, i] = self.scale.scale(reward, end, i)
                running[i] += reward
                if end:
                    self.episode_returns.append(running[i])
                    running[i] = 0.0
        return scaled

    def learn(
        self,
        rollout: Rollout,
        learning_rate: float | None = None,
        clip_range: float | None = None,
    ) -> Update:
        """Make `n_epochs` passes over a rollout in shuffled minibatches."""
        config = self.config
        learning_rate = config.learning_rate if learning_rate is None else learning_rate
        clip_range = config.clip_range if clip_range is None else clip_range
        rows = len(rollout.obs)
        orders = np.stack([self.rng.permutation(rows) for _ in range(config.n_epochs)])
        if self._fast:
            from rlv3 import fast

            facts = fast.learn(
                self.agent, (self.policy_optimiser, self.value_optimiser), rollout, orders,
                learning_rate=learning_rate, clip_range=clip_range, threads=self._threads,
            )  # fmt: skip
        else:
            facts = self._learn(rollout, orders, learning_rate, clip_range)
        variance = explained_variance(rollout.values, rollout.returns)
        policy, value, kl, clipped, entropy = facts
        return Update(policy, value, kl, clipped, variance, entropy, 0.0)

    def _learn(
        self,
        rollout: Rollout,
        orders: NDArray[np.int64],
        learning_rate: float,
        clip_range: float,
    ) -> list[float]:
        """Return losses, k3, clip fraction and entropy, averaged over minibatches."""
        config, device = self.config, self.agent.device
        for optimiser in (self.policy_optimiser, self.value_optimiser):
            optimiser.param_groups[0]["lr"] = learning_rate
        data = Minibatch(
            *(torch.from_numpy(getattr(rollout, name)).to(device) for name in Minibatch._fields)
        )
        facts: list[Tensor] = []
        for order in orders:
            shuffled = data.rows(torch.from_numpy(order).to(device))
            for start in range(0, len(order), config.batch_size):
                batch = shuffled.rows(slice(start, start + config.batch_size))
                policy, value, found = self._losses(batch, clip_range)
                facts.append(found)
                if config.target_kl and float(found[2]) > KL_MARGIN * config.target_kl:
                    return torch.stack(facts).double().mean(dim=0).tolist()
                self._step(self.policy_optimiser, self.agent.policy, policy)
                self._step(self.value_optimiser, self.agent.value, value)
        return torch.stack(facts).double().mean(dim=0).tolist()

    def _losses(self, batch: Minibatch, clip_range: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return what each network is to minimise, and losses, k3, clip fraction, entropy."""
        config = self.config
        advantages = batch.advantages
        if len(advantages) > 1:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        log_probs, entropies, values = self.agent.evaluate(batch.obs, batch.actions, batch.masks)
        policy, ratio = ppo_loss(log_probs, batch.log_probs, advantages, clip_range)
        entropy = entropies.mean()
        value = value_loss(values, batch.values, batch.returns, config.value_clip)
        with torch.no_grad():
            kl = ((ratio - 1.0) - ratio.log()).mean()
            clipped = ((ratio - 1.0).abs() > clip_range).float().mean()
            facts = torch.stack([policy, value, kl, clipped, entropy])
        return policy - config.entropy_coef * entropy, config.value_coef * value, facts

    def _step(self, optimiser: torch.optim.Adam, network: nn.Module, loss: Tensor) -> None:
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), self.config.max_grad_norm)
        optimiser.step()


def use_numba(config: RLv3Config, device: torch.device) -> bool:
    """Return whether updates are computed with numba.

    Raises:
        ConfigError: numba is asked for and not installed.
    """
    installed = all(find_spec(name) for name in ("numba", "scipy", "threadpoolctl"))
    if config.backend == "numba" and not installed:
        raise ConfigError(
            "backend numba: expected numba, scipy and threadpoolctl, found them missing: "
            "pip install 'rlv3-shadow[train]'"
        )
    return installed and config.backend != "torch" and device.type == "cpu"
