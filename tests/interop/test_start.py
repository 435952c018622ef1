"""Bad start-ups end in one sentence and the right exit code, never in a traceback."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from rlv3.features import Normaliser
from rlv3.policy import build_artifact
from worker.embedded import RedisServer


def assert_refused(program: Any, code: int, *words: str) -> None:
    """Check exit code, that one sentence says the words, and that nothing else is said."""
    assert program.wait() == code, program.said()
    said = program.said()
    assert "Traceback" not in said
    sentence = " ".join(said.split())
    assert sentence.startswith("error: "), said
    for word in words:
        assert word in sentence, said


# -- Redis ----------------------------------------------------------------------------------------


def test_nothing_listening(start: Any, lively_policy: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"redis://127.0.0.1:{probe.getsockname()[1]}/0"
        program = start("run", "--redis-url", url, "--policy", lively_policy)
        assert_refused(program, 1, url, "expected", "found", "refused")


@pytest.mark.parametrize("command", ["run", "collect", "record", "demo"])
def test_wrong_password(
    command: str, redis_server: RedisServer, start: Any, lively_policy: Path, tmp_path: Path
) -> None:
    secret = "sesame-opens"
    with RedisServer.start(redis_server.binary, options={"requirepass": "another"}) as server:
        url = server.url.replace("//", f"//:{secret}@")
        options = {
            "run": ("--policy", lively_policy),
            "collect": ("--store", tmp_path / "store"),
            "record": ("--out", tmp_path / "recording"),
            "demo": ("--out", tmp_path / "demo"),
        }
        program = start(command, "--redis-url", url, *options[command])
        assert_refused(program, 1, "expected", "found", "password")
        assert secret not in program.said()


def test_no_redis_url(start: Any, lively_policy: Path) -> None:
    program = start("run", "--redis-url", "http://localhost", "--policy", lively_policy)
    assert_refused(program, 2, "--redis-url", "redis://", "http://localhost")


# -- the artifact ---------------------------------------------------------------------------------


def artifact(steps: int) -> bytes:
    """Return a valid artifact of zeros with so many training steps."""
    tensors = {}
    for net, head in (("policy", 6), ("value", 1)):
        for layer, fan_in, fan_out in (("0", 64, 8), ("2", 8, 8), ("4", 8, head)):
            tensors[f"{net}.{layer}.weight"] = np.zeros((fan_out, fan_in), dtype=np.float32)
            tensors[f"{net}.{layer}.bias"] = np.zeros(fan_out, dtype=np.float32)
    return build_artifact(
        tensors,
        Normaliser.identity(),
        training={"steps": steps},
        quantiles={},
        mask_rule="design",
        step_seconds=60,
    )


def told(source: bytes, **facts: object) -> bytes:
    """Return the artifact with other facts about itself, as another program would write it."""
    size = int.from_bytes(source[:8], "little")
    header = json.loads(source[8 : 8 + size])
    block = {**json.loads(header["__metadata__"]["rlv3"]), **facts}
    return save(load(source), metadata={"rlv3": json.dumps(block)})


def damaged(source: bytes) -> bytes:
    """Return the artifact with one bit of a weight flipped."""
    return source[:-1] + bytes([source[-1] ^ 1])


FOREIGN_ACTIONS = ["FLAT", "LONG_SMALL", "LONG_LARGE", "SHORT_SMALL", "SHORT_LARGE", "HOLD"]

REFUSED: dict[str, tuple[Callable[[], bytes], tuple[str, ...]]] = {
    "nothing": (lambda: b"", ("not a policy artifact",)),
    "a pickle": (lambda: b"\x80\x04\x95\x10\x00\x00\x00", ("not a policy artifact",)),
    "truncated": (lambda: artifact(1)[:-100], ("not a policy artifact",)),
    "damaged": (lambda: damaged(artifact(1)), ("expected tensors with sha256", "found")),
    "foreign actions": (
        lambda: told(artifact(1), action_table=FOREIGN_ACTIONS),
        ("expected action_table", "EMERGENCY_FLATTEN", "found", "LONG_SMALL"),
    ),
    "other features": (
        lambda: told(artifact(1), feature_digest="0" * 64),
        ("expected feature_digest", "found", "0" * 64),
    ),
    "untrained": (lambda: artifact(0), ("expected a trained policy", "0 training steps")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_artifact_that_does_not_fit_is_refused(
    case: str, start: Any, tmp_path: Path, redis_server: RedisServer
) -> None:
    make, words = REFUSED[case]
    path = tmp_path / "policy.safetensors"
    path.write_bytes(make())
    program = start("run", "--redis-url", redis_server.url, "--policy", path)
    assert_refused(program, 2, "policy.safetensors", *words)


def test_an_absent_artifact(start: Any, tmp_path: Path, redis_server: RedisServer) -> None:
    path = tmp_path / "nowhere.safetensors"
    program = start("run", "--redis-url", redis_server.url, "--policy", path)
    assert_refused(program, 2, "nowhere.safetensors", "No such file")


def test_an_untrained_policy_serves_when_allowed(bus: Any, start: Any, tmp_path: Path) -> None:
    path = tmp_path / "policy.safetensors"
    path.write_bytes(artifact(0))
    worker = start("run", "--redis-url", bus.url, "--policy", path, "--allow-untrained")
    bus_alive = bus.keys.meta
    while not bus.link.exists(bus_alive):
        assert worker.process.poll() is None, worker.said()
    assert worker.stop() == 0, worker.said()


# -- options and files ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("run", "--start", "later"), ("--start", "new, oldest", "later")),
        (("run", "--inputs", "market.tocks"), ("--inputs", "market.tocks")),
        (("run", "--max-event-age", "-1"), ("--max-event-age", "-1")),
        (("demo", "--data", "nowhere.csv"), ("nowhere.csv", "cannot be read")),
    ],
)
def test_impossible_options(
    options: tuple[str, ...], words: tuple[str, ...], start: Any, tmp_path: Path
) -> None:
    out = ("--out", tmp_path / "demo") if options[0] == "demo" else ()
    assert_refused(start(*options, *out), 2, *words)
