"""`rlv3-shadow`: what analysts run on a store of comparisons."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

import typer

from rlv3 import console
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
        list[Path], typer.Option(help="CSV or Parquet file of one symbol's bars; more may follow.")
    ],
    more: Annotated[
        list[Path] | None, typer.Argument(metavar="FILE", help="Further files for --data.")
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
        Literal["reference", "off"], typer.Option(help="Who plays RL v2's part.")
    ] = "reference",
    rl_v2_tables: Annotated[
        Path | None, typer.Option(help="RL v2's Q-tables; the shipped ones if unset.")
    ] = None,
    latency_ms: Annotated[
        int, typer.Option(min=0, help="Delay from a decision to its fill; 0 is the next open.")
    ] = 0,
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
    with TemporaryDirectory(prefix="rlv3-backtest-") as scratch:
        done = run_backtest(
            shipped_policy() if policy is None else policy,
            [*data, *(more or [])],
            store_dir=Path(scratch) / "store" if store is None else store,
            rl_v2=rl_v2,
            rl_v2_tables=rl_v2_tables,
            self_play=self_play,
            latency_ms=latency_ms,
            bar_stamp=bar_stamp,
        )
        _deliver(read_report(done.store), out, json)


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
