"""The backtest is the worker's fold over history: repeatable, fair, strict at the door."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from rlv3.errors import DataError
from rlv3.market import Bars, simulate
from rlv3.policy import Policy
from shadow.backtest import SelfPlayError, backtest, check_equal, fold
from shadow.evaluation.behaviour import CLASSES
from shadow.evaluation.effect import Range
from shadow.evaluation.register import Terms, register, run_of
from shadow.history import STREAMS, entries
from shadow.pipeline import Pipeline, Settings
from shadow.records import BarRow, Commit, Output, decode_comparison, encode
from shadow.reporting.report import read_report
from shadow.store import RECORDS, StoreReader


@pytest.fixture
def bars() -> list[Bars]:
    return [
        simulate("regime_switching", 120, seed=i, symbol=s)
        for i, s in enumerate(("AAAUSDT", "BBBUSDT"))
    ]


def everything(store: Path) -> dict[str, Any]:
    with StoreReader(store).connect() as connection:
        return {
            name: connection.execute(f"SELECT * FROM {name} ORDER BY stream_id").fetchall()
            for name in RECORDS
        }


def test_the_same_bars_and_policy_give_the_same_store(
    bars: list[Bars], make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    done = [backtest(make_policy(seed=2), bars, store_dir=tmp_path / name) for name in "xy"]
    assert everything(tmp_path / "x") == everything(tmp_path / "y")
    assert done[0].equity == done[1].equity
    # two ticks a bar; the last bar of either symbol is never closed
    signals = len(everything(tmp_path / "x")["v2_decisions"])
    assert done[0].entries == done[0].decisions == 2 * 2 * 120 + signals
    assert done[0].bars == 2 * 119
    assert done[0].pairs == signals
    assert done[0].rejected == 0


def test_stream_ids_say_when_an_output_was_decided(
    bars: list[Bars], make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    backtest(make_policy(seed=2), bars, store_dir=tmp_path / "store")
    with StoreReader(tmp_path / "store").connect() as connection:
        late = connection.execute(
            "SELECT min(split_part(stream_id, '-', 1)::BIGINT "
            "- split_part(source_entry_id, '-', 1)::BIGINT) FROM decisions"
        ).fetchone()
    assert late == (0,)


def test_v3_against_itself_comes_out_equal(
    bars: list[Bars], make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    backtest(make_policy(seed=2), bars, store_dir=tmp_path / "store", self_play=True)
    with StoreReader(tmp_path / "store").connect() as connection:
        (traded, opponents) = connection.execute(
            "SELECT sum(v3_turnover), list(DISTINCT opponent) FROM bars"
        ).fetchone()
        for name in ("exposure", "gross", "turnover", "fee", "slippage", "gross_late", "equity"):
            query = f"SELECT max(abs(v3_{name} - v2_{name})) FROM bars"
            assert connection.execute(query).fetchone() == (0.0,), name
    assert traded > 1.0
    assert opponents == ["v3"]


def test_registered_self_play_is_kept_and_agrees_exactly(
    make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    start = datetime(2026, 1, 5, tzinfo=UTC)
    start_us = int(start.timestamp() * 1e6)
    policy, symbols = make_policy(seed=2), ("AAAUSDT", "BBBUSDT")
    series = [
        simulate("regime_switching", 1_440, seed=i, symbol=symbol, start_us=start_us)
        for i, symbol in enumerate(symbols)
    ]
    played = Settings(latency_ms=0, rl_v2="off", max_event_age_s=None, self_play=True)
    terms = Terms(symbols=symbols, start_us=start_us, batch_bars=4, horizon=240)
    register(tmp_path, terms, now=start, frozen=run_of(policy, played, None))
    backtest(policy, series, store_dir=tmp_path, self_play=True)
    report = read_report(tmp_path)
    curve = report.curves.difference
    assert {*curve.last, *curve.low, *curve.high} == {0.0}
    assert report.effect.batches > 300
    assert (report.effect.nonzero, report.effect.sequence.value) == (0, 0.0)
    found, one = report.behaviour.confusion, Range(1.0, 1.0, 1.0)
    assert sum(n > 0 for n in (found.table[i][i] for i in range(len(CLASSES)))) >= 3
    assert (found.raw, found.kappa, found.ac1, found.weighted_kappa) == (one, one, one, one)
    assert (report.verdict.text, report.verdict.binding) == ("KEEP SHADOWING", "superiority")


def test_a_self_play_that_differs_in_the_last_bit_is_refused(
    bars: list[Bars], make_policy: Callable[..., Policy]
) -> None:
    settings = Settings(latency_ms=0, rl_v2="off", max_event_age_s=None, self_play=True)
    rows = [
        decode_comparison(output.payload)
        for commit in fold(Pipeline(make_policy(seed=2), None, settings, STREAMS), entries(bars))
        for output in commit.outputs
        if output.event_type == "rl_v3.comparison"
    ]
    row = next(row for row in rows if isinstance(row, BarRow) and row.arms["v3"].turnover)
    v2 = row.arms["v2"]
    other = msgspec.structs.replace(v2, equity=v2.equity * (1 + 2**-52))
    assert other.equity != v2.equity
    changed = msgspec.structs.replace(row, arms={**row.arms, "v2": other})
    check_equal(Commit([Output("rl_v3.comparison", encode(row))], {}, {}, {}, 0))
    with pytest.raises(SelfPlayError, match=rf"no difference .* in the bar of {row.symbol}"):
        check_equal(Commit([Output("rl_v3.comparison", encode(changed))], {}, {}, {}, 0))


def test_latency_moves_fills_to_the_next_price(
    make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    series = [simulate("random_walk", 200, seed=3)]
    for latency_ms in (0, 250):
        backtest(
            make_policy(seed=2), series, store_dir=tmp_path / str(latency_ms), latency_ms=latency_ms
        )
    # the first trade is decided at an open: at latency 0 it earns that bar's move, with 250 ms it
    # fills at the close, the next price there is, and earns nothing yet
    first = []
    for latency_ms in (0, 250):
        with StoreReader(tmp_path / str(latency_ms)).connect() as connection:
            query = "SELECT event_ts_us, v3_exposure > 0, close / open - 1, v3_gross FROM bars "
            query += "WHERE v3_turnover > 0 ORDER BY event_ts_us LIMIT 1"
            first.append(connection.execute(query).fetchone())
    (now_us, long, move, gross), (later_us, _, _, late_gross) = first
    assert now_us == later_us
    assert gross == pytest.approx(0.1 * move * (1 if long else -1))
    assert late_gross == 0.0


def test_a_store_is_never_added_to(
    bars: list[Bars], make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    backtest(make_policy(seed=2), bars, store_dir=tmp_path / "store")
    with pytest.raises(DataError, match="expected a directory without a store, found one"):
        backtest(make_policy(seed=2), bars, store_dir=tmp_path / "store")


def test_bars_of_another_length_are_refused(
    make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    hourly = [simulate("random_walk", 50, seed=0, step_seconds=3_600)]
    with pytest.raises(DataError, match=r"expected bars of 60 s, .* found 3600 s for SIMUSDT"):
        backtest(make_policy(seed=2), hourly, store_dir=tmp_path / "store")


def test_no_bars_give_an_empty_run(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    done = backtest(make_policy(seed=2), [], store_dir=tmp_path / "store")
    assert (done.entries, done.bars, done.symbols) == (0, 0, ())
