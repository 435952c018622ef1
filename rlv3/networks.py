"""The two networks: 64-128-128-6 logits and 64-128-128-1 value, ReLU or tanh, separate weights.

Parameter names are production's (`network.0`, `network.2`, `network.4`), so its checkpoints fit.
Initial weights come from a generator of their own: torch's global random state is never touched.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

HIDDEN_GAIN = math.sqrt(2.0)
POLICY_GAIN = 0.01  # near-uniform actions at the start
VALUE_GAIN = 1.0
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}


def _mlp(sizes: tuple[int, ...], head_gain: float, seed: int, activation: str) -> nn.Sequential:
    """Return linear layers with activations between them, orthogonal weights and zero biases."""
    generator = torch.Generator().manual_seed(seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the factorisation behind orthogonal weights rounds by thread count
    layers: list[nn.Module] = []
    last = len(sizes) - 2
    for i in range(last + 1):
        linear = nn.Linear(sizes[i], sizes[i + 1], device="meta").to_empty(device="cpu")
        gain = head_gain if i == last else HIDDEN_GAIN
        nn.init.orthogonal_(linear.weight, gain=gain, generator=generator)
        nn.init.zeros_(linear.bias)
        layers += [linear, ACTIVATIONS[activation]()]
    torch.set_num_threads(threads)
    return nn.Sequential(*layers[:-1])


class PolicyNetwork(nn.Module):
    """Observations float32[N, 64] to unnormalised log-probabilities float32[N, 6]."""

    def __init__(
        self,
        state_dim: int = 64,
        hidden_dim: int = 128,
        action_dim: int = 6,
        seed: int = 0,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        sizes = (state_dim, hidden_dim, hidden_dim, action_dim)
        self.network = _mlp(sizes, POLICY_GAIN, seed, activation)

    def forward(self, obs: Tensor) -> Tensor:
        """Return the logits."""
        return self.network(obs)


class ValueNetwork(nn.Module):
    """Observations float32[N, 64] to expected discounted returns float32[N]."""

    def __init__(
        self, state_dim: int = 64, hidden_dim: int = 128, seed: int = 1, activation: str = "relu"
    ) -> None:
        super().__init__()
        sizes = (state_dim, hidden_dim, hidden_dim, 1)
        self.network = _mlp(sizes, VALUE_GAIN, seed, activation)

    def forward(self, obs: Tensor) -> Tensor:
        """Return the values."""
        return self.network(obs).squeeze(-1)  # (N, 1) -> (N,): else it broadcasts against returns
