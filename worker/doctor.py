"""Can the worker live beside this Redis? Rows of what was looked at, found, and what to do.

Reads only. It is meant to be run as the worker's own Redis user, whose permissions it looks at.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import redis.exceptions
from redis.asyncio import Redis
from rich.table import Table
from rich.text import Text

from rlv3 import console
from rlv3.errors import PolicyError
from worker.address import AWAY, connected, refused, shown
from worker.artifact import load_policy
from worker.bus import MIN_VERSION
from worker.config import WorkerConfig
from worker.errors import CheckFailed
from worker.keys import Keys
from worker.permission import Harm, harm
from worker.tail import stream_info

Status = Literal["ok", "note", "warning", "danger"]
STYLES = {"ok": "green", "note": "dim", "warning": "yellow", "danger": "bold red"}
SILENT_S = 60.0
"""A stream of ticks that has not grown for so long is worth a look."""
SKEW_S = 1.0
FULL = 0.8


class Row(NamedTuple):
    """One check."""

    check: str
    status: Status
    found: str
    remedy: str = ""


async def examine(config: WorkerConfig) -> list[Row]:
    """Look at everything.

    Raises:
        RedisUnavailable: a server does not answer, or refuses the login or a look.
    """
    rows = [artifact(config)]
    for role, url in config.servers.items():
        async with connected(url) as link:
            rows.append(Row(f"{role}: address", "note", shown(url)))
            try:
                rows += await _examine(role, link, config)
            except AWAY as error:
                raise refused(url, "to let us look", error) from error
    return rows


async def _examine(role: str, link: Redis, config: WorkerConfig) -> list[Row]:
    keys = Keys(config.prefix)
    rows = await _server(role, link)
    if rows[-1].check == f"{role}: kind":
        return rows  # a cluster: nothing else is worth looking at
    rows.append(permissions(role, await harm(link, keys)))
    if role != "sink":
        rows += await _inputs(role, link, keys, config)
    if role != "source":
        rows += await _own(link, keys)
    return rows


def artifact(config: WorkerConfig) -> Row:
    """Check that the worker would serve the artifact."""
    try:
        policy = load_policy(config)
    except PolicyError as error:
        return Row("artifact", "danger", str(error), "name another file with --policy")
    return Row(
        "artifact", "ok", f"{policy.digest[:12]}, {policy.trained_steps:,} steps of training"
    )


async def _server(role: str, link: Redis) -> list[Row]:
    info = await link.info()
    rows = list(server_rows(role, info))
    if rows[-1].status != "danger":
        seconds, micros = await link.time()
        rows += [*memory_rows(role, info), clock(role, seconds + micros / 1e6 - time.time())]
    return rows


def server_rows(role: str, info: Mapping[str, Any]) -> Iterator[Row]:
    """Check version and kind; the last row says whether the rest is worth looking at."""
    version = str(info["redis_version"])
    numbers = tuple(int(part) for part in version.split(".")[:2])
    if numbers < MIN_VERSION:
        yield Row(f"{role}: version", "danger", version, "install Redis 6.2 or newer, best 7")
    elif numbers < (7,):
        yield Row(
            f"{role}: version", "warning", f"{version}: tier 6.2",
            "Redis 7 counts lost entries exactly and has the selectors of the shipped users",
        )  # fmt: skip
    else:
        yield Row(f"{role}: version", "ok", f"{version}: tier 7, every guarantee holds")
    mode = str(info["redis_mode"])
    if mode == "standalone":
        yield Row(f"{role}: kind", "ok", mode)
    else:
        yield Row(
            f"{role}: kind", "danger", mode,
            "one commit writes keys of several slots: give the worker a standalone Redis as sink",
        )  # fmt: skip


def memory_rows(role: str, info: Mapping[str, Any]) -> Iterator[Row]:
    """Check whether what we keep can vanish: by eviction, or by a restart."""
    if role == "source":
        return
    policy, limit, used = info["maxmemory_policy"], info["maxmemory"], info["used_memory"]
    share = f", {used / limit:.0%} of {limit / 2**20:.0f} MiB used" if limit else ", no limit"
    found = f"{policy}{share}"
    if not limit or not policy.startswith("allkeys"):
        near = limit and used / limit > FULL
        yield Row(
            f"{role}: memory", "warning" if near else "ok", found,
            "Redis will soon refuse our commits: raise maxmemory" if near else "",
        )  # fmt: skip
    else:
        evicting = info["evicted_keys"] > 0 or used / limit > FULL
        yield Row(
            f"{role}: memory", "danger" if evicting else "warning",
            f"{found}, {info['evicted_keys']:,} keys evicted",
            "our state can be evicted, which is an incident (--on-gap): give the worker a Redis of "
            "its own as --sink-url, or set maxmemory-policy noeviction",
        )  # fmt: skip
    failed = [
        name
        for name in ("aof_last_write_status", "rdb_last_bgsave_status")
        if info.get(name, "ok") != "ok"
    ]
    if failed:
        yield Row(
            f"{role}: persistence", "danger", f"{', '.join(failed)}: failed",
            "Redis cannot write its own files: look at its log and disk",
        )  # fmt: skip
    elif info["aof_enabled"]:
        yield Row(f"{role}: persistence", "ok", "append-only file")
    else:
        yield Row(
            f"{role}: persistence", "warning", "no append-only file",
            "a restart of Redis loses cursors and outputs since its last snapshot: appendonly yes",
        )  # fmt: skip


def clock(role: str, skew_s: float) -> Row:
    """Compare the server's clock with ours."""
    found = f"{skew_s:+.2f} s against this machine"
    if abs(skew_s) <= SKEW_S:
        return Row(f"{role}: clock", "ok", found)
    return Row(f"{role}: clock", "warning", found, "set both clocks by NTP: latencies are wrong")


def permissions(role: str, found: Harm) -> Row:
    """Check that the server would refuse us whatever could trade."""
    if found.commands:
        return Row(
            f"{role}: permissions", "danger",
            f"user {found.user or '(unnamed)'} could do {', '.join(found.commands[:3])}"
            f"{' …' if found.commands[3:] else ''} ({len(found.commands)} in all; {found.way})",
            "log in as a user of deploy/redis/users.acl (deploy/README.md)",
        )  # fmt: skip
    return Row(
        f"{role}: permissions", "ok",
        f"user {found.user or '(unnamed)'} can do nothing to the trading system ({found.way})",
    )  # fmt: skip


async def _inputs(role: str, link: Redis, keys: Keys, config: WorkerConfig) -> list[Row]:
    seconds, micros = await link.time()
    now_ms = seconds * 1_000 + micros / 1_000
    rows = []
    for event_type in config.inputs:
        info = await stream_info(link, keys.stream(event_type))
        rows.append(stream_row(f"{role}: {event_type}", event_type, info, now_ms))
    return rows


def stream_row(check: str, event_type: str, info: Mapping[str, Any] | None, now_ms: float) -> Row:
    """Check that an input exists and grows; only ticks are needed."""
    needed = event_type == "market.tick"
    if info is None:
        return Row(
            check, "warning" if needed else "note", "absent",
            "is the publisher running, and is --prefix right?" if needed else "",
        )  # fmt: skip
    grown_s = (now_ms - int(info["last-generated-id"].decode().partition("-")[0])) / 1_000
    found = f"{info['length']:,} entries, grew {_ago(grown_s)}"
    if grown_s < -SKEW_S:
        return Row(
            check, "warning", f"its newest id is {-grown_s:.0f} s ahead of Redis's clock",
            "a publisher sets its own ids, or a clock was stepped (CLOCK_AHEAD)",
        )  # fmt: skip
    if needed and grown_s > SILENT_S:
        return Row(check, "warning", found, "is the publisher running?")
    return Row(check, "ok" if grown_s <= SILENT_S else "note", found)


def _ago(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(seconds, 0.0):.0f} s ago"


async def _own(link: Redis, keys: Keys) -> list[Row]:
    """Say what of ours is there; a user without the right to look gets a note."""
    try:
        found = await link.hmget(keys.meta, ["epoch", "run_id"])
    except redis.exceptions.NoPermissionError:
        return [Row("our state", "note", "this user may not look at it")]
    epoch, run_id = (value.decode() if isinstance(value, bytes) else None for value in found)
    if epoch is None:
        return [Row("our state", "note", "none yet: a first start")]
    return [Row("our state", "ok", f"epoch {epoch}, run {run_id or 'not begun'}")]


def show(rows: list[Row]) -> None:
    """Print the rows as a table for people."""
    table = Table(box=None, pad_edge=False)
    for name in ("check", "", "found", "what to do"):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(row.check, Text(row.status, STYLES[row.status]), row.found, row.remedy)
    console.out.print(table)


def command(config: WorkerConfig, *, as_json: bool) -> None:
    """Examine and print.

    Raises:
        CheckFailed: a row is a danger.
        RedisUnavailable: a server does not answer or refuses the login.
    """
    rows = asyncio.run(examine(config))
    if as_json:
        console.out.print_json(json.dumps([row._asdict() for row in rows]))
    else:
        show(rows)
    dangers = [row.check for row in rows if row.status == "danger"]
    if dangers:
        raise CheckFailed(f"expected no danger, found {len(dangers)}: {', '.join(dangers)}")
