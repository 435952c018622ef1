"""Are entries read in one order, and is every commit written exactly once, by its owner only?"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import AsyncIterator, Callable
from datetime import datetime
from typing import Any, ClassVar

import hiredis
import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from shadow.records import Commit, Output
from worker.bus import Bus, BusError, Start, StateLost, release, shown
from worker.embedded import RedisServer
from worker.errors import CheckFailed, Fenced, RedisUnavailable
from worker.keys import Keys
from worker.losses import Loss

KEYS = Keys("t")
INPUTS = ("market.tick", "signal.generated", "rl_v2.decision")
TICKS, SIGNALS, V2 = map(KEYS.stream, INPUTS)
BODY = {b"payload": b"{}"}


def a_commit(text: str, cursor: str = "5-0", **changes: Any) -> Commit:
    """Return a commit of one entry: a decision, a cell, a counter and a cursor."""
    commit = Commit(
        outputs=[Output("rl_v3.decision", b'{"n":"%s"}' % text.encode(), "trace", "corr")],
        cells={"BTCUSDT": {"open": text.encode()}},
        cursors={TICKS: cursor},
        counts={("market.tick", "decided"): 1},
        taken=1,
    )
    return commit._replace(**changes)


@contextlib.asynccontextmanager
async def opened(source: str, sink: str | None = None, **options: Any) -> AsyncIterator[Bus]:
    """Connect a bus."""
    bus = Bus(source, sink or source, KEYS, INPUTS, **options)
    try:
        await bus.connect()
        yield bus
    finally:
        await bus.close()


async def acquire(bus: Bus, start: str = "new", on_gap: str = "fail", owner: str = "me") -> Start:
    """Take the epoch."""
    return await bus.acquire(start=start, on_gap=on_gap, owner=owner)


def ids(entries: list[Any]) -> list[tuple[str, str]]:
    """Return (logical stream, id) of entries."""
    return [(entry.event_type, entry.entry_id) for entry in entries]


# -- start ----------------------------------------------------------------------------------------


def test_first_start_new_begins_after_what_is_there(redis_server, client) -> None:
    client.xadd(TICKS, BODY, id="1-1")

    async def play() -> None:
        async with opened(redis_server.url) as bus:
            start = await acquire(bus)
            assert (start.epoch, start.seq, start.gap) == (1, 0, "")
            assert start.absent == [SIGNALS, V2]
            assert bus.cursors == {TICKS: "1-1", SIGNALS: "0-0", V2: "0-0"}
            assert (await bus.read(10)).entries == []
            client.xadd(TICKS, BODY, id="1-2")
            assert ids((await bus.read(10)).entries) == [("market.tick", "1-2")]

    asyncio.run(play())


def test_first_start_oldest_reads_everything_in_one_order(redis_server, client) -> None:
    for key, entry_id in (
        (TICKS, "10-0"), (TICKS, "10-2"), (TICKS, "12-0"),
        (SIGNALS, "10-0"), (SIGNALS, "11-0"), (V2, "10-1"),
    ):  # fmt: skip
        client.xadd(key, BODY, id=entry_id)

    async def play() -> None:
        async with opened(redis_server.url) as bus:
            await acquire(bus, "oldest")
            batch = await bus.read(10)
            assert ids(batch.entries) == [
                ("market.tick", "10-0"),
                ("signal.generated", "10-0"),  # same id: by rank
                ("rl_v2.decision", "10-1"),
                ("market.tick", "10-2"),
                ("signal.generated", "11-0"),
                ("market.tick", "12-0"),
            ]
            assert batch.entries[0].fields == BODY
            assert batch.ahead == 0
            now_ms = client.time()[0] * 1000
            assert batch.lag_ms == pytest.approx(now_ms - 10, abs=2000)

    asyncio.run(play())


def test_second_start_keeps_the_cursors_of_the_first(redis_server, client) -> None:
    async def play() -> None:
        async with opened(redis_server.url) as bus:
            await acquire(bus)
            client.xadd(TICKS, BODY, id="7-0")
            start = await acquire(bus)
            assert (start.epoch, start.seq) == (2, 0)
            assert bus.cursors[TICKS] == "0-0"
            assert ids((await bus.read(10)).entries) == [("market.tick", "7-0")]

    asyncio.run(play())


def test_restart_loads_cells_counters_and_fields(redis_server) -> None:
    async def play() -> None:
        async with opened(redis_server.url) as bus:
            await acquire(bus)
            cells = {"": {"own": b"\x00\xff"}, "BTCUSDT": {"open": b"o", "d1": b"d"}}
            await bus.commit(a_commit("a", cells=cells), meta={"policy": "p", "frozen": "{}"})
            start = await acquire(bus)
            assert start.cells == cells
            assert start.counts == {("market.tick", "decided"): 1}
            assert (start.seq, start.policy, start.frozen) == (1, "p", "{}")
            assert (start.added, start.gap) == ([], "")

    asyncio.run(play())


def test_absent_stream_is_read_from_its_first_entry_when_it_appears(redis_server, client) -> None:
    async def play() -> None:
        async with opened(redis_server.url) as bus:
            await acquire(bus)
            assert (await bus.read(10)).entries == []
            client.xadd(SIGNALS, BODY, id="3-0")
            assert ids((await bus.read(10)).entries) == [("signal.generated", "3-0")]

    asyncio.run(play())


def test_added_input_is_reported_and_starts_at_its_last_id(redis_server, client) -> None:
    client.xadd(V2, BODY, id="4-0")

    async def play() -> None:
        first = Bus(redis_server.url, redis_server.url, KEYS, INPUTS[:2])
        await acquire(first)
        await first.close()
        async with opened(redis_server.url) as bus:
            start = await acquire(bus)
            assert (start.added, bus.cursors[V2]) == ([V2], "4-0")

    asyncio.run(play())


# -- incidents ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gone", "sentence"),
    [
        (KEYS.meta, "the cursors are missing although our outputs or state exist"),
        (KEYS.state("BTCUSDT"), "the state of 1 symbols is missing although the cursors exist"),
        (KEYS.symbols, "the state of 1 symbols is missing although the cursors exist"),
    ],
)
def test_missing_state_is_refused_or_reported_once(redis_server, client, gone, sentence) -> None:
    client.xadd(TICKS, BODY, id="9-0")

    async def play() -> None:
        async with opened(redis_server.url) as bus:
            await acquire(bus)
            await bus.commit(a_commit("a", "9-0"))
            client.delete(gone)
            with pytest.raises(CheckFailed, match=sentence):
                await acquire(bus)
            start = await acquire(bus, on_gap="resume-oldest")
            assert start.gap == sentence
            assert bus.cursors[TICKS] == ("0-0" if gone == KEYS.meta else "9-0")
            await bus.commit(a_commit("b", "9-0", cells={"BTCUSDT": {"arms": b"new"}}))
            again = await acquire(bus)
            assert again.gap == ""
            if gone != KEYS.meta:  # nothing of the lost state survives in the new one
                assert again.cells == {"BTCUSDT": {"arms": b"new"}}

    asyncio.run(play())


def test_symbols_that_vanish_while_running_are_missed_at_the_next_start(
    redis_server, client
) -> None:
    async def play() -> None:
        async with opened(redis_server.url) as bus:
            await acquire(bus)
            await bus.commit(a_commit("a", "9-0"))
            client.delete(KEYS.symbols)
            cells = {"BTCUSDT": {"arms": b"more"}, "ETHUSDT": {"open": b"new"}}
            await bus.commit(a_commit("b", "9-1", cells=cells))
            with pytest.raises(CheckFailed, match="the state of 1 symbols is missing"):
                await acquire(bus)

    asyncio.run(play())
    assert client.hgetall(KEYS.state("BTCUSDT")) == {b"open": b"a", b"arms": b"more"}


def test_symbol_without_cells_is_not_taken_for_stored(redis_server, client) -> None:
    async def play() -> None:
        async with opened(redis_server.url) as bus:
            await acquire(bus)
            await bus.commit(a_commit("a", cells={"BTCUSDT": {}}))
            await bus.commit(a_commit("b", "5-1", cells={"BTCUSDT": {"open": b"b"}}))

    asyncio.run(play())
    assert client.smembers(KEYS.symbols) == {b"BTCUSDT"}
    assert client.hget(KEYS.meta, "symbols") == b"1"


def test_missing_cursors_resume_at_the_latest_when_told(redis_server, client) -> None:
    client.xadd(TICKS, BODY, id="9-0")
    client.xadd(KEYS.decisions, BODY)

    async def play() -> None:
        async with opened(redis_server.url) as bus:
            await acquire(bus, on_gap="resume-latest")
            assert bus.cursors[TICKS] == "9-0"

    asyncio.run(play())


def test_meta_lost_while_running_is_noticed_by_every_write(redis_server, client) -> None:
    async def play() -> None:
        async with opened(redis_server.url) as bus:
            await acquire(bus)
            client.flushall()
            with pytest.raises(StateLost, match="is gone"):
                await bus.commit(a_commit("a"))
            with pytest.raises(StateLost, match="is gone"):
                await bus.trim()
            with pytest.raises(StateLost, match="is gone"):
                await bus.suspect("stream|1-0", 1)
            assert client.dbsize() == 0

    asyncio.run(play())


def test_a_redis_that_went_back_is_started_from_again_and_fences_nobody(
    redis_server, client
) -> None:
    async def play() -> None:
        async with opened(redis_server.url) as bus:
            await acquire(bus)
            await acquire(bus)
            earlier = client.hgetall(KEYS.meta)
            await bus.commit(a_commit("a"))
            client.hset(KEYS.meta, mapping=earlier)  # as a promoted replica has it
            with pytest.raises(StateLost, match="forgot commits that it had applied"):
                await bus.commit(a_commit("b", "6-0"))
            with pytest.raises(StateLost, match="forgot commits that it had applied"):
                await bus.trim()  # there may be nothing to commit for long
            client.hset(KEYS.meta, "epoch", 1)
            for attempt in (
                lambda: bus.commit(a_commit("b", "6-0")),
                bus.trim,
                lambda: bus.suspect("stream|1-0", 1),
            ):
                with pytest.raises(StateLost, match="expected to own epoch 2, found epoch 1"):
                    await attempt()
            assert (await acquire(bus)).epoch == 2
            assert await bus.commit(a_commit("a")) == "OK"

    asyncio.run(play())
    assert client.xlen(KEYS.decisions) == 2


@pytest.mark.parametrize("start", ["new", "oldest"])
def test_entries_trimmed_before_we_read_them_are_counted(
    redis_server, client, start, monkeypatch
) -> None:
    monkeypatch.setattr("worker.bus.LOSS_CHECK_S", 0.0)
    fill(client, TICKS, 20)()
    client.xtrim(TICKS, maxlen=5, approximate=False)  # before the start: nobody's loss

    async def play() -> None:
        read = 0
        async with opened(redis_server.url) as bus:

            async def follow() -> dict[str, Loss]:
                nonlocal read
                batch = await bus.read(100)
                if batch.entries:
                    read += len(batch.entries)
                    counts = {("market.tick", "decided"): read}
                    await bus.commit(a_commit("a", batch.entries[-1].entry_id, counts=counts))
                return batch.lost

            def add(first: int, last: int, kept: int) -> None:
                for n in range(first, last):
                    client.xadd(TICKS, BODY, id=f"{n}-0")
                client.xtrim(TICKS, maxlen=kept, approximate=False)

            await acquire(bus, start, "resume-oldest")
            assert await follow() == {}
            assert read == (5 if start == "oldest" else 0)
            exact = bus.servers[0].tier == "7"
            add(100, 150, kept=8)
            hole = Loss(42 if exact else None, "20-0", f"141-{2**64 - 1}")
            assert await follow() == {"market.tick": hole}
            assert await follow() == {}
            assert bus.lost_total() == ({"market.tick": 42} if exact else {})
            await acquire(bus, on_gap="resume-oldest")  # a restart goes on counting
            add(200, 210, kept=0)
            hole = Loss(10 if exact else None, "149-0", "209-0")
            assert await follow() == {"market.tick": hole}
            await bus.commit(a_commit("b", cursors={}, counts={}))
            assert await follow() == {}
            assert bus.cursors[TICKS] == "209-0"
            assert client.hget(KEYS.meta, "lost:market.tick") == (b"52" if exact else None)

    asyncio.run(play())


@pytest.mark.parametrize("kept", [0, 3])
def test_a_hole_is_skipped_to_the_end_or_refused_when_told(redis_server, client, kept) -> None:
    async def play() -> None:
        async with opened(redis_server.url) as bus:
            await acquire(bus)
            await bus.commit(a_commit("a", "5-0", counts={}))
            for n in range(10, 30):
                client.xadd(TICKS, BODY, id=f"{n}-0")
                client.xadd(SIGNALS, BODY, id=f"{n}-0")
            client.xtrim(TICKS, maxlen=kept, approximate=False)
            await acquire(bus, on_gap="fail")
            with pytest.raises(CheckFailed, match="entries were trimmed before they were read"):
                await bus.read(100)
            await acquire(bus, on_gap="resume-latest")
            batch = await bus.read(100)
            exact = bus.servers[0].tier == "7"
            assert batch.lost == {"market.tick": Loss(20 if exact else None, "5-0", "29-0")}
            assert {entry.event_type for entry in batch.entries} == {"signal.generated"}
            assert (await bus.read(100)).lost == {}

    asyncio.run(play())


@pytest.mark.parametrize(
    ("on_gap", "upto"), [("resume-oldest", f"8-{2**64 - 1}"), ("resume-latest", "9-0")]
)
def test_a_stream_that_began_anew_below_ids_in_the_future_is_read_again(
    redis_server, client, on_gap, upto
) -> None:
    """Whoever deletes a stream to be rid of such ids would else be read in the future only."""

    async def play() -> None:
        async with opened(redis_server.url) as bus:
            await acquire(bus)
            far = f"{int(time.time() * 1_000) + 3_600_000}-0"
            client.xadd(TICKS, BODY, id=far)
            assert (await bus.read(10)).ahead == 1
            await bus.commit(a_commit("a", far, counts={("market.tick", "decided"): 1}))
            client.delete(TICKS)
            client.xadd(TICKS, BODY, id="9-0")
            await acquire(bus, on_gap="fail")
            with pytest.raises(CheckFailed, match="found that it began anew"):
                await bus.read(10)
            await acquire(bus, on_gap=on_gap)
            lost = Loss(None, far, upto)
            assert (await bus.read(10)).lost == {"market.tick": lost}
            client.xadd(TICKS, BODY, id="10-0")
            batch = await bus.read(10)
            read = [entry.entry_id for entry in batch.entries]
            assert read == (["10-0"] if upto == "9-0" else ["9-0", "10-0"])
            assert batch.lost == {}

    asyncio.run(play())


# -- limits ---------------------------------------------------------------------------------------


class Slow:
    """A server that logs everybody in and answers each command after a pause, or not at all."""

    ANSWERS: ClassVar = {b"EXEC": b"*2\r\n*2\r\n$1\r\n9\r\n$1\r\n0\r\n*-1\r\n"}

    def __init__(self, pause_s: float = 0.0) -> None:
        self.pause_s = pause_s
        self.silent = False

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        parser = hiredis.Reader()
        while data := await reader.read(4096):
            parser.feed(data)
            while (command := parser.gets()) is not False:
                await asyncio.sleep(self.pause_s)
                if not self.silent:
                    writer.write(self.ANSWERS.get(command[0], b"+OK\r\n"))
        writer.close()

    @contextlib.asynccontextmanager
    async def serve(self) -> AsyncIterator[Bus]:
        """Return a bus that has to log in here and waits 0.3 s for an answer."""
        server = await asyncio.start_server(self.answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server:
            bus = Bus(
                f"redis://me:pw@127.0.0.1:{port}/0?socket_timeout=0.3", "redis://x", KEYS, INPUTS
            )
            bus.cursors = dict.fromkeys((TICKS, SIGNALS, V2), "0-0")
            try:
                yield bus
            finally:
                await bus.close()


def test_login_that_is_not_answered_ends() -> None:
    async def play() -> None:
        slow = Slow()
        async with slow.serve() as bus:
            await bus.wait()
            await bus.drop()
            slow.silent = True
            with pytest.raises(BusError):
                await asyncio.wait_for(bus.wait(), 5.0)

    asyncio.run(play())


def test_every_answer_has_its_own_time() -> None:
    async def play() -> None:
        slow = Slow()
        async with slow.serve() as bus:
            await bus.wait()
            slow.pause_s = 0.2
            began = time.monotonic()
            await bus.read(1)  # MULTI, TIME, XREAD and more, each a pause
            assert time.monotonic() - began > 0.3
            slow.silent = True
            with pytest.raises(BusError, match=r"no answer within 0\.3 s"):
                await asyncio.wait_for(bus.wait(), 5.0)

    asyncio.run(play())


def test_socket_of_this_machine_is_a_bus(binary, tmp_path) -> None:
    async def play() -> None:
        async with opened(server.url) as bus:
            await acquire(bus)
            assert await bus.commit(a_commit("a")) == "OK"

    with RedisServer.start(binary, unix=True) as server:
        assert server.url.startswith("unix://")
        asyncio.run(play())


# -- the release rule -----------------------------------------------------------------------------


def rows(*entry_ids: str) -> list[Any]:
    """Return stream rows as Redis replies them."""
    return [[entry_id.encode(), [b"payload", b"{}"]] for entry_id in entry_ids]


def test_release_holds_what_the_current_millisecond_may_still_precede() -> None:
    found = [(0, TICKS, "market.tick", rows("99-0", "100-0")), (1, SIGNALS, "s", rows("99-5"))]
    released, held, ahead = release(found, 100, 10)
    assert [entry.entry_id for entry in released] == ["99-0", "99-5"]
    assert (held, ahead) == (100, 0)


def test_release_stops_at_the_last_id_of_a_stream_that_count_cut() -> None:
    found = [
        (0, TICKS, "market.tick", rows("10-0", "11-0")),  # cut: there may be more after 11-0
        (1, SIGNALS, "s", rows("11-0")),
        (2, V2, "v", rows("11-1")),
    ]
    released, held, _ = release(found, 100, 2)
    assert [entry.entry_id for entry in released] == ["10-0", "11-0", "11-0"]
    assert held == 11
    assert release(found, 100, 3)[0][-1].entry_id == "11-1"


def test_release_lets_ids_far_ahead_go_as_read() -> None:
    found = [
        (0, TICKS, "market.tick", rows("1101-0", "1102-0")),
        (1, SIGNALS, "s", rows("50-0", "1100-0")),
    ]
    released, held, ahead = release(found, 100, 10)
    assert [entry.entry_id for entry in released] == ["50-0", "1101-0", "1102-0"]
    assert (held, ahead) == (1100, 2)


@given(
    few=st.lists(st.tuples(st.integers(0, 100), st.integers(1, 2)), max_size=4, unique=True),
)
def test_release_puts_a_few_entries_among_many_in_order(few) -> None:
    """So few are put in one by one; more are sorted, as in the test below."""
    names, at = (TICKS, SIGNALS, V2), {0: [(ms, 0) for ms in range(1, 100)], 1: [], 2: []}
    for ms, rank in few:
        at[rank].append((ms, 0))
    found = [
        (rank, names[rank], "x", rows(*(f"{ms}-{seq}" for ms, seq in sorted(ids_))))
        for rank, ids_ in at.items()
        if ids_
    ]
    expected = sorted((*id_, rank) for rank, ids_ in at.items() for id_ in ids_)
    released = release(found, 10_000, 1_000)[0]
    assert [(int(e.entry_id[:-2]), 0, names.index(e.stream)) for e in released] == expected


ENTRY_IDS = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 2)), max_size=12, unique=True)


@given(streams=st.lists(ENTRY_IDS, min_size=3, max_size=3), count=st.integers(1, 5),
       clock=st.lists(st.integers(1, 40), max_size=20))  # fmt: skip
def test_release_gives_the_same_order_however_reading_is_cut(streams, count, clock) -> None:
    names = (TICKS, SIGNALS, V2)
    expected = sorted((ms, seq, r) for r, row in enumerate(streams) for ms, seq in row)
    cursors = [(0, 0)] * 3
    got: list[tuple[int, int, int]] = []
    for now in [*sorted(clock), *[10_000] * 40]:
        found = []
        for rank, row in enumerate(streams):
            # what XADD * has appended by now, after our cursor, cut by COUNT
            there = sorted(i for i in row if i[0] <= now and i > cursors[rank])[:count]
            if there:
                found.append((rank, names[rank], "x", rows(*(f"{ms}-{seq}" for ms, seq in there))))
        for entry in release(found, now, count)[0]:
            rank = names.index(entry.stream)
            ms, seq = (int(part) for part in entry.entry_id.split("-"))
            cursors[rank] = (ms, seq)
            got.append((ms, seq, rank))
    assert got == expected


def test_reading_sent_ahead_is_what_a_reading_after_the_commit_would_have_been(
    redis_server, client
) -> None:
    for n in range(1, 8):
        client.xadd(TICKS if n % 2 else SIGNALS, BODY, id=f"{n}-0")

    async def play() -> None:
        async with opened(redis_server.url) as bus:
            await acquire(bus, "oldest")
            first = await bus.read(2)
            assert (ids(first.entries)[-1], bus.behind) == (("market.tick", "3-0"), True)
            bus.ask(first.entries, 2)
            await asyncio.sleep(0.1)  # the answer is here before the commit
            if bus.servers[0].counts:  # 6.2 cannot tell what was read from what was lost
                client.xtrim(TICKS, minid="6-0", approximate=False)
            cursors = {TICKS: "3-0", SIGNALS: "2-0"}
            counts = {("market.tick", "decided"): 2, ("signal.generated", "decided"): 1}
            await bus.commit(a_commit("a", cursors=cursors, counts=counts))
            second = await bus.read(2)
            assert ids(second.entries) == [
                ("signal.generated", "4-0"), ("market.tick", "5-0"), ("signal.generated", "6-0"),
            ]  # fmt: skip
            assert second.lost == {}  # 5-0 was read before it was trimmed
            bus.ask(second.entries, 2)
            cursors = {TICKS: "5-0", SIGNALS: "4-0"}  # not all of them
            counts = {("market.tick", "decided"): 3, ("signal.generated", "decided"): 2}
            await bus.commit(a_commit("b", cursors=cursors, counts=counts))
            third = ids((await bus.read(2)).entries)
            assert third == [("signal.generated", "6-0"), ("market.tick", "7-0")]

    asyncio.run(play())


@contextlib.asynccontextmanager
async def behind(client: Any, source: str, sink: str | None = None) -> AsyncIterator[Any]:
    """Give a bus that has read two of four ticks, and that reading."""
    for n in range(1, 5):
        client.xadd(TICKS, BODY, id=f"{n}-0")
    async with opened(source, sink) as bus:
        await acquire(bus, "oldest")
        yield bus, await bus.read(2)


@pytest.mark.parametrize("two", [False, True])
def test_answer_to_a_reading_sent_ahead_is_taken(redis_server, second_server, client, two) -> None:
    async def play() -> None:
        sink = second_server.url if two else None
        async with behind(client, redis_server.url, sink) as (bus, first):
            bus.ask(first.entries, 10)
            await asyncio.sleep(0.1)
            client.xadd(TICKS, BODY, id="5-0")  # too late for that answer
            counts = {("market.tick", "decided"): 2}
            await bus.commit(a_commit("a", cursors={TICKS: "2-0"}, counts=counts))
            assert ids((await bus.read(10)).entries) == [("market.tick", f"{n}-0") for n in (3, 4)]
            assert ids((await bus.read(10)).entries)[-1] == ("market.tick", "5-0")

    asyncio.run(play())


def test_answer_to_a_reading_sent_ahead_is_nobody_elses(redis_server, client) -> None:
    async def play() -> None:
        async with behind(client, redis_server.url) as (bus, first):
            bus.ask(first.entries, 2)
            await asyncio.sleep(0)  # sent, and not answered
            await acquire(bus)
            assert ids((await bus.read(2)).entries) == ids(first.entries)
            bus.ask(first.entries, 2)
            await asyncio.sleep(0)
            await bus.drop()
            assert asyncio.all_tasks() == {asyncio.current_task()}
            assert ids((await bus.read(2)).entries) == ids(first.entries)

    asyncio.run(play())


def test_reading_sent_ahead_that_fails_is_told_to_who_reads(redis_server, client) -> None:
    async def play() -> None:
        async with behind(client, redis_server.url) as (bus, first):
            bus.ask(first.entries, 2)
            client.client_kill_filter(_type="normal", skipme=True)
            await asyncio.sleep(0.05)
            bus.cursors[TICKS] = "2-0"
            with pytest.raises(BusError):
                await bus.read(2)
            assert ids((await bus.read(2)).entries) == [
                ("market.tick", "3-0"),
                ("market.tick", "4-0"),
            ]

    asyncio.run(play())


def test_entry_of_the_current_millisecond_is_read_a_moment_later(redis_server, client) -> None:
    async def play() -> None:
        async with opened(redis_server.url) as bus:
            await acquire(bus)
            seconds, micros = client.time()
            entry_id = f"{seconds * 1000 + micros // 1000 + 40}-0"  # 40 ms from now
            client.xadd(TICKS, BODY, id=entry_id)
            batch = await bus.read(10)
            assert batch.entries == []
            turns = 0
            while not batch.entries:
                await bus.wait()
                batch = await bus.read(10)
                turns += 1
            assert ids(batch.entries) == [("market.tick", entry_id)]
            assert turns < 60  # it sleeps, it does not spin
            assert batch.lag_ms < 50

    asyncio.run(play())


def test_wait_returns_at_once_when_an_entry_comes_and_within_a_second_otherwise(
    redis_server, client
) -> None:
    async def play() -> None:
        async with opened(redis_server.url) as bus:
            await acquire(bus)
            await bus.read(10)
            timer = threading.Timer(0.1, client.xadd, (SIGNALS, BODY))
            timer.start()
            began = time.monotonic()
            await bus.wait()
            assert 0.05 < time.monotonic() - began < 0.8
            timer.join()
            batch = await bus.read(10)
            while not batch.entries:
                batch = await bus.read(10)
            await bus.commit(a_commit("a", "0-1", cursors={SIGNALS: batch.entries[0].entry_id}))
            began = time.monotonic()
            await bus.wait()
            assert 0.9 < time.monotonic() - began < 1.5

    asyncio.run(play())


def test_history_returns_the_newest_up_to_an_id_oldest_first(redis_server, client) -> None:
    for n in range(1, 6):
        client.xadd(TICKS, BODY, id=f"{n}-0")

    async def play() -> None:
        async with opened(redis_server.url) as bus:
            entries = await bus.history("market.tick", "4-0", 2)
            assert ids(entries) == [("market.tick", "3-0"), ("market.tick", "4-0")]
            assert await bus.history("market.tick", "0-0", 2) == []

    asyncio.run(play())


@pytest.mark.parametrize(
    ("there", "asked"), [(1_203, 1_100), (1_203, 1_000), (1_203, 5_000), (500, 600)]
)
def test_history_in_pages_leaves_nothing_out(redis_server, client, there, asked) -> None:
    with client.pipeline() as pipe:
        for n in range(there):
            pipe.xadd(TICKS, BODY, id=f"{1 + n // 3}-{n % 3}")
        pipe.execute()

    async def play() -> None:
        async with opened(redis_server.url) as bus:
            newest = client.xrevrange(TICKS, count=1)[0][0].decode()
            entries = await bus.history("market.tick", newest, asked)
            expected = [entry_id.decode() for entry_id, _ in client.xrange(TICKS)][-asked:]
            assert [entry.entry_id for entry in entries] == expected

    asyncio.run(play())


# -- the commit -----------------------------------------------------------------------------------


def test_commit_writes_everything_in_production_envelopes(redis_server, client) -> None:
    async def play() -> None:
        async with opened(redis_server.url) as bus:
            await acquire(bus)
            outputs = [
                Output("rl_v3.decision", b"{}", "t", "c"),
                Output("rl_v3.comparison", b'{"k":1}'),
                Output("dlq:market.tick", b'{"why":1}'),
            ]
            commit = a_commit("a", outputs=outputs, counts={("market.tick", "late"): 3})
            assert await bus.commit(commit, meta={"run_id": "r"}) == "OK"
            assert (bus.seq, bus.cursors[TICKS]) == (1, "5-0")

    asyncio.run(play())
    ((_, envelope),) = client.xrange(KEYS.decisions)
    stamp = envelope.pop(b"timestamp").decode()
    assert len(stamp) == len("2026-01-01T00:00:00.000000")  # naive UTC, as the bus's client reads
    assert abs(time.time() - datetime.fromisoformat(f"{stamp}+00:00").timestamp()) < 60.0
    assert envelope == {
        b"event_type": b"rl_v3.decision",
        b"payload": b"{}",
        b"trace_id": b"t",
        b"correlation_id": b"c",
        b"source": b"rl-v3-shadow",
    }
    assert client.xlen(KEYS.comparisons) == client.xlen(KEYS.dlq("market.tick")) == 1
    assert client.hgetall(KEYS.state("BTCUSDT")) == {b"open": b"a"}
    assert client.smembers(KEYS.symbols) == {b"BTCUSDT"}
    meta = client.hgetall(KEYS.meta)
    assert (meta[b"n:market.tick:late"], meta[b"run_id"], meta[b"epoch"]) == (b"3", b"r", b"1")
    assert json.loads(meta[b"cursors"]) == {TICKS: "5-0", SIGNALS: "0-0", V2: "0-0", "seq": 1}


def test_commit_to_a_stream_that_is_not_ours_is_impossible(redis_server, client) -> None:
    async def play() -> None:
        async with opened(redis_server.url) as bus:
            await acquire(bus)
            with pytest.raises(KeyError):
                await bus.commit(a_commit("a", outputs=[Output("trade.intent", b"{}")]))

    asyncio.run(play())
    assert not client.exists(KEYS.stream("trade.intent"))


def test_forgotten_state_is_gone_before_the_new_one_is_kept(redis_server, client) -> None:
    async def play() -> None:
        async with opened(redis_server.url) as bus:
            await acquire(bus)
            await bus.commit(a_commit("a", cells={"BTCUSDT": {"open": b"bad", "d9": b"bad"}}))
            await bus.commit(a_commit("b", cells={"BTCUSDT": {"open": b"n"}}), forget=["BTCUSDT"])

    asyncio.run(play())
    assert client.hgetall(KEYS.state("BTCUSDT")) == {b"open": b"n"}


def test_lost_reply_is_repeated_and_written_once(redis_server, client, proxy) -> None:
    async def play() -> None:
        async with opened(proxy.url) as bus:
            await acquire(bus)
            await bus.commit(a_commit("a"))
            proxy.lose_replies = 1
            with pytest.raises(BusError, match=r"127\.0\.0\.1"):
                await bus.commit(a_commit("b", "6-0"))
            assert client.xlen(KEYS.decisions) == 2  # it was applied, we do not know yet
            assert bus.cursors[TICKS] == "5-0"
            assert await bus.commit(a_commit("b", "6-0")) == "DUP"
            assert bus.cursors[TICKS] == "6-0"
            assert await bus.commit(a_commit("c", "7-0")) == "OK"

    asyncio.run(play())
    assert client.xlen(KEYS.decisions) == 3


def test_first_owner_is_fenced_at_its_next_commit(redis_server, client) -> None:
    async def play() -> None:
        async with opened(redis_server.url) as one, opened(redis_server.url) as two:
            await acquire(one, owner="one")
            await one.commit(a_commit("a"))
            start = await acquire(two, owner="pid 2")
            assert start.cells == {"BTCUSDT": {"open": b"a"}}
            assert await two.commit(a_commit("b", "6-0")) == "OK"
            sentence = r"expected to own epoch 1 in .*, found epoch 2 owned by pid 2"
            with pytest.raises(Fenced, match=sentence) as caught:
                await one.commit(a_commit("z", "6-0"))
            assert caught.value.exit_code == 3
            with pytest.raises(Fenced):
                await one.trim()

    asyncio.run(play())
    assert client.xlen(KEYS.decisions) == 2


def test_a_fenced_worker_suspects_nothing(redis_server, client) -> None:
    async def play() -> None:
        async with opened(redis_server.url) as one, opened(redis_server.url) as two:
            await acquire(one)
            await one.suspect("stream|1-0", 1)
            assert (await acquire(two)).suspect == ("stream|1-0", 1)
            await two.suspect("stream|2-0", 2)
            with pytest.raises(Fenced, match="found epoch 2"):
                await one.suspect("stream|1-0", 2)
            assert json.loads(client.hget(KEYS.meta, "suspect")) == {
                "place": "stream|2-0", "tries": 2,
            }  # fmt: skip

    asyncio.run(play())


def test_same_epoch_with_other_cursors_is_a_conflict(redis_server, client) -> None:
    async def play() -> None:
        async with opened(redis_server.url) as bus:
            await acquire(bus)
            client.hset(KEYS.meta, "cursors", '{"seq":9}')
            with pytest.raises(Fenced, match=r"found \{\"seq\":9\}"):
                await bus.commit(a_commit("a"))

    asyncio.run(play())
    assert not client.exists(KEYS.decisions)


def test_out_of_memory_applies_nothing_and_passes(redis_server, client) -> None:
    async def play() -> None:
        async with opened(redis_server.url) as bus:
            await acquire(bus)
            client.config_set("maxmemory", 1)
            try:
                for commit in (a_commit("a"), a_commit("a", outputs=[])):
                    with pytest.raises(BusError, match=r"OOM|maxmemory"):
                        await bus.commit(commit)
                assert client.exists(KEYS.decisions, KEYS.state("BTCUSDT")) == 0
            finally:
                client.config_set("maxmemory", 0)
            assert await bus.commit(a_commit("a")) == "OK"

    asyncio.run(play())


def test_msgpack_codec_converts_ours_but_not_dead_letters(redis_server, client) -> None:
    async def play() -> None:
        async with opened(redis_server.url, codec="msgpack") as bus:
            await acquire(bus)
            dead = Output("dlq:market.tick", b'{"n":1}')
            await bus.commit(a_commit("a", outputs=[Output("rl_v3.decision", b'{"n":1}'), dead]))

    asyncio.run(play())
    assert client.xrange(KEYS.decisions)[0][1][b"payload"] == b"\x81\xa1n\x01"
    assert client.xrange(KEYS.dlq("market.tick"))[0][1][b"payload"] == b'{"n":1}'


# -- trimming -------------------------------------------------------------------------------------


def trimmed(url: str, prepare: Callable[[], object], **caps: int) -> int:
    """Return what trim reports dropped, after enough calls."""

    async def play() -> int:
        async with opened(url, **caps) as bus:
            await acquire(bus, on_gap="resume-oldest")
            prepare()
            return sum([await bus.trim() for _ in range(10)])

    return asyncio.run(play())


def fill(client: redis.Redis, key: str, n: int) -> Callable[[], object]:
    """Return a function that appends entries with ids 1-0 … n-0."""

    def add() -> None:
        with client.pipeline(transaction=False) as pipe:
            for i in range(1, n + 1):
                pipe.xadd(key, BODY, id=f"{i}-0")
            pipe.execute()

    return add


@pytest.mark.parametrize("key", [KEYS.comparisons, KEYS.decisions])
def test_collected_entries_go_beyond_the_newest_ten_thousand(redis_server, client, key) -> None:
    client.hset(KEYS.collected, key, "10500-0")
    assert trimmed(redis_server.url, fill(client, key, 10_500)) == 0
    assert 10_000 <= client.xlen(key) <= 10_100


def test_uncollected_entries_stay(redis_server, client) -> None:
    client.hset(KEYS.collected, KEYS.comparisons, "200-0")
    assert trimmed(redis_server.url, fill(client, KEYS.comparisons, 10_500)) == 0
    first = client.xrange(KEYS.comparisons, count=1)[0][0]
    assert 100 <= int(first.split(b"-")[0]) <= 201


@pytest.mark.parametrize("collected", [None, "250-0"])
def test_hard_cap_drops_are_counted_exactly(redis_server, client, collected) -> None:
    if collected:
        client.hset(KEYS.collected, KEYS.comparisons, collected)
    add = fill(client, KEYS.comparisons, 1_000)
    dropped = trimmed(redis_server.url, add, comparisons_cap=500)
    left = client.xlen(KEYS.comparisons)
    assert 500 <= left <= 600  # whole nodes of 100 entries
    assert dropped == 1_000 - left - (250 if collected else 0)
    assert int(client.hget(KEYS.meta, "dropped:rl_v3.comparison")) == dropped


# -- who is at the other end ----------------------------------------------------------------------


def refused(url: str, sink: str | None = None) -> str:
    """Return the sentence with which a start is refused."""

    async def play() -> None:
        async with opened(url, sink) as bus:
            await acquire(bus)

    with pytest.raises(RedisUnavailable) as caught:
        asyncio.run(play())
    assert caught.value.exit_code == 1
    return str(caught.value)


def test_nobody_listening_is_one_sentence() -> None:
    sentence = refused("redis://:secret@127.0.0.1:1/0")
    assert sentence.startswith("expected Redis at redis://127.0.0.1:1/0 to answer, found: ")
    assert "secret" not in sentence


def test_wrong_missing_and_needless_passwords_are_named(redis_server, client) -> None:
    client.config_set("requirepass", "right")
    try:
        with_wrong = refused(redis_server.url.replace("//", "//:wrong@"))
        assert "to accept our user and password, found: " in with_wrong
        assert "wrong@" not in with_wrong
        assert "to accept our user and password, found: " in refused(redis_server.url)
    finally:
        client.config_set("requirepass", "")


def test_missing_permission_is_named(redis_server, client) -> None:
    client.acl_setuser(
        "shy", enabled=True, passwords=["+p"], keys=["*"], commands=["+hello", "+xinfo"]
    )
    try:
        sentence = refused(redis_server.url.replace("//", "//shy:p@"))
        assert "to permit what the worker does" in sentence
    finally:
        client.acl_deluser("shy")


def test_the_server_that_refuses_is_named(redis_server, second_server, client) -> None:
    client.acl_setuser("shy", enabled=True, passwords=["+p"], keys=["*"], commands=["+hello"])
    try:
        sentence = refused(redis_server.url.replace("//", "//shy:p@"), second_server.url)
    finally:
        client.acl_deluser("shy")
    assert sentence.startswith(f"expected Redis at {redis_server.url} to permit what")
    assert f"{KEYS.stream(INPUTS[0])}: " in sentence


def test_cluster_is_refused(binary) -> None:
    with RedisServer.start(binary, options={"cluster-enabled": "yes"}) as server:
        assert "found Redis Cluster" in refused(server.url)


def test_shown_url_has_no_password() -> None:
    assert shown("rediss://user:pw@host:1/2?ssl_ca_certs=x") == "rediss://host:1/2"
    assert shown("unix:///tmp/redis.sock?db=1") == "unix:///tmp/redis.sock"


# -- the source sees nothing but reads ------------------------------------------------------------


def test_source_sees_nothing_but_reads(redis_server, second_server, client) -> None:
    client.xadd(TICKS, BODY, id="1-0")
    seen: list[str] = []

    async def play() -> None:
        async with opened(redis_server.url, second_server.url) as bus:
            await acquire(bus, "oldest")
            await bus.store_artifact("digest", b"bytes")
            await bus.history("market.tick", "1-0", 10)
            for new in ("2-0", "3-0"):
                batch = await bus.read(10)
                await bus.commit(a_commit("a", batch.entries[0].entry_id))
                client.xadd(TICKS, BODY, id=new)
            await bus.beat()
            await bus.trim()
            await bus.read(10)
            await bus.wait()

    with client.monitor() as monitor:
        asyncio.run(play())
        client.echo("the end")
        while (command := monitor.next_command()["command"]) != "ECHO the end":
            seen.append(command.split()[0].upper())
    allowed = {"HELLO", "XINFO", "MULTI", "TIME", "XREAD", "EXEC", "XREVRANGE"}
    assert {name for name in seen if name != "XADD"} == allowed
    assert seen.count("XADD") == 2  # our own producer above
    with redis.Redis.from_url(second_server.url) as sink:
        assert sink.xlen(KEYS.decisions) == 2
        assert sink.get(KEYS.artifact("digest")) == b"bytes"
        assert 0 < sink.ttl(KEYS.heartbeat) <= 10
