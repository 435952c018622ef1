"""What was the worker asked to do? Settings from flags, environment and file, checked once.

A flag beats the environment, which beats the file (TOML, the same names in snake_case). Ours start
with RLV3_; where Redis is comes from production's own variables: REDIS_URL, else REDIS_HOST,
REDIS_PORT, REDIS_DB and REDIS_PASSWORD. Production's QT_RL_V3_* variables switch a live mode; there
is none here, so they are not read.
"""

from __future__ import annotations

import ipaddress
import math
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rlv3.errors import ConfigError
from rlv3.policy import shipped_policy
from shadow.records import REPLAY
from shadow.risk import RiskLimits
from worker.address import SCHEMES
from worker.keys import ALL_INPUTS, INPUTS, READABLE

SHIPPED = shipped_policy()
DEFAULT_HTTP = "127.0.0.1:9127"
MIN_TOKEN = 16
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """Everything that `rlv3-worker run` can be told."""

    source_url: str = "redis://localhost:6379/0"
    """Redis that carries the input streams; nothing but reads goes there when the sink differs."""
    sink_url: str = "redis://localhost:6379/0"
    """Redis that keeps our outputs and state."""
    prefix: str = "quantum"
    """First part of every stream and key name."""
    inputs: tuple[str, ...] = (*INPUTS, REPLAY)
    """Input streams in rank order."""
    tick_sources: frozenset[str] | None = None
    """Sources whose ticks count; None for all."""
    policy: Path = SHIPPED
    """Artifact that decides."""
    allow_untrained: bool = False
    """Serve a policy without training steps."""
    rl_v2: str = "reference"
    """reference, bus or off."""
    rl_v2_tables: Path | None = None
    """Directory of RL v2's Q-tables; None for the shipped ones."""
    codec: str = "json"
    """json, or msgpack for internal consumers."""
    start: str = "new"
    """Where a first start begins: new or oldest."""
    max_event_age: float | None = 120.0
    """Seconds after which an event is too old to decide on; None for never."""
    conflate_after: float | None = 1_000.0
    """Lag in ms from which advisory decisions are conflated; None for never."""
    on_gap: str = "resume-oldest"
    """When entries, state or cursors are missing: resume-oldest, resume-latest or fail."""
    latency_ms: int = 250
    """Delay from a decision to the first price at which its order may fill."""
    max_batch: int = 52
    """Events per commit, 64 at most: its script holds Redis up. Changes no result."""
    decisions_cap: int = 50_000
    """Hard cap of the decision stream; what the collector did not get is counted."""
    comparisons_cap: int = 50_000
    """Hard cap of the comparison stream."""
    dlq_cap: int = 10_000
    """Dead letters kept per input stream."""
    risk_limits: RiskLimits | None = None
    """Limits that decisions are annotated with; an account of their own obeys them."""
    require_acl: bool = False
    """Refuse to start as a Redis user that could write to the trading system."""
    otel: bool = False
    """Send spans to an OpenTelemetry collector; on where OpenTelemetry's own variables name one."""
    log_level: str = "INFO"

    @property
    def servers(self) -> dict[str, str]:
        """What each server is to us -> its URL."""
        if self.source_url == self.sink_url:
            return {"Redis": self.sink_url}
        return {"source": self.source_url, "sink": self.sink_url}


def load_config(
    flags: Mapping[str, Any], environ: Mapping[str, str], file: Path | None = None
) -> WorkerConfig:
    """Build the settings of `rlv3-worker run`.

    Args:
        flags: option name in snake_case -> text; absent and None mean "not given".
        environ: the process environment.
        file: a TOML file; RLV3_CONFIG names one where this is None.
    Raises:
        ConfigError: a value is impossible; the sentence names it and what is allowed.
    """
    if file is None and environ.get("RLV3_CONFIG"):
        file = Path(environ["RLV3_CONFIG"])
    layers = [
        _Layer("--{}", {k.replace("_", "-"): v for k, v in flags.items() if v is not None}),
        _Layer("RLV3_{}", {k[5:]: v for k, v in environ.items() if k.startswith("RLV3_") and v}),
        _Layer(f"{{}} in {file}", _read_file(file)),
    ]
    values: dict[str, Any] = dict(_urls(layers, environ))
    for name, parse in _SETTINGS.items():
        for layer in layers:
            if (found := layer.get(name)) is not None:
                values[name] = parse(layer.label(name), found)
                break
    values.setdefault("otel", _has_collector(environ))
    values["log_level"] = _log_level(environ)
    return WorkerConfig(**values)


@dataclass(frozen=True, slots=True)
class ApiConfig:
    """Everything that `rlv3-worker api` can be told."""

    redis_url: str
    """The worker's sink."""
    prefix: str
    store: Path | None
    """The collector's store; None leaves out what needs one."""
    host: str
    port: int
    policy: Path | None
    """Artifact that predicts; None for the one that the worker has in force."""
    token: str
    """What requests must bring; empty on a loopback address only."""
    log_level: str


def load_api_config(flags: Mapping[str, Any], environ: Mapping[str, str]) -> ApiConfig:
    """Build the settings of `rlv3-worker api`: flags, then RLV3_HTTP, RLV3_STORE, RLV3_API_TOKEN.

    Args:
        flags: redis_url, prefix, store, http, policy; absent and None mean "not given".
    Raises:
        ConfigError: a value is impossible, or an address that others reach has no token.
    """
    shared = {name: flags.get(name) for name in ("redis_url", "prefix")}
    where = load_config(shared, environ)
    label = "RLV3_HTTP" if flags.get("http") is None and environ.get("RLV3_HTTP") else "--http"
    host, port = _address(label, flags.get("http") or environ.get("RLV3_HTTP") or DEFAULT_HTTP)
    store = flags.get("store") or environ.get("RLV3_STORE")
    policy = flags.get("policy") or environ.get("RLV3_POLICY")
    token = environ.get("RLV3_API_TOKEN", "")
    if not token and not _is_loopback(host):
        raise ConfigError(
            f"{label} {host}:{port} can be reached from other machines: expected a token in "
            "RLV3_API_TOKEN, found none"
        )
    if token and len(token) < MIN_TOKEN:
        raise ConfigError(
            f"RLV3_API_TOKEN must have at least {MIN_TOKEN} characters, has {len(token)}"
        )
    return ApiConfig(
        redis_url=where.sink_url,
        prefix=where.prefix,
        store=Path(store) if store else None,
        host=host,
        port=port,
        policy=Path(policy) if policy else None,
        token=token,
        log_level=where.log_level,
    )


def _address(label: str, value: str) -> tuple[str, int]:
    """Split HOST:PORT; an IPv6 address stands in brackets."""
    host, _, port = value.rpartition(":")
    if not host or not port.isdecimal() or not 0 <= int(port) <= 65_535:
        raise ConfigError(f"{label} must be HOST:PORT, was {value!r}")
    return host.strip("[]"), int(port)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Layer:
    """One place where settings come from, with its own spelling of their names."""

    def __init__(self, template: str, values: Mapping[str, Any]) -> None:
        self._template = template
        self._values = values

    def _spelt(self, name: str) -> str:
        if self._template.startswith("--"):
            return name.replace("_", "-")
        return name.upper() if self._template.startswith("RLV3_") else name

    def label(self, name: str) -> str:
        """Return the name as the user wrote it."""
        return self._template.format(self._spelt(name))

    def get(self, name: str) -> Any:
        """Return the value, or None where this place does not set it."""
        return self._values.get(self._spelt(name))


def _read_file(file: Path | None) -> Mapping[str, Any]:
    if file is None:
        return {}
    try:
        values = tomllib.loads(file.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"expected a TOML file at {file}, found: {error}") from error
    known = {*_SETTINGS, "redis_url", "source_url", "sink_url"}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigError(
            f"expected settings among {', '.join(sorted(known))} in {file}, found "
            f"{', '.join(unknown)}"
        )
    return values


def _urls(layers: list[_Layer], environ: Mapping[str, str]) -> dict[str, str]:
    """Return source and sink: per place, its own name beats the common one."""
    flags, ours, file = layers
    production = _Layer("REDIS_URL", {"redis_url": _environment_url(environ)})
    places = [flags, ours, production, file]
    urls = {}
    for wanted in ("source_url", "sink_url"):
        spellings = ((place, name) for place in places for name in (wanted, "redis_url"))
        for place, name in spellings:
            if (found := place.get(name)) is not None:
                urls[wanted] = _url(place.label(name), found)
                break
    return urls


def _environment_url(environ: Mapping[str, str]) -> str | None:
    """Return REDIS_URL, or a URL of REDIS_HOST, _PORT, _DB and _PASSWORD; None without any."""
    if environ.get("REDIS_URL"):
        return environ["REDIS_URL"]
    names = ("REDIS_HOST", "REDIS_PORT", "REDIS_DB", "REDIS_PASSWORD")
    if not any(environ.get(name) for name in names):
        return None
    host, port, db, password = (environ.get(name, "") for name in names)
    for name, value, high in (("REDIS_PORT", port, 65_535), ("REDIS_DB", db, 2**31 - 1)):
        if value:
            _whole(0, high)(name, value)
    secret = f":{quote(password, safe='')}@" if password else ""
    return f"redis://{secret}{host or 'localhost'}:{port or 6379}/{db or 0}"


def _url(label: str, value: Any) -> str:
    text = str(value)
    if not text.startswith(SCHEMES):
        found = text.rpartition("@")[2]  # never show a password
        raise ConfigError(f"{label} must start with {', '.join(SCHEMES)}, was {found!r}")
    return text


def _has_collector(environ: Mapping[str, str]) -> bool:
    """Return whether OpenTelemetry's own variables ask for spans."""
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    return any(
        environ.get(name)
        for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    )


def _log_level(environ: Mapping[str, str]) -> str:
    for name in ("LOG_LEVEL", "LOGLEVEL"):
        if environ.get(name):
            level = environ[name].upper()
            return str(_one_of(*LEVELS)(name, "WARNING" if level == "WARN" else level))
    return "INFO"


# -- parsers: (name as written, value) -> value, or ConfigError -----------------------------------

Parser = Callable[[str, Any], Any]


def _one_of(*allowed: str) -> Parser:
    def parse(label: str, value: Any) -> str:
        if value not in allowed:
            raise ConfigError(f"{label} must be one of {', '.join(allowed)}, was {value!r}")
        return str(value)

    return parse


def _whole(low: int, high: int) -> Parser:
    def parse(label: str, value: Any) -> int:
        try:
            number = int(str(value))
        except ValueError:
            number = low - 1
        if not low <= number <= high:
            raise ConfigError(f"{label} must be a whole number {low} to {high}, was {value!r}")
        return number

    return parse


def _amount_or_off(unit: str) -> Parser:
    def parse(label: str, value: Any) -> float | None:
        if value == "off":
            return None
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not 0 < number < math.inf:
            raise ConfigError(f"{label} must be {unit} > 0 or off, was {value!r}")
        return number

    return parse


def _switch(label: str, value: Any) -> bool:
    words = {"1": True, "true": True, "yes": True, "on": True,
             "0": False, "false": False, "no": False, "off": False}  # fmt: skip
    text = str(value).lower()
    if text not in words:
        raise ConfigError(f"{label} must be one of {', '.join(words)}, was {value!r}")
    return words[text]


def _names(label: str, value: Any) -> list[str]:
    """Return the names of a comma-separated text or of a TOML array."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise ConfigError(f"{label} must be a list of names, was {value!r}")
    names = [part.strip() for part in parts if part.strip()]
    if not names:
        raise ConfigError(f"{label} must name at least one, was {value!r}")
    return names


def _inputs(label: str, value: Any) -> tuple[str, ...]:
    """Return the default inputs and the named ones, in rank order; `all` names every one."""
    names = _names(label, value)
    if names == ["all"]:
        return READABLE
    unknown = [name for name in names if name not in ALL_INPUTS]
    if unknown:
        among = ", ".join(ALL_INPUTS)
        raise ConfigError(f"{label} must be all or among {among}, was {unknown[0]!r}")
    return (*(name for name in ALL_INPUTS if name in INPUTS or name in names), REPLAY)


def _prefix(label: str, value: Any) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", str(value)):
        raise ConfigError(f"{label} must be 1 to 64 letters, digits, . _ or -, was {value!r}")
    return str(value)


def _path(label: str, value: Any) -> Path:  # noqa: ARG001 - the signature of all parsers
    return Path(value)


_SETTINGS: dict[str, Parser] = {
    "prefix": _prefix,
    "inputs": _inputs,
    "tick_sources": lambda label, value: frozenset(_names(label, value)),
    "policy": _path,
    "allow_untrained": _switch,
    "rl_v2": _one_of("reference", "bus", "off"),
    "rl_v2_tables": _path,
    "codec": _one_of("json", "msgpack"),
    "start": _one_of("new", "oldest"),
    "max_event_age": _amount_or_off("seconds"),
    "conflate_after": _amount_or_off("milliseconds"),
    "on_gap": _one_of("resume-oldest", "resume-latest", "fail"),
    "latency_ms": _whole(0, 60_000),
    "max_batch": _whole(1, 64),
    "decisions_cap": _whole(1, 100_000_000),
    "comparisons_cap": _whole(1, 100_000_000),
    "dlq_cap": _whole(1, 100_000_000),
    "risk_limits": lambda _, value: RiskLimits.load(Path(value)),
    "require_acl": _switch,
    "otel": _switch,
}
