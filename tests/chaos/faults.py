"""The faults of the delivery contract, each as a play on a stage that ends with a verdict.

Numbers are those of the delivery notes: 1 kill -9 of the worker, 2 a frozen worker and its
successor, 3 lost replies, 4 and 5 kill -9 of Redis, 6 a promoted replica that lags, and so on.
What has a test of its own elsewhere is not played here again (docs/delivery.md says where it is).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from tests.chaos.oracle import Verdict
from tests.chaos.programs import wait_until
from tests.chaos.stage import Stage

Play = Callable[[Stage], Verdict]


class Fault(NamedTuple):
    """One row of the table."""

    number: int
    title: str
    play: Play
    fsync: str | None
    """Append-only file of the stage's Redis: None, "always" or "everysec"."""


FAULTS: dict[int, Fault] = {}


def fault(number: int, title: str, *, fsync: str | None = None) -> Callable[[Play], Play]:
    """Enter a play into the table of faults."""

    def enter(play: Play) -> Play:
        FAULTS[number] = Fault(number, title, play, fsync)
        return play

    return enter


@fault(1, "kill -9 of the worker before, after and between commits")
def kill_worker(stage: Stage) -> Verdict:
    worker = stage.begin()
    for _ in range(stage.rng.randint(2, 4)):
        moment = stage.rng.choice(("request", "reply", "any"))
        if moment == "any":
            time.sleep(stage.rng.random() * 0.03)
            worker.kill()
        else:
            trap = stage.proxy.set_trap(moment, after=stage.rng.randint(1, 6))
            wait_until(lambda trap=trap: trap.sprung.is_set() or stage.all_read(), stage.trouble)
            worker.kill()
            if stage.rng.random() < 0.5:
                trap.release(forward=False)
                worker = stage.worker()
            else:  # the network delivers the dead worker's last commit when another one owns it
                worker = stage.worker()
                stage.until_started(worker)
                trap.release(forward=True)
            continue
        worker = stage.worker()
        stage.some_more()
    stage.settle()
    return stage.judge()


@fault(2, "SIGSTOP beyond the takeover, then SIGCONT: the zombie is fenced")
def freeze_worker(stage: Stage) -> Verdict:
    zombie = stage.begin()
    trap = stage.proxy.set_trap(stage.rng.choice(("request", "reply")), stage.rng.randint(1, 4))
    in_commit = stage.rng.random() < 0.5
    if in_commit:
        wait_until(lambda: trap.sprung.is_set() or stage.all_read(), stage.trouble)
    zombie.freeze()
    trap.release(forward=True)
    heir = stage.worker()
    stage.until_started(heir)
    stage.some_more()
    zombie.thaw()
    stage.expect("exit code of the zombie", zombie.wait(), 3)
    stage.settle()
    return stage.judge()


@fault(3, "replies lost after execution")
def lose_replies(stage: Stage) -> Verdict:
    stage.begin()
    for _ in range(stage.rng.randint(3, 8)):
        if stage.rng.random() < 0.5:
            stage.proxy.lose_replies = 1
        else:
            trap = stage.proxy.set_trap("reply", stage.rng.randint(1, 3))
            wait_until(lambda trap=trap: trap.sprung.is_set() or stage.all_read(), stage.trouble)
            trap.release(forward=False)
        stage.some_more()
    stage.settle()
    return stage.judge()


@fault(4, "kill -9 of Redis, AOF always", fsync="always")
def kill_redis(stage: Stage) -> Verdict:
    stage.begin()
    for _ in range(stage.rng.randint(1, 2)):
        trap = None
        if stage.rng.random() < 0.5:
            trap = stage.proxy.set_trap(stage.rng.choice(("request", "reply")))
            wait_until(lambda trap=trap: trap.sprung.is_set() or stage.all_read(), stage.trouble)
        stage.server.kill()
        if trap is not None:
            trap.release(forward=False)
        time.sleep(stage.rng.random() * 0.1)
        stage.server.restart()
        stage.some_more()
    stage.settle()
    return stage.judge()
