"""The policy artifact: one `.safetensors` file, loaded without pickle and served with numpy.

Two separate networks (policy 64-128-128-6, value 64-128-128-1) and the frozen normaliser,
with a metadata block that says what the policy was trained on. Inference always runs in blocks of
8 rows (padded), so a decision does not depend on how many neighbours it had.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from rlv3.errors import PolicyError
from rlv3.events import ACTION_TABLE
from rlv3.features import (
    CLIP,
    FEATURE_SET,
    FEATURES,
    MARKET,
    N_FEATURES,
    OBS_DIM,
    Normaliser,
    feature_digest,
    feature_row,
)
from rlv3.portfolio import FLAT, IN_POSITION

ARTIFACT_VERSION = 1
BLOCK = 8
N_ACTIONS = len(ACTION_TABLE)
ACTIVATIONS = ("relu", "tanh")
QUANTILE_LEVELS = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
SERVED_ENV = "rlv3/Trading-v3"
TP_PCT = 0.06  # production's take-profit distance, before the multiplier
_LAYERS = ("0", "2", "4")
_NETS = ("policy", "value")
_METADATA_KEYS = (
    "artifact_version", "feature_set", "feature_digest", "action_table", "mask_rule",
    "step_seconds", "network", "training", "quantiles", "tensors_sha256",
)  # fmt: skip


def shipped_policy() -> Path:
    """Return the path of the trained artifact inside the package."""
    return Path(__file__).parent / "data" / "policy.safetensors"


def tensors_sha256(tensors: Mapping[str, NDArray[Any]]) -> str:
    """Hash names, shapes and bytes of all tensors, in name order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        digest.update(f"{name}{array.dtype}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


class Policy:
    """A loaded artifact: masked probabilities, value and digest.

    Attributes:
        digest: sha256 of the artifact's bytes; identifies the policy on every decision.
        metadata: the artifact's metadata block.
        activation: relu or tanh.
        normaliser: frozen feature statistics.
        source: the artifact's bytes.
        origin: where they came from, for messages.
    """

    def __init__(self, source: bytes, origin: str = "artifact") -> None:
        metadata, tensors = _read(source, origin)
        self.source = source
        self.origin = origin
        self._tensors = tensors
        self.digest = hashlib.sha256(source).hexdigest()
        self.metadata = metadata
        self.step_seconds = int(metadata["step_seconds"])
        self.trained_steps = int(metadata["training"].get("steps", 0))
        self.normaliser = Normaliser(
            tensors["normaliser.mean"].astype(np.float64),
            tensors["normaliser.scale"].astype(np.float64),
        )
        self._scaling = list(
            zip(self.normaliser.mean.tolist(), self.normaliser.scale.tolist(), strict=True)
        )
        self.activation: str = metadata.get("activation", ACTIVATIONS[0])
        self._activate: Callable[..., Any] = np.tanh if self.activation == "tanh" else _relu
        self._nets = [_layers(tensors, net) for net in _NETS]

    @classmethod
    def load(cls, path: str | Path) -> Policy:
        """Read an artifact from a file.

        Raises:
            PolicyError: the file is missing, truncated, or does not fit this program.
        """
        try:
            source = Path(path).read_bytes()
        except OSError as error:
            reason = error.strerror or error
            raise PolicyError(f"policy file {path} cannot be read: {reason}") from error
        return cls(source, str(path))

    def check_serving(self, *, allow_untrained: bool = False) -> None:
        """Refuse what must not decide on a market: another env's policy, or an untrained one.

        Raises:
            PolicyError: one sentence with what was expected and what was found.
        """
        env = self.metadata["training"].get("env")
        if env not in (None, SERVED_ENV):
            raise PolicyError(
                f"{self.origin}: expected a policy trained on {SERVED_ENV}, found one of {env}"
            )
        if self.trained_steps == 0 and not allow_untrained:
            raise PolicyError(
                f"{self.origin}: expected a trained policy, found 0 training steps in its "
                "provenance; --allow-untrained serves it all the same"
            )

    def network_tensors(self, name: str) -> dict[str, NDArray[np.float32]]:
        """Return the tensors of network `policy` or `value`, named `0.weight`, `0.bias` …"""
        prefix = f"{name}."
        return {k.removeprefix(prefix): v for k, v in self._tensors.items() if k.startswith(prefix)}

    def logits_and_values(
        self, obs: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return logits float32[N, 6] and values float32[N] for observations float32[N, 64]."""
        logits, values = self._run(0, obs), self._run(1, obs)[:, 0]
        return logits, values

    def _run(self, net: int, obs: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return a network's outputs, computed in padded blocks."""
        n = len(obs)
        blocks = -(-n // BLOCK)
        x = np.zeros((blocks * BLOCK, OBS_DIM), dtype=np.float32)
        x[:n] = obs
        if blocks > 1:  # a stack: numpy multiplies block by block, bit for bit as one alone
            x = x.reshape(blocks, BLOCK, OBS_DIM)
        multiply = np.dot if blocks == 1 else np.matmul
        hidden, (weight, bias) = self._nets[net]
        for inner, offset in hidden:
            x = multiply(x, inner)  # (8, 64) -> (8, 128) -> (8, 128)
            x += offset
            self._activate(x, out=x)
        x = multiply(x, weight)  # (8, 128) -> (8, 6 or 1)
        x += bias
        return x.reshape(blocks * BLOCK, -1)[:n]

    def decide(
        self, obs: NDArray[np.float32], masks: Sequence[Sequence[bool]]
    ) -> tuple[NDArray[np.intp], NDArray[np.float64], NDArray[np.float32]]:
        """Return the most probable valid action (lowest index on ties), probabilities, values.

        Args:
            obs: float32[N, 64].
            masks: bool[N, 6], True where the action is valid; at least one per row.
        Returns:
            actions int[N], probabilities float64[N, 6] (0 where masked), values float32[N].
        """
        logits, values = self.logits_and_values(obs)
        if len(obs) == 1:
            action, row = _choose(logits, masks[0])
            return np.array([action]), np.array([row]), values
        valid = np.asarray(masks, dtype=bool)
        masked = np.where(valid, logits.astype(np.float64), -np.inf)
        shifted = np.exp(masked - masked.max(axis=1, keepdims=True))
        probs = shifted / shifted.sum(axis=1, keepdims=True)
        return masked.argmax(axis=1), probs, values

    def act(
        self, obs: NDArray[np.float32], mask: Sequence[bool] = (True,) * N_ACTIONS
    ) -> tuple[int, float]:
        """Return the most probable valid action of one observation float32[64], its probability.

        The same as `decide` says, without the value network.
        """
        action, probs = _choose(self._run(0, obs[None]), mask)
        return action, probs[action]

    def predict(self, obs_dict: Mapping[str, Any]) -> dict[str, Any]:
        """Decide for one observation dictionary (see `features.feature_row`).

        Valid actions follow from `position_side` (and `position_size`): flat or in a position.

        Returns:
            action, action_name, confidence (probability of the action), value, action_probs,
            missing (names of features that were not given), and production's
            tp_zone_multiplier, suggested_tp_pct and value_confidence.
        """
        raw, missing = feature_row(obs_dict)
        flat = raw[7] == 0.0 and raw[6] == 0.0
        obs = self._observe(raw, missing)
        logits, values = self.logits_and_values(obs)
        action, probs = _choose(logits, FLAT if flat else IN_POSITION)
        value = float(values[0])
        multiplier = min(max(1.0 + value / 20.0, 0.5), 1.5)
        return {
            "action": action,
            "action_name": ACTION_TABLE[action],
            "confidence": probs[action],
            "value": value,
            "action_probs": probs,
            "missing": [f.name for i, f in enumerate(FEATURES) if missing >> i & 1],
            "tp_zone_multiplier": multiplier,
            "suggested_tp_pct": TP_PCT * multiplier,
            "value_confidence": min(1.0, abs(value) / 10.0),
        }

    def _observe(self, raw: Sequence[float], missing: int) -> NDArray[np.float32]:
        """Return what `Normaliser.apply` makes of one row, in Python: quicker, and bit for bit."""
        obs = np.zeros((1, OBS_DIM), dtype=np.float32)
        row = [(x - mean) / scale for x, (mean, scale) in zip(raw, self._scaling, strict=True)]
        for i in MARKET:
            row[i] = 0.0 if missing >> i & 1 else min(max(row[i], -CLIP), CLIP)
        obs[0, :N_FEATURES] = row
        return obs


def training_quantiles(
    raw: NDArray[np.float64], missing: NDArray[np.int64]
) -> dict[str, list[float]]:
    """Return the quantiles of every feature that does not come from the account, where known."""
    found = {}
    for i, feature in enumerate(FEATURES):
        known = raw[(missing >> i) & 1 == 0, i]
        if feature.source != "account" and len(known):
            found[feature.name] = np.quantile(known, QUANTILE_LEVELS).tolist()
    return found


Layer = tuple[NDArray[np.float32], NDArray[np.float32]]
_ZERO = np.float32(0.0)


def _layers(tensors: Mapping[str, NDArray[Any]], net: str) -> tuple[list[Layer], Layer]:
    """Return weights (inputs first) and biases of the hidden layers, and of the head.

    Biases are repeated for the rows of a block: adding equal shapes is twice as quick.
    """
    *hidden, head = (
        (
            np.ascontiguousarray(tensors[f"{net}.{layer}.weight"].T),
            np.tile(tensors[f"{net}.{layer}.bias"], (BLOCK, 1)),
        )
        for layer in _LAYERS
    )
    return hidden, head


def _relu(x: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    np.maximum(x, _ZERO, out=out)


def _choose(logits: NDArray[np.float32], mask: Sequence[bool]) -> tuple[int, list[float]]:
    """Return action and probabilities of one row of logits [1, 6], bit for bit as `decide` of many.

    Six numbers are quicker in Python; only the exponentials are numpy's, whose last bits differ.
    """
    row = logits[0].tolist()
    action = -1
    for i, valid in enumerate(mask):
        if valid and (action < 0 or row[i] > row[action]):
            action = i
    top = row[action]
    shifted = [x - top if valid else -math.inf for x, valid in zip(row, mask, strict=True)]
    probs = np.exp(shifted).tolist()
    total = 0.0
    for p in probs:  # in numpy's order, which sum() of Python 3.12 has left
        total += p
    return action, [p / total for p in probs]


def build_artifact(
    tensors: Mapping[str, NDArray[np.float32]],
    normaliser: Normaliser,
    *,
    training: Mapping[str, Any],
    quantiles: Mapping[str, Sequence[float]],
    mask_rule: str,
    step_seconds: int,
    activation: str = "relu",
) -> bytes:
    """Return the artifact's bytes; the same arguments give the same bytes.

    Args:
        tensors: `policy.{0,2,4}.{weight,bias}` and `value.…`, as torch's state dict names them.
        training: steps, seed, reward, data fingerprint and end time, config.
        quantiles: per feature name, its training values at `QUANTILE_LEVELS`.
        mask_rule: "design" with action masks, "none" without.
        activation: relu or tanh.
    """
    full: dict[str, NDArray[Any]] = {k: np.ascontiguousarray(v) for k, v in tensors.items()}
    full["normaliser.mean"] = np.ascontiguousarray(normaliser.mean, dtype=np.float64)
    full["normaliser.scale"] = np.ascontiguousarray(normaliser.scale, dtype=np.float64)
    sizes = [int(full["policy.0.weight"].shape[1])]
    sizes += [int(full[f"policy.{layer}.weight"].shape[0]) for layer in _LAYERS]
    metadata = {
        "artifact_version": ARTIFACT_VERSION,
        "feature_set": FEATURE_SET,
        "feature_digest": feature_digest(),
        "action_table": list(ACTION_TABLE),
        "mask_rule": mask_rule,
        "step_seconds": step_seconds,
        "network": sizes,
        "activation": activation,
        "training": dict(training),
        "quantiles": {k: list(v) for k, v in quantiles.items()},
        "tensors_sha256": tensors_sha256(full),
    }
    # one metadata key: safetensors does not fix the order of several
    block = {"rlv3": json.dumps(metadata, sort_keys=True)}
    return save_tensors(full, metadata=block)


def save_artifact(source: bytes, path: str | Path) -> None:
    """Write an artifact atomically: temporary file beside the target, fsync, rename."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(source)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        os.replace(name, target)
    except BaseException:  # an interrupt as well must leave no half-written file
        Path(name).unlink(missing_ok=True)
        raise


def _read(source: bytes, origin: str) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Check an artifact against this program; raise PolicyError naming what differs."""
    try:
        tensors = load_tensors(source)
        size = int.from_bytes(source[:8], "little")
        header = json.loads(source[8 : 8 + size])
        metadata = json.loads(header["__metadata__"]["rlv3"])
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise PolicyError(
            f"{origin} is not a policy artifact: expected a safetensors file with an rlv3 "
            f"metadata block, found {type(error).__name__}: {error}"
        ) from error
    gone = [key for key in _METADATA_KEYS if key not in metadata]
    if gone:
        raise PolicyError(f"{origin}: expected metadata {', '.join(gone)}, found none")
    for key, expected in (
        ("artifact_version", ARTIFACT_VERSION),
        ("action_table", list(ACTION_TABLE)),
        ("feature_digest", feature_digest()),
    ):
        if metadata[key] != expected:
            raise PolicyError(f"{origin}: expected {key} {expected}, found {metadata[key]}")
    activation = metadata.get("activation", ACTIVATIONS[0])  # absent before there was a choice
    if activation not in ACTIVATIONS:
        raise PolicyError(f"{origin}: expected activation {ACTIVATIONS}, found {activation!r}")
    sizes = metadata["network"]
    shapes: dict[str, tuple[int, ...]] = {
        "normaliser.mean": (N_FEATURES,),
        "normaliser.scale": (N_FEATURES,),
    }
    for net, head in (("policy", N_ACTIONS), ("value", 1)):
        widths = [OBS_DIM, *sizes[1:-1], head]
        for layer, fan_in, fan_out in zip(_LAYERS, widths, widths[1:], strict=False):
            shapes[f"{net}.{layer}.weight"] = (fan_out, fan_in)
            shapes[f"{net}.{layer}.bias"] = (fan_out,)
    for name, shape in shapes.items():
        found = tensors[name].shape if name in tensors else "nothing"
        if found != shape:
            raise PolicyError(f"{origin}: expected tensor {name} of shape {shape}, found {found}")
    if not all(np.isfinite(array).all() for array in tensors.values()):
        raise PolicyError(f"{origin}: expected finite tensors, found NaN or infinity")
    found_sha = tensors_sha256(tensors)
    if metadata["tensors_sha256"] != found_sha:
        raise PolicyError(
            f"{origin}: expected tensors with sha256 {metadata['tensors_sha256']}, "
            f"found {found_sha}"
        )
    return metadata, tensors
