"""`rlv3-shadow`: what analysts run on a store of comparisons."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

import msgspec
import typer

from rlv3 import console
from rlv3.errors import ConfigError
from rlv3.policy import shipped_policy
from shadow import render
from shadow.backtest import backtest as run_backtest
from shadow.report import Report, read_report

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
    run: Annotated[str | None, typer.Option(help="Run to report; the newest one if unset.")] = None,
) -> None:
    """Report on a store: a summary here, JSON, and one HTML page that needs nothing else.

    Exit code 0: this version gives no verdict. 2: the store cannot be used.
    """
    _deliver(read_report(store, run), out, json)


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
        console.err.print(
            f"{done.entries:,} entries of {done.covered_s / 86_400:.1f} days in {done.seconds:.1f} "
            f"s, {done.speed:,.0f} times as fast as they came",
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


def _deliver(found: Report, out: Path | None, as_json: bool) -> None:
    """Hand a report over: on the terminal with its files, or as JSON alone."""
    now = datetime.now(UTC)
    if not as_json:
        show(found, render.write(found, out or Path(), now))
        return
    if out is not None:
        render.write(found, out, now)
    typer.echo(render.json(found, now), nl=False)


def show(found: Report, files: render.Files | None = None) -> None:
    """Print the terminal summary of a report."""
    for number, line in enumerate(render.terminal(found, files)):
        style = "bold" if number == 1 else "yellow" if line.startswith("! ") else None
        console.out.print(line, style=style, highlight=False, markup=False, soft_wrap=True)


def main() -> None:
    """Run the command line."""
    console.run(app)


if __name__ == "__main__":
    main()
