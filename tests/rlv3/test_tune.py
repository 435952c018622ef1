"""The search: resumable, stopped early, judged by validation, and written where train reads it."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import optuna
import pytest

from rlv3.cli import read_config
from rlv3.config import RLv3Config
from rlv3.runs import config_toml
from rlv3.tune import finished, importance, open_study, suggest
from tests.rlv3.test_cli import call, refused, write_bars

FAST = RLv3Config(max_steps_per_episode=100)


def states(folder: Path) -> list[str]:
    with sqlite3.connect(folder / "study.db") as link:
        found = [row[0] for row in link.execute("select state from trials order by number")]
    link.close()
    return found


def test_a_search_goes_on_where_it_stopped(tmp_path: Path) -> None:
    data = write_bars(tmp_path / "abc_1m.csv", 900)
    base = tmp_path / "base.toml"
    base.write_text(config_toml(FAST))
    out = tmp_path / "tune"
    options = ("tune", "--data", data, "--config", base, "--steps", 512, "--out", out)
    first = call(*options, "--trials", 1)
    assert "trial 0: " in first.stderr
    assert len(states(out)) == 1
    second = call(*options, "--trials", 2)
    assert len(states(out)) == 3
    assert "of 3" in second.stdout
    best = RLv3Config(**read_config(out / "best.toml"))
    assert best.max_steps_per_episode == 100
    run = tmp_path / "run"
    call("train", "--data", data, "--config", out / "best.toml", "--steps", 512, "--out", run)
    assert (out / "importances.png").read_bytes().startswith(b"\x89PNG")
    assert "expected the study's own steps, found others" in refused(
        *options[:-3], 1_024, "--out", out, "--trials", 1
    )


def test_trials_that_fall_behind_are_stopped_and_importances_add_up(tmp_path: Path) -> None:
    study = open_study(tmp_path, {"data": "x"}, 0)

    def judge(trial: optuna.Trial) -> float:
        score = -abs(suggest(trial, FAST).lambda_gae - 0.95)
        for step in (1, 2, 3):
            trial.report(score, step)
            if trial.should_prune():
                raise optuna.TrialPruned
        return score

    study.optimize(judge, n_trials=14)
    assert 5 <= len(finished(study)) < 14
    shares = importance(study)
    assert sum(shares.values()) == pytest.approx(1.0)


def test_every_suggestion_is_a_configuration(tmp_path: Path) -> None:
    study = open_study(tmp_path, {"data": "x"}, 1)
    for _ in range(8):
        trial = study.ask()
        config = suggest(trial, FAST)
        assert 0.9 <= config.gamma <= 0.999
        assert config.buffer_size % config.batch_size == 0
        study.tell(trial, 0.0)
