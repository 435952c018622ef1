"""How every command-line program of the project starts, fails and exits."""

from __future__ import annotations

import sys

import typer
from rich.console import Console
from rich.text import Text

from rlv3.errors import UserError

out = Console(markup=False)
"""Where results go (stdout); square brackets are only brackets."""
err = Console(stderr=True, markup=False)
"""Where progress and errors go (stderr)."""


def run(app: typer.Typer) -> None:
    """Run a Typer application; a `UserError` becomes one sentence and its exit code."""
    try:
        app()
    except UserError as error:
        err.print(Text.assemble(("error:", "red"), f" {error}"), soft_wrap=True)
        sys.exit(error.exit_code)
