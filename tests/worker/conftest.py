"""What the tests of the shell share: a proxy that loses replies, and artifacts to serve."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from rlv3.features import Normaliser
from rlv3.policy import build_artifact
from worker.embedded import RedisServer


class Proxy:
    """Passes bytes between clients and a server, in threads.

    Attributes:
        url: where clients connect.
        lose_replies: this many of the server's next answers are swallowed and the connection cut.
        down: refuse everybody; `cut` ends those who are connected.
    """

    def __init__(self, target_url: str) -> None:
        parts = urlsplit(target_url)
        self._target = (str(parts.hostname), int(parts.port or 0))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: set[socket.socket] = set()
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"
        self.lose_replies = 0
        self.down = False
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Close every connection now."""
        for link in list(self._open):
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Stop listening and cut everybody."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self.down:
                    client.close()
                    continue
                server = socket.create_connection(self._target)
                self._open |= {client, server}
                for pair in ((client, server, False), (server, client, True)):
                    threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, replies: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                if replies and self.lose_replies:
                    self.lose_replies -= 1
                    break
                sink.sendall(data)
        for link in (source, sink):
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
        self._open.discard(source)
        source.close()


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
