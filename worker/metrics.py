"""What does Prometheus see? One page from the newest view; nothing is kept here.

`METRICS` names every metric once, with its meaning; alert rules, dashboard and docs are checked
against it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from rlv3.events import ACTION_TABLE
from shadow.drift import LEVELS
from shadow.pipeline import OUTCOMES
from worker.monitor import View
from worker.status import EDGES_S, Status

PREFIX = "quantum_rl_v3_shadow_"
CONTENT_TYPE = CONTENT_TYPE_LATEST
STATES = ("ready", "behind", "stalled", "stopped", "gone")
VERDICTS = ("INVALID", "REJECT", "PROMOTE", "KEEP SHADOWING")
_LAST = len(EDGES_S)


class _Row(NamedTuple):
    kind: str
    help: str
    labels: tuple[str, ...] = ()


METRICS: dict[str, _Row] = {
    "redis_up": _Row("gauge", "Whether Redis answers the HTTP process."),
    "up": _Row("gauge", "Whether a worker showed itself within the last five seconds."),
    "ready": _Row("gauge", "Whether the worker gets on, without much lag."),
    "state": _Row("gauge", "1 for the state that the worker is in.", ("state",)),
    "status_age_seconds": _Row("gauge", "Age of what the worker last showed."),
    "start_time_seconds": _Row("gauge", "When the worker's process started, Unix time."),
    "progress_age_seconds": _Row("gauge", "Time since the worker finished a step."),
    "last_commit_age_seconds": _Row("gauge", "Time since the last commit of this process."),
    "lag_seconds": _Row("gauge", "Redis's time minus the id of the oldest entry not folded."),
    "epoch": _Row("gauge", "How many times a worker took over the state."),
    "fenced": _Row("counter", "Workers that another one fenced."),
    "commits": _Row("counter", "Commits since the first start."),
    "events": _Row(
        "counter", "Entries read since the first start, by outcome.", ("event_type", "outcome")
    ),
    "dead_letters": _Row("counter", "Entries that could not be decoded.", ("event_type",)),
    "conflated": _Row(
        "counter", "Entries decided by a newer tick of their symbol.", ("event_type",)
    ),
    "lost": _Row("counter", "Entries trimmed before they were read.", ("event_type",)),
    "losses_uncounted": _Row(
        "gauge", "1 where entries were lost that Redis 6.2 cannot count.", ("event_type",)
    ),
    "ahead": _Row("counter", "Entries with ids more than a second in the future."),
    "outputs_dropped": _Row("counter", "Own entries dropped before a collector stored them."),
    "decisions": _Row("counter", "Decisions of RL v3.", ("kind", "action")),
    "pairs": _Row("counter", "Decisions of RL v2 paired with one of RL v3.", ("sides",)),
    "unpaired": _Row("counter", "Decisions without a counterpart.", ("side", "reason")),
    "step_duration_seconds": _Row(
        "histogram",
        "Time of a step of the path; total: from entry id to commit, of one entry in eight.",
        ("step",),
    ),
    "policy_info": _Row(
        "gauge", "The artifact in force.", ("digest", "trained_steps", "feature_version")
    ),
    "run_info": _Row("gauge", "The run, and who plays RL v2.", ("run_id", "rl_v2")),
    "symbols": _Row("gauge", "Symbols seen."),
    "symbols_warm": _Row("gauge", "Symbols with enough history."),
    "bars": _Row("counter", "Closed bars of all symbols."),
    "equity": _Row("gauge", "Equity of an arm over all symbols, account currency.", ("arm",)),
    "vetoes": _Row(
        "counter", "Decisions that the risk limits would not have allowed.", ("reason",)
    ),
    "kill_switch_engaged": _Row("gauge", "Whether the kill switch of the risk limits vetoes."),
    "capital": _Row("gauge", "Reference capital of all symbols, account currency."),
    "feature_missing_ratio": _Row(
        "gauge", "Share of the newest closed bars without the feature.", ("feature",)
    ),
    "feature_drift": _Row(
        "gauge", "Population stability index of the last hour against training.", ("feature",)
    ),
    "feature_quantile": _Row(
        "gauge", "Quantiles of a feature, live and in training.", ("feature", "data", "level")
    ),
    "resident_memory_bytes": _Row("gauge", "Memory of the worker."),
    "spans_dropped": _Row("counter", "Spans that no OpenTelemetry collector took."),
    "rl_v2_silence_seconds": _Row(
        "gauge", "Time since the last decision of RL v2, or since the worker's start."
    ),
    "collector_lag_seconds": _Row(
        "gauge", "Stream time that is not durable in the collector's store.", ("stream",)
    ),
    "verdict": _Row("gauge", "1 for the verdict of the registration in force.", ("verdict",)),
    "verdict_batches": _Row("gauge", "Closed batches that the verdict is based on."),
    "verdict_mean_bps_per_day": _Row("gauge", "Mean advantage of RL v3 over RL v2."),
    "verdict_low_bps_per_day": _Row("gauge", "Lower bound of the confidence sequence."),
    "verdict_high_bps_per_day": _Row("gauge", "Upper bound of the confidence sequence."),
    "verdict_e_value": _Row("gauge", "Evidence against no advantage; valid at any time."),
    "verdict_time_to_decide_seconds": _Row("gauge", "Time to a decision at today's estimate."),
    "http_requests": _Row("counter", "Answers of the HTTP process.", ("code",)),
    "http_resident_memory_bytes": _Row("gauge", "Memory of the HTTP process."),
}
"""Name without the prefix -> kind, meaning, labels; a counter's samples end in `_total`."""

_FAMILIES = {
    "gauge": GaugeMetricFamily,
    "counter": CounterMetricFamily,
    "histogram": HistogramMetricFamily,
}


def sample_names() -> set[str]:
    """Return every name that a query may use."""
    names = set()
    for name, row in METRICS.items():
        endings = {"gauge": ("",), "counter": ("_total",)}.get(
            row.kind, ("_bucket", "_sum", "_count")
        )
        names |= {f"{PREFIX}{name}{ending}" for ending in endings}
    return names


class HttpFigures(NamedTuple):
    """What the HTTP process knows of itself."""

    requests: Mapping[int, int]
    """Status code -> answers."""
    rss_bytes: int | None


def page(view: View, http: HttpFigures) -> bytes:
    """Return the exposition of a view."""
    return worker_part(view) + http_part(http)


def worker_part(view: View) -> bytes:
    """Return what a page says of a view; milliseconds of work, the same until the next view."""
    found = _Page()
    found.fill(view)
    return found.text()


def http_part(http: HttpFigures) -> bytes:
    """Return what a page says of the HTTP process itself."""
    found = _Page()
    for code, n in sorted(http.requests.items()):
        found.put("http_requests", n, str(code))
    found.put("http_resident_memory_bytes", http.rss_bytes)
    return found.text()


class _Page(Collector):
    """Lays figures out as metric families, in the order of `METRICS`."""

    def __init__(self) -> None:
        self._families: dict[str, Metric] = {}

    def text(self) -> bytes:
        """Return the exposition of what was put."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return generate_latest(registry)

    def collect(self) -> Iterator[Metric]:
        """Return the families that have a sample."""
        return iter([self._families[name] for name in METRICS if name in self._families])

    def _family(self, name: str) -> Any:
        family = self._families.get(name)
        if family is None:
            row = METRICS[name]
            family = _FAMILIES[row.kind](f"{PREFIX}{name}", row.help, labels=row.labels)
            self._families[name] = family
        return family

    def put(self, name: str, value: float | None, *labels: str) -> None:
        """Add a sample; None is none."""
        if value is not None:
            self._family(name).add_metric(labels, value)

    def fill(self, view: View) -> None:
        """Add everything that a view knows."""
        put = self.put
        put("redis_up", not view.redis)
        put("up", view.up)
        put("ready", not view.reason)
        for state in STATES:
            put("state", view.state == state, state)
        put("status_age_seconds", view.age_s)
        put("fenced", view.fenced)
        for stream, lag_s in view.collector_lag_s.items():
            put("collector_lag_seconds", lag_s, stream)
        if view.status is not None:
            self._worker(view.status)
            put("rl_v2_silence_seconds", view.silence_s)
        self._verdict(view)

    def _worker(self, status: Status) -> None:
        put = self.put
        put("start_time_seconds", status.started_s)
        put("progress_age_seconds", status.progress_age_s)
        put("last_commit_age_seconds", status.commit_age_s)
        put("lag_seconds", status.lag_s)
        put("epoch", status.epoch)
        put("commits", status.commits)
        for event_type in status.inputs:
            outcomes = status.events.get(event_type, {})
            for outcome in OUTCOMES:
                put("events", outcomes.get(outcome, 0), event_type, outcome)
            put("dead_letters", outcomes.get("dead_letter", 0), event_type)
            put("conflated", outcomes.get("conflated", 0), event_type)
            lost = status.lost.get(event_type, 0)
            put("lost", lost, event_type)
            put("losses_uncounted", lost is None, event_type)
        put("ahead", status.ahead)
        put("outputs_dropped", status.dropped)
        for kind, counts in status.actions.items():
            for action, n in zip(ACTION_TABLE, counts, strict=True):
                put("decisions", n, kind, action)
        for sides, n in status.agreement.items():
            put("pairs", n, sides)
        for where, n in status.unpaired.items():
            put("unpaired", n, *where.split(":", 1))
        self._histograms(status)
        policy = status.policy
        put("policy_info", 1, policy.digest, str(policy.steps), policy.feature_version)
        put("run_info", 1, status.run_id, status.rl_v2)
        put("symbols", status.symbols)
        put("symbols_warm", status.warm)
        put("bars", status.bars)
        for arm, equity in status.equity.items():
            put("equity", equity, arm)
        for reason, n in status.vetoes.items():
            put("vetoes", n, reason)
        put("kill_switch_engaged", status.killed)
        put("capital", status.capital)
        for feature, share in status.missing.items():
            put("feature_missing_ratio", share, feature)
        for feature, drift in status.drift.items():
            put("feature_drift", drift.psi, feature)
            for data, values in (("live", drift.live), ("training", drift.training)):
                for level, value in zip(LEVELS, values, strict=True):
                    put("feature_quantile", value, feature, data, str(level))
        put("resident_memory_bytes", status.rss_bytes)
        put("spans_dropped", status.spans_dropped)

    def _histograms(self, status: Status) -> None:
        family = self._family("step_duration_seconds")
        for step, histogram in status.latency.items():
            reached, buckets = 0, []
            for bucket, n in enumerate(histogram.counts):
                reached += n
                edge = "+Inf" if bucket == _LAST else str(EDGES_S[bucket])
                buckets.append((edge, float(reached)))
            family.add_metric([step], buckets, histogram.sum_s)

    def _verdict(self, view: View) -> None:
        found = view.verdict
        for verdict in VERDICTS:
            self.put("verdict", found is not None and found.get("verdict") == verdict, verdict)
        for name, field in (
            ("verdict_batches", "batches"),
            ("verdict_mean_bps_per_day", "mean"),
            ("verdict_low_bps_per_day", "low"),
            ("verdict_high_bps_per_day", "high"),
            ("verdict_e_value", "e_value"),
        ):
            self.put(name, _number(found, field))
        days = _number(found, "days_to_decide")
        self.put("verdict_time_to_decide_seconds", None if days is None else 86_400 * days)


def _number(found: Mapping[str, Any] | None, field: str) -> float | None:
    value = None if found is None else found.get(field)
    return value if isinstance(value, int | float) else None
