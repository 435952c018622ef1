"""Price files and synthetic worlds."""

from __future__ import annotations

from pathlib import Path

import duckdb
import numpy as np
import pytest

from rlv3.errors import ConfigError, DataError
from rlv3.market import (
    WORLDS,
    Bars,
    bars_from_closes,
    coverage,
    read_bars,
    simulate,
    symbol_of,
)

HEADER = "timestamp,open,high,low,close,volume\n"
ROWS = (
    "2024-01-01T00:01:00Z,100,103,99,102,5\n"
    "2024-01-01T00:02:00Z,102,104,101,103,\n"
    "2024-01-01T00:05:00Z,103,103.5,90,91,7.5\n"
    "2024-01-01T00:06:00Z,91,92,90,92,0\n"
)
MINUTE_US = 60_000_000
MIDNIGHT_US = 1_704_067_200_000_000


def write(tmp_path: Path, text: str, name: str = "abc_usd_1m.csv") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def test_bars_of_a_file_with_a_gap(tmp_path: Path) -> None:
    bars = read_bars(write(tmp_path, HEADER + ROWS))
    assert bars.symbol == "ABCUSD"
    assert bars.step_seconds == 60
    assert ((bars.end_us - MIDNIGHT_US) // MINUTE_US).tolist() == [1, 2, 5, 6]
    assert bars.open.tolist() == [100.0, 102.0, 103.0, 91.0]
    assert bars.high.tolist() == [103.0, 104.0, 103.5, 92.0]
    assert bars.low.tolist() == [99.0, 101.0, 90.0, 90.0]
    assert bars.close.tolist() == [102.0, 103.0, 91.0, 92.0]
    assert bars.volume is not None
    assert np.array_equal(bars.volume, [5.0, np.nan, 7.5, 0.0], equal_nan=True)
    assert bars.spread is None


def test_stamps_of_bar_opens_move_by_one_step(tmp_path: Path) -> None:
    path = write(tmp_path, HEADER + ROWS)
    closes, opens = read_bars(path), read_bars(path, bar_stamp="open", symbol="X")
    assert (opens.end_us - closes.end_us).tolist() == [MINUTE_US] * 4
    assert opens.symbol == "X"
    with pytest.raises(ConfigError, match="bar_stamp must be open or close, was 'start'"):
        read_bars(path, bar_stamp="start")


@pytest.mark.parametrize(
    "stamps",
    [
        ("2024-01-01T01:00:00+01:00", "2024-01-01 00:01:00"),
        ("1704067200", "1704067260.0"),
        ("1704067200000", "1704067260000"),
        ("1704067200000000", "1704067260000000"),
    ],
)
def test_times_in_other_notations(tmp_path: Path, stamps: tuple[str, str]) -> None:
    text = "timestamp,close\n" + "".join(f"{stamp},1.5\n" for stamp in stamps)
    bars = read_bars(write(tmp_path, text))
    assert bars.end_us.tolist() == [MIDNIGHT_US, MIDNIGHT_US + MINUTE_US]


def test_closes_alone_open_at_the_close_before(tmp_path: Path) -> None:
    text = "timestamp,close\n1704067260,100\n1704067320,90\n1704067380,95\n"
    bars = read_bars(write(tmp_path, text))
    assert bars.open.tolist() == [100.0, 100.0, 90.0]
    assert bars.high.tolist() == [100.0, 100.0, 95.0]
    assert bars.low.tolist() == [100.0, 90.0, 90.0]
    assert bars.volume is None


def test_quotes_become_mids_and_crossed_ones_have_no_spread(tmp_path: Path) -> None:
    text = "timestamp,bid,ask\n1704067260,99,101\n1704067320,101,99\n1704067380,100,100\n"
    bars = read_bars(write(tmp_path, text))
    assert bars.close.tolist() == [100.0, 100.0, 100.0]
    assert bars.spread is not None
    assert np.array_equal(bars.spread, [0.02, np.nan, np.nan], equal_nan=True)


def test_quotes_beside_closes_give_the_spread(tmp_path: Path) -> None:
    text = "timestamp,close,bid,ask\n1704067260,100.5,99,101\n1704067320,90,89,88\n"
    bars = read_bars(write(tmp_path, text))
    assert bars.close.tolist() == [100.5, 90.0]
    assert bars.spread is not None
    assert np.array_equal(bars.spread, [0.02, np.nan], equal_nan=True)
    lines = (HEADER + ROWS).splitlines()
    text = "\n".join([lines[0] + ",bid,ask", *(line + ",99,101" for line in lines[1:])])
    bars = read_bars(write(tmp_path, text + "\n"))
    assert bars.spread is not None
    assert (bars.spread == 0.02).all()
    assert read_bars(write(tmp_path, text.replace(",ask", ",asked") + "\n")).spread is None


def test_parquet_is_read_like_csv(tmp_path: Path) -> None:
    path = write(tmp_path, HEADER + ROWS)
    target = tmp_path / "abc_usd_1m.parquet"
    with duckdb.connect() as connection:
        copy = f"COPY (SELECT * FROM read_csv('{path}')) TO '{target}' (FORMAT parquet)"
        connection.execute(copy).fetchall()
    assert read_bars(target).sha256() == read_bars(path).sha256()
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="expected a Parquet file, found"):
        read_bars(broken)
    with pytest.raises(DataError, match="cannot be read: no such file"):
        read_bars(tmp_path / "none.parquet")


def test_a_repeated_row_is_left_out_and_counted(tmp_path: Path) -> None:
    plain = read_bars(write(tmp_path, HEADER + ROWS))
    first, second, third, fourth = ROWS.splitlines(keepends=True)
    text = HEADER + first * 3 + second + third + fourth * 2
    bars = read_bars(write(tmp_path, text))
    assert (plain.repeats, bars.repeats) == (0, 3)
    assert bars.sha256() == plain.sha256()


def test_coverage_names_gaps_and_repeats(tmp_path: Path) -> None:
    last = ROWS.splitlines(keepends=True)[-1]
    found = coverage(read_bars(write(tmp_path, HEADER + ROWS + last)))
    assert (found.bars, found.gaps, found.missing, found.longest, found.repeats) == (4, 1, 2, 2, 1)
    assert found.sentence() == (
        "4 bars from 2024-01-01 00:00 to 2024-01-01 00:06 UTC, 2 bars missing in 1 gap, "
        "the longest 2; 1 repeated rows left out"
    )
    assert coverage(bars_from_closes([1.0, 2.0])).sentence().endswith("UTC, no gap")


@pytest.mark.parametrize(("step", "text"), [(5, "5m"), (900, "15m"), (3_600, "1h"), (86_400, "1d")])
def test_bars_of_any_size(tmp_path: Path, step: int, text: str) -> None:
    rows = "".join(f"{1_704_067_200 + step * k},{100 + k}\n" for k in range(1, 5))
    bars = read_bars(write(tmp_path, "timestamp,close\n" + rows, f"abc_{text}.csv"))
    assert (bars.symbol, bars.step_seconds, coverage(bars).bars) == ("ABC", step, 4)
    assert coverage(bars).start.timestamp() == 1_704_067_200


AT = "2024-01-01T00:07:00Z"


@pytest.mark.parametrize(
    ("row", "column", "expected", "found"),
    [
        ("2024-01-01T00:06:00Z,1,1,1,1,1", "timestamp", "a later time than row 5's", "a duplicate"),
        ("2024-01-01T00:03:00Z,1,1,1,1,1", "timestamp", "a later time than row 5's", "an earlier"),
        ("soon,1,1,1,1,1", "timestamp", "an ISO 8601 or epoch time", "'soon'"),
        ("2024-01-01T00:07:30Z,1,1,1,1,1", "timestamp", "a multiple of the step of 60 s", "2024-"),
        (f"{AT},1,1,1,abc,1", "close", "a price > 0", "'abc'"),
        (f"{AT},1,1,1,nan,1", "close", "a price > 0", "'nan'"),
        (f"{AT},0,1,1,1,1", "open", "a price > 0", "'0'"),
        (f"{AT},1,inf,1,1,1", "high", "a price > 0", "'inf'"),
        (f"{AT},1,1,-2,1,1", "low", "a price > 0", "'-2'"),
        (f"{AT},1,1,1,,1", "close", "a price > 0", "''"),
        (f"{AT},1,0.5,0.5,1,1", "high", "the highest price of the row", "'0.5'"),
        (f"{AT},1,2,1.5,1,1", "low", "the lowest price of the row", "'1.5'"),
        (f"{AT},1,1,1,1,-3", "volume", "a volume >= 0", "'-3'"),
        (f"{AT},1,1,1,1,nan", "volume", "a volume >= 0", "'nan'"),
    ],
)
def test_a_bad_cell_is_one_sentence(
    tmp_path: Path, row: str, column: str, expected: str, found: str
) -> None:
    path = write(tmp_path, HEADER + ROWS + row + "\n")
    with pytest.raises(DataError) as caught:
        read_bars(path)
    start = f"{path} row 6 column {column}: expected {expected}, found {found}"
    assert str(caught.value).startswith(start)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            HEADER + "1704067260,1,1\n",
            "row 2: expected 6 columns (timestamp, open, high, low, close, volume), found 3",
        ),
        (
            "timestamp,price\n1704067260,2\n1704067320,3\n",
            "row 1: expected a column close, found timestamp, price",
        ),
        ("time,close\n1,2\n", "row 1: expected a column timestamp, found time, close"),
        ("timestamp,close\n1704067260,2\n", "expected at least 2 rows, found 1"),
        ("", "row 1: expected a column timestamp, found none"),
    ],
)
def test_a_file_of_another_shape_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(DataError) as caught:
        read_bars(path)
    assert str(caught.value).startswith(str(path))
    assert str(caught.value).endswith(message)


def test_files_that_are_no_text_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(DataError, match="expected a CSV text file, found"):
        read_bars(path)
    with pytest.raises(DataError, match="cannot be read: No such file or directory"):
        read_bars(tmp_path / "none.csv")


def test_symbol_of_a_file_name() -> None:
    names = ("btc_perp_1m.csv", "BTC-USDT_15M.csv", "eth.csv", "_.csv")
    assert [symbol_of(Path(n)) for n in names] == ["BTCPERP", "BTCUSDT", "ETH", "UNNAMED"]


def test_real_bars_are_read_whole(real_bars: Bars) -> None:
    assert len(real_bars.close) == 30_000
    assert real_bars.step_seconds == 60
    assert (np.diff(real_bars.end_us) == MINUTE_US).all()
    assert real_bars.symbol == "BTCPERP"


# -- synthetic worlds ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORLDS)
def test_a_world_is_well_formed_and_repeatable(name: str) -> None:
    state = np.random.get_state()[1].tolist()  # noqa: NPY002 (it must not move)
    bars = simulate(name, 500, seed=3)
    assert np.random.get_state()[1].tolist() == state  # noqa: NPY002
    assert bars.sha256() == simulate(name, 500, seed=3).sha256()
    assert bars.sha256() != simulate(name, 500, seed=4).sha256()
    assert len(bars.close) == 500
    assert (np.diff(bars.end_us) == MINUTE_US).all()
    assert bars.end_us[0] % MINUTE_US == 0
    assert (bars.high >= np.maximum(bars.open, bars.close)).all()
    assert (bars.low <= np.minimum(bars.open, bars.close)).all()
    assert (bars.low > 0.0).all()
    assert bars.volume is not None
    assert (bars.volume > 0.0).all()


def correlation(name: str, lag: int) -> float:
    """Correlation of the last and the next `lag` bars' return."""
    log = np.log(simulate(name, 40_000, seed=8).close)
    change = log[lag::lag] - log[:-lag:lag]
    return float(np.corrcoef(change[1:], change[:-1])[0, 1])


def test_worlds_have_the_edge_they_are_named_for() -> None:
    assert abs(correlation("random_walk", 10)) < 0.05
    assert correlation("momentum", 10) > 0.3
    assert correlation("mean_reversion", 10) < -0.2
    assert correlation("regime_switching", 10) > 0.3


def test_following_a_trend_of_the_default_world_pays_for_its_costs() -> None:
    log = np.log(simulate("regime_switching", 40_000, seed=9).close)
    side = np.zeros(len(log))
    side[15:] = np.where(np.abs(log[15:] - log[:-15]) > 40e-4, np.sign(log[15:] - log[:-15]), 0.0)
    gross = (side[:-1] * np.diff(log)).sum()
    cost = 5e-4 * np.abs(np.diff(side)).sum()
    assert gross > 2.0 * cost


def test_unknown_worlds_and_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"market must be one of random_walk, .*, was 'mars'"):
        simulate("mars", 100, seed=0)
    with pytest.raises(ConfigError, match="n_bars must be >= 2, was 1"):
        simulate("momentum", 1, seed=0)


def test_bars_from_closes() -> None:
    bars = bars_from_closes([100.0, 110.0, 105.0], step_seconds=300)
    assert bars.open.tolist() == [100.0, 100.0, 110.0]
    assert np.diff(bars.end_us).tolist() == [300_000_000] * 2
    for bad in ([100.0, 0.0], [1.0, float("nan")], [[1.0, 2.0]], [5.0]):
        with pytest.raises(DataError, match="expected"):
            bars_from_closes(bad)


def test_rows_cut_every_column(gappy_bars: Bars) -> None:
    part = gappy_bars.rows(10, 30)
    assert part.spread is not None
    assert part.volume is not None
    columns = (part.end_us, part.open, part.high, part.low, part.close, part.volume, part.spread)
    assert [len(c) for c in columns] == [20] * 7
    assert part.close[0] == gappy_bars.close[10]
