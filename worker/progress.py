"""Does the worker get on? Judged by what it achieved, not by whether anything answers.

A thread of its own looks, so that a loop that is stuck in one step is seen as well.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from worker.logs import Log

STALL_S = 3.0
"""Without a finished step for so long, the worker stands still; an idle one waits for a second."""
LOOK_S = 0.5
BEHIND_MS = 10_000.0
"""With more lag than this the worker gets on but is not ready."""


class Progress:
    """When the last step was finished, and how far behind the streams that was.

    Attributes:
        step: what the loop is doing.
        trouble: the last error of that step, empty where there was none.
        lag_ms: TIME minus the id of the oldest entry not folded.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._at = clock()
        self.step = "start"
        self.trouble = ""
        self.lag_ms = 0.0

    def begin(self, step: str) -> None:
        """Name the step that begins."""
        self.step = step

    def done(self) -> None:
        """Note that a step was finished."""
        self._at = self._clock()
        self.trouble = ""

    @property
    def age_s(self) -> float:
        """Seconds since a step was finished."""
        return self._clock() - self._at

    @property
    def state(self) -> str:
        """ready, behind (getting on, with much lag) or stalled."""
        if self.age_s > STALL_S:
            return "stalled"
        return "behind" if self.lag_ms > BEHIND_MS else "ready"


class Watchdog:
    """Logs once when the worker stands still, and once when it gets on again.

    A context manager: watches inside.
    """

    def __init__(self, progress: Progress, log: Log) -> None:
        self._progress = progress
        self._log = log
        self._end = threading.Event()
        self._stalled_s: float | None = None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> None:
        self._progress.done()
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def look(self) -> None:
        """Compare the state with that of the last look."""
        progress = self._progress
        age_s = progress.age_s
        if progress.state == "stalled":
            if self._stalled_s is None:
                self._log.error(
                    "STALLED",
                    msg=f"no progress: {progress.trouble or 'the step does not end'}",
                    step=progress.step,
                    age_s=round(age_s, 1),
                )
            self._stalled_s = age_s
        elif self._stalled_s is not None:
            self._log.info(
                "PROGRESS_RESUMED",
                msg="the worker gets on again",
                step=progress.step,
                stalled_s=round(self._stalled_s, 1),
            )
            self._stalled_s = None

    def _watch(self) -> None:
        while not self._end.wait(LOOK_S):
            self.look()
