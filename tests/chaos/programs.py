"""How does a test start, stop, freeze and kill our programs, many times a second?

Real processes, forked from a server that has imported the programs once: a start costs
milliseconds instead of half a second of imports. They die with the process that started them.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path

from shadow.records import Entry

PATIENCE_S = 30.0
MINE = re.compile(rb'"mine": "(\w+)"')
"""What an entry that ends the process says about how."""
_PR_SET_PDEATHSIG = 1


class Waited(AssertionError):
    """What a test waits for did not come."""


def wait_until(
    condition: Callable[[], object], found: Callable[[], object] = lambda: "nothing"
) -> None:
    """Wait for a condition.

    Raises:
        Waited: it did not come true in time; says what was found instead.
    """
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise Waited(f"waited {PATIENCE_S:.0f} s, found {found()}")
        time.sleep(0.002)


def nursery() -> ForkServerContext:
    """Return the context that programs are forked from, with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["worker.cli", "worker.service", "worker.collector", "tests.chaos.naive"]
    )
    return context


def _worker(arguments: list[str]) -> None:
    from worker.cli import main

    sys.argv = ["rlv3-worker", *arguments]
    main()


def _ordinary(arguments: list[str]) -> None:
    from tests.chaos.naive import consume

    consume(*arguments)


def _explode(kind: str) -> None:
    """End the process as the entry says: at once, by a signal, or by a bug."""
    if kind == "exit":
        os._exit(9)
    if kind == "raise":
        raise RuntimeError("a bug that this entry meets")
    os.kill(os.getpid(), {"segv": signal.SIGSEGV, "kill": signal.SIGKILL}[kind])


def _lay_mines() -> None:
    """From now on, decoding an entry that carries a mine sets it off."""
    from shadow import codec

    decode = codec.decode

    def trip(entry: Entry) -> object:
        found = MINE.search(entry.fields.get(b"payload", b""))
        if found is not None:
            _explode(found[1].decode())
        return decode(entry)

    codec.decode = trip


def _become(
    program: Callable[[list[str]], None],
    arguments: list[str],
    log: str,
    skew_s: float,
    mined: bool,
    reading: int,
) -> None:
    """Turn a forked process into one of our programs."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    for name in [name for name in os.environ if name.startswith(("REDIS_", "RLV3_"))]:
        del os.environ[name]
    if skew_s:
        right = time.time
        time.time = lambda: right() + skew_s
    if mined:
        _lay_mines()
    if reading:
        from worker import service

        service.READ_COUNT = reading
    program(arguments)


class Forked:
    """A running program.

    Args:
        reading: how many entries a worker asks of each stream at a time; 0 for its own number.
    Attributes:
        pid: its process.
    """

    def __init__(
        self,
        context: ForkServerContext,
        log: Path,
        *arguments: str,
        naive: bool = False,
        skew_s: float = 0.0,
        mined: bool = False,
        reading: int = 0,
    ) -> None:
        self.log = log
        program = _ordinary if naive else _worker
        self._process = context.Process(
            target=_become,
            args=(program, list(arguments), str(log), skew_s, mined, reading),
            daemon=True,
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def running(self) -> bool:
        """True until its end."""
        return self._process.is_alive()

    def said(self) -> str:
        """Return everything it wrote so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def freeze(self) -> None:
        """SIGSTOP."""
        self.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self.signal(signal.SIGCONT)

    def kill(self) -> None:
        """Kill -9, and wait for its end."""
        self._process.kill()
        self._process.join()

    def wait(self) -> int:
        """Wait for its end; return the exit code."""
        self._process.join(PATIENCE_S)
        if self._process.exitcode is None:
            raise Waited(f"pid {self.pid} did not end; it said {self.said()[-2_000:]}")
        return self._process.exitcode

    def stop(self) -> int:
        """Ask it to drain; return the exit code."""
        if self.running:
            self.signal(signal.SIGTERM)
        return self.wait()

    def rss_mb(self) -> float:
        """Return its resident memory."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def cpu_s(self) -> float:
        """Return the processor time it has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
