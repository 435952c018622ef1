"""One rollout of experience, and the advantages computed from it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


def gae(
    rewards: NDArray[np.float32],
    values: NDArray[np.float32],
    next_values: NDArray[np.float32],
    terminated: NDArray[np.bool_],
    ended: NDArray[np.bool_],
    gamma: float,
    gae_lambda: float,
) -> NDArray[np.float32]:
    """Estimate advantages for one rollout (generalised advantage estimation).

    A[t] = delta[t] + gamma * gae_lambda * (1 - ended[t]) * A[t+1]
    delta[t] = rewards[t] + gamma * (1 - terminated[t]) * next_values[t] - values[t]

    Args:
        rewards: float32[T] or float32[T, N]; all arrays have this shape.
        values: of the observation that was acted on.
        next_values: of the observation that truly followed, also at a time limit.
        terminated: the episode ended for good here; nothing follows.
        ended: terminated or truncated; cuts the trace.
    Returns:
        float32 of the same shape. The value target is advantages + values.
    Raises:
        ValueError: shapes differ.
    Source: Schulman et al., arXiv:1506.02438, eq. 16.
    """
    shapes = {a.shape for a in (rewards, values, next_values, terminated, ended)}
    if len(shapes) != 1:
        raise ValueError(f"expected arrays of one shape, found {sorted(shapes)}")
    delta = rewards + gamma * np.where(terminated, 0.0, next_values) - values
    decay = gamma * gae_lambda * ~ended
    advantages = np.zeros(rewards.shape, dtype=np.float64)
    running = np.zeros(rewards.shape[1:])
    for t in range(len(rewards) - 1, -1, -1):
        running = delta[t] + decay[t] * running
        advantages[t] = running
    return advantages.astype(np.float32)


class Rollout(NamedTuple):
    """A full buffer, ready for the update; T rows."""

    obs: NDArray[np.float32]  # [T, state_dim]
    actions: NDArray[np.int64]  # [T]
    masks: NDArray[np.bool_]  # [T, action_dim]
    log_probs: NDArray[np.float32]  # [T]
    values: NDArray[np.float32]  # [T]
    advantages: NDArray[np.float32]  # [T]
    returns: NDArray[np.float32]  # [T], value targets


class PPOBuffer:
    """A fixed number of steps: `store` each, `finish_path` at every end, then `get` all of them.

    Attributes:
        ptr: steps stored so far.
        size: steps it holds.
    """

    def __init__(
        self,
        size: int,
        state_dim: int,
        gamma: float = 0.99,
        lambda_gae: float = 0.95,
        action_dim: int = 6,
    ) -> None:
        self.size = size
        self.gamma = gamma
        self.lambda_gae = lambda_gae
        self.ptr = 0
        self._path_start = 0
        self._obs = np.zeros((size, state_dim), dtype=np.float32)
        self._actions = np.zeros(size, dtype=np.int64)
        self._masks = np.ones((size, action_dim), dtype=np.bool_)
        self._rewards = np.zeros(size, dtype=np.float32)
        self._values = np.zeros(size, dtype=np.float32)
        self._log_probs = np.zeros(size, dtype=np.float32)
        self._advantages = np.zeros(size, dtype=np.float32)

    def store(
        self,
        obs: ArrayLike,
        action: int,
        reward: float,
        value: float,
        log_prob: float,
        mask: ArrayLike | None = None,
    ) -> None:
        """Append one step.

        Args:
            mask: bool[action_dim], the actions that were valid; None for all.
        Raises:
            ValueError: the buffer is full.
        """
        if self.ptr == self.size:
            raise ValueError(f"buffer is full: it holds {self.size} steps, call get() first")
        i = self.ptr
        self._obs[i] = obs
        self._actions[i] = action
        self._masks[i] = True if mask is None else mask
        self._rewards[i] = reward
        self._values[i] = value
        self._log_probs[i] = log_prob
        self.ptr = i + 1

    def finish_path(self, last_value: float = 0.0) -> None:
        """Compute the advantages of the path since the last call.

        Args:
            last_value: 0 where the episode terminated, else the value of the observation that
                followed (a time limit, or the buffer is full).
        """
        path = slice(self._path_start, self.ptr)
        n = self.ptr - self._path_start
        if n == 0:
            return
        values = self._values[path]
        ended = np.zeros(n, dtype=np.bool_)
        ended[-1] = True
        self._advantages[path] = gae(
            self._rewards[path],
            values,
            np.append(values[1:], np.float32(last_value)),
            np.zeros(n, dtype=np.bool_),  # a terminal state is a last_value of 0
            ended,
            self.gamma,
            self.lambda_gae,
        )
        self._path_start = self.ptr

    def get(self) -> Rollout:
        """Return all steps and empty the buffer.

        Raises:
            RuntimeError: the buffer is not full, or its last path is not finished.
        """
        if self.ptr < self.size:
            raise RuntimeError(
                f"expected a full buffer of {self.size} steps, found {self.ptr}: "
                f"store {self.size - self.ptr} more before get()"
            )
        if self._path_start < self.ptr:
            raise RuntimeError("expected finish_path() after the last step, before get()")
        self.ptr = self._path_start = 0
        return Rollout(
            self._obs, self._actions, self._masks, self._log_probs, self._values,
            self._advantages, self._advantages + self._values,
        )  # fmt: skip
