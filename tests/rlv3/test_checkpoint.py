"""Production's checkpoint becomes an artifact with the same logits, and runs no code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rlv3.checkpoint import import_checkpoint
from rlv3.errors import PolicyError
from rlv3.features import Normaliser
from rlv3.policy import Policy


class Net(nn.Module):
    """Production's module, as far as its state dict shows it."""

    def __init__(self, head: int) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, head)
        )


def checkpoint(steps: int = 3) -> tuple[dict[str, Any], Net, Net]:
    """Return what production saves after a few Adam steps; the global random state is restored."""
    before = torch.random.get_rng_state()
    torch.manual_seed(0)
    policy, value = Net(6), Net(1)
    saved: dict[str, Any] = {}
    for name, net in (("policy", policy), ("value", value)):
        adam = torch.optim.Adam(net.parameters(), lr=3e-4)
        for _ in range(steps):
            adam.zero_grad()
            net.network(torch.randn(8, 64)).square().mean().backward()
            adam.step()
        saved[f"{name}_state_dict"] = net.state_dict()
        saved[f"{name}_optimizer_state_dict"] = adam.state_dict()
    torch.random.set_rng_state(before)
    return saved, policy, value


def test_logits_are_productions(tmp_path: Path) -> None:
    saved, policy_net, value_net = checkpoint()
    path = tmp_path / "ppo_model.pt"
    torch.save(saved, path)
    policy = Policy(import_checkpoint(path))
    obs = np.random.default_rng(0).normal(size=(30, 64)).astype(np.float32)
    with torch.no_grad():
        logits = policy_net.network(torch.from_numpy(obs)).numpy()
        values = value_net.network(torch.from_numpy(obs)).numpy()[:, 0]
    found, found_values = policy.logits_and_values(obs)
    assert np.abs(found - logits).max() < 1e-5
    assert np.abs(found_values - values).max() < 1e-5
    assert np.array_equal(policy.normaliser.scale, Normaliser.identity().scale)
    assert not policy.normaliser.mean.any()


def test_provenance_has_no_training_steps_unless_they_are_known(tmp_path: Path) -> None:
    path = tmp_path / "ppo_model.pt"
    torch.save(checkpoint(steps=10)[0], path)
    training = Policy(import_checkpoint(path)).metadata["training"]
    assert training["steps"] == 0
    assert training["gradient_steps"] == 10
    assert training["imported_from"] == "ppo_model.pt"
    assert Policy(import_checkpoint(path, steps=2_048)).trained_steps == 2_048


class Bomb:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch exploded",)


def test_code_in_a_checkpoint_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"policy_state_dict": Bomb()}, "bomb.pt")
    with pytest.raises(PolicyError, match="expected a torch checkpoint of plain tensors") as caught:
        import_checkpoint("bomb.pt")
    assert "\n" not in str(caught.value)
    assert not Path("exploded").exists()


def test_other_files_are_refused_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    saved, *_ = checkpoint()
    with pytest.raises(PolicyError, match="cannot be read: No such file"):
        import_checkpoint(path)
    for content in (b"", b"hello", b"PK\x03\x04" + b"\0" * 100):
        path.write_bytes(content)
        with pytest.raises(PolicyError, match="expected a torch checkpoint"):
            import_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(
        PolicyError, match="expected a checkpoint with policy_state_dict, found list"
    ):
        import_checkpoint(path)
    del saved["value_state_dict"]
    torch.save(saved, path)
    with pytest.raises(PolicyError, match="expected a checkpoint with value_state_dict, found"):
        import_checkpoint(path)
    saved, *_ = checkpoint()
    saved["policy_state_dict"]["network.4.weight"] = torch.zeros(5, 128)
    torch.save(saved, path)
    with pytest.raises(
        PolicyError, match=r"network.4.weight of shape \(6, 128\), found \(5, 128\)"
    ):
        import_checkpoint(path)
    del saved["policy_state_dict"]["network.4.weight"]
    torch.save(saved, path)
    with pytest.raises(PolicyError, match=r"of shape \(6, 128\), found nothing"):
        import_checkpoint(path)
