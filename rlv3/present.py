"""How are evaluations shown to a person? Tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from rlv3.evaluation import Evaluation
    from rlv3.metrics import Interval


def ratio(value: float | None, interval: Interval | None) -> str:
    """Return a ratio with its interval."""
    if value is None:
        return "-"
    return f"{value:+.2f}" + (f" [{interval[0]:+.2f}, {interval[1]:+.2f}]" if interval else "")


def share(value: float | None) -> str:
    """Return a share as a percentage, - where there is none."""
    return "-" if value is None else f"{value:.1%}"


def evaluation_table(result: Evaluation, title: str) -> Table:
    """Return what one policy did, and beside it what policies without knowledge did."""
    others = list(result.baselines)
    table = Table(title, "policy", *(name.replace("_", " ") for name in others))
    for name in table.columns[1:]:
        name.justify = "right"
    rows = [(result.baselines[name]) for name in others]
    table.add_row("mean return per episode", f"{result.mean_return:+.6g}")
    table.add_row("episodes, steps", f"{result.episodes:,}, {result.steps:,}")
    if result.net_profit is not None:
        table.add_row(
            "net profit", f"{result.net_profit:+,.2f}", *(f"{r.net_profit:+,.2f}" for r in rows)
        )
        table.add_row(
            "Sharpe, a year [95 %]",
            ratio(result.sharpe, result.sharpe_interval),
            *(f"{r.sharpe:+.2f}" for r in rows),
        )
        table.add_row("Sortino, a year [95 %]", ratio(result.sortino, result.sortino_interval))
        table.add_row(
            "worst drawdown", f"{result.max_drawdown:.3%}", *(f"{r.max_drawdown:.3%}" for r in rows)
        )
        table.add_row(
            "turnover, times capital",
            f"{result.turnover:,.2f}",
            *(f"{r.turnover:,.2f}" for r in rows),
        )
        table.add_row(
            "costs (half-spread in them)",
            f"{result.fees:,.2f} ({result.half_spread:,.2f})",
            *(f"{r.fees:,.2f}" for r in rows),
        )
        table.add_row("positions entered", f"{result.trades:,}")
        table.add_row("hit rate", share(result.hit_rate))
        table.add_row(
            "exposure; steps in the market", f"{share(result.exposure)}; {share(result.in_market)}"
        )
        if result.beats_random is not None:
            table.add_row("random runs that earned less", share(result.beats_random))
    used = {name: part for name, part in result.action_mix.items() if part}
    table.add_row("actions", ", ".join(f"{name} {part:.1%}" for name, part in used.items()))
    return table


def comparison_table(results: Mapping[str, Evaluation]) -> Table:
    """Return one line per policy."""
    table = Table("policy", "mean return", "net profit", "Sharpe [95 %]", "drawdown", "entries")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, result in results.items():
        trading = result.net_profit is not None
        table.add_row(
            name.removesuffix("/policy.safetensors"),
            f"{result.mean_return:+.6g}",
            f"{result.net_profit:+,.2f}" if trading else "-",
            ratio(result.sharpe, result.sharpe_interval),
            f"{result.max_drawdown:.3%}" if trading else "-",
            f"{result.trades:,}" if trading else "-",
        )
    return table


def provenance(training: Mapping[str, Any]) -> str:
    """Return on what, for how long and for which reward a policy was trained, in one line."""
    markets = ", ".join(training.get("markets") or ()) or "nobody knows what"
    end = f" up to {training['data_end']}" if training.get("data_end") else ""
    return (
        f"trained for {training.get('steps', 0):,} steps on {markets}{end}, "
        f"reward {training.get('reward')}, seed {training.get('seed')}"
    )
