"""Command line of the daemon and its companions: `rlv3-worker`."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
from enum import IntEnum
from pathlib import Path
from typing import Annotated

import typer
import uvloop

from rlv3 import console
from rlv3.errors import ConfigError
from rlv3.extras import require
from worker.config import WorkerConfig, load_api_config, load_config


class Niceness(IntEnum):
    """Who waits where the processor is short: production's programs never, ours in this order."""

    WORKER = 10
    COLLECTOR = 12
    API = 15


app = typer.Typer(
    name="rlv3-worker",
    help="The shadow of RL v2: reads the bus, decides, compares. It never trades.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Url = Annotated[
    str | None, typer.Option(help="Redis of source and sink. (env: REDIS_URL, REDIS_HOST …)")
]
SourceUrl = Annotated[
    str | None, typer.Option(help="Redis of the input streams; it sees nothing but reads.")
]
SinkUrl = Annotated[
    str | None, typer.Option(help="Redis of our outputs and state, where it is another one.")
]
Prefix = Annotated[
    str | None, typer.Option(help="First part of every key. (env: RLV3_PREFIX) (default: quantum)")
]

Inputs = Annotated[str | None, typer.Option(help="More input streams, comma-separated, or `all`.")]
PolicyFile = Annotated[
    str | None, typer.Option(help="Artifact that decides. (default: the shipped one)")
]
Untrained = Annotated[
    bool | None, typer.Option("--allow-untrained", help="Serve a policy that never trained.")
]


def _give_way(niceness: Niceness) -> None:
    """Lower our own priority, so that a producer beside us does not notice us.

    A confined service may not, and needs not: its unit says so itself.
    """
    with contextlib.suppress(PermissionError):
        os.nice(niceness)


@app.command()
def run(
    redis_url: Url = None,
    source_url: SourceUrl = None,
    sink_url: SinkUrl = None,
    prefix: Prefix = None,
    inputs: Inputs = None,
    tick_sources: Annotated[
        str | None, typer.Option(help="Sources whose ticks count, comma-separated. (default: all)")
    ] = None,
    policy: PolicyFile = None,
    allow_untrained: Untrained = None,
    rl_v2: Annotated[
        str | None,
        typer.Option(help="Who plays RL v2: reference, bus or off. (default: reference)"),
    ] = None,
    rl_v2_tables: Annotated[
        str | None, typer.Option(help="Directory of RL v2's Q-tables. (default: the shipped ones)")
    ] = None,
    codec: Annotated[
        str | None, typer.Option(help="Payload of our entries: json or msgpack. (default: json)")
    ] = None,
    start: Annotated[
        str | None, typer.Option(help="Where a first start begins: new or oldest. (default: new)")
    ] = None,
    max_event_age: Annotated[
        str | None, typer.Option(help="Seconds until an event is stale, or off. (default: 120)")
    ] = None,
    conflate_after: Annotated[
        str | None,
        typer.Option(help="Lag in ms that conflates advisory decisions, or off. (default: 1000)"),
    ] = None,
    on_gap: Annotated[
        str | None,
        typer.Option(
            help="When entries or state are missing: resume-oldest, resume-latest or fail. "
            "(default: resume-oldest)"
        ),
    ] = None,
    latency_ms: Annotated[
        str | None, typer.Option(help="Delay of an order's fill, for both policies. (default: 250)")
    ] = None,
    max_batch: Annotated[
        str | None,
        typer.Option(help="Events per commit, 1 to 64; changes no result. (default: 52)"),
    ] = None,
    risk_limits: Annotated[
        str | None,
        typer.Option(help="TOML file of risk limits that every decision is held against."),
    ] = None,
    require_acl: Annotated[
        bool | None,
        typer.Option("--require-acl", help="Refuse a Redis user that could trade: exit 4."),
    ] = None,
    otel: Annotated[
        bool | None,
        typer.Option(
            "--otel", help="Send spans to OTEL_EXPORTER_OTLP_ENDPOINT. (default: where that is set)"
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with the same names. (env: RLV3_CONFIG)")
    ] = None,
) -> None:
    """Run the daemon until SIGTERM.

    Flags beat the environment (RLV3_PREFIX, RLV3_INPUTS …), which beats the file.
    """
    flags = {name: value for name, value in locals().items() if name != "config"}
    # The path makes no cycles: its objects go when their last reference does. At every 700
    # allocations, the default, the search for them would take a twentieth of the path's time, 10 ms
    # now and then, and a sixth of the imports'.
    gc.set_threshold(50_000, 20, 100)
    from worker import logs, service

    settings = load_config(flags, os.environ, config)
    _give_way(Niceness.WORKER)
    uvloop.run(service.run(settings, logs.configure(settings.log_level)))


@app.command()
def collect(
    store: Annotated[Path, typer.Option(help="Directory of the store; made when missing.")],
    redis_url: Url = None,
    prefix: Prefix = None,
) -> None:
    """Drain our decisions and comparisons into Parquet, until SIGTERM."""
    from worker import collector, logs

    where = _where(redis_url, prefix)
    logs.configure(where.log_level)
    _give_way(Niceness.COLLECTOR)
    asyncio.run(collector.collect(where.sink_url, where.prefix, store))


@app.command()
def api(
    redis_url: Url = None,
    prefix: Prefix = None,
    store: Annotated[
        Path | None,
        typer.Option(help="The collector's store, for the report. (env: RLV3_STORE)"),
    ] = None,
    http: Annotated[
        str | None,
        typer.Option(
            help="HOST:PORT; beyond this machine RLV3_API_TOKEN is required. (env: RLV3_HTTP) "
            "(default: 127.0.0.1:9127)"
        ),
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option(help="Artifact that predicts. (default: the worker's; env: RLV3_POLICY)"),
    ] = None,
) -> None:
    """Serve health, metrics, predictions, the report and a live page, until SIGTERM.

    A process of its own: it reads what the worker shows of itself and changes nothing.
    """
    settings = load_api_config(dict(locals()), os.environ)
    for name in ("fastapi", "uvicorn", "prometheus_client"):
        require(name, "api")
    from worker import api as api_
    from worker import logs

    _give_way(Niceness.API)
    api_.serve(settings, logs.configure(settings.log_level))


@app.command()
def record(
    out: Annotated[Path, typer.Option(help="Directory of the recording; made when missing.")],
    redis_url: Url = None,
    source_url: SourceUrl = None,
    sink_url: SinkUrl = None,
    prefix: Prefix = None,
    keep_hours: Annotated[
        float | None, typer.Option(min=0.001, help="Drop what is older. (default: keep all)")
    ] = None,
    keep_gb: Annotated[
        float | None, typer.Option(min=0.001, help="Drop the oldest beyond so many GB of disk.")
    ] = None,
) -> None:
    """Keep raw input, our outputs, artifacts and the starting state, until SIGTERM."""
    from worker import logs, recorder

    where = _where(redis_url, prefix, source_url=source_url, sink_url=sink_url)
    logs.configure(where.log_level)
    limited = keep_hours is not None or keep_gb is not None
    keep = recorder.Keep(keep_hours, keep_gb) if limited else None
    _give_way(Niceness.COLLECTOR)
    asyncio.run(recorder.record(where.source_url, where.sink_url, where.prefix, out, keep=keep))


@app.command()
def audit(
    recording: Annotated[Path, typer.Option(help="Directory that `record` wrote.")],
    rl_v2_tables: Annotated[
        Path | None, typer.Option(help="RL v2's Q-tables, where they were not the shipped ones.")
    ] = None,
    store: Annotated[
        Path | None, typer.Option(help="Store whose reports shall show the result.")
    ] = None,
) -> None:
    """Fold a recording again and compare every decision; exit 4 when one differs."""
    from worker import audit as audit_

    found = audit_.audit(recording, rl_v2_tables)
    if store is not None:
        audit_.leave(found, store)
    audit_.show(found)


@app.command()
def doctor(
    redis_url: Url = None,
    source_url: SourceUrl = None,
    sink_url: SinkUrl = None,
    prefix: Prefix = None,
    inputs: Inputs = None,
    policy: PolicyFile = None,
    allow_untrained: Untrained = None,
    json: Annotated[bool, typer.Option("--json", help="Print the rows as one JSON array.")] = False,
) -> None:
    """Say whether the worker can live beside this Redis, and what to do; exit 4 on a danger.

    Run it with the settings and as the Redis user of the worker. It writes nothing.
    """
    from worker import doctor as doctor_

    flags = {name: value for name, value in locals().items() if name not in ("json", "doctor_")}
    doctor_.command(load_config(flags, os.environ), as_json=json)


@app.command()
def uninstall(
    redis_url: Url = None,
    prefix: Prefix = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would go, and remove nothing.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Also while a worker runs.")] = False,
) -> None:
    """Remove our streams, dead letters, state and artifacts from Redis, and nothing else."""
    from worker import uninstall as uninstall_

    where = _where(redis_url, prefix)
    asyncio.run(uninstall_.uninstall(where, yes=yes, dry_run=dry_run, force=force))


@app.command()
def demo(
    seconds: Annotated[
        float, typer.Option(min=1.0, help="How long the replay takes; start and report are extra.")
    ] = 30.0,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Replay real bars from a CSV or Parquet file; once per symbol."),
    ] = None,
    redis_url: Annotated[
        str | None,
        typer.Option(help="Use this Redis under a prefix of its own; all of it is removed."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="New directory for store, recording, logs and report.")
    ] = None,
) -> None:
    """Run the whole product on one screen: Redis, worker, collector, recorder, audit and report."""
    from worker import demo as demo_

    demo_.command(seconds, data, redis_url, out)


dlq = typer.Typer(
    help="Entries that could not be decided: look at them, send them in again.",
    no_args_is_help=True,
)
app.add_typer(dlq, name="dlq")

Stream = Annotated[
    str | None, typer.Option(help="Only letters about this input, such as market.tick.")
]


@dlq.command("list")
def dlq_list(
    redis_url: Url = None,
    sink_url: SinkUrl = None,
    prefix: Prefix = None,
    stream: Stream = None,
    limit: Annotated[int, typer.Option(min=1, help="Show no more than the newest so many.")] = 100,
    json: Annotated[bool, typer.Option("--json", help="One JSON object per line.")] = False,
) -> None:
    """Show dead letters: why, when, from where, and an excerpt."""
    from worker import dlq as dlq_

    where = _where(redis_url, prefix, sink_url=sink_url)
    dlq_.show(where.sink_url, where.prefix, stream, limit, json)


@dlq.command("replay")
def dlq_replay(
    ids: Annotated[
        list[str] | None, typer.Argument(help="As `dlq list` prints them.", show_default=False)
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="All that can be replayed.")] = False,
    redis_url: Url = None,
    source_url: SourceUrl = None,
    sink_url: SinkUrl = None,
    prefix: Prefix = None,
    stream: Stream = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Send entries in again: the worker decides them once and folds nothing."""
    from worker import dlq as dlq_

    if bool(ids) == all_:
        raise ConfigError(
            "expected ids of dead letters or --all, found " + ("both", "none")[not ids]
        )
    where = _where(redis_url, prefix, source_url=source_url, sink_url=sink_url)
    dlq_.replay(
        dlq_.Request(
            where.source_url, where.sink_url, where.prefix, tuple(ids or ()), stream, dry_run, yes
        )
    )


def _where(redis_url: str | None, prefix: str | None, **urls: str | None) -> WorkerConfig:
    """Resolve where Redis is as `run` does: flag, then environment, then file."""
    return load_config({"redis_url": redis_url, "prefix": prefix, **urls}, os.environ)


def main() -> None:
    """Run the command line."""
    console.run(app)


if __name__ == "__main__":
    main()
