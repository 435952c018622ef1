"""The run folder: complete, readable, and without a trace in the weights."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.main import get_command

from rlv3.cli import RECIPES, app, read_config
from rlv3.config import RLv3Config
from rlv3.errors import ConfigError, DataError, PolicyError
from rlv3.evaluation import evaluate_bars
from rlv3.manager import RLv3Manager
from rlv3.market import read_bars
from rlv3.policy import Policy
from rlv3.runs import COLUMNS, Run, config_toml, progress, read_metrics
from rlv3.snapshot import read_checkpoint
from rlv3.splits import split_by_time
from rlv3.trainer import Update
from tests.rlv3.test_cli import call, refused, write_bars

FAST = RLv3Config(buffer_size=256, n_epochs=2, max_steps_per_episode=100, hidden_dim=32, seed=2)
PNG = b"\x89PNG\r\n"


def trained(tmp_path: Path, *options: object) -> tuple[Path, Path]:
    """Train on a file from the command line; return the file and the run folder."""
    data = write_bars(tmp_path / "abc_1m.csv", 900)
    config = tmp_path / "c.toml"
    config.write_text(config_toml(FAST))
    out = tmp_path / "run"
    call("train", "--data", data, "--config", config, "--steps", 768, "--out", out, *options)
    return data, out


def test_a_run_on_a_file_leaves_everything_behind(tmp_path: Path) -> None:
    data, out = trained(tmp_path, "--validate-every", 256)
    said = json.loads((out / "run.json").read_text())
    assert said["status"] == "finished"
    assert said["steps"] == 768
    assert said["data"][0]["file"] == str(data)
    assert said["data"][0]["bars"] == 900
    assert len(said["data"][0]["sha256"]) == 64
    assert said["split"]["train"]["ABC"]["bars"] == 600  # the first 30 of 630 only warm up
    assert {"python", "numpy", "torch", "gymnasium", "rlv3-shadow"} <= set(said["versions"])
    policy, best = Policy.load(out / "policy.safetensors"), Policy.load(out / "best.safetensors")
    assert said["policy_sha256"] == policy.digest

    rows = read_metrics(out / "metrics.csv")
    assert [row["steps"] for row in rows] == [256, 512, 768]
    assert all(row["validation"] is not None for row in rows)
    validation = split_by_time([read_bars(data)]).validation
    assert evaluate_bars(policy, validation).mean_return == rows[-1]["validation"]
    assert evaluate_bars(best, validation).mean_return == max(r["validation"] or 0 for r in rows)
    assert said["best"]["steps"] == best.trained_steps

    assert (out / "learning_curve.png").read_bytes().startswith(PNG)
    events = EventAccumulator(str(out))
    events.Reload()
    assert [e.step for e in events.Scalars("train/entropy")] == [256, 512, 768]
    assert {f"train/{c}" for c in COLUMNS[1:-1]} <= set(events.Tags()["scalars"])
    assert read_config(out / "config.toml") == tomllib.loads(config_toml(FAST))


def test_validation_and_its_absence_give_the_same_weights(tmp_path: Path) -> None:
    found = []
    for every in (0, 256):
        folder = tmp_path / str(every)
        folder.mkdir()
        _, out = trained(folder, "--validate-every", every)
        found.append((out / "policy.safetensors").read_bytes())
        assert (out / "best.safetensors").exists() == bool(every)
    assert found[0] == found[1]


def test_the_configuration_of_a_run_repeats_it(tmp_path: Path) -> None:
    data, out = trained(tmp_path)
    again = tmp_path / "again"
    call("train", "--data", data, "--config", out / "config.toml", "--steps", 768, "--out", again)
    name = "policy.safetensors"
    assert (out / name).read_bytes() == (again / name).read_bytes()


def test_the_best_policy_is_the_newest_of_the_best(tmp_path: Path, monkeypatch: Any) -> None:
    scores = iter([1.0, 3.0, 3.0, 2.0])
    monkeypatch.setattr("rlv3.runs.validation_of", lambda *_, **__: lambda _: next(scores))
    manager = RLv3Manager(FAST)
    run = Run(tmp_path, manager, total=1_024, every=256, inputs={}, env_id="CartPole-v1")
    with run:

        def record(done: int, update: Update) -> None:
            run.update(done, update)

        run.finish(manager.train(steps=1_024, env_id="CartPole-v1", on_update=record))
    assert Policy.load(tmp_path / "best.safetensors").trained_steps == 768
    assert run.best is not None
    assert run.best["steps"] == 768


def test_a_run_that_is_interrupted_says_how_to_finish_it(tmp_path: Path, capsys: Any) -> None:
    manager = RLv3Manager(FAST)
    run = Run(tmp_path, manager, total=768, every=0, inputs={}, env_id="CartPole-v1")

    def train(after: int) -> None:
        with run.recorded() as on_update:

            def stop(done: int, update: Update) -> None:
                if done > after:
                    raise KeyboardInterrupt
                on_update(done, update)

            manager.train(steps=768, env_id="CartPole-v1", on_update=stop)

    with pytest.raises(KeyboardInterrupt):
        train(after=0)  # before anything was kept
    assert "interrupted" not in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        train(after=256)
    said = capsys.readouterr().err
    assert f"interrupted: rlv3 train --resume {tmp_path} finishes it" in said
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "interrupted"
    assert read_checkpoint(tmp_path / "checkpoint.safetensors").state["steps"] == 256


def test_metrics_are_read_up_to_a_step_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    assert read_metrics(path) == []
    line = ",".join(["256"] + ["1.5"] * (len(COLUMNS) - 3) + ["", "2"])
    path.write_text(",".join(COLUMNS) + f"\n{line}\n512{line[3:]}\n")
    rows = read_metrics(path, upto=300)
    assert [row["steps"] for row in rows] == [256.0]
    assert rows[0]["validation"] is None
    path.write_text("steps\n1\n")
    with pytest.raises(DataError, match="expected columns steps, episodes"):
        read_metrics(path)


def test_progress_in_a_log_says_speed_and_time_left(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("rlv3.runs._SAID_EVERY_S", 0.0)
    manager = RLv3Manager(FAST)
    with progress(512) as show:
        manager.train(steps=512, env_id="CartPole-v1", on_update=show)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("training 256 of 512 steps, ")
    assert "steps/s" in lines[0]
    assert lines[1].endswith(", 0 s left")


def test_several_policies_give_an_interquartile_mean(tmp_path: Path) -> None:
    for seed in range(3):
        manager = RLv3Manager(replace(FAST, seed=seed))
        manager.save(tmp_path / f"seed-{seed}" / "policy.safetensors")
    options = ("evaluate", "--policy", tmp_path, "--env", "CartPole-v1", "--episodes", 3)
    found = json.loads(call(*options, "--json").stdout)
    means = [one["mean_return"] for one in found["policies"]]
    assert len(means) == 3
    assert found["interquartile_mean"] == pytest.approx(sum(means) / 3)
    assert min(means) <= found["interval"][0] <= found["interval"][1] <= max(means)
    assert "interquartile mean of 3" in call(*options).stdout


@pytest.mark.parametrize(("name", "start"), [("e.png", PNG), ("e.svg", b"<?xml")])
def test_equity_plots(tmp_path: Path, name: str, start: bytes) -> None:
    path = tmp_path / name
    call("evaluate", "--market", "momentum", "--episodes", 2, "--plot", path, "--random-runs", 1)
    assert path.read_bytes().startswith(start)


def test_a_plot_of_another_kind_is_refused_before_the_work(tmp_path: Path) -> None:
    sentence = refused("evaluate", "--market", "momentum", "--plot", tmp_path / "e.gif")
    assert sentence == "expected a plot file ending in .png or .svg, found e.gif"


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_ship_and_are_named_in_the_help(name: str) -> None:
    config = RLv3Config(**read_config(Path(name)))
    assert config.buffer_size % config.batch_size == 0
    train = get_command(app).commands["train"]  # type: ignore[attr-defined]
    (option,) = (p for p in train.params if p.name == "config")
    assert name in option.help
    guide = Path(__file__).parents[2] / "docs" / "training.md"
    assert f"| `{name}` |" in guide.read_text("utf-8")


def test_an_unknown_recipe_is_refused() -> None:
    with pytest.raises(ConfigError, match="config file cartpole-zo cannot be read"):
        read_config(Path("cartpole-zo"))


def test_the_seeds_recipe_is_the_default() -> None:
    assert RLv3Config(**read_config(Path("seed"))) == RLv3Config()


def test_a_folder_without_a_policy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"expected policy\.safetensors in"):
        call("evaluate", "--policy", tmp_path)
