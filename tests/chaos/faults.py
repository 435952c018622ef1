"""The faults of the delivery contract, each as a play on a stage that ends with a verdict.

Numbers are those of the delivery notes: 1 kill -9 of the worker, 2 a frozen worker and its
successor, 3 lost replies, 4 and 5 kill -9 of Redis, 6 a promoted replica that lags, and so on.
What has a test of its own elsewhere is not played here again (docs/delivery.md says where it is).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from typing import NamedTuple

from tests.chaos.oracle import KEYS, Verdict
from tests.chaos.policy import lively
from tests.chaos.programs import wait_until
from tests.chaos.stage import Stage
from tests.chaos.workload import SYMBOLS

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


def power_cut(stage: Stage) -> None:
    """Kill -9 of Redis, and lose what was not synced yet: the file's end, from any byte on.

    A file that ends within a transaction is loaded rightly, but the torn transaction seems to stay
    in it and to be applied when it is loaded once more (seen on 7.0): hence the rewrite.
    """
    stage.server.kill()
    (file,) = stage.appended()
    kept = file.stat().st_size - stage.rng.randint(0, 60_000)
    with file.open("r+b") as end:
        end.truncate(max(stage.floor, kept))
    stage.server.launch()
    stage.link.bgrewriteaof()
    wait_until(lambda: not stage.link.info("persistence")["aof_rewrite_in_progress"])
    stage.floor = sum(path.stat().st_size for path in stage.appended())


def away(stage: Stage) -> None:
    """Cut the worker off, so that producers have Redis back first: ids then come in order."""
    stage.producer.pause()
    stage.proxy.down = True
    stage.proxy.cut()


def back(stage: Stage) -> None:
    """Let the worker in again, once the producer has appended what Redis forgot."""
    already = stage.producer.sent
    stage.producer.rewind()
    wait_until(lambda: not stage.producer.rewinding and stage.producer.sent >= already)
    stage.expect("the worker lives", [program.running for program in stage.programs], [True])
    stage.proxy.down = False


@fault(5, "power cut under Redis, AOF everysec: the last writes are gone", fsync="everysec")
def cut_power(stage: Stage) -> Verdict:
    stage.begin()
    for _ in range(2):
        seen = stage.decisions()
        away(stage)
        power_cut(stage)
        stage.expect("decisions are never other ones", stage.rewritten(seen), {})
        back(stage)
        stage.some_more()
    stage.settle()
    stage.expect("decisions are never other ones", stage.rewritten(seen), {})
    return stage.judge()


@fault(6, "a lagging replica is promoted")
def promote_replica(stage: Stage) -> Verdict:
    replica = stage.replica()
    stage.begin()
    stage.until_following(replica)
    stage.some_more()
    stage.detach(replica)
    stage.some_more()
    away(stage)
    seen = stage.decisions()
    stage.promote(replica)
    back(stage)
    stage.settle()
    stage.expect("decisions are never other ones", stage.rewritten(seen), {})
    return stage.judge()


@fault(7, "black-holed connections: longer than every timeout")
def black_hole(stage: Stage) -> Verdict:
    worker = stage.begin()
    used = worker.cpu_s()
    stage.proxy.stall()
    time.sleep(3.5 + stage.rng.random())
    stage.expect("the worker says that Redis is away", "REDIS_LOST" in worker.said(), True)
    stage.expect("no busy loop", worker.cpu_s() - used < 0.5, True)
    stage.proxy.flow()
    stage.settle()
    return stage.judge()


@fault(8, "a slow link: messages in slices, with pauses")
def slow_link(stage: Stage) -> Verdict:
    worker = stage.begin()
    stage.proxy.slow_s = 0.002
    time.sleep(1.0)
    stage.proxy.slow_s = 0.0
    stage.settle()
    stage.expect("no storm of timeouts", "REDIS_LOST" in worker.said(), False)
    return stage.judge()


@fault(9, "a producer that repeats itself and comes late")
def repeat_and_come_late(stage: Stage) -> Verdict:
    duplicates, late = stage.disturb_history()
    stage.begin()
    stage.settle()
    counts = stage.counts()
    stage.expect("duplicates", counts.get("market.tick:duplicate", 0), duplicates)
    stage.expect("late ticks", counts.get("market.tick:late", 0), late)
    return stage.judge()


@fault(11, "entries that end the process: exit, SIGKILL, SIGSEGV, a bug's exception")
def end_the_process(stage: Stage) -> Verdict:
    kinds = stage.rng.sample(("exit", "kill", "segv", "raise"), 2)
    harmless = stage.lay_mines(kinds)
    worker = stage.begin()
    restarts = 0
    while not stage.all_read():
        if not worker.running:
            worker = stage.worker()
            restarts += 1
        time.sleep(0.01)
    stage.settle()
    stage.expect("at most three restarts for each", restarts <= 3 * len(kinds), True)
    letters = [json.loads(f[b"payload"]) for _, f in stage.link.xrange(KEYS.dlq("market.tick"))]
    crashed = [letter for letter in letters if letter["dlq_reason"] == "crash"]
    stage.expect("dead letters by crash", len(crashed), len(kinds))
    if "raise" in kinds:
        said = "".join(program.said() for program in stage.programs)
        stage.expect("the bug is logged", "FOLD_FAILED" in said, True)
    return stage.judge(*stage.reference(harmless))


@fault(12, "hardly any processor time: advisory decisions are conflated, nothing else changes")
def starve(stage: Stage) -> Verdict:
    stage.producer.start()
    worker = stage.worker("--conflate-after", "100", "--max-batch", "64")
    while not stage.all_read():
        worker.freeze()
        time.sleep(0.03)
        worker.thaw()
        time.sleep(0.01)
    stage.finish()
    return stage.judge_conflated()


@fault(13, "the worker's clock and Redis's clock jump an hour")
def jump_clocks(stage: Stage) -> Verdict:
    stage.to_the_future(stage.rng.randint(100, 200))
    worker = stage.begin()
    stage.skew_s = 3_600.0 * stage.rng.choice((-1, 1))
    stage.some_more()
    worker.kill()
    worker = stage.worker()
    wait_until(stage.all_read, stage.trouble)
    used = worker.cpu_s()
    time.sleep(0.3)
    stage.expect("no busy loop", worker.cpu_s() - used < 0.15, True)
    stage.settle()
    said = "".join(program.said() for program in stage.programs)
    stage.expect("ids ahead are said", "CLOCK_AHEAD" in said, True)
    return stage.judge()


@fault(16, "maxmemory reached, noeviction")
def fill_memory(stage: Stage) -> Verdict:
    stage.begin()
    for _ in range(2):
        used = int(stage.link.info("memory")["used_memory"])
        stage.link.config_set("maxmemory", max(1, used + stage.rng.randint(-50_000, 50_000)))
        time.sleep(0.05 + stage.rng.random() * 0.2)
        stage.link.config_set("maxmemory", 0)
        stage.some_more()
    stage.settle()
    return stage.judge()


@fault(17, "FLUSHALL, DEL of a trading stream, our cursors or a symbol's state evicted")
def lose_keys(stage: Stage) -> Verdict:
    return stage.rng.choice((_flush, _delete_stream, _evict_cursors, _evict_state))(stage)


def _flush(stage: Stage) -> Verdict:
    """All is gone: a first start, from what comes after."""
    worker = stage.begin_with(stage.cut())
    stage.link.flushall()
    stage.forget_stranger()
    stage.continue_with_rest()
    stage.settle()
    stage.expect("it is said", "STATE_LOST" in worker.said(), True)
    return stage.judge()


def _delete_stream(stage: Stage) -> Verdict:
    """A stream that was read to its end goes, and begins anew: nothing is lost or counted so."""
    stage.begin_with(stage.cut())
    stage.link.delete(KEYS.stream("market.tick"))
    stage.forget_stranger()
    stage.continue_with_rest()
    stage.until_read(len(stage.before) + len(stage.history))
    stage.settle()
    stage.expect("losses", stage.losses(), {})
    return stage.judge(*stage.reference(stage.before + stage.history))


def _evict_cursors(stage: Stage) -> Verdict:
    """Our meta hash goes under us: an incident; as told, the worker continues at the latest."""
    worker = stage.begin_with(stage.cut(), "--on-gap", "resume-latest")
    done = stage.decisions()
    stage.link.delete(KEYS.meta)
    wait_until(lambda: "STATE_GAP" in worker.said(), stage.trouble)
    wait_until(lambda: worker.said().count("WORKER_STARTED") == 2, stage.trouble)
    stage.continue_with_rest()
    stage.settle()
    stage.expect("decisions are never other ones", stage.rewritten(done), {})
    return stage.judge_ids(stage.before + stage.history)


def _evict_state(stage: Stage) -> Verdict:
    """A symbol's state goes: it starts again cold and flat, all others notice nothing."""
    worker = stage.begin()
    symbol = stage.rng.choice(SYMBOLS)
    if stage.rng.random() < 0.5:
        stage.link.delete(KEYS.state(symbol))  # what is committed from now on is not the whole
        stage.some_more()
        worker.kill()
    else:
        worker.kill()
        stage.link.delete(KEYS.state(symbol))
    worker = stage.worker()
    stage.settle()
    if "STATE_GAP" not in worker.said() and "STATE_DAMAGED" not in worker.said():
        return stage.judge()  # it had written all of it again: then nothing may be missing
    return stage.judge_without(symbol)


@fault(18, "trimmed past the cursor, while the worker is down and while it reads")
def trim_unread(stage: Stage) -> Verdict:
    worker = stage.begin()
    for _ in range(stage.rng.randint(1, 3)):
        if stage.rng.random() < 0.5:
            worker.kill()
            stage.produce_more()
            stage.trim()
            worker = stage.worker()
            stage.until_started(worker)
        else:
            stage.trim()
        time.sleep(stage.rng.random() * 0.1)
    return stage.judge_losses()


@fault(21, "state that is damaged, or of another version")
def damage_state(stage: Stage) -> Verdict:
    worker = stage.begin()
    stage.some_more()
    worker.kill()
    symbol = stage.rng.choice(sorted(stage.known_symbols()))
    cells = stage.link.hgetall(KEYS.state(symbol))
    name = stage.rng.choice(sorted(cells))
    cell = bytearray(cells[name])
    if stage.rng.random() < 0.3:
        cell[0] = 0
    elif stage.rng.random() < 0.3:
        del cell[stage.rng.randrange(len(cell)) :]
    else:
        cell[stage.rng.randrange(1, len(cell))] ^= 1 << stage.rng.randrange(8)
    stage.link.hset(KEYS.state(symbol), name, bytes(cell))
    worker = stage.worker()
    stage.settle()
    stage.expect("it is said", "STATE_DAMAGED" in worker.said(), True)
    return stage.judge_without(symbol)


@fault(22, "another policy takes over mid-stream, and the worker is killed after it")
def swap_policy(stage: Stage) -> Verdict:
    former = stage.policy
    stage.policy = stage.directory / "served.safetensors"
    stage.policy.write_bytes(former.read_bytes())
    worker = stage.begin()
    heir = stage.directory / "heir.safetensors"
    heir.write_bytes(lively(seed=6))
    shutil.copy(heir, stage.directory / "next.safetensors")
    os.replace(stage.directory / "next.safetensors", stage.policy)
    worker.signal(signal.SIGHUP)
    wait_until(lambda: "POLICY_SWAPPED" in worker.said(), stage.trouble)
    if stage.rng.random() < 0.5:
        worker.kill()
        stage.worker()
    stage.settle()
    return stage.judge(*stage.reference_swapped(former, heir))


@fault(24, "permissions are revoked and given back")
def revoke(stage: Stage) -> Verdict:
    worker = stage.begin()
    for commands in stage.rng.sample([("-xread",), ("-evalsha", "-eval"), ("-multi",)], 2):
        stage.link.execute_command("ACL", "SETUSER", "default", *commands)
        wait_until(lambda: worker.said().rpartition("REDIS_RETURNED")[2].count("REDIS_LOST"))
        used = worker.cpu_s()  # what it had in hand is folded by now
        time.sleep(0.4)
        stage.expect("no busy loop", worker.cpu_s() - used < 0.2, True)
        stage.link.execute_command("ACL", "SETUSER", "default", "+@all")
        stage.some_more()
    stage.settle()
    stage.expect("the reason is said", "permission" in worker.said(), True)
    return stage.judge()
