"""Where does a fault happen? A private Redis, a producer, a proxy, programs, and their traces.

A stage lasts for one seed. Faults (`faults.py`) drive it; `judge` says whether the promise held.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import redis
from msgspec.structs import replace

from shadow.records import Entry
from tests.chaos import workload
from tests.chaos.oracle import KEYS, Ledger, Row, Verdict, compare, swapped, undisturbed
from tests.chaos.programs import Forked, wait_until
from tests.chaos.proxy import COMMIT_SCRIPT, Proxy
from tests.chaos.workload import Producer, id_key
from worker.embedded import RedisServer, ServerBinary

BARS, TICKS_PER_BAR = 50, 6
READINGS = (5, 40, 512)
"""Entries that a worker asks for at a time: with few, it is nearly always one reading ahead."""
RSS_LIMIT_MB = 150.0
STRANGER = "quantum:group:ai_engine:market.tick"
_MEMORY = Path("/dev/shm")


class Stage:
    """Everything that one seed of one fault needs.

    Attributes:
        rng: of the seed; every choice comes from it.
        history: what the producer appends, in the one defined order.
        server: the Redis that producer and stranger use; the worker goes through `proxy`.
    """

    def __init__(
        self,
        seed: int,
        context: ForkServerContext,
        binary: ServerBinary,
        policy: Path,
        *,
        fsync: str | None = None,
        poison: int = 3,
        ticks_per_bar: int = TICKS_PER_BAR,
    ) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self._readings = random.Random(f"readings of {seed}")
        self.context = context
        self.policy = policy
        self.binary = binary
        root = _MEMORY if _MEMORY.is_dir() else None
        self.directory = Path(tempfile.mkdtemp(prefix="rlv3-chaos-", dir=root))
        self._fsync = fsync
        self._servers: list[RedisServer] = []
        self.server = self.serve("redis")
        self.link = redis.Redis.from_url(self.server.url)
        self.proxy = Proxy(self.server.url)
        begin_ms = (int(time.time() * 1_000) // 60_000 - BARS - 2) * 60_000
        plain = workload.market(BARS, ticks_per_bar, seed, begin_ms=begin_ms)
        self.history: list[Entry] = workload.poisoned(plain, self.rng, poison)
        self.producer = Producer(
            self.server.url, self.history, random.Random(seed), chunk=24, pause_s=0.012
        )
        self.before: list[Entry] = []
        self.floor = 0
        self.skew_s = 0.0
        self.mined = False
        self.programs: list[Forked] = []
        self.problems: list[str] = []
        self._before: Any = None
        self.link.script_load(COMMIT_SCRIPT)  # else the first commit passes twice: NOSCRIPT, EVAL

    def serve(self, name: str, **options: str) -> RedisServer:
        """Start another server of this stage."""
        server = RedisServer.start(
            self.binary,
            self.directory / name,
            appendonly=self._fsync is not None,
            options={"appendfsync": self._fsync or "no", **options},
        )
        self._servers.append(server)
        return server

    # -- who takes part ---------------------------------------------------------------------------

    def worker(self, *flags: str, url: str = "", policy: Path | None = None) -> Forked:
        """Start a worker behind the proxy (or at another URL) that reads from 0-0."""
        arguments = [
            "run", "--redis-url", url or self.proxy.url, "--policy", str(policy or self.policy),
            "--start", "oldest", "--conflate-after", "off", "--max-event-age", "off",
            "--max-batch", str(self.rng.choice((1, 7, 64))), *flags,
        ]  # fmt: skip
        return self._start(arguments)

    def program(self, *arguments: str) -> Forked:
        """Start another of our programs."""
        return self._start(list(arguments))

    def naive(self) -> Forked:
        """Start the ordinary consumer behind the proxy."""
        return self._start([self.proxy.url], naive=True)

    def _start(self, arguments: list[str], *, naive: bool = False) -> Forked:
        log = self.directory / f"{len(self.programs)}.log"
        program = Forked(
            self.context, log, *arguments, naive=naive, skew_s=self.skew_s, mined=self.mined,
            reading=self._readings.choice(READINGS),
        )  # fmt: skip
        self.programs.append(program)
        return program

    def begin(self, *flags: str) -> Forked:
        """Start producer and worker; return the worker when it has decided something."""
        self._meet_stranger()
        self.floor = sum(path.stat().st_size for path in self.appended())
        self.producer.start()
        worker = self.worker(*flags)
        self.until_read(self.rng.randint(1, len(self.history) // 3))
        return worker

    def _meet_stranger(self) -> None:
        """Another program's group, with entries that it has read and not acknowledged."""
        self.producer.history = self.history[10:]
        workload.append(self.link, self.history[:10])
        tick = KEYS.stream("market.tick")
        self.link.xgroup_create(tick, STRANGER, "0", mkstream=True)
        self.link.xreadgroup(STRANGER, "consumer-1", {tick: ">"}, count=5)
        self._before = self._stranger()

    def _stranger(self) -> Any:
        group = self.link.xinfo_groups(KEYS.stream("market.tick"))
        pending = self.link.xpending(KEYS.stream("market.tick"), STRANGER)
        return [(g["name"], g["consumers"], g["last-delivered-id"]) for g in group], pending

    def begin_with(self, part: list[Entry], *flags: str) -> Forked:
        """Start with a part of the history; return the worker when it has read all of that."""
        self.before = part
        workload.append(self.link, part)
        tick = KEYS.stream("market.tick")
        self.link.xgroup_create(tick, STRANGER, "0")
        worker = self.worker(*flags)
        self.until_read(len(part))
        return worker

    def cut(self) -> list[Entry]:
        """Take a random first part off the history, and return it."""
        n = self.rng.randint(len(self.history) // 4, len(self.history) // 2)
        part, self.history = self.history[:n], self.history[n:]
        return part

    def continue_with_rest(self) -> None:
        """Produce what `cut` left."""
        self.producer.history = self.history
        self.producer.start()

    def forget_stranger(self) -> None:
        """Its group went with the stream."""
        self._before = None

    def disturb_history(self) -> tuple[int, int]:
        """Repeat and delay some ticks; return how many of each."""
        by_symbol: dict[str, list[Entry]] = {}
        for entry in self.history:
            if entry.event_type == workload.TICK and b'"n"' in entry.fields[b"payload"]:
                by_symbol.setdefault(json.loads(entry.fields[b"payload"])["symbol"], []).append(
                    entry
                )
        made: list[Entry] = []
        done = [0, 0]
        for ticks in by_symbol.values():
            for at in self.rng.sample(range(len(ticks) - 6), 12):
                late = self.rng.random() < 0.5
                body = json.loads(ticks[at].fields[b"payload"])
                if late:
                    body["price"] *= 1.0001
                after = ticks[at + self.rng.randint(1, 5)]
                ms, _, seq = after.entry_id.partition("-")
                made.append(
                    replace(
                        after,
                        entry_id=f"{ms}-{int(seq) + 600 + len(made)}",
                        fields={**after.fields, b"payload": json.dumps(body).encode()},
                    )
                )
                done[late] += 1
        self.history = sorted([*self.history, *made], key=workload.in_order)
        return done[0], done[1]

    def lay_mines(self, kinds: Sequence[str]) -> list[Entry]:
        """Let ticks of the later part end the process that decodes them.

        Returns:
            The history as it must come out: in their place, entries that cannot be read.
        """
        self.mined = True
        third = len(self.history) // 3
        ticks = [
            i
            for i, entry in enumerate(self.history)
            if i > third and b'"n"' in entry.fields[b"payload"]
        ]
        harmless = list(self.history)
        for at, kind in zip(self.rng.sample(ticks, len(kinds)), kinds, strict=True):
            entry = self.history[at]
            body = json.dumps({**json.loads(entry.fields[b"payload"]), "mine": kind}).encode()
            self.history[at] = replace(entry, fields={**entry.fields, b"payload": body})
            harmless[at] = replace(entry, fields={b"payload": b"{"})
        return harmless

    def to_the_future(self, n: int) -> None:
        """Give the last ticks ids an hour ahead, as a server does whose clock went back."""
        ahead_ms = int(time.time() * 1_000) + 3_600_000
        last = [entry for entry in self.history[-n:] if entry.event_type == workload.TICK]
        self.history[-n:] = [
            replace(entry, entry_id=f"{ahead_ms}-{i}") for i, entry in enumerate(last)
        ]

    def replica(self) -> RedisServer:
        """Start a replica of the stage's Redis."""
        self.link.config_set("repl-diskless-sync-delay", 0)
        replica = self.serve("replica")
        with redis.Redis.from_url(replica.url) as link:
            link.replicaof("127.0.0.1", str(self.server.port))
            wait_until(lambda: link.info("replication")["master_link_status"] == "up")
        return replica

    def until_following(self, replica: RedisServer) -> None:
        """Wait until the replica has what only was there before the producer, and our state."""
        with redis.Redis.from_url(replica.url) as link:
            wait_until(lambda: link.exists(KEYS.meta), self.trouble)

    def detach(self, replica: RedisServer) -> None:
        """From now on the replica lags; it will be promoted as it is."""
        with redis.Redis.from_url(replica.url) as link:
            link.replicaof("NO", "ONE")

    def promote(self, replica: RedisServer) -> None:
        """Everybody uses the former replica from now on."""
        self.server = replica
        self.link.close()
        self.link = redis.Redis.from_url(replica.url)
        self.proxy.target_url = self.producer.url = replica.url

    def appended(self) -> list[Path]:
        """Return the append-only file that is written to."""
        return [
            path
            for path in self.server.directory.rglob("*.aof")
            if path.name == "appendonly.aof" or ".incr." in path.name
        ]

    def trim(self) -> None:
        """Trim random streams to a random length."""
        for stream in sorted({entry.stream for entry in self.history}):
            if self.rng.random() < 0.7:
                self.link.xtrim(stream, maxlen=self.rng.randint(0, 40), approximate=False)

    def produce_more(self) -> None:
        """Wait until the producer is a random way further."""
        goal = self.producer.sent + self.rng.randint(20, 150)
        wait_until(lambda: self.producer.sent >= min(goal, len(self.producer.history)))

    # -- waiting ----------------------------------------------------------------------------------

    def counts(self) -> dict[str, int]:
        """Return the worker's counters."""
        meta = self.link.hgetall(KEYS.meta)
        return {name.decode()[2:]: int(value) for name, value in meta.items() if name[:2] == b"n:"}

    def until_read(self, entries: int) -> None:
        """Wait until so many entries were counted."""
        wait_until(lambda: sum(self.counts().values()) >= entries, self.trouble)

    def all_read(self) -> bool:
        """Return True when everything that is to come was counted."""
        try:
            return sum(self.counts().values()) >= len(self.history)
        except redis.RedisError:
            return False

    def until_started(self, program: Forked) -> None:
        """Wait until a worker owns the state."""
        wait_until(lambda: "WORKER_STARTED" in program.said(), self.trouble)

    def some_more(self) -> None:
        """Wait until the worker has gone a random way further."""
        now = sum(self.counts().values())
        left = len(self.history) - now
        if left > 10:
            self.until_read(now + self.rng.randint(1, max(1, left // 4)))

    def trouble(self) -> str:
        """Say what the programs said last."""
        said = [program.said().strip().splitlines()[-3:] for program in self.programs]
        return f"counts {self.counts()}, sent {self.producer.sent}, programs {said}"

    def settle(self) -> None:
        """Wait until everything that was produced is folded, then stop whoever runs."""
        wait_until(self.producer.done, self.trouble)
        self.until_read(len(self.history))
        self.proxy.trap, self.proxy.lose_replies = None, 0
        wait_until(lambda: not any(map(self._is_away, self.programs)), self.trouble)
        self.finish()

    @staticmethod
    def _is_away(program: Forked) -> bool:
        """Return True while it waits for Redis: asked to stop then, it exits 1, as documented."""
        said = program.said()
        back = max(said.rfind("REDIS_RETURNED"), said.rfind("WORKER_STARTED"))
        return program.running and said.rfind("REDIS_LOST") > back

    def finish(self) -> None:
        """Stop the running programs in order; check that they stayed small."""
        for program in self.programs:
            if not program.running:
                continue
            if program.rss_mb() > RSS_LIMIT_MB:
                self.problems.append(f"{program.rss_mb():.0f} MB of memory")
            code = program.stop()
            if code != 0:
                self.problems.append(f"exit {code} after SIGTERM: {program.said()[-300:]}")

    # -- what is there ----------------------------------------------------------------------------

    def decisions(self) -> dict[str, Row]:
        """Return our decisions by id."""
        return {row["decision_id"]: row for row in Ledger.found(self.link).decisions}

    def rewritten(self, seen: dict[str, Row]) -> dict[str, Row]:
        """Return the decisions that were something else before."""
        now = self.decisions()
        return {name: now[name] for name in seen.keys() & now.keys() if seen[name] != now[name]}

    def losses(self) -> dict[str, int]:
        """Return the worker's count of lost entries."""
        meta = self.link.hgetall(KEYS.meta)
        named = {k.decode()[5:]: int(v) for k, v in meta.items() if k.startswith(b"lost:")}
        return {name: n for name, n in named.items() if n}

    def known_symbols(self) -> set[str]:
        """Return the symbols that have a state."""
        return {name.decode() for name in self.link.smembers(KEYS.symbols)} - {""}

    # -- the oracle -------------------------------------------------------------------------------

    def judge(
        self, expected: Ledger | None = None, counts: dict[str, int] | None = None
    ) -> Verdict:
        """Compare what is on the bus with the reference, and check what else was promised."""
        if expected is None:
            outputs, counts = undisturbed(self.history, self.policy)
            expected = Ledger.expected(outputs)
        verdict = compare(expected, Ledger.found(self.link))
        self.expect("counters", self.counts(), counts)
        dead = [fields[b"payload"] for _, fields in self.link.xrange(KEYS.dlq("market.tick"))]
        self.expect("dead letters", len(dead), self.counts().get("market.tick:dead_letter", 0))
        if self._before is not None:
            self.expect("another program's group", self._stranger(), self._before)
        foreign = (
            {
                key.decode()
                for key in self.link.scan_iter()
                if not key.startswith(
                    (KEYS.own.encode(), b"quantum:dlq:", b"quantum:stream:rl_v3.")
                )
            }
            - {entry.stream for entry in self.history}
            - {KEYS.heartbeat}
        )
        self.expect("keys that are not ours", foreign, set())
        return verdict._replace(problems=(*verdict.problems, *self.problems))

    def reference(self, history: list[Entry]) -> tuple[Ledger, dict[str, int]]:
        """Return what an undisturbed run over a history gives."""
        outputs, counts = undisturbed(history, self.policy)
        return Ledger.expected(outputs), counts

    def reference_swapped(self, former: Path, heir: Path) -> tuple[Ledger, dict[str, int]]:
        """Return what two policies give, the second from where it took over on."""
        decisions = Ledger.found(self.link).decisions
        decided = {
            row["source_stream"] + row["source_entry_id"]: row["run_id"] for row in decisions
        }
        first = decisions[0]["run_id"]
        runs = [decided.get(entry.stream + entry.entry_id) for entry in self.history]
        last = max(i for i, run in enumerate(runs) if run == first)
        second = min(
            (i for i, run in enumerate(runs) if run not in (first, None)), default=len(runs)
        )
        for n in range(last + 1, second + 1):  # in between is what no policy decides on
            outputs, counts, run_id = swapped(self.history, n, former, heir)
            if second == len(runs) or run_id == runs[second]:
                break
        return Ledger.expected(outputs), counts

    def judge_ids(self, history: list[Entry]) -> Verdict:
        """Compare which decisions there are and their order per symbol, but no values."""
        expected = self.reference(history)[0].decisions
        verdict = self._order(expected, Ledger.found(self.link).decisions)
        return verdict._replace(problems=(*verdict.problems, *self.problems))

    @staticmethod
    def _order(expected: list[Row], found: list[Row]) -> Verdict:
        names = ("decision_id", "symbol", "source_entry_id")
        bare = [[{name: row[name] for name in names} for row in rows] for rows in (expected, found)]
        return compare(Ledger(bare[0], []), Ledger(bare[1], []))

    def judge_conflated(self) -> Verdict:
        """Check that what was not decided is named, and that nothing else depends on it."""
        expected, counts = self.reference(self.history)
        found = Ledger.found(self.link)
        left_out = {
            name
            for row in found.comparisons
            if row.get("reason") == "conflated"
            for name in row["entry_ids"]
        }
        kept = [row for row in expected.decisions if _source(row) not in left_out]
        self.expect("something was conflated", bool(left_out), True)
        self.expect("entries conflated", self._total("conflated"), len(left_out))
        self.expect("entries decided", self._total("decided"), len(found.decisions))
        self.expect("entries read", sum(self.counts().values()), sum(counts.values()))
        steps = {row["decision_id"] for row in expected.decisions if row["kind"] == "step"}
        self.expect("steps left out", steps - {row["decision_id"] for row in kept}, set())
        both = [
            Ledger(decisions, [row for row in rows if row["kind"] in ("bar", "decision")])
            for decisions, rows in ((kept, expected.comparisons), found)
        ]
        verdict = compare(*both)
        return verdict._replace(problems=(*verdict.problems, *self.problems))

    def _total(self, outcome: str) -> int:
        return sum(n for name, n in self.counts().items() if name.endswith(f":{outcome}"))

    def judge_without(self, symbol: str) -> Verdict:
        """Compare everything about all symbols but one, and which decisions that one has."""
        expected, _ = self.reference(self.history)
        found = Ledger.found(self.link)
        others = [
            Ledger(*([row for row in rows if row["symbol"] not in (symbol, "")] for rows in ledger))
            for ledger in (expected, found)
        ]
        runs = {row["run_id"] for row in found.decisions}
        self.expect("runs", len(runs), 1)
        return compare(*others) + self.judge_ids(self.history)

    def judge_losses(self) -> Verdict:
        """Check that what was read and what is reported as lost is what was produced."""
        wait_until(self.producer.done, self.trouble)
        produced = Counter(entry.event_type for entry in self.history)
        exact = self.server.tier == "7"
        newest = {entry.stream: entry.entry_id for entry in self.history}

        def caught_up() -> bool:
            cursors = json.loads(self.link.hget(KEYS.meta, "cursors") or "{}")
            ends = {s: self._last_id(s) for s in newest}
            present = [s for s in newest if self.link.xlen(s)]
            return all(id_key(cursors[s]) >= id_key(ends[s]) for s in present)

        wait_until(caught_up, self.trouble)
        time.sleep(0.4)  # losses are looked for four times a second
        self.finish()
        read: Counter[str] = Counter()
        for name, n in self.counts().items():
            read[name.rpartition(":")[0]] += n
        truth = {
            name: produced[name] - read[name] for name in produced if produced[name] > read[name]
        }
        if exact:
            self.expect("losses", self.losses(), truth)
        elif truth:
            said = "".join(program.said() for program in self.programs)
            self.expect("losses are said", "ENTRIES_LOST" in said, True)
        found = Ledger.found(self.link).decisions
        made = {(row["source_stream"], row["source_entry_id"]) for row in found}
        expected = self.reference(self.history)[0].decisions
        kept = [row for row in expected if (row["source_stream"], row["source_entry_id"]) in made]
        decided = sum(n for name, n in self.counts().items() if name.endswith(":decided"))
        self.expect("decisions", len(found), decided)
        verdict = self._order(kept, found)
        return verdict._replace(problems=(*verdict.problems, *self.problems))

    def _last_id(self, stream: str) -> str:
        return str(self.link.xinfo_stream(stream)["last-generated-id"].decode())

    def expect(self, what: str, found: object, expected: object) -> None:
        """Note a promise that was not kept."""
        if found != expected:
            self.problems.append(f"{what}: expected {expected}, found {found}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for program in self.programs:
            program.kill()
        self.producer.halt()
        self.proxy.close()
        self.link.close()
        for server in self._servers:
            server.kill()
        shutil.rmtree(self.directory, ignore_errors=True)


def _source(row: Row) -> str:
    """Return the entry that a decision is about, as the ledger names it."""
    return f"{row['source_stream']}|{row['source_entry_id']}"
