"""`rlv3-shadow`: what analysts run on a store of comparisons."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

import msgspec
import typer

from rlv3 import console
from rlv3.errors import ConfigError
from rlv3.policy import Policy, shipped_policy
from shadow.backtest import backtest as run_backtest
from shadow.evaluation.register import Terms, run_of
from shadow.evaluation.register import register as register_test
from shadow.evaluation.registration import Frozen, Registration
from shadow.pipeline import Settings
from shadow.reporting import render
from shadow.reporting.question import Ask
from shadow.reporting.report import Report, read_report
from shadow.reporting.terminal import Files, summary
from shadow.reporting.text import moment
from shadow.rl_v2 import QTables

app = typer.Typer(
    help="Compare RL v3 with RL v2 on what the shadow worker recorded, or on history.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
)


@app.callback()
def _commands() -> None:
    """Compare RL v3 with RL v2: nothing here trades, and nothing here needs Redis."""


@app.command()
def report(
    store: Annotated[
        Path, typer.Option(help="Directory that `rlv3-worker collect` or `backtest` wrote.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Where report.html and report.json go; the current directory if unset."),
    ] = None,
    json: Annotated[
        bool,
        typer.Option("--json", help="Print the JSON alone; files are written only with --out."),
    ] = False,
    registration: Annotated[
        str | None,
        typer.Option(help="Test to report: its id or the beginning; the newest if unset."),
    ] = None,
    run: Annotated[
        str | None, typer.Option(help="Report this run instead, without a verdict.")
    ] = None,
    symbols: Annotated[
        str | None, typer.Option(help="Only these, comma-separated; without a verdict.")
    ] = None,
    since: Annotated[
        str | None, typer.Option(help="Only from this time on (ISO 8601); without a verdict.")
    ] = None,
    until: Annotated[
        str | None, typer.Option(help="Only up to this time; without a verdict.")
    ] = None,
    gates: Annotated[
        Path | None,
        typer.Option(help="TOML table of gates; the registered or default one if unset."),
    ] = None,
) -> None:
    """Report on a store: a summary here, JSON, and one HTML page that needs nothing else.

    Exit code: 0 keep shadowing, or no verdict; 10 promote; 20 reject; 30 invalid. 2: the store
    cannot be used.
    """
    ask = Ask(
        run=run,
        registration=registration,
        symbols=_names(symbols),
        since_us=_time("--since", since),
        until_us=_time("--until", until),
        gates=gates,
    )
    _deliver(read_report(store, ask), out, json)


@app.command()
def register(
    store: Annotated[Path, typer.Option(help="Directory of the store; made when missing.")],
    policy: Annotated[
        Path | None,
        typer.Option(help="RL v3's artifact; needed while the store has no run to take it from."),
    ] = None,
    rl_v2: Annotated[
        Literal["reference", "bus", "off", "self"],
        typer.Option(help="With --policy: who plays RL v2's part; self is v3 against itself."),
    ] = "reference",
    rl_v2_tables: Annotated[
        Path | None,
        typer.Option(help="With --policy: RL v2's Q-tables; the shipped ones if unset."),
    ] = None,
    latency_ms: Annotated[
        int,
        typer.Option(min=0, help="With --policy: delay of a fill; the worker's default is 250."),
    ] = 250,
    symbols: Annotated[
        str | None, typer.Option(help="Which symbols count, comma-separated; those seen if unset.")
    ] = None,
    start: Annotated[
        str | None, typer.Option(help="When counting begins (ISO 8601, UTC); now if unset.")
    ] = None,
    batch_bars: Annotated[
        int, typer.Option(help="Bars in a batch, at least; the store's last day may ask for more.")
    ] = Terms().batch_bars,
    batches: Annotated[
        int, typer.Option(help="Batches at which the confidence sequence is tightest (N*).")
    ] = Terms().horizon,
    max_days: Annotated[int, typer.Option(help="When the test ends (T_max).")] = Terms().max_days,
    mode: Annotated[
        Literal["superiority", "non-inferiority"], typer.Option(help="What is asked.")
    ] = "superiority",
    margin: Annotated[
        float, typer.Option(help="bps a day: non-inferiority margin, and what counts as equal.")
    ] = Terms().margin,
    strict_bound: Annotated[
        float, typer.Option(help="bps a day: where batches are clipped in the strict sequence.")
    ] = Terms().strict_bound,
    earlier_versions: Annotated[
        int, typer.Option(min=0, help="Versions of v3 tested elsewhere; they spend alpha too.")
    ] = 0,
    gates: Annotated[
        Path | None, typer.Option(help="TOML table of gates; the default one if unset.")
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Test a registered pair anew, on new data.")
    ] = False,
) -> None:
    """Freeze what is to be tested, before anybody looks at the data; nothing of it can change.

    Exit code 1: the pair is registered already, or the start lies in data that can be seen.
    """
    terms = Terms(
        symbols=_names(symbols),
        start_us=_time("--start", start),
        batch_bars=batch_bars,
        horizon=batches,
        max_days=max_days,
        mode="superiority" if mode == "superiority" else "non_inferiority",
        margin=margin,
        strict_bound=strict_bound,
        earlier_versions=earlier_versions,
        gates=gates,
        again=again,
    )
    frozen = None if policy is None else _frozen(policy, rl_v2, rl_v2_tables, latency_ms)
    found, path = register_test(store, terms, now=datetime.now(UTC), frozen=frozen)
    for line in _terms(found, path):
        console.out.print(line, highlight=False, markup=False, soft_wrap=True)


@app.command()
def backtest(
    data: Annotated[
        list[Path] | None,
        typer.Option(help="CSV or Parquet file of one symbol's bars; more may follow."),
    ] = None,
    more: Annotated[
        list[Path] | None, typer.Argument(metavar="FILE", help="Further files for --data.")
    ] = None,
    recording: Annotated[
        Path | None,
        typer.Option(help="Directory that `rlv3-worker record` wrote, instead of --data."),
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="RL v3's artifact; the shipped one if unset.")
    ] = None,
    store: Annotated[
        Path | None, typer.Option(help="New directory that keeps every row; none if unset.")
    ] = None,
    self_play: Annotated[
        bool,
        typer.Option("--self", help="RL v3 against itself: every difference must be exactly 0."),
    ] = False,
    rl_v2: Annotated[
        Literal["reference", "bus", "off"],
        typer.Option(
            help="Who plays RL v2's part: its reference until recorded decisions of its own come, "
            "only those (bus), or nobody."
        ),
    ] = "reference",
    rl_v2_tables: Annotated[
        Path | None, typer.Option(help="RL v2's Q-tables; the shipped ones if unset.")
    ] = None,
    latency_ms: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Delay from a decision to its fill. By default 0, the next open, for files, and "
            "the worker's own for a recording.",
        ),
    ] = None,
    bar_stamp: Annotated[
        Literal["open", "close"], typer.Option(help="What the files' timestamps mean.")
    ] = "close",
    out: Annotated[
        Path | None,
        typer.Option(help="Where report.html and report.json go; the current directory if unset."),
    ] = None,
    json: Annotated[
        bool,
        typer.Option("--json", help="Print the JSON alone; files are written only with --out."),
    ] = False,
) -> None:
    """Run RL v2 against RL v3 on history: the worker's own fold, the same report.

    Exit code 0: done. 2: policy or data cannot be used. 4: --self found a difference.
    """
    files = [*(data or []), *(more or [])]
    if bool(files) == (recording is not None):
        found = "both" if files else "neither"
        raise ConfigError(f"expected price files with --data or a --recording, found {found}")
    with TemporaryDirectory(prefix="rlv3-backtest-") as scratch:
        done = run_backtest(
            shipped_policy() if policy is None else policy,
            files,
            recording=recording,
            store_dir=Path(scratch) / "store" if store is None else store,
            rl_v2=rl_v2,
            rl_v2_tables=rl_v2_tables,
            self_play=self_play,
            latency_ms=latency_ms,
            bar_stamp=bar_stamp,
        )
        if not json:
            console.err.print(
                f"{done.entries:,} entries of {done.covered_s / 86_400:.1f} days in "
                f"{done.seconds:.1f} s, {done.speed:,.0f} times as fast as they came",
                highlight=False,
            )
        _deliver(read_report(done.store), out, json)


@app.command()
def explain(
    decision_id: Annotated[str, typer.Argument(help="Of a decision of RL v3.")],
    store: Annotated[Path, typer.Option(help="Directory that has the decision.")],
    recording: Annotated[
        Path | None,
        typer.Option(help="Directory that `rlv3-worker record` wrote; for advisory decisions."),
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="Artifact that decided, where the store has no copy.")
    ] = None,
    rl_v2_tables: Annotated[
        Path | None, typer.Option(help="RL v2's Q-tables, where they were not the shipped ones.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Rebuild a decision bit for bit and say what would have changed it.

    Exit code 0: done. 2: it is not there, or cannot be rebuilt from what is. 4: it differs now.
    """
    from shadow import explain as explain_

    found = explain_.explain(decision_id, store, recording, policy=policy, tables=rl_v2_tables)
    if json:
        typer.echo(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())
        return
    for line in explain_.lines(found):
        console.out.print(line, highlight=False, markup=False, soft_wrap=True)


@app.command()
def sql(
    store: Annotated[Path, typer.Option(help="Directory that `collect` or `backtest` wrote.")],
    command: Annotated[
        str | None, typer.Option("-c", "--command", help="One query; asks for more if unset.")
    ] = None,
    csv: Annotated[bool, typer.Option("--csv", help="Print comma-separated values.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object per row.")] = False,
) -> None:
    """Ask a store anything, in DuckDB's SQL: one view per table, and some on top.

    Without a query, `SHOW TABLES` and `DESCRIBE bars` say what there is; at a terminal, queries
    end with a semicolon. Exit code 2: no store, or DuckDB refuses a query.
    """
    from shadow import sql as sql_

    sql_.run(store, command, "csv" if csv else "json" if json else "table")


def _frozen(policy: Path, rl_v2: str, tables: Path | None, latency_ms: int) -> Frozen:
    self_play = rl_v2 == "self"
    settings = Settings(
        latency_ms=latency_ms, rl_v2="off" if self_play else rl_v2, self_play=self_play
    )
    return run_of(
        Policy.load(policy), settings, QTables.load(tables) if rl_v2 == "reference" else None
    )


def _terms(found: Registration, path: Path) -> Iterator[str]:
    frame, frozen = found.frame, found.frozen
    yield f"registered {found.id}, version {found.number}, alpha {found.alpha:.4f}"
    yield f"RL v3    {frozen.policy_digest}"
    yield f"RL v2    {frozen.rl_v2} {frozen.tables_digest or ''}".rstrip()
    yield f"symbols  {', '.join(found.symbols)}"
    begin, end = (moment(window * frame.batch_us) for window in (frame.first, frame.end))
    yield f"counts   from {begin} to {end} UTC at the latest"
    yield (
        f"batches  of {found.batch_bars} bars, tightest at {found.horizon}; "
        f"{found.mode.replace('_', '-')}, margin {found.margin:g} bps/day"
    )
    if found.pilot is not None:
        yield (
            f"pilot    {found.pilot.bars} bars, not counted: 90 % of positions held at most "
            f"{found.pilot.holding_p90_bars:g} bars, tau {found.pilot.tau:.2f}"
        )
    yield f"file     {path}"


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(name for name in text.split(",") if name)


def _time(option: str, text: str | None) -> int | None:
    """Return epoch microseconds; a time without an offset is UTC."""
    if text is None:
        return None
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(
            f"expected a time like 2026-01-31T12:00 for {option}, found {text!r}"
        ) from None
    found = found.replace(tzinfo=UTC) if found.tzinfo is None else found
    return round(found.timestamp() * 1e6)


def _deliver(found: Report, out: Path | None, as_json: bool) -> None:
    """Hand a report over, on the terminal with its files or as JSON alone; exit as it concludes."""
    now = datetime.now(UTC)
    if not as_json:
        show(found, render.write(found, out or Path(), now))
    else:
        if out is not None:
            render.write(found, out, now)
        typer.echo(render.json(found, now), nl=False)
    if found.verdict.exit_code:
        raise typer.Exit(found.verdict.exit_code)


def show(found: Report, files: Files | None = None) -> None:
    """Print the terminal summary of a report."""
    for number, line in enumerate(summary(found, files)):
        style = "bold" if number == 0 else "yellow" if line.startswith("! ") else None
        console.out.print(line, style=style, highlight=False, markup=False, soft_wrap=True)


def main() -> None:
    """Run the command line."""
    console.run(app)


if __name__ == "__main__":
    main()
