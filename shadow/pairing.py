"""Which v3 decision belongs to a v2 decision: five rules in order, one to one, by event time.

A v2 decision that judged a signal has its counterpart among v3's decisions on signals: a tick or a
step that happens to be nearer in time is not it, unless v3 sees no signals at all. A v2 decision
that comes again, under another entry id, is a duplicate and not a second decision.

Rules 1 to 4 (same entry, trace id, correlation id, within 1 ms) are exact and match at once,
whichever side came first. Rule 5 (nearest within a window) waits until the window has passed in
event time, when every candidate is known; so the result does not depend on arrival.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

RING = 64
_MAIN_CELLS = tuple(f"m{slot}" for slot in range(RING))
_ADVISORY_CELLS = tuple(f"a{slot}" for slot in range(RING))
REFERENCE, BUS = 1, 2
"""Bits of `Candidate.taken`: one to one holds per opponent."""


class Candidate(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """A v3 decision that a v2 decision may be paired with; stored as an array of its fields."""

    decision_id: str
    stream: str
    entry_id: str
    trace_id: str | None
    """The source's, verbatim: what joins nothing is sorted out on v2's side."""
    correlation_id: str | None
    ts_us: int
    event_type: str
    kind: str
    action: int
    confidence: float
    exposure: float
    target: float
    warm: bool
    signal: bool
    """Decided on a signal: reported when it stays unpaired."""
    taken: int = 0
    taken_by: tuple[str, ...] = ()
    """Decisions of RL v2 that it was paired with, one per opponent."""


class OpenV2(NamedTuple):
    """A v2 decision with what is needed to find its counterpart."""

    decision_id: str
    ts_us: int
    stream: str | None
    entry_id: str | None
    trace_id: str | None
    """None where it cannot join two events."""
    correlation_id: str | None
    direction: int | None
    exposure: float | None
    opponent: str
    digest: str | None
    window_us: int
    bit: int
    judged: bool = False
    """It judged a signal."""
    source_trace_id: str = ""
    """Of its own entry, verbatim."""
    source_correlation_id: str = ""


class Match(NamedTuple):
    """A pair and the rule that made it."""

    v2: OpenV2
    v3: Candidate
    rule: int


class Unmatched(NamedTuple):
    """A decision whose window passed without a counterpart."""

    side: str
    decision_id: str
    ts_us: int
    reason: str
    opponent: str | None
    trace_id: str = ""
    correlation_id: str = ""

    @classmethod
    def v2(cls, alone: OpenV2, reason: str) -> Unmatched:
        """Return a v2 decision that stayed alone."""
        return cls(
            "v2", alone.decision_id, alone.ts_us, reason, alone.opponent,
            alone.source_trace_id, alone.source_correlation_id,
        )  # fmt: skip

    @classmethod
    def v3(cls, alone: Candidate, reason: str) -> Unmatched:
        """Return a v3 decision that stayed alone."""
        return cls(
            "v3", alone.decision_id, alone.ts_us, reason, None,
            alone.trace_id or "", alone.correlation_id or "",
        )  # fmt: skip


def _taken(candidate: Candidate, v2: OpenV2) -> Candidate:
    return msgspec.structs.replace(
        candidate, taken=candidate.taken | v2.bit, taken_by=(*candidate.taken_by, v2.decision_id)
    )


def exact_rule(v2: OpenV2, v3: Candidate) -> int:
    """Return the first of rules 1 to 4 under which the two belong together, 0 if none."""
    if v2.entry_id is not None and v2.entry_id == v3.entry_id and v2.stream == v3.stream:
        return 1
    if v2.trace_id is not None and v2.trace_id == v3.trace_id:
        return 2
    if v2.correlation_id is not None and v2.correlation_id == v3.correlation_id:
        return 3
    if abs(v2.ts_us - v3.ts_us) <= 1_000:
        return 4
    return 0


class Pairing:
    """The candidates and open v2 decisions of one symbol.

    `main` holds the newest 64 signal and step decisions (all rules), `advisory` the newest 64
    others (rules 1 to 4). Slots are ring positions, so that only changed ones need be stored.
    """

    __slots__ = ("advisory", "deadline", "dirty", "main", "n_advisory", "n_main", "open_v2")

    def __init__(self) -> None:
        self.main: list[Candidate | None] = [None] * RING
        self.advisory: list[Candidate | None] = [None] * RING
        self.n_main = 0
        self.n_advisory = 0
        self.open_v2: list[OpenV2] = []
        self.deadline = 1 << 62
        """Event time after which `expire` has something to do."""
        self.dirty: dict[str, Candidate] = {}
        """Cell name -> what changed since it was last kept."""

    def add(
        self, candidate: Candidate, signal_window_us: int
    ) -> tuple[list[Match], list[Unmatched]]:
        """Keep a new v3 decision; return the open v2 decisions it settles, and what it evicts."""
        gone: list[Unmatched] = []
        matches: list[Match] = []
        for v2 in tuple(self.open_v2):
            rule = exact_rule(v2, candidate)
            if rule == 4 and not self._may(v2, candidate):
                continue
            if rule and not candidate.taken & v2.bit:
                candidate = _taken(candidate, v2)
                matches.append(Match(v2, candidate, rule))
                self.open_v2.remove(v2)
        if candidate.signal or candidate.kind == "step":
            slot = self.n_main % RING
            old = self.main[slot]
            if old is not None and old.signal and not old.taken:
                gone.append(Unmatched.v3(old, "evicted"))
            self.main[slot] = candidate
            self.dirty[_MAIN_CELLS[slot]] = candidate
            self.n_main += 1
            if candidate.signal and not candidate.taken:
                self.deadline = min(self.deadline, candidate.ts_us + signal_window_us)
        else:
            slot = self.n_advisory % RING
            self.advisory[slot] = candidate
            self.dirty[_ADVISORY_CELLS[slot]] = candidate
            self.n_advisory += 1
        return matches, gone

    def offer(self, v2: OpenV2) -> Match | Unmatched | None:
        """Settle a v2 decision by rules 1 to 4, or keep it open until its window has passed."""
        if self._is_known(v2):
            return Unmatched.v2(v2, "duplicate")
        newest = (self.n_main - 1) % RING  # the reference judges the signal just decided
        candidate = self.main[newest]
        if (
            candidate is not None
            and not candidate.taken & v2.bit
            and exact_rule(v2, candidate) == 1  # which no other one of this symbol is
        ):
            return Match(v2, self._take("m", newest, v2), 1)
        best: tuple[int, int, int, str, int] | None = None
        for name, ring in (("m", self.main), ("a", self.advisory)):
            for slot, candidate in enumerate(ring):
                if candidate is None or candidate.taken & v2.bit:
                    continue
                rule = exact_rule(v2, candidate)
                if rule and (rule < 4 or self._may(v2, candidate)):
                    delta = abs(candidate.ts_us - v2.ts_us)
                    key = (rule, delta, -candidate.ts_us, name, slot)
                    if best is None or key < best:
                        best = key
        if best is not None:
            return Match(v2, self._take(best[3], best[4], v2), best[0])
        self.open_v2.append(v2)
        self.deadline = min(self.deadline, v2.ts_us + v2.window_us)
        return None

    def _is_known(self, v2: OpenV2) -> bool:
        """Return True when a decision with this id is open or paired already."""
        return any(other.decision_id == v2.decision_id for other in self.open_v2) or any(
            candidate is not None and v2.decision_id in candidate.taken_by
            for ring in (self.main, self.advisory)
            for candidate in ring
        )

    def _may(self, v2: OpenV2, candidate: Candidate) -> bool:
        """Return False for a candidate on a tick where v2 judged a signal and v3 sees signals."""
        return (
            not v2.judged
            or candidate.signal
            or not any(other is not None and other.signal for other in self.main)
        )

    def _take(self, name: str, slot: int, v2: OpenV2) -> Candidate:
        ring = self.main if name == "m" else self.advisory
        candidate = ring[slot]
        assert candidate is not None
        candidate = ring[slot] = self.dirty[f"{name}{slot}"] = _taken(candidate, v2)
        return candidate

    def expire(
        self, now_us: int, signal_window_us: int, opponent_off: bool
    ) -> list[Match | Unmatched]:
        """Settle every decision whose window ended before `now_us`, in event-time order."""
        done: list[Match | Unmatched] = []
        waiting: list[OpenV2] = []
        for v2 in sorted(self.open_v2, key=lambda v: (v.ts_us, v.decision_id)):
            if v2.ts_us + v2.window_us >= now_us:
                waiting.append(v2)
                continue
            done.append(self._nearest(v2))
        self.open_v2 = waiting
        deadline = min((v.ts_us + v.window_us for v in waiting), default=1 << 62)
        for slot, candidate in enumerate(self.main):
            if candidate is None or not candidate.signal or candidate.taken:
                continue
            end = candidate.ts_us + signal_window_us
            for v2 in waiting:  # its window ends later, and it may still take this one
                if abs(v2.ts_us - candidate.ts_us) <= v2.window_us:
                    end = max(end, v2.ts_us + v2.window_us)
            if end >= now_us:
                deadline = min(deadline, end)
                continue
            reason = "opponent_off" if opponent_off else "missing_v2"
            done.append(Unmatched.v3(candidate, reason))
            # reported once, and no longer a candidate: it must not be paired as well
            settled = msgspec.structs.replace(candidate, taken=REFERENCE | BUS)
            self.main[slot] = self.dirty[f"m{slot}"] = settled
        self.deadline = deadline
        return done

    def _nearest(self, v2: OpenV2) -> Match | Unmatched:
        best: tuple[int, int, int] | None = None
        taken = False
        for slot, candidate in enumerate(self.main):
            if candidate is None or not self._may(v2, candidate):
                continue
            delta = abs(candidate.ts_us - v2.ts_us)
            if delta > v2.window_us:
                continue
            if candidate.taken & v2.bit:
                taken = True
                continue
            key = (delta, candidate.ts_us, slot)
            if best is None or key < best:
                best = key
        if best is None:
            reason = "candidate_taken" if taken else "missing_v3"
            return Unmatched.v2(v2, reason)
        return Match(v2, self._take("m", best[2], v2), 5)

    def dump(self) -> tuple[Any, ...]:
        """Return what is not in a ring slot."""
        return self.n_main, self.n_advisory, self.open_v2, self.deadline

    def load(self, values: Any, slots: dict[str, Any]) -> None:
        """Restore a dump and the ring slots by name (`m0` … `m63`, `a0` … `a63`)."""
        self.n_main, self.n_advisory, open_v2, self.deadline = values
        self.open_v2 = [OpenV2(*v) for v in open_v2]
        for name, value in slots.items():
            ring = self.main if name[0] == "m" else self.advisory
            # an earlier version had no taken_by
            facts = [*value, ()][: len(Candidate.__struct_fields__)]
            facts[-1] = tuple(facts[-1])
            ring[int(name[1:])] = Candidate(*facts)
