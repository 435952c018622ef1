"""What does an operator see of a stall, and when? `python -m tests.chaos.stalls` tries each kind.

Redis is stopped, frozen (SIGSTOP) or behind a network that swallows everything; the worker is our
real program. Printed per kind: seconds until the log says REDIS_LOST and STALLED, how often each is
said, processor time used meanwhile, and whether everything is decided afterwards.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from rlv3 import console
from tests.chaos.policy import lively
from tests.chaos.programs import nursery, wait_until
from tests.chaos.stage import Stage
from worker.embedded import find_servers

app = typer.Typer(add_completion=False)


def stop_redis(stage: Stage) -> Callable[[], None]:
    """Kill -9, with an append-only file."""
    stage.server.kill()
    return stage.server.restart


def freeze_redis(stage: Stage) -> Callable[[], None]:
    """SIGSTOP: connections stay open, nothing answers."""
    pid = int(stage.link.info("server")["process_id"])
    os.kill(pid, signal.SIGSTOP)
    return lambda: os.kill(pid, signal.SIGCONT)


def swallow(stage: Stage) -> Callable[[], None]:
    """Let the network swallow everything."""
    stage.proxy.stall()
    return stage.proxy.flow


KINDS = {"stopped": stop_redis, "frozen": freeze_redis, "black hole": swallow}


@app.command()
def stalls(
    seconds: Annotated[float, typer.Option(help="How long each one lasts.")] = 30.0,
) -> None:
    """Play each kind once and print a table."""
    binary = find_servers()[0]
    heads = (
        "Redis",
        "REDIS_LOST after",
        "said",
        "STALLED after",
        "said",
        "CPU time",
        "decided",
    )
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, begin in KINDS.items():
        with tempfile.TemporaryDirectory() as directory:
            policy = Path(directory) / "lively.safetensors"
            policy.write_bytes(lively())
            with Stage(1, nursery(), binary, policy, fsync="always") as stage:
                lines.append(f"| {name} for {seconds:.0f} s | {_play(stage, begin, seconds)} |")
    console.out.print("\n".join(lines), markup=False, soft_wrap=True)


def _play(stage: Stage, begin: Callable[[Stage], Callable[[], None]], seconds: float) -> str:
    worker = stage.begin()
    used, began = worker.cpu_s(), time.monotonic()
    end = begin(stage)
    after: dict[str, float] = {}
    while time.monotonic() - began < seconds:
        said = worker.said()
        for word in ("REDIS_LOST", "STALLED"):
            if word in said:
                after.setdefault(word, time.monotonic() - began)
        time.sleep(0.02)
    used = worker.cpu_s() - used
    said = worker.said()
    end()
    wait_until(stage.all_read, stage.trouble)
    stage.settle()
    kept = "all, once" if stage.judge().kept else "NOT AS EXPECTED"
    words = " | ".join(
        f"{after.get(word, float('nan')):.1f} s | {said.count(word)} times"
        for word in ("REDIS_LOST", "STALLED")
    )
    return f"{words} | {used:.2f} s | {kept}"


if __name__ == "__main__":
    console.run(app)
