"""How every command-line program of the project starts, fails and exits."""

from __future__ import annotations

import sys

import typer
from rich.console import Console

from rlv3.errors import UserError

out = Console()
"""Where results go (stdout)."""
err = Console(stderr=True)
"""Where progress and errors go (stderr)."""


def run(app: typer.Typer) -> None:
    """Run a Typer application; a `UserError` becomes one sentence and its exit code."""
    try:
        app()
    except UserError as error:
        err.print(f"[red]error:[/red] {error}", soft_wrap=True, highlight=False)
        sys.exit(error.exit_code)
