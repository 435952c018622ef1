"""Does any request that the API's own description allows, or forbids, end in an error of ours?"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import CheckFunction, not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.schemas import APIOperation
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


def test_no_request_ends_in_an_error_of_ours(
    description: schemathesis.schemas.BaseSchema,
) -> None:
    operations = [found.ok() for found in description.get_all_operations()]
    assert len(operations) >= 11
    for operation in operations:
        checks = [status_code_conformance, content_type_conformance, response_schema_conformance]
        if (operation.method.upper(), operation.path) not in REASONED:
            checks.append(not_a_server_error)
        for mode in GenerationMode:
            ask(operation, mode, checks)


def ask(operation: APIOperation, mode: GenerationMode, checks: list[CheckFunction]) -> None:
    """Send requests that the description allows, or forbids."""

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=40, deadline=None, database=None, derandomize=True,
        phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    def one(case: schemathesis.Case) -> None:
        case.call_and_validate(checks=checks)

    with contextlib.suppress(Unsatisfiable):  # a route without parameters forbids nothing
        one()
