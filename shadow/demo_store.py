"""A store to look at: thirty simulated days of five symbols, RL v2's reference beside RL v3.

The market is simulated from fixed seeds, everything after it is the product: the worker's own fold
decides and compares, and the store is one that a collector could have left. The comparison is
registered before there are data, as it must be. The same call gives the same rows.

    python -m shadow.demo_store [--out DIR] [--days N]
"""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from rlv3 import console
from rlv3.errors import ConfigError
from rlv3.features import STEP_SECONDS
from rlv3.market import Bars, simulate
from rlv3.policy import shipped_policy
from shadow.backtest import Summary, backtest

WORLD = "regime_switching"
SHARE = 0.35
"""Of the world's moves in the store's prices; the rest is a random walk, in which nobody earns. The
bare world is a training ground: it would show profits that no market pays."""
SYMBOLS = {
    "BTCUSDT": 95_000.0,
    "ETHUSDT": 3_300.0,
    "SOLUSDT": 180.0,
    "XRPUSDT": 2.2,
    "ADAUSDT": 0.9,
}
"""What is simulated, and the price it starts at."""
START = datetime(2026, 1, 5, tzinfo=UTC)
DAYS = 30
_BARS_PER_DAY = 86_400 // STEP_SECONDS


def market(days: int = DAYS, seed: int = 0, share: float = SHARE) -> list[Bars]:
    """Return the bars of all symbols."""
    return [
        _diluted(symbol, price, days * _BARS_PER_DAY, [seed, number], share)
        for number, (symbol, price) in enumerate(SYMBOLS.items())
    ]


def _diluted(symbol: str, price: float, bars: int, seed: list[int], share: float) -> Bars:
    start_us = int(START.timestamp()) * 1_000_000
    world = simulate(
        WORLD, bars, seed=[*seed, 0], symbol=symbol, start_us=start_us, start_price=1.0
    )
    noise = simulate("random_walk", bars, seed=[*seed, 1], start_us=start_us, start_price=price)
    columns = {
        name: getattr(world, name) ** share * getattr(noise, name)
        for name in ("open", "high", "low", "close")
    }
    return world._replace(**columns)


def make(store: Path, days: int = DAYS, seed: int = 0) -> Summary:
    """Write the store.

    Raises:
        DataError: there is one already.
    """
    return backtest(shipped_policy(), market(days, seed), store_dir=store)


app = typer.Typer(add_completion=False)


@app.command()
def command(
    out: Annotated[Path, typer.Option(help="New directory of store and report.")] = Path(
        "out/demo-store"
    ),
    days: Annotated[int, typer.Option(min=1, help="How many days.")] = DAYS,
) -> None:
    """Register the comparison, make the data, report on them; the verdict is no exit code here."""
    from shadow import cli

    store = out / "store"
    if store.exists():
        raise ConfigError(f"expected --out to have no store yet, found {store}")
    cli.register(
        store,
        policy=shipped_policy(),
        latency_ms=0,
        symbols=",".join(SYMBOLS),
        start=START.isoformat(),
    )
    done = make(store, days)
    console.err.print(
        f"{done.bars:,} bars, {done.decisions:,} decisions, {done.pairs:,} pairs in "
        f"{done.seconds:.0f} s, {done.speed:,.0f} times as fast as they would have come",
        highlight=False,
    )
    with suppress(typer.Exit):
        cli.report(store, out)


if __name__ == "__main__":
    console.run(app)
