from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlv3.errors import PolicyError
from rlv3.events import EntryRef, Signal
from rlv3.market import simulate
from rlv3.policy import Policy
from shadow.backtest import fold
from shadow.history import STREAMS
from shadow.history import entries as history_entries
from shadow.mapping import v2_target
from shadow.pipeline import Pipeline, Settings
from shadow.records import V2Row, decode_comparison
from shadow.rl_v2 import (
    META_ACTIONS,
    META_FILE,
    META_KEYS,
    SIZING_ACTIONS,
    SIZING_FILE,
    SIZING_KEYS,
    MetaAction,
    MetaState,
    QLearner,
    QTable,
    QTables,
    SizingAction,
    SizingState,
    Transition,
    V2Reference,
    account_health,
    equity_slope,
    market_features,
    meta_index,
    meta_reward,
    sizing_index,
    sizing_reward,
    winrate,
)
from shadow.rl_v2_train import Holding, Pupils, command, play, signal_directions, train, unseen

LN3 = math.log(3.0)


def signal(confidence: float = 0.7, regime: str | None = None) -> Signal:
    ref = EntryRef("quantum:stream:signal.generated", "signal.generated", "1-0", 1)
    return Signal(ref, "BTCUSDT", 1_000, 1, confidence, regime=regime)


# -- actions ---------------------------------------------------------------------------------------


def test_action_indices_are_a_bijection_in_the_documented_order() -> None:
    assert len(META_ACTIONS) == 60
    assert len(SIZING_ACTIONS) == 40
    assert [meta_index(*action) for action in META_ACTIONS] == list(range(60))
    assert [sizing_index(*action) for action in SIZING_ACTIONS] == list(range(40))
    assert META_ACTIONS[0] == MetaAction("dual_momentum", "lstm", 0.5)
    assert META_ACTIONS[20 * 1 + 5 * 2 + 3] == MetaAction("mean_reversion", "transformer", 1.25)
    assert META_ACTIONS[59] == MetaAction("momentum_flip", "ensemble", 1.5)
    assert SIZING_ACTIONS[8 * 2 + 3] == SizingAction(1.0, 20)
    assert SIZING_ACTIONS[39] == SizingAction(2.0, 50)


# -- state -----------------------------------------------------------------------------------------


def test_market_features_of_a_doubling_and_halving_price() -> None:
    # returns 1, -1/2, 1, -1/2, 1: mean 0.4, mean square (3 + 0.5)/5 = 0.7, var 0.7 - 0.16 = 0.54
    regime, volatility, pressure = market_features([1.0, 2.0, 1.0, 2.0, 1.0, 2.0])
    assert regime == "UNKNOWN"  # fewer than 10 prices
    assert volatility == pytest.approx(math.sqrt(0.54), abs=1e-15)
    assert pressure == 0.0  # 2 now, 2 four steps ago


def test_market_pressure_is_tanh_of_twenty_times_the_four_step_return() -> None:
    # 20 * (ln(3)/40) = ln(3)/2, and tanh(ln(3)/2) = (3 - 1)/(3 + 1) = 1/2
    closes = [100.0] * 6 + [100.0 * (1.0 + LN3 / 40)]
    assert market_features(closes)[2] == pytest.approx(0.5, abs=1e-12)
    assert market_features([*closes, closes[-1], closes[-1], closes[-1]])[2] == pytest.approx(0.5)
    assert market_features([*closes, *closes[-1:] * 4])[2] == 0.0


def test_market_features_without_history_are_the_defaults() -> None:
    assert market_features([]) == ("UNKNOWN", 0.02, 0.0)
    assert market_features([1.0, 2.0, 3.0]) == ("UNKNOWN", 0.02, 0.0)
    assert market_features([1.0, 1.0, 1.0, 1.0]) == ("UNKNOWN", 0.0, 0.0)  # volatility from 4
    assert market_features([1.0, 1.0, 1.0, 1.0, 2.0])[2] == 0.0  # pressure from 6
    assert market_features([1.0, 1.0, 1.0, 1.0, 1.0, 2.0])[2] == pytest.approx(math.tanh(20.0))
    assert market_features([1.0] * 9)[0] == "UNKNOWN"
    assert market_features([1.0] * 10)[0] == "RANGE"


@pytest.mark.parametrize(
    ("regime", "a", "b"),
    [
        # alternating returns a, b: mean (a + b)/2, std |a - b|/2
        ("TREND", 0.05, 0.01),  # mean 0.030, std 0.020
        ("TREND", -0.05, -0.01),  # falling trends count alike
        ("RANGE", 0.019, 0.001),  # mean 0.010, std 0.009
        ("RANGE", 0.06, 0.05),  # mean 0.055, std 0.005: std decides first
        ("BREAKOUT", 0.047, 0.023),  # mean 0.035, std 0.012
        ("MEAN_REVERSION", 0.037, 0.013),  # mean 0.025, std 0.012
        ("MEAN_REVERSION", 0.05, -0.05),  # mean 0.000, std 0.050
    ],
)
def test_regime_detector(regime: str, a: float, b: float) -> None:
    closes = [100.0]
    for r in [a, b] * 5:
        closes.append(closes[-1] * (1.0 + r))
    assert market_features(closes)[0] == regime


def test_winrate_needs_three_outcomes() -> None:
    assert winrate([]) == 0.5
    assert winrate([1, 1]) == 0.5
    assert winrate([1, 1, 0]) == pytest.approx(2 / 3)
    assert winrate([0] * 20) == 0.0


@pytest.mark.parametrize(
    ("equity", "health"),
    [
        ([], 0.7),
        ([100.0, 10.0], 0.7),
        ([100.0, 100.0, 100.0], 1.0),
        ([100.0, 90.0, 96.0], 1.0),  # 4 % below the peak now; the 10 % before do not count
        ([90.0, 100.0, 95.0], 0.8),
        ([90.0, 100.0, 90.0], 0.6),
        ([90.0, 100.0, 80.0], 0.4),
        ([100.0, 50.0, 10.0], 0.4),
    ],
)
def test_account_health_steps_down_with_the_drawdown(equity: list[float], health: float) -> None:
    assert account_health(equity) == health


def test_equity_slope_is_the_least_squares_slope_over_the_mean() -> None:
    assert equity_slope([1.0, 2.0, 3.0, 4.0]) == 0.0  # fewer than 5 points
    assert equity_slope([10.0, 12.0, 14.0, 16.0, 18.0]) == pytest.approx(2.0 / 14.0)
    # x - 2 = -2 -1 0 1 2 against 100 100 130 100 120: (-200 - 100 + 100 + 240)/10 = 4; mean 110
    assert equity_slope([100.0, 100.0, 130.0, 100.0, 120.0]) == pytest.approx(4.0 / 110.0)
    # a mean below 1 divides by 1
    assert equity_slope([0.1, 0.2, 0.3, 0.4, 0.5]) == pytest.approx(0.1)


@given(st.lists(st.floats(5_000, 15_000), min_size=5, max_size=30))
def test_equity_slope_agrees_with_polyfit(equity: list[float]) -> None:
    slope = np.polyfit(np.arange(len(equity)), equity, 1)[0] / np.mean(equity)
    assert equity_slope(equity) == pytest.approx(slope, abs=1e-9)


def test_keys_are_productions_to_the_letter() -> None:
    state = MetaState("RANGE", 0.00449, -0.004, 0.7, 2 / 3, 1.0)
    assert state.key() == (
        '{"account_health": 1.0, "confidence": 0.7, "market_pressure": -0.0, '
        '"previous_winrate": 0.67, "regime": "RANGE", "volatility": 0.0}'
    )
    assert SizingState(0.7, 0.1, 0.5, 0.02, -0.006).key() == (
        '{"equity_curve_slope": -0.01, "portfolio_exposure": 0.1, "recent_winrate": 0.5, '
        '"signal_confidence": 0.7, "volatility": 0.02}'
    )
    assert META_KEYS[0] == '{"model": "lstm", "strategy": "dual_momentum", "weight": 0.5}'
    assert SIZING_KEYS[39] == '{"leverage": 50, "size_multiplier": 2.0}'


@given(st.text(), st.tuples(*[st.floats(-5, 5)] * 5))
def test_state_key_equals_the_documented_rule(
    regime: str, numbers: tuple[float, float, float, float, float]
) -> None:
    state = MetaState(regime, *numbers)
    rounded = {
        name: value if isinstance(value, str) else round(value, 2)
        for name, value in state._asdict().items()
    }
    assert state.key() == json.dumps(rounded, sort_keys=True)
    sizing = SizingState(*numbers)
    rounded = {name: round(value, 2) for name, value in sizing._asdict().items()}
    assert sizing.key() == json.dumps(rounded, sort_keys=True)


# -- rewards ---------------------------------------------------------------------------------------


def test_meta_reward_by_hand() -> None:
    # mean 1, std sqrt((1 + 1 + 0 + 0)/4) = sqrt(1/2) over 0, 2, 1, 1
    sharpe = math.tanh((1.0 - 0.02 / 252) / math.sqrt(0.5))
    reward = meta_reward(1.0, 0.4, [0.0, 2.0, 1.0, 1.0], "RANGE", "RANGE", 0.7)
    assert reward == pytest.approx(1.0 - 0.2 + 0.2 * sharpe + 0.15 * 0.7, abs=1e-12)


def test_meta_reward_leaves_out_a_sharpe_that_means_nothing() -> None:
    assert meta_reward(1.0, 0.0, [9.0, 1.0], "A", "A", 0.0) == 1.0  # two trades
    assert meta_reward(1.0, 0.0, [1.0, 1.0, 1.0], "A", "A", 0.0) == 1.0  # std 0


def test_meta_reward_punishes_a_regime_that_did_not_last() -> None:
    # 0.15 * -0.5 * 0.8 = -0.06
    assert meta_reward(0.0, 0.0, [], "TREND", "RANGE", 0.8) == pytest.approx(-0.06, abs=1e-15)


@pytest.mark.parametrize(
    ("leverage", "exposure", "volatility", "reward"),
    [
        (5, 0.1, 0.02, 1.05),  # no penalty, 0.1 * 0.5
        (10, 0.1, 0.02, 1.0 - 0.4 * 1.5 + 0.05),
        (5, 0.75, 0.01, 1.0 - 0.4 * 0.5 + 0.05),
        (50, 2.0, 0.03, 1.0 - 0.4 * 5.0 + 0.05),  # 13.5 + 3 is capped at 5
        (5, 0.1, 0.009, 1.0 - 0.02),
        (5, 0.1, 0.045, 1.0 - 0.1 * 0.25),  # -0.5 * (0.015/0.03)
        (5, 0.1, 0.5, 1.0 - 0.1),  # capped at 2
    ],
)
def test_sizing_reward_by_hand(
    leverage: float, exposure: float, volatility: float, reward: float
) -> None:
    assert sizing_reward(1.0, leverage, exposure, volatility) == pytest.approx(reward, abs=1e-12)


# -- Q-learning ------------------------------------------------------------------------------------


def test_update_by_hand() -> None:
    table = QTable(("a", "b"), {"s": {"a": 2.0}, "next": {"a": -3.0, "b": -1.0}})
    table.update(Transition("s", 0, 1.0, "next"))
    # best known of next is -1, not the 0 of an action never tried: 2 + 0.01 (1 - 0.99 - 2)
    assert table.q["s"]["a"] == pytest.approx(2.0 + 0.01 * (1.0 - 0.99 - 2.0), abs=1e-15)
    table.update(Transition("s", 1, 1.0, "nowhere"))
    assert table.q["s"]["b"] == pytest.approx(0.01, abs=1e-15)
    assert table.update_count == 2


def test_terminal_close_is_worth_its_reward_only() -> None:
    table = QTable(("a",), {"s": {"a": 5.0}})
    table.update(Transition("s", 0, 1.0, None))
    assert table.q["s"]["a"] == pytest.approx(5.0 + 0.01 * (1.0 - 5.0), abs=1e-15)
    for _ in range(3_000):
        table.update(Transition("s", 0, 1.0, None))
    assert table.q["s"]["a"] == pytest.approx(1.0, abs=1e-9)  # as a next state: 1/(1 - 0.99) = 100


def test_greedy_takes_the_lowest_index_on_ties_and_counts_the_untried_as_zero() -> None:
    table = QTable(("a", "b", "c"), {"s": {"b": 1.0, "c": 1.0}, "bad": {"a": -1.0, "c": -0.5}})
    assert table.greedy("s") == 1
    assert table.greedy("bad") == 1
    assert table.greedy("unseen") == 0
    for _ in range(200):
        table.update(Transition("s", 0, 9.0, None))
    assert table.greedy("s") == 0  # learning changes what was answered before


def test_exploration_follows_from_its_seed() -> None:
    table = QTable(META_KEYS, {"s": {META_KEYS[7]: 1.0}}, epsilon=0.1)
    chosen = [table.choose("s", f"decision-{i}") for i in range(4_000)]
    assert chosen == [table.choose("s", f"decision-{i}") for i in range(4_000)]
    others = [action for action in chosen if action != 7]
    # 10 % explore, 1 in 60 of these hits 7 again: 393 +- 19
    assert 330 < len(others) < 460
    assert len(set(others)) == 59
    table.epsilon = 0.0
    assert {table.choose("s", f"decision-{i}") for i in range(100)} == {7}


def test_epsilon_decays_with_every_update_to_its_floor() -> None:
    learner = QLearner(QTable(("a",)), seed="x", replays=4)
    learner.learn(Transition("s", 0, 1.0, None))
    assert learner.table.epsilon == pytest.approx(0.1 * 0.999**5, abs=1e-15)
    for _ in range(1_000):
        learner.learn(Transition("s", 0, 1.0, None))
    assert learner.table.epsilon == pytest.approx(0.01, rel=1e-3)
    assert learner.table.update_count == 5 * 1_001


def test_replay_repeats_remembered_transitions() -> None:
    learner = QLearner(QTable(("a",)), seed="x", replays=2)
    learner.learn(Transition("s", 0, 1.0, None))
    # one transition known: it is learned three times, 1 - 0.99^3
    assert learner.table.q["s"]["a"] == pytest.approx(1.0 - 0.99**3, abs=1e-12)


def test_replay_is_determined_by_seed_and_experience() -> None:
    def learned(seed: str) -> dict[str, dict[str, float]]:
        learner = QLearner(QTable(("a", "b")), seed=seed, capacity=16)
        for i in range(200):
            learner.learn(Transition(f"s{i % 7}", i % 2, float(i % 5), f"s{(i + 1) % 7}"))
            assert len(learner.memory) == min(i + 1, 16)
        return learner.table.q

    assert learned("x") == learned("x")
    assert learned("x") != learned("y")


def test_memory_forgets_the_oldest_transition() -> None:
    learner = QLearner(QTable(("a",)), seed="x", capacity=3)
    for i in range(5):
        learner.learn(Transition(f"s{i}", 0, 0.0, None))
    assert {t.state for t in learner.memory} == {"s2", "s3", "s4"}


# -- files -----------------------------------------------------------------------------------------

META_STATE = MetaState("RANGE", 0.0, 0.04, 0.7, 0.5, 1.0).key()
SIZING_STATE = SizingState(0.7, 0.0, 0.5, 0.0, 0.0).key()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files as production writes them."""
    meta = {"q_table": {META_STATE: {META_KEYS[12]: 0.25}}, "epsilon": 0.05, "update_count": 300}
    sizing = {"q_table": {SIZING_STATE: {SIZING_KEYS[24]: 1}}, "epsilon": 0.01, "update_count": 7}
    (tmp_path / META_FILE).write_text(json.dumps(meta, indent=2))
    (tmp_path / SIZING_FILE).write_text(json.dumps(sizing, indent=2))
    return tmp_path


def test_production_files_are_read(folder: Path) -> None:
    tables = QTables.load(folder)
    assert tables.trained
    assert tables.greedy_meta(META_STATE) == MetaAction("dual_momentum", "transformer", 1.0)
    assert tables.greedy_sizing(SIZING_STATE) == SizingAction(1.5, 5)
    assert tables.meta.epsilon == 0.05
    assert tables.meta.update_count == 300


def test_saved_tables_are_loaded_the_same(folder: Path, tmp_path: Path) -> None:
    tables = QTables.load(str(folder))
    tables.save(tmp_path / "again")
    assert QTables.load(tmp_path / "again").digest == tables.digest
    tables.save(tmp_path / "packed", packed=True)
    packed = (tmp_path / "packed" / f"{META_FILE}.gz").read_bytes()
    assert gzip.decompress(packed) == (tmp_path / "again" / META_FILE).read_bytes()
    assert packed[4:8] == bytes(4)  # no time in the header


def test_digest_covers_every_value(folder: Path) -> None:
    tables = QTables.load(folder)
    before = tables.digest
    content = json.loads((folder / SIZING_FILE).read_text())
    content["q_table"][SIZING_STATE][SIZING_KEYS[24]] = 1.0000001
    (folder / SIZING_FILE).write_text(json.dumps(content))
    assert QTables.load(folder).digest != before


def _without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _truncated(folder: Path) -> None:
    path = folder / META_FILE
    path.write_bytes(path.read_bytes()[:-40])


def _written(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / META_FILE).write_text(text)

    return write


def _swapped(folder: Path) -> None:
    (folder / META_FILE).write_bytes((folder / SIZING_FILE).read_bytes())


def _table(state: str, action: str, q: str) -> str:
    row = f"{{{json.dumps(state)}: {{{json.dumps(action)}: {q}}}}}"
    return f'{{"q_table": {row}, "epsilon": 0.1, "update_count": 1}}'


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_without(META_FILE), ["expected an RL v2 Q-table", "No such file"]),
        (_without(SIZING_FILE), [SIZING_FILE, "No such file"]),
        (_truncated, ["expected JSON {q_table", "truncated"]),
        (_written("[]"), ["expected JSON {q_table", "array"]),
        (_written("{}"), ["missing required field `q_table`"]),
        (_written('{"q_table": {}, "epsilon": 2, "update_count": 1}'), ["<= 1.0"]),
        (_written('{"q_table": {}, "epsilon": 0.1, "update_count": -1}'), [">= 0"]),
        (_written(_table(META_STATE, META_KEYS[0], '"high"')), ["got `str`"]),
        (_written(_table(META_STATE, META_KEYS[0], "NaN")), ["found"]),
        (_written(_table(META_STATE, "LONG", "1")), ["expected actions like", "'LONG'"]),
        (_written(_table("s", META_KEYS[0], "1")), ["expected states of regime, vol", "'s'"]),
        (_written('{"x": ' + "[" * 200_000), ["expected JSON {q_table"]),
        (_swapped, ["expected states of regime", "equity_curve_slope"]),
    ],
)
def test_unusable_file_is_refused_in_one_sentence(
    folder: Path, damage: Callable[[Path], None], words: list[str]
) -> None:
    damage(folder)
    with pytest.raises(PolicyError) as caught:
        QTables.load(folder)
    message = str(caught.value)
    assert "_q_table.json" in message
    assert "\n" not in message
    assert caught.value.exit_code == 2
    for word in words:
        assert word in message


def test_bytes_that_are_no_text_are_refused(folder: Path) -> None:
    (folder / META_FILE).write_bytes(b'{"q_table": {"\xff": {}}, "epsilon": 0, "update_count": 0}')
    with pytest.raises(PolicyError):
        QTables.load(folder)


# -- one symbol ------------------------------------------------------------------------------------


def test_decide_builds_both_states_from_what_it_observed() -> None:
    reference = V2Reference(QTables.untrained())
    for close in [100.0] * 6 + [100.0 * (1.0 + LN3 / 40)] + [100.0 * (1.0 + LN3 / 40)] * 3:
        reference.observe_close(close)
    for equity in [100.0, 100.0, 130.0, 100.0, 120.0]:
        reference.observe_equity(equity)
    for win in (True, True, False):
        reference.record_outcome(win)
    choice = reference.decide(signal(0.7), 0.1)
    # volatility: one return of ln(3)/40 = 0.0275 among 9, std 0.0275 * sqrt(8)/9 = 0.0086
    # health: 120 after 130 is a drawdown of 7.7 %; slope 4/110 = 0.036
    assert json.loads(choice.meta_state) == {
        "regime": "RANGE", "volatility": 0.01, "market_pressure": 0.5, "confidence": 0.7,
        "previous_winrate": 0.67, "account_health": 0.8,
    }  # fmt: skip
    assert json.loads(choice.sizing_state) == {
        "signal_confidence": 0.7, "portfolio_exposure": 0.1, "recent_winrate": 0.67,
        "volatility": 0.01, "equity_curve_slope": 0.04,
    }  # fmt: skip


def test_regime_of_the_signal_goes_before_the_detector() -> None:
    choice = V2Reference(QTables.untrained()).decide(signal(regime="BREAKOUT"), 0.0)
    assert json.loads(choice.meta_state)["regime"] == "BREAKOUT"


def test_fresh_memory_gives_the_documented_defaults() -> None:
    choice = V2Reference(QTables.untrained()).decide(signal(0.7), 0.0)
    assert json.loads(choice.meta_state) == {
        "regime": "UNKNOWN", "volatility": 0.02, "market_pressure": 0.0, "confidence": 0.7,
        "previous_winrate": 0.5, "account_health": 0.7,
    }  # fmt: skip
    assert json.loads(choice.sizing_state) == {
        "signal_confidence": 0.7, "portfolio_exposure": 0.0, "recent_winrate": 0.5,
        "volatility": 0.02, "equity_curve_slope": 0.0,
    }  # fmt: skip


def test_windows_are_bounded() -> None:
    reference = V2Reference(QTables.untrained())
    for i in range(1_000):
        reference.observe_close(100.0 + i)
        reference.observe_equity(1_000.0 + i)
        reference.record_outcome(True)
    assert [len(values) for values in reference.dump()] == [30, 30, 20]
    assert reference.dump()[0][-1] == 1_099.0


@given(st.floats(0.0, 1.0), st.integers(0, 60))
def test_untrained_tables_never_trade(confidence: float, n: int) -> None:
    tables = QTables.untrained()
    assert not tables.trained
    reference = V2Reference(tables)
    for i in range(n):
        reference.observe_close(100.0 + (i * 7) % 5)
        reference.observe_equity(10_000.0 - i)
    choice = reference.decide(signal(confidence), 0.0)
    assert choice[:5] == ("dual_momentum", "lstm", 0.5, 0.5, 5)
    assert v2_target(1, confidence, choice.weight, choice.size_multiplier).target == 0.0


def test_restored_memory_continues_identically() -> None:
    tables = QTables.load()
    rng = np.random.default_rng(3)
    closes = 100.0 * np.exp(np.cumsum(rng.normal(0, 1e-3, 300)))
    original = V2Reference(tables)
    for i, close in enumerate(closes.tolist()):
        restored = V2Reference(tables)
        restored.load(json.loads(json.dumps(original.dump())))
        for reference in (original, restored):
            reference.observe_close(close)
            reference.observe_equity(10_000.0 + i % 11)
            if i % 3 == 0:
                reference.record_outcome(i % 2 == 0)
        assert original.decide(signal(), 0.1) == restored.decide(signal(), 0.1)
        assert original.dump() == restored.dump()


@pytest.mark.parametrize("memory", [(), ([1.0], [1.0]), (["x"], [], []), 7])
def test_damaged_memory_is_refused(memory: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        V2Reference(QTables.untrained()).load(memory)


# -- training --------------------------------------------------------------------------------------


def test_signal_directions_are_those_that_history_publishes() -> None:
    bars = simulate("regime_switching", 400, seed=5)
    published = {
        int(entry.entry_id.partition("-")[0]): json.loads(entry.fields[b"payload"])["side"]
        for entry in history_entries([bars])
        if entry.event_type == "signal.generated"
    }
    spoken = {
        int(end_us) // 1_000 - 60_000 + 1: "BUY" if side > 0 else "SELL"
        for end_us, side in zip(bars.end_us, signal_directions(bars.close), strict=True)
        if side
    }
    assert spoken == published
    assert len(spoken) > 20


def test_training_plays_what_the_pipeline_plays(make_policy: Callable[..., Policy]) -> None:
    tables = QTables.load()
    bars = simulate("regime_switching", 700, seed=11)
    pipeline = Pipeline(
        make_policy(), tables, Settings(latency_ms=0, max_event_age_s=None), STREAMS
    )
    rows = [
        row
        for commit in fold(pipeline, history_entries([bars]))
        for output in commit.outputs
        if output.event_type == "rl_v3.comparison"
        and isinstance(row := decode_comparison(output.payload), V2Row)
    ]
    player = play(bars, tables)
    live = [(row.weight, row.size_multiplier, row.leverage) for row in rows]
    # the first signals come while the symbol is cold; training leaves them out
    cold = len(live) - len(player.choices)
    assert 0 <= cold < 4
    assert live[cold:] == [(c.weight, c.size_multiplier, c.leverage) for c in player.choices]
    assert len({weight for weight, _, _ in live}) > 1
    account = pipeline.symbols[bars.symbol].v2.account
    assert account.equity == pytest.approx(player.account.equity, abs=1e-9)
    assert player.entries > 7


def _choice() -> tuple[QTables, Pupils, Holding]:
    tables = QTables.untrained()
    reference = V2Reference(tables)
    choice = reference.decide(signal(), 0.0)
    holding = Holding(choice, 0.05, 10_000.0)  # notional 500
    for equity in (10_002.0, 9_998.0, 10_003.0):  # fell by 4: 0.8 % of the notional
        holding.mark(equity)
    return tables, Pupils(tables, 0), holding


def test_closed_position_teaches_both_agents_a_terminal_reward() -> None:
    tables, pupils, holding = _choice()
    pupils.held(holding, 10_005.0, "UNKNOWN", None)
    # profit 5 of 500 = 1 %; 1 - 0.5 * 0.8 + 0.15 * 0.7 = 0.705
    assert pupils.meta.memory[0].reward == pytest.approx(0.705, abs=1e-12)
    assert pupils.meta.memory[0].next_state is None
    # 0.5 % of the base notional of 1,000; leverage 5, volatility 2 %: + 0.1 * 0.5
    assert pupils.sizing.memory[0].reward == pytest.approx(0.55, abs=1e-12)
    assert pupils.sizing.memory[0].next_state is None
    assert tables.meta.update_count == tables.sizing.update_count == 5


def test_position_that_goes_on_is_followed_by_the_next_state() -> None:
    _, pupils, holding = _choice()
    pupils.held(holding, 10_005.0, "UNKNOWN", holding.choice)
    assert pupils.meta.memory[0].next_state == holding.choice.meta_state
    assert pupils.sizing.memory[0].next_state == holding.choice.sizing_state


def test_training_twice_gives_the_same_tables() -> None:
    tables = train(range(6), seed=1)
    assert train(range(6), seed=1).digest == tables.digest
    assert train(range(6), seed=2).digest != tables.digest
    assert tables.trained


def test_command_writes_the_same_bytes_twice(tmp_path: Path) -> None:
    for name in ("a", "b"):
        command(tmp_path / name, episodes=6, seed=1)
    for file in (META_FILE, SIZING_FILE):
        first = (tmp_path / "a" / f"{file}.gz").read_bytes()
        assert first == (tmp_path / "b" / f"{file}.gz").read_bytes()


def test_shipped_tables_are_small_trained_and_done_exploring() -> None:
    tables = QTables.load()
    assert tables.trained
    assert tables.meta.epsilon == tables.sizing.epsilon == 0.01
    folder = Path(__file__).parents[2] / "shadow" / "data"
    files = [folder / f"{name}.gz" for name in (META_FILE, SIZING_FILE)]
    assert sum(path.stat().st_size for path in files) < 300_000


def test_shipped_tables_trade_and_stand_aside_on_unseen_series() -> None:
    scores = unseen("regime_switching", QTables.load(), series=8)
    bars, decisions, known, entries, flat, _ = (sum(column) for column in zip(*scores, strict=True))
    assert entries / bars >= 10 / 1_000
    assert 0.1 < flat / decisions < 0.9
    assert known / decisions > 0.95


def test_playing_greedily_changes_nothing() -> None:
    tables = QTables.load()
    before = json.dumps(tables.meta.content()), json.dumps(tables.sizing.content())
    bars = simulate("momentum", 300, seed=9)
    assert play(bars, tables).score() == play(bars, tables).score()
    assert (json.dumps(tables.meta.content()), json.dumps(tables.sizing.content())) == before
