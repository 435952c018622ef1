"""Is every request that must not pass stopped before anything is done for it?"""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import pytest

from worker import guard as guard_module
from worker.guard import MAX_BODY, Guard, Limits

TOKEN = "0123456789abcdef"


class Time:
    """A clock that stands until told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answer 200 with the length of the body."""
    body = (await receive())["body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(len(body)).encode()})


def ask(
    guard: Guard,
    path: str = "/",
    *chunks: bytes,
    client: str = "127.0.0.1",
    **headers: str,
) -> tuple[int, bytes, dict[bytes, bytes]]:
    """Return status, body and headers of the answer."""
    headers = {"host": "127.0.0.1:9127", **headers}
    scope = {
        "type": "http", "path": path, "client": (client, 1),
        "headers": [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()],
    }  # fmt: skip
    parts = list(chunks) or [b""]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if not parts:
            await asyncio.sleep(3600)
        body = parts.pop(0)
        if body == b"stall":
            await asyncio.sleep(3600)
        return {"type": "http.request", "body": body, "more_body": bool(parts)}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(guard(scope, receive, send))
    return sent[0]["status"], sent[1]["body"], dict(sent[0]["headers"])


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:9127", "localhost:1", "[::1]:9127"])
def test_names_of_this_machine_pass_without_a_token(host: str) -> None:
    assert ask(Guard(echo, ""), host=host)[0] == 200


@pytest.mark.parametrize("host", ["example.org", "127.0.0.1.example.org:9127", "10.0.0.1", ""])
def test_other_names_are_refused_without_a_token(host: str) -> None:
    assert ask(Guard(echo, ""), host=host)[0] == 421


def basic(password: str) -> str:
    return "Basic " + base64.b64encode(f"me:{password}".encode()).decode()


@pytest.mark.parametrize("given", [f"Bearer {TOKEN}", f"bearer {TOKEN}", basic(TOKEN)])
def test_the_token_opens_under_any_name(given: str) -> None:
    assert ask(Guard(echo, TOKEN), host="example.org", authorization=given)[0] == 200


@pytest.mark.parametrize(
    "given", ["", "Bearer", f"Bearer {TOKEN}x", basic("x"), "Basic %%%", TOKEN, "Digest a"]
)
def test_anything_else_is_asked_for_the_token(given: str) -> None:
    status, body, headers = ask(Guard(echo, TOKEN), authorization=given)
    assert status == 401
    assert headers[b"www-authenticate"].startswith(b"Basic")
    assert TOKEN.encode() not in body


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_probes_need_no_token(path: str) -> None:
    assert ask(Guard(echo, TOKEN), path)[0] == 200


def test_a_client_that_asks_too_often_waits_and_the_others_do_not() -> None:
    clock = Time()
    guard = Guard(echo, "", Limits(per_client=2.0, burst=3.0, overall=100.0), clock)
    assert [ask(guard)[0] for _ in range(4)] == [200, 200, 200, 429]
    assert ask(guard, client="127.0.0.2")[0] == 200
    clock.now += 0.5
    assert [ask(guard)[0] for _ in range(2)] == [200, 429]
    assert guard.answered == {200: 5, 429: 2}


def test_all_clients_together_have_a_limit() -> None:
    guard = Guard(echo, "", Limits(per_client=9.0, burst=9.0, overall=5.0), Time())
    found = [ask(guard, client=f"127.0.0.{n}")[0] for n in range(7)]
    assert found == [200] * 5 + [429] * 2


def test_guesses_of_the_token_are_limited_too() -> None:
    guard = Guard(echo, TOKEN, Limits(per_client=1.0, burst=2.0, overall=9.0), Time())
    found = [ask(guard, authorization="Bearer guess")[0] for _ in range(3)]
    assert found == [401, 401, 429]


def test_addresses_are_forgotten_beyond_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_module, "CLIENTS", 3)
    guard = Guard(echo, "", Limits(1e9, 1e9, 1e9))
    for n in range(10):
        ask(guard, client=str(n))
    assert list(guard._clients) == ["7", "8", "9"]


def test_a_body_passes_whole() -> None:
    assert ask(Guard(echo, ""), "/", b"a" * 10, b"b" * 5)[1] == b"15"


@pytest.mark.parametrize("length", [str(MAX_BODY + 1), "-1", "many"])
def test_an_announced_large_body_is_refused_unread(length: str) -> None:
    status, body, _ = ask(Guard(echo, ""), "/", b"stall", content_length=length)
    assert (status, json.loads(body)["detail"]) == (
        413, f"expected a body of at most {MAX_BODY} bytes",
    )  # fmt: skip


def test_an_unannounced_large_body_is_refused_as_it_comes() -> None:
    half = b"x" * (MAX_BODY // 2 + 1)
    assert ask(Guard(echo, ""), "/", half, half, b"stall")[0] == 413


def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_module, "BODY_S", 0.05)
    assert ask(Guard(echo, ""), "/", b"x", b"stall")[0] == 408
