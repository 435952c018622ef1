from __future__ import annotations

from msgspec.structs import astuple

from shadow.pairing import BUS, REFERENCE, RING, Candidate, Match, OpenV2, Pairing, Unmatched

S = 1_000_000
WINDOW = 30 * S


def v3(
    name: str, ts_us: int, *, kind: str = "step", signal: bool = False, entry: str = "9-9",
    trace: str | None = None, correlation: str | None = None,
) -> Candidate:  # fmt: skip
    return Candidate(
        name, "s", entry, trace, correlation, ts_us, "market.tick", kind, 0, 1.0, 0.0, 0.0, True,
        signal,
    )  # fmt: skip


def v2(
    name: str, ts_us: int, *, entry: str | None = None, trace: str | None = None,
    correlation: str | None = None, bit: int = BUS,
) -> OpenV2:  # fmt: skip
    return OpenV2(
        name, ts_us, "s" if entry else None, entry, trace, correlation, 1, 0.1, "q_table", None,
        WINDOW, bit,
    )  # fmt: skip


def test_rules_are_tried_in_order() -> None:
    pairing = Pairing()
    for candidate in (
        v3("near", 100 * S),
        v3("same-time", 50 * S, kind="advisory"),
        v3("correlation", 10 * S, correlation="c"),
        v3("trace", 20 * S, trace="t"),
        v3("entry", 30 * S, entry="1-1"),
    ):
        pairing.add(candidate, WINDOW)
    found = []
    for n in range(4):
        match = pairing.offer(v2(f"v2-{n}", 50 * S, entry="1-1", trace="t", correlation="c"))
        assert match is not None
        found.append((match.rule, match.v3.decision_id))
    assert found == [(1, "entry"), (2, "trace"), (3, "correlation"), (4, "same-time")]


def test_one_to_one_holds_per_opponent() -> None:
    pairing = Pairing()
    pairing.add(v3("a", 0, entry="1-1"), WINDOW)
    first = pairing.offer(v2("x", 0, entry="1-1", bit=REFERENCE))
    second = pairing.offer(v2("y", 0, entry="1-1", bit=BUS))
    third = pairing.offer(v2("z", 0, entry="1-1", bit=BUS))
    assert first is not None
    assert second is not None
    assert third is None


def test_v3_arriving_later_settles_an_open_v2_decision() -> None:
    pairing = Pairing()
    assert pairing.offer(v2("x", 5 * S, entry="1-1")) is None
    matches, gone = pairing.add(v3("a", 8 * S, entry="1-1"), WINDOW)
    assert [(m.v2.decision_id, m.v3.decision_id, m.rule) for m in matches] == [("x", "a", 1)]
    assert gone == []
    assert pairing.open_v2 == []


def test_nearest_waits_for_the_window_and_takes_the_nearest() -> None:
    pairing = Pairing()
    pairing.add(v3("before", 90 * S), WINDOW)
    assert pairing.offer(v2("x", 100 * S)) is None
    pairing.add(v3("after", 105 * S), WINDOW)
    assert pairing.expire(130 * S, WINDOW, opponent_off=False) == []
    (match,) = pairing.expire(130 * S + 1, WINDOW, opponent_off=False)
    assert isinstance(match, Match)
    assert (match.rule, match.v3.decision_id) == (5, "after")


def test_advisory_candidates_are_not_taken_by_rule_five() -> None:
    pairing = Pairing()
    pairing.add(v3("tick", 100 * S + 2_000, kind="advisory"), WINDOW)
    pairing.offer(v2("x", 100 * S))
    assert pairing.expire(200 * S, WINDOW, opponent_off=False) == [
        Unmatched("v2", "x", 100 * S, "missing_v3", "q_table")
    ]


def test_taken_candidate_is_named_as_the_reason() -> None:
    pairing = Pairing()
    pairing.add(v3("a", 100 * S), WINDOW)
    pairing.offer(v2("x", 101 * S))
    pairing.offer(v2("y", 102 * S))
    results = pairing.expire(200 * S, WINDOW, opponent_off=False)
    assert isinstance(results[0], Match)
    assert results[1] == Unmatched("v2", "y", 102 * S, "candidate_taken", "q_table")


def test_unpaired_signal_is_reported_once_and_never_paired_after() -> None:
    pairing = Pairing()
    pairing.add(v3("s", 10 * S, kind="advisory", signal=True, entry="1-1"), WINDOW)
    assert pairing.expire(41 * S, WINDOW, opponent_off=False) == [
        Unmatched("v3", "s", 10 * S, "missing_v2", None)
    ]
    assert pairing.expire(99 * S, WINDOW, opponent_off=False) == []
    assert pairing.offer(v2("x", 10 * S, entry="1-1")) is None


def test_advisory_tick_is_never_unmatched() -> None:
    pairing = Pairing()
    pairing.add(v3("t", 10 * S, kind="advisory"), WINDOW)
    pairing.add(v3("step", 10 * S), WINDOW)
    assert pairing.expire(10_000 * S, WINDOW, opponent_off=False) == []


def test_signal_pushed_out_of_the_ring_is_reported() -> None:
    pairing = Pairing()
    pairing.add(v3("s", 0, kind="advisory", signal=True), WINDOW)
    reported = []
    for n in range(RING):
        reported += pairing.add(v3(f"step-{n}", n), WINDOW)[1]
    assert reported == [Unmatched("v3", "s", 0, "evicted", None)]


def test_dump_and_load_keep_candidates_and_open_decisions() -> None:
    one = Pairing()
    one.add(v3("a", 1, entry="1-1"), WINDOW)
    one.add(v3("b", 2, kind="advisory", entry="2-2"), WINDOW)
    one.offer(v2("x", 90 * S))
    two = Pairing()
    slots = {
        name: list(astuple(c)) for name, c in (("m0", one.main[0]), ("a0", one.advisory[0])) if c
    }
    two.load([list(v) if isinstance(v, list) else v for v in one.dump()], slots)
    assert two.main[0] == one.main[0]
    assert two.advisory[0] == one.advisory[0]
    assert two.open_v2 == one.open_v2
    assert two.deadline == one.deadline


def test_a_decision_that_judged_a_signal_is_not_paired_with_a_nearer_step() -> None:
    pairing = Pairing()
    pairing.add(v3("signal", 100 * S, kind="advisory", signal=True), WINDOW)
    pairing.add(v3("step", 101 * S), WINDOW)
    assert pairing.offer(v2("x", 101 * S)._replace(judged=True)) is None  # not rule 4 either
    (match,) = pairing.expire(132 * S, WINDOW, opponent_off=False)
    assert isinstance(match, Match)
    assert (match.rule, match.v3.decision_id) == (5, "signal")


def test_a_tick_that_comes_later_at_the_same_time_is_not_what_judged_a_signal() -> None:
    pairing = Pairing()
    pairing.add(v3("signal", 99 * S, kind="advisory", signal=True), WINDOW)
    pairing.offer(v2("x", 100 * S)._replace(judged=True))
    assert pairing.add(v3("tick", 100 * S, kind="advisory"), WINDOW) == ([], [])
    assert [v.decision_id for v in pairing.open_v2] == ["x"]


def test_where_v3_sees_no_signals_a_judged_one_is_paired_with_the_nearest_step() -> None:
    pairing = Pairing()
    pairing.add(v3("step", 101 * S), WINDOW)
    pairing.offer(v2("x", 100 * S)._replace(judged=True))
    (match,) = pairing.expire(140 * S, WINDOW, opponent_off=False)
    assert isinstance(match, Match)
    assert match.v3.decision_id == "step"


def test_a_signal_does_not_expire_while_an_open_decision_may_take_it() -> None:
    pairing = Pairing()
    pairing.add(v3("signal", 100 * S, kind="advisory", signal=True), 2 * S)
    late = v2("x", 100 * S + 250_000)._replace(judged=True, window_us=2 * S)
    assert pairing.offer(late) is None
    assert pairing.expire(102 * S + 100_000, 2 * S, opponent_off=False) == []
    assert pairing.deadline == 102 * S + 250_000
    (match,) = pairing.expire(102 * S + 250_001, 2 * S, opponent_off=False)
    assert isinstance(match, Match)
    assert match.v3.decision_id == "signal"


def test_a_decision_that_comes_again_is_a_duplicate_paired_or_open() -> None:
    pairing = Pairing()
    pairing.add(v3("signal", 100 * S, kind="advisory", signal=True, entry="1-1"), WINDOW)
    duplicate = Unmatched("v2", "x", 100 * S, "duplicate", "q_table")
    assert isinstance(pairing.offer(v2("x", 100 * S, entry="1-1")), Match)
    assert pairing.offer(v2("x", 100 * S, entry="1-1")) == duplicate
    assert pairing.offer(v2("y", 150 * S)) is None
    assert pairing.offer(v2("y", 150 * S)) == duplicate._replace(decision_id="y", ts_us=150 * S)
    assert len(pairing.open_v2) == 1


def test_slots_of_an_earlier_version_are_read() -> None:
    one, two = Pairing(), Pairing()
    candidate = v3("a", 1, entry="1-1")
    two.load(one.dump(), {"m0": list(astuple(candidate))[:-1]})
    assert two.main[0] == candidate
