"""Candles from a local server that answers as Binance's REST interface does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import typer
from typer.testing import CliRunner

from rlv3.errors import ConfigError, DataError
from rlv3.fetch import FetchError, candles, command, connect, moment, write
from rlv3.market import coverage, read_bars

MINUTE = 60_000
BEGIN = 1_704_067_200_000  # 2024-01-01T00:00:00Z
MISSING = range(1_200, 1_230)
LENGTH = 2_500


def kline(k: int) -> list[Any]:
    """One candle in the exchange's own form: numbers as text, and columns that nobody needs."""
    opened = BEGIN + k * MINUTE
    price = 42_000 + k
    return [
        opened, f"{price}.00", f"{price + 2}.50", f"{price - 1}.00", f"{price + 1}.00", f"{k}.5",
        opened + MINUTE - 1, "1.0", 10, "0.5", "0.5", "0",
    ]  # fmt: skip


MARKET = {
    "symbol": "BTCUSDT", "status": "TRADING", "baseAsset": "BTC", "baseAssetPrecision": 8,
    "quoteAsset": "USDT", "quotePrecision": 8, "quoteAssetPrecision": 8,
    "orderTypes": ["LIMIT", "MARKET"], "isSpotTradingAllowed": True,
    "isMarginTradingAllowed": False, "permissions": ["SPOT"], "permissionSets": [["SPOT"]],
    "filters": [
        {"filterType": "PRICE_FILTER", "minPrice": "0.01", "maxPrice": "1000000.00",
         "tickSize": "0.01"},
        {"filterType": "LOT_SIZE", "minQty": "0.00001", "maxQty": "9000.0", "stepSize": "0.00001"},
    ],
}  # fmt: skip


class Exchange(ThreadingHTTPServer):
    """Serves exchangeInfo and klines, at most 1,000 a page; can be told to be unwell."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.asked: list[int] = []
        self.busy = 0  # so many requests for candles are answered with 429
        self.length = LENGTH


class Handler(BaseHTTPRequestHandler):
    server: Exchange

    def do_GET(self) -> None:
        place = urlsplit(self.path)
        if place.path.endswith("/exchangeInfo"):
            spot = place.path == "/api/v3/exchangeInfo"
            self._answer(200, {"symbols": [MARKET] if spot else [], "rateLimits": []})
        elif place.path == "/api/v3/klines":
            self._klines({name: values[0] for name, values in parse_qs(place.query).items()})
        else:
            self._answer(404, {"code": -1, "msg": "no such thing"})

    def _klines(self, query: dict[str, str]) -> None:
        server = self.server
        server.asked.append(int(query["startTime"]))
        if server.busy:
            server.busy -= 1
            self._answer(429, {"code": -1003, "msg": "Too much request weight used"})
            return
        first = -(-(int(query["startTime"]) - BEGIN) // MINUTE)
        rows = [kline(k) for k in range(max(first, 0), server.length) if k not in MISSING]
        self._answer(200, rows[: min(int(query["limit"]), 1_000)])

    def _answer(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        """Keep quiet."""


@pytest.fixture
def server() -> Iterator[Exchange]:
    with Exchange() as running:
        thread = Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


app = typer.Typer()
app.command()(command)


def fetch(server: Exchange, out: Path, *more: str) -> Any:
    arguments = [
        "--exchange", "binance", "--symbol", "BTC/USDT", "--since", "2024-01-01",
        "--until", "2024-01-02T12:00", "--out", str(out), "--api-url", server.url,
    ]  # fmt: skip
    return CliRunner().invoke(app, [*arguments, *more])


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_pages_become_one_file(server: Exchange, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"btc_usdt_1m{suffix}"
    result = fetch(server, out)
    assert result.exit_code == 0, result.output
    bars = read_bars(out)
    assert (bars.symbol, bars.step_seconds) == ("BTCUSDT", 60)
    # until 12:00 on the second day: 2,160 minutes, 30 of them without a trade
    assert len(bars.close) == 2_130
    assert bars.end_us[0] == (BEGIN + MINUTE) * 1_000  # stamped with its close
    assert (bars.open[0], bars.high[0], bars.low[0], bars.close[0]) == (42_000, 42_002.5, 41_999,
                                                                         42_001)  # fmt: skip
    assert bars.volume is not None
    assert bars.volume[:3].tolist() == [0.5, 1.5, 2.5]
    assert (coverage(bars).gaps, coverage(bars).missing) == (1, 30)
    assert len(server.asked) == 3
    assert "2,130 bars from 2024-01-01 00:00 to 2024-01-02 12:00 UTC, 30 bars missing" in " ".join(
        result.stdout.split()
    )
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_an_existing_file_is_never_overwritten(server: Exchange, tmp_path: Path) -> None:
    out = tmp_path / "mine.csv"
    out.write_text("precious")
    result = fetch(server, out)
    assert isinstance(result.exception, ConfigError)
    assert "expected a new file, found" in str(result.exception)
    assert (out.read_text(), server.asked) == ("precious", [])


def test_a_rate_limit_is_waited_out(server: Exchange) -> None:
    server.busy = 2
    waited: list[float] = []
    exchange = connect("binance", server.url)
    end = BEGIN + 10 * MINUTE
    found = list(candles(exchange, "BTC/USDT", "1m", BEGIN, end, sleep=waited.append))
    assert [row[0] for row in found] == [BEGIN + k * MINUTE for k in range(10)]
    assert waited == [1.0, 2.0]


def test_an_exchange_that_stays_away_is_an_error(server: Exchange) -> None:
    waited: list[float] = []
    server.busy = 1_000
    exchange = connect("binance", server.url)
    with pytest.raises(FetchError, match="expected candles from binance, found none in 5 tries"):
        list(candles(exchange, "BTC/USDT", "1m", BEGIN, BEGIN + MINUTE, sleep=waited.append))
    assert waited == [1.0, 2.0, 4.0, 8.0]
    assert FetchError.exit_code == 1


def test_the_open_candle_and_what_follows_is_left_out(server: Exchange) -> None:
    server.length = 5  # the fifth is still open: it ends 1 ms after the end
    exchange = connect("binance", server.url)
    found = list(candles(exchange, "BTC/USDT", "1m", BEGIN, BEGIN + 5 * MINUTE - 1))
    assert [row[0] for row in found] == [BEGIN + k * MINUTE for k in range(4)]
    # a start within a candle begins with the next one
    later = list(candles(exchange, "BTC/USDT", "1m", BEGIN + 1, BEGIN + 5 * MINUTE))
    assert later[0][0] == BEGIN + MINUTE


def test_what_does_not_exist_is_one_sentence(server: Exchange, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"such as binance, .*, found 'binanc3'"):
        connect("binanc3")
    exchange = connect("binance", server.url)
    with pytest.raises(ConfigError, match=r"expected a symbol of binance, .* found 'BTC/MARS'"):
        list(candles(exchange, "BTC/MARS", "1m", BEGIN, BEGIN + MINUTE))
    with pytest.raises(ConfigError, match=r"expected a timeframe of binance: .*, found '7m'"):
        list(candles(exchange, "BTC/USDT", "7m", BEGIN, BEGIN + MINUTE))
    for more, message in (
        (("--since", "soon"), "expected a time such as 2024-01-31"),
        (("--since", "2025-01-01"), "expected --since before 2024-01-02T12:00"),
        (("--out", str(tmp_path / "x.txt")), "expected --out to end in .csv or .parquet"),
    ):
        result = fetch(server, tmp_path / "x.csv", *more)
        assert isinstance(result.exception, ConfigError)
        assert message in str(result.exception)
    assert list(tmp_path.iterdir()) == []


def test_candles_that_are_no_prices_leave_no_file(tmp_path: Path) -> None:
    good = [float(BEGIN), 1.0, 1.0, 1.0, 1.0, 1.0]
    bad = [float(BEGIN + MINUTE), 1.0, 1.0, 1.0, float("nan"), 1.0]
    with pytest.raises(DataError, match="expected a price > 0, found 'nan'"):
        write(tmp_path / "x.csv", [good, bad], MINUTE)
    with pytest.raises(FetchError, match=r"expected at least 2 candles for .*, found 1"):
        write(tmp_path / "x.csv", [good], MINUTE)
    assert list(tmp_path.iterdir()) == []


def test_times_without_an_offset_are_utc() -> None:
    assert moment("2024-01-01").timestamp() * 1_000 == BEGIN
    assert moment("2024-01-01T01:00+01:00") == moment("2024-01-01")
