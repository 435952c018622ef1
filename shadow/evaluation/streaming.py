"""What would the verdict be by now? Statistics that the collector keeps, batch by batch.

They are those of the report: the same batches, bit for bit, and the same functions on them. What
only a whole store can tell (data checks, matched decisions, the audit) is not measured here, so
this verdict may reject, but it never promotes: the report has to confirm.

Nothing here is needed after a crash; all of it is read again from the store.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import duckdb
import msgspec
import numpy as np

from rlv3.errors import DataError
from shadow.evaluation.bars import ORDER
from shadow.evaluation.batches import COLUMN_NAMES, Batcher, Columns, columns_of
from shadow.evaluation.gates import check
from shadow.evaluation.registration import Frozen, Registration, find, read_registrations
from shadow.evaluation.verdict import EXPLORATORY, Finding, judge, primary_gate
from shadow.evaluation.verdict import find as find_effect
from shadow.records import BarRow, Comparison, Decision, RunRow
from shadow.rl_v2 import QTables
from shadow.segments import within_memory, write_durably
from shadow.statistics.sequential import Evidence, Look
from shadow.store import StoreReader

STATE = "verdict.json"
_FORMAT = 1
_ROWS = 50_000


class GateState(msgspec.Struct, frozen=True):
    """One gate as it stands."""

    name: str
    state: str
    """pass, open or fail."""
    found: str
    bound: str


class State(msgspec.Struct, frozen=True):
    """What is known after the newest closed batch; effects in bps a day."""

    format: int = _FORMAT
    registration: str | None = None
    updated_us: int | None = None
    """Newest bar end seen."""
    verdict: str = EXPLORATORY
    why: str = "No verdict: nothing is registered."
    binding: str = ""
    exit_code: int = 0
    finding: Finding = "undecided"
    batches: int = 0
    batch_bars: int | None = None
    days: float = 0.0
    alpha: float | None = None
    mean: float | None = None
    low: float | None = None
    """Confidence sequence."""
    high: float | None = None
    e_value: float | None = None
    p_value: float | None = None
    """Always valid."""
    mde: float | None = None
    """Smallest effect that would show by now with 80 % power."""
    days_to_decide: float | None = None
    gates: tuple[GateState, ...] = ()


def read_state(store: Path) -> State | None:
    """Read what a collector left in a store; None when there is nothing.

    Raises:
        DataError: the file is none of a collector.
    """
    path = store / STATE
    try:
        return msgspec.json.decode(path.read_bytes(), type=State)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise DataError(f"expected a collector's statistics in {path}, found: {error}") from error


def write_state(store: Path, state: State) -> bytes:
    """Replace the state in a store; return its bytes.

    Raises:
        OSError: the disk refuses.
    """
    content = msgspec.json.encode(state)
    write_durably(store / STATE, content)
    return content


class Statistics:
    """The sufficient statistics of one registration, kept up to date row by row."""

    def __init__(self, registration: Registration) -> None:
        self.registration = registration
        self.batcher = Batcher(registration.frame)
        self.evidence = Evidence()
        self._plan = registration.plan
        self._runs: set[str] = set()
        self._reward: str | None = None
        self._opponents: Counter[tuple[str, str | None]] = Counter()
        self._regimes: Counter[str] = Counter()
        self._ruined: set[str] = set()
        self._reference = QTables.load().digest

    def observe(self, record: Decision | Comparison) -> None:
        """Take one record, in the order of its stream; those that do not count change nothing."""
        if isinstance(record, BarRow):
            if record.run_id in self._runs:
                self._take(
                    record.symbol,
                    record.event_ts_us,
                    columns_of(record),
                    record.regime,
                    (record.opponent, record.opponent_digest),
                    record.arms["v3"].ruined,
                )
        elif isinstance(record, RunRow) and Frozen.of(record) == self.registration.frozen:
            self._runs.add(record.run_id)
            self._reward = record.training.get("reward")

    def load(self, db: duckdb.DuckDBPyConnection) -> None:
        """Take everything that a store holds already.

        Args:
            db: has the views of `StoreReader.connect`.
        """
        runs = db.execute(
            """
            SELECT run_id, policy_digest, feature_digest, rl_v2, tables_digest, settings, training
            FROM runs
            """
        ).fetchall()
        for run_id, policy, features, rl_v2, tables, settings, training in runs:
            frozen = Frozen(policy, features, rl_v2, tables, dict(sorted(settings.items())))
            if frozen == self.registration.frozen:
                self._runs.add(run_id)
                self._reward = training.get("reward")
        rows = db.execute(
            f"""
            SELECT symbol, event_ts_us, regime, opponent, opponent_digest, v3_ruined,
                   {", ".join(COLUMN_NAMES)}
            FROM bars WHERE run_id IN (SELECT unnest($1)) ORDER BY {ORDER}
            """,
            [sorted(self._runs)],
        )
        while found := rows.fetchmany(_ROWS):
            for symbol, ts_us, regime, opponent, digest, ruined, *columns in found:
                self._take(symbol, ts_us, tuple(columns), regime, (opponent, digest), ruined)

    def _take(
        self,
        symbol: str,
        ts_us: int,
        columns: Columns,
        regime: str | None,
        opponent: tuple[str, str | None],
        ruined: bool,
    ) -> None:
        before = len(self.batcher)
        if self.batcher.add(symbol, ts_us, columns):
            self._opponents[opponent] += 1
            self._regimes[regime or "unknown"] += 1
            if ruined:
                self._ruined.add(symbol)
        if len(self.batcher) > before:
            batches = self.batcher.batches()
            for value in batches.series("difference")[before:] * batches.bps_per_day:
                self.evidence = self.evidence.update(value, self._plan)

    @property
    def look(self) -> Look | None:
        """What may be said after the newest batch; None without one."""
        return self.evidence.look(self._plan) if self.evidence.n else None

    def state(self) -> State:
        """Return what is known by now."""
        # scipy is behind these, and a collector without a registration never needs it
        from shadow.evaluation.effect import days_until, detectable
        from shadow.evaluation.measures import Counted, measures

        registration, batches, look = self.registration, self.batcher.batches(), self.look
        counted = Counted(self._opponents, self._regimes, tuple(sorted(self._ruined)))
        found = measures(
            batches, look, self._plan, counted,
            reward=self._reward, reference_digest=self._reference,
        )  # fmt: skip
        finding = find_effect(look, margin=registration.margin, shift=registration.shift)
        primary = primary_gate(look, finding, shift=registration.shift)
        gates = check(registration.gates, found, margin=registration.shift)
        frame = batches.frame
        ended = int(frame.open_at(np.asarray(batches.watermark_us))) >= frame.end
        verdict = judge(finding, primary, gates, ended=ended)
        several = look is not None and look.n > 1
        return State(
            registration=registration.id,
            updated_us=batches.watermark_us or None,
            verdict=verdict.text,
            why=verdict.why,
            binding=verdict.binding,
            exit_code=verdict.exit_code,
            finding=finding,
            batches=len(batches.window),
            batch_bars=registration.batch_bars,
            days=batches.days,
            alpha=registration.alpha,
            mean=None if look is None else look.mean,
            low=look.low if look is not None and several else None,
            high=look.high if look is not None and several else None,
            e_value=None if look is None else float(np.exp(min(look.log_e, 700.0))),
            p_value=None if look is None else look.p,
            mde=detectable(look, self._plan),
            days_to_decide=(
                None if look is None else days_until(look, look.mean, self._plan, batches)
            ),
            gates=tuple(
                GateState(gate.name, gate.state, gate.found, gate.bound)
                for gate in (primary, *gates)
            ),
        )


class Keeper:
    """Keeps the statistics of a store's newest registration, whichever that is by now."""

    def __init__(self, store: Path) -> None:
        self.store = store
        self.statistics: Statistics | None = None
        self._saved: tuple[str | None, int] | None = None

    def observe(self, record: Decision | Comparison) -> None:
        """Take one record that went into the store."""
        if self.statistics is not None:
            self.statistics.observe(record)

    def refresh(self) -> None:
        """Begin again from the store when there is another registration; everything is durable.

        Raises:
            DataError: a registration or the store is damaged.
            OutOfMemory: the store needs more; the next time begins again.
        """
        found = find(read_registrations(self.store), None)
        known = None if self.statistics is None else self.statistics.registration.id
        if found is None or found.id == known:
            return
        statistics = Statistics(found)
        reader = StoreReader(self.store)
        try:
            with within_memory(f"read {self.store}"), reader.connect() as db:
                statistics.load(db)
        except duckdb.Error as error:
            first_line = str(error).partition("\n")[0]
            raise DataError(f"the store {self.store} is damaged: {first_line}") from error
        self.statistics = statistics

    def save(self) -> bytes | None:
        """Write the state when a batch has closed since the last time; return its bytes then.

        Raises:
            OSError: the disk refuses.
        """
        statistics = self.statistics
        mark = (
            (None, 0)
            if statistics is None
            else (statistics.registration.id, len(statistics.batcher))
        )
        if mark == self._saved:
            return None
        state = State() if statistics is None else statistics.state()
        content = write_state(self.store, state)
        self._saved = mark
        return content
