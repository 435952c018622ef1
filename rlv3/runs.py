"""What does a training run leave behind? A folder that says how, on what and how well it learned.

    policy.safetensors   the policy as training ended
    best.safetensors     the policy with the best validation score on the way
    checkpoint.safetensors  all that `rlv3 train --resume` needs to finish it
    config.toml          every setting; `rlv3 train --config` reads it
    run.json             command, data with fingerprints, split, versions, results
    metrics.csv          one line per update
    events.out.tfevents* the same for TensorBoard
    learning_curve.png   the same as a picture

Validation draws from no random stream of the training: with it and without it, the same weights.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from rlv3 import console
from rlv3.config import RLv3Config
from rlv3.errors import DataError
from rlv3.evaluation import evaluate_bars, evaluate_env, evaluate_market
from rlv3.extras import require
from rlv3.features import US, WARM_BARS
from rlv3.manager import RLv3Manager
from rlv3.market import DEFAULT_WORLD, Bars
from rlv3.policy import Policy, save_artifact
from rlv3.snapshot import CHECKPOINT
from rlv3.splits import PARTS
from rlv3.trainer import Update

POLICY, BEST, CONFIG, RUN = "policy.safetensors", "best.safetensors", "config.toml", "run.json"
METRICS, CURVE, EVENTS = "metrics.csv", "learning_curve.png", "events.out.tfevents.*"
COLUMNS = ("steps", "episodes", "mean_return", *Update._fields, "validation", "seconds")
RECENT = 100  # finished episodes that `mean_return` is over
VALIDATIONS = 20  # of a run, unless told otherwise
VALIDATION_EPISODES = 10
VALIDATION_SEED = 7_000_000  # of the validation episodes: far from the seeds people choose
_SAID_EVERY_S = 5.0
_KEPT_EVERY_S = 2.0
_PACKAGES = ("rlv3-shadow", "numpy", "torch", "gymnasium", "numba", "safetensors")

Validate = Callable[[Policy], float]


class Show(Protocol):
    """What to call after every update."""

    def __call__(self, done: int, update: Update, score: float | None = None) -> None:
        """Show steps so far, what the update measured, and a validation score if there is one."""


def validation_of(
    manager: RLv3Manager, *, market: str | Sequence[str] | None, env_id: str | None
) -> Validate | None:
    """Return how a policy in training is scored, higher is better; None where nothing is kept back.

    Files: mean log return per series of the validation part. Worlds: the same on fresh series.
    Other environments: mean return of ten episodes.
    """
    if env_id is not None:
        return lambda policy: (
            evaluate_env(
                policy, env_id, episodes=VALIDATION_EPISODES, seed=VALIDATION_SEED
            ).mean_return
        )
    if manager.split is not None:
        bars = manager.split.validation
        return (lambda policy: evaluate_bars(policy, bars).mean_return) if bars else None
    worlds = sorted({market} if isinstance(market, str) else set(market or (DEFAULT_WORLD,)))
    return lambda policy: float(
        np.mean(
            [
                evaluate_market(
                    policy, world, episodes=VALIDATION_EPISODES, seed=VALIDATION_SEED
                ).mean_return
                for world in worlds
            ]
        )
    )


class Run:
    """A run folder that is being written.

    Args:
        folder: made if needed; what an earlier run left in it is replaced unless `resumed`.
        total: environment steps that the run will take.
        every: steps between validations; 0 for none.
        inputs: what was trained on, for `run.json`.
        done: steps that an interrupted run, now to be finished, had taken.

    Attributes:
        about: plain values to keep with every checkpoint.
        metrics: what training measured, once it is finished.
    """

    def __init__(
        self,
        folder: Path,
        manager: RLv3Manager,
        *,
        total: int,
        every: int | None = None,
        inputs: Mapping[str, Any],
        market: str | Sequence[str] | None = None,
        env_id: str | None = None,
        resumed: bool = False,
        done: int = 0,
    ) -> None:
        self.folder = folder
        self.about: dict[str, Any] = {}
        self.metrics: dict[str, float] = {}
        self._done = done
        self._kept_at = -math.inf
        self.manager = manager
        self.rows: list[dict[str, float | None]] = []
        self._total = total
        self._every = max(total // VALIDATIONS, 1) if every is None else every
        self._inputs = dict(inputs)
        self._places: dict[str, Any] = {"market": market, "env_id": env_id}
        self._resumed = resumed
        self._started = time.perf_counter()
        self._began = datetime.now(UTC)
        self._validate: Validate | None = None
        self._due = self._every
        self._before = manager.steps - done

    def __enter__(self) -> Self:
        for package in ("tensorboard", "matplotlib"):  # before hours of training, not after
            require(package, "train")
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._resumed:
            self.rows = read_metrics(self.folder / METRICS, upto=self._before + self._done)
            scored = [row["steps"] or 0 for row in self.rows if row["validation"] is not None]
            if self._done and scored:
                self._due = int(scored[-1]) - self._before + self._every
        else:
            for old in (
                *self.folder.glob(EVENTS),
                self.folder / BEST,
                self.folder / CURVE,
                self.folder / CHECKPOINT,
            ):
                old.unlink(missing_ok=True)
        write_text(self.folder / CONFIG, config_toml(self.manager.config))
        self._note("running", {})
        self._file = (self.folder / METRICS).open("w", newline="", encoding="utf-8")
        self._csv = csv.DictWriter(self._file, COLUMNS, lineterminator="\n")
        self._csv.writeheader()
        self._csv.writerows(self.rows)
        board = import_module("torch.utils.tensorboard")
        self._board = board.SummaryWriter(
            str(self.folder), purge_step=self._before + self._done if self._resumed else None
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._board.close()

    @property
    def best(self) -> dict[str, float | None] | None:
        """The metrics at the best validation so far; the newest of equals, which learned more."""
        known = [row for row in reversed(self.rows) if row["validation"] is not None]
        return max(known, key=lambda row: row["validation"] or 0.0, default=None)

    def update(self, done: int, update: Update) -> float | None:
        """Record one update; return the validation score if one was due.

        Args:
            done: steps of this part of the run so far.
        """
        score = None
        if self._every and (done >= self._due or done >= self._total):
            self._due = done + self._every
            score = self._score()
        returns = self.manager.episode_returns
        row: dict[str, float | None] = {
            "steps": self._before + done,
            "episodes": len(returns),
            "mean_return": float(np.mean(returns[-RECENT:])) if returns else None,
            **update._asdict(),
            "validation": score,
            "seconds": round(time.perf_counter() - self._started, 3),
        }
        best = self.best
        self.rows.append(row)
        self._csv.writerow(row)
        self._file.flush()
        for name, value in row.items():
            if value is not None and name not in ("steps", "seconds"):
                self._board.add_scalar(f"train/{name}", value, int(row["steps"] or 0))
        if score is not None and (best is None or score >= (best["validation"] or 0.0)):
            save_artifact(self.manager.policy.source, self.folder / BEST)
        return score

    @contextmanager
    def recorded(self) -> Iterator[Callable[[int, Update], None]]:
        """Open the folder and a progress bar; yield what to call after every update."""
        with self, progress(self._total) as show:

            def on_update(done: int, update: Update) -> None:
                show(done, update, self.update(done, update))
                self._keep()

            try:
                yield on_update
            except KeyboardInterrupt:
                if self._kept_at > -math.inf:
                    self._note("interrupted", {})
                    console.err.print(
                        f"interrupted: rlv3 train --resume {self.folder} finishes it",
                        soft_wrap=True,
                    )
                raise

    def _keep(self) -> None:
        """Write a checkpoint after the first update, then every few seconds."""
        now = time.perf_counter()
        if now - self._kept_at >= _KEPT_EVERY_S:
            self._kept_at = now
            self.manager.save_checkpoint(self.folder / CHECKPOINT, self.about)

    def _score(self) -> float | None:
        if self._validate is None:
            self._validate = validation_of(self.manager, **self._places)
        return None if self._validate is None else self._validate(self.manager.policy)

    def finish(self, metrics: Mapping[str, float]) -> dict[str, Any]:
        """Write policy, plot and results; return what `run.json` says."""
        from rlv3.plots import learning_curve

        self.metrics = dict(metrics)
        save_artifact(self.manager.policy.source, self.folder / POLICY)
        learning_curve(self.folder / CURVE, self.rows)
        found = self._note("finished", {"metrics": dict(metrics), "best": self.best})
        # last, so that whoever is killed before it still has something to finish
        self.manager.save_checkpoint(self.folder / CHECKPOINT, self.about)
        return found

    def _note(self, status: str, results: Mapping[str, Any]) -> dict[str, Any]:
        found = {
            "status": status,
            "command": ["rlv3", *sys.argv[1:]],
            "started": self._began.isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - self._started, 1),
            "steps": self.manager.steps,
            "seed": self.manager.config.seed,
            "resumed_at": self._before + self._done if self._resumed else None,
            **self._inputs,
            "split": _parts(self.manager),
            "versions": versions(),
            "policy_sha256": self.manager.policy.digest if results else None,
            "data_sha256": self.manager.policy.metadata["training"]["data_sha256"],
            **results,
        }
        write_text(self.folder / RUN, json.dumps(found, indent=2) + "\n")
        return found


def file_facts(paths: Sequence[Path], series: Sequence[Bars]) -> list[dict[str, Any]]:
    """Return name, sha256 and extent of data files, for `run.json`."""
    return [
        {
            "file": str(path),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "symbol": bars.symbol,
            "step_seconds": bars.step_seconds,
            **_extent(bars),
        }
        for path, bars in zip(paths, series, strict=True)
    ]


def _extent(bars: Bars, warm: int = 0) -> dict[str, Any]:
    begin, end = (
        datetime.fromtimestamp(int(us) / US, UTC).isoformat()
        for us in (bars.end_us[warm], bars.end_us[-1])
    )
    return {"bars": len(bars.close) - warm, "from": begin, "to": end}


def _parts(manager: RLv3Manager) -> dict[str, Any] | None:
    """Return the extent of every part by symbol; a part begins with its first decision."""
    if manager.split is None:
        return None
    return {
        name: {bars.symbol: _extent(bars, WARM_BARS - 1) for bars in part}
        for name, part in zip(PARTS, manager.split, strict=True)
    }


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def config_toml(config: RLv3Config) -> str:
    """Return a configuration as TOML that `rlv3 train --config` reads."""
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in asdict(config).items())


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    save_artifact(text.encode(), path)


def read_metrics(path: Path, *, upto: int | None = None) -> list[dict[str, float | None]]:
    """Read `metrics.csv`, up to a number of steps; a file that is not there has no lines.

    Raises:
        DataError: other columns, or a cell that is no number.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise DataError(f"{path}: expected columns {', '.join(COLUMNS)}")
        rows = []
        for line in reader:
            try:
                row = {name: float(cell) if cell else None for name, cell in line.items()}
            except (TypeError, ValueError):
                raise DataError(f"{path} row {reader.line_num}: expected numbers") from None
            if upto is None or (row["steps"] or 0) <= upto:
                rows.append(row)
    return rows


@contextmanager
def progress(total: int) -> Iterator[Show]:
    """Show steps, steps a second and time left on stderr; yield what to call after every update.

    A bar where a person watches; a line every few seconds where the output goes to a file.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
    )
    watched = console.err.is_terminal
    started = said = time.perf_counter()
    validation = ""
    with Progress(*columns, console=console.err, disable=not watched) as bar:
        task = bar.add_task("training", total=total, status="")

        def show(done: int, update: Update, score: float | None = None) -> None:
            nonlocal said, validation
            if score is not None:
                validation = f", validation {score:+.5g}"
            now = time.perf_counter()
            status = (
                f"{done:,} of {total:,} steps, {update.steps_per_s:,.0f} steps/s, "
                f"entropy {update.entropy:.2f}{validation}"
            )
            bar.update(task, completed=min(done, total), status=status)
            if not watched and (now - said >= _SAID_EVERY_S or done >= total):
                said = now
                left = max(total - done, 0) / done * (now - started)
                console.err.print(f"training {status}, {left:,.0f} s left", soft_wrap=True)

        yield show
