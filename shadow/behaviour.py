"""How do RL v3 and RL v2 behave, side by side, and is v3's confidence worth its name?

Both policies are put on one footing: what each bar did to an arm's position is one of five classes
of target change. Bars of cold symbols are left out. Everything is computed from one run of a store;
intervals come from resampling whole batches, never single decisions, and bound each number with
95 % confidence.
"""

from __future__ import annotations

import msgspec

CLASSES = ("long", "short", "hold", "reduce", "exit")
"""What a bar did to a position: add or flip long, add or flip short, nothing, less of it, none."""
SIDES = ("short", "flat", "long")


class Interval(msgspec.Struct, frozen=True):
    """A number with its interval; all null where it is undefined, the ends where too few batches
    are there to resample."""

    value: float | None
    low: float | None = None
    high: float | None = None


class Confusion(msgspec.Struct, frozen=True):
    """How often two arms did the same, on the five classes."""

    classes: tuple[str, ...]
    table: tuple[tuple[int, ...], ...]
    """Bars; rows v3, columns v2."""
    n: int
    batches: int
    raw: Interval
    """Share on the diagonal."""
    kappa: Interval
    ac1: Interval
    """Gwet's AC1: unlike kappa, it does not fall when nearly all is HOLD."""
    weighted_kappa: Interval
    """Quadratic weights on the exposures at bar closes, by `exposure_bins`."""
    exposure_bins: tuple[float, ...]
    """Inner edges, fractions of equity."""
    exposure_table: tuple[tuple[int, ...], ...]
    """Bars; rows v3, columns v2."""


class Cell(msgspec.Struct, frozen=True):
    """What the bars of one cell brought: v3's net return minus v2's."""

    v3: str
    v2: str
    bars: int
    mean_bps: Interval
    """Per bar, in basis points of the symbol's reference capital."""
    total: float
    """Account currency."""


class Window(msgspec.Struct, frozen=True):
    """A mix of actions in one stretch of time, against the reference stretch."""

    start_us: int
    end_us: int
    counts: tuple[int, ...]
    psi: float | None
    """Population stability index; null in the reference and where either is empty."""
    psi_limit: float | None
    """95 % quantile of the index when nothing drifts, from resampled batches."""
    p: float | None
    """How often the index is as large when nothing drifts."""
    js_bits: float | None
    """Jensen-Shannon divergence (not its root) in bits."""


class Drift(msgspec.Struct, frozen=True):
    """How one arm's mix changed over the run."""

    what: str
    """v3's six actions at steps, or v2's five classes."""
    names: tuple[str, ...]
    total: tuple[int, ...]
    reference: int
    """How many of the first windows, taken together, are the reference."""
    windows: tuple[Window, ...]


class Holding(msgspec.Struct, frozen=True):
    """How long an arm keeps a side, in seconds."""

    arm: str
    closed: int
    """Positions that ended within the run."""
    open: int
    """Positions that the run's end cut short; not in the figures below."""
    mean: Interval
    quantiles: tuple[float, ...]
    """At 5, 25, 50, 75, 90 and 95 %; empty without a closed position."""


class Exposure(msgspec.Struct, frozen=True):
    """What an arm held at bar closes, as fractions of equity."""

    arm: str
    mean_abs: Interval
    net: Interval
    """Signed mean."""
    long: float
    """Share of bar closes; with `short` and `flat` adds up to 1."""
    short: float
    flat: float
    edges: tuple[float, ...]
    """Of the histogram."""
    bars: tuple[int, ...]


class Bin(msgspec.Struct, frozen=True):
    """Decisions of about equal confidence."""

    n: int
    confidence: float
    """Mean."""
    came_true: Interval
    """Share whose order earned more than holding still."""
    isotonic: float
    """The same after isotonic regression: what this confidence is worth."""


class Calibration(msgspec.Struct, frozen=True):
    """Is the probability of the chosen action the probability that it was right?

    Right: over the next `horizon` bars, the order's price gain exceeded its fees and slippage, so
    that it beat HOLD. Samples of a symbol do not overlap.
    """

    horizon: int
    n: int
    overlapping: int
    """Orders left out because a sample of the same symbol was still open."""
    base_rate: Interval
    ece: Interval
    """Expected calibration error, equal-mass bins, bias removed."""
    brier: Interval
    brier_of_base_rate: float | None
    """What always saying the base rate would score: lower than `brier` means no skill."""
    bins: tuple[Bin, ...]


class Latency(msgspec.Struct, frozen=True):
    """From the entry's arrival to the commit of its decision, by the worker's clock."""

    kind: str
    """step or advisory."""
    n: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    max_ms: float


class Disagreement(msgspec.Struct, frozen=True):
    """A stretch of bars in which the two held different sides of one symbol."""

    symbol: str
    start_us: int
    """Begin of its first bar."""
    end_us: int
    """End of its last bar."""
    bars: int
    v3: str
    """Side held in the first bar."""
    v2: str
    difference: float
    """v3's net profit minus v2's, account currency."""
    v3_decision_id: str | None
    """The step that v3 stood by when it began; `rlv3-shadow explain` takes it."""
    v2_decision_id: str | None
    """The decision that the v2 arm followed then."""
    command: str | None
    """Shows why v3 decided so."""


class Behaviour(msgspec.Struct, frozen=True):
    """Everything a reader is shown about what both policies did."""

    confusion: Confusion
    cells: tuple[Cell, ...]
    """By what both did in the bar, where they differed."""
    sides: tuple[Cell, ...]
    """By the sides held at the bar's close; all nine add up to the whole difference."""
    drifts: tuple[Drift, ...]
    holding: tuple[Holding, ...]
    exposure: tuple[Exposure, ...]
    calibration: Calibration
    latency: tuple[Latency, ...]
    worst: tuple[Disagreement, ...]
    """The 20 that cost v3 most."""
    best: tuple[Disagreement, ...]
    """The 20 that gained v3 most."""
