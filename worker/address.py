"""Where is Redis, and how is a connection to it opened? Every form of URL that we take.

    redis://[user:password@]host:port/db            plain
    rediss://…?ssl_ca_certs=FILE                    TLS; also ssl_certfile, ssl_keyfile
    unix://path?db=0                                a socket
    redis+sentinel://[user:password@]host:port,host:port/name/db
                                                    whoever is the master of `name` now; with
                                                    rediss+sentinel:// it speaks TLS; also
                                                    ?sentinel_username, ?sentinel_password

A connection behind Sentinel asks for the master whenever it opens, and a master that was demoted
counts as gone.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit

import redis.exceptions
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff

from rlv3.errors import ConfigError
from worker.errors import RedisUnavailable

SCHEMES = ("redis://", "rediss://", "unix://", "redis+sentinel://", "rediss+sentinel://")
SOCKET_TIMEOUT_S = 10.0  # above every block time that is used with `connected`
CONNECT_TIMEOUT_S = 5.0
_SENTINEL_PORT = 26_379
_OF_SENTINELS = ("retry", "protocol", "driver_info", "lib_name", "lib_version")
AWAY = (
    redis.exceptions.ConnectionError,  # refused, cut, loading, wrong password
    redis.exceptions.TimeoutError,
    redis.exceptions.ResponseError,  # read-only, out of memory, no permission
)
"""What a running reader answers by backing off: the server is away, or refuses us for now."""


def shown(url: str) -> str:
    """Return a URL without its password, however that is written."""
    try:
        parts = _split(url)
    except ValueError:
        return f"{url.partition('://')[0]}://…"
    place = f"{parts.netloc.rpartition('@')[2]}{parts.path}"
    return f"{parts.scheme}://{place}" if parts.scheme else place


def _split(url: str) -> SplitResult:
    """Split a URL into its parts.

    Raises:
        ValueError: the login may reach into what follows it; the sentence does not show it.
    """
    try:
        parts = urlsplit(url)
        rest = f"{parts.path}?{parts.query}#{parts.fragment}"
        # the path of a socket may have an @ of its own
        whole = parts.scheme == "unix" and ("@" in parts.netloc or not parts.netloc)
        cut = "@" in rest and not whole
    except ValueError:  # its text repeats the login
        cut = True
    if cut:
        raise ValueError(
            "user and password must be percent-encoded: / is %2F, ? is %3F, # is %23, [ is %5B"
        )
    return parts


def quiet() -> dict[str, None]:
    """Return options without CLIENT SETINFO, which a user with few permissions may not send."""
    known = inspect.signature(AbstractConnection.__init__).parameters
    # named anew in redis-py 7.2
    return dict.fromkeys(
        ("driver_info",) if "driver_info" in known else ("lib_name", "lib_version")
    )


def open_pool(url: str, **options: Any) -> ConnectionPool:
    """Return a pool of connections to a URL; nothing is opened yet.

    Args:
        url: one of the forms above.
        options: keyword arguments of redis-py's connections.
    Raises:
        ConfigError: it is no URL that we take.
    """
    try:
        parts = _split(url)
        if parts.scheme == "unix":  # a socket of this machine has nothing to keep alive
            options = {k: v for k, v in options.items() if k != "socket_keepalive"}
        sentinel = "+sentinel" in parts.scheme
        pool = (
            _sentinel_pool(parts, options) if sentinel else ConnectionPool.from_url(url, **options)
        )
        pool.connection_class(**pool.connection_kwargs)  # refuses settings that it does not know
    except (ValueError, TypeError, redis.exceptions.RedisError) as error:
        raise ConfigError(
            f"expected a Redis URL ({', '.join(SCHEMES)}), found {shown(url)!r}: {error}"
        ) from error
    return pool


def _sentinel_pool(parts: SplitResult, options: dict[str, Any]) -> ConnectionPool:
    name, _, db = parts.path.strip("/").partition("/")
    if not name or not (db or "0").isdigit():
        raise ValueError("a Sentinel URL ends with /NAME or /NAME/DB")
    login, _, places = parts.netloc.rpartition("@")
    query = dict(parse_qsl(parts.query))
    to_sentinels = {
        field.removeprefix("sentinel_"): query.pop(field)
        for field in ("sentinel_username", "sentinel_password")
        if field in query
    }
    # redis-py reads login, database and TLS out of a plain URL; the address is Sentinel's to give
    plain = f"{parts.scheme.partition('+')[0]}://{login}@sentinel/{db or 0}?{urlencode(query)}"
    template = ConnectionPool.from_url(plain, **options)
    # until Sentinel has answered there is no address; redis-py's default is somebody else's server
    settings = dict(template.connection_kwargs) | {"host": "127.0.0.1", "port": 0}
    common = {k: v for k, v in options.items() if k.startswith("socket_") or k in _OF_SENTINELS}
    sentinels = Sentinel(  # type: ignore[no-untyped-call]
        [_place(text) for text in places.split(",")], sentinel_kwargs=common | to_sentinels
    )
    tls = parts.scheme.startswith("rediss")
    return _SentinelPool(name, sentinels, ssl=tls, **settings)  # type: ignore[no-untyped-call]


class _SentinelPool(SentinelConnectionPool):
    """Asks Sentinel for the master and keeps no connection to it afterwards."""

    async def get_master_address(self) -> Any:
        try:
            return await super().get_master_address()  # type: ignore[no-untyped-call]
        finally:
            for sentinel in self.sentinel_manager.sentinels:
                await sentinel.aclose()


def open_client(url: str, **options: Any) -> Redis:
    """Return a client of a URL; nothing is opened yet.

    Raises:
        ConfigError: it is no URL that we take.
    """
    return Redis.from_pool(open_pool(url, **options))


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Redis]:
    """Open a client that never repeats a command by itself and never waits for ever.

    Raises:
        ConfigError: it is no URL that we take.
        RedisUnavailable: the server does not answer, or refuses us.
    """
    place = shown(url).partition("://")[2]
    link = open_client(
        url,
        protocol=2,
        socket_timeout=SOCKET_TIMEOUT_S,
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
        **quiet(),
    )
    async with link:
        try:
            await link.ping()
        except (redis.exceptions.RedisError, OSError) as error:
            raise RedisUnavailable(f"expected a Redis at {place}, found: {error}") from error
        yield link


def refused(url: str, expected: str, error: Exception) -> RedisUnavailable:
    """Say what a program that ends without it had expected of Redis."""
    return RedisUnavailable(f"expected Redis at {shown(url)} {expected}, found: {error}")


def _place(text: str) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ValueError(f"expected host:port of a Sentinel, found {text!r}")
    return unquote(parts.hostname), parts.port or _SENTINEL_PORT
