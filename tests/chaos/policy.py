"""A policy that trades all the time, so that there is much to get wrong."""

from __future__ import annotations

import numpy as np

from rlv3.features import Normaliser
from rlv3.policy import build_artifact


def lively(seed: int = 5) -> bytes:
    """Return an artifact with random weights that answers with every action."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for net, head in (("policy", 6), ("value", 1)):
        for layer, fan_in, fan_out in (("0", 64, 128), ("2", 128, 128), ("4", 128, head)):
            weight = rng.normal(0.0, np.sqrt(0.5 / fan_in), (fan_out, fan_in))
            tensors[f"{net}.{layer}.weight"] = weight.astype(np.float32)
            tensors[f"{net}.{layer}.bias"] = rng.normal(0.0, 0.5, fan_out).astype(np.float32)
    scale = np.ones(18)
    scale[[0, 1, 2, 3, 5]] = 1e-3  # returns are small: without this they would not move a logit
    return build_artifact(
        tensors,
        Normaliser(np.zeros(18), scale),
        training={"steps": 1, "seed": seed},
        quantiles={},
        mask_rule="design",
        step_seconds=60,
    )
