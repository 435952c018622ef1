"""A decision is rebuilt bit for bit, or a sentence says why it cannot be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import duckdb
import numpy as np
import pytest

from rlv3.errors import DataError
from rlv3.events import ACTION_TABLE
from rlv3.features import FEATURES
from rlv3.market import simulate
from rlv3.policy import Policy, shipped_policy
from rlv3.portfolio import FLAT, IN_POSITION
from shadow.backtest import backtest
from shadow.explain import Explanation, Flip, MismatchError, explain, lines
from shadow.store import StoreReader


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy.load(shipped_policy())


@pytest.fixture(scope="module")
def store(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("explain") / "store"
    backtest(policy, [simulate("regime_switching", 700, seed=5)], store_dir=directory)
    return directory


def ask(store: Path, query: str) -> list[tuple]:
    with StoreReader(store).connect() as connection:
        return connection.execute(query).fetchall()


def steps(store: Path, where: str) -> list[str]:
    query = f"SELECT decision_id FROM decisions WHERE kind = 'step' AND {where} ORDER BY event_ts"
    return [name for (name,) in ask(store, query)]


def test_every_step_comes_out_again_bit_for_bit_from_the_store_alone(store: Path) -> None:
    chosen = steps(store, "true")[::40]
    assert len(chosen) > 15
    for name in chosen:
        found = explain(name, store)  # raises where a bit differs
        assert found.source == "store"
        assert found.confidence == max(found.probabilities.values())


def test_observation_mask_and_probabilities_are_those_that_were_recorded(store: Path) -> None:
    (name, *_) = steps(store, "warm AND action_name = 'LONG'")
    found = explain(name, store)
    ((obs, probs),) = ask(
        store,
        "SELECT b.obs, d.action_probs FROM bars b JOIN decisions d "
        f"ON d.decision_id = b.step_decision_id WHERE d.decision_id = '{name}'",
    )
    assert tuple(item.seen for item in found.inputs) == tuple(obs[: len(FEATURES)])
    valid = [action for action, allowed in zip(ACTION_TABLE, FLAT, strict=True) if allowed]
    assert list(found.probabilities) == valid
    assert found.mask == "flat"
    assert found.invalid == ("REDUCE", "CLOSE", "EMERGENCY_FLATTEN")
    ranked = sorted(found.probabilities.values(), reverse=True)
    assert found.probabilities[found.runner_up or ""] == ranked[1]
    assert found.margin == ranked[0] - ranked[1]
    assert set(found.probabilities.values()) == set(probs) - {0.0}


def test_smallest_change_really_leads_to_the_other_action_and_a_bit_less_does_not(
    store: Path, policy: Policy
) -> None:
    for name in steps(store, "warm AND action_name IN ('LONG', 'SHORT')")[:5]:
        found = explain(name, store)
        flip = next(flip for flip in found.flips if flip.feature != "regime")
        index = [feature.name for feature in FEATURES].index(flip.feature)
        obs = np.array([item.seen for item in found.inputs] + [0.0] * 46, np.float32)
        assert isinstance(flip.after, float)
        seen = (flip.after - policy.normaliser.mean[index]) / policy.normaliser.scale[index]
        towards = np.sign(seen - obs[index])
        actions = {}
        for what, value in (("beyond", seen + towards * 1e-5), ("before", seen - towards * 1e-4)):
            changed = obs.copy()
            changed[index] = value
            actions[what] = ACTION_TABLE[int(policy.decide(changed[None], [FLAT])[0][0])]
        assert actions == {"beyond": flip.action, "before": found.action}
        assert flip.deviations == pytest.approx(abs(seen - float(obs[index])), abs=1e-6)
        assert found.flips == tuple(sorted(found.flips, key=lambda f: f.deviations))


def test_cold_steps_say_why_only_hold_was_valid_and_which_features_were_missing(
    store: Path,
) -> None:
    found = explain(steps(store, "NOT warm")[0], store)
    assert (found.action, found.runner_up, found.flip) == ("HOLD", None, None)
    assert found.mask == "cold and flat: no entry before the features have their history"
    assert {"price_change_5m", "volatility", "spread"} <= set(found.missing)
    assert all(item.value is None for item in found.inputs if item.name in found.missing)
    text = "\n".join(lines(found))
    assert "runner-up: none, only one action was valid" in text
    assert "missing features: price_change_1m, price_change_5m" in text


def test_in_a_position_closing_and_reducing_are_valid(store: Path) -> None:
    found = explain(steps(store, "warm AND action_name = 'CLOSE'")[0], store)
    assert found.mask == "in a position"
    assert tuple(found.probabilities) == tuple(
        name for name, valid in zip(ACTION_TABLE, IN_POSITION, strict=True) if valid
    )


def test_an_advisory_decision_asks_for_a_recording(store: Path) -> None:
    ((name,),) = ask(store, "SELECT decision_id FROM decisions WHERE kind = 'advisory' LIMIT 1")
    with pytest.raises(DataError, match=r"expected --recording, since decision .* is advisory"):
        explain(name, store)


def test_ids_that_are_no_decision_of_v3_are_refused(store: Path) -> None:
    with pytest.raises(DataError, match="found no decision with that id"):
        explain("nonsense", store)
    ((name,),) = ask(store, "SELECT decision_id FROM v2_decisions LIMIT 1")
    with pytest.raises(DataError, match=f"found that {name} is one of RL v2"):
        explain(name, store)


def test_without_its_artifact_nothing_is_explained(
    make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    policy, store = make_policy(seed=2), tmp_path / "store"
    backtest(policy, [simulate("regime_switching", 45, seed=5)], store_dir=store)
    name = steps(store, "true")[-1]
    kept = store / "artifacts" / f"{policy.digest}.safetensors"
    moved = kept.rename(tmp_path / "moved.safetensors")
    other = tmp_path / "other.safetensors"
    other.write_bytes(make_policy(seed=3).source)
    with pytest.raises(DataError, match=r"expected the artifact that decided in .* found none"):
        explain(name, store)
    with pytest.raises(DataError, match=f"expected the artifact {policy.digest[:12]}, found"):
        explain(name, store, policy=other)
    assert isinstance(explain(name, store, policy=moved), Explanation)


def test_a_row_that_was_changed_is_noticed(store: Path, tmp_path: Path) -> None:
    (name, *_) = steps(store, "warm AND action_name = 'LONG'")
    changed = tmp_path / "store"
    for path in store.rglob("*"):
        if path.is_file():
            target = changed / path.relative_to(store)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    for path in (changed / "bars").rglob("*.parquet"):
        rest = "obs[2:]"
        with duckdb.connect() as connection:
            connection.execute(
                f"COPY (SELECT * REPLACE (list_concat([obs[1] + 0.001], {rest}) AS obs) "
                f"FROM read_parquet('{path}')) TO '{path}.new' (FORMAT parquet)"
            )
        Path(f"{path}.new").replace(path)
    with pytest.raises(MismatchError, match="expected LONG with the recorded probabilities again"):
        explain(name, changed)


def test_a_switch_of_regime_is_named_as_one_change(store: Path) -> None:
    flips = [
        flip
        for name in steps(store, "warm AND action_name IN ('LONG', 'SHORT')")
        for flip in explain(name, store).flips
        if flip.feature == "regime"
    ]
    assert flips
    assert all(isinstance(flip, Flip) and flip.before != flip.after for flip in flips)
    assert {flip.unit for flip in flips} == {"label"}
