"""The fold: raw entries in, decisions, comparisons and changed state out. No I/O, no clock.

Steps 2 to 9 of a tick's path, in the order in which they happen:

    decode -> market.update -> arms.mark -> observe -> policy -> decide -> pair, compare -> encode

Results depend on the entries and their order only, never on where a batch was cut. To make that
true although inference is batched: a step or signal is decided at once, advisory decisions on ticks
may wait until the end of the batch because nothing else depends on them, and outputs keep the place
of the entry that caused them.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from math import log
from typing import Any, assert_never

import msgspec

from rlv3.events import (
    ACTION_TABLE,
    Action,
    BaseDecision,
    EntryRef,
    Ignored,
    Kline,
    Outcome,
    ReferencePrice,
    Rejected,
    Replayed,
    Signal,
    Tick,
    V2Decision,
)
from rlv3.features import FEATURE_SET, N_FEATURES, feature_digest, regime_of
from rlv3.policy import TP_PCT, Policy
from rlv3.portfolio import DEFAULT_COSTS, Costs
from shadow import codec
from shadow.arms import Arm, Order
from shadow.mapping import v2_target, v3_direction, v3_target
from shadow.pairing import BUS, REFERENCE, Candidate, Match, OpenV2, Unmatched
from shadow.records import (
    ARMS,
    COMPARISONS,
    DECISIONS,
    MAX_ID_MS,
    SCHEMA_VERSION,
    BarRow,
    Commit,
    Comparison,
    Decision,
    Entry,
    LedgerRow,
    OutcomeRow,
    Output,
    PairRow,
    RunRow,
    UnpairedRow,
    V2Row,
    decision_id,
    encode,
    iso,
    parse_id,
    record_id,
)
from shadow.risk import RiskGuard, RiskLimits, Ruling
from shadow.rl_v2 import QTables, V2Reference
from shadow.symbol import StateError, SymbolState, pack, unpack

MINUTE_US = 60_000_000
REPLAYS_KEPT = 65_536
"""So many of the newest replays are remembered, so that none is decided twice."""
DECISION_BYTES = 1_250  # size taken for a decision that waits for inference
_BATCH_LIMITS = ("max_events", "max_bytes")
OUTCOMES = (
    "decided", "conflated", "consumed", "late", "duplicate", "stale", "priming", "unselected",
    "dead_letter",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Settings:
    """What is frozen for a run."""

    initial_balance: float = 10_000.0
    """Reference capital of every account."""
    costs: Costs = DEFAULT_COSTS
    latency_ms: int = 250
    """Delay from a decision to the first price at which its order may fill."""
    tau: float = 0.60
    """Effective confidence from which RL v2 follows a signal."""
    rl_v2: str = "reference"
    """reference, bus or off."""
    tick_sources: frozenset[str] | None = None
    """Sources whose ticks count; None for all."""
    max_event_age_s: float | None = 120.0
    """An event older than this when it was appended is stale; None for never."""
    pair_window_s: float = 30.0
    pair_window_ai_s: float = 90.0
    self_play: bool = False
    """The v2 arm is v3 again (`backtest --self`)."""
    risk: RiskLimits | None = None
    """Limits that every decision is annotated with, and that an arm of their own obeys."""
    max_events: int = 52
    """Entries per commit; batch limits change no result."""
    max_bytes: int = 65_536
    """Bytes per commit, about."""

    def dump(self) -> dict[str, Any]:
        """Return plain values for a recording."""
        values = asdict(self)
        values["costs"] = self.costs._asdict()
        values["tick_sources"] = None if self.tick_sources is None else sorted(self.tick_sources)
        if self.risk is None:
            del values["risk"]  # settings of before there were limits are the same ones
        return values

    @classmethod
    def restore(cls, values: Mapping[str, Any]) -> Settings:
        """Return the settings of a dump."""
        sources, risk = values["tick_sources"], values.get("risk")
        return cls(
            **{
                **values,
                "costs": Costs(**values["costs"]),
                "tick_sources": None if sources is None else frozenset(sources),
                "risk": None if risk is None else RiskLimits.restore(risk),
            }
        )


class _Job(msgspec.Struct, gc=False):
    """A decision whose inputs are fixed; only the network's answer is missing."""

    slot: int
    ref: EntryRef
    state: SymbolState
    ts_us: int
    kind: str
    signal: bool
    raw: list[float]
    missing: int
    mask: tuple[bool, ...]
    standing_id: str | None
    target: float
    exposure: float
    price: float
    prediction: int
    warm: bool
    pairs: bool = True
    """False for a replay: it came too late to be compared with anything."""
    entry: Ruling | None = None
    """What the risk limits said to an entry when the inputs were fixed; None without limits."""


class Pipeline:
    """All symbols of one worker, folded in one order.

    Args:
        policy: the artifact that decides.
        tables: RL v2's Q-tables when `settings.rl_v2` is `reference`.
        inputs: logical stream names in rank order.
        encode_decision: bytes of a decision; JSON by default.
    """

    def __init__(
        self,
        policy: Policy,
        tables: QTables | None,
        settings: Settings,
        inputs: Sequence[str],
        encode_decision: Callable[[Decision], bytes] = encode,
    ) -> None:
        self._encode_decision = encode_decision
        self._serve(policy)
        self.tables = tables if settings.rl_v2 == "reference" else None
        self.settings = settings
        self.inputs = tuple(inputs)
        self.counts: dict[tuple[str, str], int] = {}
        self.run_id = ""
        self.symbols: dict[str, SymbolState] = {}
        self.keeps_state = True
        """False makes commits without cells, for a fold that nobody will continue."""
        self.decisions = 0
        self.pairs = 0
        self.actions = {kind: [0] * len(ACTION_TABLE) for kind in ("step", "advisory")}
        """Kind -> decisions per action, since this object was made."""
        self.lost: dict[str, int | None] = {}
        """Event type -> entries lost since the first start; None where some are not counted. What
        is absent is not counted, or not yet."""
        self.marks = (0, 0, 0)
        """How often entries were lost, prices were lost, and runs were ended. A symbol that comes
        up again applies what happened meanwhile, so that none of it writes all states at once."""
        self.kills = 0
        """How often the kill switch of the risk limits changed: engaged while that is odd."""
        self.vetoes: dict[str, int] = {}
        """Reason -> decisions that the risk limits would not have allowed, by this object."""
        self._newest = (0, 0, 0)  # (ms, seq, rank) of the newest entry folded in its order
        self._ledger_minute = -1
        self._own_dirty = False
        self._replays = 0
        self._replayed: dict[str, int] = {}  # `stream|id` of what was replayed -> its number
        self._own_cells: dict[str, bytes] = {}  # written beside the own one
        self._streams: dict[str, str] = {}  # logical name -> full key, as read
        self._interval = f"{policy.step_seconds // 60}m"
        self._latency_us = settings.latency_ms * 1_000
        self._max_age_us = (
            None if settings.max_event_age_s is None else int(settings.max_event_age_s * 1e6)
        )
        self._window_ai_us = int(settings.pair_window_ai_s * 1e6)
        self._window_us = int(settings.pair_window_s * 1e6)
        self.feature_version = f"{FEATURE_SET}/{feature_digest()[:12]}"
        # what the batch in hand has produced
        self._outputs: list[Output | None] = []
        self._jobs: list[_Job] = []
        self._bytes = 0
        self._changed: set[tuple[str, str]] = set()
        self._touched: dict[str, SymbolState] = {}
        self._now_ms = 0.0
        self._leave_out: Container[str] = ()
        self._left_out: list[EntryRef] = []

    def _serve(self, policy: Policy) -> None:
        self.policy = policy
        self._digest = policy.digest
        self._use_masks = policy.metadata["mask_rule"] != "none"

    # -- a run's life ----------------------------------------------------------------------------

    def begin(self, cursors: Mapping[str, str], policy: Policy | None = None) -> Commit:
        """Start a run at the given cursors: its identity, and the row that freezes its settings.

        Where a run went before, positions that it opened close at the next price.

        Args:
            cursors: full stream key -> id of the last entry folded.
            policy: who decides from here on, with steps as long as before; None for the same.
        """
        swapped = bool(self.run_id)
        self._serve(policy or self.policy)
        rules = {k: v for k, v in self.settings.dump().items() if k not in _BATCH_LIMITS}
        self.run_id = record_id(
            "run",
            self.policy.digest,
            self._tables_digest(),
            encode(rules),
            *sorted(cursors.items()),
        )[:16]
        if swapped:
            gaps, price_gaps, swaps = self.marks
            self.marks = gaps, price_gaps, swaps + 1
            self._ledger("swap", self._ledger_minute, ())
        self._own_dirty = True
        self._emit(self._run_row(max((_id_us(c) for c in cursors.values()), default=0)))
        return self._finish({}, 0)

    def _run_row(self, ts_us: int) -> RunRow:
        settings = self.settings
        costs = settings.costs
        return RunRow(
            record_id=record_id("run", self.run_id),
            run_id=self.run_id,
            symbol="",
            event_ts_us=ts_us,
            policy_digest=self.policy.digest,
            feature_digest=feature_digest(),
            action_table=ACTION_TABLE,
            training={k: str(v) for k, v in self.policy.metadata["training"].items()},
            rl_v2="v3" if settings.self_play else settings.rl_v2,
            tables_digest=self._tables_digest(),
            settings={
                "initial_balance": settings.initial_balance,
                "fee_rate": costs.fee_rate,
                "entry_fraction": costs.entry_fraction,
                "min_notional": costs.min_notional,
                "flatten_cooldown_steps": float(costs.flatten_cooldown_steps),
                "latency_ms": float(settings.latency_ms),
                "tau": settings.tau,
                "step_seconds": float(self.policy.step_seconds),
            },
        )

    def _tables_digest(self) -> str | None:
        return None if self.tables is None else self.tables.digest

    def restore(self, cells: Mapping[str, Mapping[str, bytes]]) -> list[str]:
        """Continue from stored cells; return the symbols that had to restart cold and flat.

        Args:
            cells: symbol -> cell name -> bytes; the symbol "" is the pipeline's own.
        Raises:
            StateError: the pipeline's own cell is damaged.
        """
        damaged = []
        own = cells.get("", {}).get("own")
        if own is not None:
            (
                self.run_id, self._ledger_minute, self.decisions, self.pairs, self._streams, *later
            ) = unpack(own)  # fmt: skip
            if later:  # absent in states of before losses were folded
                self.lost, marks, newest, *risk = later
                self.marks, self._newest = tuple(marks), tuple(newest)
                (self.kills,) = risk or (0,)  # absent in states of before there were limits
        kept = [unpack(cell) for name, cell in cells.get("", {}).items() if name != "own"]
        self._replayed = {place: number for number, place in sorted(kept)}
        self._replays = max(self._replayed.values(), default=-1) + 1
        for symbol, stored in cells.items():
            if not symbol:
                continue
            state = self._new_symbol(symbol)
            try:
                state.load(stored)
            except StateError:
                damaged.append(symbol)
                state = self._new_symbol(symbol)
                state.gap = True
                state.mark_all_dirty()
                self._touched[symbol] = state
            self.symbols[symbol] = state
        if damaged:
            self._ledger("corrupt_state", self._ledger_minute, tuple(damaged))
        return damaged

    def warm_up(self, entries: Iterable[Entry]) -> Commit:
        """Fold history into the market state only: nothing is decided, paired or counted."""
        for entry in entries:
            event = codec.decode(entry)
            if isinstance(event, Kline) and event.interval == self._interval:
                start = event.bar_end_us - self.policy.step_seconds * 1_000_000
                ticks = [
                    _candle_tick(event, start + 1_000, event.open),
                    _candle_tick(event, start + 2_000, event.high),
                    _candle_tick(event, start + 3_000, event.low),
                    _candle_tick(event, event.bar_end_us, event.close, event.volume),
                ]
            elif isinstance(event, Tick) and self._selected(event):
                ticks = [event]
            else:
                continue
            state = self._touch(self._symbol(event.symbol))
            if ticks[0].ts_us < state.market.last_ts_us:
                continue
            for tick in ticks:
                volume = None if tick.synthetic else tick.volume
                closed = state.market.on_tick(
                    tick.ts_us, tick.price, volume, tick.bid, tick.ask, tick.side
                )
                if closed is not None and state.reference is not None:
                    state.reference.observe_close(closed.close)
        for state in self._touched.values():
            state.mark_all_dirty()
            state.regime = regime_of(state.market.closed_raw)
        return self._finish({}, 0)

    def stop(self) -> Commit:
        """Return the last ledger row of an orderly stop."""
        self._ledger("stop", self._ledger_minute, ())
        return self._finish({}, 0)

    def count_losses(self, event_types: Sequence[str]) -> None:
        """Take into the next commit whose losses are counted from here on: no loss is then 0.

        Call it at every start: what is known already changes nothing.
        """
        begun = [name for name in event_types if name not in self.lost]
        if not begun:
            return
        self.lost.update(dict.fromkeys(begun, 0))
        self._own_dirty = True
        if self.run_id:  # else the first run begins with it
            self._ledger("counting", self._ledger_minute, tuple(f"{name}|on" for name in begun))

    def lose(
        self, event_type: str, entries: int | None, *, stream: str, after: str, upto: str
    ) -> None:
        """Take a hole in a stream into the next commit, before its entries.

        Positions stay; every symbol's next bar carries `gap`, and where prices are missing, its
        indicators begin anew.

        Args:
            entries: how many are missing, None where that is not known.
            stream: full key.
            after: id of the last entry before the hole.
            upto: id from which reading goes on.
        """
        known = self.lost.get(event_type, 0)
        self.lost[event_type] = None if entries is None or known is None else known + entries
        gaps, price_gaps, swaps = self.marks
        self.marks = gaps + 1, price_gaps + (event_type == "market.tick"), swaps
        self._own_dirty = True
        self._ledger("lost", self._ledger_minute, (f"{stream}|{after}", f"{stream}|{upto}"))

    def kill(self, engaged: bool) -> None:
        """Take what the kill switch says into the next commit, before its entries."""
        if engaged == self.killed:
            return
        self.kills += 1
        self._own_dirty = True
        word = "on" if engaged else "off"
        self._ledger("kill", self._ledger_minute, (f"{self.kills}|{word}",))

    @property
    def killed(self) -> bool:
        """Whether the kill switch of the risk limits is engaged."""
        return self.kills % 2 == 1

    def run(
        self,
        entries: Sequence[Entry],
        *,
        now_ms: float,
        leave_out: Container[str] = (),
        ahead: int = 0,
        crashed: int = 0,
    ) -> Commit:
        """Fold a prefix of the entries, at most one commit's worth.

        Where the entries do not follow the order of what was folded before, because ids lie in the
        future or came late, the commit's ledger row says in which order they were folded.

        Args:
            entries: raw entries in the defined order.
            now_ms: wall clock, used for `latency_ms` only.
            leave_out: `stream|id` of ticks that need no advisory decision, see `superseded`; those
                that have none for it are counted as conflated, and named in the ledger.
            ahead: the last so many have ids in the future; no commit mixes them with others.
            crashed: the process ended so often with the only entry in hand: a dead letter for it.
        """
        due = len(entries) - ahead
        disordered = due <= 0 or self._order(entries[0]) < self._newest
        self._now_ms = now_ms
        self._leave_out = leave_out
        cursors: dict[str, str] = {}
        max_events, max_bytes = self.settings.max_events, self.settings.max_bytes
        taken = 0
        for entry in entries:
            if taken >= max_events or self._bytes >= max_bytes:
                break
            if taken == due > 0:
                break
            if crashed:
                self._quarantine(entry, crashed)
            else:
                self._fold(entry)
            cursors[entry.stream] = entry.entry_id
            taken += 1
        self._flush()
        if taken and disordered:
            places = tuple(entry.place for entry in entries[:taken])
            self._ledger("order", self._ledger_minute, places)
        if taken and due > 0:
            self._newest = max(self._newest, self._order(entries[taken - 1]))
        return self._finish(cursors, taken)

    def superseded(self, entries: Sequence[Entry]) -> frozenset[str]:
        """Return the ticks that a newer one of their symbol follows, as `stream|id`.

        The newest one of a symbol is never among them, nor is the newest before a decision of RL v2
        on that symbol, nor any that such a decision may have meant.

        Args:
            entries: all that is known to be waiting, in order, however many commits that takes.
        """
        newest: dict[str, int] = {}
        judged: dict[str, list[V2Decision]] = {}
        found = []
        for entry in reversed(entries):
            event = codec.decode(entry)
            if isinstance(event, V2Decision):
                newest.pop(event.symbol, None)
                judged.setdefault(event.symbol, []).append(event)
            elif isinstance(event, Tick) and self._selected(event):
                later = newest.get(event.symbol, -1)
                if event.ts_us < later and not any(
                    _may_mean(v2, event) for v2 in judged.get(event.symbol, ())
                ):
                    found.append(entry.place)
                if event.ts_us > later and not self._stale(event.ref, event.ts_us):
                    newest[event.symbol] = event.ts_us
        return frozenset(found)

    def _order(self, entry: Entry) -> tuple[int, int, int]:
        """Return what entries are ordered by: id, then the rank of the stream."""
        return *parse_id(entry.entry_id), self.inputs.index(entry.event_type)

    # -- one entry -------------------------------------------------------------------------------

    def _fold(self, entry: Entry) -> None:
        if entry.event_type not in self._streams:
            self._streams[entry.event_type] = entry.stream
        event = codec.decode(entry)
        minute = event.ref.id_ms // 60_000
        if minute > self._ledger_minute:
            self._new_minute(minute)
        match event:
            case Tick():
                outcome = self._on_tick(event)
            case Signal():
                outcome = self._on_signal(event)
            case V2Decision():
                outcome = self._on_v2(event)
            case Outcome():
                outcome = self._on_outcome(event)
            case BaseDecision():
                outcome = self._on_base(event)
            case Kline() | ReferencePrice():
                outcome = "consumed"
            case Ignored():
                outcome = event.reason
            case Rejected():
                outcome = self._reject(entry, event)
            case Replayed():
                outcome = self._on_replay(event)
            case _:
                assert_never(event)
        self._count(entry.event_type, outcome)

    def _new_minute(self, minute: int) -> None:
        if self._ledger_minute >= 0:
            self._flush()
            self._ledger("minute", minute, ())
        self._ledger_minute = minute
        self._own_dirty = True

    def _reject(self, entry: Entry, rejected: Rejected) -> str:
        letter = codec.dead_letter(entry, rejected, entry.id_ms * 1_000)
        ref = rejected.ref
        self._add(Output(f"dlq:{entry.event_type}", letter, ref.trace_id, ref.correlation_id))
        return "dead_letter"

    def _quarantine(self, entry: Entry, deaths: int) -> None:
        """Turn an entry that ends the process into a dead letter, without looking into it."""
        self._streams.setdefault(entry.event_type, entry.stream)
        minute = entry.id_ms // 60_000
        if minute > self._ledger_minute:
            self._new_minute(minute)
        self._count(entry.event_type, self._reject(entry, codec.crashed(entry, deaths)))
        self._ledger("crash", self._ledger_minute, (entry.place,))

    def _on_replay(self, replayed: Replayed) -> str:
        """Decide on an entry that was a dead letter, from what is known now; fold nothing."""
        event, ref = replayed.event, replayed.ref
        if not isinstance(event, Tick | Signal):
            return "consumed"
        if isinstance(event, Tick) and not self._selected(event):
            return "unselected"
        place = ref.place
        if place in self._replayed:
            return "duplicate"
        self._remember_replay(place)
        known = event.symbol in self.symbols
        state = self._symbol(event.symbol) if known else self._new_symbol(event.symbol)
        self._flush()  # so that the row counts all that came before
        job = self._job(ref, state, event.ts_us, "advisory", signal=False)
        job.pairs = False
        self._decide_now(job)
        self._ledger("replay", self._ledger_minute, (place,))
        return "decided"

    def _remember_replay(self, place: str) -> None:
        number, self._replays = self._replays, self._replays + 1
        self._replayed[place] = number
        if len(self._replayed) > REPLAYS_KEPT:
            del self._replayed[next(iter(self._replayed))]
        self._own_cells[f"replay:{number % REPLAYS_KEPT}"] = pack((number, place))

    def _selected(self, tick: Tick) -> bool:
        sources = self.settings.tick_sources
        return sources is None or tick.ref.source in sources

    def _stale(self, ref: EntryRef, ts_us: int) -> bool:
        return self._max_age_us is not None and ref.id_ms * 1_000 - ts_us > self._max_age_us

    def _on_tick(self, tick: Tick) -> str:
        if not self._selected(tick):
            return "unselected"
        state = self._symbol(tick.symbol)
        market = state.market
        ref, ts_us, price = tick.ref, tick.ts_us, tick.price
        stale = self._stale(ref, ts_us)
        identity = (ts_us, price, tick.volume)
        if state.seen(identity):
            return "stale" if stale else "duplicate"
        if ts_us < market.last_ts_us:
            return "stale" if stale else "late"
        self._touch(state)
        state.open_dirty = True
        if ts_us > state.now_us:
            self._advance(state, ts_us)
        state.remember(identity)
        closed = market.on_tick(
            ts_us, price, None if tick.synthetic else tick.volume, tick.bid, tick.ask, tick.side
        )
        bar: BarRow | None = None
        if closed is not None:
            bar = self._bar_row(state, closed, ref)
        half_spread = market.half_spread
        realised = state.v2.account.realised
        changed = state.v3.on_price(ts_us, price, half_spread)
        changed = state.v2.on_price(ts_us, price, half_spread) or changed
        changed = state.follow_signal.on_price(ts_us, price, half_spread) or changed
        if changed:
            state.arms_dirty = True
            self._note_v2_outcome(state, realised)
        if state.guard is not None and state.guard.on_price(ts_us, price, half_spread):
            state.guard_dirty = True
        if stale:
            state.owed = state.owed or closed is not None
            if bar is not None:
                self._emit(bar)
            return "stale"
        if closed is None and not state.owed:
            if self._leave_out and ref.place in self._leave_out and not state.pairing.open_v2:
                self._left_out.append(ref)
                return "conflated"
            job = self._job(ref, state, ts_us, "advisory", signal=False)
            if state.pairing.open_v2:
                self._flush()
                self._decide_now(job)
                return "decided"
            self._jobs.append(job)
            self._bytes += DECISION_BYTES
            return "decided"
        state.owed = False
        obs, missing, chosen = self._step(ref, state, ts_us, price, half_spread)
        if bar is not None:
            self._emit(
                msgspec.structs.replace(bar, step_decision_id=chosen, obs=obs, missing_mask=missing)
            )
        return "decided"

    def _on_signal(self, signal: Signal) -> str:
        if self._stale(signal.ref, signal.ts_us):
            return "stale"
        state = self._touch(self._symbol(signal.symbol))
        state.open_dirty = state.arms_dirty = True
        if signal.ts_us > state.now_us:
            self._advance(state, signal.ts_us)
        state.last_direction = signal.direction
        state.last_confidence = signal.confidence
        if signal.regime is not None:
            state.bus_regime = signal.regime
        self._decide_now(self._job(signal.ref, state, signal.ts_us, "advisory", signal=True))
        settings = self.settings
        target = signal.direction * settings.costs.entry_fraction
        self._aim(state, state.follow_signal, target, signal.ts_us)
        if state.reference is not None and not state.v2_bus and not settings.self_play:
            self._reference_decides(state, signal)
        return "decided"

    def _on_base(self, base: BaseDecision) -> str:
        if base.regime is not None:
            state = self._touch(self._symbol(base.symbol))
            state.bus_regime = base.regime
            state.arms_dirty = True
        return "consumed"

    def _on_outcome(self, outcome: Outcome) -> str:
        if outcome.paper:
            return "consumed"
        state = self._symbol(outcome.symbol)
        self._emit(
            OutcomeRow(
                record_id=record_id("outcome", outcome.ref.stream, outcome.ref.entry_id),
                run_id=self.run_id,
                symbol=outcome.symbol,
                event_ts_us=outcome.ts_us,
                closed_side=outcome.closed_side,
                entry_price=outcome.entry_price,
                exit_price=outcome.exit_price,
                pnl_pct=outcome.pnl_pct,
                pnl_usd=outcome.pnl_usd,
                reason=outcome.reason,
                v3_exposure=state.v3.account.exposure,
                v2_exposure=state.v2.account.exposure,
                policy_digest=self.policy.digest,
                trace_id=outcome.ref.trace_id,
                correlation_id=outcome.ref.correlation_id,
            )
        )
        return "consumed"

    # -- RL v2 -----------------------------------------------------------------------------------

    def _reference_decides(self, state: SymbolState, signal: Signal) -> None:
        assert state.reference is not None
        assert self.tables is not None
        choice = state.reference.decide(signal, abs(state.v2.account.exposure))
        ref = signal.ref
        self._v2_row(
            state,
            V2Decision(
                ref=ref,
                symbol=signal.symbol,
                ts_us=signal.ts_us,
                decision_id=record_id("v2", ref.stream, ref.entry_id, self.tables.digest),
                kind="combined",
                provenance="local_reference",
                strategy=choice.strategy,
                model=choice.model,
                weight=choice.weight,
                size_multiplier=choice.size_multiplier,
                leverage=choice.leverage,
                signal_direction=signal.direction,
                signal_confidence=signal.confidence,
                source_stream=ref.stream,
                source_entry_id=ref.entry_id,
                tables_digest=self.tables.digest,
            ),
        )
        state.closed_dirty = True

    def _on_v2(self, v2: V2Decision) -> str:
        state = self._touch(self._symbol(v2.symbol))
        state.open_dirty = state.arms_dirty = True
        self._flush()
        event_ts = v2.ts_us if v2.event_ts_us is None else v2.event_ts_us
        if event_ts > state.now_us:
            self._advance(state, event_ts)
        if v2.kind == "position_sizing" and v2.size_multiplier is not None:
            state.v2_multiplier = v2.size_multiplier
        self._v2_row(state, v2)
        return "consumed"

    def _v2_row(self, state: SymbolState, v2: V2Decision) -> None:
        """Map a v2 decision to a target, move its arm if it is the opponent, and pair it."""
        settings = self.settings
        local = v2.provenance == "local_reference" and v2.ref.event_type != "rl_v2.decision"
        base = state.last_direction if v2.signal_direction is None else v2.signal_direction
        confidence = state.last_confidence if v2.signal_confidence is None else v2.signal_confidence
        multiplier = state.v2_multiplier if v2.size_multiplier is None else v2.size_multiplier
        direction: int | None = v2.direction
        effective, size, assumed = v2.effective_confidence, v2.size_fraction, False
        if direction is None and v2.weight is not None and base is not None:
            mapped = v2_target(base, confidence, v2.weight, multiplier, settings.tau)
            direction, assumed = mapped.direction, mapped.multiplier_assumed
            effective = mapped.effective_confidence if effective is None else effective
            size = mapped.size_fraction if size is None else size
        elif direction is not None and size is None:
            mapped = v2_target(direction, 1.0, 1.0, multiplier, 0.0)
            size, assumed = mapped.size_fraction, mapped.multiplier_assumed
        target = None if direction is None or size is None else direction * size
        if not local and v2.provenance == "q_table" and settings.rl_v2 == "reference":
            state.v2_bus = True
        moves = (
            target is not None
            and not settings.self_play
            and (
                local
                or settings.rl_v2 == "bus"
                or (settings.rl_v2 == "reference" and v2.provenance == "q_table")
            )
        )
        event_ts = v2.ts_us if v2.event_ts_us is None else v2.event_ts_us
        if moves and target is not None:
            self._aim(state, state.v2, target, v2.ts_us)
            state.v2.expires_us = v2.expires_at_us
            state.v2_digest = v2.tables_digest
            target = state.v2.target
        state.arms_dirty = True
        self._emit(
            V2Row(
                record_id=record_id("decision", v2.ref.stream, v2.ref.entry_id, v2.decision_id),
                run_id=self.run_id,
                symbol=v2.symbol,
                event_ts_us=event_ts,
                source_stream=v2.ref.stream,
                source_entry_id=v2.ref.entry_id,
                trace_id=v2.ref.trace_id,
                correlation_id=v2.ref.correlation_id,
                decision_id=v2.decision_id,
                opponent=v2.provenance,
                opponent_digest=v2.tables_digest,
                decision_kind=v2.kind,
                strategy=v2.strategy,
                model=v2.model,
                weight=v2.weight,
                size_multiplier=v2.size_multiplier,
                multiplier_assumed=assumed,
                leverage=v2.leverage,
                base_direction=base,
                signal_confidence=confidence,
                effective_confidence=effective,
                direction=direction,
                target=target,
                moves_arm=moves,
                policy_digest=self.policy.digest,
            )
        )
        stream = v2.source_stream
        if stream is not None and ":" not in stream:
            stream = self._streams.get(stream, stream)
        slow = stream is not None and stream.endswith("ai.signal_generated")
        found = state.pairing.offer(
            OpenV2(
                decision_id=v2.decision_id,
                ts_us=event_ts,
                stream=stream,
                entry_id=v2.source_entry_id,
                trace_id=codec.join_id(v2.trace_id),
                correlation_id=codec.join_id(v2.correlation_id),
                direction=direction,
                exposure=target,
                opponent=v2.provenance,
                digest=v2.tables_digest,
                window_us=self._window_ai_us if slow else self._window_us,
                bit=REFERENCE if local else BUS,
                judged=v2.signal_direction is not None,
                source_trace_id=v2.ref.trace_id,
                source_correlation_id=v2.ref.correlation_id,
            )
        )
        if isinstance(found, Match):
            self._pair_row(state, found)
        elif found is not None:  # a duplicate: its entry tells it from the next one
            self._unpaired_row(state, found, v2.ref.stream, v2.ref.entry_id)

    def _note_v2_outcome(self, state: SymbolState, realised: float) -> None:
        profit = state.v2.account.realised - realised
        if profit != 0.0 and state.reference is not None:
            state.reference.record_outcome(profit > 0.0)
            state.closed_dirty = True

    def _aim(self, state: SymbolState, arm: Arm, target: float, ts_us: int) -> None:
        """Place an order for a target exposure if it differs from the one in force."""
        market = state.market
        target = arm.allow(target, market.warm)
        if target == arm.target:
            return
        arm.target = target
        decided = max(ts_us, market.last_ts_us)
        realised = state.v2.account.realised
        arm.place(
            Order(decided + self._latency_us, None, target),
            market.last_ts_us,
            market.close,
            market.half_spread,
        )
        if arm is state.v2:
            self._note_v2_outcome(state, realised)

    # -- v3 --------------------------------------------------------------------------------------

    def _job(
        self, ref: EntryRef, state: SymbolState, ts_us: int, kind: str, *, signal: bool
    ) -> _Job:
        """Fix the inputs of v3's decision on an event and reserve the place of its output."""
        market, arm = state.market, state.v3
        if kind == "step":
            raw, missing = list(market.closed_raw), market.closed_missing
        else:
            raw, missing = market.open_features(ts_us)
        account = arm.account
        raw[6:10] = account.features()
        warm = market.warm
        mask = account.valid_actions(
            cold=not warm, pending=arm.order is not None, use_masks=self._use_masks
        )
        slot = len(self._outputs)
        self._outputs.append(None)
        return _Job(
            slot, ref, state, ts_us, kind, signal, raw, missing, mask, state.standing_id,
            arm.target, account.exposure, market.close, state.last_direction or 0, warm, True,
            None if state.guard is None else state.guard.entry(killed=self.killed),
        )  # fmt: skip

    def _step(
        self, ref: EntryRef, state: SymbolState, ts_us: int, price: float, half_spread: float
    ) -> tuple[tuple[float, ...], int, str]:
        """Decide the step of the bars just closed and place its order."""
        chosen = decision_id(ref.stream, ref.entry_id, self.policy.digest)
        obs: tuple[float, ...] = ()
        missing = 0
        played = (state.v3, state.v2) if self.settings.self_play else (state.v3,)
        for arm in played:
            if arm.account.quantity == 0.0 and arm.order is None:
                arm.target = 0.0
            if arm is state.v3:
                state.standing_id = chosen
                job = self._job(ref, state, ts_us, "step", signal=False)
                action, obs = self._decide_now(job)
                missing = job.missing
                if state.guard is not None and job.entry is not None:
                    due_us = ts_us + self._latency_us
                    state.guard.step(action, job.entry, due_us, ts_us, price, half_spread)
                    state.guard_dirty = True
            else:
                action = self._mirror(state, arm)
            arm.account.end_step()
            if action != Action.HOLD:
                order = Order(ts_us + self._latency_us, action, 0.0)
                arm.place(order, ts_us, price, half_spread)
        state.arms_dirty = True
        return obs, missing, chosen

    def _mirror(self, state: SymbolState, arm: Arm) -> int:
        """Decide for v3's twin from the twin's own account (self-play)."""
        market = state.market
        raw = list(market.closed_raw)
        raw[6:10] = arm.account.features()
        mask = arm.account.valid_actions(
            cold=not market.warm, pending=arm.order is not None, use_masks=self._use_masks
        )
        obs = self.policy.normaliser.apply([raw], [market.closed_missing])
        action = int(self.policy.decide(obs, [mask])[0][0])
        arm.target = v3_target(action, arm.target, self.settings.costs)
        return action

    def _decide_now(self, job: _Job) -> tuple[int, tuple[float, ...]]:
        """Run the network for one decision."""
        obs = self.policy.normaliser.apply([job.raw], [job.missing])
        actions, probs, values = self.policy.decide(obs, [job.mask])
        self._complete(job, int(actions[0]), probs[0].tolist(), float(values[0]))
        return int(actions[0]), tuple(obs[0].tolist())

    def _flush(self) -> None:
        """Run the network for every advisory decision that waits, and name what was left out."""
        if self._left_out:  # with every entry so far counted, the row says where an audit must cut
            left_out, self._left_out = self._left_out, []
            places = tuple(ref.place for ref in left_out)
            self._ledger("conflated", left_out[-1].id_ms // 60_000, places)
        jobs, self._jobs = self._jobs, []
        if not jobs:
            return
        self._bytes -= DECISION_BYTES * len(jobs)
        obs = self.policy.normaliser.apply([j.raw for j in jobs], [j.missing for j in jobs])
        actions, probs, values = self.policy.decide(obs, [j.mask for j in jobs])
        for job, action, prob, value in zip(
            jobs, actions.tolist(), probs.tolist(), values.tolist(), strict=True
        ):
            self._complete(job, action, prob, value)

    def _complete(self, job: _Job, action: int, probs: list[float], value: float) -> None:
        """Turn the network's answer into a decision, its output and a pairing candidate."""
        state, ref, kind = job.state, job.ref, job.kind
        digest = self._digest
        stream, entry_id, event_type = ref.stream, ref.entry_id, ref.event_type
        source_trace, correlation_id = ref.trace_id, ref.correlation_id
        chosen = decision_id(stream, entry_id, digest)
        trace_id = source_trace or chosen
        target, exposure, warm, missing = job.target, job.exposure, job.warm, job.missing
        if kind == "step":
            target = state.v3.target = v3_target(action, target, self.settings.costs)
        ts_us = job.ts_us
        stamp = iso(ts_us)
        confidence = probs[action]
        zone = 1.0 + value / 20.0
        zone = 0.5 if zone < 0.5 else zone if zone < 1.5 else 1.5
        certainty = abs(value) / 10.0
        allowed: bool | None = None
        reason: str | None = None
        if job.entry is not None:
            allowed, reason = job.entry.on(action)
            if reason is not None:
                self.vetoes[reason] = self.vetoes.get(reason, 0) + 1
        payload = self._encode_decision(
            Decision(  # by position: 39 names would take longer than to encode them
                state.symbol, stamp, action, confidence, value, "RL_V3_PPO", True, trace_id,
                {
                    "price": job.price,
                    "volatility": job.raw[3],
                    "prediction": job.prediction,
                    "position_size": exposure,
                },
                SCHEMA_VERSION, chosen, kind, ACTION_TABLE[action], tuple(probs),
                _entropy(probs), v3_direction(action), target, job.standing_id, warm,
                _quality(missing),
                certainty if certainty < 1.0 else 1.0, zone, TP_PCT * zone, digest[:12], digest,
                self.feature_version, stamp, event_type, stream, entry_id, source_trace,
                correlation_id, self.run_id, self._now_ms - ref.id_ms, allowed, reason,
            )
        )  # fmt: skip
        self._bytes += len(payload) + 250
        self._outputs[job.slot] = Output(DECISIONS, payload, trace_id, correlation_id)
        self.decisions += 1
        self.actions[kind][action] += 1
        if not job.pairs:
            return
        matches, gone = state.pairing.add(
            Candidate(
                chosen, stream, entry_id, source_trace, correlation_id, ts_us, event_type, kind,
                action, confidence, exposure, target, warm, job.signal,
            ),
            self._window_ai_us,
        )  # fmt: skip
        for match in matches:
            self._pair_row(state, match)
        for unmatched in gone:
            self._unpaired_row(state, unmatched)

    # -- records ---------------------------------------------------------------------------------

    def _bar_row(self, state: SymbolState, closed: Any, ref: EntryRef) -> BarRow:
        """Close the bar of every arm; the accounts are still marked at its last price."""
        market = state.market
        known = state.regime
        state.regime = regime_of(market.closed_raw)
        arms = state.bars()
        assert tuple(arms) == ARMS
        gap, state.gap = state.gap, False
        state.closed_dirty = state.guard_dirty = True
        if state.reference is not None:
            state.reference.observe_close(closed.close)
            state.reference.observe_equity(arms["v2"].equity)
        return BarRow(
            record_id=record_id("bar", self.run_id, state.symbol, closed.end_us),
            run_id=self.run_id,
            symbol=state.symbol,
            event_ts_us=closed.end_us,
            open=closed.open,
            high=closed.high,
            low=closed.low,
            close=closed.close,
            volume=closed.volume,
            empty_after=closed.empty_after,
            restarted=closed.restarted,
            gap=gap,
            warm=market.warm,
            regime=known,
            bus_regime=state.bus_regime,
            arms=arms,
            opponent=self._opponent(state),
            opponent_digest=state.v2_digest if state.v2_bus else self._tables_digest(),
            step_decision_id=None,
            obs=(),
            missing_mask=market.closed_missing,
            policy_digest=self.policy.digest,
            guarded=None if state.guard is None else state.guard.arm.bar(),
            trace_id=ref.trace_id,
            correlation_id=ref.correlation_id,
        )

    def _opponent(self, state: SymbolState) -> str:
        if self.settings.self_play:
            return "v3"
        if state.v2_bus:
            return "q_table"
        return {"reference": "local_reference", "bus": "bus", "off": "none"}[self.settings.rl_v2]

    def _pair_row(self, state: SymbolState, match: Match) -> None:
        v2, v3 = match.v2, match.v3
        self.pairs += 1
        self._own_dirty = True
        exposure = v2.exposure
        self._emit(
            PairRow(
                record_id=record_id("pair", v2.decision_id, v3.decision_id),
                run_id=self.run_id,
                symbol=state.symbol,
                event_ts_us=v2.ts_us,
                v2_decision_id=v2.decision_id,
                v3_decision_id=v3.decision_id,
                rule=match.rule,
                delta_us=v3.ts_us - v2.ts_us,
                opponent=v2.opponent,
                opponent_digest=v2.digest,
                v3_kind=v3.kind,
                v3_event_type=v3.event_type,
                v3_action=v3.action,
                v3_action_name=ACTION_TABLE[v3.action],
                v3_confidence=v3.confidence,
                v3_exposure=v3.exposure,
                v3_target=v3.target,
                v2_direction=v2.direction,
                v2_exposure=exposure,
                agree=None if exposure is None else _sign(exposure) == _sign(v3.target),
                warm=v3.warm,
                policy_digest=self.policy.digest,
                trace_id=v2.source_trace_id,
                correlation_id=v2.source_correlation_id,
                v3_trace_id=v3.trace_id or "",
                v3_correlation_id=v3.correlation_id or "",
            )
        )

    def _unpaired_row(self, state: SymbolState, unmatched: Unmatched, *place: str) -> None:
        self._emit(
            UnpairedRow(
                record_id=record_id("unpaired", unmatched.side, unmatched.decision_id, *place),
                run_id=self.run_id,
                symbol=state.symbol,
                event_ts_us=unmatched.ts_us,
                side=unmatched.side,
                decision_id=unmatched.decision_id,
                reason=unmatched.reason,
                opponent=unmatched.opponent,
                policy_digest=self.policy.digest,
                trace_id=unmatched.trace_id,
                correlation_id=unmatched.correlation_id,
            )
        )

    def _ledger(self, reason: str, minute: int, entry_ids: tuple[str, ...]) -> None:
        counts: dict[str, dict[str, int]] = {}
        for (event_type, outcome), n in sorted(self.counts.items()):
            counts.setdefault(event_type, {})[outcome] = n
        for event_type, lost in self.lost.items():
            if lost or (lost is not None and event_type in counts):
                counts.setdefault(event_type, {})["lost"] = lost
        self._emit(
            LedgerRow(
                record_id=record_id(
                    "ledger", self.run_id, reason, sum(self.counts.values()), *entry_ids
                ),
                run_id=self.run_id,
                symbol="",
                event_ts_us=max(minute, 0) * MINUTE_US,
                reason=reason,
                counts=counts,
                entry_ids=entry_ids,
                policy_digest=self.policy.digest,
            )
        )

    # -- plumbing --------------------------------------------------------------------------------

    def _advance(self, state: SymbolState, ts_us: int) -> None:
        """Move a symbol's event time on and settle pairings whose window has passed."""
        state.now_us = ts_us
        if ts_us <= state.pairing.deadline:
            return
        off = self.settings.rl_v2 == "off"
        for result in state.pairing.expire(ts_us, self._window_ai_us, off):
            if isinstance(result, Match):
                self._pair_row(state, result)
            else:
                self._unpaired_row(state, result)

    def _new_symbol(self, symbol: str) -> SymbolState:
        settings = self.settings
        reference = None if self.tables is None else V2Reference(self.tables)
        guard = None
        if settings.risk is not None:
            guard = RiskGuard(settings.risk, settings.initial_balance, settings.costs)
        state = SymbolState(
            symbol, self.policy.step_seconds, settings.initial_balance, settings.costs, reference,
            guard,
        )  # fmt: skip
        state.marks = self.marks
        return state

    def _symbol(self, symbol: str) -> SymbolState:
        state = self.symbols.get(symbol)
        if state is None:
            state = self.symbols[symbol] = self._new_symbol(symbol)
            state.mark_all_dirty()
            self._touched[symbol] = state
        elif state.marks != self.marks:
            self._catch_up(state)
        return state

    def _catch_up(self, state: SymbolState) -> None:
        """Apply to a symbol what happened to the pipeline since its last event."""
        for mark, (then, now) in enumerate(zip(state.marks, self.marks, strict=True)):
            if then == now:
                continue
            if mark == 0:
                state.gap = True
            elif mark == 1:
                state.forget_market()
            else:  # positions that the former policy opened close at the next price
                state.v3.target = 0.0
                state.v3.order = Order(0, None, 0.0)
                state.v2_bus = False
                state.standing_id = None
                state.arms_dirty = True
                if state.guard is not None:
                    state.guard.flatten()
                    state.guard_dirty = True
        state.marks = self.marks
        self._touch(state).open_dirty = True

    def _touch(self, state: SymbolState) -> SymbolState:
        self._touched[state.symbol] = state
        return state

    def _count(self, event_type: str, outcome: str) -> None:
        key = (event_type, outcome)
        self.counts[key] = self.counts.get(key, 0) + 1
        self._changed.add(key)

    def _emit(self, row: Comparison) -> None:
        trace = correlation = ""
        if not isinstance(row, LedgerRow | RunRow):  # these are about no single event
            trace, correlation = row.trace_id, row.correlation_id
        self._add(Output(COMPARISONS, encode(row), trace or row.record_id, correlation))

    def _add(self, output: Output) -> None:
        self._bytes += len(output.payload) + 250
        self._outputs.append(output)

    def _finish(self, cursors: dict[str, str], taken: int) -> Commit:
        """Collect what the batch produced and changed, and start the next one empty."""
        cells = self._cells(taken > 0) if self.keeps_state else {}
        commit = Commit(
            outputs=[output for output in self._outputs if output is not None],
            cells=cells,
            cursors=cursors,
            counts={key: self.counts[key] for key in self._changed},
            taken=taken,
        )
        self._outputs = []
        self._bytes = 0
        self._changed = set()
        self._touched = {}
        self._own_dirty = False
        return commit

    def _cells(self, folded: bool) -> dict[str, dict[str, bytes]]:
        """Return the cells that changed; the own one changes with every entry that was folded."""
        cells = {}
        for symbol, state in self._touched.items():
            if changed := state.take_cells():
                cells[symbol] = changed
        if self._own_dirty or folded:
            own = (
                self.run_id, self._ledger_minute, self.decisions, self.pairs, self._streams,
                self.lost, self.marks, self._newest, self.kills,
            )  # fmt: skip
            cells[""] = {"own": pack(own), **self._own_cells}
            self._own_cells = {}
        return cells

    def snapshot(self) -> dict[str, Any]:
        """Return what a heartbeat or a live table shows, as plain values."""
        states = self.symbols.values()
        initial = self.settings.initial_balance
        equity = {
            name: sum(getattr(state, name).account.equity for state in states)
            for name in ARMS
            if name != "flat"
        }
        equity["flat"] = initial * len(self.symbols)
        if self.settings.risk is not None:
            equity["v3_guarded"] = sum(
                state.guard.arm.account.equity for state in states if state.guard is not None
            )
        return {
            "run_id": self.run_id,
            "policy": self.policy.digest,
            "symbols": len(self.symbols),
            "warm": sum(state.market.warm for state in states),
            "decisions": self.decisions,
            "pairs": self.pairs,
            "equity": equity,
        }


def _candle_tick(kline: Kline, ts_us: int, price: float, volume: float | None = None) -> Tick:
    """Return one of the ticks that a candle stands for."""
    return Tick(kline.ref, kline.symbol, ts_us, price, volume)


def _may_mean(v2: V2Decision, tick: Tick) -> bool:
    """Return True when one of the exact rules of pairing can hold between the two."""
    ref = tick.ref
    event_ts = v2.ts_us if v2.event_ts_us is None else v2.event_ts_us
    return (
        v2.source_entry_id == ref.entry_id
        or v2.trace_id == ref.trace_id
        or v2.correlation_id == ref.correlation_id
        or abs(event_ts - tick.ts_us) <= 1_000
    )


@lru_cache(maxsize=256)
def _quality(missing: int) -> dict[str, int]:
    """Return a decision's `feature_quality`; the same object each time, only to be encoded."""
    present = N_FEATURES - missing.bit_count()
    return {"missing_mask": missing, "present": present, "of": N_FEATURES}


def _entropy(probs: Sequence[float]) -> float:
    total = 0.0
    for p in probs:
        if p > 0.0:
            total -= p * log(p)
    return total


def _sign(value: float) -> int:
    return (value > 0.0) - (value < 0.0)


def _id_us(entry_id: str) -> int:
    return min(int(entry_id.partition("-")[0]), MAX_ID_MS) * 1_000
