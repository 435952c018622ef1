"""What must hold before a verdict, and which action follows when it does not? A table.

The table is a TOML file (`gates.toml` unless another is registered) and says nothing about
statistics: it names measures, which the report and the collector fill in, and bounds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from rlv3.errors import ConfigError

Otherwise = Literal["invalid", "reject", "keep"]
State = Literal["pass", "open", "fail"]

MEASURES = {
    "failed_checks": "data checks that failed",
    "matched_share": "share of decisions due for a pair that have one",
    "asymmetry_p": "p-value: are unmatched decisions spread alike over symbols and regimes",
    "lost_share": "share of produced entries that were trimmed before they were read",
    "late_share": "share of entries that came after a later one of their symbol",
    "duplicate_share": "share of entries that repeat an earlier one",
    "unreadable_share": "share of entries that became dead letters",
    "gap_share": "share of bars before which entries were lost",
    "cold_share": "share of bars in which the symbol lacked history",
    "poor_share": "share of bars with more than half of the market features missing",
    "discarded_share": "share of the closed batches that had too few bars",
    "replay_differences": "records that an audit of the recording did not reproduce",
    "simulator_bias": "size of the simulator's error at real closes, bps of turnover",
    "es95_ratio": "mean loss in the worst 5 % of batches, v3 over v2",
    "turnover_ratio": "traded notional, v3 over v2",
    "ruined": "accounts of v3 that were ruined",
    "days": "days of complete batches",
    "batches": "complete batches",
    "regimes": "market regimes with at least 5 % of the bars",
    "beats_signal": "lower end of v3 - follow-signal, bps a day",
    "beats_flat": "lower end of v3 - flat, bps a day",
    "production_share": "share of bars in which production's own v2 was the opponent",
    "lag_one": "lag-1 autocorrelation of the batches times sqrt(K), without its sign",
    "double_cost": "mean v3 - v2 with all costs doubled, bps a day",
    "one_tick_later": "mean v3 - v2 with every fill one tick later, bps a day",
    "leave_one_out": "smallest mean v3 - v2 with one symbol left out, bps a day",
    "charged_bias": "mean v3 - v2 after charging the simulator's bias to v3's turnover, bps a day",
    "sane_reward": "1 when the reward that v3 was trained with pays for profit alone",
    "feature_drift": "largest population stability index of a feature against training",
}
"""Everything a gate may look at."""


class Gate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of the table."""

    name: str
    measure: str
    otherwise: Otherwise
    section: str
    at_least: float | None = None
    at_most: float | None = None
    optional: bool = False
    margin: bool = False

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise ValueError(f"expected a known measure, found {self.measure!r} in {self.name!r}")
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError(f"expected either at_least or at_most in {self.name!r}")


class Measured(msgspec.Struct, frozen=True):
    """What was found for one measure."""

    value: float | None
    """None: it could not be measured."""
    low: float | None = None
    """Interval of the value, where it is an estimate."""
    high: float | None = None
    text: str = ""
    """As people read it; the numbers where empty."""


class Result(msgspec.Struct, frozen=True):
    """A gate and what became of it."""

    name: str
    measure: str
    state: State
    found: str
    bound: str
    otherwise: Otherwise
    section: str
    blocks: bool
    """Stands in the way of a promotion."""


class _File(msgspec.Struct, forbid_unknown_fields=True):
    gate: tuple[Gate, ...]


def default_file() -> Path:
    """Return the path of the table inside the package."""
    return Path(__file__).parent / "gates.toml"


def read_gates(path: str | Path | None = None) -> tuple[Gate, ...]:
    """Read a table of gates.

    Args:
        path: a TOML file; None for the one inside the package.
    Raises:
        ConfigError: the file is missing or is no such table.
    """
    path = default_file() if path is None else Path(path)
    try:
        gates = msgspec.toml.decode(path.read_bytes(), type=_File).gate
    except OSError as error:
        raise ConfigError(f"expected a table of gates in {path}: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"expected a table of gates in {path}, found: {error}") from error
    names = [gate.name for gate in gates]
    if len(set(names)) < len(names):
        raise ConfigError(f"expected every gate of {path} once, found {', '.join(names)}")
    return gates


def digest(gates: Sequence[Gate]) -> str:
    """Return the sha256 of a table's content."""
    return hashlib.sha256(msgspec.json.encode(gates)).hexdigest()


def check(
    gates: Sequence[Gate], measured: Mapping[str, Measured], *, margin: float = 0.0
) -> tuple[Result, ...]:
    """Hold every gate against what was measured.

    Args:
        margin: by how much bounds with `margin` are lowered, bps a day.
    """
    return tuple(_check(gate, measured.get(gate.measure, Measured(None)), margin) for gate in gates)


def _check(gate: Gate, found: Measured, margin: float) -> Result:
    shift = margin if gate.margin else 0.0
    state = _state(gate, found, shift)
    return Result(
        name=gate.name,
        measure=gate.measure,
        state=state,
        found=found.text or _written(found),
        bound=_bound(gate, shift),
        otherwise=gate.otherwise,
        section=gate.section,
        blocks=state != "pass" and not (gate.optional and found.value is None),
    )


def _state(gate: Gate, found: Measured, shift: float) -> State:
    if found.value is None:
        return "open"
    if gate.at_most is not None:
        bound, value, best = gate.at_most, found.value, found.low
    else:
        assert gate.at_least is not None
        bound, value, best = shift - gate.at_least, -found.value, found.high
        best = None if best is None else -best
    if value <= bound:
        return "pass"
    return "fail" if best is None or best > bound else "open"


def _bound(gate: Gate, shift: float) -> str:
    if gate.at_most is not None:
        return f"≤ {gate.at_most:g}"
    assert gate.at_least is not None
    return f"≥ {gate.at_least - shift:g}"


def _written(found: Measured) -> str:
    if found.value is None:
        return "not measured"
    text = f"{found.value:.4g}"
    if found.low is not None and found.high is not None:
        text += f" [{found.low:.4g}, {found.high:.4g}]"
    return text
