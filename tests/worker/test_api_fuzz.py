"""Does any request that the API's own description allows, or forbids, end in an error of ours?"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.types import Receive, Scope, Send

from worker.api import V3, Api
from worker.guard import Guard, Limits
from worker.keys import Keys
from worker.logs import configure
from worker.monitor import Monitor

ENDLESS = f"{V3}/stream"
REASONED = {("GET", "/readyz"), ("GET", "/report")}
"""Routes whose 503 is an answer: the worker is not ready, there is no report."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The routes behind their guard with limits that nobody reaches; Redis is away."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = configure("CRITICAL")
    ready: list[uvicorn.Server] = []

    async def serve() -> None:
        api = Api(Monitor("redis://127.0.0.1:1/0", Keys("t"), None, log), None, "")
        guard = Guard(api.routes, "", Limits(1e9, 1e9, 1e9))

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await guard(scope, receive, send)

        server = uvicorn.Server(
            uvicorn.Config(app, port=port, log_config=None, timeout_graceful_shutdown=1)
        )
        ready.append(server)
        await server.serve()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    while not (ready and ready[0].started):
        time.sleep(0.02)
    yield f"http://127.0.0.1:{port}"
    ready[0].should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def description(address: str) -> schemathesis.schemas.BaseSchema:
    """What the API says of itself, but for the stream that never ends."""
    return schemathesis.openapi.from_url(f"{address}/openapi.json").exclude(path=ENDLESS)


schema = schemathesis.pytest.from_fixture("description")


@schema.parametrize()
@settings(
    max_examples=25, deadline=None, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
def test_no_request_ends_in_an_error_of_ours(case: schemathesis.Case) -> None:
    checks = [status_code_conformance, content_type_conformance, response_schema_conformance]
    if (case.method, case.path) not in REASONED:
        checks.append(not_a_server_error)
    case.call_and_validate(checks=checks)
