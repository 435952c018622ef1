"""Is a worker that stands still told from an idle one and from one that is behind?"""

from __future__ import annotations

import json
import time
from io import StringIO

from worker import logs
from worker.progress import Progress, Watchdog


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_stall_is_said_once_and_its_end_once() -> None:
    clock, out = Clock(), StringIO()
    progress = Progress(clock)
    watchdog = Watchdog(progress, logs.configure("INFO", out))
    progress.begin("commit")
    clock.now += 3.0
    watchdog.look()
    assert (progress.state, out.getvalue()) == ("ready", "")
    progress.trouble = "refused"
    clock.now += 0.5
    for _ in range(3):
        watchdog.look()
        clock.now += 1.0
    assert progress.state == "stalled"
    progress.done()
    watchdog.look()
    watchdog.look()
    said = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [line["event"] for line in said] == ["STALLED", "PROGRESS_RESUMED"]
    assert said[0]["msg"] == "no progress: refused"
    assert said[0]["extra"] == {"step": "commit", "age_s": 3.5}
    assert said[1]["extra"] == {"step": "commit", "stalled_s": 5.5}


def test_much_lag_is_behind_but_no_stall() -> None:
    progress = Progress(Clock())
    progress.lag_ms = 10_000.0
    assert progress.state == "ready"
    progress.lag_ms = 10_001.0
    assert progress.state == "behind"


def test_a_step_that_blocks_the_program_is_seen_from_the_thread() -> None:
    out = StringIO()
    with Watchdog(Progress(), logs.configure("INFO", out)):
        time.sleep(4.0)
        assert "the step does not end" in out.getvalue()
