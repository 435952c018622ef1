"""Small policies and bus entries for the tests of the fold."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from rlv3.features import Normaliser
from rlv3.policy import Policy, build_artifact
from shadow.records import Entry


@pytest.fixture(scope="session")
def make_policy() -> Callable[..., Policy]:
    """Return a factory of policies with random weights: lively, but known by their seed."""

    def make(seed: int = 0, scale: float = 0.5) -> Policy:
        rng = np.random.default_rng(seed)
        tensors = {}
        for net, head in (("policy", 6), ("value", 1)):
            for layer, fan_in, fan_out in (("0", 64, 128), ("2", 128, 128), ("4", 128, head)):
                weight = rng.normal(0, scale * np.sqrt(2 / fan_in), (fan_out, fan_in))
                tensors[f"{net}.{layer}.weight"] = weight.astype(np.float32)
                tensors[f"{net}.{layer}.bias"] = rng.normal(0, scale, fan_out).astype(np.float32)
        scale_of = np.ones(18)
        scale_of[[0, 1, 2, 3, 5]] = 1e-3
        return Policy(
            build_artifact(
                tensors,
                Normaliser(np.zeros(18), scale_of),
                training={"steps": 1, "seed": seed},
                quantiles={},
                mask_rule="design",
                step_seconds=60,
            )
        )

    return make


@pytest.fixture(scope="session")
def bus_entry() -> Callable[..., Entry]:
    """Return a factory of entries in production's envelope, stamped at their own time."""

    def make(event_type: str, ts_ms: int, payload: dict[str, object], seq: int = 0) -> Entry:
        body = {"timestamp": ts_ms / 1000, **payload}
        fields = {
            b"event_type": event_type.encode(),
            b"payload": json.dumps(body).encode(),
            b"trace_id": b"",
            b"correlation_id": f"c-{event_type}-{ts_ms}-{seq}".encode(),
            b"source": b"market-publisher",
        }
        return Entry(f"quantum:stream:{event_type}", event_type, f"{ts_ms}-{seq}", fields)

    return make
