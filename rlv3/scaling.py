"""What scales rewards and observations while training? Statistics that run along with it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

REWARD_CLIP = 10.0
CONSTANT = 1e-6
"""A deviation below this is that of a constant, which is left as it is."""


class ReturnScale:
    """Running standard deviation of the discounted return, by which rewards are divided.

    Args:
        n_envs: environments, each with a running return of its own.
    """

    def __init__(self, gamma: float, n_envs: int = 1) -> None:
        self.gamma = gamma
        self.n = 0
        self.mean = self.m2 = 0.0
        self.running = [0.0] * n_envs

    def scale(self, reward: float, ended: bool, env: int = 0) -> float:
        """Fold one reward and return it scaled, within +-10 (Welford's update)."""
        self.running[env] = running = self.gamma * self.running[env] + reward
        self.n += 1
        delta = running - self.mean
        self.mean += delta / self.n
        self.m2 += delta * (running - self.mean)
        if ended:
            self.running[env] = 0.0
        if self.m2 <= 0.0:
            return reward
        scaled = reward / (self.m2 / self.n) ** 0.5
        return min(max(scaled, -REWARD_CLIP), REWARD_CLIP)

    def dump(self) -> dict[str, Any]:
        """Return the state as plain values."""
        return {"n": self.n, "mean": self.mean, "m2": self.m2, "running": list(self.running)}

    def load(self, state: dict[str, Any]) -> None:
        """Restore a dump."""
        self.n, self.mean, self.m2 = state["n"], state["mean"], state["m2"]
        self.running = list(state["running"])


class ObsScale:
    """Running mean and deviation of every observation.

    Nothing is clipped, so that a network with the statistics folded into its first layer, which is
    what gets served, computes what was trained.
    """

    def __init__(self, dim: int) -> None:
        self.n = 0
        self.mean = np.zeros(dim)
        self.m2 = np.zeros(dim)

    @property
    def scale(self) -> NDArray[np.float64]:
        """Standard deviations; 1 for constants."""
        deviation = np.sqrt(self.m2 / max(self.n, 1))
        return np.where(deviation > CONSTANT, deviation, 1.0)

    def fold(self, obs: NDArray[np.float32]) -> None:
        """Take in observations [N, dim] (Chan's update)."""
        n = len(obs)
        mean = obs.mean(axis=0, dtype=np.float64)
        delta = mean - self.mean
        total = self.n + n
        self.mean = self.mean + delta * (n / total)
        self.m2 = self.m2 + ((obs - mean) ** 2).sum(axis=0) + delta**2 * (self.n * n / total)
        self.n = total

    def apply(self, obs: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return observations [N, dim] scaled."""
        return ((obs - self.mean) / self.scale).astype(np.float32)

    def dump(self) -> dict[str, Any]:
        """Return the state as plain values."""
        return {"n": self.n, "mean": self.mean.tolist(), "m2": self.m2.tolist()}

    def load(self, state: dict[str, Any]) -> None:
        """Restore a dump."""
        self.n, self.mean, self.m2 = state["n"], np.array(state["mean"]), np.array(state["m2"])
