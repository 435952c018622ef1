"""The demo as a newcomer runs it: on a private server, or under a prefix of its own on another."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import duckdb
import psutil
import pytest

from shadow.store import StoreReader
from worker.embedded import RedisServer

SECONDS = 4


def assert_product(out: Path, said: str) -> None:
    """Check what a run of the simulated demo leaves: a full store, a clean audit, a report."""
    with StoreReader(out / "store").connect() as store:
        counts = store.execute("SELECT counts FROM ledger WHERE reason = 'stop'").fetchone()
        per_symbol = store.execute("SELECT symbol, count(*) FROM bars GROUP BY symbol").fetchall()
        actions = store.execute("SELECT DISTINCT action FROM decisions WHERE kind = 'step'")
        assert len(actions.fetchall()) >= 3
    assert len(per_symbol) == 5
    assert min(n for _, n in per_symbol) >= 120
    segments = f"'{out}/store/decisions/**/*.parquet'"
    with duckdb.connect() as plain:  # what any DuckDB sees, without our reader
        found = plain.execute(f"SELECT count(DISTINCT decision_id), count(*) FROM {segments}")
        decided = found.fetchall()
    total = sum(outcomes["decided"] for outcomes in counts[0].values())
    assert decided == [(total, total)]
    assert f"{total:,} ticks and signals" in said
    assert f"entries folded: {total:,}" in said  # by the audit
    report = json.loads((out / "report.json").read_text())["report"]
    entries = {arm["name"]: arm["entries"] for arm in report["arms"]}
    assert min(entries["v3"], entries["v2"]) >= 10
    assert set(report["curves"]["equity"]) == {"v3", "v2", "follow_signal", "flat"}
    page = (out / "report.html").read_text()
    assert "<svg" in page
    assert str(out / "report.html") in said
    assert "Traceback" not in said


def test_on_a_private_server_without_any_redis_installed(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    out = tmp_path / "demo"
    demo = start("demo", "--seconds", SECONDS, "--out", out)
    assert demo.wait(120) == 0, demo.said()
    assert "private Redis 6.2" in demo.said()
    assert_product(out, demo.said())


def test_on_another_redis_it_leaves_no_key_behind(bus: Any, start: Any, tmp_path: Path) -> None:
    bus.link.set("somebody:else", "kept")
    bus.link.xadd("quantum:stream:market.tick", {"symbol": "BTCUSDT", "price": "1"})
    before = {key: bus.link.dump(key) for key in bus.link.scan_iter()}
    out = tmp_path / "demo"
    demo = start("demo", "--seconds", SECONDS, "--redis-url", bus.url, "--out", out)
    assert demo.wait(120) == 0, demo.said()
    assert_product(out, demo.said())
    assert {key: bus.link.dump(key) for key in bus.link.scan_iter()} == before


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_it_ends_its_programs_and_leaves_no_key(
    how: signal.Signals, bus: Any, start: Any, tmp_path: Path, wait_until: Any
) -> None:
    out = tmp_path / "demo"
    demo = start("demo", "--seconds", 60, "--redis-url", bus.url, "--out", out)
    wait_until(lambda: bus.link.keys("rlv3demo-*:rl_v3.decision"), demo.said)
    programs = psutil.Process(demo.process.pid).children(recursive=True)
    assert len(programs) == 3
    demo.process.send_signal(how)
    assert demo.wait() == (-how if how == signal.SIGKILL else 128 + how)
    wait_until(lambda: not any(map(psutil.Process.is_running, programs)), lambda: programs)
    if how != signal.SIGKILL:  # nobody is left to clean up after that
        assert bus.link.keys() == []
        assert "Traceback" not in demo.said()


def test_a_program_that_dies_ends_the_demo_with_its_last_words(
    bus: Any, start: Any, tmp_path: Path, wait_until: Any
) -> None:
    out = tmp_path / "demo"
    demo = start("demo", "--seconds", 60, "--redis-url", bus.url, "--out", out)
    wait_until(lambda: bus.link.keys("rlv3demo-*:rl_v3.decision"), demo.said)
    for program in psutil.Process(demo.process.pid).children():
        if "run" in program.cmdline():
            os.kill(program.pid, signal.SIGKILL)
    assert demo.wait() == 4
    assert "expected run to keep running, found exit code -9" in " ".join(demo.said().split())
    assert "Traceback" not in demo.said()
    assert bus.link.keys() == []


def test_a_redis_that_goes_away_ends_the_demo_with_a_sentence(
    second_server: RedisServer, open_bus: Any, start: Any, tmp_path: Path, wait_until: Any
) -> None:
    bus = open_bus(second_server.url)
    demo = start("demo", "--seconds", 60, "--redis-url", bus.url, "--out", tmp_path / "demo")
    wait_until(lambda: bus.link.keys("rlv3demo-*:rl_v3.decision"), demo.said)
    second_server.kill()
    assert demo.wait() == 4
    assert "expected Redis to stay with the demo" in " ".join(demo.said().split())
    assert "Traceback" not in demo.said()


def test_real_bars_are_replayed_to_the_end(
    redis_server: RedisServer, start: Any, tmp_path: Path
) -> None:
    shared = Path(__file__).parents[2].parent / "shared" / "data" / "btc_perp_1m.csv"
    data = shared if shared.is_file() else written_bars(tmp_path / "btc_perp_1m.csv")
    out = tmp_path / "demo"
    demo = start("demo", "--seconds", 2, "--data", data, "--redis-url", redis_server.url,
                 "--out", out)  # fmt: skip
    assert demo.wait(120) == 0, demo.said()
    assert "BTCPERP: the last 400 of 30,000 bars fit" in " ".join(demo.said().split())
    with StoreReader(out / "store").connect() as store:
        assert store.execute("SELECT count(*) FROM bars").fetchone() == (399,)


def written_bars(path: Path) -> Path:
    """Write as many seeded bars as the real file has."""
    from rlv3.market import simulate

    bars = simulate("random_walk", 30_000, seed=3, start_price=40_000.0)
    columns = [bars.end_us // 1_000_000, bars.open, bars.high, bars.low, bars.close, bars.volume]
    rows = [",".join(map(str, row)) for row in zip(*(c.tolist() for c in columns), strict=True)]
    path.write_text("\n".join(["timestamp,open,high,low,close,volume", *rows]) + "\n")
    return path
