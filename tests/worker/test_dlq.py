"""Can an operator see what was not decided, and send it in again without harm?"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import redis

from rlv3.errors import ConfigError
from shadow import codec
from shadow.records import Entry, decision_id
from tests.acl import ENABLED
from tests.worker.conftest import met, serving
from tests.worker.test_recorder import config_of, recording, snapshot_taken
from worker import dlq
from worker.audit import audit
from worker.embedded import RedisServer
from worker.errors import CheckFailed, RedisUnavailable
from worker.keys import Keys

KEYS = Keys()
TICKS, SIGNALS = KEYS.stream("market.tick"), KEYS.stream("signal.generated")
T0 = 1_700_000_040_000
BINARY = msgpack.packb({"symbol": "AAAUSDT", "cost": 101.0, "note": b"\xff\xfe"})
LEGACY = json.dumps({"symbol": "AAAUSDT", "cost": 102.0, "timestamp": T0 / 1e3}).encode()


def add(link: redis.Redis, n: int, payload: bytes, stream: str = TICKS) -> str:
    """Append an entry n seconds after T0; returns its id."""
    return link.xadd(stream, {b"payload": payload}, id=f"{T0 + 1_000 * n}-0").decode()


def tick(n: int) -> bytes:
    """Return the payload of a good tick."""
    body = {"symbol": "AAAUSDT", "price": 100.0 + n, "timestamp": (T0 + 1_000 * n) / 1e3}
    return json.dumps(body).encode()


def request(server: RedisServer, *ids: str, **changes: Any) -> dlq.Request:
    """Return what replays those letters, or all, without a question."""
    plain = dlq.Request(server.url, server.url, "quantum", ids, None, dry_run=False, yes=True)
    return plain._replace(**changes)


def counts(link: redis.Redis) -> dict[str, int]:
    meta = link.hgetall(KEYS.meta)
    return {k.decode()[2:]: int(v) for k, v in meta.items() if k.startswith(b"n:")}


async def counted(link: redis.Redis, entries: int) -> None:
    await met(lambda: sum(counts(link).values()) == entries)


def decisions(link: redis.Redis) -> list[dict[str, Any]]:
    return [json.loads(fields[b"payload"]) for _, fields in link.xrange(KEYS.decisions)]


@pytest.fixture
def reads_costs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return a switch: from then on the codec knows a shape that it rejected before."""
    known = codec.READERS["market.tick"]

    def extended(ref: Any, ts_us: int, body: Any) -> Any:
        if "cost" in body.values:
            body.values["price"] = body.values["cost"]
        return known(ref, ts_us, body)

    return lambda: monkeypatch.setitem(codec.READERS, "market.tick", extended)


def test_a_replay_is_decided_once_under_the_original_s_id_and_folds_nothing(
    redis_server: RedisServer,
    client: redis.Redis,
    lively_policy: Path,
    reads_costs: Any,
) -> None:
    config = config_of(redis_server, lively_policy)

    async def main() -> tuple[list[str], str, str]:
        async with serving(config) as worker:
            for n in range(0, 130, 10):
                add(client, n, tick(n))
            bad = [add(client, 131, LEGACY), add(client, 132, BINARY)]
            hopeless = add(client, 133, b"{price")
            await counted(client, 16)
            before = client.hgetall(KEYS.state("AAAUSDT"))
            reads_costs()
            await asyncio.to_thread(dlq.replay, request(redis_server))
            await counted(client, 19)
            assert client.hgetall(KEYS.state("AAAUSDT")) == before
            await asyncio.to_thread(dlq.replay, request(redis_server, f"market.tick/{bad[0]}"))
            await counted(client, 20)
        async with serving(config):  # it remembers, too
            await asyncio.to_thread(dlq.replay, request(redis_server))
            await counted(client, 23)
            add(client, 140, tick(140))
            await counted(client, 24)
        return bad, hopeless, worker.policy.digest

    bad, hopeless, digest = asyncio.run(main())
    made = decisions(client)
    replayed = [row for row in made if row["source_entry_id"] in bad]
    assert [row["decision_id"] for row in replayed] == [
        decision_id(TICKS, entry_id, digest) for entry_id in bad
    ]
    assert {row["kind"] for row in replayed} == {"advisory"}
    assert {row["source_stream"] for row in replayed} == {TICKS}
    assert all(0 <= row["latency_ms"] < 60_000 for row in replayed)  # since the replay
    assert len({row["decision_id"] for row in made}) == len(made) == 14 + 2
    assert counts(client) == {
        "market.tick:decided": 14,
        "market.tick:dead_letter": 3,
        "rl_v3.replay:decided": 2,
        "rl_v3.replay:duplicate": 3,
        "rl_v3.replay:dead_letter": 2,  # the hopeless one, each time it was sent
    }
    letters = [json.loads(f[b"payload"]) for _, f in client.xrange(KEYS.dlq("rl_v3.replay"))]
    assert [letter["original"]["replay_id"] for letter in letters] == [hopeless] * 2
    rows = [json.loads(f[b"payload"]) for _, f in client.xrange(KEYS.comparisons)]
    assert [row["entry_ids"] for row in rows if row.get("reason") == "replay"] == [
        [f"{TICKS}|{entry_id}"] for entry_id in bad
    ]


def test_what_ended_workers_becomes_a_dead_letter_and_may_be_replayed_by_name(
    redis_server: RedisServer, client: redis.Redis, lively_policy: Path, tmp_path: Path
) -> None:
    """Here nothing dies: the notes of two workers that did are put there."""
    config = config_of(redis_server, lively_policy)

    async def main() -> None:
        async with serving(config):
            ids = [add(client, n, tick(n)) for n in range(3)]
            await counted(client, 3)
        assert client.hget(KEYS.meta, "owner") == b""  # it stopped in order
        async with recording(config, tmp_path):
            await met(snapshot_taken(tmp_path))
            ids += [add(client, n, tick(n)) for n in range(3, 9)]
            note = {"place": f"{TICKS}|{ids[4]}", "tries": 2}
            client.hset(KEYS.meta, mapping={"owner": "pid 1", "suspect": json.dumps(note)})
            async with serving(config):
                await counted(client, 9)
                name = f"market.tick/{ids[4]}"
                await asyncio.to_thread(dlq.replay, request(redis_server, name))
                await counted(client, 10)

    asyncio.run(main())
    assert counts(client) == {
        "market.tick:decided": 8, "market.tick:dead_letter": 1, "rl_v3.replay:decided": 1
    }  # fmt: skip
    ((_, fields),) = client.xrange(KEYS.dlq("market.tick"))
    assert json.loads(fields[b"payload"])["dlq_reason"] == "crash"
    note = json.loads(client.hget(KEYS.meta, "suspect"))
    ((replayed, _),) = client.xrange(KEYS.replay)
    # the last one alone, and nobody died of it
    assert note == {"place": f"{KEYS.replay}|{replayed.decode()}", "tries": 0}
    found = audit(tmp_path)
    assert found.examples == []
    assert found.equal["decision"] == 6
    assert found.equal["ledger"] >= 2  # crash and replay


def test_replays_wait_at_the_sink_when_the_source_is_another_server(
    redis_server: RedisServer,
    client: redis.Redis,
    second_server: RedisServer,
    lively_policy: Path,
    reads_costs: Any,
) -> None:
    config = config_of(redis_server, lively_policy, sink_url=second_server.url)

    async def main() -> None:
        with redis.Redis.from_url(second_server.url) as sink:
            async with serving(config):
                add(client, 0, tick(0))
                add(client, 1, LEGACY)
                await counted(sink, 2)
                reads_costs()
                both = request(redis_server, sink_url=second_server.url)
                await asyncio.to_thread(dlq.replay, both)
                await counted(sink, 3)
            assert counts(sink)["rl_v3.replay:decided"] == 1
            assert [row["source_entry_id"] for row in decisions(sink)] == [
                f"{T0}-0", f"{T0 + 1_000}-0",
            ]  # fmt: skip
        assert client.keys("*") == [TICKS.encode()]

    asyncio.run(main())


def letters_about(client: redis.Redis, *entries: Entry) -> None:
    """Put dead letters there, as the worker writes them."""
    for entry in entries:
        rejected = codec.decode(entry)
        payload = codec.dead_letter(entry, rejected, 1_700_000_000_000_000)
        client.xadd(KEYS.dlq(entry.event_type), {"payload": payload})


def test_list_says_why_when_from_where_and_what(
    redis_server: RedisServer, client: redis.Redis, capsys: pytest.CaptureFixture[str]
) -> None:
    letters_about(
        client,
        Entry(TICKS, "market.tick", "5-0", {b"payload": b"{price: [1]\x00"}),
        Entry(SIGNALS, "signal.generated", "6-1", {b"payload": b'{"symbol": "AAAUSDT"}'}),
    )
    client.xadd(KEYS.dlq("market.tick"), {"payload": "not one of ours"})
    dlq.show(redis_server.url, "quantum", None, 100, as_json=True)
    first, second, *rest = capsys.readouterr().out.splitlines()
    assert not rest or rest == [""]
    found = json.loads(first)
    assert found["id"] == "market.tick/5-0"
    assert found["dlq_reason"] == "payload_not_json"
    assert found["dlq_at"] == "2023-11-14T22:13:20.000000+00:00"
    assert found["excerpt"] == "{price: [1]."
    assert json.loads(second)["id"] == "signal.generated/6-1"
    dlq.show(redis_server.url, "quantum", "signal.generated", 100, as_json=False)
    shown = capsys.readouterr().out
    assert "missing_side" in shown
    assert "market.tick" not in shown
    assert "1 dead letters, 1 shown" in shown
    dlq.show(redis_server.url, "quantum", "market.tick", 100, as_json=False)
    assert "\\" not in capsys.readouterr().out  # brackets are only brackets
    with pytest.raises(ConfigError, match="--stream must be among"):
        dlq.show(redis_server.url, "quantum", "market.tock", 100, as_json=False)


def test_what_was_cut_is_read_from_its_stream_or_cannot_be_replayed(
    redis_server: RedisServer, client: redis.Redis, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {b"payload": b'{"symbol": "AAAUSDT", "note": "' + b"x" * 5_000 + b'"}'}
    for entry_id in ("5-0", "6-0"):
        letters_about(client, Entry(TICKS, "market.tick", entry_id, fields))
    client.xadd(TICKS, dict(fields), id="5-0")
    client.xadd(TICKS, {"payload": "another one under this id"}, id="6-0")
    before = client.xinfo_stream(TICKS)
    dlq.replay(request(redis_server))
    said = capsys.readouterr().out
    assert "replay  market.tick/5-0  missing_price: from its stream" in said
    assert "cannot  market.tick/6-0" in said
    assert "keeps 4096 of 5040 bytes, and the entry is gone from its stream" in said
    ((_, sent),) = client.xrange(KEYS.replay)
    assert sent == {**fields, b"replay_stream": TICKS.encode(), b"replay_id": b"5-0"}
    assert client.xinfo_stream(TICKS) == before
    with pytest.raises(CheckFailed, match="found that 1 of them cannot be") as caught:
        dlq.replay(request(redis_server, "market.tick/6-0"))
    assert caught.value.exit_code == 4


@pytest.mark.skipif(ENABLED, reason="gives users of its own")
def test_a_replay_names_the_server_that_refused(
    redis_server: RedisServer, client: redis.Redis, second_server: RedisServer
) -> None:
    cut = {b"payload": b'{"symbol": "AAAUSDT", "note": "' + b"x" * 5_000 + b'"}'}
    mute, deaf = (
        server.url.replace("//", "//narrow:secret@") for server in (redis_server, second_server)
    )
    with redis.Redis.from_url(second_server.url) as sink:
        letters_about(
            sink,
            Entry(TICKS, "market.tick", "5-0", cut),  # the rest of it is at the source
            Entry(TICKS, "market.tick", "6-0", {b"payload": b"{"}),
        )
        for link, rules in ((client, ["+ping"]), (sink, ["+ping", "+xrange", "+hget"])):
            link.acl_setuser("narrow", True, nopass=True, keys=["*"], commands=rules)
        with pytest.raises(RedisUnavailable) as caught:
            dlq.replay(request(redis_server, source_url=mute, sink_url=second_server.url))
        assert str(caught.value).startswith(
            f"expected Redis at {redis_server.url} to let us read what the letters are about, found"
        )
        with pytest.raises(RedisUnavailable) as caught:
            dlq.replay(request(redis_server, "market.tick/6-0", sink_url=deaf))
        assert str(caught.value).startswith(
            f"expected Redis at {second_server.url} to take replays, found"
        )
        assert sink.exists(KEYS.replay) == 0
    client.acl_deluser("narrow")


def test_replay_asks_first_and_leaves_out_what_would_do_harm_or_nothing(
    redis_server: RedisServer,
    client: redis.Redis,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    deadly = Entry(TICKS, "market.tick", "7-0", {b"payload": tick(0)})
    letter = codec.dead_letter(deadly, codec.crashed(deadly, 3), 0)
    client.xadd(KEYS.dlq("market.tick"), {"payload": letter})
    letters_about(
        client,
        Entry(TICKS, "market.tick", "5-0", {b"payload": b"{"}),
        Entry(KEYS.stream("trade.closed"), "trade.closed", "5-0", {b"payload": b"{"}),
    )
    dlq.replay(request(redis_server, dry_run=True))
    said = capsys.readouterr().out
    assert "cannot  market.tick/7-0  crash: ended the worker before; name it to try again" in said
    assert "cannot  trade.closed/5-0  payload_not_json: entries of trade.closed are not" in said
    assert "1 of 3 dead letters can be replayed" in said
    monkeypatch.setattr("typer.confirm", lambda _: False)
    dlq.replay(request(redis_server, yes=False))
    assert client.exists(KEYS.replay) == 0
    monkeypatch.setattr("worker.dlq.KEPT", 0)
    with pytest.raises(CheckFailed, match="at most 0 replays to wait"):
        dlq.replay(request(redis_server))
    monkeypatch.undo()
    dlq.replay(request(redis_server, "market.tick/7-0"))
    assert client.xlen(KEYS.replay) == 1
    for wrong, sentence in (("7-0", "as `dlq list` prints"), ("market.tick/9-0", "found none")):
        with pytest.raises(ConfigError, match=sentence):
            dlq.replay(request(redis_server, wrong))
