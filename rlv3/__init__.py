"""RL v3: the PPO policy and all it needs. Importing it loads neither torch nor gymnasium."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "RLv3Config": "config",
    "ConfigError": "errors",
    "RLv3Manager": "manager",
    "TradingEnvV3": "env",
    "PPOBuffer": "buffer",
    "PPOAgent": "agent",
    "PPOTrainer": "trainer",
    "PolicyNetwork": "networks",
    "ValueNetwork": "networks",
    "build_feature_vector": "features",
    "compute_reward": "reward",
    "Action": "events",
    "Policy": "policy",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that serving never pays for training."""
    if name not in _HOMES:
        raise AttributeError(f"module 'rlv3' has no attribute {name!r}")
    return getattr(import_module(f"rlv3.{_HOMES[name]}"), name)
