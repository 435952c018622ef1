"""Would it have worked? Train on the past, trade the fold that follows, move on, add up.

    fold 1   | train ...... | embargo | test .... |
    fold 2   | train .................. | embargo | test .... |
    fold 3   | train .............................. | embargo | test .... |

Every fold trains a policy from nothing on what came before it (--window forgets the beginning); the
embargo keeps the bars that warm up the first test decision out of both. Nothing in a fold is chosen
by its test part.

Trying several configurations and showing the best is a way to find luck. The deflated Sharpe ratio
says how probable it is that the best one's out-of-sample Sharpe ratio beats what the best of so
many worthless configurations would show.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer
from rich.table import Table

from rlv3 import console
from rlv3.errors import ConfigError
from rlv3.extras import require
from rlv3.features import US, WARM_BARS
from rlv3.splits import DEFAULT_EMBARGO, window

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlv3.config import RLv3Config
    from rlv3.evaluation import Curve
    from rlv3.market import Bars
    from rlv3.trainer import Update

DEFAULT_FOLDS = 5
DEFAULT_STEPS = 100_000


class Fold(NamedTuple):
    """One train and test pair of windows over all series."""

    train: list[Bars]
    test: list[Bars]


@dataclass(frozen=True, slots=True)
class FoldResult:
    """What the policies of one configuration did in one fold; means over seeds."""

    train_from: str
    train_to: str
    test_from: str
    test_to: str
    net_profit: float
    sharpe: float
    max_drawdown: float
    trades: float
    fees: float
    hold_profit: float
    hold_sharpe: float


@dataclass(frozen=True, slots=True)
class WalkForward:
    """One configuration over all folds; out-of-sample figures of the mean of its seeds."""

    name: str
    config: dict[str, Any]
    """Its settings, the reward among them."""
    folds: list[FoldResult]
    net_profit: float
    hold_profit: float
    sharpe: float
    """Annualised."""
    sharpe_interval: tuple[float, float]
    sharpe_per_step: float
    probabilistic_sharpe: float
    """Probability that the true Sharpe ratio is above 0."""


def purged_folds(
    series: Sequence[Bars], folds: int, *, embargo: int = DEFAULT_EMBARGO, rolling: int = 0
) -> list[Fold]:
    """Cut series into folds by time: of folds + 1 equal stretches, each but the first is tested.

    Args:
        embargo: bars between the last training bar and the first test decision.
        rolling: stretches to train on; 0 for all since the start.
    Raises:
        ConfigError: fewer than 2 folds, or an embargo shorter than the warm-up.
        DataError: too few bars in a window.
    """
    import numpy as np

    if folds < 2:
        raise ConfigError(f"folds must be >= 2, was {folds}")
    if embargo < WARM_BARS:
        raise ConfigError(f"embargo must be >= {WARM_BARS} bars, was {embargo}")
    times = np.unique(np.concatenate([bars.end_us for bars in series]))
    edges = [int(times[round(k * (len(times) - 1) / (folds + 1))]) for k in range(folds + 2)]
    step_us = series[0].step_seconds * US

    def moment(us: int) -> datetime:
        return datetime.fromtimestamp(us / US, UTC)

    found = []
    for k in range(1, folds + 1):
        begin = moment(edges[k - rolling] + step_us) if rolling and k > rolling else None
        train = [window(bars, begin, moment(edges[k])) for bars in series]
        first = moment(edges[k] + embargo * step_us)
        found.append(Fold(train, [window(bars, first, moment(edges[k + 1])) for bars in series]))
    return found


def walk_forward(
    name: str,
    config: RLv3Config,
    *,
    folds: Sequence[Fold],
    steps: int,
    seeds: int,
    out: Path,
    say: Callable[[str], None],
    on_update: Callable[[int, Update], None] | None = None,
) -> tuple[WalkForward, NDArray[Any], list[Curve], list[Curve]]:
    """Train and test one configuration in every fold.

    Args:
        say: called with a line after every policy.
        on_update: called after every update with the steps of that policy so far.
    Returns:
        What it did, its returns per step out of sample, and the curves of seed 0 and of
        buy-and-hold, joined over the folds.
    """
    import numpy as np

    from rlv3.evaluation import evaluate_bars, portfolio_returns
    from rlv3.manager import RLv3Manager
    from rlv3.metrics import probabilistic_sharpe, ratio_intervals, sharpe, steps_per_year

    per_year = steps_per_year(config.step_seconds)
    results: list[FoldResult] = []
    parts: list[NDArray[Any]] = []
    curves: list[list[Curve]] = []
    held: list[list[Curve]] = []
    for k, fold in enumerate(folds, start=1):
        judged = []
        for seed in range(config.seed, config.seed + seeds):
            manager = RLv3Manager(replace(config, seed=seed))
            manager.train(steps=steps, price_data=fold.train, shares=(1.0,), on_update=on_update)
            manager.save(out / name / f"fold-{k}" / f"seed-{seed}" / "policy.safetensors")
            judged.append(evaluate_bars(manager.policy, fold.test, random_runs=1))
            say(f"{name}: fold {k} of {len(folds)}, seed {seed}: {judged[-1].net_profit:+,.2f}")
        returns = np.mean([portfolio_returns(one.curves) for one in judged], axis=0)
        hold = judged[0].baselines["buy_and_hold"]
        parts.append(returns)
        curves.append(judged[0].curves)
        held.append(judged[0].held)
        train_from, train_to = _span(fold.train, 0)
        test_from, test_to = _span(fold.test, WARM_BARS - 1)
        results.append(
            FoldResult(
                train_from=train_from,
                train_to=train_to,
                test_from=test_from,
                test_to=test_to,
                net_profit=float(np.mean([one.net_profit for one in judged])),
                sharpe=sharpe(returns, per_year),
                max_drawdown=float(np.mean([one.max_drawdown for one in judged])),
                trades=float(np.mean([one.trades for one in judged])),
                fees=float(np.mean([one.fees for one in judged])),
                hold_profit=hold.net_profit,
                hold_sharpe=hold.sharpe,
            )
        )
    returns = np.concatenate(parts)
    interval, _ = ratio_intervals(returns, per_year)
    found = WalkForward(
        name=name,
        config=asdict(config),
        folds=results,
        net_profit=sum(row.net_profit for row in results),
        hold_profit=sum(row.hold_profit for row in results),
        sharpe=sharpe(returns, per_year),
        sharpe_interval=interval,
        sharpe_per_step=sharpe(returns),
        probabilistic_sharpe=probabilistic_sharpe(returns),
    )
    return found, returns, joined(curves), joined(held)


def joined(folds: Sequence[Sequence[Curve]]) -> list[Curve]:
    """Return the curves of every symbol over all folds, profits added up from fold to fold."""
    import numpy as np

    from rlv3.evaluation import Curve

    found = []
    for pieces in zip(*folds, strict=True):
        profit, equity = 0.0, []
        for piece in pieces:
            equity.append(piece.equity + profit)
            profit += float(piece.equity[-1] - piece.equity[0])
        found.append(
            Curve(
                pieces[0].symbol,
                np.concatenate([piece.time_us for piece in pieces]),
                np.concatenate([piece.price for piece in pieces]),
                np.concatenate(equity),
                np.concatenate([piece.exposure for piece in pieces]),
            )
        )
    return found


def _span(series: Sequence[Bars], warm: int) -> tuple[str, str]:
    """Return the ends of the first decided and of the last bar."""
    begin, end = min(b.end_us[warm] for b in series), max(b.end_us[-1] for b in series)
    return _iso(int(begin)), _iso(int(end))


def _iso(us: int) -> str:
    return datetime.fromtimestamp(us / US, UTC).strftime("%Y-%m-%dT%H:%MZ")


def deflated(
    results: Sequence[WalkForward], returns: Mapping[str, NDArray[Any]], trials: int
) -> dict[str, Any]:
    """Return the best configuration and how probable it is that it is better than luck.

    Args:
        trials: configurations that were ever tried on these data; at least those given.
    """
    import numpy as np

    from rlv3.metrics import deflated_sharpe, luckiest_sharpe

    best = max(results, key=lambda one: one.sharpe)
    ratios = [one.sharpe_per_step for one in results]
    n = len(returns[best.name])
    # a single configuration says nothing of the spread: then that of a worthless one's estimate
    variance = float(np.var(ratios, ddof=1)) if len(ratios) > 1 else 1.0 / (n - 1)
    return {
        "best": best.name,
        "trials": trials,
        "variance_of_sharpes": variance,
        "luckiest_sharpe": luckiest_sharpe(variance, trials),
        "deflated_sharpe": deflated_sharpe(returns[best.name], trials, variance),
    }


def command(
    data: Annotated[list[Path], typer.Option(help="CSV or Parquet bars; repeat for more symbols.")],
    config: Annotated[
        list[str] | None,
        typer.Option(
            help="TOML file or recipe (the seed's if unset); repeat to try several configurations."
        ),
    ] = None,
    folds: Annotated[int, typer.Option(min=2, help="Stretches to test on.")] = DEFAULT_FOLDS,
    steps: Annotated[int, typer.Option(min=1, help="Training steps per fold.")] = DEFAULT_STEPS,
    seeds: Annotated[int, typer.Option(min=1, help="Policies per fold; returns are averaged.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="First seed.")] = 0,
    trials: Annotated[
        int | None,
        typer.Option(min=1, help="Configurations ever tried on these data, if more than given."),
    ] = None,
    embargo: Annotated[
        int, typer.Option(help="Bars between training and the first test decision.")
    ] = DEFAULT_EMBARGO,
    rolling: Annotated[
        int, typer.Option("--window", min=0, help="Stretches to train on; 0 for all so far.")
    ] = 0,
    out: Annotated[Path, typer.Option(help="Folder for policies, JSON and plot.")] = Path(
        "runs/walkforward"
    ),
    bar_stamp: Annotated[
        Literal["open", "close"], typer.Option(help="What the times in the files mean.")
    ] = "close",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Walk forward: train on the past, test on the fold that follows, over the whole file.

    [bold]Example[/bold]

        rlv3 walkforward --data btc_1h.csv --folds 5 --steps 100000 --seeds 2
    """
    for package in ("torch", "gymnasium", "matplotlib"):
        require(package, "train")
    from rlv3.cli import read_config
    from rlv3.config import RLv3Config
    from rlv3.market import read_bars
    from rlv3.plots import equity
    from rlv3.runs import file_facts, progress, versions, write_text

    series = [read_bars(path, bar_stamp=bar_stamp) for path in data]
    configs: dict[str, RLv3Config] = {}
    for one in config or ["seed"]:
        stem = Path(one).stem
        name = stem if stem not in configs else f"{stem}-{len(configs)}"
        settings = {"step_seconds": series[0].step_seconds, **read_config(Path(one))}
        configs[name] = RLv3Config(**settings | {"seed": seed})
    tried = trials or len(configs)
    if tried < len(configs):
        raise ConfigError(f"trials must be >= {len(configs)} configurations, was {tried}")
    cuts = purged_folds(series, folds, embargo=embargo, rolling=rolling)
    results, returns, lines = [], {}, {}
    held: list[Curve] = []

    finished = 0  # policies

    with progress(len(configs) * folds * seeds * steps) as show:

        def say(line: str) -> None:
            nonlocal finished
            finished += 1
            console.err.print(line, soft_wrap=True, highlight=False)

        def on_update(done: int, update: Update) -> None:
            show(finished * steps + min(done, steps), update)

        for name, settled in configs.items():
            found, returns[name], lines[name], held = walk_forward(
                name, settled, folds=cuts, steps=steps, seeds=seeds, out=out, say=say,
                on_update=on_update,
            )  # fmt: skip
            results.append(found)
    luck = deflated(results, returns, tried)
    said = {
        "steps": steps,
        "seeds": seeds,
        "embargo": embargo,
        "window": rolling,
        "data": file_facts(data, series),
        "versions": versions(),
        "configurations": [asdict(one) for one in results],
        **luck,
    }
    write_text(out / "walkforward.json", json.dumps(said, indent=2) + "\n")
    equity(out / "equity.png", {**lines, "buy and hold": held})
    if as_json:
        typer.echo(json.dumps(said))
        return
    for found in results:
        console.out.print(_table(found))
    count = "one configuration tried" if tried == 1 else f"best of {tried} configurations tried"
    console.out.print(
        f"deflated Sharpe ratio of {luck['best']}, {count}: {luck['deflated_sharpe']:.3f} "
        "(the probability that it is better than luck; 0.95 is the usual bar)",
        soft_wrap=True,
    )
    console.out.print(f"{out}: walkforward.json, equity.png, the policies", soft_wrap=True)


def _table(found: WalkForward) -> Table:
    table = Table(
        found.name, "tested", "net profit", "Sharpe", "drawdown", "entries", "costs",
        "buy and hold",
    )  # fmt: skip
    for column in table.columns[2:]:
        column.justify = "right"
    for k, row in enumerate(found.folds, start=1):
        table.add_row(
            f"fold {k}",
            f"{row.test_from[:10]} to {row.test_to[:10]}",
            f"{row.net_profit:+,.2f}",
            f"{row.sharpe:+.2f}",
            f"{row.max_drawdown:.2%}",
            f"{row.trades:,.0f}",
            f"{row.fees:,.2f}",
            f"{row.hold_profit:+,.2f}",
        )
    low, high = found.sharpe_interval
    table.add_row(
        "all", f"{found.folds[0].test_from[:10]} to {found.folds[-1].test_to[:10]}",
        f"{found.net_profit:+,.2f}", f"{found.sharpe:+.2f}", "", "", "",
        f"{found.hold_profit:+,.2f}",
    )  # fmt: skip
    table.caption = (
        f"trained for the reward {found.config['reward']}; "
        f"out of sample, after costs: Sharpe a year {found.sharpe:+.2f}, 95 % "
        f"[{low:+.2f}, {high:+.2f}]; probability that it is above 0: "
        f"{found.probabilistic_sharpe:.3f}"
    )
    return table
