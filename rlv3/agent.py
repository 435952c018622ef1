"""The policy in torch: samples actions with their probabilities, and values observations."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from rlv3.config import RLv3Config
from rlv3.networks import PolicyNetwork, ValueNetwork

MASKED = -1e9  # a logit that has probability 0 in float32, and a finite one times 0


def masked_log_probs(logits: Tensor, masks: Tensor) -> Tensor:
    """Return log-probabilities float32[N, 6] of valid actions; masked ones are hugely negative."""
    return torch.log_softmax(logits.masked_fill(~masks, MASKED), dim=-1)


class PPOAgent:
    """Two separate networks, and the random stream that actions are drawn from.

    Args:
        stream: tells the random stream of a continued run from that of its first part.
    """

    def __init__(self, config: RLv3Config | None = None, *, stream: int = 0) -> None:
        self.config = config = config or RLv3Config()
        seeds = np.random.SeedSequence([config.seed, 0, stream]).spawn(3)
        policy_seed, value_seed = (int(s.generate_state(1)[0]) for s in seeds[:2])
        self.device = torch.device(
            "cuda"
            if config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
            else "cpu"
        )
        sizes = (config.state_dim, config.hidden_dim)
        activation = config.activation
        policy = PolicyNetwork(*sizes, config.action_dim, policy_seed, activation)
        self.policy = policy.to(self.device)
        self.value = ValueNetwork(*sizes, value_seed, activation).to(self.device)
        self._rng = np.random.default_rng(seeds[2])

    @torch.no_grad()
    def act(
        self, obs: ArrayLike, mask: ArrayLike | None = None, *, deterministic: bool = False
    ) -> tuple[int, float, float]:
        """Return an action, its log-probability and the value of one observation.

        Args:
            obs: float32[64].
            mask: bool[6], True where valid; None for all.
            deterministic: the most probable action, lowest index on ties.
        """
        row = torch.from_numpy(np.asarray(obs, dtype=np.float32)[None]).to(self.device)
        log_probs = self.policy(row)
        if mask is not None:
            valid = torch.from_numpy(np.asarray(mask, dtype=np.bool_)[None]).to(self.device)
            log_probs = log_probs.masked_fill(~valid, MASKED)
        logs: NDArray[np.float32] = torch.log_softmax(log_probs, dim=-1)[0].cpu().numpy()
        value = float(self.value(row))
        if deterministic:
            action = int(logs.argmax())
        else:
            edges = np.cumsum(np.exp(logs.astype(np.float64)))
            action = int(np.searchsorted(edges, self._rng.random() * edges[-1], side="right"))
        return action, float(logs[action]), value

    @torch.no_grad()
    def values(self, obs: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return float32[N], the values of observations float32[N, 64]."""
        return self.value(torch.from_numpy(obs).to(self.device)).cpu().numpy()

    def evaluate(
        self, obs: Tensor, actions: Tensor, masks: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-probabilities of the actions, entropies and values, each float32[N]."""
        logs = masked_log_probs(self.policy(obs), masks)
        chosen = logs.gather(-1, actions[:, None]).squeeze(-1)  # (N, 1) -> (N,)
        entropy = -(logs.exp() * logs).sum(dim=-1)
        return chosen, entropy, self.value(obs)
