"""Which keys of a Redis are ours, and how do they go without touching anybody else's?

Ours is what lies under our own prefix, the heartbeat, and our streams and dead letters as far as
every entry in them says that we wrote it. A stream with a stranger's entries stays, and is named.
"""

from __future__ import annotations

import sys
import time
from typing import NamedTuple, cast

import typer
from redis.asyncio import Redis
from rich.table import Table

from rlv3 import console
from rlv3.errors import ConfigError
from worker.address import AWAY, connected, refused, shown
from worker.bus import SOURCE
from worker.config import WorkerConfig
from worker.errors import CheckFailed
from worker.keys import READABLE, Keys

Chunk = list[tuple[bytes, dict[bytes, bytes]]]
_CHUNK = 256
_BEAT_S = 10


class Found(NamedTuple):
    """A key that may be ours."""

    key: str
    what: str
    entries: int | None = None
    """Of a stream."""
    foreign: int = 0
    """Entries of a stream that somebody else wrote."""


async def find(link: Redis, keys: Keys) -> list[Found]:
    """Return every key that is there and carries one of our names, in a fixed order."""
    streams = [(keys.decisions, "decisions"), (keys.comparisons, "comparisons")]
    streams += [(keys.dlq(name), "dead letters") for name in READABLE]
    found = [await _stream(link, key, what) for key, what in streams if await link.exists(key)]
    if await link.exists(keys.replay):  # entries there are copies of others' by design
        found.append(Found(keys.replay, "replays", await link.xlen(keys.replay)))
    own = [key.decode() async for key in link.scan_iter(match=f"{keys.own}*", count=_CHUNK)]
    found += [Found(key, "state") for key in sorted(set(own))]
    if await link.exists(keys.heartbeat):
        found.append(Found(keys.heartbeat, "heartbeat"))
    return found


async def _stream(link: Redis, key: str, what: str) -> Found:
    entries = foreign = 0
    start = "-"
    while chunk := cast("Chunk", await link.xrange(key, min=start, count=_CHUNK)):
        entries += len(chunk)
        foreign += sum(fields.get(b"source") != SOURCE.encode() for _, fields in chunk)
        start = f"({chunk[-1][0].decode()}"
    return Found(key, what, entries, foreign)


async def uninstall(config: WorkerConfig, *, yes: bool, dry_run: bool, force: bool) -> None:
    """List what is ours, ask, and remove it.

    Raises:
        CheckFailed: a worker is alive, and `force` is off.
        ConfigError: there is nobody to ask, and `yes` is off.
        RedisUnavailable: Redis does not answer, or refuses.
    """
    keys = Keys(config.prefix)
    async with connected(config.sink_url) as link:
        try:
            await _uninstall(link, keys, shown(config.sink_url), yes, dry_run, force)
        except AWAY as error:
            raise refused(config.sink_url, "to let us remove our keys", error) from error


async def _uninstall(
    link: Redis, keys: Keys, place: str, yes: bool, dry_run: bool, force: bool
) -> None:
    found = await find(link, keys)
    ours = [item for item in found if not item.foreign]
    _show(found, place)
    if dry_run or not ours:
        return
    if await _is_alive(link, keys) and not force:
        raise CheckFailed(
            f"expected no worker to run, found that {keys.heartbeat} in {place} is renewed: "
            "stop the worker, wait ten seconds and try again (or --force)"
        )
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigError("expected --yes where nobody can be asked, found no terminal")
        if not typer.confirm(f"Remove these {len(ours)} keys for ever?"):
            console.out.print("nothing was removed")
            return
    for item in ours:
        await link.unlink(item.key)
    console.out.print(f"removed {len(ours)} keys from {place}")


async def _is_alive(link: Redis, keys: Keys) -> bool:
    """Return True when the heartbeat is young; a worker that was killed leaves one for 10 s."""
    beat = await link.get(keys.heartbeat)
    return beat is not None and time.time() - float(beat) < _BEAT_S


def _show(found: list[Found], place: str) -> None:
    if not found:
        console.out.print(f"nothing of ours is in {place}")
        return
    table = Table(box=None, pad_edge=False)
    for name in ("key", "what", "entries", ""):
        table.add_column(name, overflow="fold")
    for item in found:
        stays = f"stays: {item.foreign:,} entries of somebody else" if item.foreign else ""
        entries = "" if item.entries is None else f"{item.entries:,}"
        table.add_row(item.key, item.what, entries, stays)
    console.out.print(table)
