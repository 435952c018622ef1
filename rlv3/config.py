"""Hyperparameters of RL v3.

The seed's names and values win over other libraries'.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlv3.errors import ConfigError


@dataclass(frozen=True, slots=True)
class RLv3Config:
    """Everything that shapes a training run."""

    state_dim: int = 64
    """Observation width; fixed by the feature table."""
    hidden_dim: int = 128
    """Width of both hidden layers of both networks."""
    action_dim: int = 6
    """Width of the policy head; fixed by the action table."""
    activation: str = "relu"
    """relu or tanh, between the layers of both networks."""

    learning_rate: float = 3e-4
    """Adam step size of both networks."""
    gamma: float = 0.99
    """Discount per step."""
    lambda_gae: float = 0.95
    """GAE lambda."""
    clip_range: float = 0.2
    """PPO clip epsilon."""
    entropy_coef: float = 0.01
    """Weight of the entropy bonus."""
    value_coef: float = 0.5
    """Weight of the value loss (mean squared error)."""
    max_grad_norm: float = 0.5
    """Gradient norm limit, per network."""
    value_clip: float = 0.0
    """How far a value may move in one update (PPO2's value clipping); 0 is off."""
    target_kl: float = 0.0
    """The update stops at a minibatch whose approximate KL exceeds 1.5 times this; 0 is off."""
    learning_rate_schedule: str = "constant"
    """constant or linear: falls to 0 over the run."""
    clip_range_schedule: str = "constant"
    """constant or linear: falls to 0 over the run."""

    n_epochs: int = 10
    """Passes over the buffer per update."""
    batch_size: int = 64
    """Samples per minibatch."""
    buffer_size: int = 2048
    """Environment steps per update, over all environments."""
    n_envs: int = 1
    """Environments stepped together; buffer_size is shared out evenly among them."""
    normalise_obs: bool = False
    """Scale observations by their running statistics; trading has a frozen normaliser instead."""
    normalise_rewards: bool = True
    """Divide rewards by the running deviation of the discounted return."""

    max_steps_per_episode: int = 1000
    """Steps after which an episode is truncated."""
    initial_balance: float = 10_000.0
    """Starting balance and reference capital."""

    fee_bps: float = 4.0
    """Exchange fee per side in basis points."""
    half_spread_bps: float = 1.0
    """Half-spread charged per fill where no quote is known."""
    reward: str = "net_return"
    """net_return or seed."""
    use_action_masks: bool = True
    """Forbid actions that would do nothing."""
    on_opposite: str = "ignore"
    """ignore or reverse: what LONG does to a short position."""
    step_seconds: int = 60
    """Length of a bar, and of a step."""
    seed: int = 0
    """Seeds every random stream of a run."""
    device: str = "auto"
    """auto, cpu or cuda. auto: CUDA where there is one and minibatches are large enough to pay."""
    backend: str = "auto"
    """auto, numba or torch: what updates are computed with. auto: numba on a CPU that has it."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("learning_rate", 0.0, 1.0), ("gamma", 0.0, 1.0), ("lambda_gae", 0.0, 1.0),
            ("clip_range", 0.0, 1.0), ("value_clip", 0.0, math.inf), ("target_kl", 0.0, math.inf),
        ):  # fmt: skip
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"{name} must be between {low} and {high}, was {value}")
        for name in (
            "hidden_dim", "n_epochs", "batch_size", "buffer_size", "n_envs",
            "max_steps_per_episode", "step_seconds", "initial_balance",
        ):  # fmt: skip
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be > 0, was {getattr(self, name)}")
        for name, allowed in (
            ("activation", ("relu", "tanh")),
            ("reward", ("net_return", "seed")),
            ("on_opposite", ("ignore", "reverse")),
            ("device", ("auto", "cpu", "cuda")),
            ("backend", ("auto", "numba", "torch")),
            ("learning_rate_schedule", ("constant", "linear")),
            ("clip_range_schedule", ("constant", "linear")),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be one of {allowed}, was {getattr(self, name)!r}")
        for name, fixed in (("state_dim", 64), ("action_dim", 6)):
            if getattr(self, name) != fixed:
                raise ConfigError(f"{name} is fixed at {fixed}, was {getattr(self, name)}")
        if self.buffer_size % self.n_envs:
            raise ConfigError(
                f"buffer_size must be a multiple of n_envs, was {self.buffer_size} with "
                f"{self.n_envs} environments"
            )
        if self.backend == "numba" and self.device == "cuda":
            raise ConfigError("backend must be auto or torch on device cuda, was numba")
