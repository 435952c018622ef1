"""What could not be decided, and how is it sent in again? `rlv3-worker dlq list` and `dlq replay`.

A dead letter is named `<input event type>/<entry id>`, after the entry that it is about. A replay
is an entry of `rl_v3.replay` with the original's fields and its place; that stream is the only one
that is ever written to here. Whether it is decided is up to the worker (see `shadow.pipeline`).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import typer
from redis.asyncio import Redis
from redis.exceptions import RedisError
from rich.table import Table

from rlv3 import console
from rlv3.errors import ConfigError
from shadow import codec
from shadow.records import ORIGIN, REPLAY, Entry
from worker.address import connected, refused, shown
from worker.bus import KEPT
from worker.errors import CheckFailed
from worker.keys import READABLE, Keys

DECIDED = ("market.tick", "signal.generated", "ai.signal_generated")
"""Inputs whose entries are decided; a replay of any other would have no effect."""
CRASH = "crash"
_PAGE = 500
_EXCERPT = 160


class Letter(NamedTuple):
    """A dead letter."""

    event_type: str
    """Of the input it is about."""
    stream: str
    """Full key of that input."""
    entry_id: str
    at: str
    reason: str
    error: str
    payload: dict[str, Any]

    @property
    def name(self) -> str:
        """How users call it."""
        return f"{self.event_type}/{self.entry_id}"

    @property
    def excerpt(self) -> str:
        """What the entry said, as far as the letter keeps it, on one short line."""
        original = self.payload.get("original")
        fields = original if isinstance(original, dict) else {}
        body = next((fields[k] for k in ("payload", "data", "message") if fields.get(k)), None)
        text = str(body) if body is not None else json.dumps(fields, ensure_ascii=False)
        line = "".join(c if c.isprintable() else "." for c in text)
        return line if len(line) <= _EXCERPT else line[: _EXCERPT - 1] + "…"


class Plan(NamedTuple):
    """What becomes of a letter."""

    letter: Letter
    fields: dict[bytes, bytes] | None
    """The original's; None when it cannot be replayed."""
    note: str
    """Where they come from, or why it cannot."""


# -- list -----------------------------------------------------------------------------------------


def show(url: str, prefix: str, stream: str | None, limit: int, as_json: bool) -> None:
    """Print the newest dead letters, oldest of them first.

    Raises:
        RedisUnavailable: Redis does not answer or refuses.
        ConfigError: `stream` is no input.
    """
    letters = asyncio.run(_reading(url, Keys(prefix), _names(stream)))
    shown_letters = letters[-limit:]
    if as_json:
        for letter in shown_letters:
            console.out.print(
                json.dumps({"id": letter.name, "excerpt": letter.excerpt, **letter.payload}),
                markup=False, highlight=False, soft_wrap=True,
            )  # fmt: skip
        return
    if shown_letters:
        console.out.print(_table(shown_letters))
    console.out.print(f"{len(letters):,} dead letters, {len(shown_letters):,} shown")


def _table(letters: Sequence[Letter]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("id", no_wrap=True)  # it is copied into `dlq replay`
    for heading in ("when", "reason", "expected and found", "excerpt"):
        table.add_column(heading, overflow="fold")
    for letter in letters:
        table.add_row(letter.name, letter.at[:19], letter.reason, letter.error, letter.excerpt)
    return table


def _names(stream: str | None) -> tuple[str, ...]:
    """Return the inputs to look at, by the name of one or all.

    Raises:
        ConfigError: there is no such input.
    """
    if stream is None:
        return READABLE
    name = stream.rpartition(":")[2]
    if name not in READABLE:
        raise ConfigError(f"--stream must be among {', '.join(READABLE)}, was {stream!r}")
    return (name,)


async def _reading(url: str, keys: Keys, names: Iterable[str]) -> list[Letter]:
    async with connected(url) as link:
        with _asking(url, "to let us read dead letters"):
            return [letter async for letter in _letters(link, keys, names)]


@contextmanager
def _asking(url: str, expected: str) -> Iterator[None]:
    """Name the server that refused, and what it was asked for.

    Raises:
        RedisUnavailable: in place of the client's error.
    """
    try:
        yield
    except RedisError as error:
        raise refused(url, expected, error) from error


async def _letters(link: Redis, keys: Keys, names: Iterable[str]) -> AsyncIterator[Letter]:
    """Yield the letters about each input, oldest first; what is no letter of ours is left out."""
    for name in names:
        after = "-"
        while True:
            page = cast("Any", await link.xrange(keys.dlq(name), min=after, count=_PAGE))
            for _, fields in page:
                letter = _letter(name, fields.get(b"payload", b""))
                if letter is not None:
                    yield letter
            if len(page) < _PAGE:
                break
            after = f"({page[-1][0].decode()}"


def _letter(name: str, payload: bytes) -> Letter | None:
    try:
        found = json.loads(payload)
        return Letter(
            name,
            found["dlq_source_stream"],
            found["dlq_source_id"],
            found["dlq_at"],
            found["dlq_reason"],
            found["dlq_error"],
            found,
        )
    except (ValueError, KeyError, TypeError):
        return None


# -- replay ---------------------------------------------------------------------------------------


class Request(NamedTuple):
    """What the user asked to replay."""

    source_url: str
    sink_url: str
    prefix: str
    ids: tuple[str, ...]
    """Names of letters; empty for all."""
    stream: str | None
    dry_run: bool
    yes: bool


def replay(request: Request) -> None:
    """Append entries of dead letters to `rl_v3.replay`, after a question.

    Raises:
        ConfigError: an id that is none, or nobody to answer the question.
        CheckFailed: a letter that was named cannot be replayed, or the user said no.
        RedisUnavailable: Redis does not answer or refuses.
    """
    asyncio.run(_replay(request, Keys(request.prefix)))


async def _replay(request: Request, keys: Keys) -> None:
    async with connected(request.sink_url) as sink, connected(request.source_url) as source:
        with _asking(request.sink_url, "to let us read dead letters"):
            letters = await _chosen(sink, keys, request)
        with _asking(request.source_url, "to let us read what the letters are about"):
            plans = [await _plan(source, letter, bool(request.ids)) for letter in letters]
        good = [plan for plan in plans if plan.fields is not None]
        _explain(plans)
        if good and not request.dry_run and _agreed(request, len(good), keys):
            with _asking(request.sink_url, "to take replays"):
                await _append(sink, keys, good)
    if request.ids and len(good) < len(plans):
        raise CheckFailed(
            f"expected to replay {len(plans)} dead letters, found that {len(plans) - len(good)} "
            "of them cannot be"
        )


async def _chosen(sink: Redis, keys: Keys, request: Request) -> list[Letter]:
    names = _names(request.stream)
    if not request.ids:
        wanted = [name for name in names if name != REPLAY or request.stream == REPLAY]
        return [letter async for letter in _letters(sink, keys, wanted)]
    for text in request.ids:
        if text.partition("/")[0] not in names:
            raise ConfigError(
                f"expected ids as `dlq list` prints them (market.tick/1700000000000-0), "
                f"found {text!r}"
            )
    wanted = sorted({text.partition("/")[0] for text in request.ids}, key=names.index)
    found = {letter.name: letter async for letter in _letters(sink, keys, wanted)}
    missing = [text for text in request.ids if text not in found]
    if missing:
        raise ConfigError(f"expected a dead letter {missing[0]}, found none")
    return [found[text] for text in dict.fromkeys(request.ids)]


async def _plan(source: Redis, letter: Letter, named: bool) -> Plan:
    """Find the original's fields: in the letter, else in its stream if it is still there."""
    if letter.event_type == REPLAY:
        return Plan(letter, None, "is about a replay; name the letter of the original")
    if letter.event_type not in DECIDED:
        return Plan(letter, None, f"entries of {letter.event_type} are not decided")
    if letter.reason == CRASH and not named:
        return Plan(letter, None, "ended the worker before; name it to try again")
    try:
        fields = codec.letter_fields(letter.payload)
    except ValueError as error:
        return Plan(letter, None, str(error))
    if fields is not None:
        return Plan(letter, fields, "from the letter")
    found = cast(
        "Any", await source.xrange(letter.stream, min=letter.entry_id, max=letter.entry_id)
    )
    digest = letter.payload.get("original_sha256")
    if found and codec.fields_digest(found[0][1]) == digest:
        return Plan(letter, dict(found[0][1]), "from its stream")
    return Plan(
        letter,
        None,
        f"the letter keeps {codec.DEAD_LETTER_BYTES} of {letter.payload.get('original_bytes')} "
        "bytes, and the entry is gone from its stream",
    )


def _explain(plans: Sequence[Plan]) -> None:
    for plan in plans:
        verdict = "replay" if plan.fields is not None else "cannot"
        console.out.print(
            f"{verdict}  {plan.letter.name}  {plan.letter.reason}: {plan.note}",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
    good = sum(plan.fields is not None for plan in plans)
    console.out.print(f"{good:,} of {len(plans):,} dead letters can be replayed")


def _agreed(request: Request, n: int, keys: Keys) -> bool:
    if request.yes:
        return True
    question = f"Append {n:,} entries to {keys.replay} in {shown(request.sink_url)}?"
    try:
        agreed = typer.confirm(question)
    except typer.Abort as error:
        raise ConfigError("expected an answer, or --yes, found no terminal") from error
    if not agreed:
        console.out.print("nothing was appended")
    return agreed


async def _append(sink: Redis, keys: Keys, plans: Sequence[Plan]) -> None:
    waiting = await _waiting(sink, keys)
    if waiting + len(plans) > KEPT:
        raise CheckFailed(
            f"expected at most {KEPT:,} replays to wait for the worker, found {waiting:,} and "
            f"{len(plans):,} more; run the worker, or choose some by --stream or id"
        )
    for first in range(0, len(plans), _PAGE):
        async with sink.pipeline(transaction=True) as batch:
            for letter, fields, _ in plans[first : first + _PAGE]:
                original = Entry(letter.stream, letter.event_type, letter.entry_id, fields or {})
                batch.xadd(keys.replay, cast("Any", codec.replay_fields(original)))
            await batch.execute()
    console.out.print(f"appended {len(plans):,} to {keys.replay}; the worker decides them")


async def _waiting(sink: Redis, keys: Keys) -> int:
    """Return how many replays the worker has not read yet."""
    cursors = json.loads(cast("bytes | None", await sink.hget(keys.meta, "cursors")) or b"{}")
    waiting, cursor = 0, cursors.get(keys.replay, ORIGIN)
    while True:
        page = cast("Any", await sink.xrange(keys.replay, min=f"({cursor}", count=_PAGE))
        waiting += len(page)
        if len(page) < _PAGE:
            return waiting
        cursor = page[-1][0].decode()
