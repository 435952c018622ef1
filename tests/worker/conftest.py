"""What the tests of the shell share: a proxy that loses replies, and artifacts to serve."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rlv3.features import Normaliser
from rlv3.policy import build_artifact
from tests.chaos.proxy import Proxy
from worker.embedded import RedisServer


@pytest.fixture
def proxy(redis_server: RedisServer) -> Iterator[Proxy]:
    """A proxy in front of `redis_server`."""
    between = Proxy(redis_server.url)
    yield between
    between.close()


def build_policy(seed: int, steps: int) -> bytes:
    """Return an artifact with random weights and a claimed number of training steps."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for net, head in (("policy", 6), ("value", 1)):
        for layer, fan_in, fan_out in (("0", 64, 128), ("2", 128, 128), ("4", 128, head)):
            weight = rng.normal(0.0, 0.2, (fan_out, fan_in))
            tensors[f"{net}.{layer}.weight"] = weight.astype(np.float32)
            tensors[f"{net}.{layer}.bias"] = np.zeros(fan_out, np.float32)
    return build_artifact(
        tensors,
        Normaliser(np.zeros(18), np.full(18, 0.01)),
        training={"steps": steps},
        quantiles={},
        mask_rule="design",
        step_seconds=60,
    )


@pytest.fixture(scope="session")
def policy_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact that the worker accepts."""
    path = tmp_path_factory.mktemp("policy") / "a.safetensors"
    path.write_bytes(build_policy(seed=1, steps=1))
    return path


@pytest.fixture(scope="session")
def other_policy_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another one."""
    path = tmp_path_factory.mktemp("policy") / "b.safetensors"
    path.write_bytes(build_policy(seed=2, steps=1))
    return path


@pytest.fixture(scope="session")
def untrained_policy_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose provenance shows no training."""
    path = tmp_path_factory.mktemp("policy") / "untrained.safetensors"
    path.write_bytes(build_policy(seed=1, steps=0))
    return path
