"""Who may ask, how often, and how much may they send? The outermost layer of the HTTP process.

Every answer that it gives itself is short and costs little, so that nobody who asks too often takes
much of the machine from the worker.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import ipaddress
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY = 16_384
BODY_S = 5.0
OPEN = ("/healthz", "/readyz")
"""What probes may ask without a token."""
CLIENTS = 1_024
"""Addresses whose rate is remembered."""


class Limits(NamedTuple):
    """How many requests are answered."""

    per_client: float = 20.0
    """A second, from one address."""
    burst: float = 40.0
    overall: float = 100.0
    """A second, from everybody."""


class _Bucket:
    """Tokens that refill evenly."""

    __slots__ = ("_at", "_left", "_most", "_rate")

    def __init__(self, rate: float, most: float, now: float) -> None:
        self._rate, self._most, self._left, self._at = rate, most, most, now

    def take(self, now: float) -> bool:
        self._left = min(self._most, self._left + (now - self._at) * self._rate)
        self._at = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True


class Guard:
    """ASGI middleware: address, token, rate and size, in this order.

    Args:
        app: who answers what is let through.
        token: what requests must bring, as `Bearer TOKEN` or as the password of `Basic`; empty for
            none, and then only names of this machine are accepted as Host (a page in a browser
            could otherwise reach us under a name of its own).
        limits: rates.
        clock: seconds, monotonic.

    Attributes:
        answered: status code -> answers, ours and the app's.
    """

    def __init__(
        self,
        app: ASGIApp,
        token: str,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app = app
        self._token = token.encode()
        self._limits = limits or Limits()
        self._clock = clock
        self._overall = _Bucket(self._limits.overall, self._limits.overall, clock())
        self._clients: OrderedDict[str, _Bucket] = OrderedDict()
        self.answered: Counter[int] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that must not pass, or hand it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.answered[message["status"]] += 1
            await send(message)

        headers = dict(scope["headers"])
        if not self._token and not _own_name(headers.get(b"host", b"")):
            await _refuse(counted, 421, "expected a name of this machine as Host")
        elif not self._in_time(scope):
            await _refuse(counted, 429, "too many requests", (b"retry-after", b"1"))
        elif self._token and scope["path"] not in OPEN and not self._knows(headers):
            await _refuse(
                counted, 401, "expected the token of RLV3_API_TOKEN as Bearer or as password",
                (b"www-authenticate", b'Basic realm="rlv3-shadow", charset="UTF-8"'),
            )  # fmt: skip
        else:
            await self._pass(scope, headers, receive, counted)

    def _in_time(self, scope: Scope) -> bool:
        now = self._clock()
        client = scope["client"][0] if scope.get("client") else ""
        bucket = self._clients.get(client)
        if bucket is None:
            bucket = self._clients[client] = _Bucket(
                self._limits.per_client, self._limits.burst, now
            )
            if len(self._clients) > CLIENTS:
                self._clients.popitem(last=False)
        else:
            self._clients.move_to_end(client)
        return bucket.take(now) and self._overall.take(now)

    def _knows(self, headers: dict[bytes, bytes]) -> bool:
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() == b"basic":
            try:
                given = base64.b64decode(given, validate=True).partition(b":")[2]
            except binascii.Error:
                return False
        elif kind.lower() != b"bearer":
            return False
        return hmac.compare_digest(given.strip(), self._token)

    async def _pass(
        self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send
    ) -> None:
        """Read the body, which is small or refused, then let the app answer."""
        length = headers.get(b"content-length", b"0")
        body: bytes | None = None
        if length.isdigit() and int(length) <= MAX_BODY:
            try:
                async with asyncio.timeout(BODY_S):
                    body = await _body(receive)
            except TimeoutError:
                await _refuse(send, 408, f"expected the body within {BODY_S:.0f} s")
                return
        if body is None:
            await _refuse(send, 413, f"expected a body of at most {MAX_BODY} bytes")
            return
        handed = False

        async def replay() -> Message:
            nonlocal handed
            if handed:
                return await receive()
            handed = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)


async def _body(receive: Receive) -> bytes | None:
    """Return the whole body; None where it is too large."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MAX_BODY:
            return None
        if not message.get("more_body"):  # or the client went away: nobody reads the answer
            return body


def _own_name(host: bytes) -> bool:
    name = host.decode("latin-1").lower()
    name = name.partition("]")[0].lstrip("[") if name.startswith("[") else name.partition(":")[0]
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


async def _refuse(send: Send, status: int, detail: str, *headers: tuple[bytes, bytes]) -> None:
    body = msgspec.json.encode({"detail": detail})
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                *headers,
            ],
        }
    )
    await send({"type": "http.response.body", "body": body})
