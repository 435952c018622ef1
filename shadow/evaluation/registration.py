"""What was promised before anybody looked at the data? One file per test, written once.

A registration names both policies, what the accounts cost, which symbols count, when counting
begins and how long it may last. It lives in `registrations/` of the store, under a name made of its
number and content, and is never written again; a changed file is refused.

A bar belongs to a registration when its run was frozen with exactly the registered policy, opponent
and settings (the `runs` table says so for every run id) and the bar began at or after the start.
Rows so carry the registration by their run id; a swap of policy starts a run that belongs to none.

Every registration of a store spends a share of alpha, so that testing version after version stays
honest: see `multiplicity.version_level`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import msgspec

from rlv3.errors import DataError, UserError
from shadow.evaluation.batches import Frame
from shadow.evaluation.gates import Gate
from shadow.records import RunRow
from shadow.segments import make_directory, sync
from shadow.statistics.sequential import Plan

Mode = Literal["superiority", "non_inferiority"]

FORMAT = 1
ALPHA = 0.05
DAY_US = 86_400_000_000
_FOLDER = "registrations"


class Frozen(msgspec.Struct, frozen=True):
    """What decides whether a run belongs to a registration."""

    policy_digest: str
    feature_digest: str
    rl_v2: str
    """reference, bus, off, or v3 in a self-play."""
    tables_digest: str | None
    """RL v2's tables, where the worker plays its part; null when it decides on the bus."""
    settings: dict[str, float]
    """Costs, capital, latency and length of a step."""

    @classmethod
    def of(cls, run: RunRow) -> Frozen:
        """Return what a run's own row froze."""
        return cls(
            policy_digest=run.policy_digest,
            feature_digest=run.feature_digest,
            rl_v2=run.rl_v2,
            tables_digest=run.tables_digest,
            settings=dict(sorted(run.settings.items())),
        )


class Pilot(msgspec.Struct, frozen=True):
    """What the discarded day before the start said about the length of batches."""

    bars: int
    holding_p90_bars: float
    """90 % of the positions of both policies were held no longer."""
    tau: float
    """One independent difference is worth so many of these."""
    batch_bars: int
    """What it asks for; see `sequential.batch_length`."""


class Registration(msgspec.Struct, frozen=True):
    """A test as it was frozen."""

    format: int
    number: int
    """Counts the versions tested, earlier ones included: j in alpha_j."""
    frozen: Frozen
    symbols: tuple[str, ...]
    start_us: int
    batch_bars: int
    """B: bars in a batch."""
    horizon: int
    """N*: batches at which the confidence sequence is tuned to be tightest."""
    max_days: int
    """T_max: nothing after it counts."""
    mode: Mode
    margin: float
    """delta, bps a day: non-inferiority margin, and what counts as equal at T_max."""
    strict_bound: float
    """Batches are clipped to this, bps a day, for the sequence that assumes nothing."""
    alpha: float
    """This test's share."""
    gates: tuple[Gate, ...]
    pilot: Pilot | None
    registered_at: str
    """Wall clock, ISO 8601."""

    @property
    def id(self) -> str:
        """Return the first 16 characters of the content's sha256."""
        return _digest(self)[:16]

    @property
    def step_us(self) -> int:
        """Length of a bar."""
        return step_us(self.frozen.settings)

    @property
    def frame(self) -> Frame:
        """Return what is counted."""
        return Frame.of(
            self.symbols,
            capital=len(self.symbols) * self.frozen.settings["initial_balance"],
            step_us=self.step_us,
            batch_bars=self.batch_bars,
            start_us=self.start_us,
            end_us=self.start_us + self.max_days * DAY_US,
        )

    @property
    def plan(self) -> Plan:
        """Return what the confidence sequence is built with."""
        return Plan(alpha=self.alpha, horizon=self.horizon)

    @property
    def shift(self) -> float:
        """By how much a bound is lowered, bps a day: the margin in a non-inferiority test."""
        return self.margin if self.mode == "non_inferiority" else 0.0


def step_us(settings: dict[str, float]) -> int:
    """Return the length of a bar of a run."""
    return int(settings.get("step_seconds", 60.0) * 1e6)


def align(start_us: int, bars: int, bar_us: int) -> int:
    """Return the first boundary of a batch at or after a time."""
    length = bars * bar_us
    return -(-start_us // length) * length


def read_registrations(store: str | Path) -> tuple[Registration, ...]:
    """Read all registrations of a store, oldest first.

    Raises:
        DataError: a file was changed after it was written, or cannot be read.
    """
    return tuple(_read(path) for path in sorted((Path(store) / _FOLDER).glob("*.json")))


def find(registrations: Sequence[Registration], wanted: str | None) -> Registration | None:
    """Return the registration with this id or the beginning of one; the newest for None.

    Raises:
        DataError: there is no such registration.
    """
    if wanted is None:
        return registrations[-1] if registrations else None
    found = [item for item in registrations if item.id.startswith(wanted)]
    if len(found) != 1:
        known = ", ".join(item.id for item in registrations) or "none"
        raise DataError(f"expected one of the registrations {known}, found {wanted}")
    return found[0]


def write(
    store: str | Path, registration: Registration, *, newest_us: int, again: bool = False
) -> Path:
    """Freeze a registration in a store.

    Args:
        newest_us: end of the newest bar in the store, 0 when there is none.
        again: test the same pair of policies once more, on new data and the next share of alpha.
    Raises:
        UserError: the pair has a registration already, or the start lies in data that can be seen.
        DataError: the directory cannot be written.
    """
    for earlier in read_registrations(store):
        if earlier.frozen == registration.frozen and not again:
            raise UserError(
                f"expected policies that are not registered yet, found {earlier.id}, which froze "
                f"batches of {earlier.batch_bars} bars, {earlier.horizon} batches and the start "
                f"{_moment(earlier.start_us)}; nothing of it can change, --again registers a new "
                "test on new data"
            )
    if registration.start_us < newest_us:
        raise UserError(
            f"expected a start after the data that can be seen already, which end at "
            f"{_moment(newest_us)}, found {_moment(registration.start_us)}"
        )
    folder = Path(store) / _FOLDER
    make_directory(folder)
    path = folder / f"{registration.number:04d}-{registration.id}.json"
    body = msgspec.json.encode(registration)
    content = b'{"registration":%b,"sha256":"%b"}\n' % (body, _digest(registration).encode())
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from error
    sync(folder)
    return path


class _File(msgspec.Struct):
    registration: Registration
    sha256: str


def _read(path: Path) -> Registration:
    try:
        file = msgspec.json.decode(path.read_bytes(), type=_File)
    except (OSError, msgspec.DecodeError) as error:
        raise DataError(f"expected a registration in {path}, found: {error}") from error
    found = file.registration
    if found.format != FORMAT:
        raise DataError(
            f"expected a registration of format {FORMAT} in {path}, found {found.format}"
        )
    if _digest(found) != file.sha256 or path.stem != f"{found.number:04d}-{found.id}":
        raise DataError(f"expected {path} as it was registered, found that it was changed")
    return found


def _digest(registration: Registration) -> str:
    return hashlib.sha256(msgspec.json.encode(registration)).hexdigest()


def _moment(ts_us: int) -> str:
    return f"{datetime.fromtimestamp(ts_us // 1_000_000, UTC):%Y-%m-%dT%H:%M:%SZ}"
