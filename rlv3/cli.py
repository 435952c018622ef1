"""`rlv3`: train, evaluate and ask the PPO policy."""

from __future__ import annotations

import json
import sys
import tomllib
from dataclasses import fields
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from rlv3 import audit, console, fetch, tune, walkforward
from rlv3.config import RLv3Config
from rlv3.errors import ConfigError, DataError, PolicyError
from rlv3.extras import require
from rlv3.features import US
from rlv3.market import DEFAULT_WORLD, WORLDS, Bars, coverage, read_bars
from rlv3.policy import Policy, save_artifact, shipped_policy
from rlv3.splits import check_unseen, first_decision_us, parse_split, window

if TYPE_CHECKING:
    from rlv3.evaluation import Evaluation
    from rlv3.runs import Run

ARTIFACT = "policy.safetensors"
CHECKPOINT = "checkpoint.safetensors"
DEFAULT_OUT = Path("runs/rl_v3")
SANDBOX_STEPS = 20_480
SHIPPED = shipped_policy()
RECIPES = {path.stem: path for path in sorted(SHIPPED.parent.glob("recipes/*.toml"))}
"""Published recipes by name; each says in its first lines what it is for."""
DATES = ["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%MZ", "%Y-%m-%dT%H:%M:%SZ"]
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
    Path,
    typer.Option(
        help="Policy artifact (.safetensors); the shipped one if unset.", show_default=False
    ),
]
MarketOption = Annotated[
    str | None,
    typer.Option(help=f"Synthetic world: {', '.join(WORLDS)}."),
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
        Path | None,
        typer.Option(
            help="TOML file with settings of RLv3Config, or the name of a recipe that comes with "
            f"the package: {', '.join(RECIPES)}. Flags beat it."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seeds every random stream.")] = None,
    out: Annotated[
        Path | None, typer.Option(help=f"Directory for {ARTIFACT}; {DEFAULT_OUT} if unset.")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Directory of an earlier run: finish it, or begin where it ended."),
    ] = None,
    bar_stamp: StampOption = "close",
    split: Annotated[
        str, typer.Option(help="Shares of --data by time: train, validation, test; or train, test.")
    ] = "70,15,15",
    embargo: Annotated[
        int, typer.Option(help="Bars between one part and the first decision of the next.")
    ] = 60,
    validate_every: Annotated[
        int | None,
        typer.Option(min=0, help="Steps between validations; 20 a run if unset, 0 for none."),
    ] = None,
) -> None:
    """Train a policy; leave a folder with the policy, its metrics, settings and plots.

    Without --data, --market or --env it trains on the world regime_switching.
    Files are cut by time: the first part is trained on, the second chooses best.safetensors, the
    third is left for rlv3 evaluate.
    --resume alone finishes an interrupted run, whose end is then the same as if it had not been
    interrupted. With other options it begins a new run from the weights, the normaliser and the
    step count of the folder's policy.

    [bold]Examples[/bold]

        rlv3 train --episodes 200 --out runs/first

        rlv3 train --steps 300000 --data btc_1m.csv --seed 1

        rlv3 train --env CartPole-v1 --config cartpole-zoo --steps 100000 --out runs/cartpole
    """
    if episodes is not None and steps is not None:
        raise ConfigError("expected --episodes or --steps, found both")
    if sum(place is not None for place in (data or None, market, env)) > 1:
        raise ConfigError("expected one of --data, --market and --env, found several")
    _need_training()
    from rlv3.manager import DEFAULT_EPISODES, RLv3Manager
    from rlv3.runs import Run, file_facts

    given = (episodes, steps, data or None, market, env, reward, config, seed, out)
    alone = all(option is None for option in given)
    if resume is not None and alone and (resume / CHECKPOINT).exists():
        _finish(resume)
        return
    if resume is not None and not (resume / ARTIFACT).exists() and (resume / CHECKPOINT).exists():
        raise ConfigError(
            f"{resume}: expected a finished run to begin from, found an interrupted one, which "
            f"rlv3 train --resume {resume} finishes if given alone"
        )
    series = _read(data or [], bar_stamp)
    shares = parse_split(split)
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
    inputs = {"data": file_facts(data or [], series), "market": market, "env": env,
              "embargo": embargo if series else None}  # fmt: skip
    run = Run(
        out or resume or DEFAULT_OUT, manager, total=total, every=validate_every, inputs=inputs,
        market=market, env_id=env, resumed=resume is not None,
    )  # fmt: skip
    places: dict[str, Any] = {
        "market": market,
        "env_id": env,
        "shares": list(shares),
        "embargo": embargo,
    }
    run.about = {
        "places": places, "data": [str(path.resolve()) for path in data or []],
        "bar_stamp": bar_stamp, "total": total, "every": validate_every, "inputs": inputs,
    }  # fmt: skip
    manager.prepare(price_data=series or None, **places)  # before an earlier run is replaced
    with run.recorded() as on_update:
        run.finish(manager.train(episodes, steps=steps, on_update=on_update))
    _say(run, data or [])


def _finish(folder: Path) -> None:
    """Finish an interrupted run from its checkpoint."""
    from rlv3.manager import RLv3Manager
    from rlv3.runs import Run
    from rlv3.snapshot import read_checkpoint

    snapshot = read_checkpoint(folder / CHECKPOINT)
    about = snapshot.about["caller"]
    data = [Path(path) for path in about["data"]]
    places = about["places"]
    manager = RLv3Manager(snapshot.config)
    done = manager.resume(snapshot, price_data=_read(data, about["bar_stamp"]) or None, **places)
    if manager.reached:
        raise ConfigError(
            f"{folder}: expected an interrupted run, found one that is finished after "
            f"{manager.steps:,} steps: say with --steps how many more"
        )
    run = Run(
        folder, manager, total=about["total"], every=about["every"], inputs=about["inputs"],
        market=places["market"], env_id=places["env_id"], resumed=True, done=done,
    )  # fmt: skip
    run.about = about
    with run.recorded() as on_update:
        run.finish(manager.finish(on_update))
    _say(run, data)


def _say(run: Run, data: list[Path]) -> None:
    """Print what a run measured and where it is."""
    from rlv3.runs import BEST

    manager, metrics = run.manager, run.metrics
    table = Table("training", "")
    for name, value in metrics.items():
        table.add_row(name, f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}")
    console.out.print(table)
    if run.best is not None:
        score, at = run.best["validation"], run.best["steps"]
        console.out.print(f"best validation score {score:+.6g} at {at:,.0f} steps: {BEST}")
    if manager.split is not None and manager.split.test:
        begin = datetime.fromtimestamp(int(first_decision_us(manager.split.test)) / US, UTC)
        files = " ".join(f"--data {path}" for path in data)
        console.out.print(
            "nothing has seen the test part yet: rlv3 evaluate "
            f"--policy {run.folder} {files} --from {begin:%Y-%m-%dT%H:%M:%SZ}",
            soft_wrap=True,
        )
    path = run.folder / ARTIFACT
    console.out.print(f"{path} (sha256 {manager.policy.digest[:16]})", soft_wrap=True)


@app.command()
def evaluate(
    policy: Annotated[
        list[Path] | None,
        typer.Option(
            help="Policy artifact, run folder, or folder of run folders; repeat for more. The "
            "shipped one if unset."
        ),
    ] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="CSV or Parquet bars; repeat for more symbols.")
    ] = None,
    market: MarketOption = None,
    env: EnvOption = None,
    episodes: Annotated[
        int, typer.Option(min=1, help="Synthetic series of 1,000 bars, or environment episodes.")
    ] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Seeds series or episodes.")] = 1_000,
    start: Annotated[
        datetime | None, typer.Option("--from", formats=DATES, help="First decision (UTC).")
    ] = None,
    end: Annotated[
        datetime | None, typer.Option("--to", formats=DATES, help="End of the last bar (UTC).")
    ] = None,
    allow_overlap: Annotated[
        bool, typer.Option(help="Evaluate on the training data too; it proves nothing.")
    ] = False,
    random_runs: Annotated[
        int, typer.Option(min=0, help="Runs of the random baseline; 0 for no baselines.")
    ] = 20,
    plot: Annotated[Path | None, typer.Option(help="Equity plot to write (.png or .svg).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    bar_stamp: StampOption = "close",
) -> None:
    """Evaluate policies deterministically: the most probable valid action at every step.

    Trading is compared with flat, buy-and-hold and random positions of equal turnover. Several
    policies give the interquartile mean of their mean returns with a 95 % bootstrap interval.
    Without --data, --market or --env: the environment they were trained in, which for trading is
    the world regime_switching.

    [bold]Examples[/bold]

        rlv3 evaluate --policy runs/first --data btc_1m.csv --from 2022-01-18 --plot equity.png

        rlv3 evaluate --policy runs/cartpole --env CartPole-v1 --episodes 100
    """
    if sum(place is not None for place in (data or None, market, env)) > 1:
        raise ConfigError("expected one of --data, --market and --env, found several")
    if not data and (start or end):
        raise ConfigError("expected --data with --from and --to, found none")
    loaded = {str(path): Policy.load(path) for path in _artifacts(policy or [SHIPPED])}
    _need_training()
    env = env or _home(loaded, anywhere=not (data or market))
    from rlv3.evaluation import evaluate_bars, evaluate_env, evaluate_market
    from rlv3.metrics import interquartile_interval, interquartile_mean
    from rlv3.present import comparison_table, evaluation_table, provenance

    if plot is not None:
        if env is not None:
            raise ConfigError("expected --plot with prices, found --env")
        require("matplotlib", "train")
        from rlv3.plots import check_suffix

        check_suffix(plot)
    series = [window(bars, _utc(start), _utc(end)) for bars in _read(data or [], bar_stamp)]
    if series and not allow_overlap:
        for one in loaded.values():
            check_unseen(one.metadata["training"], series)

    def judge(one: Policy) -> Evaluation:
        if series:
            return evaluate_bars(one, series, random_runs=random_runs, seed=seed)
        if env is not None:
            return evaluate_env(one, env, episodes=episodes, seed=seed)
        world = market or DEFAULT_WORLD
        return evaluate_market(one, world, episodes=episodes, seed=seed, random_runs=random_runs)

    results = {name: judge(one) for name, one in loaded.items()}
    found = [
        {"policy": name, "sha256": loaded[name].digest,
         "training": {k: loaded[name].metadata["training"].get(k)
                      for k in ("steps", "seed", "reward", "markets", "data_end")},
         **result.to_dict()}
        for name, result in results.items()
    ]  # fmt: skip
    scores = [result.mean_return for result in results.values()]
    middle, (low, high) = interquartile_mean(scores), interquartile_interval(scores)
    if plot is not None:
        from rlv3.plots import equity

        lines = {name: result.curves for name, result in results.items()}
        held = next(iter(results.values())).held
        equity(plot, lines | ({"buy and hold": held} if held else {}))
    if as_json:
        several = {"interquartile_mean": middle, "interval": [low, high], "policies": found}
        typer.echo(json.dumps(found[0] if len(found) == 1 else several))
        return
    for name, result in results.items():
        if len(results) == 1:
            console.out.print(evaluation_table(result, "evaluation"))
        console.out.print(f"{name}: {provenance(loaded[name].metadata['training'])}",
                          soft_wrap=True)  # fmt: skip
    if len(results) > 1:
        console.out.print(comparison_table(results))
        console.out.print(
            f"interquartile mean of {len(scores)} mean returns "
            f"{middle:+.6g}, 95 % [{low:+.6g}, {high:+.6g}]"
        )
    if plot is not None:
        console.out.print(f"equity: {plot}", soft_wrap=True)


def _artifacts(paths: list[Path]) -> list[Path]:
    """Return the artifacts that files, run folders and folders of run folders stand for.

    Raises:
        PolicyError: a folder without a policy.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        here = [path / ARTIFACT] if (path / ARTIFACT).exists() else []
        inside = here or sorted(path.glob(f"*/{ARTIFACT}"))
        if not inside:
            raise PolicyError(f"expected {ARTIFACT} in {path} or in its folders, found none")
        found += inside
    return found


def _home(policies: dict[str, Policy], *, anywhere: bool) -> str | None:
    """Return the Gymnasium environment that policies were trained in; None for trading.

    Args:
        anywhere: nobody said where to evaluate; else it is on prices.
    Raises:
        ConfigError: policies of several environments, or prices for those of another one.
    """
    from rlv3.env import ENV_ID

    homes = {name: one.metadata["training"].get("env") or ENV_ID for name, one in policies.items()}
    strangers = {name: home for name, home in homes.items() if home != ENV_ID}
    if not strangers:
        return None
    name, home = next(iter(strangers.items()))
    if anywhere and set(homes.values()) == {home}:
        return home
    found = "prices" if not anywhere else f"policies of {', '.join(sorted(set(homes.values())))}"
    raise ConfigError(f"{name}: expected --env {home}, where it was trained, found {found}")


def _utc(moment: datetime | None) -> datetime | None:
    return None if moment is None else moment.replace(tzinfo=UTC)


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
    from rlv3.present import evaluation_table
    from rlv3.runs import progress

    manager = RLv3Manager(RLv3Config(seed=seed))
    console.out.print(f"1. train {SANDBOX_STEPS:,} steps on simulated prices ({DEFAULT_WORLD})")
    with progress(SANDBOX_STEPS) as show:
        metrics = manager.train(steps=SANDBOX_STEPS, on_update=show)
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
    console.out.print(evaluation_table(result, "evaluation"))


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
app.command("fetch")(fetch.command)
app.command("tune")(tune.command)
app.command("walkforward")(walkforward.command)


def read_config(path: Path) -> dict[str, Any]:
    """Return the settings of a TOML file whose keys are fields of `RLv3Config`.

    Args:
        path: the file, or the name of a recipe of the package.
    Raises:
        ConfigError: the file cannot be read, or has an unknown key or a value of another type.
    """
    path = RECIPES.get(str(path), path)
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
    """Read files and say on stderr what they cover and lack."""
    series = []
    for path in paths:
        bars = read_bars(path, bar_stamp=bar_stamp)
        console.err.print(f"{path}: {coverage(bars).sentence()}", soft_wrap=True, highlight=False)
        series.append(bars)
    return series


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


if __name__ == "__main__":
    main()
