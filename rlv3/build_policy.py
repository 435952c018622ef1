"""Train the policy that the package ships, again: the same bytes every time on one machine.

Fixed seeds, one thread, synthetic worlds only. `python -m rlv3.build_policy` (part of `make
policy`) writes `rlv3/data/policy.safetensors` and prints how the policy does on unseen series.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from rlv3 import console
from rlv3.config import RLv3Config
from rlv3.evaluation import evaluate_market
from rlv3.manager import RLv3Manager
from rlv3.market import WORLDS
from rlv3.policy import shipped_policy
from rlv3.trainer import Update

CONFIG = RLv3Config(seed=7, entropy_coef=0.001, device="cpu")
STEPS = 200_000
MARKETS = ("regime_switching", "regime_switching", "regime_switching", "momentum",
           "mean_reversion", "random_walk")  # fmt: skip
OUT = shipped_policy()
EVALUATION_SEED = 20_000
EVALUATION_SERIES = 20

app = typer.Typer(add_completion=False)


def build(steps: int = STEPS) -> RLv3Manager:
    """Train the shipped policy; a bar shows progress to a person who watches."""
    manager = RLv3Manager(CONFIG)
    columns = (
        TextColumn("training"), BarColumn(), TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console.err, disable=not console.err.is_terminal) as progress:
        task = progress.add_task("training", total=steps, status="")

        def show(done: int, update: Update) -> None:
            status = f"{done:,} steps, {update.steps_per_s:,.0f} a second"
            progress.update(task, completed=done, status=status)

        manager.train(steps=steps, market=MARKETS, on_update=show)
    return manager


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Artifact to write.")] = OUT,
) -> None:
    """Train the shipped policy with fixed seeds and write its artifact."""
    manager = build()
    manager.save(out)
    table = Table("world", "profit % per 1,000 bars", "entries", "worst drawdown %", "actions")
    for world in WORLDS:
        found = evaluate_market(
            manager.policy, world, episodes=EVALUATION_SERIES, seed=EVALUATION_SEED
        )
        mix = ", ".join(f"{name} {share:.1%}" for name, share in found.action_mix.items() if share)
        table.add_row(
            world,
            f"{found.mean_return * 100:+.3f}",
            f"{(found.trades or 0) / found.episodes:.1f}",
            f"{(found.max_drawdown or 0.0) * 100:.2f}",
            mix,
        )
    console.out.print(table)
    console.out.print(f"{out}: {out.stat().st_size:,} bytes, sha256 {manager.policy.digest}")


if __name__ == "__main__":
    console.run(app)
