"""Is the reported loss the true loss, to the entry? `make trims` plays 100 scenarios and counts.

One worker on one Redis >= 7. In each scenario a producer appends to several streams while the
worker runs, is frozen or is dead, and somebody trims: XTRIM by length or by id, or the producer's
own MAXLEN. Afterwards, per stream: produced - read (the worker's counters) is the truth; `lost` in
the meta hash is what is reported.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import redis
import typer

from rlv3 import console
from rlv3.errors import ConfigError
from tests.chaos.policy import lively
from tests.chaos.programs import Forked, nursery, wait_until
from tests.chaos.stage import READINGS
from worker.embedded import RedisServer, find_servers
from worker.keys import Keys

KEYS = Keys()
STREAMS = ("market.tick", "signal.generated", "rl_v2.decision")
REPORT_S = 2.5
"""An idle worker looks once a second."""
HOW = ("running", "frozen", "killed")
app = typer.Typer(add_completion=False)


class Scene:
    """Producer, trimmer and worker."""

    def __init__(self, seed: int, server: RedisServer, directory: Path) -> None:
        self.rng = random.Random(seed)
        self.link = redis.Redis.from_url(server.url)
        self.server = server
        self.directory = directory
        self.policy = directory / "lively.safetensors"
        self.policy.write_bytes(lively())
        self.produced: Counter[str] = Counter()
        self.worker = self.start()

    def start(self) -> Forked:
        """Start a worker and wait until it owns the state."""
        log = self.directory / f"{time.monotonic_ns()}.log"
        flags = ("--policy", str(self.policy), "--start", "oldest", "--max-event-age", "off")
        worker = Forked(
            nursery(), log, "run", "--redis-url", self.server.url, *flags,
            reading=self.rng.choice(READINGS),
        )  # fmt: skip
        wait_until(lambda: "WORKER_STARTED" in worker.said(), worker.said)
        return worker

    def produce(self, name: str, n: int, **trim: int) -> None:
        """Append n entries, each trimming as a producer of production does, or not."""
        body = {"symbol": "AAAUSDT", "price": 100.0, "side": "BUY", "timestamp": time.time()}
        with self.link.pipeline(transaction=False) as batch:
            for _ in range(n):
                fields = {"payload": json.dumps({**body, "price": 100.0 + self.rng.random()})}
                batch.xadd(KEYS.stream(name), fields, approximate=False, **trim)  # type: ignore[arg-type]
            batch.execute()
        self.produced[name] += n

    def play(self) -> tuple[dict[str, int], dict[str, int]]:
        """Play a scenario; returns reported and true losses so far, per stream."""
        how = self.rng.choice(HOW)
        if how == "frozen":
            self.worker.freeze()
        elif how == "killed":
            self.worker.kill()
        for _ in range(self.rng.randint(1, 3)):
            name = self.rng.choice(STREAMS)
            kind = self.rng.choice(("maxlen", "minid", "own"))
            if kind == "own":
                self.produce(name, self.rng.randint(1, 60), maxlen=self.rng.randint(1, 40))
                continue
            self.produce(name, self.rng.randint(1, 60))
            key = KEYS.stream(name)
            if kind == "maxlen":
                self.link.xtrim(key, maxlen=self.rng.randint(0, 30), approximate=False)
            else:
                ids = [entry_id for entry_id, _ in self.link.xrange(key)]
                self.link.xtrim(key, minid=self.rng.choice(ids), approximate=False)
        if how == "frozen":
            self.worker.thaw()
        elif how == "killed":
            self.worker = self.start()
        for name in STREAMS:  # the last ones are never trimmed: read, they show what was before
            self.produce(name, 1)
        wait_until(self.caught_up, self.worker.said)
        deadline = time.monotonic() + REPORT_S
        while True:
            meta = self.link.hgetall(KEYS.meta)
            read = self.read(meta)
            reported = {name: int(meta.get(f"lost:{name}".encode(), 0)) for name in STREAMS}
            true = {name: self.produced[name] - read[name] for name in STREAMS}
            if reported == true or time.monotonic() > deadline:
                return reported, true
            time.sleep(0.01)

    def caught_up(self) -> bool:
        """Return True when the worker has read every stream to its end."""
        cursors = json.loads(self.link.hget(KEYS.meta, "cursors") or "{}")
        return all(
            cursors[key] == self.link.xinfo_stream(key)["last-generated-id"].decode()
            for key in map(KEYS.stream, STREAMS)
        )

    @staticmethod
    def read(meta: dict[bytes, bytes]) -> Counter[str]:
        """Return event type -> entries that the worker counted under any outcome."""
        read: Counter[str] = Counter()
        for field, value in meta.items():
            kind, _, rest = field.decode().partition(":")
            if kind == "n":
                read[rest.rpartition(":")[0]] += int(value)
        return read


@app.command()
def trims(
    scenarios: Annotated[int, typer.Option(help="How many.")] = 100,
    seed: Annotated[int, typer.Option(help="Decides everything.")] = 0,
) -> None:
    """Play scenarios, and print in how many the reported loss was the true one."""
    binary = next((server for server in find_servers() if server.tier == "7"), None)
    if binary is None:
        raise ConfigError("expected a Redis >= 7 on PATH, found none: 6.2 does not count losses")
    with RedisServer.start(binary) as server, tempfile.TemporaryDirectory() as directory:
        exact, lossy, before = 0, 0, Counter[str]()
        scene = Scene(seed, server, Path(directory))
        for number in range(scenarios):
            reported, true = scene.play()
            exact += reported == true
            lossy += Counter(true) != before
            before = Counter(true)
            if reported != true:
                console.out.print(f"scenario {number}: reported {reported}, true {true}")
        scene.worker.stop()
        total = sum(true.values())
    console.out.print(
        f"{exact} of {scenarios} scenarios: reported loss = true loss; {lossy} of them lost "
        f"something, {total:,} of {sum(scene.produced.values()):,} entries in all"
    )
    if exact < scenarios:
        raise typer.Exit(4)


if __name__ == "__main__":
    console.run(app)
