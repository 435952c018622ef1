"""The policy in torch: samples actions with their probabilities, and values observations."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from rlv3.config import RLv3Config
from rlv3.errors import ConfigError
from rlv3.networks import PolicyNetwork, ValueNetwork
from rlv3.scaling import ObsScale

CUDA_PAYS_FLOP = 1e9
"""Of a minibatch's passes through both networks: less is done on a CPU before CUDA's kernels start.

Starting the hundred or so small kernels of a step takes CUDA some milliseconds, whatever they
compute; `bench/bench_device.py` measures from where it pays.
"""
MASKED = -1e9  # a logit that has probability 0 in float32, and a finite one times 0


def masked_log_probs(logits: Tensor, masks: Tensor) -> Tensor:
    """Return log-probabilities float32[N, 6] of valid actions; masked ones are hugely negative."""
    return torch.log_softmax(logits.masked_fill(~masks, MASKED), dim=-1)


class PPOAgent:
    """Two separate networks, and the random stream that actions are drawn from.

    Args:
        stream: tells the random stream of a continued run from that of its first part.

    Attributes:
        obs_scale: running statistics of the observations, where `normalise_obs` asks for them.
    """

    def __init__(self, config: RLv3Config | None = None, *, stream: int = 0) -> None:
        self.config = config = config or RLv3Config()
        seeds = np.random.SeedSequence([config.seed, 0, stream]).spawn(3)
        policy_seed, value_seed = (int(s.generate_state(1)[0]) for s in seeds[:2])
        self.device = choose_device(config)
        sizes = (config.state_dim, config.hidden_dim)
        activation = config.activation
        policy = PolicyNetwork(*sizes, config.action_dim, policy_seed, activation)
        self.policy = policy.to(self.device)
        self.value = ValueNetwork(*sizes, value_seed, activation).to(self.device)
        self.obs_scale = ObsScale(config.state_dim) if config.normalise_obs else None
        self.rng = np.random.default_rng(seeds[2])

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
        row = np.asarray(obs, dtype=np.float32)[None]
        if self.obs_scale is not None:
            row = self.obs_scale.apply(row)
        masks = np.ones((1, self.config.action_dim), dtype=np.bool_)
        if mask is not None:
            masks[0] = mask
        if deterministic:
            logs = self.log_probs(row, masks)
            actions = logs.argmax(axis=1)
            chosen = logs[0, actions]
        else:
            actions, chosen = self.sample(row, masks, self.rng.random(1))
        return int(actions[0]), float(chosen[0]), float(self.values(row)[0])

    @torch.no_grad()
    def log_probs(self, obs: NDArray[np.float32], masks: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Return float32[N, 6] of scaled observations float32[N, 64]."""
        logits = self.policy(torch.from_numpy(obs).to(self.device))
        return masked_log_probs(logits, torch.from_numpy(masks).to(self.device)).cpu().numpy()

    def sample(
        self, obs: NDArray[np.float32], masks: NDArray[np.bool_], uniforms: NDArray[np.float64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return actions int[N] and their log-probabilities, one uniform number per row."""
        logs = self.log_probs(obs, masks)
        edges = np.cumsum(np.exp(logs.astype(np.float64)), axis=1)
        actions = (edges <= (uniforms * edges[:, -1])[:, None]).sum(axis=1)
        return actions, logs[np.arange(len(obs)), actions]

    @torch.no_grad()
    def values(self, obs: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return float32[N], the values of scaled observations float32[N, 64]."""
        return self.value(torch.from_numpy(obs).to(self.device)).cpu().numpy()

    def tensors(self) -> dict[str, NDArray[np.float32]]:
        """Return the weights of both networks under the artifact's names (`policy.0.weight` ...).

        Running statistics of the observations become part of the first layers: what is served takes
        observations as they come.
        """
        found = {}
        for name, network in (("policy", self.policy), ("value", self.value)):
            for key, tensor in network.state_dict().items():
                array = np.ascontiguousarray(tensor.detach().cpu().numpy())
                found[key.replace("network", name, 1)] = array.copy()
            if self.obs_scale is not None:
                weight = found[f"{name}.0.weight"] / self.obs_scale.scale
                found[f"{name}.0.bias"] -= (weight @ self.obs_scale.mean).astype(np.float32)
                found[f"{name}.0.weight"] = weight.astype(np.float32)
        return found

    def evaluate(
        self, obs: Tensor, actions: Tensor, masks: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-probabilities of the actions, entropies and values, each float32[N]."""
        logs = masked_log_probs(self.policy(obs), masks)
        chosen = logs.gather(-1, actions[:, None]).squeeze(-1)  # (N, 1) -> (N,)
        entropy = -(logs.exp() * logs).sum(dim=-1)
        return chosen, entropy, self.value(obs)


def minibatch_flop(config: RLv3Config) -> int:
    """Return the operations of a minibatch's passes through both networks, forward and back."""
    width = config.hidden_dim
    weights = 2 * width * (config.state_dim + width) + (config.action_dim + 1) * width
    return 6 * config.batch_size * weights  # forward, and backward twice


def choose_device(config: RLv3Config) -> torch.device:
    """Return the device of a configuration: auto takes CUDA where there is one and it pays.

    It does where a minibatch is large; with the seed's recipe (0.02 GFLOP) it does not.

    Raises:
        ConfigError: cuda is asked for, and there is none.
    """
    found = torch.cuda.is_available()
    if config.device == "cuda" and not found:
        raise ConfigError("device cuda: expected a CUDA device that torch can use, found none")
    pays = minibatch_flop(config) >= CUDA_PAYS_FLOP
    cuda = config.device == "cuda" or (config.device == "auto" and found and pays)
    return torch.device("cuda" if cuda else "cpu")
