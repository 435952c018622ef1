"""Does the metrics page hold what alerts and dashboard ask for, and nothing else?"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from shadow.drift import DRIFTED
from worker import metrics
from worker.metrics import METRICS, PREFIX, HttpFigures, page, sample_names
from worker.monitor import SILENT_S, View
from worker.status import EDGES_S, FORMAT, STEPS, FeatureDrift, Histogram, PolicyInfo, Status

ROOT = Path(__file__).resolve().parents[2]
RULES = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text("utf-8"))
ALERTS = [rule for group in RULES["groups"] for rule in group["rules"]]
DASHBOARD = json.loads((ROOT / "deploy/grafana/rl-v3-shadow.json").read_text("utf-8"))


def status(**changes: Any) -> Status:
    """A worker's status in which everything is there."""
    buckets = [0] * len(EDGES_S) + [1]
    buckets[3] = 2
    drift = FeatureDrift(0.25, (0.1,) * 5, (0.2,) * 5)
    values: dict[str, Any] = {
        "format": FORMAT, "started_s": 1.0, "owner": "pid 1", "state": "ready", "step": "wait",
        "trouble": "", "progress_age_s": 0.1, "commit_age_s": 0.2, "lag_s": 0.3, "epoch": 4,
        "commits": 5, "run_id": "run", "inputs": ("market.tick", "trade.closed"),
        "rl_v2": "reference", "policy": PolicyInfo("d", 7, "seed/f"),
        "events": {"market.tick": {"decided": 8, "conflated": 2, "dead_letter": 1}},
        "lost": {"market.tick": 9, "trade.closed": None}, "ahead": 10, "dropped": 11,
        "actions": {"step": [1, 2, 3, 4, 5, 6], "advisory": [6, 5, 4, 3, 2, 1]}, "decisions": 42,
        "pairs": 3, "agreement": {"agree": 2, "disagree": 1, "undirected": 0},
        "unpaired": {"v2:missing_v3": 12}, "v2_heard": {"q_table": 1.0},
        "latency": {step: Histogram(list(buckets), 61.5) for step in STEPS}, "symbols": 2,
        "warm": 1, "capital": 20_000.0, "bars": 13,
        "equity": {"v3": 20_001.0, "v2": 19_999.0, "follow_signal": 1.0, "flat": 20_000.0,
                   "v3_guarded": 20_002.0},
        "missing": {"spread": 1.0}, "drift": {"rsi": drift}, "rss_bytes": 14,
        "disagreements": (), "killed": True, "spans_dropped": 16,
        "vetoes": {"kill_switch": 3, "daily_loss": 0},
    }  # fmt: skip
    return Status(**{**values, **changes})


VERDICT = {
    "registration": "r", "verdict": "REJECT", "batches": 5, "mean": 3.5, "low": -1.0, "high": 8.0,
    "e_value": 2.0, "days_to_decide": 61.0,
}  # fmt: skip


def view(**changes: Any) -> View:
    """What is known when all is well."""
    values: dict[str, Any] = {
        "redis": "", "status": status(), "age_s": 0.5, "fenced": 1,
        "collector_lag_s": {"quantum:stream:rl_v3.decision": 2.0}, "verdict": VERDICT,
    }  # fmt: skip
    return View(**{**values, **changes})


HTTP = HttpFigures({200: 3}, 15)


def samples(found: View, http: HttpFigures = HTTP) -> dict[Any, float]:
    """Return (name, sorted labels) -> value of the page."""
    return {
        (sample.name.removeprefix(PREFIX), *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page(found, http).decode())
        for sample in family.samples
    }


def test_every_metric_is_on_the_page_and_nothing_else() -> None:
    assert {PREFIX + name for name, *_ in samples(view())} == sample_names()


def test_values_are_those_of_the_status() -> None:
    found = samples(view())
    tick = ("event_type", "market.tick")
    assert found["up",] == found["ready",] == found["redis_up",] == 1
    assert found["state", ("state", "ready")] == 1
    assert found["state", ("state", "gone")] == 0
    assert found["events_total", tick, ("outcome", "decided")] == 8
    assert found["events_total", ("event_type", "trade.closed"), ("outcome", "decided")] == 0
    assert found["dead_letters_total", tick] == 1
    assert found["conflated_total", tick] == 2
    assert found["lost_total", tick] == 9
    assert ("lost_total", ("event_type", "trade.closed")) not in found
    assert found["losses_uncounted", ("event_type", "trade.closed")] == 1
    assert found["decisions_total", ("action", "SHORT"), ("kind", "advisory")] == 4
    assert found["pairs_total", ("sides", "disagree")] == 1
    assert found["unpaired_total", ("reason", "missing_v3"), ("side", "v2")] == 12
    assert found["equity", ("arm", "v2")] == 19_999.0
    assert found["equity", ("arm", "v3_guarded")] == 20_002.0
    assert found["vetoes_total", ("reason", "kill_switch")] == 3
    assert found["kill_switch_engaged",] == 1
    assert found["spans_dropped_total",] == 16
    assert found["feature_drift", ("feature", "rsi")] == 0.25
    quantile = ("data", "training"), ("feature", "rsi"), ("level", "0.95")
    assert found[("feature_quantile", *quantile)] == 0.2
    assert found["verdict", ("verdict", "REJECT")] == 1
    assert found["verdict", ("verdict", "INVALID")] == 0
    assert found["verdict_time_to_decide_seconds",] == 61 * 86_400
    assert found["http_requests_total", ("code", "200")] == 3


def test_histograms_are_cumulated() -> None:
    found = samples(view())
    step = ("step", "commit")
    assert found["step_duration_seconds_bucket", ("le", "0.0005"), step] == 0
    assert found["step_duration_seconds_bucket", ("le", "0.001"), step] == 2
    assert found["step_duration_seconds_bucket", ("le", "60.0"), step] == 2
    assert found["step_duration_seconds_bucket", ("le", "+Inf"), step] == 3
    assert found["step_duration_seconds_count", step] == 3
    assert found["step_duration_seconds_sum", step] == 61.5


@pytest.mark.parametrize(
    ("changes", "state", "reason"),
    [
        ({"redis": "h: refused"}, "ready", "Redis does not answer: h: refused"),
        ({"status": None, "age_s": None}, "gone", "no worker has shown itself yet"),
        ({"age_s": 7.0}, "gone", "the worker has not shown itself for 7 s"),
        ({"status": status(state="stopped"), "age_s": 90.0}, "stopped",
         "the worker was stopped 90 s ago"),
        ({"status": status(state="behind", lag_s=12.0)}, "behind",
         "the worker is 12 s behind its streams"),
        ({"status": status(state="stalled", step="commit", progress_age_s=4.0, trouble="no space")},
         "stalled", "no progress for 4 s in step commit: no space"),
        ({"status": None, "status_error": "expected format 1"}, "gone", "expected format 1"),
    ],
)  # fmt: skip
def test_whoever_is_not_ready_says_why(changes: dict[str, Any], state: str, reason: str) -> None:
    found = view(**changes)
    assert (found.state, found.reason) == (state, reason)
    shown = samples(found)
    assert shown["ready",] == 0
    assert shown["state", ("state", state)] == 1


def test_without_limits_and_spans_there_are_no_figures_of_them() -> None:
    bare = status(killed=None, vetoes={}, spans_dropped=None, equity={"v3": 1.0})
    names = {name for name, *_ in samples(view(status=bare))}
    assert names & {"vetoes_total", "kill_switch_engaged", "spans_dropped_total"} == set()


def test_a_page_without_worker_and_redis_is_still_a_page() -> None:
    found = samples(View(redis="refused"), HttpFigures({}, None))
    assert found["redis_up",] == found["up",] == 0
    assert found["verdict", ("verdict", "PROMOTE")] == 0
    assert ("lag_seconds",) not in found


def test_a_status_survives_the_wire() -> None:
    assert msgspec.json.decode(msgspec.json.encode(status()), type=Status) == status()


def names_in(expression: str) -> set[str]:
    """Return the names of our metrics that an expression uses."""
    return set(re.findall(rf"{PREFIX}\w+", expression))


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_alerts_use_metrics_that_exist_and_lead_to_the_runbook(rule: dict[str, Any]) -> None:
    assert names_in(rule["expr"])
    assert names_in(rule["expr"]) <= sample_names()
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", rule["alert"].removeprefix("RLv3Shadow"))
    assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{words.lower()}"
    labels = {label for row in METRICS.values() for label in row.labels}
    assert set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"])) <= labels


def test_alerts_and_code_agree_on_thresholds() -> None:
    bounds = {rule["alert"]: rule["expr"] for rule in ALERTS}
    assert bounds["RLv3ShadowFeatureDrift"].endswith(f"> {DRIFTED}")
    assert f"> {SILENT_S:.0f} and" in bounds["RLv3ShadowRlV2Silent"]


def test_the_dashboard_uses_metrics_and_labels_that_exist() -> None:
    targets = [target for panel in DASHBOARD["panels"] for target in panel["targets"]]
    labels = {label for row in METRICS.values() for label in row.labels}
    for target in targets:
        assert names_in(target["expr"]), target
        assert names_in(target["expr"]) <= sample_names(), target
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= labels, target
    assert len(targets) > 20


def test_metric_names_follow_the_conventions() -> None:
    assert metrics.PREFIX == "quantum_rl_v3_shadow_"
    for name, row in METRICS.items():
        assert re.fullmatch(r"[a-z0-9_]+", name)
        assert row.help.endswith(".")
        assert not name.endswith(("_total", "_ms"))
