"""Which hyperparameters are worth training with? A resumable search, judged by validation.

Every trial trains one policy and is scored on the validation part, never on the test part; trials
that fall behind the median of the others at the same step are stopped early. The study lies in one
SQLite file: run the command again and it goes on. What is found is written as TOML that `rlv3 train
--config` reads. Every trial is one more configuration tried: tell `rlv3 walkforward --trials`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import typer
from rich.table import Table

from rlv3 import console
from rlv3.errors import ConfigError
from rlv3.extras import require
from rlv3.splits import DEFAULT_EMBARGO, parse_split

if TYPE_CHECKING:
    from optuna import Study, Trial

    from rlv3.config import RLv3Config
    from rlv3.market import Bars
    from rlv3.trainer import Update

DEFAULT_TRIALS = 20
DEFAULT_STEPS = 50_000
CHECKS = 5  # validations of a trial, at which it can be stopped
STARTUP = 5  # trials before any is stopped
STUDY, BEST, IMPORTANCES = "study.db", "best.toml", "importances.png"
BUFFERS = (512, 1024, 2048, 4096)
BATCHES = (32, 64, 128, 256)


def suggest(trial: Trial, base: RLv3Config) -> RLv3Config:
    """Return a configuration to try: what is not searched over is the base's."""
    return replace(
        base,
        learning_rate=trial.suggest_float("learning_rate", 1e-5, 3e-3, log=True),
        gamma=1.0 - trial.suggest_float("one_minus_gamma", 1e-3, 1e-1, log=True),
        lambda_gae=trial.suggest_float("lambda_gae", 0.8, 1.0),
        clip_range=trial.suggest_float("clip_range", 0.1, 0.4),
        entropy_coef=trial.suggest_float("entropy_coef", 1e-5, 1e-1, log=True),
        n_epochs=trial.suggest_int("n_epochs", 3, 20),
        batch_size=trial.suggest_categorical("batch_size", BATCHES),
        buffer_size=trial.suggest_categorical("buffer_size", BUFFERS),
        hidden_dim=trial.suggest_categorical("hidden_dim", (32, 64, 128)),
        activation=trial.suggest_categorical("activation", ("relu", "tanh")),
        learning_rate_schedule=trial.suggest_categorical("schedule", ("constant", "linear")),
    )


def objective(
    trial: Trial,
    base: RLv3Config,
    *,
    steps: int,
    series: Sequence[Bars],
    shares: Sequence[float],
    embargo: int,
    market: str | None,
    env_id: str | None,
) -> float:
    """Train one trial; return its last validation score.

    Raises:
        optuna.TrialPruned: it fell behind.
    """
    import optuna

    from rlv3.manager import RLv3Manager
    from rlv3.runs import config_toml, validation_of

    config = suggest(trial, base)
    trial.set_user_attr("config", config_toml(config))
    manager = RLv3Manager(config)
    every = max(steps // CHECKS, 1)
    due, score = every, -math.inf

    def check(done: int, update: Update) -> None:
        nonlocal due, score
        del update
        if done < min(due, steps):
            return
        due += every
        validate = validation_of(manager, market=market, env_id=env_id)
        if validate is None:
            raise ConfigError("expected a split with a validation part, such as 70,15,15")
        score = validate(manager.policy)
        trial.report(score, done)
        if trial.should_prune():
            raise optuna.TrialPruned

    manager.train(
        steps=steps, price_data=series or None, market=market, env_id=env_id, shares=shares,
        embargo=embargo, on_update=check,
    )  # fmt: skip
    return score


def command(
    out: Annotated[Path, typer.Option(help="Folder of the study; run again to go on.")] = Path(
        "runs/tune"
    ),
    trials: Annotated[int, typer.Option(min=1, help="Trials to add.")] = DEFAULT_TRIALS,
    steps: Annotated[int, typer.Option(min=1, help="Training steps per trial.")] = DEFAULT_STEPS,
    data: Annotated[
        list[Path] | None, typer.Option(help="CSV or Parquet bars; repeat for more symbols.")
    ] = None,
    market: Annotated[str | None, typer.Option(help="Synthetic world.")] = None,
    env: Annotated[str | None, typer.Option(help="Gymnasium environment.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file or recipe with what is not searched over.")
    ] = None,
    split: Annotated[
        str, typer.Option(help="Shares of --data by time: train, validation, test.")
    ] = "70,15,15",
    embargo: Annotated[
        int, typer.Option(help="Bars between one part and the first decision of the next.")
    ] = DEFAULT_EMBARGO,
    seed: Annotated[int, typer.Option(min=0, help="Seeds the search and every trial.")] = 0,
    bar_stamp: Annotated[
        Literal["open", "close"], typer.Option(help="What the times in the files mean.")
    ] = "close",
) -> None:
    """Search for hyperparameters; resumable, judged on the validation part.

    [bold]Example[/bold]

        rlv3 tune --data btc_1m.csv --trials 50 --out runs/tune

        rlv3 train --data btc_1m.csv --config runs/tune/best.toml
    """
    if sum(place is not None for place in (data or None, market, env)) > 1:
        raise ConfigError("expected one of --data, --market and --env, found several")
    require("optuna", "tune")
    for package in ("torch", "gymnasium", "matplotlib"):
        require(package, "train")
    from rlv3.cli import read_config
    from rlv3.config import RLv3Config
    from rlv3.market import read_bars
    from rlv3.runs import write_text

    series = [read_bars(path, bar_stamp=bar_stamp) for path in data or []]
    settings: dict[str, Any] = read_config(config) if config else {}
    if series:
        settings.setdefault("step_seconds", series[0].step_seconds)
    base = RLv3Config(**settings | {"seed": seed})
    place = {"data": [bars.sha256() for bars in series], "market": market, "env": env,
             "steps": steps, "split": split, "embargo": embargo}  # fmt: skip
    study = open_study(out, place, seed)

    def judge(trial: Trial) -> float:
        return objective(
            trial, base, steps=steps, series=series, shares=parse_split(split), embargo=embargo,
            market=market, env_id=env,
        )  # fmt: skip

    def say(study: Study, frozen: Any) -> None:
        value = "stopped early" if frozen.value is None else f"{frozen.value:+.6g}"
        best = f", best {study.best_value:+.6g} (trial {study.best_trial.number})"
        console.err.print(
            f"trial {frozen.number}: {value}{best if finished(study) else ''}",
            soft_wrap=True, highlight=False,
        )  # fmt: skip

    study.optimize(judge, n_trials=trials, callbacks=[say])
    if not finished(study):
        raise ConfigError("expected a trial that finishes, found none: add --trials")
    head = (
        f"# Trial {study.best_trial.number} of {len(study.trials)}, validation score "
        f"{study.best_value:+.6g} after {steps:,} steps\n"
    )
    write_text(out / BEST, head + study.best_trial.user_attrs["config"])
    shares = importance(study)
    if shares:
        from rlv3.plots import importances

        importances(out / IMPORTANCES, shares)
    console.out.print(_table(study, shares))
    console.out.print(f"{out / BEST}: rlv3 train --config reads it", soft_wrap=True)


def open_study(out: Path, place: dict[str, Any], seed: int) -> Study:
    """Return the study that lies in a folder, a new one where there is none.

    Raises:
        ConfigError: the study there was made on other data or with other steps.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    out.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        study_name="rlv3",
        storage=f"sqlite:///{out / STUDY}",
        direction="maximize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTUP, n_warmup_steps=0),
        load_if_exists=True,
    )
    known = study.user_attrs.get("place")
    if known is None:
        study.set_user_attr("place", json.dumps(place))
    elif json.loads(known) != place:
        differing = [k for k, v in place.items() if json.loads(known).get(k) != v]
        raise ConfigError(
            f"{out / STUDY}: expected the study's own {', '.join(differing)}, found others; "
            "name another --out"
        )
    # a resumed search must not draw what it drew before
    stream = np.random.SeedSequence([seed, 4, len(study.trials)]).generate_state(1)
    study.sampler = optuna.samplers.TPESampler(seed=int(stream[0]), n_startup_trials=STARTUP)
    return study


def finished(study: Study) -> list[Any]:
    """Return the trials that ran to their end."""
    return [trial for trial in study.trials if trial.state.name == "COMPLETE"]


def importance(study: Study) -> dict[str, float]:
    """Return how much each parameter matters for the score (PED-ANOVA); {} of too few trials."""
    import optuna

    values = {trial.value for trial in finished(study)}
    if len(values) < 2:
        return {}
    return dict(optuna.importance.get_param_importances(study))


def _table(study: Study, shares: dict[str, float]) -> Table:
    table = Table("best trial", f"{study.best_trial.number} of {len(study.trials)}", "importance")
    table.add_row("validation score", f"{study.best_value:+.6g}", "")
    for name, value in study.best_params.items():
        shown = f"{value:.6g}" if isinstance(value, float) else str(value)
        table.add_row(name, shown, f"{shares[name]:.2f}" if name in shares else "-")
    return table
