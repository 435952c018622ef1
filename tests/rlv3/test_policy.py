"""The artifact: what is written is what is served, and everything foreign is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save

from rlv3.env import ENV_ID
from rlv3.errors import PolicyError
from rlv3.events import ACTION_TABLE
from rlv3.features import FEATURES, N_FEATURES, Normaliser
from rlv3.networks import PolicyNetwork, ValueNetwork
from rlv3.policy import (
    QUANTILE_LEVELS,
    SERVED_ENV,
    Policy,
    build_artifact,
    save_artifact,
    shipped_policy,
    tensors_sha256,
    training_quantiles,
)

Tensors = dict[str, np.ndarray]


def networks(
    seed: int = 0, hidden: int = 128, activation: str = "relu"
) -> tuple[PolicyNetwork, ValueNetwork]:
    """Networks with logits that differ: the initial head is near zero."""
    policy = PolicyNetwork(64, hidden, 6, seed, activation)
    value = ValueNetwork(64, hidden, seed + 1, activation)
    with torch.no_grad():
        policy.network[4].weight.mul_(200.0)
    return policy, value


def tensors_of(policy: PolicyNetwork, value: ValueNetwork) -> Tensors:
    found = {}
    for name, network in (("policy", policy), ("value", value)):
        for key, tensor in network.state_dict().items():
            found[key.replace("network", name)] = tensor.numpy().copy()
    return found


def artifact(tensors: Tensors | None = None, **changes: Any) -> bytes:
    arguments: dict[str, Any] = {
        "training": {"steps": 5}, "quantiles": {}, "mask_rule": "design", "step_seconds": 60,
    }  # fmt: skip
    return build_artifact(
        tensors or tensors_of(*networks()), Normaliser.identity(), **(arguments | changes)
    )


def edited(source: bytes, edit: Callable[[dict[str, Any], Tensors], None]) -> bytes:
    """Return an artifact with its metadata or tensors changed."""
    size = int.from_bytes(source[:8], "little")
    metadata = json.loads(json.loads(source[8 : 8 + size])["__metadata__"]["rlv3"])
    tensors = load(source)
    edit(metadata, tensors)
    return save(tensors, metadata={"rlv3": json.dumps(metadata)})


@pytest.mark.parametrize(("hidden", "activation"), [(128, "relu"), (64, "tanh")])
def test_logits_and_values_agree_with_torch(hidden: int, activation: str) -> None:
    policy_net, value_net = networks(hidden=hidden, activation=activation)
    tensors = tensors_of(policy_net, value_net)
    policy = Policy(artifact(tensors, activation=activation))
    assert policy.activation == activation
    obs = np.random.default_rng(0).normal(0.0, 2.0, (101, 64)).astype(np.float32)
    with torch.no_grad():
        logits = policy_net(torch.from_numpy(obs)).numpy()
        values = value_net(torch.from_numpy(obs)).numpy()
    found, found_values = policy.logits_and_values(obs)
    assert np.abs(found - logits).max() < 1e-5
    assert np.abs(found_values - values).max() < 1e-5
    assert np.ptp(logits, axis=1).min() > 0.1


def test_an_artifact_from_before_there_was_a_choice_has_relu() -> None:
    old = edited(artifact(), lambda metadata, _: metadata.pop("activation") and None)
    assert Policy(old).activation == "relu"
    strange = edited(artifact(), lambda metadata, _: metadata.update(activation="gelu"))
    with pytest.raises(PolicyError, match="found 'gelu'"):
        Policy(strange)


def test_a_decision_does_not_depend_on_its_neighbours() -> None:
    policy = Policy(artifact())
    rng = np.random.default_rng(1)
    obs = rng.normal(0.0, 2.0, (67, 64)).astype(np.float32)
    masks = rng.random((67, 6)) < 0.5
    masks[:, 0] = True
    together = policy.decide(obs, masks)
    for i in range(67):
        alone = policy.decide(obs[i : i + 1], masks[i : i + 1])
        for both, one in zip(together, alone, strict=True):
            assert np.array_equal(both[i : i + 1], one)


def test_act_says_the_same_as_decide() -> None:
    policy = Policy(artifact())
    rng = np.random.default_rng(2)
    obs = rng.normal(0.0, 2.0, (40, 64)).astype(np.float32)
    masks = rng.random((40, 6)) < 0.5
    masks[:, 4] = True
    actions, probs, _ = policy.decide(obs, masks)
    for i in range(40):
        assert policy.act(obs[i], masks[i].tolist()) == (actions[i], probs[i, actions[i]])
    assert policy.act(obs[0])[0] == policy.decide(obs[:1], [(True,) * 6])[0][0]


def test_one_row_is_normalised_bit_for_bit_as_many() -> None:
    rng = np.random.default_rng(3)
    mean, scale = np.zeros(N_FEATURES), np.ones(N_FEATURES)
    mean[:6], scale[:6] = rng.normal(size=6), rng.uniform(1e-4, 2.0, 6)
    arguments = {"training": {}, "quantiles": {}, "mask_rule": "design", "step_seconds": 60}
    policy = Policy(
        build_artifact(tensors_of(*networks()), Normaliser(mean, scale), **arguments)  # type: ignore[arg-type]
    )
    raw = rng.normal(0.0, 3.0, (200, N_FEATURES))
    missing = rng.integers(0, 1 << N_FEATURES, 200).tolist()
    many = policy.normaliser.apply(raw, missing)
    for i in range(200):
        assert policy._observe(raw[i].tolist(), missing[i]).tobytes() == many[i].tobytes()


def test_decide_takes_the_most_probable_valid_action() -> None:
    tensors = tensors_of(*networks())
    for key in tensors:
        tensors[key][:] = 0.0
    tensors["policy.4.bias"][:] = np.log([1.0, 4.0, 2.0, 1.0, 4.0, 8.0])
    policy = Policy(artifact(tensors))
    obs = np.zeros((3, 64), dtype=np.float32)
    masks = [
        (True,) * 6,
        (True, True, True, False, False, False),
        (True, True, False, False, True, False),
    ]
    actions, probs, values = policy.decide(obs, masks)
    assert actions.tolist() == [5, 1, 1]  # the lowest index of a tie
    assert probs[0] == pytest.approx([0.05, 0.2, 0.1, 0.05, 0.2, 0.4])
    assert probs[1] == pytest.approx([1 / 7, 4 / 7, 2 / 7, 0.0, 0.0, 0.0])
    assert probs[2] == pytest.approx([1 / 9, 4 / 9, 0.0, 0.0, 4 / 9, 0.0])
    assert values.tolist() == [0.0, 0.0, 0.0]


def test_predict_by_hand() -> None:
    tensors = tensors_of(*networks())
    for key in tensors:
        tensors[key][:] = 0.0
    tensors["policy.4.bias"][:] = np.log([1.0, 1.0, 2.0, 4.0, 1.0, 1.0])
    tensors["value.4.bias"][:] = 5.0
    policy = Policy(artifact(tensors))
    flat = policy.predict({"position_side": 0, "position_size": 0.0})
    assert (flat["action"], flat["action_name"]) == (2, "SHORT")
    assert flat["confidence"] == pytest.approx(0.5)
    held = policy.predict({"position_side": 1, "position_size": 0.1})
    assert (held["action_name"], held["confidence"]) == ("REDUCE", pytest.approx(4 / 7))
    # 1 + 5/20 = 1.25; 6 % * 1.25 = 7.5 %; |5| / 10
    assert flat["value"] == 5.0
    assert flat["tp_zone_multiplier"] == 1.25
    assert flat["suggested_tp_pct"] == pytest.approx(0.075)
    assert flat["value_confidence"] == 0.5
    assert "position_size" not in flat["missing"]
    assert "rsi" in flat["missing"]


def test_the_same_arguments_give_the_same_bytes() -> None:
    assert artifact() == artifact()
    assert artifact() != artifact(tensors_of(*networks(seed=3)))
    assert Policy(artifact()).digest == Policy(artifact()).digest


def test_saving_is_atomic_and_loading_finds_the_same(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "policy.safetensors"
    save_artifact(artifact(), target)
    save_artifact(artifact(), target)
    assert [p.name for p in target.parent.iterdir()] == ["policy.safetensors"]
    policy = Policy.load(target)
    assert policy.source == artifact()
    assert policy.trained_steps == 5
    assert policy.step_seconds == 60
    assert policy.metadata["action_table"] == list(ACTION_TABLE)


def change(key: str, value: Any) -> Callable[[dict[str, Any], Tensors], None]:
    def edit(metadata: dict[str, Any], tensors: Tensors) -> None:
        metadata[key] = value

    return edit


def drop_key(metadata: dict[str, Any], tensors: Tensors) -> None:
    del metadata["training"]


def reshape(metadata: dict[str, Any], tensors: Tensors) -> None:
    tensors["policy.4.weight"] = np.zeros((5, 128), dtype=np.float32)


def drop_tensor(metadata: dict[str, Any], tensors: Tensors) -> None:
    del tensors["value.2.bias"]


def poison(metadata: dict[str, Any], tensors: Tensors) -> None:
    tensors["policy.0.weight"][3, 4] = np.nan
    metadata["tensors_sha256"] = tensors_sha256(tensors)


def tamper(metadata: dict[str, Any], tensors: Tensors) -> None:
    tensors["policy.0.weight"][3, 4] += 1.0


@pytest.mark.parametrize(
    ("edit", "expected", "found"),
    [
        (change("action_table", ["FLAT", "LONG"]), "action_table", "FLAT"),
        (change("feature_digest", "0" * 64), "feature_digest", "0" * 64),
        (change("artifact_version", 99), "artifact_version 1", "99"),
        (drop_key, "training", "none"),
        (reshape, "policy.4.weight of shape (6, 128)", "(5, 128)"),
        (drop_tensor, "value.2.bias of shape (128,)", "nothing"),
        (poison, "finite tensors", "NaN"),
        (tamper, "sha256", ""),
    ],
)
def test_a_foreign_artifact_is_refused_in_one_sentence(
    edit: Callable[[dict[str, Any], Tensors], None], expected: str, found: str
) -> None:
    with pytest.raises(PolicyError) as caught:
        Policy(edited(artifact(), edit), "p.safetensors")
    message = str(caught.value)
    assert message.startswith("p.safetensors")
    assert "expected" in message
    assert "found" in message
    assert expected in message
    assert found in message
    assert "\n" not in message


@pytest.mark.parametrize("keep", [0, 5, 8, 100, 5_000, -1])
def test_a_truncated_artifact_is_refused(keep: int) -> None:
    with pytest.raises(PolicyError, match="is not a policy artifact: expected") as caught:
        Policy(artifact()[:keep])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", [b"\x80\x04]q\x00.", b"PK\x03\x04" + b"\0" * 500, b"{}" * 50])
def test_other_files_are_refused(source: bytes) -> None:
    with pytest.raises(PolicyError, match="is not a policy artifact"):
        Policy(source)


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="cannot be read: No such file or directory"):
        Policy.load(tmp_path / "none.safetensors")
    with pytest.raises(PolicyError, match="cannot be read"):
        Policy.load(tmp_path)


def test_training_quantiles_leave_out_the_account_and_what_is_missing() -> None:
    raw = np.zeros((5, N_FEATURES))
    raw[:, 0] = [1.0, 2.0, 3.0, 4.0, 99.0]
    found = training_quantiles(raw, np.array([0, 0, 0, 0, 1]))
    assert set(found) == {f.name for f in FEATURES if f.source != "account"}
    assert found["price_change_1m"][QUANTILE_LEVELS.index(0.5)] == 2.5


def test_the_shipped_policy_is_trained_and_small() -> None:
    path = shipped_policy()
    assert path.stat().st_size <= 400_000
    policy = Policy.load(path)
    training = policy.metadata["training"]
    assert policy.trained_steps >= 100_000
    assert training["reward"] == "net_return"
    assert len(training["data_sha256"]) == 64
    assert training["data_end"] is None  # synthetic
    assert policy.metadata["mask_rule"] == "design"
    assert len(policy.metadata["quantiles"]["rsi"]) == len(QUANTILE_LEVELS)


@pytest.mark.parametrize(
    ("training", "allowed", "found"),
    [
        ({"steps": 1}, False, None),
        ({"steps": 1, "env": None}, False, None),
        ({"steps": 1, "env": "rlv3/Trading-v3"}, False, None),
        ({"steps": 0}, True, None),
        ({"steps": 0}, False, "expected a trained policy, found 0 training steps"),
        ({"steps": 1, "env": "CartPole-v1"}, True, "expected a policy trained on rlv3/Trading-v3"),
    ],
)
def test_only_a_trained_policy_of_the_trading_env_may_serve(
    training: dict[str, Any], allowed: bool, found: str | None
) -> None:
    shapes = {"0": (128, 64), "2": (128, 128)}
    tensors: dict[str, Any] = {}
    for net, head in (("policy", 6), ("value", 1)):
        for layer, shape in (shapes | {"4": (head, 128)}).items():
            tensors[f"{net}.{layer}.weight"] = np.zeros(shape, np.float32)
            tensors[f"{net}.{layer}.bias"] = np.zeros(shape[0], np.float32)
    normaliser = Normaliser(np.zeros(N_FEATURES), np.ones(N_FEATURES))
    source = build_artifact(
        tensors, normaliser, training=training, quantiles={}, mask_rule="design", step_seconds=60
    )
    policy = Policy(source, "some.file")
    if found is None:
        policy.check_serving(allow_untrained=allowed)
    else:
        with pytest.raises(PolicyError, match=f"^some.file: {found}"):
            policy.check_serving(allow_untrained=allowed)


def test_the_name_of_the_served_env_is_the_env_that_exists() -> None:
    assert SERVED_ENV == ENV_ID
