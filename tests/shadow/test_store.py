"""The store keeps every record once, bit for bit, whatever is interrupted."""

from __future__ import annotations

import os
import struct
import threading
import time
from pathlib import Path

import duckdb
import msgspec
import pytest

from rlv3.errors import DataError, UserError
from shadow.records import (
    ARMS,
    ArmBar,
    BarRow,
    Decision,
    LedgerRow,
    PairRow,
    RunRow,
    UnpairedRow,
    encode,
    iso,
)
from shadow.segments import SegmentWriter, list_segments, valid_segments
from shadow.store import RECORDS, TABLES, StoreReader, StoreWriter, duckdb_type

DECISIONS = "quantum:stream:rl_v3.decision"
COMPARISONS = "quantum:stream:rl_v3.comparison"
DAY_MS = 86_400_000
NOON = 20_000 * DAY_MS + DAY_MS // 2  # 2024-10-04T12:00:00Z
AWKWARD = (0.1, -0.0, 5e-324, 2.2250738585072011e-308, 1.7976931348623157e308, 1e23, 1 / 3)
OBS = tuple(struct.unpack("<f", struct.pack("<f", 0.1 * i - 3.0))[0] for i in range(64))


def decision(number: int, *, value: float = 0.1, symbol: str = "BTCUSDT") -> Decision:
    return Decision(
        symbol=symbol,
        timestamp=iso(NOON * 1000 + number),
        action=1,
        confidence=0.75,
        value=value,
        source="RL_V3_PPO",
        shadow_mode=True,
        trace_id="",
        raw_obs={"price": value, "volatility": 0.1, "prediction": 1.0, "position_size": -0.05},
        schema_version=1,
        decision_id=f"{number:032x}",
        kind="step",
        action_name="LONG",
        action_probs=(0.1, 0.5, 0.1, 0.1, 0.1, 0.1),
        entropy=1.5,
        direction=None,
        target_position=0.1,
        standing_decision_id=None,
        warm=True,
        feature_quality={"missing_mask": 5, "present": 16, "of": 18},
        value_confidence=0.01,
        tp_zone_multiplier=1.0,
        suggested_tp_pct=1.0,
        model_id="abc",
        model_sha256="abc" * 20,
        feature_version="seed:abc",
        event_ts=iso(NOON * 1000 + number),
        source_event_type="market.tick",
        source_stream="quantum:stream:market.tick",
        source_entry_id=f"{NOON + number}-0",
        source_trace_id="",
        source_correlation_id="",
        run_id="run",
        latency_ms=0.5,
    )


def bar(number: int) -> BarRow:
    def arm(scale: float) -> ArmBar:
        return ArmBar(scale, 0.2, 0.3, 0.4, 0.5, 0.6, 10_000.0 + scale, ruined=scale == 4.0)

    return BarRow(
        record_id=f"bar{number}",
        run_id="run",
        symbol="ETHUSDT",
        event_ts_us=NOON * 1000 + number * 60_000_000,
        open=1.0,
        high=2.0,
        low=0.5,
        close=1.5,
        volume=None,
        empty_after=0,
        restarted=False,
        gap=False,
        warm=True,
        regime="TREND",
        bus_regime=None,
        arms={name: arm(float(index)) for index, name in enumerate(ARMS, 1)},
        opponent="local_reference",
        opponent_digest=None,
        step_decision_id=None,
        obs=OBS,
        missing_mask=3,
        policy_digest="abc",
    )


def unpaired(number: int) -> UnpairedRow:
    return UnpairedRow(
        record_id=f"unpaired{number}",
        run_id="run",
        symbol="ETHUSDT",
        event_ts_us=NOON * 1000 + number,
        side="v2",
        decision_id="d",
        reason="missing_v3",
        opponent=None,
        policy_digest="abc",
    )


def add(writer: StoreWriter, *numbers: int, start_ms: int = NOON) -> None:
    for number in numbers:
        writer.append(DECISIONS, f"{start_ms + number}-0", encode(decision(number)))


def ids(directory: Path, table: str = "decisions") -> list[str]:
    with StoreReader(directory).connect() as connection:
        return [row[0] for row in connection.execute(f"SELECT stream_id FROM {table}").fetchall()]


def numbered(*numbers: int, start_ms: int = NOON) -> list[str]:
    return [f"{start_ms + number}-0" for number in numbers]


def bits(value: float) -> bytes:
    return struct.pack("<d", value)


def segments(directory: Path, table: str = "decisions") -> list[str]:
    return sorted(path.name for path in (directory / table).rglob("*.parquet"))


def test_duckdb_type_follows_the_field_types() -> None:
    assert duckdb_type(float | None) == "DOUBLE"
    assert duckdb_type(tuple[str, ...]) == "VARCHAR[]"
    assert duckdb_type(dict[str, dict[str, int]]) == "MAP(VARCHAR, MAP(VARCHAR, BIGINT))"


def test_columns_are_the_fields_of_the_records_and_a_bar_flattens_its_arms() -> None:
    for name, record in RECORDS.items():
        expected = [field for field in record.__struct_fields__ if field != "arms"]
        columns = [name for name in TABLES[name].columns if name in expected]
        assert columns == expected
    assert TABLES["bars"].columns["follow_signal_gross_late"][0] == "DOUBLE"
    assert TABLES["bars"].columns["event_ts_us"][0] == "BIGINT"
    assert len(TABLES["bars"].columns) == len(BarRow.__struct_fields__) - 1 + 4 * 8 + 1


def test_values_survive_bit_for_bit_with_their_nulls(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path)
    for number, value in enumerate(AWKWARD):
        writer.append(DECISIONS, f"{NOON + number}-0", encode(decision(number, value=value)))
    writer.append(COMPARISONS, f"{NOON}-0", encode(bar(1)))
    writer.flush()
    with StoreReader(tmp_path).connect() as connection:
        stored = connection.execute("SELECT value, raw_obs['price'], direction FROM decisions")
        for expected, (value, price, direction) in zip(AWKWARD, stored.fetchall(), strict=True):
            assert bits(value) == bits(price) == bits(expected)
            assert direction is None
        row = connection.execute(
            "SELECT obs, volume, v3_exposure, v2_exposure, flat_ruined, v3_ruined, event_time, "
            "event_ts_us, bus_regime FROM bars"
        ).fetchone()
    assert row is not None
    assert tuple(row[0]) == OBS
    assert row[1:6] == (None, 1.0, 2.0, True, False)
    assert f"{row[6]} {row[7]}" == f"2024-10-04 12:01:00 {NOON * 1000 + 60_000_000}"
    assert row[8] is None


def test_every_kind_finds_its_table_and_its_nested_values(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path)
    base = {"record_id": "x", "run_id": "run", "symbol": "", "event_ts_us": 1, "policy_digest": "p"}
    ledger = LedgerRow(
        reason="conflated", counts={"market.tick": {"decided": 7}}, entry_ids=("s|1-0",), **base
    )
    run = RunRow(
        feature_digest="f",
        action_table=("HOLD", "LONG"),
        training={"steps": "10"},
        rl_v2="reference",
        tables_digest=None,
        settings={"latency_ms": 250.0},
        **base,
    )
    assert writer.append(COMPARISONS, "1-0", encode(ledger)) == "ledger"
    assert writer.append(COMPARISONS, "1-1", encode(run)) == "runs"
    assert writer.append(COMPARISONS, "1-2", msgspec.msgpack.encode(bar(1))) == "bars"
    writer.flush()
    with StoreReader(tmp_path).connect() as connection:
        assert connection.execute("SELECT counts, entry_ids FROM ledger").fetchall() == [
            ({"market.tick": {"decided": 7}}, ["s|1-0"])
        ]
        assert connection.execute(
            "SELECT action_table, training, settings, tables_digest FROM runs"
        ).fetchall() == [(["HOLD", "LONG"], {"steps": "10"}, {"latency_ms": 250.0}, None)]
        assert connection.execute("SELECT count(*) FROM bars").fetchall() == [(1,)]


def test_a_table_without_rows_is_a_typed_empty_view(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path)
    add(writer, 1)
    writer.flush()
    with StoreReader(tmp_path).connect() as connection:
        assert connection.execute("SELECT count(*), sum(delta_us) FROM pairs").fetchall() == [
            (0, None)
        ]
        kinds = {row[0]: row[1] for row in connection.execute("DESCRIBE pairs").fetchall()}
    assert kinds["delta_us"] == "BIGINT"
    assert kinds["agree"] == "BOOLEAN"
    assert set(PairRow.__struct_fields__) <= set(kinds)


def test_a_segment_never_crosses_a_utc_day(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path)
    midnight = 20_001 * DAY_MS
    add(writer, -1, 0, 1, start_ms=midnight)
    writer.flush()
    days = list_segments(tmp_path, "decisions")
    assert {day: len(found) for day, found in days.items()} == {"2024-10-04": 1, "2024-10-05": 1}
    assert segments(tmp_path) == [f"{midnight - 1}-0_{midnight + 1}-0.parquet"] * 2
    assert ids(tmp_path) == numbered(-1, 0, 1, start_ms=midnight)


def test_what_cannot_be_read_is_parked_with_its_reason(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path)
    later = encode(msgspec.structs.replace(decision(1), schema_version=2))
    huge = encode(msgspec.structs.replace(bar(1), missing_mask=1 << 63))
    assert writer.append(DECISIONS, "1-0", b"") == "rejected"
    assert writer.append(DECISIONS, "1-1", b"\xff\xfe") == "rejected"
    assert writer.append(DECISIONS, "1-2", later) == "rejected"
    assert writer.append(DECISIONS, "1-3", b"{" * 100_000) == "rejected"
    assert writer.append(COMPARISONS, "1-0", b'{"kind":"next_year"}') == "rejected"
    assert writer.append(COMPARISONS, "1-1", huge) == "rejected"
    assert writer.append(DECISIONS, "1-4", b" " * (9 << 20)) == "rejected"
    add(writer, 5)
    writer.flush()
    reader = StoreReader(tmp_path)
    assert reader.check()["rejected"] == 7
    with reader.connect() as connection:
        rows = connection.execute("SELECT stream_id, reason, size, payload FROM rejected")
        parked = {(row[0], row[2]): row for row in rows.fetchall()}
    assert "schema version 1 or older, found 2" in parked["1-2", len(later)][1]
    assert parked["1-2", len(later)][3] == later
    assert "9223372036854775808" in parked["1-1", len(huge)][1]
    assert len(parked["1-4", 9 << 20][3]) == 65_536


def test_odd_but_legal_strings_do_not_disturb_their_neighbours(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path)
    symbols = ["a\x00b", "\u2028'\"\\", "🦆\ud7ff", "", "line\nbreak\r\n", '{"not":"json"}']
    for number, symbol in enumerate(symbols):
        writer.append(DECISIONS, f"{NOON + number}-0", encode(decision(number, symbol=symbol)))
    writer.flush()
    with StoreReader(tmp_path).connect() as connection:
        rows = connection.execute("SELECT symbol FROM decisions").fetchall()
    assert [symbol for (symbol,) in rows] == symbols


def test_restart_continues_at_the_durable_position(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path)
    add(writer, 1, 2)
    assert writer.flush() == {DECISIONS: f"{NOON + 2}-0"}
    add(writer, 3)  # never flushed
    writer.close()
    writer = StoreWriter(tmp_path)
    assert writer.position == {DECISIONS: f"{NOON + 2}-0"}
    add(writer, 3, 4)
    writer.flush()
    writer.close()
    assert ids(tmp_path) == numbered(1, 2, 3, 4)


def test_kill_between_segment_and_position_neither_loses_nor_repeats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = StoreWriter(tmp_path)
    add(writer, 1, 2)
    writer.flush()
    add(writer, 3)
    monkeypatch.setattr(SegmentWriter, "_commit", _killed)
    with pytest.raises(KeyboardInterrupt):
        writer.flush()
    monkeypatch.undo()
    assert len(segments(tmp_path)) == 2  # the leftover is there
    assert ids(tmp_path) == numbered(1, 2)  # and no reader sees it
    writer.close()
    writer = StoreWriter(tmp_path)
    assert len(segments(tmp_path)) == 1
    add(writer, 3, 4)
    writer.flush()
    assert ids(tmp_path) == numbered(1, 2, 3, 4)


def _killed(_self: SegmentWriter) -> None:
    raise KeyboardInterrupt


def _disk_full(_self: SegmentWriter) -> None:
    raise OSError(28, "No space left on device")


def test_a_failed_flush_is_repeated_with_what_came_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = StoreWriter(tmp_path)
    add(writer, 1)
    monkeypatch.setattr(SegmentWriter, "_commit", _disk_full)
    with pytest.raises(OSError, match="No space"):
        writer.flush()
    monkeypatch.undo()
    add(writer, 2)
    writer.flush()
    assert segments(tmp_path) == [f"{NOON + 1}-0_{NOON + 2}-0.parquet"]
    assert ids(tmp_path) == numbered(1, 2)
    assert StoreReader(tmp_path).check()["decisions"] == 2


def test_leftover_temporary_files_are_deleted_at_start(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path)
    add(writer, 1)
    writer.flush()
    writer.close()
    folder = next((tmp_path / "decisions").iterdir())
    (folder / ".1-0_2-0.parquet.tmp").write_bytes(b"PAR1 half a segm")
    (folder / ".1-0_2-0.parquet.ndjson.tmp").write_bytes(b'{"a"')
    (tmp_path / ".position.json.tmp").write_bytes(b"{")
    StoreWriter(tmp_path).close()
    assert not list(tmp_path.rglob("*.tmp"))
    assert ids(tmp_path) == numbered(1)


def test_a_torn_leftover_is_ignored_and_a_torn_segment_is_named(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path)
    add(writer, 1, 2)
    writer.flush()
    writer.close()
    (whole,) = (tmp_path / "decisions").rglob("*.parquet")
    content = whole.read_bytes()
    torn = whole.with_name(f"{NOON + 3}-0_{NOON + 9}-0.parquet")
    torn.write_bytes(content[: len(content) // 3])
    assert ids(tmp_path) == numbered(1, 2)
    StoreWriter(tmp_path).close()
    assert not torn.exists()
    for size in (0, 3, len(content) // 2, len(content) - 1):
        whole.write_bytes(content[:size])
        with pytest.raises(DataError, match="decisions"):
            StoreReader(tmp_path).check()
    whole.write_bytes(content)
    assert StoreReader(tmp_path).check()["decisions"] == 2
    whole.unlink()
    with pytest.raises(DataError, match=r"expected 2 rows .*, found 0"):
        StoreReader(tmp_path).check()


def test_compaction_merges_a_finished_day_only(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path)
    for number in range(5):
        add(writer, number)
        writer.flush()
    assert writer.compact("2024-10-04") == 0  # the stream may still add to it
    add(writer, DAY_MS)
    writer.flush()
    assert writer.tidy() == 5
    expected = numbered(0, 1, 2, 3, 4, DAY_MS)
    assert ids(tmp_path) == expected
    assert len(segments(tmp_path)) == 7  # a reader that listed the sources may still open them
    writer.close()
    assert segments(tmp_path) == [
        f"{NOON}-0_{NOON + 4}-0.parquet",
        f"{NOON + DAY_MS}-0_{NOON + DAY_MS}-0.parquet",
    ]
    assert ids(tmp_path) == expected
    assert StoreReader(tmp_path).check()["decisions"] == 6


def test_compaction_survives_a_kill_before_the_sources_are_deleted(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path)
    for number in (0, 1, DAY_MS):
        add(writer, number)
        writer.flush()
    os.close(writer.segments._lock)  # the process dies right after the rename
    writer.compact("2024-10-04")
    assert len(segments(tmp_path)) == 4
    assert ids(tmp_path) == numbered(0, 1, DAY_MS)
    writer = StoreWriter(tmp_path)
    assert len(segments(tmp_path)) == 2
    assert ids(tmp_path) == numbered(0, 1, DAY_MS)
    assert writer.tidy() == 0


def test_small_segments_of_an_open_day_are_merged(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path)
    for number in range(64):
        add(writer, number)
        writer.flush()
    assert writer.tidy() == 64
    add(writer, 64)
    writer.flush()
    writer.close()
    assert len(segments(tmp_path)) == 2
    assert ids(tmp_path) == numbered(*range(65))


def test_a_merge_that_has_begun_is_waited_for_and_no_other_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = StoreWriter(tmp_path)
    for number in range(64):
        add(writer, number)
        writer.flush()
    begun = threading.Event()
    copy = SegmentWriter._copy

    def slow(self: SegmentWriter, query: str, path: Path, row_group: int) -> None:
        begun.set()
        time.sleep(0.2)
        copy(self, query, path, row_group)

    monkeypatch.setattr(SegmentWriter, "_copy", slow)
    merged: list[int] = []
    merging = threading.Thread(target=lambda: merged.append(writer.tidy()))
    merging.start()
    begun.wait()
    writer.close()
    merging.join()
    assert merged == [64]
    assert ids(tmp_path) == numbered(*range(64))
    assert writer.tidy() == 0


def test_a_reader_that_knew_the_position_before_a_merge_still_reads_once(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path)
    add(writer, 1)
    writer.flush()
    add(writer, 2)
    writer.flush()
    reader = StoreReader(tmp_path)
    add(writer, DAY_MS)
    writer.flush()
    writer.tidy()
    spec = TABLES["decisions"]
    assert [item.last for item in valid_segments(tmp_path, spec, reader.position)] == [
        (NOON + 2, 0)
    ]
    with reader.connect() as connection:
        rows = connection.execute("SELECT stream_id FROM decisions").fetchall()
    assert [row[0] for row in rows] == numbered(1, 2)


def test_a_second_writer_is_refused_until_the_first_closes(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path)
    with pytest.raises(UserError, match="only writer"):
        StoreWriter(tmp_path)
    writer.close()
    StoreWriter(tmp_path).close()


def test_a_record_that_a_restored_redis_sends_again_is_kept_once(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path)
    add(writer, 1, 2)
    writer.append(COMPARISONS, "5-0", encode(unpaired(1)))
    writer.flush()
    writer.close()
    writer = StoreWriter(tmp_path)
    again = encode(decision(2))
    assert writer.append(DECISIONS, f"{NOON + 3}-0", again) == "repeated"
    assert writer.append(COMPARISONS, "6-0", encode(unpaired(1))) == "repeated"
    assert writer.append(COMPARISONS, "6-1", encode(unpaired(2))) == "unpaired"
    assert writer.flush()[DECISIONS] == f"{NOON + 3}-0"
    writer.close()
    assert ids(tmp_path) == numbered(1, 2)
    writer = StoreWriter(tmp_path)
    assert writer.counts(DECISIONS)["repeated"] == 1
    assert StoreReader(tmp_path).check()["unpaired"] == 2


def test_ids_must_grow_and_streams_must_be_ours(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path)
    add(writer, 1)
    with pytest.raises(ValueError, match="must grow"):
        add(writer, 1)
    with pytest.raises(ValueError, match=r"got .*market\.tick"):
        writer.append("quantum:stream:market.tick", "1-0", b"{}")
    with pytest.raises(DataError, match="cannot take other"):
        writer.append("other:stream:rl_v3.decision", f"{NOON + 2}-0", encode(decision(2)))


def test_a_missing_or_empty_store_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found no such directory"):
        StoreReader(tmp_path / "nowhere")
    with pytest.raises(DataError, match="found no position file"):
        StoreReader(tmp_path)
    (tmp_path / "position.json").write_text("[]")
    with pytest.raises(DataError, match="not readable as a store position"):
        StoreReader(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write"):
        StoreWriter(tmp_path / "file" / "store")


def test_plain_duckdb_reads_the_segments_by_glob(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path)
    add(writer, 1)
    writer.flush()
    add(writer, 2, DAY_MS)
    writer.flush()
    writer.close()
    with duckdb.connect(":memory:") as connection:
        rows = connection.execute(
            f"SELECT stream_id, day FROM '{tmp_path}/decisions/*/*.parquet' ORDER BY ALL"
        ).fetchall()
    assert [(stream_id, str(day)) for stream_id, day in rows] == [
        (f"{NOON + 1}-0", "2024-10-04"),
        (f"{NOON + 2}-0", "2024-10-04"),
        (f"{NOON + DAY_MS}-0", "2024-10-05"),
    ]
