"""What does a policy experience? `TradingEnvV3`, the account on a bar series, step by step.

Rules of this module
  * A step is one bar. After bar t closed the policy sees feature row t and its own account, marked
    at the open of bar t+1; the action fills at that open; the account is then marked at the close
    of bar t+1 and at the open of bar t+2, where the next step begins. This is what the shadow
    worker does at latency 0.
  * Features come from `features.feature_matrix`, profit and loss from `portfolio.Account`; there is
    no second implementation of either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import ArrayLike, NDArray

from rlv3.config import RLv3Config
from rlv3.errors import ConfigError, DataError
from rlv3.events import ACTION_TABLE, Action
from rlv3.extras import require
from rlv3.features import (
    CLIP,
    N_FEATURES,
    OBS_DIM,
    UNKNOWN,
    WARM_BARS,
    MarketState,
    Normaliser,
    feature_matrix,
)
from rlv3.market import DEFAULT_WORLD, Bars, bars_from_closes, read_bars, simulate
from rlv3.portfolio import Account, Costs
from rlv3.reward import compute_reward, net_return, regime_alignment

if TYPE_CHECKING:
    from rlv3.render import Moment

RAW_LIMIT = 1e6
"""Raw observations (no normaliser) are clipped to this, so that the space is finite."""
N_ACTIONS = len(ACTION_TABLE)
ENV_ID = "rlv3/Trading-v3"
_REGIME_MISSING = 1 << 10
_TIME_MISSING = 1 << 17

PriceData = Bars | str | Path | ArrayLike | Mapping[str, Any] | Sequence[Bars]


class Feed(Protocol):
    """A source of live prices."""

    def get_price(self) -> float | None:
        """Return the price that ends the next step, waiting for it; None when there are no more."""


def observations(
    raw: NDArray[np.float64], missing: NDArray[np.int64], normaliser: Normaliser | None
) -> NDArray[np.float32]:
    """Return float32[T, 64] of raw feature rows: normalised, or raw within `RAW_LIMIT`."""
    if normaliser is not None:
        return normaliser.apply(raw, missing.tolist())
    obs = np.zeros((len(raw), OBS_DIM), dtype=np.float32)
    obs[:, :N_FEATURES] = np.clip(raw, -RAW_LIMIT, RAW_LIMIT)
    return obs


class Track:
    """A bar series ready to be stepped through; row t is what is known after bar t closed."""

    def __init__(self, bars: Bars, normaliser: Normaliser | None, half_spread: float) -> None:
        raw, missing = feature_matrix(
            bars.end_us, bars.close, bars.volume, bars.spread, bars.step_seconds
        )
        self.raw = raw
        self.obs = observations(raw, missing, normaliser)
        self.cold = missing & _REGIME_MISSING != 0
        self.open = bars.open.tolist()
        self.close = bars.close.tolist()
        quoted = missing >> 16 & 1 == 0
        after = np.where(quoted, raw[:, 16] / 2, half_spread)
        self.half_after = after.tolist()
        """Half-spread known once bar t is closed: of fills at the open of bar t+1."""
        at_close = np.concatenate([[half_spread], after[:-1]])
        if bars.spread is not None:
            at_close = np.where(np.isnan(bars.spread), at_close, bars.spread / 2)
        self.half_at_close = at_close.tolist()
        self.last = len(bars.close) - 2  # the last row with an open after it
        warm = np.flatnonzero(~self.cold)
        self.first = int(warm[0]) if len(warm) else len(bars.close)
        if self.first >= self.last:
            raise DataError(
                f"{bars.symbol}: expected at least {WARM_BARS + 2} bars without a long gap, "
                f"found {len(bars.close)} bars, warm from bar {self.first}"
            )

    def start(self, rng: np.random.Generator | None, steps: int) -> int:
        """Return a first row: the earliest warm one, or a random one that leaves `steps` steps."""
        if rng is None or self.last - steps <= self.first:
            return self.first
        t = int(rng.integers(self.first, self.last - steps + 1))
        while self.cold[t]:  # after a long gap
            t -= 1
        return t

    def advance(self, t: int) -> bool:
        """Return True when the step from row t can be taken."""
        return t < self.last

    def ended(self, t: int) -> bool:
        """Return True when no step can be taken from row t."""
        return t >= self.last


class LiveTrack:
    """A price feed in the shape of a track: every price is one bar's close and the next one's open.

    The time of day is not known, and there is no volume and no quote.
    """

    def __init__(
        self, feed: Feed, normaliser: Normaliser | None, half_spread: float, step_seconds: int
    ) -> None:
        self._feed = feed
        self._normaliser = normaliser
        self._half_spread = half_spread
        self._state = MarketState(step_seconds)
        self.raw: list[list[float]] = []
        self.obs: list[NDArray[np.float32]] = []
        self.cold: list[bool] = []
        self.open: list[float] = []
        self.close: list[float] = []
        self.half_after: list[float] = []
        self.half_at_close: list[float] = []

    def _take(self) -> bool:
        """Fold the next price; return False when there are no more."""
        price = self._feed.get_price()
        if price is None:
            return False
        price = float(price)
        if not (math.isfinite(price) and price > 0.0):
            raise DataError(f"market feed: expected a price > 0, found {price}")
        if not self.close:
            self.open.append(price)  # of the first bar
        self.open.append(price)
        self.close.append(price)
        self._state.append(price, None, len(self.close) * self._state.bar_us)
        raw = list(self._state.closed_raw)
        raw[17] = UNKNOWN[17]
        missing = np.array([self._state.closed_missing | _TIME_MISSING])
        self.raw.append(raw)
        self.obs.append(observations(np.array([raw]), missing, self._normaliser)[0])
        self.cold.append(not self._state.warm)
        self.half_after.append(self._half_spread)
        self.half_at_close.append(self._half_spread)
        return True

    def start(self, rng: np.random.Generator | None, steps: int) -> int:
        """Wait for the prices of the warm-up, on the first call; return the newest row."""
        del rng, steps  # a feed has no other place to start at
        while self._state.n_bars < WARM_BARS:
            if not self._take():
                raise DataError(
                    f"market feed: expected {WARM_BARS} prices to warm up, found {len(self.close)}"
                )
        return len(self.close) - 1

    def advance(self, t: int) -> bool:
        """Wait for the price that follows row t; return False when there are no more."""
        return t + 1 < len(self.close) or self._take()

    def ended(self, t: int) -> bool:
        """Return False: the end of a feed is known when it comes."""
        del t
        return False


class TradingEnvV3(gym.Env[NDArray[np.float32], np.int64]):
    """One paper account trading one symbol, one bar per step (Gymnasium API).

    | action | index | effect |
    |---|---|---|
    | HOLD | 0 | none |
    | LONG, SHORT | 1, 2 | if flat: open a position of 10 % of equity |
    | REDUCE | 3 | halve the position; below 10 of notional it closes |
    | CLOSE | 4 | close the position |
    | EMERGENCY_FLATTEN | 5 | close, and no new entry for 15 steps |

    An action that does not apply does nothing; `action_masks()` says which ones would.

    | observation | range with a normaliser | without |
    |---|---|---|
    | 0-5, 14-17 market | -5 to 5, scaled; 0 where missing | raw, `unknown` where missing |
    | 6-9 account: size, side, equity/balance, pnl ratio | raw | raw |
    | 10-13 regime, one-hot | 0, 1 | 0, 1 |
    | 18-63 | 0 | 0 |

    Reward: log return of equity over the step (`net_return`), or the seed's (`config.reward`).
    Terminated: the account is ruined. Truncated: `max_steps_per_episode`, or the data end.
    Info: equity, balance, unrealized_pnl, position_size, position_side, fees_paid, price,
    action_mask.

    Args:
        price_data: Bars, a CSV or Parquet path, an array of closes, a mapping or data frame with
            `close`, or several Bars, one of which is drawn at every reset; None simulates a new
            `market` at every reset.
        price_source: `synthetic`, or `live` with a `market_feed`.
        market_feed: an object with `get_price()`; implies `live`.
        normaliser: scales the market features; None observes raw features.
        market: name of the synthetic world.
        random_start: begin at a random row (drawn from `np_random`), else at the first warm one.
        render_mode: `rgb_array` keeps the episode, so that `render` can draw it.
    Raises:
        ConfigError: arguments that do not fit together.
        DataError: prices that cannot be used.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}  # noqa: RUF012 (Gymnasium's form)

    def __init__(
        self,
        config: RLv3Config | None = None,
        price_data: PriceData | None = None,
        price_source: str = "synthetic",
        market_feed: Feed | None = None,
        normaliser: Normaliser | None = None,
        *,
        market: str = DEFAULT_WORLD,
        random_start: bool = True,
        render_mode: str | None = None,
    ) -> None:
        self.config = config = config or RLv3Config()
        if render_mode not in (None, "rgb_array"):
            raise ConfigError(f"render_mode must be None or rgb_array, was {render_mode!r}")
        self.render_mode = render_mode
        self._moments: list[Moment] = []
        if price_source not in ("synthetic", "live"):
            raise ConfigError(f"price_source must be synthetic or live, was {price_source!r}")
        if price_source == "live" and not hasattr(market_feed, "get_price"):
            raise ConfigError(
                "price_source live needs a market_feed with get_price(), "
                f"found {type(market_feed).__name__}"
            )
        self._costs = Costs(fee_rate=config.fee_bps * 1e-4, on_opposite=config.on_opposite)
        self._half_spread = config.half_spread_bps * 1e-4
        self._normaliser = normaliser
        self._world = market
        self._random_start = random_start
        self._tracks: list[Track | LiveTrack] = []
        if market_feed is not None:
            live = LiveTrack(market_feed, normaliser, self._half_spread, config.step_seconds)
            self._tracks.append(live)
        elif price_data is not None:
            self._tracks += [self._track(bars) for bars in as_bars(price_data, config)]
        limit = RAW_LIMIT if normaliser is None else CLIP
        high = np.full(OBS_DIM, limit, dtype=np.float32)
        high[6:10] = RAW_LIMIT  # account features are left as they are
        self.observation_space = spaces.Box(-high, high, dtype=np.float32)
        self.action_space = spaces.Discrete(N_ACTIONS)
        self.spec = gym.spec(
            ENV_ID
        )  # also without gym.make, which the environment checker asks for
        self._account = Account(config.initial_balance, self._costs)
        self._track_now: Track | LiveTrack | None = None
        self._t = 0
        self._steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Begin an episode; `options` are not used."""
        super().reset(seed=seed, options=options)
        track = self._next_track()
        rng = self.np_random if self._random_start else None
        self._track_now = track
        self._t = track.start(rng, self.config.max_steps_per_episode)
        self._steps = 0
        self._account = Account(self.config.initial_balance, self._costs)
        self._account.mark_to(track.open[self._t + 1])
        self._moments = []
        self._remember()
        return self._observe(), self._info()

    def step(
        self, action: int | np.int64
    ) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Act at the open of the next bar, then wait until the open of the bar after it."""
        track, t, account = self._current(), self._t, self._account
        if not 0 <= action < N_ACTIONS:
            raise ValueError(f"action must be 0 to {N_ACTIONS - 1}, was {action}")
        if not track.advance(t):
            return self._observe(), 0.0, account.ruined, True, self._info()
        if (track.cold[t] or account.cooldown) and action in (Action.LONG, Action.SHORT):
            action = Action.HOLD
        equity_before = account.equity
        account.end_step()
        account.act(int(action), track.open[t + 1], track.half_after[t])
        account.mark_to(track.close[t + 1], track.half_at_close[t + 1])
        account.mark_to(track.open[t + 2], track.half_after[t + 1])
        self._t = t + 1
        self._steps += 1
        self._remember()
        reward = self._reward(equity_before)
        late = self._steps >= self.config.max_steps_per_episode
        truncated = late or track.ended(self._t)
        return self._observe(), reward, account.ruined, truncated, self._info()

    def render(self) -> NDArray[np.uint8] | None:
        """Return the episode so far as a picture, uint8[480, 640, 3]; None without a render mode.

        Price with entries and exits, position and equity.
        """
        if self.render_mode is None:
            gym.logger.warn('render() draws nothing without render_mode="rgb_array"')
            return None
        self._current()
        require("matplotlib", "train")
        from rlv3.render import episode_figure, rgb_array

        profit = self._account.equity - self._account.initial
        title = f"step {self._steps:,}, net profit {profit:+,.2f}"
        return rgb_array(episode_figure(self._moments, title))

    def _remember(self) -> None:
        """Keep the account as it is now, where an episode is to be drawn."""
        if self.render_mode is not None:
            from rlv3.render import Moment

            account = self._account
            self._moments.append(Moment(account.mark, account.exposure, account.equity))

    def action_masks(self) -> NDArray[np.bool_]:
        """Return bool[6]: which actions would do something now."""
        valid = self._account.valid_actions(
            cold=bool(self._current().cold[self._t]), use_masks=self.config.use_action_masks
        )
        return np.array(valid, dtype=np.bool_)

    @property
    def account(self) -> Account:
        """The episode's account, to read turnover, costs and drawdown from."""
        return self._account

    @property
    def row(self) -> int:
        """Index of the newest closed bar, the last one that the observation knows."""
        return self._t

    def _current(self) -> Track | LiveTrack:
        if self._track_now is None:
            raise gym.error.ResetNeeded("call reset() before the first step")
        return self._track_now

    def _track(self, bars: Bars) -> Track:
        return Track(bars, self._normaliser, self._half_spread)

    def _next_track(self) -> Track | LiveTrack:
        """Return the prices of the next episode, drawn from `np_random`."""
        if not self._tracks:
            n = WARM_BARS + self.config.max_steps_per_episode + 2
            seed = int(self.np_random.integers(2**63))
            step_seconds = self.config.step_seconds
            return self._track(simulate(self._world, n, seed=seed, step_seconds=step_seconds))
        if len(self._tracks) == 1:
            return self._tracks[0]
        return self._tracks[int(self.np_random.integers(len(self._tracks)))]

    def _reward(self, equity_before: float) -> float:
        account = self._account
        equity = account.equity
        if self.config.reward == "net_return":
            return net_return(equity, equity_before)
        raw = list(self._current().raw[self._t])
        return compute_reward(
            pnl_delta=equity / equity_before - 1.0,
            drawdown=account.drawdown,
            position_size=abs(account.exposure),
            regime_alignment=regime_alignment(account.side, raw),
            volatility=raw[3],
        )

    def _observe(self) -> NDArray[np.float32]:
        obs: NDArray[np.float32] = self._current().obs[self._t].copy()
        obs[6:10] = self._account.features()
        return obs

    def _info(self) -> dict[str, Any]:
        account = self._account
        return {
            "equity": account.equity,
            "balance": account.balance,
            "unrealized_pnl": account.unrealised,
            "position_size": abs(account.exposure),
            "position_side": account.side,
            "fees_paid": account.fees_paid,
            "price": account.mark,
            "action_mask": self.action_masks(),
        }


gym.register(ENV_ID, entry_point="rlv3.env:TradingEnvV3")


def as_bars(price_data: PriceData, config: RLv3Config) -> list[Bars]:
    """Return price data in any of the accepted forms as bar series.

    Raises:
        DataError: no usable prices, or bars of another length than the configuration's step.
    """
    series: list[Bars]
    if isinstance(price_data, Bars):
        series = [price_data]
    elif isinstance(price_data, str | Path):
        series = [read_bars(price_data)]
    elif isinstance(price_data, Sequence) and price_data and isinstance(price_data[0], Bars):
        series = [bars for bars in price_data if isinstance(bars, Bars)]
    else:
        series = [bars_from_closes(_closes(price_data), step_seconds=config.step_seconds)]
    for bars in series:
        if bars.step_seconds != config.step_seconds:
            raise DataError(
                f"expected bars of {config.step_seconds} s, the configured step, "
                f"found {bars.step_seconds} s for {bars.symbol}"
            )
    return series


def _closes(price_data: Any) -> ArrayLike:
    """Return the closes of a mapping or data frame, or the array itself."""
    if not (isinstance(price_data, Mapping) or hasattr(price_data, "columns")):
        return price_data
    if "close" not in price_data:
        raise DataError(f"expected prices with a close column, found {list(price_data)}")
    return price_data["close"]


class PaddedEnv(gym.Wrapper[NDArray[np.float32], np.int64, Any, Any]):
    """A Gymnasium environment in the shapes of the policy: 64 observations, six masked actions.

    Observations are padded with zeros; actions the environment does not have are masked.

    Raises:
        ConfigError: the environment has more than 64 observations or six actions, or other spaces.
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        shape, actions = env.observation_space.shape, env.action_space
        if not isinstance(env.observation_space, spaces.Box) or shape is None:
            raise ConfigError(f"expected a Box observation space, found {env.observation_space}")
        if math.prod(shape) > OBS_DIM:
            raise ConfigError(f"expected at most {OBS_DIM} observations, found {math.prod(shape)}")
        if not isinstance(actions, spaces.Discrete) or actions.n > N_ACTIONS or actions.start != 0:
            raise ConfigError(f"expected at most {N_ACTIONS} discrete actions, found {actions}")
        self._mask = np.arange(N_ACTIONS) < actions.n
        self.observation_space = spaces.Box(-np.inf, np.inf, (OBS_DIM,), dtype=np.float32)
        self.action_space = spaces.Discrete(N_ACTIONS)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Begin an episode."""
        obs, info = self.env.reset(seed=seed, options=options)
        return self._pad(obs), {**info, "action_mask": self._mask}

    def step(
        self, action: int | np.int64
    ) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Take one step."""
        obs, reward, terminated, truncated, info = self.env.step(np.int64(action))
        info = {**info, "action_mask": self._mask}
        return self._pad(obs), float(reward), terminated, truncated, info

    def _pad(self, obs: Any) -> NDArray[np.float32]:
        flat = np.asarray(obs, dtype=np.float32).ravel()
        return np.concatenate([flat, np.zeros(OBS_DIM - len(flat), dtype=np.float32)])


def make_padded(env_id: str, **options: Any) -> PaddedEnv:
    """Return a registered Gymnasium environment in the shapes of the policy.

    Args:
        options: of the environment.

    Raises:
        ConfigError: no such environment, a missing dependency, or shapes that do not fit.
    """
    try:
        env = gym.make(env_id, **options)
    except (gym.error.Error, ImportError) as error:
        raise ConfigError(f"environment {env_id} cannot be made: {error}") from error
    return PaddedEnv(env)
