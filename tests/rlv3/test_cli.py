"""The command line: what it leaves, what it prints, and one sentence for every mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from rlv3.cli import OBSERVATION, app, read_config
from rlv3.errors import ConfigError, UserError
from rlv3.market import simulate
from rlv3.policy import Policy, shipped_policy

CONFIG = """
buffer_size = 256
n_epochs = 2
batch_size = 64
max_steps_per_episode = 100
hidden_dim = 32
learning_rate = 0.001
gamma = 1
"""


@pytest.fixture(autouse=True)
def short_worlds(monkeypatch: pytest.MonkeyPatch) -> None:
    """One synthetic series a world instead of eight."""
    monkeypatch.setattr("rlv3.manager.SERIES_PER_WORLD", 1)
    monkeypatch.setattr("rlv3.manager.SERIES_BARS", 1_500)


def call(*arguments: object, stdin: str | None = None) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def refused(*arguments: object, stdin: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, stdin=stdin)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(CONFIG)
    return path


def write_bars(path: Path, n: int = 600, step_seconds: int = 60, seed: int = 1) -> Path:
    bars = simulate("regime_switching", n, seed=seed, step_seconds=step_seconds)
    columns = zip(bars.end_us.tolist(), bars.close.tolist(), strict=True)
    path.write_text("timestamp,close\n" + "".join(f"{t},{c!r}\n" for t, c in columns))
    return path


def test_train_leaves_an_artifact(tmp_path: Path, config: Path) -> None:
    result = call(
        "train", "--episodes", 2, "--config", config, "--seed", 4, "--out", tmp_path / "a"
    )
    policy = Policy.load(tmp_path / "a" / "policy.safetensors")
    training = policy.metadata["training"]
    assert training["seed"] == 4
    assert training["config"]["gamma"] == 1.0
    assert training["markets"] == ["regime_switching"]
    assert "avg_reward" in result.stdout
    assert policy.digest[:16] in result.stdout


def test_train_on_files_holds_the_rest_out(tmp_path: Path, config: Path) -> None:
    files = [write_bars(tmp_path / f"{name}_5m.csv", step_seconds=300, seed=i)
             for i, name in enumerate(("aaa", "bbb"))]  # fmt: skip
    result = call(
        "train", "--steps", 256, "--config", config, "--data", files[0], "--data", files[1],
        "--reward", "seed", "--out", tmp_path, "--split", "80,20",
    )  # fmt: skip
    policy = Policy.load(tmp_path / "policy.safetensors")
    assert policy.step_seconds == 300
    assert policy.metadata["training"]["markets"] == ["AAA", "BBB"]
    assert policy.metadata["training"]["reward"] == "seed"
    # 480 of 600 bars of five minutes from 2026-01-01T00:00Z on, then an embargo of 60 bars
    assert "--from 2026-01-02T21:00:00Z" in result.stdout
    judge = ("evaluate", "--policy", tmp_path, "--data", files[0], "--data", files[1])
    sentence = refused(*judge)
    assert "expected data after 2026-01-02T16:00:00+00:00" in sentence
    assert "--allow-overlap" in sentence
    call(*judge, "--allow-overlap", "--random-runs", 0)
    later = call(*judge, "--from", "2026-01-02T21:00:00Z", "--json", "--random-runs", 2)
    found = json.loads(later.stdout)
    assert found["episodes"] == 2
    assert found["training"]["reward"] == "seed"
    assert set(found["baselines"]) == {"flat", "buy_and_hold", "random"}
    assert found["sharpe_interval"][0] <= found["sharpe"] <= found["sharpe_interval"][1]


def test_resume_continues_in_place(tmp_path: Path, config: Path) -> None:
    first = tmp_path / "run"
    call("train", "--steps", 256, "--config", config, "--market", "momentum", "--out", first)
    call("train", "--steps", 256, "--config", config, "--market", "momentum", "--resume", first)
    assert Policy.load(first / "policy.safetensors").trained_steps == 512
    (first / "policy.safetensors").unlink()  # as if it had been interrupted
    sentence = refused("train", "--steps", 256, "--market", "momentum", "--resume", first)
    assert "expected a finished run to begin from, found an interrupted one" in sentence


def test_evaluate_prints_json() -> None:
    result = call("evaluate", "--episodes", 1, "--market", "momentum", "--json")
    found = json.loads(result.stdout)
    assert found["mean_return"] == found["returns"][0]
    assert set(found["action_mix"]) == {
        "HOLD", "LONG", "SHORT", "REDUCE", "CLOSE", "EMERGENCY_FLATTEN",
    }  # fmt: skip
    assert "mean return" in call("evaluate", "--episodes", 1).stdout


def test_train_and_evaluate_in_a_gymnasium_environment(tmp_path: Path, config: Path) -> None:
    call("train", "--env", "CartPole-v1", "--steps", 256, "--config", config, "--out", tmp_path)
    found = json.loads(
        call(
            "evaluate", "--policy", tmp_path / "policy.safetensors", "--env", "CartPole-v1",
            "--episodes", 2, "--json",
        ).stdout
    )  # fmt: skip
    assert len(found["returns"]) == 2
    assert found["mean_return"] >= 8.0
    here = call("evaluate", "--policy", tmp_path, "--episodes", 2, "--json")  # where it was trained
    assert json.loads(here.stdout)["returns"] == found["returns"]
    artifact = tmp_path / "policy.safetensors"
    message = f"{artifact}: expected --env CartPole-v1, where it was trained, found "
    assert refused("evaluate", "--policy", artifact, "--market", "momentum") == message + "prices"
    both = refused("evaluate", "--policy", shipped_policy(), "--policy", artifact)
    assert both == message + "policies of CartPole-v1, rlv3/Trading-v3"


def test_predict_from_file_and_stdin(tmp_path: Path) -> None:
    path = tmp_path / "obs.json"
    path.write_text(json.dumps(OBSERVATION))
    result = json.loads(call("predict", "--obs", path).stdout)
    assert result == Policy.load(shipped_policy()).predict(OBSERVATION)
    assert json.loads(call("predict", "--obs", "-", stdin='{"rsi": null}').stdout)["missing"]


def test_predict_needs_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys; sys.argv = ['rlv3', 'predict', '--obs', '-']\n"
        "from rlv3.cli import app\n"
        "app(standalone_mode=False)\n"
        "assert not {'torch', 'gymnasium'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], input="{}", capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["action"] in range(6)


def test_sandbox_tours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlv3.cli.SANDBOX_STEPS", 2_048)
    result = call("sandbox")
    for step in ("1. train", "2. save", "3. load", "4. predict", "5. evaluate"):
        assert step in result.stdout


def test_import_checkpoint(tmp_path: Path) -> None:
    from rlv3.networks import PolicyNetwork, ValueNetwork

    path, out = tmp_path / "ppo_model.pt", tmp_path / "policy.safetensors"
    states = {"policy_state_dict": PolicyNetwork().state_dict(),
              "value_state_dict": ValueNetwork().state_dict()}  # fmt: skip
    torch.save(states, path)
    assert "0 training steps" in call("import-checkpoint", path, "--out", out).stdout
    assert Policy.load(out).trained_steps == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--episodes", 1, "--steps", 1), "expected --episodes or --steps, found both"),
        (("train", "--market", "momentum", "--env", "CartPole-v1"), "expected one of --data"),
        (("train", "--steps", 1, "--market", "mars"), "market must be one of"),
        (("train", "--steps", 1, "--data", "none.csv"), "none.csv cannot be read"),
        (("train", "--steps", 1, "--env", "Pendulum-v1"), "expected at most 6 discrete actions"),
        (("train", "--steps", 1, "--env", "NoSuch-v0"), "environment NoSuch-v0 cannot be made: "),
        (("train", "--steps", 1, "--env", "no_such:Foo-v0"), "Foo-v0 cannot be made: No module"),
        (("train", "--steps", 1, "--config", "none.toml"), "none.toml cannot be read"),
        (("train", "--steps", 1, "--resume", "nowhere"), "nowhere/policy.safetensors cannot be"),
        (("evaluate", "--policy", "none.safetensors"), "none.safetensors cannot be read"),
        (("evaluate", "--market", "x", "--data", "y"), "expected one of --data"),
        (("predict", "--obs", "none.json"), "none.json cannot be read"),
        (("import-checkpoint", "none.pt", "--out", "x"), "none.pt cannot be read"),
    ],
)
def test_mistakes_are_one_sentence(arguments: tuple[Any, ...], message: str) -> None:
    assert message in refused(*arguments)


def test_observations_that_are_no_object() -> None:
    assert "expected a JSON object, found list" in refused("predict", "--obs", "-", stdin="[1]")
    assert "expected a JSON object, found" in refused("predict", "--obs", "-", stdin="{")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat = 0.1", "expected settings among .*; found learning_rat"),
        ("gamma = 'high'", "expected gamma to be float, found 'high'"),
        ("batch_size = 6.5", r"expected batch_size to be int, found 6\.5"),
        ("batch_size = true", "expected batch_size to be int, found True"),
        ("a = = 1", "expected TOML, found"),
    ],
)
def test_config_files_are_checked(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_config(path)


def test_values_out_of_range_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("gamma = 1.5")
    assert "gamma must be between 0.0 and 1.0, was 1.5" in refused(
        "train", "--steps", 1, "--config", path
    )


def test_program_exits_with_two_and_no_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rlv3.cli", "predict", "--obs", "-", "--policy", "none"],
        input="{}", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: policy file none cannot be read")
    assert "Traceback" not in done.stderr


def test_a_missing_extra_is_named_with_its_brackets(tmp_path: Path) -> None:
    program = (
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'matplotlib' else find(name, *rest)\n"
        "from rlv3.cli import main; main()\n"
    )
    plot = ("evaluate", "--market", "momentum", "--plot", str(tmp_path / "e.png"))
    done = subprocess.run(
        [sys.executable, "-c", program, *plot], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == (
        "error: expected matplotlib to be installed, found none: pip install 'rlv3-shadow[train]'\n"
    )


@pytest.mark.parametrize(
    "command", ["train", "evaluate", "predict", "sandbox", "import-checkpoint"]
)
def test_help_teaches(command: str) -> None:
    assert "Usage" in call(command, "--help").stdout
