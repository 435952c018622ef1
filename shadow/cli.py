"""`rlv3-shadow`: what analysts run on a store of comparisons."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from rlv3 import console
from shadow import render
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
    found = read_report(store, run)
    now = datetime.now(UTC)
    if json:
        if out is not None:
            render.write(found, out, now)
        typer.echo(render.json(found, now), nl=False)
        return
    show(found, render.write(found, out or Path(), now))


def show(found: Report, files: render.Files | None = None) -> None:
    """Print the terminal summary of a report."""
    for number, line in enumerate(render.terminal(found, files)):
        style = "bold" if number == 1 else "yellow" if line.startswith("! ") else None
        console.out.print(line, style=style, highlight=False, markup=False, soft_wrap=True)


def main() -> None:
    """Run the command line."""
    console.run(app)
