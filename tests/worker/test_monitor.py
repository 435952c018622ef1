"""Does the monitor go on, and tell, whatever lies on our streams?"""

from __future__ import annotations

import asyncio
import json
from io import StringIO

import pytest
import redis

from shadow.records import encode, encode_msgpack
from tests.shadow.test_store import decision
from tests.worker.test_metrics import status as status_of
from worker import logs
from worker.api import Api
from worker.embedded import RedisServer
from worker.keys import Keys
from worker.monitor import Monitor
from worker.status import encode as encode_status

KEYS = Keys("t")
EARLIER = {
    "symbol": "BTCUSDT", "timestamp": "2025-12-01T00:00:00+00:00", "action": 2, "confidence": 0.02,
    "value": 0.2, "source": "RL_V3_PPO", "shadow_mode": True, "trace_id": "", "raw_obs": {},
}  # fmt: skip
"""As the subscriber that our worker replaces publishes its decisions, on the same stream."""


def test_what_others_append_to_our_decisions_is_passed_over(
    redis_server: RedisServer, client: redis.Redis
) -> None:
    client.xadd(KEYS.decisions, {"payload": encode(decision(1))})
    client.xadd(KEYS.decisions, {"payload": json.dumps(EARLIER)})
    client.xadd(KEYS.decisions, {"init": "1"})
    client.xadd(KEYS.decisions, {"payload": b"\x81\xa1"})
    client.xadd(KEYS.decisions, {"payload": encode_msgpack(decision(2))})
    monitor = Monitor(redis_server.url, KEYS, None, logs.configure("ERROR", StringIO()))

    async def play() -> None:
        await monitor.look()
        await monitor.close()

    asyncio.run(play())
    assert monitor.view.redis == ""
    assert [found.decision_id for found in monitor.view.recent] == [f"{2:032x}", f"{1:032x}"]


def test_a_monitor_that_ends_by_a_bug_is_not_ready_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = StringIO()
    monitor = Monitor("redis://127.0.0.1:1/0", KEYS, None, logs.configure("INFO", out))

    async def play() -> None:
        api = Api(monitor, None, "")
        async with api.routes.router.lifespan_context(api.routes):
            await asyncio.sleep(0.1)
            answer = await api.readyz()
        assert answer.status_code == 503
        assert b"nobody looks any more: ZeroDivisionError" in answer.body

    async def broken() -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(monitor, "look", broken)
    asyncio.run(play())
    line = json.loads(out.getvalue().splitlines()[-1])
    assert line["event"] == "TASK_FAILED"
    assert "a bug" in line["msg"]


def test_rates_go_on_when_redis_s_clock_is_set_back(
    redis_server: RedisServer, client: redis.Redis
) -> None:
    monitor = Monitor(redis_server.url, KEYS, None, logs.configure("ERROR", StringIO()))
    hour_ms = 3_600_000

    async def play() -> None:
        for at_ms, decided in ((2 * hour_ms, 100), (hour_ms, 200), (hour_ms + 1_000, 230)):
            body = status_of(decisions=decided)
            client.hset(KEYS.status, mapping={"at_ms": at_ms, "body": encode_status(body)})
            await monitor.look()
        await monitor.close()

    asyncio.run(play())
    assert monitor.view.rates["decisions"] == 30.0
