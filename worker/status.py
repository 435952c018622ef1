"""What does the worker show of itself? One value under our own keys, renewed every second.

The worker writes it, the HTTP process reads it; so no request ever reaches the worker. Counters
that are not said to count since the first start begin at 0 with the process, as Prometheus expects.
"""

from __future__ import annotations

import msgspec

FORMAT = 2
PUBLISH_S = 1.0
STALE_S = 5.0
"""A status older than this, by Redis's clock, shows a worker that is gone or stands still."""
KEPT = 20
"""Newest disagreements that are shown."""
STEPS = ("read", "fold", "commit", "total")
"""Steps of the path with a histogram; total is from an entry's id to its commit,
for every eighth entry of a commit, the first included."""
EDGES_S = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
    5.0, 10.0, 30.0, 60.0,
)  # fmt: skip
"""Upper bounds of the histograms' buckets; one more has none."""


class Histogram(msgspec.Struct):
    """How often a step took how long."""

    counts: list[int]
    """Per bucket of `EDGES_S`, and above the last; not cumulated."""
    sum_s: float = 0.0


class PolicyInfo(msgspec.Struct, frozen=True):
    """The artifact in force."""

    digest: str
    steps: int
    """Trained environment steps."""
    feature_version: str


class Disagreement(msgspec.Struct, frozen=True):
    """A pair whose two sides differ."""

    event_ts_us: int
    symbol: str
    opponent: str
    v2_exposure: float
    v3_exposure: float
    """Target in force."""
    v3_action_name: str
    v2_decision_id: str
    v3_decision_id: str


class FeatureDrift(msgspec.Struct, frozen=True):
    """One feature in the newest closed bars, against training."""

    psi: float
    live: tuple[float, ...]
    training: tuple[float, ...]


class Status(msgspec.Struct, frozen=True):
    """Everything that health, metrics and dashboard show of a worker."""

    format: int
    started_s: float
    """Epoch seconds of the process's start."""
    owner: str
    state: str
    """ready, behind, stalled or stopped."""
    step: str
    """What the loop is doing."""
    trouble: str
    """The last error of that step, empty where there was none."""
    progress_age_s: float
    """Since a step was finished."""
    commit_age_s: float | None
    """Since the last commit of this process."""
    lag_s: float
    epoch: int
    commits: int
    run_id: str
    inputs: tuple[str, ...]
    """Event types that are read."""
    rl_v2: str
    """reference, bus or off."""
    policy: PolicyInfo
    events: dict[str, dict[str, int]]
    """Event type -> outcome -> entries since the first start."""
    lost: dict[str, int | None]
    """Event type -> entries trimmed before they were read, since the first start; null: unknown."""
    ahead: int
    dropped: int
    actions: dict[str, list[int]]
    """step, advisory -> decisions per action."""
    decisions: int
    """Since the first start."""
    pairs: int
    """Since the first start."""
    agreement: dict[str, int]
    """agree, disagree, undirected -> pairs."""
    unpaired: dict[str, int]
    """`side:reason` -> decisions."""
    v2_heard: dict[str, float]
    """Opponent -> epoch seconds of its last decision."""
    latency: dict[str, Histogram]
    symbols: int
    warm: int
    capital: float
    """Reference capital of all symbols."""
    equity: dict[str, float]
    """Arm -> account currency, over all symbols."""
    bars: int
    """Closed bars of all symbols."""
    missing: dict[str, float]
    """Feature -> share of the newest closed bars in which it was missing."""
    drift: dict[str, FeatureDrift]
    rss_bytes: int | None
    disagreements: tuple[Disagreement, ...]
    """Newest first."""
    killed: bool | None
    """Whether the kill switch of the risk limits is engaged; null without limits."""
    vetoes: dict[str, int]
    """Reason -> decisions that the risk limits would not have allowed; empty without limits."""
    spans_dropped: int | None
    """Spans that no OpenTelemetry collector took; null where none are made."""


encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder(Status).decode
