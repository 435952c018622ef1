"""Bad input on the command line: one sentence with file and place, exit 2, nothing overwritten."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from rlv3.cli import app
from rlv3.config import RLv3Config
from rlv3.errors import UserError
from rlv3.manager import RLv3Manager
from rlv3.policy import shipped_policy

MINUTES = [1_704_067_200 + 60 * k for k in range(1, 1_501)]
PRICES = (100.0 * np.exp(np.cumsum(np.random.default_rng(0).normal(0, 1e-3, 1_500)))).tolist()


def rows(prices: list[float], *, header: str = "timestamp,close") -> list[str]:
    return [header, *(f"{t},{p!r}" for t, p in zip(MINUTES, prices, strict=False))]


def changed(row: int, text: str) -> list[str]:
    lines = rows(PRICES)
    lines[row - 1] = text
    return lines


def refused(*arguments: str | Path) -> str:
    """Run a command that must be refused; return the sentence."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert isinstance(result.exception, UserError), result.output
    assert result.exception.exit_code == 2
    sentence = str(result.exception)
    assert "\n" not in sentence
    return sentence


NAN = math.nan
BAD: dict[str, tuple[list[str], str]] = {
    "no price": (rows(PRICES, header="timestamp,size"), "row 1: expected a column close, found"),
    "earlier": (changed(40, f"{MINUTES[3]},1.0"), "row 40 column timestamp: expected a later time"),
    "twice": (changed(40, f"{MINUTES[37]},1.0"), "row 40 column timestamp: expected a later time"),
    "text": (changed(7, f"{MINUTES[5]},much"), "row 7 column close: expected a price > 0, found"),
    "nan": (changed(9, f"{MINUTES[7]},nan"), "row 9 column close: expected a price > 0, found"),
    "negative": (changed(9, f"{MINUTES[7]},-4"), "row 9 column close: expected a price > 0, found"),
    "cells": (changed(12, f"{MINUTES[10]}"), "row 12: expected 2 columns (timestamp, close)"),
    "short": (rows(PRICES)[:901], "expected at least 1,032 bars to train on, an episode of"),
    "empty": ([""], "row 1: expected a column timestamp, found none"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_name_the_row_and_leave_the_run_alone(tmp_path: Path, kind: str) -> None:
    lines, message = BAD[kind]
    path, out = tmp_path / "abc_1m.csv", tmp_path / "run"
    path.write_text("\n".join(lines) + "\n")
    out.mkdir()
    artifact = out / "policy.safetensors"
    artifact.write_bytes(b"precious")
    sentence = refused("train", "--data", path, "--steps", 10, "--out", out)
    assert message in sentence
    assert sentence.startswith(str(path) if kind != "short" else "ABC")
    assert artifact.read_bytes() == b"precious"
    assert [entry.name for entry in out.iterdir()] == [artifact.name]


def truncated() -> bytes:
    return shipped_policy().read_bytes()[:5_000]


def flipped() -> bytes:
    source = bytearray(shipped_policy().read_bytes())
    source[-20] ^= 1
    return bytes(source)


class Exploit:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize(
    ("source", "message"),
    [(truncated, "expected a safetensors file"), (flipped, "expected tensors with sha256")],
)
def test_damaged_artifacts_are_refused(
    tmp_path: Path, source: Callable[[], bytes], message: str
) -> None:
    path = tmp_path / "policy.safetensors"
    path.write_bytes(source())
    for command in (("evaluate",), ("predict", "--obs", "-")):
        sentence = refused(*command, "--policy", path)
        assert str(path) in sentence
        assert message in sentence


def test_malicious_checkpoints_are_refused_and_do_not_run(tmp_path: Path) -> None:
    trace, out = tmp_path / "it ran", tmp_path / "out.safetensors"
    for name, write in (
        ("a.pt", lambda path: path.write_bytes(pickle.dumps(Exploit(trace)))),
        ("b.pt", lambda path: torch.save({"policy_state_dict": Exploit(trace)}, path)),
        ("c.pt", lambda path: path.write_bytes(b"PK\x03\x04 and then nothing")),
        ("d.safetensors", lambda path: path.write_bytes(b"\xff" * 64)),
    ):
        path = tmp_path / name
        write(path)
        assert str(path) in refused("import-checkpoint", path, "--out", out)
        assert str(path) in refused("evaluate", "--policy", path)
    assert not trace.exists()
    assert not out.exists()


def test_checkpoints_of_another_network_size_name_the_tensor(tmp_path: Path) -> None:
    path, out = tmp_path / "small.pt", tmp_path / "out.safetensors"
    state = {
        f"network.{layer}.{part}": torch.zeros(shape)
        for layer, shapes in {"0": (32, 64), "2": (32, 32), "4": (6, 32)}.items()
        for part, shape in (("weight", shapes), ("bias", shapes[:1]))
    }
    torch.save({"policy_state_dict": state, "value_state_dict": state}, path)
    assert "network.0.weight of shape (128, 64), found (32, 64)" in refused(
        "import-checkpoint", path, "--out", out
    )
    assert not out.exists()


def test_data_that_were_trained_on_are_refused_for_evaluation(tmp_path: Path) -> None:
    path = tmp_path / "abc_1m.csv"
    path.write_text("\n".join(rows(PRICES)) + "\n")
    manager = RLv3Manager(RLv3Config(buffer_size=64, n_epochs=1, max_steps_per_episode=50))
    manager.train(steps=64, price_data=path)
    policy = manager.save(tmp_path / "policy.safetensors")
    sentence = refused("evaluate", "--policy", policy, "--data", path)
    # 1,050 of 1,500 minutes were trained on
    assert "ABC: expected data after 2024-01-01T17:30:00+00:00, where the policy's" in sentence
    runner = CliRunner()
    arguments = ["evaluate", "--policy", str(policy), "--data", str(path), "--json"]
    for more in (["--allow-overlap"], ["--from", "2024-01-01T17:30:00"]):
        result = runner.invoke(app, [*arguments, *more])
        assert result.exit_code == 0, result.output
