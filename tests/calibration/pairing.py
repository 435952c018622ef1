"""How well does pairing find the decision that both policies made on the same entry?

Signals arrive at least 5 s apart per symbol; RL v2 decides on each, a little later. Half of its
decisions share an id with the signal (its entry, its trace or its correlation id), the others have
nothing but a time, up to 250 ms wrong. One entry in a hundred is lost, also before v3 saw it, one
decision in a hundred is published twice, and one in a thousand carries an id of another signal.
Truth is the source entry; everything runs through the real pipeline, steps and advisory decisions
on ticks included, with a window of 2 s for rule 5.

    python -m tests.calibration.pairing [--decisions N] [--seed N]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from typing import NamedTuple

import numpy as np

from rlv3.policy import Policy, shipped_policy
from shadow.pipeline import Pipeline, Settings
from shadow.records import (
    Entry,
    PairRow,
    UnpairedRow,
    V2Row,
    decode_comparison,
    decode_decision,
)

INPUTS = ("market.tick", "signal.generated", "rl_v2.decision")
SYMBOLS = 5
T0 = 1_767_571_200_000
WINDOW_S = 2.0
LOSS, TWICE, CONFLICT = 0.01, 0.01, 0.001
PRECISION, RECALL = 0.999, 0.995


class Quality(NamedTuple):
    """What came out."""

    decisions: int
    """Of RL v2, as published, each counted once."""
    pairs: int
    correct: int
    possible: int
    """Decisions whose counterpart v3 made."""
    unpaired: Counter[tuple[str, str]]
    """(side, reason) -> rows."""
    rows: int
    """Of v2 decisions, duplicates included."""

    @property
    def precision(self) -> float:
        """Share of the pairs that are true."""
        return self.correct / self.pairs

    @property
    def recall(self) -> float:
        """Share of the possible pairs that were found."""
        return self.correct / self.possible

    @property
    def adds_up(self) -> bool:
        """True when every row of a v2 decision is paired or has a reason."""
        alone = sum(n for (side, _), n in self.unpaired.items() if side == "v2")
        return self.rows == self.pairs + alone


class _World(NamedTuple):
    entries: list[Entry]
    truth: dict[str, str]
    """v2 decision -> entry id of its signal."""


def _world(decisions: int, rng: np.random.Generator) -> _World:
    placed: list[tuple[int, int, str, dict[str, object], dict[str, str]]] = []
    truth: dict[str, tuple[int, str]] = {}
    v2: list[tuple[int, str, str, int, dict[str, object], dict[str, str]]] = []
    per_symbol = decisions // SYMBOLS
    for number in range(SYMBOLS):
        symbol = f"S{number}USDT"
        gaps = rng.integers(5_000, 11_000, per_symbol)
        times = T0 + 3_600_000 + np.cumsum(gaps)
        price = 100.0
        for ms in range(T0, int(times[-1]) + 120_000, 1_000):
            at = ms + int(rng.integers(1_000))
            price *= 1.0 + float(rng.normal(0.0, 2e-4))
            if rng.random() >= LOSS:
                body = {"symbol": symbol, "price": price, "timestamp": at / 1_000}
                placed.append((at, 0, "market.tick", body, {}))
        traces = [f"trace-{symbol}-{i}" for i in range(per_symbol)]
        for i, ms in enumerate(times.tolist()):
            side = "BUY" if rng.random() < 0.5 else "SELL"
            ids = {"trace_id": traces[i], "correlation_id": f"c-{traces[i]}"}
            signal = {"symbol": symbol, "side": side, "confidence": 0.7, "timestamp": ms / 1_000}
            placed.append((ms, 1, "signal.generated", {**signal, "n": (symbol, i)}, ids))
            if rng.random() < LOSS:
                continue  # v2's decision never came
            name = f"v2-{symbol}-{i}"
            jitter = int(rng.integers(-250, 251))
            body = {
                "schema_version": 1, "decision_id": name, "symbol": symbol, "kind": "combined",
                "provenance": "q_table", "weight": 1.0, "size_multiplier": 1.0,
                "signal_side": side, "signal_confidence": 0.7, "timestamp": ms / 1_000 + 0.1,
                "event_ts": (ms + jitter) / 1_000,
            }  # fmt: skip
            shared: dict[str, str] = {}
            kind = int(rng.integers(6))
            if kind == 0:
                body |= {"source_stream": "signal.generated", "source_entry_id": f"{ms}-?"}
            elif kind == 1:
                shared["trace_id"] = traces[i]
            elif kind == 2:
                shared["correlation_id"] = f"c-{traces[i]}"
            if rng.random() < CONFLICT:  # an id that belongs to one of the signals before
                other = traces[max(i - int(rng.integers(1, 4)), 0)]
                shared["trace_id"] = other
            v2.append((ms, symbol, name, i, body, shared))
    # ids: sequence numbers of signals follow from their place in time
    placed.sort(key=lambda item: item[:2])
    entries, signals = [], {}
    last, seq = 0, 0
    for ms, _, event_type, body, ids in placed:
        seq = seq + 1 if ms == last else 0
        last = ms
        entry_id = f"{ms}-{seq}"
        if event_type == "signal.generated":
            signals[body.pop("n")] = entry_id
            if rng.random() < LOSS:
                continue  # v3 never saw it
        entries.append(_entry(event_type, entry_id, body, ids))
    for ms, symbol, name, i, body, shared in v2:
        truth[name] = (ms, signals[symbol, i])
        if "source_entry_id" in body:
            body["source_entry_id"] = signals[symbol, i]
        for copy in range(2 if rng.random() < TWICE else 1):
            at = ms + int(rng.integers(20, 300)) + copy * int(rng.integers(50, 3_000))
            entries.append(_entry("rl_v2.decision", f"{at}-{900_000 + len(entries)}", body, shared))
    order = {name: rank for rank, name in enumerate(INPUTS)}
    entries.sort(key=lambda e: (*map(int, e.entry_id.split("-")), order[e.event_type]))
    return _World(entries, {name: entry_id for name, (_, entry_id) in truth.items()})


def _entry(event_type: str, entry_id: str, body: dict[str, object], ids: dict[str, str]) -> Entry:
    fields = {
        b"event_type": event_type.encode(),
        b"payload": json.dumps(body).encode(),
        b"trace_id": ids.get("trace_id", "").encode(),
        b"correlation_id": ids.get("correlation_id", "").encode(),
        b"source": b"calibration",
    }
    return Entry(event_type, event_type, entry_id, fields)


def play(policy: Policy, decisions: int, seed: int) -> Quality:
    """Fold one world and compare the pairs with the truth."""
    world = _world(decisions, np.random.default_rng(seed))
    settings = Settings(rl_v2="bus", max_event_age_s=None, pair_window_s=WINDOW_S,
                        pair_window_ai_s=WINDOW_S)  # fmt: skip
    pipeline = Pipeline(policy, None, settings, INPUTS)
    pipeline.begin(dict.fromkeys(INPUTS, f"{T0 - 1}-0"))
    source: dict[str, str] = {}  # v3 decision -> entry id of the signal it was made on
    pairs: list[PairRow] = []
    unpaired: Counter[tuple[str, str]] = Counter()
    rows = 0
    done, total = 0, len(world.entries)
    while done < total:
        commit = pipeline.run(world.entries[done : done + 64], now_ms=0.0)
        done += commit.taken
        for output in commit.outputs:
            if output.event_type == "rl_v3.decision":
                decision = decode_decision(output.payload)
                if decision.source_event_type == "signal.generated":
                    source[decision.decision_id] = decision.source_entry_id
                continue
            row = decode_comparison(output.payload)
            if isinstance(row, PairRow):
                pairs.append(row)
            elif isinstance(row, UnpairedRow):
                unpaired[row.side, row.reason] += 1
            elif isinstance(row, V2Row):
                rows += 1
    correct = sum(source.get(p.v3_decision_id) == world.truth[p.v2_decision_id] for p in pairs)
    seen = set(source.values())
    return Quality(
        decisions=len(world.truth),
        pairs=len(pairs),
        correct=correct,
        possible=sum(entry_id in seen for entry_id in world.truth.values()),
        unpaired=unpaired,
        rows=rows,
    )


def main() -> int:
    """Play a large world and print; exit 1 below a limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--decisions", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    found = play(Policy.load(shipped_policy()), args.decisions, args.seed)
    reasons = ", ".join(f"{side} {reason} {n:,}" for (side, reason), n in found.unpaired.items())
    good = found.precision >= PRECISION and found.recall >= RECALL and found.adds_up
    sys.stdout.write(
        f"{found.decisions:,} decisions of RL v2, {found.pairs:,} pairs: precision "
        f"{found.precision:.4%} (at least {PRECISION:.1%}), recall {found.recall:.4%} (at least "
        f"{RECALL:.1%})\nunpaired: {reasons}\n{found.rows:,} rows = {found.pairs:,} pairs + "
        f"unpaired of v2: {found.adds_up}\n"
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
