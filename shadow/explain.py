"""Why did RL v3 decide so? One decision rebuilt bit for bit, and what would have changed it.

A step's observation is in its bar's row, so a store explains it alone, with the artifact that
decided. An advisory decision looks at an open bar that no store keeps: a recording is folded again
up to its entry. Either way the network answers anew, and its answer is compared with the recorded
one in every bit. What is reported as the smallest change is the smallest one found when a single
feature moves and all others stay; account features and the mask stay as they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import msgspec
import numpy as np
from numpy.typing import NDArray

from rlv3.errors import DataError, UserError
from rlv3.events import ACTION_TABLE, REGIMES
from rlv3.features import CLIP, FEATURES, MARKET, OBS_DIM
from rlv3.policy import Policy, shipped_policy
from rlv3.portfolio import ANY, FLAT, HOLD_ONLY, IN_LONG, IN_POSITION, IN_SHORT, NO_ENTRY
from shadow.pipeline import Pipeline
from shadow.recording import Reading, Replay, load_snapshot, restored
from shadow.records import Decision, decision_id
from shadow.store import StoreReader

MASKS = (HOLD_ONLY, FLAT, IN_POSITION, IN_LONG, IN_SHORT, NO_ENTRY, ANY)
"""Every set of valid actions there is."""
GRID = 401  # values tried per feature, over the whole range that the policy can see
_HALVINGS = 60
_SIDE, _REGIME = 7, 10  # indices of position_side and of the first regime flag

Obs = NDArray[np.float32]


class MismatchError(UserError):
    """The network does not answer again what was recorded; the program stops."""

    exit_code = 4


class Input(msgspec.Struct, frozen=True):
    """One feature of the observation."""

    name: str
    unit: str
    value: float | None
    """In its own unit; null where it was missing."""
    seen: float
    """As the policy saw it: scaled and clipped."""
    clipped: bool
    """Beyond what the policy can tell apart: the value is at least this far out."""


class Flip(msgspec.Struct, frozen=True):
    """A change of one feature that leads to another action."""

    feature: str
    unit: str
    before: float | str
    after: float | str
    deviations: float
    """Size of the change, in standard deviations of training; a switch of regime has size 1."""
    action: str
    """What it would lead to."""


class Explanation(msgspec.Struct, frozen=True):
    """A decision, what it was made from, and what would have changed it."""

    decision_id: str
    symbol: str
    timestamp: str
    kind: str
    policy: str
    source: str
    """store or recording: where the observation came from."""
    action: str
    confidence: float
    value: float
    probabilities: dict[str, float]
    """Of the valid actions."""
    invalid: tuple[str, ...]
    """Actions that were masked."""
    mask: str
    """Why they were."""
    runner_up: str | None
    """Null where only one action was valid."""
    margin: float | None
    """How much less probable it was."""
    inputs: tuple[Input, ...]
    missing: tuple[str, ...]
    flip: Flip | None
    """The smallest change found; null where no single feature changes the action."""
    flips: tuple[Flip, ...]
    """The smallest change of every feature that has one, smallest first."""


class _Seen(NamedTuple):
    """What the policy was given."""

    obs: Obs
    mask: tuple[bool, ...]
    missing: int
    source: str


def explain(
    wanted: str,
    store: str | Path,
    recording: Path | None = None,
    *,
    policy: Path | None = None,
    tables: Path | None = None,
) -> Explanation:
    """Rebuild a decision.

    Args:
        wanted: its id.
        recording: where the entry that it was made on is recorded; needed for an advisory one.
        policy: the artifact that decided, where store and recording do not have it.
        tables: directory of RL v2's tables, where the recorded worker did not use the shipped ones.
    Raises:
        DataError: no such decision, or what it was made from is not there.
        MismatchError: it comes out differently now.
    """
    reader = StoreReader(store)
    with reader.connect() as db:
        decision = _decision(db, wanted, store)
        seen = _from_store(db, decision) if decision.kind == "step" else None
    artifact = _artifact(decision, Path(store), recording, policy)
    if seen is None:
        if recording is None:
            raise DataError(_why_not(decision))
        seen = _from_recording(recording, decision, tables)
    _check(artifact, decision, seen)
    return _explain(artifact, decision, seen)


def _decision(db: duckdb.DuckDBPyConnection, wanted: str, store: str | Path) -> Decision:
    columns = Decision.__struct_fields__
    names = ", ".join(f'"{name}"' for name in columns)
    rows = db.execute(
        f"SELECT {names} FROM decisions WHERE decision_id = ? LIMIT 1", [wanted]
    ).fetchall()
    if rows:
        return msgspec.convert(dict(zip(columns, rows[0], strict=True)), Decision)
    other = db.execute(
        "SELECT count(*) FROM v2_decisions WHERE decision_id = ?", [wanted]
    ).fetchall()[0][0]
    if other:
        raise DataError(f"expected a decision of RL v3, found that {wanted} is one of RL v2")
    raise DataError(f"expected decision {wanted} in {store}, found no decision with that id")


def _why_not(decision: Decision) -> str:
    if decision.kind == "step":
        return (
            f"expected the bar of step {decision.decision_id} in the store, found none: its bar "
            "closed on a stale tick, so the observation is not kept; --recording has it"
        )
    return (
        f"expected --recording, since decision {decision.decision_id} is advisory: it looked at a "
        "bar that was still open, which no store keeps"
    )


def _from_store(db: duckdb.DuckDBPyConnection, decision: Decision) -> _Seen | None:
    rows = db.execute(
        "SELECT obs, missing_mask FROM bars WHERE step_decision_id = ? LIMIT 1",
        [decision.decision_id],
    ).fetchall()
    if not rows:
        return None
    obs = np.array(rows[0][0], dtype=np.float32)
    if obs.shape != (OBS_DIM,):
        raise DataError(f"expected {OBS_DIM} features in the bar's row, found {len(obs)}")
    return _Seen(obs, _mask_of(decision), int(rows[0][1]), "store")


def _mask_of(decision: Decision) -> tuple[bool, ...]:
    """Return the valid actions: masked ones have a probability of exactly 0."""
    mask = tuple(p > 0.0 for p in decision.action_probs)
    if mask not in MASKS:
        raise DataError(
            f"expected one of the sets of valid actions, found {_names(mask)} in decision "
            f"{decision.decision_id}"
        )
    return mask


class _Witness(Pipeline):
    """A pipeline that keeps what one decision is made from."""

    wanted = ""
    job: Any = None

    def _complete(self, job: Any, action: int, probs: list[float], value: float) -> None:
        if decision_id(job.ref.stream, job.ref.entry_id, self.policy.digest) == self.wanted:
            self.job = job
        super()._complete(job, action, probs, value)


def _from_recording(recording: Path, decision: Decision, tables: Path | None) -> _Seen:
    snapshot = load_snapshot(recording)
    pipeline = restored(recording, snapshot, tables, _Witness)
    assert isinstance(pipeline, _Witness)
    pipeline.wanted = decision.decision_id
    for _ in Replay(Reading(recording, snapshot), pipeline).commits():
        if pipeline.job is not None:
            job = pipeline.job
            obs = pipeline.policy.normaliser.apply([job.raw], [job.missing])[0]
            return _Seen(obs, job.mask, job.missing, "recording")
    raise DataError(
        f"expected entry {decision.source_entry_id} of {decision.source_stream} in {recording}, "
        "found that the recording does not lead to its decision"
    )


def _artifact(
    decision: Decision, store: Path, recording: Path | None, given: Path | None
) -> Policy:
    digest = decision.model_sha256
    places = [
        place / "artifacts" / f"{digest}.safetensors" for place in (store, recording) if place
    ]
    candidates = [given] if given else [*places, shipped_policy()]
    for path in candidates:
        if path.is_file():
            policy = Policy.load(path)
            if policy.digest == digest:
                return policy
            if given:
                raise DataError(
                    f"expected the artifact {digest[:12]}, found {policy.digest[:12]} in {path}"
                )
    raise DataError(
        f"expected the artifact that decided in {places[0]}, found none; --policy names it"
    )


def _check(policy: Policy, decision: Decision, seen: _Seen) -> None:
    """Refuse a decision that does not come out again in every bit."""
    actions, probs, values = policy.decide(seen.obs[None], [seen.mask])
    again = (int(actions[0]), tuple(probs[0].tolist()), float(values[0]))
    recorded = (decision.action, decision.action_probs, decision.value)
    if again != recorded:
        gap = max(abs(a - b) for a, b in zip(again[1], recorded[1], strict=True))
        raise MismatchError(
            f"expected {ACTION_TABLE[decision.action]} with the recorded probabilities again, "
            f"found {ACTION_TABLE[again[0]]} with probabilities up to {gap:.3g} apart: the rows "
            "were changed, or this machine's arithmetic differs from the worker's"
        )


# -- what it was made from -------------------------------------------------------------------------


def _explain(policy: Policy, decision: Decision, seen: _Seen) -> Explanation:
    probs = decision.action_probs
    valid = [i for i, allowed in enumerate(seen.mask) if allowed]
    others = sorted((i for i in valid if i != decision.action), key=lambda i: (-probs[i], i))
    flips = sorted(_flips(policy, seen, decision.action), key=lambda flip: flip.deviations)
    return Explanation(
        decision_id=decision.decision_id,
        symbol=decision.symbol,
        timestamp=decision.timestamp,
        kind=decision.kind,
        policy=decision.model_id,
        source=seen.source,
        action=decision.action_name,
        confidence=decision.confidence,
        value=decision.value,
        probabilities={ACTION_TABLE[i]: probs[i] for i in valid},
        invalid=tuple(name for i, name in enumerate(ACTION_TABLE) if i not in valid),
        mask=_reason(policy, seen, warm=decision.warm),
        runner_up=ACTION_TABLE[others[0]] if others else None,
        margin=probs[decision.action] - probs[others[0]] if others else None,
        inputs=tuple(_inputs(policy, seen)),
        missing=tuple(f.name for i, f in enumerate(FEATURES) if seen.missing >> i & 1),
        flip=flips[0] if flips else None,
        flips=tuple(flips),
    )


def _names(mask: Sequence[bool]) -> str:
    return ", ".join(name for name, valid in zip(ACTION_TABLE, mask, strict=True) if valid)


def _reason(policy: Policy, seen: _Seen, *, warm: bool) -> str:
    flat = seen.obs[_SIDE] == 0.0
    if seen.mask == HOLD_ONLY:
        if flat and not warm:
            return "cold and flat: no entry before the features have their history"
        return "an order was pending, or the account was cooling down or ruined"
    if policy.metadata["mask_rule"] == "none":
        return "the policy was trained without masks"
    return "flat" if flat else "in a position"


def _inputs(policy: Policy, seen: _Seen) -> Iterator[Input]:
    for i, feature in enumerate(FEATURES):
        missing = bool(seen.missing >> i & 1)
        scaled = float(seen.obs[i])
        yield Input(
            name=feature.name,
            unit=feature.unit,
            value=None if missing else _raw(policy, i, scaled),
            seen=scaled,
            clipped=i in MARKET and abs(scaled) >= CLIP and not missing,
        )


def _raw(policy: Policy, i: int, scaled: float) -> float:
    return scaled * float(policy.normaliser.scale[i]) + float(policy.normaliser.mean[i])


# -- what would have changed it --------------------------------------------------------------------


def _flips(policy: Policy, seen: _Seen, action: int) -> Iterator[Flip]:
    if sum(seen.mask) == 1:
        return
    for i in MARKET:
        if not seen.missing >> i & 1:
            flip = _nearest(policy, seen, action, i)
            if flip is not None:
                yield flip
    yield from _other_regimes(policy, seen, action)


def _nearest(policy: Policy, seen: _Seen, action: int, i: int) -> Flip | None:
    """Return the smallest change of a market feature that leads to another action."""
    start = float(seen.obs[i])
    grid = np.linspace(-CLIP, CLIP, GRID)
    differs = _answers(policy, seen, i, grid) != action
    best: tuple[float, float] | None = None
    for side in (grid[grid > start], grid[grid < start][::-1]):
        hits = np.flatnonzero(differs[np.searchsorted(grid, side)])
        if len(hits):
            inner = start if hits[0] == 0 else float(side[hits[0] - 1])
            found = _bisect(policy, seen, action, i, inner, float(side[hits[0]]))
            if best is None or abs(found - start) < best[0]:
                best = abs(found - start), found
    if best is None:
        return None
    distance, found = best
    return Flip(
        feature=FEATURES[i].name,
        unit=FEATURES[i].unit,
        before=_raw(policy, i, start),
        after=_raw(policy, i, found),
        deviations=distance,
        action=ACTION_TABLE[int(_answers(policy, seen, i, np.array([found]))[0])],
    )


def _bisect(policy: Policy, seen: _Seen, action: int, i: int, same: float, other: float) -> float:
    """Return the value nearest to `same` that leads to another action, to the last float32."""
    for _ in range(_HALVINGS):
        middle = (same + other) / 2.0
        if np.float32(middle) in (np.float32(same), np.float32(other)):
            break
        if _answers(policy, seen, i, np.array([middle]))[0] != action:
            other = middle
        else:
            same = middle
    return other


def _other_regimes(policy: Policy, seen: _Seen, action: int) -> Iterator[Flip]:
    """Yield the switches of regime that lead to another action."""
    flags = range(_REGIME, _REGIME + len(REGIMES))
    if any(seen.missing >> i & 1 for i in flags):
        return
    held = [name for name, i in zip(REGIMES, flags, strict=True) if seen.obs[i] == 1.0]
    for name, i in zip(REGIMES, flags, strict=True):
        if name in held:
            continue
        obs = seen.obs.copy()
        obs[_REGIME : _REGIME + len(REGIMES)] = 0.0
        obs[i] = 1.0
        found = int(policy.decide(obs[None], [seen.mask])[0][0])
        if found != action:
            before = ", ".join(held) or "none"
            yield Flip("regime", "label", before, name, 1.0, ACTION_TABLE[found])


def _answers(policy: Policy, seen: _Seen, i: int, values: NDArray[np.float64]) -> NDArray[np.intp]:
    """Return the action for each value of one feature."""
    obs = np.repeat(seen.obs[None], len(values), axis=0)
    obs[:, i] = values
    return policy.decide(obs, [seen.mask] * len(values))[0]


# -- on a terminal ---------------------------------------------------------------------------------


def lines(found: Explanation) -> Iterator[str]:
    """Yield an explanation as plain lines."""
    yield f"{found.symbol} {found.timestamp} {found.kind} {found.decision_id} policy {found.policy}"
    yield (
        f"{found.action} with probability {found.confidence:.4f}, value {found.value:+.4f}; "
        f"rebuilt bit for bit from the {found.source}"
    )
    shown = ", ".join(f"{name} {p:.4f}" for name, p in found.probabilities.items())
    yield f"valid actions ({found.mask}): {shown}"
    if found.runner_up is None:
        yield "runner-up: none, only one action was valid"
    else:
        yield f"runner-up: {found.runner_up}, {found.margin:.4f} less probable"
    yield f"missing features: {', '.join(found.missing) or 'none'}"
    yield ""
    yield f"{'feature':<22} {'value':>14} {'as seen':>9}  unit"
    for item in found.inputs:
        value = "missing" if item.value is None else f"{item.value:,.6g}"
        mark = " (clipped)" if item.clipped else ""
        yield f"{item.name:<22} {value:>14} {item.seen:>+9.3f}  {item.unit}{mark}"
    yield ""
    if found.flip is None:
        yield "no change of a single market feature or of the regime leads to another action"
        return
    yield f"smallest change to another action: {_change(found.flip)}"
    for flip in found.flips[1:4]:
        yield f"  also: {_change(flip)}"


def _change(flip: Flip) -> str:
    before, after = (x if isinstance(x, str) else f"{x:.6g}" for x in (flip.before, flip.after))
    size = "" if flip.feature == "regime" else f", {flip.deviations:.2f} deviations"
    return f"{flip.feature} from {before} to {after} ({flip.unit}{size}) gives {flip.action}"
