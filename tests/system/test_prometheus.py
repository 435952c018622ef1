"""Does a real Prometheus take page, rules and dashboard, and do alerts fire and clear?"""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from tests.worker.conftest import daemon, policy_file
from tests.worker.test_api import KEYS, Server, api, client, serve, slowly, stage
from tests.worker.test_metrics import ALERTS, DASHBOARD, ROOT, samples, view
from tests.worker.test_service import publish
from worker.embedded import leashed
from worker.metrics import PREFIX, HttpFigures, page

__all__ = ["api", "client", "daemon", "policy_file", "serve", "stage"]

RULES = ROOT / "deploy/prometheus/alerts.yml"


def test_the_page_passes_promtool(promtool: str) -> None:
    for found in (view(), view(status=None)):
        text = page(found, HttpFigures({200: 1}, 2))
        done = subprocess.run(
            [promtool, "check", "metrics"], input=text, capture_output=True, check=False
        )
        assert (done.returncode, done.stdout + done.stderr) == (0, b"")


def test_the_rules_pass_promtool(promtool: str) -> None:
    done = subprocess.run(
        [promtool, "check", "rules", str(RULES)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"{len(ALERTS)} rules found" in done.stdout


# -- each rule: quiet, then its condition, then quiet again ---------------------------------------


class Case(NamedTuple):
    """Series by minute, in promtool's notation, and when the alert is there."""

    series: dict[str, str]
    quiet: str
    fires: str
    clears: str
    labels: dict[str, str] = {}  # noqa: RUF012 - never changed


TICK = {"event_type": "market.tick"}
UP = {"up": "1x90"}
CASES = {
    "HttpDown": Case({"redis_up": "1x5 _x10 1x20"}, "5m", "14m", "25m"),
    "RedisAway": Case({"redis_up": "1x5 0x10 1x20"}, "5m", "8m", "20m"),
    "WorkerDown": Case({"up": "1x5 0x10 1x20", "redis_up": "1x40"}, "5m", "8m", "20m"),
    "WorkerStalled": Case({'state{state="stalled"}': "0x5 1x10 0x20"}, "5m", "8m", "20m",
                          {"state": "stalled"}),
    "WorkerBehind": Case({"lag_seconds": "0x5 11x10 0x20", **UP}, "5m", "12m", "20m"),
    "WorkerFenced": Case({"fenced_total": "0x5 1x40"}, "5m", "7m", "25m"),
    "EntriesLost": Case({'lost_total{event_type="market.tick"}': "0x5 7x40"},
                        "5m", "7m", "25m", TICK),
    "DeadLetters": Case({'dead_letters_total{event_type="market.tick"}': "0x5 7x40"},
                        "5m", "7m", "25m", TICK),
    "OutputsDropped": Case({"outputs_dropped_total": "0x5 9x40"}, "5m", "7m", "25m"),
    "ClockAhead": Case({"ahead_total": "0x5 1x40"}, "5m", "7m", "25m"),
    "NoTicks": Case({'events_total{event_type="market.tick",outcome="decided"}':
                     "0+9x5 54x20 60+9x20", **UP}, "5m", "18m", "40m"),
    "RlV2Silent": Case({"rl_v2_silence_seconds": "0+60x20 0x20", **UP}, "14m", "18m", "25m"),
    "CollectorBehind": Case({'collector_lag_seconds{stream="s"}': "0x5 400x10 0x20"},
                            "5m", "12m", "20m", {"stream": "s"}),
    "MemoryHigh": Case({"resident_memory_bytes": "80000000x5 400000000x15 80000000x20"},
                       "5m", "18m", "30m"),
    "HttpMemoryHigh": Case({"http_resident_memory_bytes": "80000000x5 130000000x15 80000000x20"},
                           "5m", "18m", "30m"),
    "FeatureDrift": Case({'feature_drift{feature="rsi"}': "0.3x5 1.9x10 0.3x20"},
                         "5m", "12m", "20m", {"feature": "rsi"}),
    "VerdictReject": Case({'verdict{verdict="REJECT"}': "0x5 1x10 0x20"}, "5m", "7m", "20m",
                          {"verdict": "REJECT"}),
    "VerdictInvalid": Case({'verdict{verdict="INVALID"}': "0x5 1x10 0x20"}, "5m", "7m", "20m",
                           {"verdict": "INVALID"}),
}  # fmt: skip
UNCOUNTED = Case(
    {'losses_uncounted{event_type="market.tick"}': "0x5 1x40"}, "5m", "7m", "25m", TICK
)
RULE = {rule["alert"].removeprefix("RLv3Shadow"): rule for rule in ALERTS}


def expected(rule: dict[str, Any], case: Case) -> dict[str, Any]:
    """Return the alert as promtool compares it."""
    rendered = {
        name: re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda m: case.labels[m[1]], text)
        for name, text in rule["annotations"].items()
    }
    return {"exp_labels": {**rule["labels"], **case.labels}, "exp_annotations": rendered}


@pytest.mark.parametrize(
    ("name", "case"),
    [*CASES.items(), ("EntriesLost", UNCOUNTED)],
    ids=lambda value: str(value)[:24],
)
def test_an_alert_fires_on_its_condition_and_clears(
    promtool: str, tmp_path: Path, name: str, case: Case
) -> None:
    rule = RULE[name]
    checks = [
        {"alertname": rule["alert"], "eval_time": at, "exp_alerts": alerts}
        for at, alerts in (
            (case.quiet, []), (case.fires, [expected(rule, case)]), (case.clears, []),
        )
    ]  # fmt: skip
    series = [{"series": PREFIX + name, "values": values} for name, values in case.series.items()]
    test = {
        "rule_files": [str(RULES)], "evaluation_interval": "1m",
        "tests": [{"interval": "1m", "input_series": series, "alert_rule_test": checks}],
    }  # fmt: skip
    file = tmp_path / "test.yml"
    file.write_text(yaml.safe_dump(test))
    done = subprocess.run(
        [promtool, "test", "rules", str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_case() -> None:
    assert set(CASES) == set(RULE)


# -- a real Prometheus on a running worker --------------------------------------------------------


class Prometheus:
    """A server that scrapes every second."""

    def __init__(self, program: str, directory: Path, target: str) -> None:
        rules = yaml.safe_load(RULES.read_text("utf-8"))
        for rule in rules["groups"][0]["rules"]:  # a test does not wait for minutes
            rule.pop("for", None)
            rule["expr"] = re.sub(r"\[\d+m\]", "[20s]", rule["expr"])
        (directory / "alerts.yml").write_text(yaml.safe_dump(rules))
        scrape = {"job_name": "t", "static_configs": [{"targets": [target]}]}
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "scrape_configs": [scrape], "rule_files": ["alerts.yml"],
        }  # fmt: skip
        (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        self.process = subprocess.Popen(
            leashed(
                program, f"--config.file={directory / 'prometheus.yml'}",
                f"--storage.tsdb.path={directory / 'data'}", f"--web.listen-address={self.address}",
            ),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the result of an instant query; nothing while the server starts."""
        text = urllib.parse.urlencode({"query": expression})
        url = f"http://{self.address}/api/v1/query?{text}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                found = json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code == 503:
                return []
            raise AssertionError(f"{expression}: {error.read().decode()}") from error
        except OSError:
            return []
        result: list[dict[str, Any]] = found["data"]["result"]
        return result

    def firing(self) -> set[str]:
        """Return the alerts that fire now."""
        found = self.query('ALERTS{alertstate="firing"}')
        return {row["metric"]["alertname"].removeprefix("RLv3Shadow") for row in found}


@pytest.fixture
def watching(prometheus: str, tmp_path: Path, api: Server) -> Iterator[Prometheus]:
    """A Prometheus that scrapes the HTTP process."""
    server = Prometheus(prometheus, tmp_path, f"127.0.0.1:{api.port}")
    yield server
    server.process.kill()
    server.process.wait()


def test_conditions_caused_on_a_running_worker_fire_and_clear(
    watching: Prometheus, client, daemon, api: Server
) -> None:
    slowly(lambda: watching.query(PREFIX + "redis_up"))
    slowly(lambda: "WorkerDown" in watching.firing())
    publish(client, 0, 200)
    worker = daemon(api.url)
    slowly(lambda: watching.query(PREFIX + "up == 1"))
    slowly(lambda: "WorkerDown" not in watching.firing())

    client.xadd(KEYS.stream("market.tick"), {"payload": b"{"})
    slowly(lambda: "DeadLetters" in watching.firing())

    client.set(KEYS.own + "verdict", json.dumps({"registration": "r", "verdict": "REJECT"}))
    slowly(lambda: "VerdictReject" in watching.firing())
    client.set(KEYS.own + "verdict", json.dumps({"registration": "r", "verdict": "INVALID"}))
    slowly(
        lambda: watching.firing() >= {"VerdictInvalid"} and "VerdictReject" not in watching.firing()
    )
    client.delete(KEYS.own + "verdict")
    slowly(lambda: "VerdictInvalid" not in watching.firing())

    second = daemon(api.url)
    assert worker.end()[0] == 3
    slowly(lambda: "WorkerFenced" in watching.firing())

    second.process.send_signal(signal.SIGSTOP)  # it is there, and does nothing
    slowly(lambda: "WorkerDown" in watching.firing())
    second.process.send_signal(signal.SIGCONT)
    slowly(lambda: "WorkerDown" not in watching.firing())
    deadline = time.monotonic() + 40.0
    while watching.firing() & {"DeadLetters", "WorkerFenced"}:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            watching.query(target["expr"])  # raises where Prometheus does not understand it


def test_samples_of_a_page_and_of_the_scrape_are_the_same(
    watching: Prometheus, client, api: Server
) -> None:
    slowly(lambda: watching.query(PREFIX + "redis_up"))
    names = {row["metric"]["__name__"] for row in watching.query(f'{{__name__=~"{PREFIX}.+"}}')}
    assert {PREFIX + name for name, *_ in samples(view(status=None, verdict=None))} >= names - {
        f"{PREFIX}http_requests_total"
    }
    assert len(names) >= 8
