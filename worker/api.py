"""What does the worker look like from outside? Health, metrics, predictions, report, a live page.

A process of its own. It reads what the worker shows of itself and what the collector published,
never asks the worker, and has no route that changes anything. It runs at a lower priority than the
worker does.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import re
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from importlib.metadata import version
from importlib.resources import files
from types import FrameType
from typing import Annotated, Any, NamedTuple

import msgspec
import uvicorn
import uvloop
from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, StrictInt

from rlv3.errors import ConfigError, DataError
from rlv3.events import ACTION_TABLE
from rlv3.policy import Policy
from worker import metrics
from worker.config import ApiConfig
from worker.guard import Guard
from worker.keys import Keys
from worker.logs import Log
from worker.meter import rss_bytes
from worker.monitor import RECENT, SILENT_S, Monitor, View
from worker.reports import Reports

STREAMS = 32
"""Pages that may watch at the same time."""
CONNECTIONS = 256
STREAM_S = 1.0
V3 = "/api/v1/rl/v3"
DASHBOARD = "/api/v1/rl-v3/dashboard"
_DESCRIPTION = (
    "Read-only view of the RL v3 shadow. No route changes anything; no request slows a decision."
)
_CLOSED = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


# -- what goes in and out of a prediction ---------------------------------------------------------


def _number(**limits: Any) -> Any:
    return Field(default=None, allow_inf_nan=False, strict=True, **limits)


class Observation(BaseModel):
    """Every key may be absent or null; it is then missing, never a default."""

    model_config = ConfigDict(extra="forbid")

    price_change_1m: float | None = _number()
    price_change_5m: float | None = _number()
    price_change_15m: float | None = _number()
    volatility: float | None = _number(ge=0)
    rsi: float | None = _number(ge=0, le=100)
    macd: float | None = _number()
    price: float | None = _number(gt=0)
    position_size: float | None = _number()
    position_side: float | None = _number(ge=-1, le=1)
    balance: float | None = _number()
    equity: float | None = _number()
    regime: Annotated[str, Field(max_length=32)] | StrictInt | None = None
    trend_strength: float | None = _number()
    volume_ratio: float | None = _number(ge=0)
    spread: float | None = _number(ge=0)
    bid_ask_spread: float | None = _number(ge=0)
    time_of_day: float | None = _number(ge=0, le=1)
    hour_of_day: float | None = _number(ge=0, le=24)


class Prediction(BaseModel):
    """The policy's answer: its most probable valid action."""

    action: int = Field(description="Index in the action table.")
    action_name: str
    confidence: float = Field(description="Probability of the action.")
    value: float = Field(description="Value estimate of the state.")
    action_probs: list[float] = Field(description="Per action, 0 where it would do nothing.")
    missing: list[str] = Field(description="Features that were not given.")
    tp_zone_multiplier: float
    suggested_tp_pct: float
    value_confidence: float
    policy: str = Field(description="Digest of the artifact that answered.")


class Problem(BaseModel):
    """Why there is no answer."""

    detail: str


class FieldProblem(BaseModel):
    """What is wrong with one field."""

    field: str
    problem: str


class FieldProblems(BaseModel):
    """Why an observation is refused."""

    detail: list[FieldProblem]


class Health(BaseModel):
    """The HTTP process answers; nothing is said about the worker."""

    status: str
    service: str


class Readiness(BaseModel):
    """Whether the worker gets on."""

    ready: bool
    state: str
    reason: str


# -- the app --------------------------------------------------------------------------------------


class Page(NamedTuple):
    """A page of this package, and the policy that lets its own script and style run, no other."""

    body: str
    csp: str


def load_page(name: str) -> Page:
    """Read a page; its inline script and style are named by their hashes."""
    body = files("worker").joinpath("web", name).read_text("utf-8")
    rules = [_CLOSED, "connect-src 'self'", "img-src data:"]
    for tag, rule in (("script", "script-src"), ("style", "style-src")):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", body, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        rules.append(f"{rule} 'sha256-{digest}'")
    return Page(body, "; ".join(rules))


class Api:
    """The routes and what they share.

    Attributes:
        app: the ASGI application, guarded.
        watching: pages that follow the stream.
        routes: the FastAPI application inside.
    """

    def __init__(self, monitor: Monitor, reports: Reports | None, token: str) -> None:
        self.monitor = monitor
        self.reports = reports
        self.watching = 0
        self._ending = asyncio.Event()
        self.routes = self._routes()
        self.app = Guard(self.routes, token)
        self._exposed: tuple[View, bytes] | None = None
        self._pages = {name: load_page(f"{name}.html") for name in ("index", "docs")}
        self._made: tuple[int, bytes] = (-1, b"")

    def end(self) -> None:
        """Let go of whoever watches or waits, so that the process can stop."""
        self._ending.set()
        if self.reports is not None:
            self.reports.end()

    @contextlib.asynccontextmanager
    async def _life(self, _app: FastAPI) -> AsyncIterator[None]:
        looking = asyncio.create_task(self.monitor.run())
        looking.add_done_callback(self.monitor.note_end)
        try:
            yield
        finally:
            looking.cancel()
            await asyncio.wait((looking,), timeout=1.0)
            await self.monitor.close()
            if self.reports is not None:
                await self.reports.close()

    def _routes(self) -> FastAPI:
        app = FastAPI(
            title="RL v3 shadow",
            version=version("rlv3-shadow"),
            description=_DESCRIPTION,
            docs_url=None,
            redoc_url=None,
            lifespan=self._life,
        )
        app.exception_handler(RequestValidationError)(_fields)
        problem: dict[int | str, dict[str, Any]] = {503: {"model": Problem}}
        limited: dict[int | str, dict[str, Any]] = {
            code: {"model": Problem} for code in (401, 413, 421, 429)
        }
        fields: dict[int | str, dict[str, Any]] = {
            400: {"model": Problem, "description": "Not JSON"},
            422: {"model": FieldProblems, "description": "A field is refused, by name"},
        }
        json: dict[int | str, dict[str, Any]] = {200: {"content": {"application/json": {}}}}
        get: Callable[..., Any] = app.get
        for path, answer, tag, responses in (
            ("/", self.page, "page", {200: {"content": {"text/html": {}}}}),
            ("/docs", self.docs, "page", {200: {"content": {"text/html": {}}}}),
            ("/metrics", self.metrics, "health", {200: {"content": {"text/plain": {}}}}),
            ("/report", self.report, "page", {
                200: {"content": {"text/html": {}}}, 404: {"model": Problem}, **problem,
            }),
            (f"{V3}/status", self.status, "status", json),
            (f"{V3}/stream", self.stream, "status", {
                200: {"content": {"text/event-stream": {}}}, **problem,
            }),
        ):  # fmt: skip
            get(path, tags=[tag], response_class=Response, responses={**responses, **limited})(
                answer
            )
        get("/healthz", tags=["health"], response_model=Health, responses=limited)(self.healthz)
        get(
            "/readyz", tags=["health"], response_model=Readiness,
            responses={503: {"model": Readiness}, **limited},
        )(self.readyz)  # fmt: skip
        for name, part in (
            ("summary", self.summary),
            ("training-summary", self.training_summary),
            ("live-status", self.live_status),
        ):
            get(f"{DASHBOARD}/{name}", tags=["dashboard"], responses=limited)(part)
        get(f"{DASHBOARD}/full", tags=["dashboard"], responses={422: fields[422], **limited})(
            self.full
        )
        app.post(
            f"{V3}/predict", tags=["predict"], response_model=Prediction,
            responses={**fields, **limited},
        )(self.predict)  # fmt: skip
        return app

    # -- health -----------------------------------------------------------------------------------

    async def healthz(self) -> Health:
        """Say that this process lives."""
        return Health(status="ok", service="rl_v3_shadow")

    async def readyz(self) -> Response:
        """Say whether the worker gets on: 200, or 503 with the reason."""
        view = self.monitor.view
        reason = view.reason
        answer = Readiness(ready=not reason, state=view.state, reason=reason)
        return JSONResponse(answer.model_dump(), status_code=503 if reason else 200)

    async def metrics(self) -> Response:
        """Return everything in Prometheus's text format."""
        view = self.monitor.view
        if self._exposed is None or self._exposed[0] is not view:  # there is one a second
            self._exposed = view, metrics.worker_part(view)
        figures = metrics.HttpFigures(dict(self.app.answered), rss_bytes())
        return Response(
            self._exposed[1] + metrics.http_part(figures),
            headers={"content-type": metrics.CONTENT_TYPE},
        )

    # -- predict ----------------------------------------------------------------------------------

    async def predict(self, observation: Observation) -> Prediction:
        """Ask the policy in force for one observation; keys that are absent are missing."""
        policy = self.monitor.policy
        answer = policy.predict(observation.model_dump(exclude_none=True))
        return Prediction(**answer, policy=policy.digest)

    # -- status -----------------------------------------------------------------------------------

    async def status(self) -> Response:
        """Return all that is shown, in one JSON object."""
        return Response(self._shown(), media_type="application/json")

    async def stream(self, request: Request) -> Response:
        """Send the same every second, as server-sent events."""
        if self.watching >= STREAMS:
            raise HTTPException(503, f"{STREAMS} pages watch already; expected fewer")
        return StreamingResponse(
            self._events(request), media_type="text/event-stream",
            headers={"cache-control": "no-store", "x-accel-buffering": "no"},
        )  # fmt: skip

    async def _events(self, request: Request) -> AsyncIterator[bytes]:
        self.watching += 1
        try:
            yield b"retry: 2000\n\n"
            while not self._ending.is_set() and not await request.is_disconnected():
                yield b"data: " + self._shown() + b"\n\n"
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._ending.wait(), STREAM_S)
        finally:
            self.watching -= 1

    def _shown(self) -> bytes:
        """Return the view as JSON, made once per look."""
        looks, body = self._made
        if looks != self.monitor.looks:
            body = msgspec.json.encode(show(self.monitor.view, self.monitor.policy))
            self._made = self.monitor.looks, body
        return body

    # -- production's dashboard ------------------------------------------------------------------

    async def summary(self) -> dict[str, Any]:
        """Return what RL v3 decided lately."""
        return summary(self.monitor.view)

    async def training_summary(self) -> dict[str, Any]:
        """Return the state of training: none happens here."""
        return training_summary()

    async def live_status(self) -> dict[str, Any]:
        """Return the state of live trading: there is no live mode."""
        return live_status(self.monitor.view)

    async def full(
        self,
        limit: int = Query(50, ge=0, le=RECENT),
        training_limit: int = Query(10, ge=0, le=50),  # noqa: ARG002 - production's parameter
    ) -> dict[str, Any]:
        """Return all of the dashboard at once."""
        return {
            "summary": summary(self.monitor.view),
            "recent_decisions": recent_decisions(self.monitor.view, limit),
            "training_summary": training_summary(),
            "recent_training_runs": [],
        }

    # -- pages ------------------------------------------------------------------------------------

    async def page(self) -> Response:
        """Return the live page."""
        return self._html("index")

    async def docs(self) -> Response:
        """Return the description of these routes for a person."""
        return self._html("docs")

    def _html(self, name: str) -> Response:
        page = self._pages[name]
        return Response(
            page.body, media_type="text/html; charset=utf-8",
            headers={"content-security-policy": page.csp, **_PAGE_HEADERS},
        )  # fmt: skip

    async def report(self) -> Response:
        """Return the current report as a page, at most a minute older than the store."""
        if self.reports is None:
            raise HTTPException(404, "expected a store (--store DIR) at the start, found none")
        try:
            file = await self.reports.current()
        except DataError as error:
            raise HTTPException(503, str(error)) from error
        return FileResponse(file, media_type="text/html; charset=utf-8", headers=_PAGE_HEADERS)


_PAGE_HEADERS = {
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


async def _fields(_request: Request, error: Exception) -> Response:
    """Name each refused field, without repeating what was sent."""
    assert isinstance(error, RequestValidationError)
    problems = [
        {"field": str(found["loc"][min(1, len(found["loc"]) - 1)]), "problem": found["msg"]}
        for found in error.errors()
    ]
    code = 400 if any(found["type"] == "json_invalid" for found in error.errors()) else 422
    detail: Any = "expected a JSON object, found something else" if code == 400 else problems
    return JSONResponse({"detail": detail}, status_code=code)


# -- views: pure functions of what is known -------------------------------------------------------


def show(view: View, policy: Policy) -> dict[str, Any]:
    """Return everything as plain values; production's keys of the status route come first."""
    status = view.status
    return {
        "active": view.up,
        "shadow_mode": True,
        "model_loaded": True,
        "experiences_collected": 0,
        "model_path": policy.origin,
        "ready": not view.reason,
        "state": view.state,
        "reason": view.reason,
        "age_s": view.age_s,
        "silence_s": view.silence_s,
        "silent_after_s": SILENT_S,
        "fenced": view.fenced,
        "rates": view.rates,
        "latency_ms": view.latency_ms,
        "collector_lag_s": view.collector_lag_s,
        "verdict": view.verdict,
        "predicts_with": policy.digest,
        "recent": [msgspec.to_builtins(decision) for decision in view.recent],
        "worker": None if status is None else msgspec.to_builtins(status),
    }


def summary(view: View) -> dict[str, Any]:
    """Return production's summary: actions since the worker's start, figures of the newest."""
    status = view.status
    counts = [0] * len(ACTION_TABLE)
    if status is not None:
        counts = [sum(pair) for pair in zip(*status.actions.values(), strict=True)]
    total = sum(counts)
    recent = view.recent
    confidence = [decision.confidence for decision in recent]
    values = [decision.value for decision in recent]
    return {
        "total_decisions": total,
        "buffer_size": len(recent),
        "action_counts": {str(i): n for i, n in enumerate(counts)},
        "action_distribution": {
            str(i): 100.0 * n / total if total else 0.0 for i, n in enumerate(counts)
        },
        "avg_confidence": _mean(confidence),
        "max_confidence": max(confidence, default=None),
        "min_confidence": min(confidence, default=None),
        "avg_value": _mean(values),
    }


def recent_decisions(view: View, limit: int) -> list[dict[str, Any]]:
    """Return the newest decisions in production's shape."""
    names = ("timestamp", "symbol", "action", "confidence", "value", "trace_id", "shadow_mode")
    return [{name: getattr(decision, name) for name in names} for decision in view.recent[:limit]]


def training_summary() -> dict[str, Any]:
    """Return production's training summary: this service never trains."""
    return {
        "enabled": False,
        "interval_minutes": None,
        "episodes_per_run": None,
        "total_runs": 0,
        "success_rate": None,
        "last_run_at": None,
        "last_error": None,
        "recent_runs": [],
    }


def live_status(view: View) -> dict[str, Any]:
    """Return production's live status: a shadow, which never has an intent."""
    status = view.status
    return {
        "enabled": view.up,
        "mode": "SHADOW",
        "min_confidence": None,
        "trade_intents_total": 0,
        "trade_intents_executed": 0,
        "shadow_decisions": 0 if status is None else status.decisions,
        "last_decision_at": view.recent[0].timestamp if view.recent else None,
        "last_trade_intent_at": None,
    }


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


# -- the process ----------------------------------------------------------------------------------


class _Server(uvicorn.Server):
    """Says where it listens, once it does, and ends in order."""

    def __init__(
        self, config: uvicorn.Config, listens: Callable[[str, int], None], end: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._listens = listens
        self._end = end

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started:
            for server in self.servers:
                for found in server.sockets:
                    self._listens(*found.getsockname()[:2])

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._end()
        super().handle_exit(sig, frame)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """End in order, with exit code 0: uvicorn's own would raise the signal once more."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield


def serve(config: ApiConfig, log: Log) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        PolicyError: the artifact that `--policy` names cannot be used.
        ConfigError: the address cannot be had.
    """

    def listens(host: str, port: int) -> None:
        log.info("API_LISTENS", msg=f"http://{host}:{port}", token=bool(config.token))

    async def run() -> bool:
        monitor = Monitor(config.redis_url, Keys(config.prefix), config.policy, log)
        reports = None if config.store is None else Reports(config.store, log)
        api = Api(monitor, reports, config.token)
        settings = uvicorn.Config(
            api.app, host=config.host, port=config.port, log_config=None, access_log=False,
            server_header=False, limit_concurrency=CONNECTIONS, timeout_keep_alive=5,
            timeout_graceful_shutdown=1, ws="none", lifespan="on",
        )  # fmt: skip
        server = _Server(settings, listens, api.end)
        await server.serve()
        return server.started

    try:
        started = uvloop.run(run())
    except SystemExit as error:  # uvicorn's way to say that it cannot bind
        raise ConfigError(
            f"expected {config.host}:{config.port} to be free to listen on, found that it is not"
        ) from error
    if started:
        log.info("API_STOPPED", msg="no more requests are answered")
