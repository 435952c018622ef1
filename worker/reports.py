"""The current report as one HTML file, built by the report's own program beside this process.

Building takes memory and seconds of a core, so it runs in a process of its own with the lowest
priority, at most once a minute, and the last one is served meanwhile.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from pathlib import Path

from rlv3.errors import DataError
from worker.embedded import leashed
from worker.logs import Log

FRESH_S = 60.0
"""A report younger than this is not built again."""
BUILD_S = 300.0
_GOOD = (0, 10, 20, 30)  # exit codes of a report, by verdict
_NICE = ("nice", "-n", "19")


class Reports:
    """Builds and keeps the report of one store.

    Args:
        store: the collector's directory.
        log: where a failure is told.
    """

    def __init__(self, store: Path, log: Log) -> None:
        self._store = store
        self._log = log
        self._place = tempfile.TemporaryDirectory(prefix="rlv3-report-")
        self._file = Path(self._place.name) / "report.html"
        self._tried_at: float | None = None
        self._error = ""
        self._building: asyncio.Task[None] | None = None

    async def current(self) -> Path:
        """Return the file of the newest report; one that is a minute old is renewed behind it.

        Raises:
            DataError: there is none, with the reason that the report's program gave.
        """
        due = self._tried_at is None or time.monotonic() - self._tried_at >= FRESH_S
        if due and self._building is None:
            self._building = asyncio.create_task(self._build())
        if not self._file.exists() and self._building is not None:
            await asyncio.wait((self._building,))
        if not self._file.exists():
            raise DataError(self._error or "expected a report, found this process stopping")
        return self._file

    def end(self) -> None:
        """Let nobody wait for a build any more."""
        if self._building is not None:
            self._building.cancel()

    async def close(self) -> None:
        """End a build in progress and remove the files."""
        if (building := self._building) is not None:
            building.cancel()
            await asyncio.wait((building,))
        self._place.cleanup()

    async def _build(self) -> None:
        process: asyncio.subprocess.Process | None = None
        try:
            process = await self._start()
            _, said = await asyncio.wait_for(process.communicate(), BUILD_S)
            words = said.decode(errors="replace").strip().splitlines()
            good = process.returncode in _GOOD
            self._error = "" if good else (words[-1] if words else f"exit {process.returncode}")
        except TimeoutError:
            self._error = f"expected a report within {BUILD_S:.0f} s, found none"
        except OSError as error:  # no process or no memory for one, now
            self._error = f"expected to start the report's program, found: {error}"
        finally:
            if process is not None and process.returncode is None:
                process.kill()
                await process.wait()
            self._tried_at = time.monotonic()
            self._building = None
        if self._error:
            self._log.warning("REPORT_FAILED", msg=self._error, store=str(self._store))

    async def _start(self) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *_NICE,
            *leashed(
                sys.executable, "-m", "shadow.cli", "report",
                "--store", str(self._store), "--out", self._place.name,
            ),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
