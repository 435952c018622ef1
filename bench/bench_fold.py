"""How many events per second does the fold take, from bytes to commit, and where does the time go?

In process, on one core, without Redis: what the worker adds to its reads and commits. Every part is
timed alone on the same events, the whole in batches as the worker runs it; figures are medians of
several rounds. `rest` is what the parts do not cover: arms, bookkeeping, records, state cells.

    python bench/bench_fold.py [--events N] [--symbols N] [--rounds N] [--policy FILE]
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from rlv3.events import Tick
from rlv3.features import MarketState
from rlv3.policy import Policy, shipped_policy
from shadow import codec
from shadow.pipeline import Pipeline, Settings
from shadow.records import Entry, decode_decision, encode
from worker.keys import Keys

START_MS = 1_700_000_040_000
TICK_MS = 25  # between ticks of all symbols together: a bar of 20 symbols has 120 ticks each
INPUT = "market.tick"


def make_entries(events: int, symbols: int) -> list[Entry]:
    """Return ticks of random walks in production's envelope, symbols in turn."""
    rng = np.random.default_rng(0)
    prices = 100.0 * np.exp(rng.normal(0.0, 2e-4, events).cumsum())
    volumes = rng.exponential(1.0, events)
    stream = Keys().stream(INPUT)
    entries = []
    for i in range(events):
        ms = START_MS + i * TICK_MS
        payload = {
            "symbol": f"SYM{i % symbols}USDT",
            "price": round(float(prices[i]), 4),
            "volume": round(float(volumes[i]), 4),
            "timestamp": ms / 1000,
        }
        fields = codec.envelope(
            INPUT,
            json.dumps(payload).encode(),
            trace_id="",
            correlation_id=f"tick-{i}",
            timestamp_iso="2023-11-14T22:14:00.000000",
            source="bench",
        )
        raw = {name.encode(): value for name, value in fields.items()}
        entries.append(Entry(stream, INPUT, f"{ms}-0", raw))
    return entries


def fold(policy: Policy, entries: list[Entry]) -> list[bytes]:
    """Run the whole fold in the worker's batches; return the decisions."""
    pipeline = Pipeline(policy, None, Settings(rl_v2="off"), (INPUT,))
    pipeline.begin({entries[0].stream: f"{START_MS - 1}-0"})
    decisions: list[bytes] = []
    at = 0
    while at < len(entries):
        commit = pipeline.run(entries[at : at + 64], now_ms=float(entries[at].id_ms))
        at += commit.taken
        decisions += (o.payload for o in commit.outputs if o.event_type == "rl_v3.decision")
    return decisions


def update_markets(ticks: list[Tick]) -> None:
    """Fold all ticks into market states and read the features after each."""
    markets: dict[str, MarketState] = {}
    for tick in ticks:
        market = markets.setdefault(tick.symbol, MarketState())
        market.on_tick(tick.ts_us, tick.price, tick.volume, tick.bid, tick.ask, tick.side)
        market.open_features(tick.ts_us)


def infer(policy: Policy, events: int) -> None:
    """Ask the policy about `events` observations in batches of 64, normalisation included."""
    rows, missing = np.zeros((64, 18)), [0] * 64
    masks = [(True,) * 6] * 64
    for _ in range(0, events, 64):
        policy.decide(policy.normaliser.apply(rows, missing), masks)


def medians(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each piece of work.

    Every round does all of them in turn, so that a busy moment of the machine hits none alone; the
    first round is thrown away.
    """
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in taken.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=20_000)
    parser.add_argument("--symbols", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--policy", type=Path, default=shipped_policy())
    args = parser.parse_args()

    policy = Policy.load(args.policy)
    entries = make_entries(args.events, args.symbols)
    ticks = [event for entry in entries if isinstance(event := codec.decode(entry), Tick)]
    decisions = fold(policy, entries)
    if not len(entries) == len(ticks) == len(decisions):
        raise SystemExit(f"{len(entries)} entries, {len(ticks)} ticks, {len(decisions)} decisions")
    structs = [decode_decision(payload) for payload in decisions]

    gc.freeze()  # the events lie in Redis, not on the worker's heap
    parts = medians(
        {
            "whole": lambda: fold(policy, entries),
            "decode": lambda: [codec.decode(entry) for entry in entries],
            "market, features": lambda: update_markets(ticks),
            "policy": lambda: infer(policy, len(ticks)),
            "encode decisions": lambda: [encode(item) for item in structs],
        },
        args.rounds,
    )
    whole = parts.pop("whole")
    parts["rest"] = whole - sum(parts.values())
    print(f"{args.events} ticks, {args.symbols} symbols, median of {args.rounds} rounds")
    print(f"{'whole fold':<18}{args.events / whole:>10,.0f} events/s")
    for name, part in parts.items():
        print(f"{name:<18}{part / args.events * 1e6:>10.2f} µs/event {part / whole:>6.0%}")


if __name__ == "__main__":
    main()
