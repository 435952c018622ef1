from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import msgpack
import msgspec
import numpy as np
import pytest

from rlv3.events import Action
from rlv3.policy import Policy
from rlv3.portfolio import Costs
from shadow import codec
from shadow.pairing import BUS, OpenV2, Pairing
from shadow.pipeline import Pipeline, Settings
from shadow.records import (
    REPLAY,
    BarRow,
    Commit,
    Decision,
    Entry,
    LedgerRow,
    OutcomeRow,
    PairRow,
    UnpairedRow,
    V2Row,
    decode_comparison,
    decode_decision,
    encode_msgpack,
)
from shadow.risk import RiskLimits
from shadow.rl_v2 import QTables
from shadow.symbol import pack, unpack

INPUTS = ("market.tick", "signal.generated", "ai.signal_generated", "rl_v2.decision")
T0 = 1_700_000_040_000  # a bar boundary
RANK = {name: i for i, name in enumerate(INPUTS)}
MakeEntry = Callable[..., Entry]


@pytest.fixture(scope="module")
def tables() -> QTables:
    return QTables.load(None)


@pytest.fixture(scope="module")
def policy(make_policy: Callable[..., Policy]) -> Policy:
    return make_policy(2)


def workload(bus_entry: MakeEntry, seed: int, minutes: int = 45) -> list[Entry]:
    """Three symbols with ticks, signals, v2 decisions, duplicates, late ticks and bad entries."""
    rng = np.random.default_rng(seed)
    entries = []
    prices = {"AAAUSDT": 100.0, "BBBUSDT": 0.01, "CCCUSDT": 5e4}
    seq = 0
    for second in range(0, minutes * 60, 7):
        for symbol, price in prices.items():
            ts = T0 + second * 1000 + int(rng.integers(0, 900))
            if rng.random() < 0.2:
                continue
            price *= float(np.exp(rng.normal(0, 1e-3)))
            prices[symbol] = price
            seq += 1
            body: dict[str, object] = {
                "symbol": symbol, "price": price, "qty": float(rng.integers(1, 9)),
                "is_buyer_maker": bool(rng.integers(2)),
            }  # fmt: skip
            kind = rng.random()
            if kind < 0.02:
                body["price"] = 0.0
            elif kind < 0.04:
                body["timestamp"] = (ts - 30_000) / 1000
            elif kind < 0.05:
                body["timestamp"] = (ts - 300_000) / 1000
            entries.append(bus_entry("market.tick", ts, body, seq))
            if rng.random() < 0.03:
                entries.append(bus_entry("market.tick", ts, body, seq + 500_000))
            if rng.random() < 0.06:
                side = "BUY" if rng.random() < 0.5 else "SELL"
                stream = "signal.generated" if rng.random() < 0.7 else "ai.signal_generated"
                signal = {"symbol": symbol, "side": side, "confidence": 0.7}
                entries.append(bus_entry(stream, ts + 3, signal, seq))
            if rng.random() < 0.03:
                v2 = {
                    "schema_version": 1, "decision_id": f"v2-{seq}", "symbol": symbol,
                    "kind": "combined", "strategy": "dual_momentum", "model": "lstm",
                    "weight": 1.25, "size_multiplier": 1.5, "leverage": 5, "signal_side": "BUY",
                    "signal_confidence": 0.8, "provenance": "q_table" if symbol[0] == "B"
                    else "static_policy", "timestamp": "2023-11-14T22:14:00Z",
                }  # fmt: skip
                v2["event_ts"] = (ts + int(rng.integers(-9000, 9000))) / 1000
                if rng.random() < 0.5:
                    v2 |= {"source_stream": "market.tick", "source_entry_id": f"{ts}-{seq}"}
                v2["timestamp"] = v2["event_ts"]
                entries.append(bus_entry("rl_v2.decision", ts + 5, v2, seq))
    entries.sort(key=lambda e: (*map(int, e.entry_id.split("-")), RANK[e.event_type]))
    return entries


def fold(pipeline: Pipeline, entries: Sequence[Entry], conflate: bool = False) -> list[Commit]:
    commits = []
    rest = list(entries)
    left_out = pipeline.superseded(rest) if conflate else frozenset()
    while rest:
        commit = pipeline.run(rest, now_ms=0.0, leave_out=left_out)
        assert commit.taken > 0
        commits.append(commit)
        rest = rest[commit.taken :]
    return commits


def payloads(commits: Sequence[Commit]) -> list[tuple[Any, ...]]:
    """Everything that leaves, without the one field a clock may change."""
    result = []
    for commit in commits:
        for output in commit.outputs:
            body = json.loads(output.payload)
            body.pop("latency_ms", None)
            result.append((output.event_type, output.trace_id, output.correlation_id, body))
    return result


def decisions(commits: Sequence[Commit]) -> list[Decision]:
    return [
        decode_decision(o.payload)
        for c in commits
        for o in c.outputs
        if o.event_type == "rl_v3.decision"
    ]


def rows(commits: Sequence[Commit], kind: type) -> list[Any]:
    found = [
        decode_comparison(o.payload)
        for c in commits
        for o in c.outputs
        if o.event_type == "rl_v3.comparison"
    ]
    return [row for row in found if isinstance(row, kind)]


@pytest.mark.parametrize("rl_v2", ["reference", "bus", "off"])
def test_outputs_do_not_depend_on_where_a_batch_was_cut(
    policy: Policy, tables: QTables, bus_entry: MakeEntry, rl_v2: str
) -> None:
    entries = workload(bus_entry, seed=1)
    results = []
    for limit in (1, 7, 64):
        pipeline = Pipeline(policy, tables, Settings(max_events=limit, rl_v2=rl_v2), INPUTS)
        first = pipeline.begin({})
        results.append(payloads([first, *fold(pipeline, entries), pipeline.stop()]))
    assert results[0] == results[1] == results[2]
    assert len({body["symbol"] for kind, *_, body in results[0] if kind == "rl_v3.decision"}) == 3


def test_decisions_in_msgpack_say_what_those_in_json_say(
    policy: Policy, tables: QTables, bus_entry: MakeEntry
) -> None:
    entries = workload(bus_entry, 3, minutes=4)
    text, binary = (
        [
            output.payload
            for commit in fold(Pipeline(policy, tables, Settings(), INPUTS, *encoder), entries)
            for output in commit.outputs
            if output.event_type == "rl_v3.decision"
        ]
        for encoder in ((), (encode_msgpack,))
    )
    assert len(text) > 50
    assert binary == [msgspec.msgpack.encode(msgspec.json.decode(payload)) for payload in text]


def test_cells_are_version_checksum_and_plain_msgpack() -> None:
    values = (None, True, -1, 1 << 40, 0.1, "é", (1.0, [2, ("a",)]), {"k": None})
    cell = pack(values)
    assert cell[5:] == msgpack.packb(values)
    assert (cell[0], unpack(b"\x01\x24\x4c\xc8\x59\x93\x01\x02\x03")) == (1, [1, 2, 3])


def test_a_restart_after_any_commit_continues_identically(
    policy: Policy, tables: QTables, bus_entry: MakeEntry
) -> None:
    entries = workload(bus_entry, seed=2)
    settings = Settings(max_events=16)
    whole = Pipeline(policy, tables, settings, INPUTS)
    expected = payloads([whole.begin({}), *fold(whole, entries)])

    stored: dict[str, dict[str, bytes]] = {}
    counts: dict[tuple[str, str], int] = {}
    commits: list[Commit] = []

    def keep(commit: Commit) -> None:
        commits.append(commit)
        counts.update(commit.counts)
        for symbol, cells in commit.cells.items():
            stored.setdefault(symbol, {}).update(cells)

    pipeline = Pipeline(policy, tables, settings, INPUTS)
    keep(pipeline.begin({}))
    rest = entries
    while rest:
        commit = pipeline.run(rest, now_ms=0.0)
        keep(commit)
        rest = rest[commit.taken :]
        pipeline = Pipeline(policy, tables, settings, INPUTS)
        assert pipeline.restore(stored) == []
        pipeline.counts = dict(counts)
    assert payloads(commits) == expected
    assert counts == whole.counts


def test_every_entry_has_exactly_one_outcome(
    policy: Policy, tables: QTables, bus_entry: MakeEntry
) -> None:
    entries = workload(bus_entry, seed=3)
    pipeline = Pipeline(policy, tables, Settings(), INPUTS)
    commits = fold(pipeline, entries)
    read = Counter(entry.event_type for entry in entries)
    counted: Counter[str] = Counter()
    for (event_type, _), n in pipeline.counts.items():
        counted[event_type] += n
    assert counted == read
    outcomes = {outcome for _, outcome in pipeline.counts}
    assert {"decided", "late", "duplicate", "stale", "dead_letter", "consumed"} <= outcomes
    made = decisions(commits)
    assert len(made) == sum(n for (_, o), n in pipeline.counts.items() if o == "decided")
    assert len({d.decision_id for d in made}) == len(made)
    assert len([o for c in commits for o in c.outputs if o.event_type.startswith("dlq:")]) == sum(
        n for (_, o), n in pipeline.counts.items() if o == "dead_letter"
    )


def test_later_entries_change_nothing_before(
    policy: Policy, tables: QTables, bus_entry: MakeEntry
) -> None:
    entries = workload(bus_entry, seed=4)
    cut = len(entries) // 2
    other = workload(bus_entry, seed=5)
    tail = [e for e in other if e.id_ms > entries[cut].id_ms]
    one = Pipeline(policy, tables, Settings(), INPUTS)
    two = Pipeline(policy, tables, Settings(), INPUTS)
    first = payloads([*fold(one, entries[:cut])])
    whole = payloads([*fold(two, [*entries[:cut], *tail])])
    assert whole[: len(first)] == first


def test_conflation_leaves_accounts_alone_and_names_what_it_dropped(
    policy: Policy, tables: QTables, bus_entry: MakeEntry
) -> None:
    entries = workload(bus_entry, seed=6)
    plain = Pipeline(policy, tables, Settings(), INPUTS)
    all_commits = fold(plain, entries)
    loaded = Pipeline(policy, tables, Settings(), INPUTS)
    commits = fold(loaded, entries, conflate=True)
    conflated = loaded.counts[("market.tick", "conflated")]
    assert conflated > 0
    named = [i for row in rows(commits, LedgerRow) if row.reason == "conflated"
             for i in row.entry_ids]  # fmt: skip
    assert len(named) == len(set(named)) == conflated
    decided = {d.decision_id: d for d in decisions(all_commits)}
    kept = decisions(commits)
    assert len(kept) + conflated == len(decided)
    for decision in kept:
        assert decision == decided[decision.decision_id]
    assert rows(commits, BarRow) == rows(all_commits, BarRow)


def test_one_step_per_closed_bar_and_all_else_is_advisory(
    policy: Policy, tables: QTables, bus_entry: MakeEntry
) -> None:
    entries = workload(bus_entry, seed=7)
    pipeline = Pipeline(policy, tables, Settings(), INPUTS)
    commits = fold(pipeline, entries)
    steps = {d.decision_id: d for d in decisions(commits) if d.kind == "step"}
    bars = rows(commits, BarRow)
    decided = [b.step_decision_id for b in bars if b.step_decision_id is not None]
    assert len(decided) == len(set(decided))
    assert set(decided) <= set(steps)
    for decision in decisions(commits):
        if decision.kind == "step":
            assert decision.standing_decision_id == decision.decision_id
        if not decision.warm:
            assert decision.action in (Action.HOLD, Action.REDUCE, Action.CLOSE,
                                       Action.EMERGENCY_FLATTEN)  # fmt: skip


def test_v3_against_itself_differs_by_exactly_zero(
    policy: Policy, bus_entry: MakeEntry, tables: QTables
) -> None:
    entries = workload(bus_entry, seed=8, minutes=120)
    settings = Settings(self_play=True, latency_ms=0)
    pipeline = Pipeline(policy, tables, settings, INPUTS)
    bars = rows(fold(pipeline, entries), BarRow)
    assert any(bar.arms["v3"].turnover > 0 for bar in bars)
    for bar in bars:
        assert bar.arms["v3"] == bar.arms["v2"]


def test_step_fills_at_the_first_price_after_the_latency(
    make_policy: Callable[..., Policy], tables: QTables, bus_entry: MakeEntry
) -> None:
    """A policy that always goes LONG when it may: entry one bar after warm-up, at a known price."""
    policy = always(make_policy(0), Action.LONG)
    costs = Costs(fee_rate=0.0)
    settings = Settings(latency_ms=250, rl_v2="off", costs=costs)
    pipeline = Pipeline(policy, None, settings, INPUTS)
    entries = []
    for bar in range(40):
        for offset, price in ((1, 100.0 + bar), (200, 50.0), (251, 80.0), (60_000, 100.0 + bar)):
            tick = {"symbol": "AAAUSDT", "price": price}
            entries.append(bus_entry("market.tick", T0 + bar * 60_000 + offset, tick))
    commits = fold(pipeline, entries)
    bars = rows(commits, BarRow)
    first = next(i for i, bar in enumerate(bars) if bar.arms["v3"].turnover > 0)
    # WARM_BARS = 31 bars closed: the step at the opening tick of bar 31 is the first to enter
    assert first == 31
    # due at +1 ms + 250 ms: the tick at +251 ms, price 80 (not 50); 1000 / 80 = 12.5 units
    assert bars[31].arms["v3"].turnover == pytest.approx(0.1, abs=1e-12)
    gross = 12.5 * (bars[31].close - 80.0) / 10_000
    assert bars[31].arms["v3"].gross == pytest.approx(gross, abs=1e-12)
    # one tick later means the close of the bar
    assert bars[31].arms["v3"].gross_late == pytest.approx(0.0, abs=1e-12)


def always(policy: Policy, action: Action) -> Policy:
    """Give a policy one preference whatever it sees; where that is masked, it holds."""
    policy._nets[0][-1][0][:] = 0.0
    policy._nets[0][-1][1][:] = 0.0
    policy._nets[0][-1][1][..., action] = 1e3
    return policy


def test_a_policy_swap_closes_positions_and_starts_a_run(
    make_policy: Callable[..., Policy], tables: QTables, bus_entry: MakeEntry
) -> None:
    old, new = always(make_policy(0), Action.LONG), always(make_policy(1), Action.HOLD)
    settings = Settings(latency_ms=0)
    ticks = [
        bus_entry("market.tick", T0 + n * 30_000 + 1, {"symbol": "AAAUSDT", "price": 100.0 + n})
        for n in range(90)
    ]
    first = Pipeline(old, tables, settings, INPUTS)
    stored: dict[str, dict[str, bytes]] = {}
    for commit in [first.begin({}), *fold(first, ticks[:80])]:
        for symbol, cells in commit.cells.items():
            stored.setdefault(symbol, {}).update(cells)
    assert first.symbols["AAAUSDT"].v3.account.quantity > 0
    second = Pipeline(new, tables, settings, INPUTS)
    second.restore(stored)
    assert second.run_id == first.run_id
    second.begin({})
    assert second.run_id != first.run_id
    made = decisions(fold(second, ticks[80:]))
    assert {d.model_sha256 for d in made} == {new.digest}
    assert second.symbols["AAAUSDT"].v3.account.quantity == 0.0


def test_a_damaged_cell_restarts_its_symbol_cold_and_flat_and_marks_the_run(
    policy: Policy, tables: QTables, bus_entry: MakeEntry
) -> None:
    pipeline = Pipeline(policy, tables, Settings(), INPUTS)
    stored: dict[str, dict[str, bytes]] = {}
    for commit in [pipeline.begin({}), *fold(pipeline, workload(bus_entry, seed=9))]:
        for symbol, cells in commit.cells.items():
            stored.setdefault(symbol, {}).update(cells)
    cell = bytearray(stored["BBBUSDT"]["closed"])
    cell[20] ^= 1
    stored["BBBUSDT"]["closed"] = bytes(cell)
    again = Pipeline(policy, tables, Settings(), INPUTS)
    assert again.restore(stored) == ["BBBUSDT"]
    assert not again.symbols["BBBUSDT"].market.warm
    assert again.symbols["AAAUSDT"].market.warm
    (row,) = rows([again.run([], now_ms=0.0)], LedgerRow)
    assert (row.reason, row.entry_ids) == ("corrupt_state", ("BBBUSDT",))


def test_reference_pairs_every_signal_by_its_entry(
    policy: Policy, tables: QTables, bus_entry: MakeEntry
) -> None:
    entries = [e for e in workload(bus_entry, seed=10) if e.event_type != "rl_v2.decision"]
    pipeline = Pipeline(policy, tables, Settings(), INPUTS)
    commits = fold(pipeline, entries)
    signals = sum(n for (s, o), n in pipeline.counts.items() if "signal" in s and o == "decided")
    pairs = rows(commits, PairRow)
    assert len(pairs) == signals > 0
    assert {pair.rule for pair in pairs} == {1}
    assert rows(commits, UnpairedRow) == []


def test_v2_arm_follows_the_bus_from_the_first_q_table_decision(
    policy: Policy, tables: QTables, bus_entry: MakeEntry
) -> None:
    entries = workload(bus_entry, seed=11)
    pipeline = Pipeline(policy, tables, Settings(), INPUTS)
    commits = fold(pipeline, entries)
    v2 = rows(commits, V2Row)
    b_rows = [row for row in v2 if row.symbol == "BBBUSDT"]
    first = next(i for i, row in enumerate(b_rows) if row.opponent == "q_table")
    assert all(row.opponent == "q_table" for row in b_rows[first:])
    assert all(row.moves_arm for row in b_rows)
    others = [row for row in v2 if row.symbol != "BBBUSDT"]
    assert {(row.opponent, row.moves_arm) for row in others} == {
        ("local_reference", True),
        ("static_policy", False),
    }
    bars = [bar for bar in rows(commits, BarRow) if bar.symbol == "BBBUSDT"]
    assert {bar.opponent for bar in bars} == {"local_reference", "q_table"}


def test_pairs_and_unpaired_account_for_every_v2_decision(
    policy: Policy, tables: QTables, bus_entry: MakeEntry
) -> None:
    entries = workload(bus_entry, seed=12)
    pipeline = Pipeline(policy, tables, Settings(), INPUTS)
    commits = fold(pipeline, entries)
    v2 = {row.decision_id for row in rows(commits, V2Row)}
    paired = [row.v2_decision_id for row in rows(commits, PairRow)]
    alone = [row.decision_id for row in rows(commits, UnpairedRow) if row.side == "v2"]
    still_open = [o.decision_id for s in pipeline.symbols.values() for o in s.pairing.open_v2]
    assert sorted([*paired, *alone, *still_open]) == sorted(v2)
    assert {row.rule for row in rows(commits, PairRow)} >= {1, 5}


def test_ids_of_the_source_go_through_to_every_record(
    policy: Policy, tables: QTables, bus_entry: MakeEntry
) -> None:
    def at(event_type: str, ms: int, **body: object) -> Entry:
        ids = {"trace_id": f"t-{ms}", "correlation_id": f"c-{ms}"}
        return bus_entry(event_type, T0 + ms, {"symbol": "AAAUSDT"} | ids | body)

    v2 = {
        "schema_version": 1, "kind": "combined", "provenance": "q_table", "direction": "BUY",
        "size_fraction": 0.1,
    }  # fmt: skip
    place = {"source_stream": "market.tick", "source_entry_id": f"{T0 + 1_000}-0"}
    pipeline = Pipeline(policy, None, Settings(rl_v2="bus"), (*INPUTS, "trade.closed"))
    commits = fold(
        pipeline,
        [
            at("market.tick", 1_000, price=100.0),
            at("rl_v2.decision", 1_500, decision_id="x", **v2, **place),
            at("rl_v2.decision", 1_600, decision_id="y", event_ts=(T0 - 600_000) / 1e3, **v2),
            at("signal.generated", 2_000, side="BUY", confidence=0.7),
            at("market.tick", 2_100, price=-1.0),
            at("trade.closed", 2_200, side="LONG", pnl_percent=1.0),
            at("market.tick", 125_000, price=101.0),
        ],
    )
    found = {
        (output.event_type, body.get("kind"), output.trace_id, output.correlation_id)
        for commit in commits
        for output in commit.outputs
        if (body := json.loads(output.payload)).get("kind") != "ledger"
    }
    assert found == {
        ("rl_v3.decision", "advisory", "t-1000", "c-1000"),
        ("rl_v3.comparison", "decision", "t-1500", "c-1500"),
        ("rl_v3.comparison", "pair", "t-1500", "c-1500"),
        ("rl_v3.comparison", "decision", "t-1600", "c-1600"),
        ("rl_v3.decision", "advisory", "t-2000", "c-2000"),
        ("dlq:market.tick", None, "t-2100", "c-2100"),
        ("rl_v3.comparison", "outcome", "t-2200", "c-2200"),
        ("rl_v3.comparison", "unpaired", "t-1600", "c-1600"),  # ten minutes too old for anything
        ("rl_v3.comparison", "unpaired", "t-2000", "c-2000"),  # no v2 decision within 90 s
        ("rl_v3.comparison", "bar", "t-125000", "c-125000"),
        ("rl_v3.decision", "step", "t-125000", "c-125000"),
    }
    (pair,) = rows(commits, PairRow)
    assert (pair.trace_id, pair.correlation_id) == ("t-1500", "c-1500")
    assert (pair.v3_trace_id, pair.v3_correlation_id) == ("t-1000", "c-1000")
    for kind in (UnpairedRow, BarRow, OutcomeRow):
        for row in rows(commits, kind):
            assert row.trace_id.replace("t", "c") == row.correlation_id


def test_an_id_that_joins_nothing_is_named_all_the_same(
    policy: Policy, bus_entry: MakeEntry
) -> None:
    ids = {"trace_id": "market-tick-1700000041", "correlation_id": "market-tick-1700000041"}
    v2 = {
        "schema_version": 1, "kind": "combined", "provenance": "q_table", "direction": "BUY",
        "size_fraction": 0.1, "event_ts": (T0 + 1_000) / 1e3, "decision_id": "x",
    }  # fmt: skip
    commits = fold(
        Pipeline(policy, None, Settings(rl_v2="bus"), INPUTS),
        [
            bus_entry("market.tick", T0 + 1_000, {"symbol": "AAAUSDT", "price": 100.0} | ids),
            bus_entry("rl_v2.decision", T0 + 1_500, {"symbol": "AAAUSDT"} | v2 | ids),
        ],
    )
    (pair,) = rows(commits, PairRow)
    assert pair.rule == 4
    assert pair.trace_id == pair.v3_trace_id == "market-tick-1700000041"


def test_open_decisions_of_an_earlier_version_are_still_paired() -> None:
    earlier = OpenV2("x", 5_000_000, "s", "1-1", None, None, 1, 0.1, "q_table", None, 30, BUS, True)
    pairing = Pairing()
    # its last two fields, the ids of its own entry, are new
    pairing.load((0, 0, [list(earlier)[:-2]], 1 << 62), {})
    assert pairing.open_v2 == [earlier]


def test_unselected_sources_are_counted_and_not_folded(
    policy: Policy, tables: QTables, bus_entry: MakeEntry
) -> None:
    settings = replace(Settings(), tick_sources=frozenset({"another"}))
    pipeline = Pipeline(policy, tables, settings, INPUTS)
    entry = bus_entry("market.tick", T0, {"symbol": "AAAUSDT", "price": 1.0})
    assert fold(pipeline, [entry])[0].outputs == []
    assert pipeline.counts == {("market.tick", "unselected"): 1}


def test_a_bar_closed_by_a_stale_tick_is_decided_at_the_next_fresh_one(
    policy: Policy, tables: QTables, bus_entry: MakeEntry
) -> None:
    pipeline = Pipeline(policy, tables, Settings(), INPUTS)
    body = {"symbol": "AAAUSDT", "price": 100.0}
    late = {**body, "price": 101.0, "timestamp": (T0 + 61_000) / 1000}
    commits = fold(
        pipeline,
        [
            bus_entry("market.tick", T0 + 1_000, body),
            bus_entry("market.tick", T0 + 300_000, late),  # 239 s old: stale, but newest
            bus_entry("market.tick", T0 + 301_000, {**body, "timestamp": (T0 + 62_000) / 1000,
                                                    "price": 102.0}),  # stale too
            bus_entry("market.tick", T0 + 302_000, {**body, "timestamp": (T0 + 301_500) / 1000}),
        ],
    )  # fmt: skip
    assert pipeline.counts == {("market.tick", "decided"): 2, ("market.tick", "stale"): 2}
    kinds = [d.kind for d in decisions(commits)]
    assert kinds == ["advisory", "step"]
    first, second = rows(commits, BarRow)
    assert first.step_decision_id is None
    assert second.step_decision_id is not None


def a_minute_apart(bus_entry: MakeEntry, first: int, last: int) -> list[Entry]:
    return [
        bus_entry("market.tick", T0 + n * 60_000 + 1, {"symbol": symbol, "price": 100.0 + n % 7})
        for n in range(first, last)
        for symbol in ("AAAUSDT", "BBBUSDT")
    ]


def stored_by(commits: Sequence[Commit]) -> dict[str, dict[str, bytes]]:
    cells: dict[str, dict[str, bytes]] = {}
    for commit in commits:
        for symbol, changed in commit.cells.items():
            cells.setdefault(symbol, {}).update(changed)
    return cells


@pytest.mark.parametrize("event_type", ["market.tick", "signal.generated"])
@pytest.mark.parametrize("restarts", [False, True])
def test_a_loss_keeps_positions_marks_the_next_bar_and_makes_prices_cold(
    make_policy: Callable[..., Policy], bus_entry: MakeEntry, event_type: str, restarts: bool
) -> None:
    policy = always(make_policy(0), Action.LONG)
    settings = Settings(latency_ms=0, rl_v2="off", max_event_age_s=None)
    pipeline = Pipeline(policy, None, settings, INPUTS)
    commits = [pipeline.begin({}), *fold(pipeline, a_minute_apart(bus_entry, 0, 40))]
    held = pipeline.symbols["AAAUSDT"].v3.account.quantity
    assert held > 0
    assert pipeline.symbols["AAAUSDT"].market.warm
    pipeline.lose(event_type, 7, stream="s:x", after="1-0", upto="9-0")
    pipeline.lose(event_type, 2, stream="s:x", after="9-0", upto="11-0")
    commits.append(pipeline.run([], now_ms=0.0))
    lost = rows(commits[-1:], LedgerRow)
    assert [row.reason for row in lost] == ["lost", "lost"]
    assert [row.counts[event_type]["lost"] for row in lost] == [7, 9]
    assert lost[0].entry_ids == ("s:x|1-0", "s:x|9-0")
    assert set(commits[-1].cells) == {""}  # symbols follow when they come up again
    if restarts:
        pipeline = Pipeline(policy, None, settings, INPUTS)
        pipeline.restore(stored_by(commits))
        assert pipeline.lost == {event_type: 9}
    later = fold(pipeline, a_minute_apart(bus_entry, 40, 43))
    bars = rows(later, BarRow)
    assert [bar.gap for bar in bars] == [True, True, False, False, False, False]
    cold = event_type == "market.tick"
    assert {bar.warm for bar in bars} == {not cold}
    assert {d.warm for d in decisions(later)} == {not cold}
    assert pipeline.symbols["AAAUSDT"].v3.account.quantity == held
    assert pipeline.symbols["AAAUSDT"].market.n_bars == (3 if cold else 42)


def test_an_unknown_loss_stays_unknown(policy: Policy, tables: QTables) -> None:
    pipeline = Pipeline(policy, tables, Settings(), INPUTS)
    pipeline.begin({})
    for entries in (3, None, 4):
        pipeline.lose("market.tick", entries, stream="s", after="1-0", upto="1-0")
    counts = [row.counts for row in rows([pipeline.run([], now_ms=0.0)], LedgerRow)]
    assert counts == [{"market.tick": {"lost": 3}}, {}, {}]


def test_no_loss_is_said_as_0_where_losses_are_counted(
    policy: Policy, tables: QTables, bus_entry: MakeEntry
) -> None:
    counted = {}
    for limit in (1, 64):
        pipeline = Pipeline(policy, tables, Settings(max_events=limit), INPUTS)
        pipeline.count_losses(["market.tick", "rl_v2.decision"])
        commits = [pipeline.begin({}), *fold(pipeline, a_minute_apart(bus_entry, 0, 3))]
        counted[limit] = [row.counts for row in rows([*commits, pipeline.stop()], LedgerRow)]
    assert counted[1] == counted[64]
    # six ticks; what was never read is not in the ledger
    assert counted[64][-1] == {"market.tick": {"decided": 6, "lost": 0}}


def test_counting_that_begins_later_is_a_ledger_row_and_part_of_the_state(
    policy: Policy, tables: QTables
) -> None:
    pipeline = Pipeline(policy, tables, Settings(), INPUTS)
    commits = [pipeline.begin({})]
    pipeline.lose("signal.generated", None, stream="s", after="1-0", upto="2-0")
    pipeline.count_losses(["market.tick", "signal.generated"])
    commits.append(pipeline.run([], now_ms=0.0))
    begun = rows(commits[-1:], LedgerRow)[-1]
    assert (begun.reason, begun.entry_ids) == ("counting", ("market.tick|on",))
    again = Pipeline(policy, tables, Settings(), INPUTS)
    again.restore(stored_by(commits))
    assert again.lost == {"signal.generated": None, "market.tick": 0}
    again.count_losses(["market.tick", "signal.generated"])
    assert again.run([], now_ms=0.0).outputs == []


def test_entries_out_of_order_are_named_in_the_commit_that_folds_them(
    policy: Policy, tables: QTables, bus_entry: MakeEntry
) -> None:
    ticks = a_minute_apart(bus_entry, 0, 6)
    pipeline = Pipeline(policy, tables, Settings(max_event_age_s=None), INPUTS)
    pipeline.begin({})
    commit = pipeline.run(ticks[:8], now_ms=0.0, ahead=3)
    assert commit.taken == 5  # never mixed
    assert not [row for row in rows([commit], LedgerRow) if row.reason == "order"]
    commit = pipeline.run(ticks[5:8], now_ms=0.0, ahead=3)
    named = [row.entry_ids for row in rows([commit], LedgerRow) if row.reason == "order"]
    assert named == [tuple(f"{e.stream}|{e.entry_id}" for e in ticks[5:8])]
    # those ahead do not make what follows late; what is older than the newest in order is
    signal = bus_entry("signal.generated", T0 + 60_000, {"symbol": "AAAUSDT", "side": "BUY"})
    commit = pipeline.run([signal], now_ms=0.0)
    named = [row.entry_ids for row in rows([commit], LedgerRow) if row.reason == "order"]
    assert named == [(f"{signal.stream}|{signal.entry_id}",)]
    commit = pipeline.run(ticks[8:], now_ms=0.0)
    assert not [row for row in rows([commit], LedgerRow) if row.reason == "order"]


def test_an_id_beyond_every_calendar_is_folded_at_the_end_of_time(
    policy: Policy, tables: QTables
) -> None:
    """Redis allows ids up to 2^64 - 1 ms; no date of that year can be written."""
    pipeline = Pipeline(policy, tables, Settings(), INPUTS)
    last = f"{2**64 - 1}-{2**64 - 1}"
    stream = "quantum:stream:market.tick"
    good = {b"payload": b'{"symbol": "AAAUSDT", "price": 100.0}'}
    commits = [
        pipeline.run([Entry(stream, "market.tick", last, fields)], now_ms=0.0, ahead=1)
        for fields in (good, {b"payload": b"{"})
    ]
    (made,) = decisions(commits)
    assert made.source_entry_id == last
    assert made.event_ts == "9999-12-31T23:59:59.999000+00:00"
    assert pipeline.counts == {("market.tick", "decided"): 1, ("market.tick", "dead_letter"): 1}


def test_what_a_newer_tick_follows_is_left_out_across_commits(
    policy: Policy, tables: QTables, bus_entry: MakeEntry
) -> None:
    """A hundred symbols in turn, four times: within one commit of 32 none comes twice."""
    entries = [
        bus_entry("market.tick", T0 + 1 + n, {"symbol": f"S{n % 100:03d}USDT", "price": 100.0 + n})
        for n in range(400)
    ]
    pipeline = Pipeline(policy, tables, Settings(max_events=32), INPUTS)
    commits = fold(pipeline, entries, conflate=True)
    assert pipeline.counts == {("market.tick", "conflated"): 300, ("market.tick", "decided"): 100}
    assert [d.source_entry_id for d in decisions(commits)] == [e.entry_id for e in entries[300:]]
    named = [place for row in rows(commits, LedgerRow) if row.reason == "conflated"
             for place in row.entry_ids]  # fmt: skip
    assert named == [entry.place for entry in entries[:300]]


def test_neither_the_newest_tick_nor_one_that_rl_v2_may_have_meant_is_superseded(
    policy: Policy, tables: QTables, bus_entry: MakeEntry
) -> None:
    pipeline = Pipeline(policy, tables, Settings(), INPUTS)
    a0, b1, a2, a3, a4 = (
        bus_entry("market.tick", T0 + 10 * n, {"symbol": f"{name}USDT", "price": 100.0 + n})
        for n, name in enumerate(("AAA", "BBB", "AAA", "AAA", "AAA"))
    )

    def v2(ms: int, **more: object) -> Entry:
        body = {"schema_version": 1, "symbol": "AAAUSDT", "decision_id": "x", "kind": "combined"}
        return bus_entry("rl_v2.decision", T0 + ms, {**body, "provenance": "q_table", **more})

    assert pipeline.superseded([a0, b1, a2, a3]) == {a0.place, a2.place}
    assert pipeline.superseded([a0, b1, a2, v2(25), a3, a4]) == {a0.place, a3.place}
    named = v2(25, source_stream="market.tick", source_entry_id=a0.entry_id)
    assert pipeline.superseded([a0, b1, a2, named, a3]) == set()
    assert pipeline.superseded([a0, a2, a3, v2(21)]) == {a0.place}  # a2 is within a millisecond
    again = msgspec.structs.replace(a2, entry_id=f"{T0 + 20}-1")
    assert pipeline.superseded([a2, again]) == set()  # a duplicate is decided by neither


@pytest.mark.parametrize("conflate", [False, True])
def test_replays_change_nothing_but_the_ledger_wherever_a_batch_is_cut(
    policy: Policy, tables: QTables, bus_entry: MakeEntry, conflate: bool
) -> None:
    entries = workload(bus_entry, seed=4, minutes=25)
    inputs = (*INPUTS, REPLAY)
    mixed = []
    for n, entry in enumerate(entries):
        mixed.append(entry)
        if n % 40 == 39 and n < 400:  # each of ten twice, the second time much later
            original = msgspec.structs.replace(entry, entry_id=f"5-{n % 200}")
            fields = codec.replay_fields(original)
            stream = f"quantum:stream:{REPLAY}"
            mixed.append(Entry(stream, REPLAY, entry.entry_id, fields))
    plain = Pipeline(policy, tables, Settings(), inputs)
    without = payloads(fold(plain, entries))
    results = []
    for limit in (1, 7, 64):
        pipeline = Pipeline(policy, tables, Settings(max_events=limit), inputs)
        commits = fold(pipeline, mixed, conflate)
        results.append(payloads(commits))
        replayed = [row for row in rows(commits, LedgerRow) if row.reason == "replay"]
        outcomes = {what: n for (name, what), n in pipeline.counts.items() if name == REPLAY}
        assert len(replayed) == outcomes["decided"] > 0
        assert sum(outcomes.values()) == 10
        assert outcomes["duplicate"] > 0
        if not conflate:
            rest = [
                item
                for item in results[-1]
                if item[3].get("kind") != "ledger"
                and not item[3].get("source_entry_id", "").startswith("5-")
            ]
            assert rest == [item for item in without if item[3].get("kind") != "ledger"]
            assert [s.take_cells() for s in pipeline.symbols.values()] == [
                s.take_cells() for s in plain.symbols.values()
            ]
    if not conflate:
        assert results[0] == results[1] == results[2]


LIMITS = RiskLimits(max_daily_loss=2e-4, kill_switch="quantum:kill")
UNBOUND = RiskLimits(max_leverage=1e9)


def risky(pipeline: Pipeline, entries: Sequence[Entry]) -> list[Commit]:
    """Fold with the kill switch engaged for a while, once there is enough history to trade."""
    on, off = engaged_between(entries)
    commits = [pipeline.begin({}), *fold(pipeline, entries[:on])]
    pipeline.kill(True)
    commits += fold(pipeline, entries[on:off])
    pipeline.kill(False)
    return [*commits, *fold(pipeline, entries[off:])]


def engaged_between(entries: Sequence[Entry]) -> tuple[int, int]:
    return 7 * len(entries) // 10, 8 * len(entries) // 10


def test_rulings_do_not_depend_on_where_a_batch_was_cut(
    policy: Policy, tables: QTables, bus_entry: MakeEntry
) -> None:
    entries = workload(bus_entry, seed=5)
    results = []
    for limit in (1, 7, 64):
        settings = Settings(max_events=limit, risk=LIMITS)
        commits = risky(Pipeline(policy, tables, settings, INPUTS), entries)
        results.append(payloads(commits))
    assert results[0] == results[1] == results[2]
    reasons = Counter(d.risk_reason for d in decisions(commits))
    assert reasons["kill_switch"] > 10
    assert reasons["daily_loss"] > 10
    assert all(d.risk_allowed is (d.risk_reason is None) for d in decisions(commits))
    assert [row.entry_ids for row in rows(commits, LedgerRow) if row.reason == "kill"] == [
        ("1|on",),
        ("2|off",),
    ]


def test_limits_annotate_and_change_nothing_that_v3_or_a_verdict_sees(
    policy: Policy, tables: QTables, bus_entry: MakeEntry
) -> None:
    entries = workload(bus_entry, seed=5)
    plain = Pipeline(policy, tables, Settings(), INPUTS)
    bare = [plain.begin({}), *fold(plain, entries)]
    bound = risky(Pipeline(policy, tables, Settings(risk=LIMITS), INPUTS), entries)
    same = {"run_id": "", "latency_ms": 0.0, "risk_allowed": None, "risk_reason": None}
    assert [msgspec.structs.replace(d, **same) for d in decisions(bare)] == [
        msgspec.structs.replace(d, **same) for d in decisions(bound)
    ]
    assert [row.arms for row in rows(bare, BarRow)] == [row.arms for row in rows(bound, BarRow)]
    assert all(row.guarded is None for row in rows(bare, BarRow))
    assert all(d.risk_allowed is None for d in decisions(bare))
    guarded = [row.guarded for row in rows(bound, BarRow)]
    traded = sum(row.arms["v3"].turnover for row in rows(bound, BarRow))
    assert 0.0 < sum(bar.turnover for bar in guarded if bar is not None) < traded


def test_limits_that_never_bind_leave_v3_as_it_is(
    policy: Policy, tables: QTables, bus_entry: MakeEntry
) -> None:
    pipeline = Pipeline(policy, tables, Settings(risk=UNBOUND), INPUTS)
    bars = rows([pipeline.begin({}), *fold(pipeline, workload(bus_entry, seed=6))], BarRow)
    assert sum(row.arms["v3"].turnover for row in bars) > 0.0
    assert all(row.guarded == row.arms["v3"] for row in bars)


def test_a_restart_under_limits_continues_identically(
    policy: Policy, tables: QTables, bus_entry: MakeEntry
) -> None:
    entries = workload(bus_entry, seed=7)
    settings = Settings(max_events=16, risk=LIMITS)
    whole = payloads(risky(Pipeline(policy, tables, settings, INPUTS), entries))
    on, off = engaged_between(entries)
    steps = [(0, on, None), (on, off, True), (off, len(entries), False)]
    pipeline = Pipeline(policy, tables, settings, INPUTS)
    commits = [pipeline.begin({})]
    for begin, end, killed in steps:
        if killed is not None:
            pipeline.kill(killed)
        for at in range(begin, end, 50):
            commits += fold(pipeline, entries[at : min(at + 50, end)])
            cells = stored_by(commits)
            counts = dict(pipeline.counts)
            pipeline = Pipeline(policy, tables, settings, INPUTS)
            pipeline.counts.update(counts)
            assert pipeline.restore(cells) == []
    assert payloads(commits) == whole


def test_settings_with_limits_survive_a_dump_and_older_ones_have_none() -> None:
    assert Settings.restore(Settings(risk=LIMITS).dump()) == Settings(risk=LIMITS)
    assert "risk" not in Settings().dump()
    assert Settings.restore(Settings().dump()) == Settings()
