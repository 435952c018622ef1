"""How long does a report on a large store take, and how much memory?

A store of so many paired decisions is made by DuckDB directly as Parquet (not part of the figure),
in the store's own layout, one segment per table and day as the collector leaves them; the report
then runs as the command a user types, in a process of its own. By default RL v2 decides every
13 seconds or so per symbol, 30 days long; `--per-bar 1` makes one bar for every pair instead.

    python bench/bench_report.py [--pairs N ...] [--per-bar N] [--days N] [--dir DIR] [--keep]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import duckdb
import msgspec

from rlv3.events import ACTION_TABLE
from rlv3.features import feature_digest
from shadow.records import ARMS, COMPARISONS, DECISIONS
from shadow.segments import Position, Progress
from shadow.store import TABLES

START = datetime(2026, 1, 5, tzinfo=UTC)
START_MS = int(START.timestamp() * 1_000)
RUN = "0123456789abcdef"
DAY_BARS = 1_440
HELD = {"v3": 37, "v2": 53, "follow_signal": 29}  # bars an arm keeps its side, on average
REGIMES = ["TREND", "RANGE", "BREAKOUT", "MEAN_REVERSION"]
MEMORY_MIB = 1_536
LIMIT_S = {1_000_000: 5.0, 10_000_000: 20.0}
CORES = 2


def random(*parts: str) -> str:
    """Return SQL for a number in [0, 1) that follows from its parts alone."""
    return f"(hash({', '.join(parts)}) % 1000003 / 1000003.0)"


NO_SOURCE = dict.fromkeys(("trace_id", "correlation_id", "v3_trace_id", "v3_correlation_id"), "''")
"""Ids of the source, for rows to which it gave none."""


class Maker:
    """Makes one store."""

    def __init__(self, directory: Path, pairs: int, symbols: int, days: int) -> None:
        self.directory = directory
        self.days = days
        self.symbols = symbols
        self.per_day = -(-pairs // (symbols * days))  # v2 decisions of a symbol
        self.db = duckdb.connect(config={"threads": CORES, "memory_limit": "8GB"})
        self.rows = {DECISIONS: 0, COMPARISONS: 0}

    def make(self) -> None:
        """Write every table and the position."""
        self._bars()
        for day in range(self.days):
            self._day(day)
        ends = dict.fromkeys(self.rows, f"{START_MS + self.days * 86400000}-0")
        groups = {
            name: Progress(stream=f"quantum:stream:{name}", id=ends[name], rows=rows)
            for name, rows in self.rows.items()
        }
        position = Position(groups=groups)
        (self.directory / "position.json").write_bytes(msgspec.json.encode(position))

    def _bars(self) -> None:
        """Make the arms' paths: sides that last a while, costs inside, equity their sum."""
        arms, paths = [], []
        for arm, held in HELD.items():
            side = f"(hash('{arm}', s, (b + s) // {held}) % 3)::INT - 1"
            arms.append(f"0.1 * ({side}) AS {arm}_exposure")
            before = f"lag({arm}_exposure, 1, 0.0) OVER w"
            paths.append(
                f"{before} * r AS {arm}_gross, abs({arm}_exposure - {before}) AS {arm}_turnover"
            )
        money = ", ".join(
            f"4e-4 * {arm}_turnover AS {arm}_fee, 1e-4 * {arm}_turnover AS {arm}_slippage, "
            f"10000.0 * (1.0 + sum({arm}_gross - 5e-4 * {arm}_turnover) OVER w) AS {arm}_equity"
            for arm in HELD
        )
        self.db.execute(
            f"""
            CREATE TABLE path AS
            WITH grid AS (
                SELECT s, b, 2e-3 * ({random("'r'", "s", "b")} - 0.5) AS r
                FROM range({self.symbols}) AS a(s), range({self.days * DAY_BARS}) AS c(b)
            ), arms AS (SELECT *, {", ".join(arms)} FROM grid),
            paths AS (
                SELECT *, 100.0 * exp(sum(ln(1.0 + r)) OVER w) AS close, {", ".join(paths)}
                FROM arms WINDOW w AS (PARTITION BY s ORDER BY b)
            )
            SELECT *, {money} FROM paths WINDOW w AS (PARTITION BY s ORDER BY b)
            ORDER BY b, s
            """
        )

    def _day(self, day: int) -> None:
        n = self.per_day
        common = {
            "run_id": f"'{RUN}'",
            "policy_digest": "repeat('ab', 32)",
            "schema_version": "1",
        }
        # a v2 decision: number k of the day of symbol s, on a signal of its own
        self.db.execute(
            f"""
            CREATE OR REPLACE TABLE signals AS
            SELECT s, k, {START_MS + day * 86_400_000} + (k * 86400000) // {n} + s * 7 + 1 AS ms,
                   md5('v3' || {day} || '/' || s || '/' || k) AS v3_id,
                   md5('v2' || {day} || '/' || s || '/' || k) AS v2_id,
                   (hash('side', s, k // 9, {day}) % 3)::INT - 1 AS side,
                   hash('a', s, k, {day}) % 100 < 94 AS holds,
                   hash('alone', s, k, {day}) % 1000 < 4 AS alone
            FROM range({self.symbols}) AS a(s), range({n}) AS c(k) ORDER BY ms, s
            """
        )
        self.db.execute(
            f"""
            CREATE OR REPLACE TABLE bar AS
            SELECT *, md5('step' || s || '/' || b) AS step_id,
                   {START_MS} + (b + 1) * 60000 AS ms, hash('q', s, b) % 100 < 94 AS holds
            FROM path WHERE b // {DAY_BARS} = {day} ORDER BY b, s
            """
        )
        symbol = "'S' || lpad(s::VARCHAR, 3, '0') || 'USDT'"
        self._decisions(day, symbol)
        self._write("v2_decisions", day, "signals", {
            **common, "stream_id": "ms || '-' || s", "record_id": "md5('r' || v2_id)",
            "symbol": symbol, "event_ts_us": "ms * 1000",
            "source_stream": "'quantum:stream:rl_v2.decision'",
            "source_entry_id": "ms || '-0'", "trace_id": "'t-' || v2_id",
            "correlation_id": "''", "decision_id": "v2_id", "opponent": "'q_table'",
            "opponent_digest": "repeat('cd', 32)", "decision_kind": "'combined'",
            "strategy": "'dual_momentum'", "model": "'xgboost'", "weight": "1.0",
            "size_multiplier": "1.0", "multiplier_assumed": "false", "leverage": "5.0",
            "base_direction": "side", "signal_confidence": "0.7", "effective_confidence": "0.7",
            "direction": "side", "target": "0.1 * side", "moves_arm": "true",
        })  # fmt: skip
        self._write("pairs", day, "(FROM signals WHERE NOT alone)", {
            **common, "stream_id": "ms || '-' || (1000 + s)", "record_id": "md5('p' || v2_id)",
            "symbol": symbol, "event_ts_us": "ms * 1000", "v2_decision_id": "v2_id",
            "v3_decision_id": "v3_id", "rule": "1 + 4 * (k % 2)",
            "delta_us": "(hash('d', v2_id) % 500000)::BIGINT - 250000", "opponent": "'q_table'",
            "opponent_digest": "repeat('cd', 32)", "v3_kind": "'advisory'",
            "v3_event_type": "'signal.generated'", "v3_action": "if(holds, 0, 1 + (k % 5))",
            "v3_action_name": "'HOLD'", "v3_confidence": random("v3_id"),
            "v3_exposure": "0.1 * side", "v3_target": "0.1 * ((hash(v3_id) % 3)::INT - 1)",
            "v2_direction": "side", "v2_exposure": "0.1 * side", "agree": "holds",
            "warm": "true",
        })  # fmt: skip
        self._write("unpaired", day, "(FROM signals WHERE alone)", {
            **common, "stream_id": "ms || '-' || (2000 + s)", "record_id": "md5('u' || v2_id)",
            "symbol": symbol, "event_ts_us": "ms * 1000", "side": "'v2'",
            "decision_id": "v2_id", "reason": "'missing_v3'", "opponent": "'q_table'",
        })  # fmt: skip
        arms = {
            f"{arm}_{item}": f"{arm}_{item}"
            for arm in HELD
            for item in ("exposure", "gross", "turnover", "fee", "slippage", "equity")
        }
        arms |= {f"{arm}_gross_late": f"{arm}_gross" for arm in HELD}
        arms |= {f"flat_{item}": "0.0" for item in
                 ("exposure", "gross", "turnover", "fee", "slippage", "gross_late")}  # fmt: skip
        arms |= {"flat_equity": "10000.0"} | {f"{arm}_ruined": "false" for arm in ARMS}
        volume = random("'v'", "s", "b")
        obs = ", ".join(f"({random('s', 'b', str(i))} * 6 - 3)::FLOAT::DOUBLE" for i in range(18))
        self._write("bars", day, "bar", {
            **common, **arms, "stream_id": "ms || '-' || (3000 + s)",
            "record_id": "md5('b' || s || '/' || b)", "symbol": symbol,
            "event_ts_us": "ms * 1000", "open": "close / (1.0 + r)",
            "high": "close * 1.0002", "low": "close * 0.9998 / (1.0 + abs(r))", "close": "close",
            "volume": f"100 * {volume}", "empty_after": "0",
            "restarted": "false", "gap": "false", "warm": "b >= 60",
            "regime": f"{REGIMES}[1 + (hash(s, b // 90) % 4)::INT]",
            "bus_regime": "NULL", "opponent": "'q_table'",
            "opponent_digest": "repeat('cd', 32)", "step_decision_id": "step_id",
            "obs": f"list_resize([{obs}], 64, 0.0)", "missing_mask": "0",
            "guarded": "NULL",
        })  # fmt: skip
        self._ledger(day, common)
        if day == 0:
            settings = "MAP {'step_seconds': 60.0, 'initial_balance': 10000.0, 'fee_rate': 4e-4}"
            self._write("runs", day, "(SELECT 1)", {
                **common, "stream_id": f"'{START_MS}-1'", "record_id": f"'{RUN}'",
                "symbol": "''", "event_ts_us": f"{START_MS * 1_000}",
                "feature_digest": f"'{feature_digest()}'",
                "action_table": repr(list(ACTION_TABLE)),
                "training": "MAP {'steps': '1000000', 'reward': 'net_return'}",
                "rl_v2": "'bus'", "tables_digest": "NULL", "settings": settings,
            })  # fmt: skip

    def _decisions(self, day: int, symbol: str) -> None:
        rows = """(
            SELECT s, ms, v3_id AS id, 'advisory' AS kind, 'signal.generated' AS event, holds
            FROM signals
            UNION ALL SELECT s, ms, step_id, 'step', 'market.tick', holds FROM bar
            ORDER BY ms, kind, s
        )"""
        action = "if(holds, 0, 1 + (hash(id, 1) % 5)::INT)"
        names = ", ".join(f"'{name}'" for name in ACTION_TABLE)
        stamp = "strftime(make_timestamp(ms * 1000), '%Y-%m-%dT%H:%M:%S.%f') || '+00:00'"
        sure = f"0.3 + 0.7 * {random('id', '2')}"
        self._write("decisions", day, rows, {
            "stream_id": "ms || '-' || (s + if(kind = 'step', 5000, 0))", "symbol": symbol,
            "timestamp": stamp, "action": action, "confidence": sure,
            "value": f"{random('id', '3')} - 0.5", "source": "'RL_V3_PPO'",
            "shadow_mode": "true", "trace_id": "'t-' || id",
            "raw_obs": "MAP {'price': 100.0, 'volatility': 0.001, 'prediction': 1.0, "
                       "'position_size': 0.1}",
            "schema_version": "1", "decision_id": "id", "kind": "kind",
            "action_name": f"[{names}][{action} + 1]",
            "action_probs": f"[{sure}, (1 - ({sure})) / 2, 0.0, (1 - ({sure})) / 2, 0.0, 0.0]",
            "entropy": "0.7", "direction": "NULL", "target_position": "0.1",
            "standing_decision_id": "id", "warm": f"ms >= {START_MS + 3_600_000}",
            "feature_quality": "MAP {'missing_mask': 0, 'present': 64, 'of': 64}",
            "value_confidence": "0.05", "tp_zone_multiplier": "1.0", "suggested_tp_pct": "0.06",
            "model_id": "repeat('ab', 6)", "model_sha256": "repeat('ab', 32)",
            "feature_version": "'seed/000000000000'", "event_ts": stamp,
            "source_event_type": "event", "source_stream": "'quantum:stream:' || event",
            "source_entry_id": "ms || '-0'", "source_trace_id": "'t-' || id",
            "source_correlation_id": "''", "run_id": f"'{RUN}'",
            "latency_ms": f"1.0 - ln(1.0 - {random('id', '4')})", "risk_allowed": "NULL",
            "risk_reason": "NULL",
        })  # fmt: skip

    def _ledger(self, day: int, common: dict[str, str]) -> None:
        steps = f"{self.symbols} * (m + 1)"
        signals = f"{self.symbols} * if(m = {self.days * DAY_BARS - 1}, " \
                  f"{self.per_day * self.days}, m * {self.per_day} // {DAY_BARS})"  # fmt: skip
        counts = (
            f"MAP {{'market.tick': MAP {{'decided': {steps}}}, "
            f"'signal.generated': MAP {{'decided': {signals}}}}}"
        )
        self._write("ledger", day, f"range({day * DAY_BARS}, {(day + 1) * DAY_BARS}) AS t(m)", {
            **common, "stream_id": f"({START_MS} + (m + 1) * 60000) || '-9999'",
            "record_id": "md5('l' || m)", "symbol": "''",
            "event_ts_us": f"({START_MS} + (m + 1) * 60000) * 1000", "reason": "'minute'",
            "counts": counts, "entry_ids": "[]",
        })  # fmt: skip

    def _write(self, table: str, day: int, rows: str, values: dict[str, str]) -> None:
        spec = TABLES[table]
        values = {**NO_SOURCE, **values}
        columns = ", ".join(
            f'({values[name]})::{kind} AS "{name}"' for name, (kind, _) in spec.columns.items()
        )
        date = (START + timedelta(days=day)).date().isoformat()
        first = START_MS + day * 86_400_000
        folder = self.directory / table / f"day={date}"
        folder.mkdir(parents=True)
        path = folder / f"{first}-0_{first + 86_399_999}-0.parquet"
        source = rows if rows.startswith(("(", "range")) else f"(FROM {rows})"
        (n,) = self.db.execute(
            f"COPY (SELECT {columns} FROM {source}) TO '{path}' "
            "(FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE 16384)"
        ).fetchone()
        self.rows[spec.group] += n


def measure(store: Path, out: Path) -> tuple[float, float, float]:
    """Report on a store in a process of its own; return seconds, CPU seconds and peak MiB."""
    cores = sorted(os.sched_getaffinity(0))[:CORES]
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "shadow.cli", "report", "--store", str(store), "--out", str(out)],
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
        stdout=subprocess.PIPE,
        text=True,
    )
    text = process.stdout.read() if process.stdout else ""
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, 10, 20, 30):
        raise SystemExit(f"expected a report, found exit code {code}: {text[-500:]}")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1_024


def main() -> None:
    """Make stores, report on them, print; exit 1 beyond a limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, nargs="+", default=list(LIMIT_S))
    parser.add_argument("--per-bar", type=float, default=4.6296, help="v2 decisions per bar")
    parser.add_argument("--days", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=None, help="where stores are made")
    parser.add_argument("--keep", action="store_true", help="leave the stores, use those there")
    args = parser.parse_args()
    root = args.dir or Path(tempfile.mkdtemp(prefix="rlv3-bench-"))
    failed = False
    for pairs in args.pairs:
        store = root / f"pairs-{pairs}-{args.per_bar:g}"
        if not store.exists():
            symbols = max(round(pairs / args.per_bar / DAY_BARS / args.days), 1)
            Maker(store, pairs, symbols, args.days).make()
        position = json.loads((store / "position.json").read_text())
        rows = sum(group["rows"] for group in position["groups"].values())
        runs = [measure(store, root / "report") for _ in range(args.rounds)]
        seconds, mib = min(run[0] for run in runs), max(run[2] for run in runs)
        limit = LIMIT_S.get(pairs, float("inf"))
        size = sum(path.stat().st_size for path in store.rglob("*.parquet")) / 2**20
        good = seconds <= limit and mib <= MEMORY_MIB
        failed |= not good
        print(
            f"{pairs:,} pairs, {rows:,} rows, {size:,.0f} MiB of Parquet: "
            f"{' '.join(f'{run[0]:.1f}' for run in runs)} s (limit {limit:g}), "
            f"CPU {min(run[1] for run in runs):.1f} s, "
            f"peak {mib:,.0f} MiB (limit {MEMORY_MIB:,}) {'ok' if good else 'MISSED'}",
            flush=True,
        )
        if not args.keep:
            shutil.rmtree(store)
    if not args.keep:
        shutil.rmtree(root, ignore_errors=args.dir is not None)
    raise SystemExit(failed)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
