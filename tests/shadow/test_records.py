"""Do records survive the bus, and does a decision keep production's nine keys?"""

from __future__ import annotations

import json
from typing import get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadow import records
from shadow.records import (
    ArmBar,
    BarRow,
    Comparison,
    Decision,
    Entry,
    LedgerRow,
    OutcomeRow,
    PairRow,
    RunRow,
    UnpairedRow,
    V2Row,
    decision_id,
    decode_comparison,
    decode_decision,
    encode,
    iso,
    record_id,
)

NINE_KEYS = {
    "symbol": str,
    "timestamp": str,
    "action": int,
    "confidence": float,
    "value": float,
    "source": str,
    "shadow_mode": bool,
    "trace_id": str,
    "raw_obs": dict,
}
KINDS = {
    V2Row: "decision",
    PairRow: "pair",
    UnpairedRow: "unpaired",
    BarRow: "bar",
    OutcomeRow: "outcome",
    LedgerRow: "ledger",
    RunRow: "run",
}
ARM = ArmBar(
    exposure=0.1, gross=1e-4, turnover=0.1, fee=4e-5, slippage=1e-5, gross_late=9e-5,
    equity=10_000.5, ruined=False,
)  # fmt: skip
SAMPLES = {
    "str": "x",
    "int": 7,
    "float": 0.25,
    "bool": True,
    "tuple[float, ...]": (0.5, 0.1),
    "tuple[str, ...]": ("HOLD", "LONG"),
    "dict[str, int]": {"present": 18},
    "dict[str, float]": {"price": 96_000.5},
    "dict[str, str]": {"seed": "1"},
    "ArmBar": ARM,
    "dict[str, ArmBar]": {"v3": ARM},
    "dict[str, dict[str, int]]": {"market.tick": {"decided": 3}},
}


def sample(kind: type[msgspec.Struct], *, absent: bool = False) -> msgspec.Struct:
    """A record with a value in every field; `absent` leaves out all that may be unknown."""
    values: dict[str, object] = {}
    for name, annotation in kind.__annotations__.items():
        plain, optional, _ = annotation.partition(" | None")
        values[name] = None if optional and absent else SAMPLES[plain]
    return kind(**values)


def test_every_record_kind_is_covered() -> None:
    assert set(get_args(Comparison)) == set(KINDS)


@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_comparison_survives_the_bus_under_its_kind(
    kind: type[msgspec.Struct], absent: bool
) -> None:
    row = sample(kind, absent=absent)
    raw = encode(row)
    assert decode_comparison(raw) == row
    assert json.loads(raw)["kind"] == KINDS[kind]


def test_every_record_names_its_run_symbol_time_and_policy() -> None:
    for kind in KINDS:
        assert {
            "record_id", "run_id", "symbol", "event_ts_us", "policy_digest", "schema_version",
        } <= set(kind.__struct_fields__)  # fmt: skip


def test_bar_keeps_float32_observations_exactly() -> None:
    # float32(0.1) as a double has 24 significant bits; JSON's shortest form must bring them back
    exact = 0.100000001490116119384765625
    row = msgspec.structs.replace(sample(BarRow), obs=(exact,) * 64)
    assert decode_comparison(encode(row)).obs == (exact,) * 64


@pytest.mark.parametrize("absent", [False, True])
def test_decision_survives_the_bus(absent: bool) -> None:
    decision = sample(Decision, absent=absent)
    assert decode_decision(encode(decision)) == decision


def test_decision_starts_with_productions_nine_keys_and_types() -> None:
    loaded = json.loads(encode(sample(Decision)))
    assert list(loaded)[:9] == list(NINE_KEYS)
    for name, kind in NINE_KEYS.items():
        assert type(loaded[name]) is kind, name


def test_float_that_is_whole_stays_a_float_on_the_bus() -> None:
    decision = msgspec.structs.replace(sample(Decision), confidence=1.0, value=-2.0)
    assert type(json.loads(encode(decision))["confidence"]) is float
    assert type(json.loads(encode(decision))["value"]) is float


def test_ids_are_the_same_for_ever() -> None:
    # sha256 of the parts joined by NUL, cut to 32 hex digits; a change here breaks replays
    assert decision_id("quantum:stream:market.tick", "1771364397517-1", "ab12") == (
        "39782df602d93ebb565e329857cec5a1"
    )
    assert record_id("bar", "BTCUSDT", 1_771_364_400_000_000) == "4a26cb00d71b0d593af430b5430e1183"


def test_every_part_of_an_id_counts() -> None:
    base = ("stream", "1-0", "digest")
    changed = [("stream2", "1-0", "digest"), ("stream", "1-1", "digest"), ("stream", "1-0", "d")]
    assert len({decision_id(*parts) for parts in [base, *changed]}) == 4
    assert record_id("a", "bc") != record_id("ab", "c")
    assert record_id("v2", "s", "1-0") != record_id("v3", "s", "1-0")


@pytest.mark.parametrize(
    ("ts_us", "text"),
    [
        (0, "1970-01-01T00:00:00.000000+00:00"),
        (1, "1970-01-01T00:00:00.000001+00:00"),
        (1_771_364_397_517_197, "2026-02-17T21:39:57.517197+00:00"),
        (1_771_364_400_000_000, "2026-02-17T21:40:00.000000+00:00"),
        (253_402_300_799_999_999, "9999-12-31T23:59:59.999999+00:00"),
    ],
)
def test_iso_has_always_microseconds_and_an_offset(ts_us: int, text: str) -> None:
    assert iso(ts_us) == text


@given(st.integers(0, 4_102_444_800_000_000), st.integers(0, 4_102_444_800_000_000))
def test_iso_sorts_like_time(first: int, second: int) -> None:
    assert (iso(first) < iso(second)) == (first < second)


def test_entry_knows_the_milliseconds_of_its_id() -> None:
    assert Entry("s", "market.tick", "1771364397517-12", {}).id_ms == 1_771_364_397_517


def test_arms_are_the_four_that_are_compared() -> None:
    assert records.ARMS == ("v3", "v2", "follow_signal", "flat")
