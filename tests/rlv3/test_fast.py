"""The compiled update is the torch update: losses, weights, moments; one thread or two."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rlv3 import fast as fast_module
from rlv3 import trainer as trainer_module
from rlv3.agent import PPOAgent, choose_device
from rlv3.buffer import Rollout
from rlv3.config import RLv3Config
from rlv3.env import TradingEnvV3
from rlv3.errors import ConfigError
from rlv3.features import Normaliser
from rlv3.market import simulate
from rlv3.trainer import PPOTrainer
from rlv3.vector import replicate

CONFIG = RLv3Config(buffer_size=512, n_envs=4, n_epochs=4, max_steps_per_episode=100, seed=7)
BARS = simulate("regime_switching", 600, seed=1)


def make(config: RLv3Config) -> PPOTrainer:
    env = TradingEnvV3(config, BARS, normaliser=Normaliser.identity())
    return PPOTrainer(PPOAgent(config), replicate(env, config.n_envs))


def weights(trainer: PPOTrainer) -> bytes:
    agent = trainer.agent
    both = [*agent.policy.parameters(), *agent.value.parameters()]
    return b"".join(p.detach().numpy().tobytes() for p in both)


def rollout_of(config: RLv3Config) -> Rollout:
    """One that every path can learn from; every third observation is dense."""
    found = make(replace(config, backend="torch")).collect()
    found.obs[::3] += np.random.default_rng(1).normal(0.0, 0.5, found.obs[::3].shape)
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"batch_size": 100, "hidden_dim": 48},
        {"value_clip": 0.05, "max_grad_norm": 0.05},
        {"target_kl": 0.002, "learning_rate": 1e-3},
        {"use_action_masks": False, "entropy_coef": 0.1},
    ],
    ids=lambda changes: ", ".join(changes) or "recipe",
)
def test_both_updates_give_the_same_losses_and_weights(changes: dict[str, Any]) -> None:
    # over many steps only tanh is sure to agree, see test_every_step_of_the_seeds_recipe_agrees
    config = replace(CONFIG, activation="tanh", **changes)
    rollout = rollout_of(config)
    slow, fast = (make(replace(config, backend=backend)) for backend in ("torch", "numba"))
    for _ in range(2):  # the second continues from the moments of the first
        expected, found = slow.learn(rollout), fast.learn(rollout)
        assert found == pytest.approx(expected, abs=1e-5)
        for one, other in zip(
            [*slow.agent.policy.parameters(), *slow.agent.value.parameters()],
            [*fast.agent.policy.parameters(), *fast.agent.value.parameters()],
            strict=True,
        ):
            assert float((one - other).detach().abs().max()) < 1e-5
    for optimisers in (
        (slow.policy_optimiser, fast.policy_optimiser),
        (slow.value_optimiser, fast.value_optimiser),
    ):
        first, second = (list(optimiser.state.values()) for optimiser in optimisers)
        for one, other in zip(first, second, strict=True):
            assert float(one["step"]) == float(other["step"])
            assert float((one["exp_avg"] - other["exp_avg"]).abs().max()) < 1e-5
    if "target_kl" in changes:
        steps = float(next(iter(fast.policy_optimiser.state.values()))["step"])
        assert 0 < steps < 2 * 4 * 8  # it did stop


def halves(trainer: PPOTrainer) -> list[tuple[torch.nn.Module, torch.optim.Adam]]:
    agent = trainer.agent
    return [(agent.policy, trainer.policy_optimiser), (agent.value, trainer.value_optimiser)]


def take_over(source: PPOTrainer, target: PPOTrainer) -> None:
    """Copy weights and moments, in the target's precision."""
    for (network, adam), (copy, its_adam) in zip(halves(source), halves(target), strict=True):
        for parameter, its_parameter in zip(network.parameters(), copy.parameters(), strict=True):
            its_parameter.data.copy_(parameter.data)
            its_adam.state[its_parameter] = {
                name: value.to(value.dtype if name == "step" else its_parameter.dtype, copy=True)
                for name, value in adam.state[parameter].items()
            }


def distance(one: PPOTrainer, other: PPOTrainer) -> float:
    return max(
        float((p.detach().double() - q.detach().double()).abs().max())
        for (a, _), (b, _) in zip(halves(one), halves(other), strict=True)
        for p, q in zip(a.parameters(), b.parameters(), strict=True)
    )


def precise(rollout: Rollout) -> Rollout:
    return Rollout(*(a.astype(np.float64) if a.dtype == np.float32 else a for a in rollout))


def seeds_recipe(activation: str) -> tuple[PPOTrainer, PPOTrainer, Rollout]:
    """Return a compiled and a torch trainer after one update, and the rollout of the next."""
    config = RLv3Config(n_envs=4, activation=activation)
    slow, fast = (make(replace(config, backend=backend)) for backend in ("torch", "numba"))
    fast.learn(fast.collect())
    take_over(fast, slow)
    return fast, slow, fast.collect()


def test_every_step_of_the_seeds_recipe_agrees() -> None:
    fast, slow, rollout = seeds_recipe("relu")
    exact = make(replace(fast.config, backend="torch"))
    for network, _ in halves(exact):
        network.double()
    config = fast.config
    rng = np.random.default_rng(0)
    orders = np.stack([rng.permutation(config.buffer_size) for _ in range(config.n_epochs)])
    steps = orders.reshape(-1, config.batch_size)
    assert len(steps) == 320
    for rows in steps:
        take_over(slow, fast)
        take_over(slow, exact)
        minibatch = Rollout(*(column[rows] for column in rollout))
        order = np.arange(config.batch_size)[None]
        arguments = (order, config.learning_rate, config.clip_range)
        found = fast_module.learn(
            fast.agent, (fast.policy_optimiser, fast.value_optimiser), minibatch, order,
            learning_rate=config.learning_rate, clip_range=config.clip_range, threads=1,
        )  # fmt: skip
        exact._learn(precise(minibatch), *arguments)
        expected = slow._learn(minibatch, *arguments)
        assert found == pytest.approx(expected, abs=1e-5)
        # both are torch's step, one of them rounded: they part where a ReLU's input is 0 but for
        # rounding, and there either answer is right
        assert min(distance(fast, slow), distance(fast, exact)) < 1e-5


def test_a_whole_update_agrees_where_no_activation_has_an_edge() -> None:
    fast, slow, rollout = seeds_recipe("tanh")
    slow.rng.bit_generator.state = fast.rng.bit_generator.state
    assert fast.learn(rollout) == pytest.approx(slow.learn(rollout), abs=1e-5)
    assert distance(fast, slow) < 1e-5


def test_both_collect_the_same_rollout() -> None:
    slow, fast = (make(replace(CONFIG, backend=backend)) for backend in ("torch", "numba"))
    for one, other in zip(slow.collect(), fast.collect(), strict=True):
        assert other == pytest.approx(one, abs=1e-4)


def test_one_thread_and_two_give_the_same_weights() -> None:
    threads = torch.get_num_threads()
    found = []
    for n in (1, 2, 2):
        torch.set_num_threads(n)
        trainer = make(CONFIG)
        trainer.train(steps=3 * 512)
        found.append(weights(trainer))
    torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]


def test_schedules_fall_to_zero_over_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, learning_rate_schedule="linear", clip_range_schedule="linear")
    trainer = make(config)
    used = []
    learn = trainer.learn

    def spy(rollout: Rollout, *rates: float) -> trainer_module.Update:
        used.append(rates)
        return learn(rollout, *rates)

    monkeypatch.setattr(trainer, "learn", spy)
    trainer.train(steps=4 * 512)
    assert used == [pytest.approx((3e-4 * share, 0.2 * share)) for share in (1.0, 0.75, 0.5, 0.25)]


def test_without_numba_torch_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert trainer_module.use_numba(CONFIG, cpu)
    assert not trainer_module.use_numba(replace(CONFIG, backend="torch"), cpu)
    assert not trainer_module.use_numba(CONFIG, torch.device("cuda"))
    monkeypatch.setattr(trainer_module, "find_spec", lambda _: None)
    assert not trainer_module.use_numba(CONFIG, cpu)
    with pytest.raises(ConfigError, match="backend numba: expected numba, scipy"):
        trainer_module.use_numba(replace(CONFIG, backend="numba"), cpu)


def test_device_is_chosen_and_refused() -> None:
    if torch.cuda.is_available():
        config = replace(CONFIG, device="cuda")
        trainer = make(config)
        assert trainer.agent.device.type == "cuda"
        assert np.isfinite(trainer.train(steps=512)[0].policy_loss)
        return
    for device in ("auto", "cpu"):
        assert PPOAgent(replace(CONFIG, device=device)).device.type == "cpu"
    with pytest.raises(ConfigError, match="device cuda: expected a CUDA device"):
        PPOAgent(replace(CONFIG, device="cuda"))
    with pytest.raises(ConfigError, match="backend must be auto or torch"):
        replace(CONFIG, device="cuda", backend="numba")


def test_cuda_is_chosen_where_it_is_there_and_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(**changes: Any) -> str:
        return choose_device(replace(RLv3Config(), **changes)).type

    large = {"batch_size": 2_048, "hidden_dim": 256}  # 2 GFLOP a minibatch
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [chosen(), chosen(**large)] == ["cpu", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [chosen(), chosen(**large)] == ["cpu", "cuda"]  # the seed's recipe: 0.02 GFLOP
    assert chosen(batch_size=512, hidden_dim=256) == "cpu"  # 0.51
    assert chosen(device="cuda") == "cuda"
    assert chosen(device="cpu", **large) == "cpu"
