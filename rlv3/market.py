"""Where do prices come from? Synthetic worlds and CSV or Parquet files, both as bars.

A bar covers (end - step, end]. A row that is missing in a file is a gap: it stays missing, because
what the market did there is not known; features and accounts know how to cross it.

Synthetic worlds are built from minutes of log price, all drawn from one seeded generator:
  random_walk       no edge: independent normal returns
  momentum          a drift that decays slowly (half-life ~35 bars): returns are autocorrelated
  mean_reversion    a price that is pulled back to a slow walk (half-life ~8 bars)
  regime_switching  persistent trends up and down, and quiet ranges between them; the default
  planted_signal    the quoted spread says which way the next bar goes; its past does not
"""

from __future__ import annotations

import csv
import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlv3.errors import ConfigError, DataError
from rlv3.features import STEP_SECONDS, US

START_US = 1_767_225_600 * US
"""First bar of a synthetic world begins here: 2026-01-01T00:00:00Z, a Thursday."""


class Bars(NamedTuple):
    """A series of price bars of one symbol, oldest first; T rows."""

    symbol: str
    end_us: NDArray[np.int64]
    """Bar ends, UTC epoch microseconds, strictly increasing multiples of the step."""
    open: NDArray[np.float64]
    high: NDArray[np.float64]
    low: NDArray[np.float64]
    close: NDArray[np.float64]
    volume: NDArray[np.float64] | None
    """Traded volume, NaN where not known; None if it never is."""
    spread: NDArray[np.float64] | None
    """Quoted (ask - bid) / mid, NaN where not known; None if it never is."""
    step_seconds: int
    repeats: int = 0
    """Rows of the file that repeated the row before them and were left out."""

    def rows(self, start: int, stop: int) -> Bars:
        """Return the bars of rows start to stop - 1."""
        cut = slice(start, stop)
        return self._replace(
            end_us=self.end_us[cut], open=self.open[cut], high=self.high[cut], low=self.low[cut],
            close=self.close[cut],
            volume=None if self.volume is None else self.volume[cut],
            spread=None if self.spread is None else self.spread[cut],
        )  # fmt: skip

    def sha256(self) -> str:
        """Return a fingerprint of all numbers in the series."""
        digest = hashlib.sha256(f"{self.symbol} {self.step_seconds}".encode())
        for column in self[1:8]:
            digest.update(b"-" if column is None else np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()


# -- files -----------------------------------------------------------------------------------------


class _Column(NamedTuple):
    """One column of a file as it was read, with what is needed to name a bad cell."""

    name: str
    cells: Sequence[Any]


def read_bars(path: str | Path, *, symbol: str | None = None, bar_stamp: str = "close") -> Bars:
    """Read bars from a CSV or Parquet file.

    Columns: `timestamp` (ISO 8601, UTC where no offset is given, or epoch s, ms or us) and either
    `open, high, low, close[, volume]`, or `close[, volume]`, or `bid, ask`, which may also stand
    beside the others. From quotes alone the close is the mid; crossed and locked quotes (bid >=
    ask) have an unknown spread. Without opens a bar opens at the close before it. The step is the
    commonest distance between rows. A row that repeats the one before it cell by cell is left out
    and counted; missing rows are gaps.

    Args:
        symbol: its name; by default taken from the file's name (`btc_perp_1m.csv` -> BTCPERP).
        bar_stamp: whether a row's time is the `close` or the `open` of its bar.
    Raises:
        DataError: names file, row (the header is row 1), column, what was expected and found.
    """
    path = Path(path)
    if bar_stamp not in ("open", "close"):
        raise ConfigError(f"bar_stamp must be open or close, was {bar_stamp!r}")
    rows, columns = _read_parquet(path) if path.suffix == ".parquet" else _read_csv(path)
    stamps = _times(path, rows, _required(path, columns, "timestamp"))
    rows, columns, stamps, repeats = _without_repeats(path, rows, columns, stamps)
    step_us = _step(path, rows, stamps)
    if bar_stamp == "open":
        stamps = stamps + step_us
    prices = _prices(path, rows, columns)
    volume = None
    if "volume" in columns:
        volume = _numbers(path, rows, columns["volume"], "a volume >= 0", lambda v: v >= 0.0, True)
    return Bars(
        symbol or symbol_of(path), stamps, *prices[:4], volume, prices[4], step_us // US, repeats
    )


class Coverage(NamedTuple):
    """What a series covers and what it lacks."""

    bars: int
    start: datetime
    end: datetime
    gaps: int
    """Places where bars are missing."""
    missing: int
    """Bars that are missing there, together."""
    longest: int
    """Bars that are missing in the longest gap."""
    repeats: int

    def sentence(self) -> str:
        """Return it in words; lengths are in bars."""
        places = "1 gap" if self.gaps == 1 else f"{self.gaps:,} gaps"
        lacks = f"{self.missing:,} bars missing in {places}, the longest {self.longest:,}"
        repeated = f"; {self.repeats:,} repeated rows left out" if self.repeats else ""
        return (
            f"{self.bars:,} bars from {self.start:%Y-%m-%d %H:%M} to {self.end:%Y-%m-%d %H:%M} UTC"
            f", {lacks if self.gaps else 'no gap'}{repeated}"
        )


def coverage(bars: Bars) -> Coverage:
    """Return what a series covers and what it lacks."""
    lacking = np.diff(bars.end_us) // (bars.step_seconds * US) - 1
    begin = int(bars.end_us[0]) - bars.step_seconds * US
    return Coverage(
        len(bars.close),
        datetime.fromtimestamp(begin / US, UTC),
        datetime.fromtimestamp(int(bars.end_us[-1]) / US, UTC),
        int((lacking > 0).sum()),
        int(lacking.sum()),
        int(lacking.max(initial=0)),
        bars.repeats,
    )


def symbol_of(path: Path) -> str:
    """Return the symbol that a file name suggests: letters and digits, without the interval."""
    stem = re.sub(r"_\d+[smhd]$", "", path.stem, flags=re.IGNORECASE)
    return re.sub(r"[^A-Z0-9]", "", stem.upper())[:20] or "UNNAMED"


def _read_csv(path: Path) -> tuple[list[int], dict[str, _Column]]:
    """Return the row numbers and the columns by lower-case name."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            numbers, rows = [], []
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    raise DataError(
                        f"{path} row {reader.line_num}: expected {len(header)} columns "
                        f"({', '.join(header)}), found {len(row)}"
                    )
                numbers.append(reader.line_num)
                rows.append(row)
    except OSError as error:
        raise DataError(f"data file {path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: expected a CSV text file, found {error}") from error
    cells = list(zip(*rows, strict=True)) or [()] * len(header)
    return numbers, {
        name.lower(): _Column(name, column) for name, column in zip(header, cells, strict=True)
    }


def _read_parquet(path: Path) -> tuple[list[int], dict[str, _Column]]:
    if not path.is_file():
        raise DataError(f"data file {path} cannot be read: no such file")
    try:
        with duckdb.connect() as connection:
            table = connection.read_parquet(str(path))
            wanted = [
                f'epoch_us("{name}")' if str(kind).startswith("TIMESTAMP") else f'"{name}"'
                for name, kind in zip(table.columns, table.types, strict=True)
            ]
            names = table.columns
            rows = table.project(", ".join(wanted)).fetchall()
    except duckdb.Error as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path}: expected a Parquet file, found {reason}") from error
    cells = list(zip(*rows, strict=True)) or [()] * len(names)
    return list(range(2, len(rows) + 2)), {
        name.lower(): _Column(name, column) for name, column in zip(names, cells, strict=True)
    }


def _required(path: Path, columns: Mapping[str, _Column], name: str) -> _Column:
    if name not in columns:
        found = ", ".join(column.name for column in columns.values()) or "none"
        raise DataError(f"{path} row 1: expected a column {name}, found {found}")
    return columns[name]


def _bad(path: Path, row: int, column: _Column, expected: str, found: Any) -> DataError:
    return DataError(f"{path} row {row} column {column.name}: expected {expected}, found {found!r}")


def _numbers(
    path: Path,
    rows: Sequence[int],
    column: _Column,
    expected: str,
    accept: Callable[[NDArray[np.float64]], NDArray[np.bool_]],
    optional: bool = False,
) -> NDArray[np.float64]:
    """Return a column as float64; where `optional`, an empty cell is NaN and means not known."""
    values = np.empty(len(rows))
    for i, cell in enumerate(column.cells):
        if optional and (cell is None or cell == ""):
            values[i] = math.nan
            continue
        try:
            values[i] = float(cell)
        except (TypeError, ValueError):
            raise _bad(path, rows[i], column, expected, cell) from None
        if optional and math.isnan(values[i]):
            raise _bad(path, rows[i], column, expected, cell)
    good = accept(values) & ~np.isinf(values)
    if optional:
        good |= np.isnan(values)
    if not good.all():
        i = int(np.argmin(good))
        raise _bad(path, rows[i], column, expected, column.cells[i])
    return values


def _times(path: Path, rows: Sequence[int], column: _Column) -> NDArray[np.int64]:
    """Return epoch microseconds, never decreasing."""
    stamps = np.empty(len(rows), dtype=np.int64)
    for i, cell in enumerate(column.cells):
        try:
            stamps[i] = _epoch_us(cell)
        except (TypeError, ValueError, OverflowError):
            raise _bad(path, rows[i], column, "an ISO 8601 or epoch time", cell) from None
    backwards = np.diff(stamps) < 0
    if backwards.any():
        i = int(np.argmax(backwards)) + 1
        raise _not_later(path, rows, column, i, "an earlier one")
    return stamps


def _not_later(path: Path, rows: Sequence[int], column: _Column, i: int, kind: str) -> DataError:
    return DataError(
        f"{path} row {rows[i]} column {column.name}: expected a later time than row "
        f"{rows[i - 1]}'s, found {kind}, {column.cells[i]!r}"
    )


def _without_repeats(
    path: Path, rows: list[int], columns: dict[str, _Column], stamps: NDArray[np.int64]
) -> tuple[list[int], dict[str, _Column], NDArray[np.int64], int]:
    """Leave out rows that repeat the one before them; return how many that were.

    Raises:
        DataError: two rows of one time with different values.
    """
    again = (np.flatnonzero(np.diff(stamps) == 0) + 1).tolist()
    if not again:
        return rows, columns, stamps, 0
    for i in again:
        differing = [c.name for c in columns.values() if c.cells[i] != c.cells[i - 1]]
        if differing:
            kind = f"a duplicate with another {differing[0]}"
            raise _not_later(path, rows, columns["timestamp"], i, kind)
    gone = set(again)
    keep = [i for i in range(len(rows)) if i not in gone]
    kept = {
        name: _Column(column.name, [column.cells[i] for i in keep])
        for name, column in columns.items()
    }
    return [rows[i] for i in keep], kept, stamps[keep], len(again)


def _epoch_us(cell: Any) -> int:
    """Return epoch microseconds of an ISO text or of an epoch number in s, ms or us."""
    if isinstance(cell, str) and not re.fullmatch(r"\d+(\.\d+)?", cell.strip()):
        moment = datetime.fromisoformat(cell.strip())
        moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
        elapsed = moment - datetime(1970, 1, 1, tzinfo=UTC)
        return (elapsed.days * 86_400 + elapsed.seconds) * US + elapsed.microseconds
    number = float(cell)
    unit = 1 if number >= 1e14 else 1_000 if number >= 1e11 else US
    return round(number * unit)


def _step(path: Path, rows: Sequence[int], stamps: NDArray[np.int64]) -> int:
    """Return the commonest spacing; every time must be a multiple of it."""
    if len(stamps) < 2:
        raise DataError(f"{path}: expected at least 2 rows, found {len(stamps)}")
    spacing = Counter(np.diff(stamps).tolist())
    step_us = min(spacing, key=lambda us: (-spacing[us], us))
    if step_us % US:
        raise DataError(f"{path}: expected a step of whole seconds, found {step_us / US} s")
    off = stamps % step_us != 0
    if off.any():
        i = int(np.argmax(off))
        found = datetime.fromtimestamp(stamps[i] / US, UTC).isoformat()
        raise DataError(
            f"{path} row {rows[i]} column timestamp: expected a multiple of the step of "
            f"{step_us // US} s, found {found}"
        )
    return step_us


Prices = tuple[
    NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64],
    NDArray[np.float64] | None,
]  # fmt: skip


def _prices(path: Path, rows: Sequence[int], columns: Mapping[str, _Column]) -> Prices:
    """Return open, high, low, close and spread."""

    def price(name: str) -> NDArray[np.float64]:
        column = _required(path, columns, name)
        return _numbers(path, rows, column, "a price > 0", lambda v: v > 0.0)

    spread = None
    if "bid" in columns and ("ask" in columns or "close" not in columns):
        bid, ask = price("bid"), price("ask")
        mid = (bid + ask) / 2
        spread = np.where(ask > bid, (ask - bid) / mid, np.nan)
        if "close" not in columns:
            return *_without_opens(mid), spread
    if "open" not in columns:
        return *_without_opens(price("close")), spread
    open_, high, low, close = (price(name) for name in ("open", "high", "low", "close"))
    for name, wrong, expected in (
        ("high", high < np.maximum(open_, close), "the highest price of the row"),
        ("low", low > np.minimum(open_, close), "the lowest price of the row"),
    ):
        if wrong.any():
            i = int(np.argmax(wrong))
            raise _bad(path, rows[i], columns[name], expected, columns[name].cells[i])
    return open_, high, low, close, spread


def _without_opens(
    close: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return open, high, low and close where only closes are known."""
    open_ = np.concatenate([close[:1], close[:-1]])
    return open_, np.maximum(open_, close), np.minimum(open_, close), close


def bars_from_closes(
    close: ArrayLike, *, symbol: str = "CLOSES", step_seconds: int = STEP_SECONDS
) -> Bars:
    """Return bars for a plain array of closes; their times are counted from `START_US`.

    Raises:
        DataError: not one-dimensional, fewer than 2 values, or a value that is no price.
    """
    values = np.array(close, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise DataError(f"expected at least 2 closes in one dimension, found {values.shape}")
    bad = ~(np.isfinite(values) & (values > 0.0))
    if bad.any():
        i = int(np.argmax(bad))
        raise DataError(f"close {i}: expected a price > 0, found {values[i]}")
    end_us = START_US + np.arange(1, len(values) + 1, dtype=np.int64) * step_seconds * US
    return Bars(symbol, end_us, *_without_opens(values), None, None, step_seconds)


# -- synthetic worlds ------------------------------------------------------------------------------

SIGMA = 6e-4  # noise per bar of every world but the quiet ranges: 6 bp, as a calm crypto minute

MOMENTUM_SIGMA = 3e-4  # stationary standard deviation of the drift
MOMENTUM_PHI = 0.98

REVERSION_KAPPA = 0.08  # share of the distance to the slow walk that a bar closes
REVERSION_SIGMA = 1.2e-3

TREND_DRIFT = 6e-4  # mean |drift| per bar of a trend: 6 bp, drawn between 0.6 and 1.4 of it
TREND_BARS, TREND_LEAST = 36, 16  # mean and least length of a trend
RANGE_BARS, RANGE_LEAST = 18, 8  # mean and least length of a range
RANGE_SIGMA = 3e-4
RANGE_KAPPA = 0.1

PLANTED_DRIFT = 1e-3  # |drift| per bar
PLANTED_BARS, PLANTED_LEAST = 24, 12  # mean and least length of a leg
PLANTED_SIGMA = 3e-4
PLANTED_SPREAD = 2e-4
PLANTED_TELL = 0.04  # share of the spread by which it gives the next bar away
PLANTED_JITTER = 0.01  # noise of the spread


def _random_walk(n: int, rng: np.random.Generator) -> NDArray[np.float64]:
    return np.cumsum(rng.normal(0.0, SIGMA, n))


def _momentum(n: int, rng: np.random.Generator) -> NDArray[np.float64]:
    shocks = rng.normal(0.0, MOMENTUM_SIGMA * math.sqrt(1.0 - MOMENTUM_PHI**2), n)
    noise = rng.normal(0.0, SIGMA, n)
    drift, path = rng.normal(0.0, MOMENTUM_SIGMA), np.empty(n)
    for t in range(n):
        drift = MOMENTUM_PHI * drift + shocks[t]
        path[t] = drift + noise[t]
    return np.cumsum(path)


def _mean_reversion(n: int, rng: np.random.Generator) -> NDArray[np.float64]:
    anchor = np.cumsum(rng.normal(0.0, SIGMA / 4, n))
    noise = rng.normal(0.0, REVERSION_SIGMA, n)
    distance, path = 0.0, np.empty(n)
    for t in range(n):
        distance += noise[t] - REVERSION_KAPPA * distance
        path[t] = distance
    return anchor + path


def _regime_switching(n: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Trends of +-3.6 to 8.4 bp a bar for ~36 bars, and ranges of ~18 bars around a level.

    A trend moves ~216 bp, a round trip costs 10 bp: whoever notices it within a quarter of an hour
    earns; in a range nobody does.
    """
    level, path, t = 0.0, np.empty(n), 0
    trending = bool(rng.random() < 0.5)
    while t < n:
        if trending:
            length = TREND_LEAST + int(rng.geometric(1 / (TREND_BARS - TREND_LEAST)))
            drift = rng.choice((-1.0, 1.0)) * TREND_DRIFT * rng.uniform(0.6, 1.4)
            piece = level + np.cumsum(rng.normal(drift, SIGMA, length))
        else:
            length = RANGE_LEAST + int(rng.geometric(1 / (RANGE_BARS - RANGE_LEAST)))
            noise = rng.normal(0.0, RANGE_SIGMA, length)
            distance, piece = 0.0, np.empty(length)
            for i in range(length):
                distance += noise[i] - RANGE_KAPPA * distance
                piece[i] = level + distance
        path[t : t + length] = piece[: n - t]
        level = float(piece[-1])
        t += length
        trending = not trending
    return path


def _planted_signal(n: int, rng: np.random.Generator) -> tuple[NDArray[np.float64], ...]:
    """Legs up and down in turn, 24 bars on average, 10 bp a bar; returns log prices and spreads.

    The spread quoted at the end of a bar is 2 bp, 4 % wider where the next bar drifts up and 4 %
    narrower where it drifts down. Legs alternate, so holding either side earns little.
    """
    side = np.empty(n + 1)
    t, sign = 0, float(rng.choice((-1.0, 1.0)))
    while t <= n:
        length = PLANTED_LEAST + int(rng.geometric(1 / (PLANTED_BARS - PLANTED_LEAST)))
        side[t : t + length] = sign
        t, sign = t + length, -sign
    path = np.cumsum(PLANTED_DRIFT * side[:n] + rng.normal(0.0, PLANTED_SIGMA, n))
    jitter = rng.normal(0.0, PLANTED_JITTER, n)
    return path, PLANTED_SPREAD * (1.0 + PLANTED_TELL * side[1:] + jitter)


World = Callable[
    [int, np.random.Generator], "NDArray[np.float64] | tuple[NDArray[np.float64], ...]"
]
"""Draws n log prices, or log prices and quoted spreads."""

WORLDS: dict[str, World] = {
    "random_walk": _random_walk,
    "momentum": _momentum,
    "mean_reversion": _mean_reversion,
    "regime_switching": _regime_switching,
    "planted_signal": _planted_signal,
}
DEFAULT_WORLD = "regime_switching"
WICK_SIGMA = 3e-4  # how far highs and lows reach beyond open and close


def simulate(
    name: str,
    n_bars: int,
    *,
    seed: int | Sequence[int] | np.random.SeedSequence,
    symbol: str = "SIMUSDT",
    step_seconds: int = STEP_SECONDS,
    start_us: int = START_US,
    start_price: float = 100.0,
) -> Bars:
    """Return a synthetic series; the same arguments give the same bars.

    Every bar opens at the close before it, moved by half a basis point of noise. Volume is
    log-normal and grows with the size of the bar's move; only `planted_signal` has quotes.

    Args:
        name: one of `WORLDS`.
        seed: of the series' own generator.
        start_us: when the first bar begins; a multiple of the step.
    Raises:
        ConfigError: no such world, or fewer than 2 bars.
    """
    if name not in WORLDS:
        raise ConfigError(f"market must be one of {', '.join(WORLDS)}, was {name!r}")
    if n_bars < 2:
        raise ConfigError(f"n_bars must be >= 2, was {n_bars}")
    rng = np.random.default_rng(seed)
    drawn = WORLDS[name](n_bars, rng)
    path, spread = drawn if isinstance(drawn, tuple) else (drawn, None)
    close = start_price * np.exp(path)
    before = np.concatenate([[start_price], close[:-1]])
    open_ = before * np.exp(rng.normal(0.0, 5e-5, n_bars))
    up, down = np.abs(rng.normal(0.0, WICK_SIGMA, (2, n_bars)))
    volume = rng.lognormal(3.0, 0.4, n_bars) * (1.0 + np.abs(np.log(close / before)) / SIGMA)
    return Bars(
        symbol=symbol,
        end_us=start_us + np.arange(1, n_bars + 1, dtype=np.int64) * step_seconds * US,
        open=open_,
        high=np.maximum(open_, close) * np.exp(up),
        low=np.minimum(open_, close) * np.exp(-down),
        close=close,
        volume=volume,
        spread=spread,
        step_seconds=step_seconds,
    )
