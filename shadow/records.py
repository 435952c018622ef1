"""What leaves the fold: decisions and comparison records, exactly as they appear on the bus.

Every record is an immutable struct that encodes to one JSON object. Field names and types here are
the contract of `rl_v3.decision` and `rl_v3.comparison`; the store's columns are derived from them.
Times are UTC epoch microseconds (`*_us`), except in `Decision`, whose ISO strings are production's.
Exposures are signed notional as a fraction of the arm's equity; returns, fees and slippage are
fractions of the reference capital.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import NamedTuple

import msgspec

SCHEMA_VERSION = 1
DECISIONS, COMPARISONS = "rl_v3.decision", "rl_v3.comparison"
"""Our two output streams."""
REPLAY = "rl_v3.replay"
"""Our own input, read after all others: dead letters' entries that `dlq replay` sent in again."""
ORIGIN = "0-0"
"""Before the first entry of any stream."""
MAX_ID_MS = 253_402_300_799_999
"""The end of year 9999, the last that can be written; Redis allows later ids to producers."""
ARMS = ("v3", "v2", "follow_signal", "flat")


StreamId = tuple[int, int]
"""An entry id as numbers, in the order of the stream: milliseconds, sequence number."""


def parse_id(entry_id: str) -> StreamId:
    """Split an entry id into its numbers."""
    ms, _, seq = entry_id.partition("-")
    return int(ms), int(seq or 0)


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One raw stream entry as read, in the defined order."""

    stream: str
    """Full key."""
    event_type: str
    """Logical stream name from configuration, for example `market.tick`."""
    entry_id: str
    fields: Mapping[bytes, bytes]

    @property
    def place(self) -> str:
        """Where it lies, as the ledger writes it: `stream|id`."""
        return f"{self.stream}|{self.entry_id}"

    @property
    def id_ms(self) -> int:
        """Milliseconds part of the entry id, at most `MAX_ID_MS`."""
        ms = int(self.entry_id.partition("-")[0])
        return ms if ms < MAX_ID_MS else MAX_ID_MS


class Decision(msgspec.Struct, frozen=True, gc=False):
    """`rl_v3.decision`: production's nine keys first, then ours (bus contract, version 1)."""

    symbol: str
    timestamp: str
    """Decision time = event time, ISO 8601 with offset."""
    action: int
    confidence: float
    """Probability of the chosen action."""
    value: float
    source: str
    """RL_V3_PPO."""
    shadow_mode: bool
    """Always true."""
    trace_id: str
    raw_obs: dict[str, float]
    """price, volatility, prediction (side of the last signal), position_size (signed exposure)."""
    schema_version: int
    decision_id: str
    kind: str
    """step or advisory."""
    action_name: str
    action_probs: tuple[float, ...]
    entropy: float
    direction: int | None
    """+1 LONG, -1 SHORT, 0 CLOSE and EMERGENCY_FLATTEN, null for HOLD and REDUCE (abstain)."""
    target_position: float
    """Exposure in force: after this step's order, or the standing one for an advisory decision."""
    standing_decision_id: str | None
    """The step decision in force; its own id for a step."""
    warm: bool
    feature_quality: dict[str, int]
    """missing_mask (bit i = feature i missing), present, of."""
    value_confidence: float
    """min(1, |value| / 10), what the earlier system called confidence."""
    tp_zone_multiplier: float
    suggested_tp_pct: float
    model_id: str
    """First 12 characters of the artifact's sha256."""
    model_sha256: str
    feature_version: str
    """Feature set and the first 12 characters of its digest."""
    event_ts: str
    source_event_type: str
    source_stream: str
    source_entry_id: str
    source_trace_id: str
    source_correlation_id: str
    run_id: str
    latency_ms: float
    """Commit time minus entry id time, by the worker's clock; the only field a replay changes."""
    risk_allowed: bool | None = None
    """What risk limits would have said to the action; null without limits."""
    risk_reason: str | None = None
    """Why they would not have allowed it: kill_switch, daily_loss, gross_exposure or leverage."""


class V2Row(msgspec.Struct, frozen=True, gc=False, tag_field="kind", tag="decision"):
    """A decision of RL v2, as mapped to target exposure."""

    record_id: str
    run_id: str
    symbol: str
    event_ts_us: int
    source_stream: str
    source_entry_id: str
    trace_id: str
    correlation_id: str
    decision_id: str
    opponent: str
    """local_reference, q_table, static_policy or ai_engine_sizing."""
    opponent_digest: str | None
    """Digest of the Q-tables that decided, where known."""
    decision_kind: str
    strategy: str | None
    model: str | None
    weight: float | None
    size_multiplier: float | None
    multiplier_assumed: bool
    leverage: float | None
    base_direction: int | None
    signal_confidence: float | None
    effective_confidence: float | None
    direction: int | None
    target: float | None
    """Target exposure; null when this decision carries no direction."""
    moves_arm: bool
    """True when the v2 arm follows this decision."""
    policy_digest: str
    schema_version: int = SCHEMA_VERSION


class PairRow(msgspec.Struct, frozen=True, gc=False, tag_field="kind", tag="pair"):
    """One v2 decision and the v3 decision it was paired with."""

    record_id: str
    run_id: str
    symbol: str
    event_ts_us: int
    """v2's event time."""
    v2_decision_id: str
    v3_decision_id: str
    rule: int
    """1 same entry, 2 trace id, 3 correlation id, 4 within 1 ms, 5 nearest within the window."""
    delta_us: int
    """v3 event time minus v2 event time."""
    opponent: str
    opponent_digest: str | None
    v3_kind: str
    v3_event_type: str
    v3_action: int
    v3_action_name: str
    v3_confidence: float
    v3_exposure: float
    """Exposure in force of v3's account when v3 decided."""
    v3_target: float
    v2_direction: int | None
    v2_exposure: float | None
    """v2's target exposure after its decision."""
    agree: bool | None
    """Same sign of the exposures in force; null when v2 gave no direction."""
    warm: bool
    policy_digest: str
    schema_version: int = SCHEMA_VERSION
    trace_id: str = ""
    """Of the source of v2's decision, verbatim."""
    correlation_id: str = ""
    v3_trace_id: str = ""
    """Of the entry that v3 decided on, verbatim."""
    v3_correlation_id: str = ""
    """As for v3_trace_id."""


class UnpairedRow(msgspec.Struct, frozen=True, gc=False, tag_field="kind", tag="unpaired"):
    """A v2 decision, or a v3 signal decision, that found no counterpart."""

    record_id: str
    run_id: str
    symbol: str
    event_ts_us: int
    side: str
    """v2 or v3: whose decision stayed alone."""
    decision_id: str
    reason: str
    """missing_v3, missing_v2, candidate_taken, duplicate, opponent_off, evicted."""
    opponent: str | None
    policy_digest: str
    schema_version: int = SCHEMA_VERSION
    trace_id: str = ""
    """Of the source of the decision that stayed alone, verbatim."""
    correlation_id: str = ""


class ArmBar(msgspec.Struct, frozen=True, gc=False):
    """What one arm did in one bar."""

    exposure: float
    """At the bar's close."""
    gross: float
    """Profit before costs."""
    turnover: float
    """Traded notional."""
    fee: float
    slippage: float
    gross_late: float
    """`gross` had every fill of the bar come one tick later."""
    equity: float
    """In account currency, at the bar's close."""
    ruined: bool


class BarRow(msgspec.Struct, frozen=True, gc=False, tag_field="kind", tag="bar"):
    """A closed bar: prices, every arm, and the step that was decided when it closed."""

    record_id: str
    run_id: str
    symbol: str
    event_ts_us: int
    """Bar end."""
    open: float
    high: float
    low: float
    close: float
    volume: float | None
    empty_after: int
    restarted: bool
    gap: bool
    """Entries were lost before this bar closed."""
    warm: bool
    regime: str | None
    """Known before this bar began."""
    bus_regime: str | None
    arms: dict[str, ArmBar]
    opponent: str
    opponent_digest: str | None
    step_decision_id: str | None
    """Null when the closing tick was stale and the step is still owed."""
    obs: tuple[float, ...]
    """64 values, exact float32, as the policy saw them."""
    missing_mask: int
    policy_digest: str
    schema_version: int = SCHEMA_VERSION
    guarded: ArmBar | None = None
    """v3 as it would have traded under the risk limits; null without limits."""
    trace_id: str = ""
    """Of the tick that closed the bar, verbatim."""
    correlation_id: str = ""


class OutcomeRow(msgspec.Struct, frozen=True, gc=False, tag_field="kind", tag="outcome"):
    """A real close in production, with the exposures both policies had in force."""

    record_id: str
    run_id: str
    symbol: str
    event_ts_us: int
    closed_side: int
    entry_price: float | None
    exit_price: float | None
    pnl_pct: float | None
    pnl_usd: float | None
    reason: str | None
    v3_exposure: float
    v2_exposure: float
    policy_digest: str
    schema_version: int = SCHEMA_VERSION
    trace_id: str = ""
    """Of the close, verbatim."""
    correlation_id: str = ""


class LedgerRow(msgspec.Struct, frozen=True, gc=False, tag_field="kind", tag="ledger"):
    """Counters per input stream since the first start; every minute of stream time and at stop."""

    record_id: str
    run_id: str
    symbol: str
    """Empty: the ledger is about streams."""
    event_ts_us: int
    reason: str
    """minute, stop, conflated, counting, lost, order, crash, replay, kill, swap (another run
    begins) or corrupt_state."""
    counts: dict[str, dict[str, int]]
    """stream name -> outcome -> entries; beside the outcomes, `lost` where that is counted: 0
    then says that nothing was lost."""
    entry_ids: tuple[str, ...]
    """As `stream|id`. conflated: what was left out. counting: `event type|on`, whose losses are
    counted from here on. lost: last entry before the hole, and where
    reading went on. order: all entries of a commit, as they were folded. crash: what ended the
    process and was left out. replay: the dead letter's entry that was decided. kill: its
    number, and `on` or `off`: what the kill switch says from here on."""
    policy_digest: str
    schema_version: int = SCHEMA_VERSION


class RunRow(msgspec.Struct, frozen=True, gc=False, tag_field="kind", tag="run"):
    """The start of a run: everything that is frozen for it."""

    record_id: str
    run_id: str
    symbol: str
    event_ts_us: int
    policy_digest: str
    feature_digest: str
    action_table: tuple[str, ...]
    training: dict[str, str]
    """steps, seed, reward, data, data_end … of the artifact, as text."""
    rl_v2: str
    """reference, bus or off."""
    tables_digest: str | None
    settings: dict[str, float]
    """initial_balance, fee_rate, entry_fraction, latency_ms, tau …"""
    schema_version: int = SCHEMA_VERSION


Comparison = V2Row | PairRow | UnpairedRow | BarRow | OutcomeRow | LedgerRow | RunRow

decode_decision = msgspec.json.Decoder(Decision).decode
decode_comparison = msgspec.json.Decoder(Comparison).decode
encode = msgspec.json.Encoder().encode
encode_msgpack = msgspec.msgpack.Encoder().encode
_sha256 = hashlib.sha256


class Output(NamedTuple):
    """One entry to append: which of our streams, its payload and the envelope's ids."""

    event_type: str
    """rl_v3.decision, rl_v3.comparison, or `dlq:<input event type>`."""
    payload: bytes
    trace_id: str = ""
    correlation_id: str = ""


class Commit(NamedTuple):
    """Everything that one script must write together, after folding some entries."""

    outputs: list[Output]
    cells: dict[str, dict[str, bytes]]
    """symbol -> cell name -> bytes: the state that changed. The symbol "" is the pipeline's own."""
    cursors: dict[str, str]
    """Full stream key -> id of the last entry folded; only streams that advanced."""
    counts: dict[tuple[str, str], int]
    """(event type, outcome) -> entries, absolute since the first start; only those that changed."""
    taken: int
    """How many of the given entries were folded; the rest is for the next commit."""


def decision_id(stream: str, entry_id: str, policy_digest: str) -> str:
    """Return the id of the decision on an entry: the same input gives the same id for ever."""
    text = f"{stream}\x00{entry_id}\x00{policy_digest}\x00{SCHEMA_VERSION}"
    return _sha256(text.encode(), usedforsecurity=False).hexdigest()[:32]


def record_id(kind: str, *parts: object) -> str:
    """Return the id of a comparison record from what makes it unique."""
    text = "\x00".join([kind, *map(str, parts)])
    return _sha256(text.encode(), usedforsecurity=False).hexdigest()[:32]


@lru_cache(maxsize=4096)
def _iso_second(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}"


def iso(ts_us: int) -> str:
    """Format epoch microseconds as ISO 8601 UTC with offset, always with microseconds."""
    seconds = ts_us // 1_000_000
    digits = str(ts_us - seconds * 1_000_000 + 1_000_000)  # quicker than a format with zeros
    return f"{_iso_second(seconds)}.{digits[1:]}+00:00"
