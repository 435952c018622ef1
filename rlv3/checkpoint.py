"""Production's checkpoint (`ppo_model.pt`) as an artifact: same networks, same logits.

The file is read with `weights_only=True`, so it cannot run code. It does not say what it was
trained on; its Adam step count says how many gradient steps were made, which are no environment
steps, so the artifact's provenance says 0 steps unless the caller knows better.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from warnings import catch_warnings, simplefilter

import numpy as np
import torch
from safetensors import SafetensorError
from torch import _weights_only_unpickler as unpickler

from rlv3.errors import PolicyError
from rlv3.features import N_FEATURES, OBS_DIM, STEP_SECONDS, Normaliser
from rlv3.policy import N_ACTIONS, build_artifact

HIDDEN = 128
_REFUSED = (
    RuntimeError, EOFError, ValueError, KeyError, SafetensorError,
    unpickler.UnpicklingError,  # type: ignore[attr-defined]  # pickle's own, not imported here
)  # fmt: skip
_SHAPES = {"0": (HIDDEN, OBS_DIM), "2": (HIDDEN, HIDDEN)}
_HEADS = {"policy": N_ACTIONS, "value": 1}


def import_checkpoint(path: str | Path, *, steps: int = 0) -> bytes:
    """Return the artifact of a production checkpoint, with the identity normaliser.

    Production fed raw features, so nothing is scaled.

    Args:
        steps: environment steps of training, if they are known.
    Raises:
        PolicyError: the file is missing, no such checkpoint, or has other shapes.
    """
    try:
        with catch_warnings():
            simplefilter("ignore")  # what torch says of a strange file is said below
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise PolicyError(f"checkpoint {path} cannot be read: {error.strerror}") from error
    except _REFUSED as error:
        reason = type(error).__name__
        raise PolicyError(
            f"{path}: expected a torch checkpoint of plain tensors, found a file that torch "
            f"refuses to load without running code ({reason})"
        ) from error
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for name in _HEADS:
        tensors |= _network(path, name, checkpoint)
    return build_artifact(
        tensors,
        Normaliser(np.zeros(N_FEATURES), np.ones(N_FEATURES)),
        training={
            "steps": steps,
            "seed": None,
            "reward": None,
            "env": None,
            "markets": [],
            "data_sha256": None,
            "data_end": None,
            "config": {},
            "imported_from": Path(path).name,
            "gradient_steps": _gradient_steps(checkpoint),
        },
        quantiles={},
        mask_rule="design",
        step_seconds=STEP_SECONDS,
    )


def _network(path: str | Path, name: str, checkpoint: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Return one network's tensors under the artifact's names."""
    key = f"{name}_state_dict"
    state = checkpoint.get(key) if isinstance(checkpoint, Mapping) else None
    if not isinstance(state, Mapping):
        keys = list(checkpoint) if isinstance(checkpoint, Mapping) else type(checkpoint).__name__
        raise PolicyError(f"{path}: expected a checkpoint with {key}, found {keys}")
    found = {}
    shapes = _SHAPES | {"4": (_HEADS[name], HIDDEN)}
    for layer, shape in shapes.items():
        for part, expected in (("weight", shape), ("bias", shape[:1])):
            tensor = state.get(f"network.{layer}.{part}")
            size = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else "nothing"
            if not isinstance(tensor, torch.Tensor) or size != expected:
                raise PolicyError(
                    f"{path}: expected {key} network.{layer}.{part} of shape {expected}, "
                    f"found {size}"
                )
            found[f"{name}.{layer}.{part}"] = tensor.detach().numpy().astype(np.float32)
    return found


def _gradient_steps(checkpoint: Mapping[str, Any]) -> int | None:
    """Return the step count of the policy's Adam, None where it has none."""
    optimiser = checkpoint.get("policy_optimizer_state_dict") or {}
    counts = [float(s["step"]) for s in optimiser.get("state", {}).values() if "step" in s]
    return int(max(counts)) if counts else None
