"""Is what the worker shows served as promised, by a process that can hurt nobody?"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
from prometheus_client.parser import text_string_to_metric_families

from rlv3.policy import Policy, shipped_policy
from tests.worker.conftest import until
from tests.worker.test_service import publish
from worker.config import load_api_config
from worker.embedded import RedisServer, find_servers
from worker.keys import Keys
from worker.status import FORMAT

KEYS = Keys("t")
TOKEN = "0123456789abcdef"
V3 = "/api/v1/rl/v3"
DASHBOARD = "/api/v1/rl-v3/dashboard"


class Server:
    """`rlv3-worker api` in a process of its own."""

    def __init__(self, url: str, *flags: str, **environ: str) -> None:
        self.url = url
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("REDIS_", "RLV3_"))}
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "worker.cli", "api", "--redis-url", url, "--prefix", "t",
                "--http", "127.0.0.1:0", *flags,
            ],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean | environ,
        )  # fmt: skip
        assert self.process.stdout is not None
        line = ""
        while "API_LISTENS" not in line:
            line = self.process.stdout.readline()
            assert line, self.process.communicate()
        self.port = int(json.loads(line)["msg"].rpartition(":")[2])

    def ask(
        self, path: str, method: str = "GET", body: Any = None, **headers: str
    ) -> tuple[int, bytes, dict[str, str]]:
        """Return status, body and headers of an answer."""
        if body is not None and not isinstance(body, bytes | str):
            body = json.dumps(body)
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        with contextlib.closing(link):  # a first report may take long on a busy machine
            link.request(method, path, body, {"content-type": "application/json", **sent})
            answer = link.getresponse()
            headers = {name.lower(): value for name, value in answer.getheaders()}
            return answer.status, answer.read(), headers

    def json(self, path: str, **more: Any) -> Any:
        """Return the decoded body of an answer."""
        return json.loads(self.ask(path, **more)[1])

    def metric(self, name: str, **labels: str) -> float:
        """Return the value of a sample of the metrics page."""
        page = self.ask("/metrics")[1].decode()
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                if sample.name == f"quantum_rl_v3_shadow_{name}" and sample.labels == labels:
                    return sample.value
        raise AssertionError(f"no {name} {labels}")


@pytest.fixture(scope="module")
def stage() -> Iterator[Server]:
    """An HTTP process on a Redis of its own: it reads the same from every version."""
    newest = max(find_servers(), key=lambda found: found.version)
    with RedisServer.start(newest) as server:
        api = Server(server.url)
        yield api
        api.process.kill()
        api.process.communicate()


@pytest.fixture
def client(stage: Server) -> Iterator[redis.Redis]:
    """A client of the stage's Redis, which is empty."""
    with redis.Redis.from_url(stage.url) as link:
        link.flushall()
        yield link


@pytest.fixture
def api(stage: Server, client: redis.Redis) -> Server:
    """The stage's HTTP process after it has seen the empty Redis."""
    slowly(lambda: stage.json("/readyz")["state"] == "gone")
    return stage


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """Start HTTP processes; what still runs at the end is killed."""
    started: list[Server] = []

    def start(url: str, *flags: str, **environ: str) -> Server:
        started.append(Server(url, *flags, **environ))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.communicate()


def slowly(condition: Callable[[], object]) -> None:
    """Wait for a condition that costs a request, below the rate limit."""
    deadline = time.monotonic() + 20.0
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.15)


def test_a_working_worker_is_seen_in_every_place(client, daemon, api: Server) -> None:
    publish(client, 0, 500)
    assert api.ask("/readyz")[0] == 503
    worker = daemon(api.url, "--conflate-after", "off")
    slowly(lambda: api.ask("/readyz")[0] == 200)
    slowly(lambda: api.json(f"{V3}/status")["worker"]["decisions"] == 505)
    assert api.json("/readyz") == {"ready": True, "state": "ready", "reason": ""}
    tick = {"event_type": "market.tick"}
    slowly(lambda: api.metric("events_total", outcome="decided", **tick) == 500)
    assert 505 / 8 <= api.metric("step_duration_seconds_count", step="total") <= 505
    assert api.metric("bars_total") == 8
    summary = api.json(f"{DASHBOARD}/summary")
    assert summary["total_decisions"] == 505
    assert sum(summary["action_counts"].values()) == 505
    assert sum(summary["action_distribution"].values()) == pytest.approx(100.0)
    assert 0 < summary["min_confidence"] <= summary["avg_confidence"] <= summary["max_confidence"]
    full = api.json(f"{DASHBOARD}/full?limit=3&training_limit=1")
    newest = json.loads(client.xrevrange(KEYS.decisions, count=1)[0][1][b"payload"])
    assert len(full["recent_decisions"]) == 3
    assert full["recent_decisions"][0] == {
        name: newest[name]
        for name in (
            "timestamp", "symbol", "action", "confidence", "value", "trace_id", "shadow_mode",
        )
    }  # fmt: skip
    live = api.json(f"{DASHBOARD}/live-status")
    assert (live["mode"], live["shadow_decisions"]) == ("SHADOW", 505)
    assert live["last_decision_at"] == newest["timestamp"]
    assert live["trade_intents_total"] == live["trade_intents_executed"] == 0
    assert api.json(f"{DASHBOARD}/training-summary")["enabled"] is False
    worker.end(signal.SIGTERM)
    slowly(lambda: api.json("/readyz")["state"] == "stopped")
    assert api.metric("up") == 0


def test_a_killed_worker_is_missed_within_seconds(client, daemon, api: Server) -> None:
    publish(client, 0, 10)
    worker = daemon(api.url)
    slowly(lambda: api.metric("up") == 1)
    worker.end(signal.SIGKILL)
    slowly(lambda: api.metric("up") == 0)
    assert re.fullmatch(r"the worker has not shown itself for \d+ s", api.json("/readyz")["reason"])
    daemon(api.url)
    slowly(lambda: api.metric("up") == 1)
    assert api.metric("epoch") == 2
    assert api.metric("fenced_total") == 0


def test_a_fenced_worker_is_counted_and_shows_nothing_any_more(client, daemon, api: Server) -> None:
    publish(client, 0, 10)
    first = daemon(api.url)
    until(lambda: client.exists(KEYS.status))
    daemon(api.url)
    assert first.end()[0] == 3
    assert client.hget(KEYS.meta, "fenced") == b"1"
    slowly(lambda: api.metric("fenced_total") == 1)
    slowly(lambda: api.json(f"{V3}/status")["worker"]["epoch"] == 2)


def test_dead_letters_and_lost_entries_are_counted(client, daemon, api: Server) -> None:
    publish(client, 0, 10)
    client.xadd(KEYS.stream("market.tick"), {"payload": b"{"})
    worker = daemon(api.url)
    slowly(lambda: api.metric("up") == 1)
    slowly(lambda: api.metric("dead_letters_total", event_type="market.tick") == 1)
    worker.end(signal.SIGTERM)
    for _ in range(5):
        client.xadd(KEYS.stream("market.tick"), {"payload": b"{"})
    client.xtrim(KEYS.stream("market.tick"), maxlen=2, approximate=False)
    daemon(api.url)
    tick = {"event_type": "market.tick"}
    numbered = int(client.info("server")["redis_version"].partition(".")[0]) >= 7
    if numbered:
        slowly(lambda: api.metric("lost_total", **tick) == 3)
    slowly(lambda: api.metric("losses_uncounted", **tick) == (not numbered))


def test_a_collector_that_is_behind_or_missing_is_seen(client, daemon, api: Server) -> None:
    publish(client, 0, 200)
    daemon(api.url)
    until(lambda: client.xlen(KEYS.decisions) == 202)
    time.sleep(0.01)
    client.xadd(KEYS.decisions, client.xrange(KEYS.decisions, count=1)[0][1])
    stream = {"stream": KEYS.decisions}
    slowly(lambda: api.metric("collector_lag_seconds", **stream) > 0)
    ((last, _),) = client.xrevrange(KEYS.decisions, count=1)
    client.hset(KEYS.collected, KEYS.decisions, last)
    slowly(lambda: api.metric("collector_lag_seconds", **stream) == 0)


def test_silence_of_rl_v2_is_counted_from_the_start(client, daemon, api: Server) -> None:
    publish(client, 0, 10)
    daemon(api.url)  # on the bus nobody decides as RL v2
    slowly(lambda: api.metric("up") == 1)
    slowly(lambda: api.metric("rl_v2_silence_seconds") > 1.0)


def test_the_verdict_of_the_collector_is_shown(client, api: Server) -> None:
    assert api.json(f"{V3}/status")["verdict"] is None
    found = {"registration": "r", "verdict": "REJECT", "mean": -2.0, "days_to_decide": None}
    client.set("t:rl_v3_shadow:verdict", json.dumps(found))
    slowly(lambda: api.metric("verdict", verdict="REJECT") == 1)
    assert api.metric("verdict_mean_bps_per_day") == -2.0
    assert api.json(f"{V3}/status")["verdict"] == found
    client.set("t:rl_v3_shadow:verdict", json.dumps({**found, "registration": None}))
    slowly(lambda: api.metric("verdict", verdict="REJECT") == 0)
    client.set("t:rl_v3_shadow:verdict", b"{")
    time.sleep(1.2)
    assert api.ask("/healthz")[0] == 200


def test_a_status_that_cannot_be_read_says_so(client, api: Server) -> None:
    client.hset(KEYS.status, mapping={"at_ms": 1, "body": b'{"format": 99}'})
    sentence = f"expected a worker's status of format {FORMAT}"
    slowly(lambda: sentence in api.json("/readyz")["reason"])


# -- without Redis --------------------------------------------------------------------------------


def test_without_redis_it_starts_says_so_and_goes_on_when_it_comes(
    serve,
) -> None:
    with RedisServer.start() as private:
        url = private.url
        private.kill()
        server = serve(url)
        _outlives(private, server)


def _outlives(private: RedisServer, server: Server) -> None:
    url = private.url
    assert server.ask("/healthz")[0] == 200
    status, body, _ = server.ask("/readyz")
    assert status == 503
    assert json.loads(body)["reason"].startswith(f"Redis does not answer: {url}")
    assert server.metric("redis_up") == 0
    assert server.ask(f"{V3}/predict", "POST", {})[0] == 200
    private.restart()
    slowly(lambda: server.metric("redis_up") == 1)
    assert server.json("/readyz")["reason"] == "no worker has shown itself yet"


# -- predict --------------------------------------------------------------------------------------

OBSERVATION = {
    "price_change_1m": 0.001, "price_change_5m": 0.005, "volatility": 0.02, "rsi": 55.0,
    "position_size": 0.0, "balance": 10_000.0, "equity": 10_000.0, "regime": "TREND",
}  # fmt: skip


def test_a_prediction_is_the_policys(api: Server, policy_file: Path) -> None:
    found = api.json(f"{V3}/predict", method="POST", body=OBSERVATION)
    known = [Policy.load(path) for path in (shipped_policy(), policy_file)]
    policy = next(one for one in known if one.digest == found["policy"])
    assert found == {**policy.predict(OBSERVATION), "policy": policy.digest}
    assert {"price_change_15m", "macd", "spread"} <= set(found["missing"])
    null = api.json(f"{V3}/predict", method="POST", body={**OBSERVATION, "macd": None})
    assert null == found


def test_it_predicts_with_the_workers_policy_or_the_named_one(
    client, daemon, api: Server, serve, policy_file: Path, other_policy_file: Path
) -> None:
    publish(client, 0, 10)
    daemon(api.url)
    follows = api
    pinned = serve(api.url, "--policy", str(other_policy_file))
    wanted = Policy.load(policy_file).digest
    slowly(lambda: follows.json(f"{V3}/predict", method="POST", body={})["policy"] == wanted)
    found = pinned.json(f"{V3}/predict", method="POST", body={})["policy"]
    assert found == Policy.load(other_policy_file).digest


def test_a_regime_is_a_name_or_its_index(api: Server) -> None:
    named = api.json(f"{V3}/predict", method="POST", body={"regime": "BREAKOUT"})
    assert api.json(f"{V3}/predict", method="POST", body={"regime": 2}) == named
    unknown = api.json(f"{V3}/predict", method="POST", body={"regime": -7})
    assert "regime_trend" in unknown["missing"]


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        ({"rsi": 101}, ["rsi"]),
        ({"rsi": "55"}, ["rsi"]),
        ({"volatility": -1.0, "position_side": 2}, ["volatility", "position_side"]),
        ({"rsi_14": 55}, ["rsi_14"]),
        ({"regime": "x" * 33}, ["regime", "regime"]),
        ('{"macd": NaN}', ["macd"]),
        ('{"macd": 1e999}', ["macd"]),
        ("[1]", ["body"]),
        ("null", ["body"]),
    ],
)
def test_a_wrong_observation_is_refused_by_field(api: Server, body, fields) -> None:
    status, answer, _ = api.ask(f"{V3}/predict", "POST", body)
    assert status == 422
    assert [found["field"] for found in json.loads(answer)["detail"]] == fields


@pytest.mark.parametrize("body", ["{", "", b"\xff\xfe", "[" * 16_000])
def test_what_is_no_json_is_refused(api: Server, body) -> None:
    assert api.ask(f"{V3}/predict", "POST", body)[0] in (400, 422)


def test_limits_hold_on_the_wire(stage: Server, serve) -> None:
    server = serve(stage.url)
    assert server.ask(f"{V3}/predict", "POST", b"x" * 20_000)[0] == 413
    found = [server.ask("/healthz")[0] for _ in range(80)]
    assert found[:20] == [200] * 20
    assert 429 in found


def test_no_route_takes_anything_but_get_and_predict(api: Server) -> None:
    paths = api.json("/openapi.json")["paths"]
    assert {(path, method) for path, methods in paths.items() for method in methods} == {
        *((path, "get") for path in paths if path != f"{V3}/predict"),
        (f"{V3}/predict", "post"),
    }


def test_no_request_changes_a_key(client, api: Server) -> None:
    client.config_resetstat()
    paths = [path for path in api.json("/openapi.json")["paths"] if "stream" not in path]
    for path in paths:
        api.ask(path, "POST" if path.endswith("predict") else "GET", {})
    time.sleep(1.1)
    assert client.keys() == []
    used = {str(name).removeprefix("cmdstat_") for name in client.info("commandstats")}
    assert {"xrevrange", "hmget"} <= used
    told = {"flushall", "keys", "info", "config|resetstat", "config", "client", "hello"}
    assert used - told <= {"time", "hmget", "hget", "get", "xrange", "xrevrange", "ping"}


# -- pages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_bring_everything_themselves(api: Server, path: str) -> None:
    status, body, headers = api.ask(path)
    assert status == 200
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert "http" not in policy
    text = body.decode()
    assert set(re.findall(r"https?://[^\s\"']+", text)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<[^>]+\s(on\w+|style)=", text)  # the policy would not let it run


def test_the_stream_sends_the_status_every_second(api: Server) -> None:
    link = http.client.HTTPConnection("127.0.0.1", api.port, timeout=10)
    link.request("GET", f"{V3}/stream")
    answer = link.getresponse()
    assert answer.getheader("content-type", "").startswith("text/event-stream")
    events = []
    while len(events) < 2:
        line = answer.readline()
        if line.startswith(b"data: "):
            events.append((time.monotonic(), json.loads(line[6:])))
    link.close()
    assert 0.5 < events[1][0] - events[0][0] < 5.0
    assert events[0][1]["state"] == "gone"


def test_without_a_store_there_is_no_report(api: Server) -> None:
    status, body, _ = api.ask("/report")
    assert (status, json.loads(body)) == (
        404, {"detail": "expected a store (--store DIR) at the start, found none"},
    )  # fmt: skip


def test_a_store_without_rows_says_what_is_missing(stage: Server, serve, tmp_path: Path) -> None:
    server = serve(stage.url, "--store", str(tmp_path / "none"))
    status, body, _ = server.ask("/report")
    assert status == 503
    assert "none" in json.loads(body)["detail"]


def test_the_report_on_a_store_is_built_once_a_minute(
    client, daemon, api: Server, serve, tmp_path: Path
) -> None:
    publish(client, 0, 500)
    daemon(api.url)
    until(lambda: client.xlen(KEYS.decisions) == 505)
    store = tmp_path / "store"
    collector = subprocess.Popen(
        [
            sys.executable, "-m", "worker.cli", "collect", "--redis-url", api.url, "--prefix", "t",
            "--store", str(store),
        ],
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    until(lambda: client.hlen(KEYS.collected) == 2)
    collector.terminate()
    assert collector.wait(20) == 0
    server = serve(api.url, "--store", str(store))
    status, body, headers = server.ask("/report")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert b"RL v3 against RL v2" in body
    publish(client, 500, 600)
    assert server.ask("/report")[1] == body


# -- the process ----------------------------------------------------------------------------------


def test_it_ends_in_order_while_a_page_watches(stage: Server, serve) -> None:
    server = serve(stage.url)
    link = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    link.request("GET", f"{V3}/stream")
    link.getresponse().readline()
    server.process.send_signal(signal.SIGTERM)
    out, err = server.process.communicate(timeout=20)
    link.close()
    assert (server.process.returncode, err) == (0, "")
    assert json.loads(out.splitlines()[-1])["event"] == "API_STOPPED"


def test_it_stays_small_and_runs_below_the_worker(client, daemon, api: Server) -> None:
    publish(client, 0, 500)
    daemon(api.url)
    slowly(lambda: api.metric("up") == 1)
    process = psutil.Process(api.process.pid)
    assert process.memory_info().rss < 120e6
    assert process.nice() >= min(19, psutil.Process().nice() + 15)


def run(*flags: str, **environ: str) -> tuple[int, str]:
    """Run `rlv3-worker api` to its end; return exit code and error."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("REDIS_", "RLV3_"))}
    done = subprocess.run(
        [sys.executable, "-m", "worker.cli", "api", *flags],
        capture_output=True, text=True, env=clean | environ, timeout=60, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr


def test_an_address_that_others_reach_needs_a_token(stage: Server, serve) -> None:
    code, error = run("--http", "0.0.0.0:0")
    assert code == 2
    assert "expected a token in RLV3_API_TOKEN, found none" in error
    server = serve(stage.url, "--http", "0.0.0.0:0", RLV3_API_TOKEN=TOKEN)
    assert server.ask("/metrics")[0] == 401
    assert server.ask("/healthz")[0] == 200
    assert server.ask("/metrics", authorization=f"Bearer {TOKEN}")[0] == 200
    secret = base64.b64encode(f"x:{TOKEN}".encode()).decode()
    assert server.ask("/", authorization=f"Basic {secret}")[0] == 200


def test_a_taken_address_is_an_error_of_one_sentence(api: Server) -> None:
    code, error = run("--http", f"127.0.0.1:{api.port}")
    assert code == 2
    assert f"expected 127.0.0.1:{api.port} to be free" in error


@pytest.mark.parametrize(
    ("flags", "environ", "found"),
    [
        ({"http": "9127"}, {}, "--http must be HOST:PORT, was '9127'"),
        ({}, {"RLV3_HTTP": "localhost:x"}, "RLV3_HTTP must be HOST:PORT"),
        ({"http": "127.0.0.1:70000"}, {}, "--http must be HOST:PORT"),
        ({"http": "[::]:9127"}, {}, "--http :::9127 can be reached from other machines"),
        ({"http": "example.org:1"}, {}, "found none"),
        ({}, {"RLV3_API_TOKEN": "short"}, "at least 16 characters, has 5"),
    ],
)
def test_impossible_settings_are_named(flags, environ, found: str) -> None:
    with pytest.raises(ValueError, match=re.escape(found)):
        load_api_config(flags, environ)


def test_settings_come_from_flags_then_environment() -> None:
    environ = {"RLV3_HTTP": "[::1]:1", "RLV3_STORE": "/s", "REDIS_URL": "redis://a:1/0"}
    found = load_api_config({}, environ)
    assert (found.host, found.port, found.store) == ("::1", 1, Path("/s"))
    assert (found.redis_url, found.token) == ("redis://a:1/0", "")
    found = load_api_config({"http": "127.0.0.2:5", "store": Path("/t")}, environ)
    assert (found.host, found.port, found.store) == ("127.0.0.2", 5, Path("/t"))
