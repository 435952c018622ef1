"""The researcher's door: train, save, load, predict, as the seed documents them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch

from rlv3.agent import PPOAgent
from rlv3.config import RLv3Config
from rlv3.env import ENV_ID, PriceData, TradingEnvV3, as_bars, make_padded
from rlv3.errors import ConfigError, DataError
from rlv3.features import US, WARM_BARS, Normaliser, feature_matrix
from rlv3.market import DEFAULT_WORLD, Bars, simulate
from rlv3.policy import Policy, build_artifact, save_artifact, training_quantiles
from rlv3.snapshot import Snapshot, save_checkpoint
from rlv3.splits import DEFAULT_EMBARGO, DEFAULT_SPLIT, Split, split_by_time
from rlv3.trainer import PPOTrainer, Update
from rlv3.vector import replicate

DEFAULT_PATH = Path("runs/rl_v3/policy.safetensors")
DEFAULT_EPISODES = 100
SERIES_PER_WORLD = 8
SERIES_BARS = 6_000


class _Facts(NamedTuple):
    """What an artifact says about where its policy was trained."""

    normaliser: Normaliser
    quantiles: dict[str, list[float]]
    env: str
    markets: tuple[str, ...]
    data_sha256: str | None
    data_end: str | None


UNTRAINED = _Facts(Normaliser.identity(), {}, ENV_ID, (), None, None)


class RLv3Manager:
    """Owns a policy in training and its serving form; both networks belong to one `PPOAgent`.

    Attributes:
        config: hyperparameters.
        split: how historical series were cut by time: trained on, validation, test. None for
            synthetic worlds and other environments.
        steps: environment steps that the policy was trained for, earlier runs included.
    """

    def __init__(self, config: RLv3Config | None = None) -> None:
        self.config = config or RLv3Config()
        self.agent = PPOAgent(self.config)
        self.split: Split | None = None
        self.steps = 0
        self._facts = UNTRAINED
        self._fitted = False
        self._trainer: PPOTrainer | None = None
        self._policy: Policy | None = None

    def train(
        self,
        num_episodes: int | None = None,
        *,
        steps: int | None = None,
        price_data: PriceData | None = None,
        market: str | Sequence[str] | None = None,
        env_id: str | None = None,
        shares: Sequence[float] = DEFAULT_SPLIT,
        embargo: int = DEFAULT_EMBARGO,
        on_update: Callable[[int, Update], None] | None = None,
    ) -> dict[str, float]:
        """Train, and return what training measured.

        Where to train: at most one of `price_data` (the first share of every series), `market`
        (synthetic worlds by name) and `env_id` (a Gymnasium environment). With none of them a
        second call continues where the first one stopped; a first call uses the default world.

        Args:
            num_episodes: 100 unless `steps` is given. Updates are whole buffers, so some more
                episodes may run.
            steps: environment steps, rounded up to whole buffers.
            shares: of `price_data`: train, validation, test, or train and test; (1.0,) trains on
                all of it.
            embargo: bars between one part and the first decision of the next.
            on_update: called after every update with the steps of this call so far.
        Returns:
            avg_reward and final_reward (per episode, in reward units), episodes, steps,
            avg_policy_loss, avg_value_loss, steps_per_s, and the last update's policy_loss,
            value_loss, approx_kl, clip_fraction, explained_variance and entropy.
        Raises:
            ConfigError: two places to train at, or an unknown world or environment.
            DataError: prices that cannot be used.
        """
        if steps is None and num_episodes is None:
            num_episodes = DEFAULT_EPISODES
        trainer = self._trainer
        if trainer is None or not (price_data is None and market is None and env_id is None):
            trainer = self.prepare(
                price_data=price_data, market=market, env_id=env_id, shares=shares, embargo=embargo
            )
        return self._run(
            trainer, on_update, steps=steps, episodes=None if steps is not None else num_episodes
        )

    def prepare(
        self,
        *,
        price_data: PriceData | None = None,
        market: str | Sequence[str] | None = None,
        env_id: str | None = None,
        shares: Sequence[float] = DEFAULT_SPLIT,
        embargo: int = DEFAULT_EMBARGO,
    ) -> PPOTrainer:
        """Make ready what `train` trains with, so that it can be refused before anything else.

        Args and errors are those of `train`, which then needs no place.
        """
        if sum(place is not None for place in (price_data, market, env_id)) > 1:
            raise ConfigError("expected one of price_data, market and env_id, found several")
        parts = None if price_data is None else self._parts(price_data, shares, embargo)
        env = self._environment(parts, market, env_id)
        self._trainer = PPOTrainer(self.agent, env, stream=self.steps)
        return self._trainer

    def finish(self, on_update: Callable[[int, Update], None] | None = None) -> dict[str, float]:
        """Finish the call of `train` that a resumed checkpoint was written in.

        Args:
            on_update: called after every update with the steps of that call so far.
        Raises:
            ConfigError: nothing was resumed, or nothing is left to do.
        """
        trainer = self._trainer
        if trainer is None or self.reached:
            raise ConfigError("expected an interrupted run to finish, found none")
        return self._run(trainer, on_update)

    def _run(
        self,
        trainer: PPOTrainer,
        on_update: Callable[[int, Update], None] | None,
        *,
        steps: int | None = None,
        episodes: int | None = None,
    ) -> dict[str, float]:
        """Train towards a new goal, or the one that the trainer has."""
        steps_before, episodes_before = trainer.steps, len(trainer.episode_returns)
        known = self.steps
        if steps is None and episodes is None and trainer.goal is not None:
            known -= trainer.steps - trainer.goal.from_steps

        def count(done: int, update: Update) -> None:
            self._policy = None
            self.steps = known + done
            if on_update is not None:
                on_update(done, update)

        updates = trainer.train(steps=steps, episodes=episodes, on_update=count)
        returns = trainer.episode_returns[episodes_before:] or [trainer.running_return]
        return {
            "avg_reward": float(np.mean(returns)),
            "final_reward": returns[-1],
            "episodes": float(len(trainer.episode_returns) - episodes_before),
            "steps": float(trainer.steps - steps_before),
            "avg_policy_loss": float(np.mean([u.policy_loss for u in updates])),
            "avg_value_loss": float(np.mean([u.value_loss for u in updates])),
            **updates[-1]._asdict(),
            "steps_per_s": float(1.0 / np.mean([1.0 / u.steps_per_s for u in updates])),
        }

    def _environment(
        self,
        split: Split | None,
        market: str | Sequence[str] | None,
        env_id: str | None,
    ) -> Sequence[gym.Env[Any, Any]]:
        """Return `n_envs` environments to train in; note what the artifact will say of them."""
        self.split = split
        if env_id is not None:
            self._facts = UNTRAINED._replace(env=env_id, markets=(env_id,))
            return [make_padded(env_id) for _ in range(self.config.n_envs)]
        if split is not None:
            series = split.train
            self._check_length(series)
            end = max(int(bars.end_us[-1]) for bars in series)
            data_end = datetime.fromtimestamp(end / US, UTC).isoformat()
            names = tuple(bars.symbol for bars in series)
        else:
            worlds = market or DEFAULT_WORLD
            names = (worlds,) if isinstance(worlds, str) else tuple(worlds)
            series = self._worlds(names)
            data_end = None
        self._fit(series, names, data_end)
        env = TradingEnvV3(self.config, series, normaliser=self._facts.normaliser)
        return replicate(env, self.config.n_envs)

    def _parts(self, price_data: PriceData, shares: Sequence[float], embargo: int) -> Split:
        series = as_bars(price_data, self.config)
        if len(shares) == 1:
            return Split(series, [], [])
        return split_by_time(series, shares, embargo=embargo)

    def _check_length(self, series: Sequence[Bars]) -> None:
        """Refuse a training part that is shorter than one episode and its warm-up."""
        least = WARM_BARS + self.config.max_steps_per_episode + 1
        for bars in series:
            if len(bars.close) < least:
                raise DataError(
                    f"{bars.symbol}: expected at least {least:,} bars to train on, an episode of "
                    f"max_steps_per_episode = {self.config.max_steps_per_episode:,} and its "
                    f"warm-up, found {len(bars.close):,}"
                )

    def _worlds(self, names: Sequence[str]) -> list[Bars]:
        """Return the synthetic training series: several per world, seeded by the configuration."""
        seeds = np.random.SeedSequence([self.config.seed, 2]).spawn(len(names) * SERIES_PER_WORLD)
        bars = max(SERIES_BARS, self.config.max_steps_per_episode + 2 * WARM_BARS)
        return [
            simulate(name, bars, seed=seed, step_seconds=self.config.step_seconds)
            for name, seed in zip(list(names) * SERIES_PER_WORLD, seeds, strict=True)
        ]

    def _fit(self, series: list[Bars], names: tuple[str, ...], data_end: str | None) -> None:
        """Compute normaliser and quantiles on the training split; a loaded normaliser stays."""
        parts = [
            feature_matrix(bars.end_us, bars.close, bars.volume, bars.spread, bars.step_seconds)
            for bars in series
        ]
        raw = np.concatenate([rows for rows, _ in parts])
        missing = np.concatenate([masks for _, masks in parts])
        fitted = self._facts.normaliser if self._fitted else Normaliser.fit(raw, missing)
        self._fitted = True
        digest = hashlib.sha256("".join(bars.sha256() for bars in series).encode()).hexdigest()
        self._facts = _Facts(
            fitted, training_quantiles(raw, missing), ENV_ID, names, digest, data_end
        )

    @property
    def reached(self) -> bool:
        """Whether the last call of `train` has reached its goal."""
        trainer = self._trainer
        return trainer is None or trainer.goal is None or trainer.progress() >= 1.0

    @property
    def episode_returns(self) -> list[float]:
        """Undiscounted, unscaled return of every episode finished by the newest trainer."""
        return [] if self._trainer is None else self._trainer.episode_returns

    def artifact(self) -> bytes:
        """Return the policy as it is now, as the bytes of an artifact."""
        facts, config = self._facts, self.config
        training = {
            "steps": self.steps,
            "seed": config.seed,
            "reward": config.reward,
            "env": facts.env,
            "markets": list(facts.markets),
            "data_sha256": facts.data_sha256,
            "data_end": facts.data_end,
            "config": asdict(config),
        }
        return build_artifact(
            self.agent.tensors(),
            facts.normaliser,
            training=training,
            quantiles=facts.quantiles,
            mask_rule="design" if config.use_action_masks else "none",
            step_seconds=config.step_seconds,
            activation=config.activation,
        )

    @property
    def policy(self) -> Policy:
        """The serving form of the policy as it is now."""
        if self._policy is None:
            self._policy = Policy(self.artifact())
        return self._policy

    def save(self, path: str | Path | None = None) -> Path:
        """Write the artifact atomically; return where (`runs/rl_v3/policy.safetensors`)."""
        target = Path(path or DEFAULT_PATH)
        save_artifact(self.artifact(), target)
        return target

    def load(self, path: str | Path | None = None) -> None:
        """Take over an artifact's weights, normaliser and provenance; training continues from it.

        Raises:
            PolicyError: the artifact is missing, damaged or foreign.
        """
        policy = Policy.load(path or DEFAULT_PATH)
        training = policy.metadata["training"]
        self.config = replace(
            self.config,
            hidden_dim=policy.metadata["network"][1],
            activation=policy.activation,
            step_seconds=policy.step_seconds,
        )
        self.agent = PPOAgent(self.config, stream=policy.trained_steps)
        for name, network in (("policy", self.agent.policy), ("value", self.agent.value)):
            tensors = policy.network_tensors(name)
            network.network.load_state_dict(
                {key: torch.from_numpy(array.copy()) for key, array in tensors.items()}
            )
        self._facts = _Facts(
            policy.normaliser, policy.metadata["quantiles"], training.get("env", ENV_ID),
            tuple(training.get("markets", ())), training.get("data_sha256"),
            training.get("data_end"),
        )  # fmt: skip
        self._fitted = True
        self.steps = policy.trained_steps
        self._trainer = None
        self._policy = policy

    def save_checkpoint(self, path: str | Path, about: Mapping[str, Any] | None = None) -> None:
        """Write all that training depends on, so that `resume` goes on as if nothing happened.

        Args:
            about: plain values of the caller's to keep with it.
        Raises:
            ConfigError: nothing was trained yet, or prices are live.
        """
        if self._trainer is None:
            raise ConfigError("expected a call of train before a checkpoint, found none")
        facts = self._facts
        known = facts._asdict() | {
            "normaliser": [facts.normaliser.mean.tolist(), facts.normaliser.scale.tolist()]
        }
        save_checkpoint(
            self._trainer, path, {"steps": self.steps, "facts": known, "caller": dict(about or {})}
        )

    def resume(
        self,
        snapshot: Snapshot,
        *,
        price_data: PriceData | None = None,
        market: str | Sequence[str] | None = None,
        env_id: str | None = None,
        shares: Sequence[float] = DEFAULT_SPLIT,
        embargo: int = DEFAULT_EMBARGO,
    ) -> int:
        """Take over a checkpoint where its run was; `finish` or `train` go on from there.

        The places are those that the run was started with.

        Returns:
            Steps taken so far by the interrupted call of `train`.
        Raises:
            PolicyError: the checkpoint is damaged or does not fit.
            DataError: other prices than the run was started with.
        """
        self.config = snapshot.config
        self.agent = PPOAgent(self.config)
        about = snapshot.about
        facts = about["facts"]
        mean, scale = (np.array(column) for column in facts["normaliser"])
        self._facts, self._fitted = UNTRAINED._replace(normaliser=Normaliser(mean, scale)), True
        parts = None if price_data is None else self._parts(price_data, shares, embargo)
        env = self._environment(parts, market, env_id)
        if self._facts.data_sha256 != facts["data_sha256"]:
            raise DataError(
                f"{snapshot.origin}: expected training data with sha256 {facts['data_sha256']}, "
                f"found {self._facts.data_sha256}"
            )
        trainer = PPOTrainer(self.agent, env)
        snapshot.restore(trainer)
        self._trainer, self._policy, self.steps = trainer, None, about["steps"]
        return 0 if trainer.goal is None else trainer.steps - trainer.goal.from_steps

    def predict(self, obs_dict: Mapping[str, Any]) -> dict[str, Any]:
        """Decide for one observation dictionary, through the network that is served.

        Returns:
            See `Policy.predict`: action, action_name, confidence, value and more.
        """
        return self.policy.predict(obs_dict)
