"""What could our Redis user do to the trading system? Asked of the server, which does none of it.

ACL DRYRUN answers without running anything (Redis 7, for users who may ask it). Everybody else
sends an append with the id 0-0 from Lua, or plainly where there is no Lua: Redis rejects that id
whoever sends it, and rejects the user first where the user may not append at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from worker.keys import OTHERS, OTHERS_KEYS, Keys

_PROBE = """
local said = {}
for i, key in ipairs(ARGV) do
  local reply = redis.pcall('XADD', key, '0-0', 'probe', '1')
  said[i] = reply.err or 'done'
end
return said
"""
_SERVER = (
    ("FLUSHALL",), ("FLUSHDB",), ("SHUTDOWN",), ("CONFIG", "SET", "maxmemory", "1"),
    ("SWAPDB", "0", "1"), ("REPLICAOF", "NO", "ONE"), ("SCRIPT", "FLUSH"),
)  # fmt: skip
_STREAM = (("XTRIM", "{}", "MAXLEN", "0"), ("XGROUP", "DESTROY", "{}", "g"), ("DEL", "{}"),
           ("RENAME", "{}", "{}"))  # fmt: skip


class Harm(NamedTuple):
    """What a user could do that must never happen."""

    user: str
    """Its name, empty where the server does not tell."""
    commands: tuple[str, ...]
    way: str
    """How that was found out."""

    def sentence(self, url: str) -> str:
        """Say what was expected of a server's user and what was found."""
        few = ", ".join(self.commands[:3])
        rest = f" and {len(self.commands) - 3} more" if len(self.commands) > 3 else ""
        return (
            f"expected {url} to refuse its user {self.user or '(unnamed)'} all that could trade "
            f"or destroy, found that it would do {few}{rest}; load deploy/redis/users.acl"
        )


def denies(text: str) -> bool:
    """Return True for an error that says: this user may not."""
    return any(mark in text for mark in ("NOPERM", "no permission", "executing the script can't"))


async def harm(link: Redis, keys: Keys) -> Harm:
    """Return what the user of a connection could do to the trading system; nothing is written.

    Raises:
        RedisError: the connection failed.
    """
    user = await _ask(link, ["ACL", "WHOAMI"])
    name = user.decode() if isinstance(user, bytes) else ""
    commands = _commands(keys)
    answers = await _ask_all(link, [["ACL", "DRYRUN", name, *command] for command in commands])
    if not isinstance(answers[0], ResponseError):
        able = [c for c, answer in zip(commands, answers, strict=True) if answer == b"OK"]
        return Harm(name, tuple(" ".join(command[:2]) for command in able), "ACL DRYRUN")
    flags = await _ask(link, ["ACL", "GETUSER", name])
    if isinstance(flags, list) and {b"allcommands", b"allkeys"} <= set(flags[1]):
        return Harm(name, ("every command on every key",), "ACL GETUSER")
    return await _probe(link, keys, name)


async def _probe(link: Redis, keys: Keys, user: str) -> Harm:
    streams = [keys.stream(name) for name in OTHERS]
    way = "an append from Lua that Redis always rejects"
    said = await _ask(link, ["EVAL", _PROBE, "0", *streams])
    if isinstance(said, ResponseError):
        way = "an append that Redis always rejects"
        said = await _ask_all(link, [["XADD", stream, "0-0", "probe", "1"] for stream in streams])
    texts = [
        answer.decode() if isinstance(answer, bytes) else f"{_code(answer)}{answer}"
        for answer in said
    ]
    able = [stream for stream, text in zip(streams, texts, strict=True) if not denies(text)]
    return Harm(user, tuple(f"XADD {stream}" for stream in able), way)


def _code(answer: object) -> str:
    """Return the error code that the client made a class of."""
    return "NOPERM " if type(answer).__name__ == "NoPermissionError" else ""


def _commands(keys: Keys) -> list[list[str]]:
    streams = [keys.stream(name) for name in OTHERS]
    found = [["XADD", stream, "*", "probe", "1"] for stream in streams]
    found += [[word.format(stream) for word in line] for stream in streams for line in _STREAM]
    found += [["SET", keys.other(name), "1"] for name in OTHERS_KEYS]
    return found + [list(line) for line in _SERVER]


async def _ask(link: Redis, command: Sequence[str]) -> Any:
    (answer,) = await _ask_all(link, [command])
    return answer


async def _ask_all(link: Redis, commands: Sequence[Sequence[str]]) -> list[Any]:
    """Return the replies; an error that the server answers is returned, not raised."""
    pipeline = link.pipeline(transaction=False)
    for command in commands:
        pipeline.execute_command(*command)
    replies: list[Any] = await pipeline.execute(raise_on_error=False)
    for reply in replies:
        if isinstance(reply, RedisError) and not isinstance(reply, ResponseError):
            raise reply
    return replies
