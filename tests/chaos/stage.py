"""Where does a fault happen? A private Redis, a producer, a proxy, programs, and their traces.

A stage lasts for one seed. Faults (`faults.py`) drive it; `judge` says whether the promise held.
"""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import redis

from shadow.records import Entry
from tests.chaos import workload
from tests.chaos.oracle import KEYS, Ledger, Verdict, compare, undisturbed
from tests.chaos.programs import Forked, wait_until
from tests.chaos.proxy import COMMIT_SCRIPT, Proxy
from tests.chaos.workload import Producer
from worker.embedded import RedisServer, ServerBinary

BARS, TICKS_PER_BAR = 50, 6
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

    def _start(self, arguments: list[str], *, naive: bool = False) -> Forked:
        log = self.directory / f"{len(self.programs)}.log"
        program = Forked(self.context, log, *arguments, naive=naive)
        self.programs.append(program)
        return program

    def begin(self) -> Forked:
        """Start producer and worker; return the worker when it has decided something."""
        self._meet_stranger()
        self.producer.start()
        worker = self.worker()
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
        self.finish()

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
