"""`rlv3`: train, evaluate and ask the PPO policy."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from rlv3 import audit, console
from rlv3.config import RLv3Config
from rlv3.errors import ConfigError, DataError
from rlv3.features import US
from rlv3.policy import Policy, save_artifact, shipped_policy

if TYPE_CHECKING:
    from rlv3.evaluation import Evaluation
    from rlv3.market import Bars
    from rlv3.trainer import Update

ARTIFACT = "policy.safetensors"
DEFAULT_OUT = Path("runs/rl_v3")
SANDBOX_STEPS = 20_480
SHIPPED = shipped_policy()
OBSERVATION = {
    "price_change_1m": 0.001, "price_change_5m": 0.004, "price_change_15m": 0.008,
    "volatility": 0.0007, "rsi": 68.0, "macd": 0.12, "price": 100.0, "position_size": 0.0,
    "position_side": 0, "balance": 10_000.0, "equity": 10_000.0, "regime": "TREND",
    "trend_strength": 0.8, "volume_ratio": 1.2, "time_of_day": 0.5,
}  # fmt: skip

app = typer.Typer(
    help="Train, evaluate and ask RL v3, the PPO policy. Nothing here trades.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
)

PolicyOption = Annotated[
    Path, typer.Option(help="Policy artifact (.safetensors); the shipped one if unset.")
]
MarketOption = Annotated[
    str | None,
    typer.Option(help="Synthetic world: random_walk, momentum, mean_reversion, regime_switching."),
]
EnvOption = Annotated[
    str | None, typer.Option(help="Gymnasium environment, for example CartPole-v1.")
]
StampOption = Annotated[
    Literal["open", "close"], typer.Option(help="What the times in the files mean.")
]


def main() -> None:
    """Run the program."""
    console.run(app)


@app.command()
def train(
    episodes: Annotated[
        int | None, typer.Option(min=1, help="Finish at least so many episodes.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Environment steps, rounded up to whole buffers.")
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="CSV or Parquet bars of one symbol; repeat for more symbols."),
    ] = None,
    market: MarketOption = None,
    env: EnvOption = None,
    reward: Annotated[
        Literal["net_return", "seed"] | None,
        typer.Option(help="net_return: log return after costs (default). seed: the seed's terms."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with settings of RLv3Config; flags beat it.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seeds every random stream.")] = None,
    out: Annotated[
        Path | None, typer.Option(help=f"Directory for {ARTIFACT}; {DEFAULT_OUT} if unset.")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Directory of an earlier run: continue from its weights and normaliser."),
    ] = None,
    bar_stamp: StampOption = "close",
) -> None:
    """Train a policy and write its artifact.

    Without --data, --market or --env it trains on the world regime_switching.
    Of every file the first 80 % are trained on; the rest is evaluated at the end.
    --resume keeps weights, normaliser and step count; the optimisers start anew.

    [bold]Examples[/bold]

        rlv3 train --episodes 200 --out runs/first

        rlv3 train --steps 300000 --data btc_1m.csv --seed 1
    """
    if episodes is not None and steps is not None:
        raise ConfigError("expected --episodes or --steps, found both")
    if sum(place is not None for place in (data or None, market, env)) > 1:
        raise ConfigError("expected one of --data, --market and --env, found several")
    _need_training()
    from rlv3.evaluation import evaluate_bars
    from rlv3.manager import DEFAULT_EPISODES, RLv3Manager

    series = _read(data or [], bar_stamp)
    settings = read_config(config) if config else {}
    if series:
        settings.setdefault("step_seconds", series[0].step_seconds)
    settings |= {k: v for k, v in (("reward", reward), ("seed", seed)) if v is not None}
    manager = RLv3Manager(RLv3Config(**settings))
    if resume is not None:
        manager.load(resume / ARTIFACT)
    if episodes is None and steps is None:
        episodes = DEFAULT_EPISODES
    total = steps or (episodes or 0) * manager.config.max_steps_per_episode
    with _progress(total) as on_update:
        metrics = manager.train(
            episodes,
            steps=steps,
            price_data=series or None,
            market=market,
            env_id=env,
            on_update=on_update,
        )
    path = manager.save((out or resume or DEFAULT_OUT) / ARTIFACT)
    table = Table("training", "")
    for name, value in metrics.items():
        table.add_row(name, f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}")
    console.out.print(table)
    if manager.heldout:
        console.out.print(_table(evaluate_bars(manager.policy, manager.heldout), "held out"))
    console.out.print(f"{path} (sha256 {manager.policy.digest[:16]})", soft_wrap=True)


@app.command()
def evaluate(
    policy: PolicyOption = SHIPPED,
    data: Annotated[
        list[Path] | None, typer.Option(help="CSV or Parquet bars; repeat for more symbols.")
    ] = None,
    market: MarketOption = None,
    env: EnvOption = None,
    episodes: Annotated[
        int, typer.Option(min=1, help="Synthetic series of 1,000 bars, or environment episodes.")
    ] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Seeds series or episodes.")] = 1_000,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    bar_stamp: StampOption = "close",
) -> None:
    """Evaluate a policy deterministically: the most probable valid action at every step.

    Files are traded once, whole; the default is the world regime_switching.
    """
    if sum(place is not None for place in (data or None, market, env)) > 1:
        raise ConfigError("expected one of --data, --market and --env, found several")
    loaded = Policy.load(policy)
    _need_training()
    from rlv3.evaluation import evaluate_bars, evaluate_env, evaluate_market
    from rlv3.market import DEFAULT_WORLD

    series = _read(data or [], bar_stamp)
    if series:
        _warn_if_seen(loaded, series)
        result = evaluate_bars(loaded, series)
    elif env is not None:
        result = evaluate_env(loaded, env, episodes=episodes, seed=seed)
    else:
        result = evaluate_market(loaded, market or DEFAULT_WORLD, episodes=episodes, seed=seed)
    if as_json:
        typer.echo(json.dumps(result.to_dict()))
    else:
        console.out.print(_table(result, "evaluation"))


@app.command()
def predict(
    obs: Annotated[
        str, typer.Option(help="JSON file with an observation dictionary; - for stdin.")
    ],
    policy: PolicyOption = SHIPPED,
) -> None:
    """Decide for one observation; print one JSON object.

    Keys are those of the seed's dictionary (price_change_1m, rsi, regime, position_side ...); what
    is absent or null is missing, not an error.
    """
    loaded = Policy.load(policy)
    typer.echo(json.dumps(loaded.predict(_observation(obs))))


@app.command()
def sandbox(
    seed: Annotated[int, typer.Option(min=0, help="Seeds the training.")] = 0,
) -> None:
    """Take the two-minute tour: train a little, save, load, predict, evaluate."""
    _need_training()
    from rlv3.evaluation import evaluate_market
    from rlv3.manager import RLv3Manager
    from rlv3.market import DEFAULT_WORLD

    manager = RLv3Manager(RLv3Config(seed=seed))
    console.out.print(f"1. train {SANDBOX_STEPS:,} steps on simulated prices ({DEFAULT_WORLD})")
    with _progress(SANDBOX_STEPS) as on_update:
        metrics = manager.train(steps=SANDBOX_STEPS, on_update=on_update)
    console.out.print(
        f"   {metrics['episodes']:.0f} episodes, average reward {metrics['avg_reward']:+.5f}, "
        f"{metrics['steps_per_s']:,.0f} steps a second"
    )
    with TemporaryDirectory() as directory:
        path = manager.save(Path(directory) / ARTIFACT)
        console.out.print(f"2. save: one file of {path.stat().st_size:,} bytes, no pickle inside")
        policy = Policy.load(path)
    console.out.print(f"3. load: policy {policy.digest[:16]}, {policy.trained_steps:,} steps")
    answer = policy.predict(OBSERVATION)
    console.out.print(
        f"4. predict a rising market: {answer['action_name']} with probability "
        f"{answer['confidence']:.2f}, value {answer['value']:+.3f}"
    )
    result = evaluate_market(policy, DEFAULT_WORLD, episodes=5, seed=1_000)
    console.out.print("5. evaluate on prices it has never seen")
    console.out.print(_table(result, "evaluation"))


@app.command("import-checkpoint")
def import_checkpoint(
    checkpoint: Annotated[Path, typer.Argument(help="Production's ppo_model.pt.")],
    out: Annotated[Path, typer.Option(help="Artifact to write.")],
    steps: Annotated[
        int, typer.Option(min=0, help="Environment steps it was trained for, if you know them.")
    ] = 0,
) -> None:
    """Convert a production checkpoint; the file is read without running any code in it.

    With 0 training steps in its provenance the worker refuses to serve it unless told otherwise.
    """
    _need_training()
    from rlv3.checkpoint import import_checkpoint as convert

    source = convert(checkpoint, steps=steps)
    save_artifact(source, out)
    policy = Policy(source)
    console.out.print(f"{out} (sha256 {policy.digest[:16]}, {steps:,} training steps)",
                      soft_wrap=True)  # fmt: skip


app.command("audit-reward")(audit.command)


def read_config(path: Path) -> dict[str, Any]:
    """Return the settings of a TOML file whose keys are fields of `RLv3Config`.

    Raises:
        ConfigError: the file cannot be read, or has an unknown key or a value of another type.
    """
    try:
        found = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected TOML, found {error}") from error
    defaults = {field.name: field.default for field in fields(RLv3Config)}
    for name, value in found.items():
        if name not in defaults:
            raise ConfigError(
                f"{path}: expected settings among {', '.join(defaults)}; found {name}"
            )
        wanted = type(defaults[name])
        if wanted is float and type(value) is int:
            found[name] = float(value)
        elif type(value) is not wanted:
            raise ConfigError(f"{path}: expected {name} to be {wanted.__name__}, found {value!r}")
    return found


def _need_training() -> None:
    """Refuse, in one sentence, where the base install lacks torch."""
    for name in ("torch", "gymnasium"):
        if find_spec(name) is None:
            raise ConfigError(
                f"expected {name} to be installed, found none: pip install 'rlv3-shadow[train]'"
            )


def _read(paths: list[Path], bar_stamp: str) -> list[Bars]:
    from rlv3.market import read_bars

    return [read_bars(path, bar_stamp=bar_stamp) for path in paths]


def _observation(source: str) -> dict[str, Any]:
    """Read an observation dictionary from a JSON file or from stdin."""
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text("utf-8")
        found = json.loads(text)
    except OSError as error:
        raise DataError(f"observation {source} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"observation {source}: expected a JSON object, found {error}") from error
    if not isinstance(found, dict):
        kind = type(found).__name__
        raise DataError(f"observation {source}: expected a JSON object, found {kind}")
    return found


def _warn_if_seen(policy: Policy, series: list[Bars]) -> None:
    """Say so when a file begins before the end of what the policy was trained on."""
    end = policy.metadata["training"].get("data_end")
    if end is None:
        return
    begin = min(int(bars.end_us[0]) for bars in series)
    if begin / US < datetime.fromisoformat(end).timestamp():
        found = datetime.fromtimestamp(begin / US, UTC).isoformat()
        console.err.print(
            f"[yellow]warning:[/yellow] training data end at {end}, these begin at {found}: "
            "part of this may be in-sample", soft_wrap=True, highlight=False,
        )  # fmt: skip


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int, Update], None]]:
    """Show a bar on stderr to a person who watches; yield what to call after every update."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console.err, disable=not console.err.is_terminal) as progress:
        task = progress.add_task("training", total=total, status="")

        def show(done: int, update: Update) -> None:
            progress.update(
                task,
                completed=min(done, total),
                status=f"{done:,} steps, {update.steps_per_s:,.0f}/s, entropy {update.entropy:.2f}",
            )

        yield show


def _table(result: Evaluation, title: str) -> Table:
    table = Table(title, "")
    table.add_row("mean return per episode", f"{result.mean_return:+.6g}")
    table.add_row("episodes", f"{result.episodes:,}")
    table.add_row("steps", f"{result.steps:,}")
    if result.net_profit is not None:
        table.add_row("net profit", f"{result.net_profit:+,.2f}")
        table.add_row("fees and half-spread", f"{result.fees:,.2f}")
        table.add_row("positions entered", f"{result.trades:,}")
        table.add_row("worst drawdown", f"{result.max_drawdown:.3%}")
    used = {name: share for name, share in result.action_mix.items() if share}
    table.add_row("actions", ", ".join(f"{name} {share:.1%}" for name, share in used.items()))
    return table


if __name__ == "__main__":
    main()
