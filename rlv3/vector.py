"""How do many environments step together? One after the other, in one process, in fixed arrays.

A step of a trading environment is a few microseconds, less than a message to another process takes;
what the vector saves is one pass through the policy for all of them. It calls the environments
themselves, so scalar and vector agree bit for bit.

An episode is a function of the random state it began with and of the actions taken since. That is
what `state` returns and `restore` plays again, for any environment whose only source of randomness
is its `np_random`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from rlv3.env import LiveTrack, TradingEnvV3
from rlv3.errors import ConfigError, PolicyError
from rlv3.policy import N_ACTIONS


def replicate(env: TradingEnvV3, n: int) -> list[TradingEnvV3]:
    """Return an environment and n - 1 more that share its prices and features, not its account."""
    if n > 1 and any(isinstance(track, LiveTrack) for track in env._tracks):
        raise ConfigError(f"a live feed has one reader: n_envs must be 1, was {n}")
    twins = [copy.copy(env) for _ in range(n - 1)]
    for twin in twins:
        twin._np_random = None  # each has a random stream of its own
    return [env, *twins]


class VectorEnv(gym.vector.VectorEnv[NDArray[np.float32], NDArray[np.int64], NDArray[Any]]):
    """Environments of one kind in lockstep (Gymnasium's vector API, autoreset in the same step).

    `step` and `reset` return the arrays that the next call overwrites: copy what is to stay.
    Info: `action_mask` bool[N, 6]; `_final_obs` bool[N] and `final_obs` float32[N, D], the last
    observation of every episode that ended in this step.

    Args:
        envs: environments with equal spaces, or one.
    """

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(self, envs: gym.Env[Any, Any] | Sequence[gym.Env[Any, Any]]) -> None:
        self.envs = [envs] if isinstance(envs, gym.Env) else list(envs)
        self.num_envs = n = len(self.envs)
        self.single_observation_space = self.envs[0].observation_space
        self.single_action_space = self.envs[0].action_space
        self.observation_space = batch_space(self.single_observation_space, n)
        self.action_space = batch_space(self.single_action_space, n)
        shape = self.single_observation_space.shape or ()
        self.obs = np.zeros((n, *shape), dtype=np.float32)
        self.masks = np.ones((n, N_ACTIONS), dtype=np.bool_)
        self.final_obs = np.zeros_like(self.obs)
        self.rewards = np.zeros(n)
        self.terminated = np.zeros(n, dtype=np.bool_)
        self.truncated = np.zeros(n, dtype=np.bool_)
        self._starts: list[dict[str, Any]] = [{} for _ in range(n)]
        self._actions: list[list[int]] = [[] for _ in range(n)]

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Begin an episode everywhere; a single seed gives environment i the seed + i."""
        seeds: Sequence[int | None]
        if seed is None or isinstance(seed, int):
            seeds = [None if seed is None else seed + i for i in range(self.num_envs)]
        else:
            seeds = seed
        for i in range(self.num_envs):
            self._begin(i, seeds[i], options)
        return self.obs, {"action_mask": self.masks}

    def step(
        self, actions: NDArray[np.int64]
    ) -> tuple[
        NDArray[np.float32], NDArray[Any], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]
    ]:
        """Take one step everywhere; where an episode ends, the next one begins."""
        ended = None
        for i, action in enumerate(actions.tolist()):
            obs, reward, terminated, truncated, info = self.envs[i].step(action)
            self._actions[i].append(action)
            self.rewards[i] = reward
            self.terminated[i] = terminated
            self.truncated[i] = truncated
            if terminated or truncated:
                ended = self.terminated | self.truncated
                self.final_obs[i] = obs
                self._begin(i)
            else:
                self.obs[i] = obs
                mask = info.get("action_mask")
                if mask is not None:
                    self.masks[i] = mask
        info = {"action_mask": self.masks}
        if ended is not None:
            info["final_obs"], info["_final_obs"] = self.final_obs, self.terminated | self.truncated
        return self.obs, self.rewards, self.terminated, self.truncated, info

    def _begin(self, i: int, seed: int | None = None, options: Any = None) -> None:
        """Begin an episode in environment i and note from what it can be played again."""
        env = self.envs[i]
        if seed is not None:
            self._starts[i] = {"seed": seed}
        else:
            self._starts[i] = {"rng": env.unwrapped.np_random.bit_generator.state}
        self._actions[i] = []
        obs, info = env.reset(seed=seed, options=options)
        self.obs[i] = obs
        self.masks[i] = info.get("action_mask", True)

    def state(self) -> list[dict[str, Any]]:
        """Return what every episode can be played again from, as plain values.

        Raises:
            ConfigError: prices of a live feed cannot be played again.
        """
        for env in self.envs:
            base = env.unwrapped
            if isinstance(base, TradingEnvV3) and isinstance(base._track_now, LiveTrack):
                raise ConfigError("expected prices that can be replayed, found a live feed")
        return [
            {**start, "actions": list(actions)}
            for start, actions in zip(self._starts, self._actions, strict=True)
        ]

    def restore(self, states: Sequence[Mapping[str, Any]], obs: NDArray[np.float32]) -> None:
        """Play every episode again up to where `state` was called.

        Args:
            obs: the observations of that moment; they must come out again, bit for bit.
        Raises:
            PolicyError: the environments are others, or not deterministic.
        """
        if len(states) != self.num_envs:
            raise PolicyError(f"expected {self.num_envs} environments, found {len(states)}")
        for i, state in enumerate(states):
            if "rng" in state:
                self.envs[i].unwrapped.np_random.bit_generator.state = state["rng"]
            self._begin(i, state.get("seed"))
            self._starts[i] = {k: state[k] for k in ("seed", "rng") if k in state}
            for action in state["actions"]:
                seen, _, _, _, info = self.envs[i].step(action)
                self.obs[i] = seen
                self.masks[i] = info.get("action_mask", True)
            self._actions[i] = list(state["actions"])
        if not np.array_equal(self.obs, obs):
            raise PolicyError(
                "expected the environments to replay to the checkpoint's observations, found "
                "others: other data, or an environment with randomness of its own"
            )

    def close_extras(self, **kwargs: Any) -> None:
        """Close the environments."""
        del kwargs
        for env in self.envs:
            env.close()
