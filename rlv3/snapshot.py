"""How does a killed run go on as if nothing had happened? A checkpoint holds all it depends on.

One safetensors file: weights and Adam moments of both networks as tensors; configuration, step
counts, random states, running statistics, the goal and the environments as JSON in its metadata
block. Written atomically, read without pickle. The environments are kept as the random state and
the actions of their current episodes, which are played again (`rlv3.vector`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from rlv3.config import RLv3Config
from rlv3.errors import ConfigError, PolicyError
from rlv3.policy import save_artifact, tensors_sha256
from rlv3.trainer import Goal, PPOTrainer

CHECKPOINT = "checkpoint.safetensors"
VERSION = 1
_MOMENTS = ("exp_avg", "exp_avg_sq")
_KEYS = (
    "version", "config", "steps", "episode_returns", "running_returns", "goal", "adam_steps",
    "action_rng", "shuffle_rng", "reward_scale", "obs_scale", "envs", "about", "tensors_sha256",
)  # fmt: skip


class Snapshot(NamedTuple):
    """A checkpoint that was read and checked."""

    origin: str
    config: RLv3Config
    about: dict[str, Any]
    """What the caller wanted to have kept with it."""
    state: dict[str, Any]
    tensors: dict[str, NDArray[Any]]

    def restore(self, trainer: PPOTrainer) -> None:
        """Put a new trainer, made with the same configuration, where the old one was.

        Raises:
            PolicyError: tensors of other shapes, or environments that do not replay.
        """
        for name, target in _slots(trainer):
            found = self.tensors.get(name)
            shape = "nothing" if found is None else found.shape
            if found is None or shape != tuple(target.shape):
                raise PolicyError(
                    f"{self.origin}: expected tensor {name} of shape {tuple(target.shape)}, "
                    f"found {shape}"
                )
            target.copy_(torch.from_numpy(found))
        state, agent = self.state, trainer.agent
        for optimiser, count in zip(_optimisers(trainer), state["adam_steps"], strict=True):
            for moments in optimiser.state.values():
                moments["step"].fill_(count)
        agent.rng.bit_generator.state = state["action_rng"]
        trainer.rng.bit_generator.state = state["shuffle_rng"]
        trainer.scale.load(state["reward_scale"])
        if agent.obs_scale is not None:
            agent.obs_scale.load(state["obs_scale"])
        trainer.steps = state["steps"]
        trainer.episode_returns = list(state["episode_returns"])
        trainer.running_returns = list(state["running_returns"])
        trainer.goal = None if state["goal"] is None else Goal(*state["goal"])
        trainer.env.restore(state["envs"], self.tensors["obs"])
        trainer.begun = True


def save_checkpoint(trainer: PPOTrainer, path: str | Path, about: Mapping[str, Any]) -> None:
    """Write a checkpoint, replacing the one before it atomically.

    Args:
        about: plain values to keep with it.
    Raises:
        ConfigError: nothing was trained yet, or the prices are live and cannot be replayed.
    """
    if not trainer.begun:
        raise ConfigError("expected a trainer that has made an update, found a new one")
    tensors: dict[str, NDArray[Any]] = {
        name: np.ascontiguousarray(tensor.detach().cpu().numpy())
        for name, tensor in _slots(trainer)
    }
    tensors["obs"] = trainer.env.obs
    agent = trainer.agent
    state = {
        "version": VERSION,
        "config": asdict(trainer.config),
        "steps": trainer.steps,
        "episode_returns": trainer.episode_returns,
        "running_returns": trainer.running_returns,
        "goal": trainer.goal,
        "adam_steps": [_count(optimiser) for optimiser in _optimisers(trainer)],
        "action_rng": agent.rng.bit_generator.state,
        "shuffle_rng": trainer.rng.bit_generator.state,
        "reward_scale": trainer.scale.dump(),
        "obs_scale": None if agent.obs_scale is None else agent.obs_scale.dump(),
        "envs": trainer.env.state(),
        "about": dict(about),
        "tensors_sha256": tensors_sha256(tensors),
    }
    text = json.dumps(state)
    metadata = {"rlv3_checkpoint": text, "sha256": _sha256(text)}
    save_artifact(save_tensors(tensors, metadata=metadata), path)


def read_checkpoint(path: str | Path) -> Snapshot:
    """Read and check a checkpoint.

    Raises:
        PolicyError: the file is missing, truncated, damaged, or of another version.
    """
    try:
        source = Path(path).read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise PolicyError(f"checkpoint {path} cannot be read: {reason}") from error
    try:
        tensors = load_tensors(source)
        size = int.from_bytes(source[:8], "little")
        header = json.loads(source[8 : 8 + size])
        text, digest = (header["__metadata__"][key] for key in ("rlv3_checkpoint", "sha256"))
        state = json.loads(text)
        gone = [key for key in _KEYS if key not in state]
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise PolicyError(
            f"{path} is not a checkpoint: expected a safetensors file with an rlv3_checkpoint "
            f"metadata block, found {type(error).__name__}: {error}"
        ) from error
    if gone:
        raise PolicyError(f"{path}: expected metadata {', '.join(gone)}, found none")
    if state["version"] != VERSION:
        raise PolicyError(f"{path}: expected version {VERSION}, found {state['version']}")
    for part, expected, found in (
        ("metadata", digest, _sha256(text)),
        ("tensors", state["tensors_sha256"], tensors_sha256(tensors)),
    ):
        if found != expected:
            raise PolicyError(f"{path}: expected {part} with sha256 {expected}, found {found}")
    known = set(RLv3Config.__dataclass_fields__)
    if set(state["config"]) != known:
        odd = ", ".join(sorted(set(state["config"]) ^ known))
        raise PolicyError(f"{path}: expected the settings of this version, found others: {odd}")
    return Snapshot(str(path), RLv3Config(**state["config"]), state["about"], state, tensors)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _optimisers(trainer: PPOTrainer) -> tuple[torch.optim.Adam, torch.optim.Adam]:
    return trainer.policy_optimiser, trainer.value_optimiser


def _count(optimiser: torch.optim.Adam) -> int:
    return max((int(moments["step"]) for moments in optimiser.state.values()), default=0)


def _slots(trainer: PPOTrainer) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield weights and moments by name; moments that do not exist yet begin as zeros."""
    networks = (("policy", trainer.agent.policy), ("value", trainer.agent.value))
    for (name, network), optimiser in zip(networks, _optimisers(trainer), strict=True):
        for key, parameter in network.named_parameters():
            yield f"{name}.{key}", parameter.data
            moments = optimiser.state[parameter]
            if not moments:
                moments["step"] = torch.zeros((), device=parameter.device)
                for moment in _MOMENTS:
                    moments[moment] = torch.zeros_like(parameter.data)
            for moment in _MOMENTS:
                yield f"{name}.{key}.{moment}", moments[moment]
