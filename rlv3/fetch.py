"""Where do candles come from? Any exchange that ccxt knows, written as a file that training reads.

Public data only: no key, no order. Pages are asked for until the end is reached; what a page
repeats is dropped, the candle that is still open is left out, and a rate limit or a dropped
connection is waited out a few times before it is an error. The file is written at the end, whole
or not at all, and read back once, so that what lies there can be trained on.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit, urlunsplit

import duckdb
import typer

from rlv3 import console
from rlv3.errors import ConfigError, UserError
from rlv3.extras import require
from rlv3.market import coverage, read_bars

PAGE = 1_000
TRIES = 5
COLUMNS = ("timestamp", "open", "high", "low", "close", "volume")

Candle = list[float]
"""Opening time in ms, open, high, low, close, volume, as ccxt gives them."""


class FetchError(UserError):
    """The exchange cannot be reached or refuses; trying again later may help."""

    exit_code = 1


def connect(name: str, api_url: str | None = None) -> Any:
    """Return an exchange of ccxt with its rate limit on.

    Args:
        api_url: scheme and host that replace those of every REST address, for a proxy.
    Raises:
        ConfigError: ccxt is not installed, or there is no such exchange.
    """
    ccxt = require("ccxt", "fetch")
    if name not in ccxt.exchanges:
        near = [known for known in ccxt.exchanges if known.startswith(name[:3])]
        raise ConfigError(
            f"expected an exchange that ccxt knows, such as {', '.join(near[:5]) or 'binance'}, "
            f"found {name!r}"
        )
    exchange = getattr(ccxt, name)({"enableRateLimit": True})
    if not exchange.has["fetchOHLCV"]:
        raise ConfigError(f"expected an exchange that gives candles, {name} does not")
    if api_url is not None:
        exchange.urls["api"] = _moved(exchange.urls["api"], urlsplit(api_url))
    return exchange


def _moved(address: Any, to: Any) -> Any:
    """Return an address, or a mapping of them, at another host."""
    if isinstance(address, dict):
        return {key: _moved(value, to) for key, value in address.items()}
    return urlunsplit(urlsplit(address)._replace(scheme=to.scheme, netloc=to.netloc))


def candles(
    exchange: Any,
    symbol: str,
    timeframe: str,
    start_ms: int,
    end_ms: int,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Candle]:
    """Yield the candles that begin at or after a start and end by an end, oldest first.

    Raises:
        ConfigError: the exchange has no such symbol or timeframe.
        FetchError: it does not answer, or refuses.
    """
    if timeframe not in exchange.timeframes:
        known = ", ".join(exchange.timeframes)
        raise ConfigError(f"expected a timeframe of {exchange.id}: {known}, found {timeframe!r}")
    step = exchange.parse_timeframe(timeframe) * 1_000
    since = -(-start_ms // step) * step
    while since + step <= end_ms:
        asked = since
        page = _page(exchange, symbol, timeframe, since, sleep)
        for candle in page:
            if since <= candle[0] <= end_ms - step:
                yield candle
                since = int(candle[0]) + step
        if since == asked:
            since += PAGE * step  # nobody traded here, or what did is not over: look behind it


def _page(
    exchange: Any, symbol: str, timeframe: str, since: int, sleep: Callable[[float], None]
) -> list[Candle]:
    """Ask for one page; wait and ask again where asking again can help."""
    ccxt = require("ccxt", "fetch")
    for attempt in range(TRIES):
        try:
            page: list[Candle] = exchange.fetch_ohlcv(symbol, timeframe, since, PAGE)
        except ccxt.BadSymbol as error:
            raise ConfigError(
                f"expected a symbol of {exchange.id}, such as BTC/USDT, found {symbol!r}"
            ) from error
        except ccxt.NetworkError as error:
            if attempt == TRIES - 1:
                raise FetchError(
                    f"expected candles from {exchange.id}, found none in {TRIES} tries: "
                    f"{_first_line(error)}"
                ) from error
            sleep(2.0**attempt)
        except ccxt.BaseError as error:
            raise FetchError(
                f"expected candles from {exchange.id}, it refused: {_first_line(error)}"
            ) from error
        else:
            return page
    raise AssertionError("unreachable")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]


def write(path: Path, rows: list[Candle], step_ms: int) -> None:
    """Write candles as CSV or Parquet, stamped with their close, whole or not at all.

    Raises:
        FetchError: there are too few candles to read back.
        DataError: the exchange sent candles that are no prices.
    """
    if len(rows) < 2:
        raise FetchError(f"expected at least 2 candles for {path}, found {len(rows)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=path.suffix)
    os.close(handle)
    part = Path(name)
    try:
        _write_csv(part, rows, step_ms)
        if path.suffix == ".parquet":
            _to_parquet(part)
        read_bars(part)
        part.chmod(0o644)
        os.replace(part, path)
    except BaseException:  # an interrupt as well must leave no half-written file
        part.unlink(missing_ok=True)
        raise


def _write_csv(path: Path, rows: list[Candle], step_ms: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(",".join(COLUMNS) + "\n")
        for opened, *numbers in rows:
            end = datetime.fromtimestamp((int(opened) + step_ms) / 1_000, UTC)
            cells = ("" if number is None else repr(float(number)) for number in numbers)
            file.write(f"{end:%Y-%m-%dT%H:%M:%SZ},{','.join(cells)}\n")


def _to_parquet(path: Path) -> None:
    """Turn a CSV file into a Parquet file of the same name."""
    other = path.with_suffix(".writing")
    quoted = [str(p).replace("'", "''") for p in (path, other)]
    try:
        with duckdb.connect() as connection:
            connection.execute(
                f"COPY (SELECT * FROM read_csv('{quoted[0]}')) TO '{quoted[1]}' (FORMAT parquet)"
            )
        os.replace(other, path)
    finally:
        other.unlink(missing_ok=True)


def moment(text: str) -> datetime:
    """Return the time in an ISO text, UTC where it has no offset.

    Raises:
        ConfigError: it is none.
    """
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(
            f"expected a time such as 2024-01-31 or 2024-01-31T12:00, found {text!r}"
        ) from None
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found


def command(
    exchange: Annotated[str, typer.Option(help="An exchange that ccxt knows, such as binance.")],
    symbol: Annotated[str, typer.Option(help="Such as BTC/USDT, or BTC/USDT:USDT for a future.")],
    since: Annotated[str, typer.Option(help="First time, such as 2024-01-31 (UTC).")],
    out: Annotated[Path, typer.Option(help="New file, .csv or .parquet.")],
    until: Annotated[str | None, typer.Option(help="Last time; now if unset.")] = None,
    timeframe: Annotated[str, typer.Option(help="Length of a candle.")] = "1m",
    api_url: Annotated[
        str | None, typer.Option(help="Ask this address instead, for example of a proxy.")
    ] = None,
) -> None:
    """Download candles of an exchange into a file that `rlv3 train --data` reads.

    Stamps are the candles' closes. An existing file is never overwritten.
    """
    if out.suffix not in (".csv", ".parquet"):
        raise ConfigError(f"expected --out to end in .csv or .parquet, found {out.name!r}")
    if out.exists():
        raise ConfigError(f"expected a new file, found {out}: remove it or name another")
    now_ms = time.time_ns() // 1_000_000
    start_ms = round(moment(since).timestamp() * 1_000)
    end_ms = now_ms if until is None else min(now_ms, round(moment(until).timestamp() * 1_000))
    if start_ms >= end_ms:
        raise ConfigError(f"expected --since before {until or 'now'}, found {since}")
    source = connect(exchange, api_url)
    step_ms = 1_000 * source.parse_timeframe(timeframe) if timeframe in source.timeframes else 0
    rows: list[Candle] = []
    with console.err.status("") as status:
        for row in candles(source, symbol, timeframe, start_ms, end_ms):
            rows.append(row)
            if len(rows) % PAGE == 0:
                status.update(f"{len(rows):,} candles")
    write(out, rows, step_ms)
    console.out.print(f"{out}: {coverage(read_bars(out)).sentence()}", soft_wrap=True)
