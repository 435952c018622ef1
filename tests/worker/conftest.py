"""What the tests of the shell share: servers, a proxy, artifacts to serve, workers, patience."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from rlv3.features import Normaliser
from rlv3.policy import build_artifact
from tests.chaos.proxy import Proxy
from worker.artifact import load_policy
from worker.bus import Bus
from worker.config import WorkerConfig
from worker.embedded import RedisServer
from worker.keys import Keys
from worker.logs import Log, configure
from worker.service import Worker

PATIENCE_S = 20.0


def until(condition: Callable[[], object]) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


async def met(condition: Callable[[], object]) -> None:
    """Wait for a condition while a worker runs in the same loop."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.01)


@pytest.fixture(scope="module")
def any_server() -> Iterator[RedisServer]:
    """A server of whichever version comes first, where the version makes no difference."""
    with RedisServer.start() as started:
        yield started


@pytest.fixture
def server(any_server: RedisServer) -> RedisServer:
    """The same one, clean."""
    with redis.Redis.from_url(any_server.url) as link:
        link.flushall()
    return any_server


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


# -- workers --------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def serving(config: WorkerConfig, log: Log | None = None) -> AsyncIterator[Worker]:
    """Run a worker in this loop; it drains at the end."""
    limits = config.risk_limits
    bus = Bus(
        config.source_url, config.sink_url, Keys(config.prefix), config.inputs,
        kill_switch=None if limits is None else limits.kill_switch,
    )  # fmt: skip
    worker = Worker(config, bus, load_policy(config), None, log or configure("ERROR"))
    task = asyncio.create_task(worker.run())
    try:
        yield worker
    finally:
        worker.stop()
        await asyncio.wait((task,), timeout=PATIENCE_S)
        task.cancel()
        await bus.close()
    await task


class Daemon:
    """`rlv3-worker run` in a process of its own."""

    def __init__(self, url: str, policy: Path, *flags: str) -> None:
        command = [
            sys.executable, "-c", "from worker.cli import main; main()", "run",
            "--redis-url", url, "--prefix", "t", "--policy", str(policy),
            "--rl-v2", "bus", "--start", "oldest", "--conflate-after", "off",
            "--max-event-age", "off", *flags,
        ]  # fmt: skip
        environ = {k: v for k, v in os.environ.items() if not k.startswith(("REDIS_", "RLV3_"))}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ
        )

    def end(self, how: signal.Signals | None = None) -> tuple[int, list[dict[str, Any]], str]:
        """Return exit code, log lines and stderr, after a signal if one is given."""
        if how is not None:
            self.process.send_signal(how)
        out, err = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, [json.loads(line) for line in out.splitlines()], err


@pytest.fixture
def daemon(policy_file: Path) -> Iterator[Callable[..., Daemon]]:
    """Start daemons; what still runs at the end is killed."""
    started: list[Daemon] = []

    def start(url: str, *flags: str, policy: Path = policy_file) -> Daemon:
        started.append(Daemon(url, policy, *flags))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.communicate()
