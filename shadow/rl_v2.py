"""What would RL v2 decide? RL v2 itself, small: state, actions, Q-tables, rewards, learning.

Production's v2 is two tabular Q-learners that judge every signal. The meta agent picks one of 60
(strategy, model, weight) from 6 features, the sizing agent one of 40 (size multiplier, leverage)
from 5. Neither picks a side and neither can say "hold": `shadow.mapping` turns weight and
multiplier into a target exposure. Table keys and files are production's, so its tables load here.

Where production's wiring kept v2 from learning (inputs never supplied, one global slot for all
symbols, outcomes without profit, a close followed by a next state), this reference does what v2 was
meant to do: one memory per symbol, both agents decide before the trade, and a transition that ends
with the close of the position is terminal. Everything is pure: no clock, and exploration is drawn
from a text that the caller gives. `python -m shadow.rl_v2_train` makes the shipped tables.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import math
import operator
from collections import deque
from collections.abc import Sequence
from json.encoder import encode_basestring_ascii
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec

from rlv3.errors import PolicyError
from rlv3.events import Signal

# -- actions ---------------------------------------------------------------------------------------

STRATEGIES = ("dual_momentum", "mean_reversion", "momentum_flip")
MODELS = ("lstm", "gru", "transformer", "ensemble")
WEIGHTS = (0.5, 0.75, 1.0, 1.25, 1.5)
SIZE_MULTIPLIERS = (0.5, 0.75, 1.0, 1.5, 2.0)
LEVERAGES = (5, 10, 15, 20, 25, 30, 40, 50)


class MetaAction(NamedTuple):
    """What the meta agent chooses."""

    strategy: str
    model: str
    weight: float
    """Factor on the signal's confidence."""


class SizingAction(NamedTuple):
    """What the sizing agent chooses."""

    size_multiplier: float
    leverage: int


META_ACTIONS = tuple(MetaAction(*parts) for parts in itertools.product(STRATEGIES, MODELS, WEIGHTS))
SIZING_ACTIONS = tuple(
    SizingAction(*parts) for parts in itertools.product(SIZE_MULTIPLIERS, LEVERAGES)
)


def meta_index(strategy: str, model: str, weight: float) -> int:
    """Return the index of a meta action: 20 * strategy + 5 * model + weight."""
    return 20 * STRATEGIES.index(strategy) + 5 * MODELS.index(model) + WEIGHTS.index(weight)


def sizing_index(size_multiplier: float, leverage: int) -> int:
    """Return the index of a sizing action: 8 * multiplier + leverage."""
    return 8 * SIZE_MULTIPLIERS.index(size_multiplier) + LEVERAGES.index(leverage)


# -- state -----------------------------------------------------------------------------------------

PRICE_WINDOW = 30  # closes; production takes whatever history its caller passes
OUTCOME_WINDOW = 20
EQUITY_WINDOW = 30
DEFAULT_VOLATILITY = 0.02


class MetaState(NamedTuple):
    """The six features of the meta agent."""

    regime: str
    volatility: float
    market_pressure: float
    confidence: float
    previous_winrate: float
    account_health: float

    def key(self) -> str:
        """Return the table key: JSON with sorted keys, numbers rounded to 2 decimals.

        A small negative number gives `-0.0`, which is another key than `0.0`, as in production.
        """
        return (
            f'{{"account_health": {_two(self.account_health)}, '
            f'"confidence": {_two(self.confidence)}, '
            f'"market_pressure": {_two(self.market_pressure)}, '
            f'"previous_winrate": {_two(self.previous_winrate)}, '
            f'"regime": {encode_basestring_ascii(self.regime)}, '
            f'"volatility": {_two(self.volatility)}}}'
        )


class SizingState(NamedTuple):
    """The five features of the sizing agent."""

    signal_confidence: float
    portfolio_exposure: float
    recent_winrate: float
    volatility: float
    equity_curve_slope: float

    def key(self) -> str:
        """Return the table key, in the same format as the meta agent's."""
        return (
            f'{{"equity_curve_slope": {_two(self.equity_curve_slope)}, '
            f'"portfolio_exposure": {_two(self.portfolio_exposure)}, '
            f'"recent_winrate": {_two(self.recent_winrate)}, '
            f'"signal_confidence": {_two(self.signal_confidence)}, '
            f'"volatility": {_two(self.volatility)}}}'
        )


def _two(value: float) -> float:
    """Round as the keys do; a format string writes a float as JSON does."""
    return round(float(value), 2)


def action_key(action: MetaAction | SizingAction) -> str:
    """Return the key of an action within a state's row: JSON with sorted keys."""
    return json.dumps(action._asdict(), sort_keys=True)


def market_features(closes: Sequence[float]) -> tuple[str, float, float]:
    """Return regime, volatility and market pressure of a price history, oldest first.

    regime (10 prices or more, else UNKNOWN), from mean and population std of the returns:
      TREND           |mean| > 0.02 and std > 0.015
      RANGE           std < 0.01
      BREAKOUT        |mean| > 0.03
      MEAN_REVERSION  otherwise
    volatility = that std (4 prices or more, else 0.02)
    market pressure = tanh(20 * return over the last 4 steps) (6 prices or more, else 0)
    """
    n = len(closes)
    if n < 4:
        return "UNKNOWN", DEFAULT_VOLATILITY, 0.0
    returns = [(b - a) / a for a, b in itertools.pairwise(closes)]
    mean = sum(returns) / (n - 1)
    mean_square = sum(map(operator.mul, returns, returns)) / (n - 1)
    volatility = math.sqrt(max(mean_square - mean * mean, 0.0))
    pressure = math.tanh(20.0 * (closes[-1] - closes[-5]) / closes[-5]) if n >= 6 else 0.0
    return _regime(abs(mean), volatility) if n >= 10 else "UNKNOWN", volatility, pressure


def _regime(trend: float, volatility: float) -> str:
    if trend > 0.02 and volatility > 0.015:
        return "TREND"
    if volatility < 0.01:
        return "RANGE"
    return "BREAKOUT" if trend > 0.03 else "MEAN_REVERSION"


def winrate(outcomes: Sequence[int]) -> float:
    """Return the share of wins among the last outcomes (1 won, 0 lost); 0.5 for fewer than 3."""
    return sum(outcomes) / len(outcomes) if len(outcomes) >= 3 else 0.5


def account_health(equity: Sequence[float]) -> float:
    """Return 1.0, 0.8, 0.6 or 0.4 for a drawdown below 5, 10, 20 % or above; 0.7 for < 3 points.

    The drawdown is the last point's, from the highest one in the window.
    """
    if len(equity) < 3:
        return 0.7
    peak = max(equity)
    drawdown = (peak - equity[-1]) / peak
    if drawdown < 0.05:
        return 1.0
    if drawdown < 0.10:
        return 0.8
    return 0.6 if drawdown < 0.20 else 0.4


def equity_slope(equity: Sequence[float]) -> float:
    """Return the least-squares slope per point over the mean of the points; 0 for fewer than 5."""
    n = len(equity)
    if n < 5:
        return 0.0
    total = sum(equity)
    rise = sum(map(operator.mul, range(n), equity)) - (n - 1) / 2 * total
    return rise / (n * (n * n - 1) / 12) / max(total / n, 1.0)


# -- rewards ---------------------------------------------------------------------------------------

REWARD_WINDOW = 20
DAILY_RISK_FREE = 0.02 / 252


def meta_reward(
    pnl_pct: float,
    drawdown_pct: float,
    recent_pnl_pct: Sequence[float],
    regime: str,
    predicted_regime: str,
    confidence: float,
) -> float:
    """Reward the meta agent for a trade.

    pnl% - 0.5 * drawdown% + 0.2 * tanh((mean - 0.02/252) / std) + 0.15 * (1 or -0.5) * confidence

    Args:
        recent_pnl_pct: the last 20 profits, this one included; fewer than 3 or a std below 1e-6
            leave the Sharpe term out.
        regime: at the end of the trade; the last term is 1 where it is the predicted one.
    """
    sharpe = 0.0
    n = len(recent_pnl_pct)
    if n >= 3:
        mean = sum(recent_pnl_pct) / n
        std = math.sqrt(sum((p - mean) * (p - mean) for p in recent_pnl_pct) / n)
        if std >= 1e-6:
            sharpe = math.tanh((mean - DAILY_RISK_FREE) / std)
    alignment = (1.0 if regime == predicted_regime else -0.5) * confidence
    return pnl_pct - 0.5 * drawdown_pct + 0.2 * sharpe + 0.15 * alignment


def sizing_reward(pnl_pct: float, leverage: float, exposure: float, volatility: float) -> float:
    """Reward the sizing agent for a trade.

    pnl% - 0.4 * min(5, 0.3 * max(0, leverage - 5) + 2 * max(0, exposure - 0.5)) + 0.1 * v
    v = 0.5 for a volatility of 1 to 3 %, -0.2 below, -0.5 * min((volatility - 0.03)/0.03, 2) above
    """
    risk = min(0.3 * max(leverage - 5.0, 0.0) + 2.0 * max(exposure - 0.5, 0.0), 5.0)
    if volatility < 0.01:
        fit = -0.2
    elif volatility <= 0.03:
        fit = 0.5
    else:
        fit = -0.5 * min((volatility - 0.03) / 0.03, 2.0)
    return pnl_pct - 0.4 * risk + 0.1 * fit


# -- Q-learning ------------------------------------------------------------------------------------

ALPHA = 0.01
GAMMA = 0.99
EPSILON = 0.1
EPSILON_DECAY = 0.999
EPSILON_MIN = 0.01
REPLAYS = 4
MEMORY = 10_000


class Transition(NamedTuple):
    """One experience of an agent."""

    state: str
    """Table key of the state it decided in."""
    action: int
    reward: float
    next_state: str | None
    """Table key of its next state; None where the position closed (terminal)."""


class QTable:
    """The Q-values of one agent: state key -> action key -> value; what is absent counts as 0.

    Attributes:
        keys: action keys by index.
        epsilon: share of decisions that explore while the table learns.
    """

    __slots__ = ("_best", "epsilon", "keys", "q", "update_count")

    def __init__(
        self,
        keys: tuple[str, ...],
        q: dict[str, dict[str, float]] | None = None,
        epsilon: float = EPSILON,
        update_count: int = 0,
    ) -> None:
        self.keys = keys
        self.q = {} if q is None else q
        self.epsilon = epsilon
        self.update_count = update_count
        self._best: dict[str, int] = {}  # greedy action of the states asked for since they changed

    def greedy(self, state: str) -> int:
        """Return the index of the best action, the lowest on ties; an unseen state gives 0."""
        best = self._best.get(state)
        if best is None:
            row = self.q.get(state)
            if row is None:
                return 0
            values = [row.get(key, 0.0) for key in self.keys]
            best = self._best[state] = values.index(max(values))
        return best

    def choose(self, state: str, seed: str) -> int:
        """Return the greedy action or, with probability epsilon, any; `seed` decides which."""
        digest = hashlib.blake2b(seed.encode(), digest_size=16).digest()
        if int.from_bytes(digest[:8]) < self.epsilon * 2**64:
            return int.from_bytes(digest[8:]) % len(self.keys)
        return self.greedy(state)

    def best_known(self, state: str) -> float:
        """Return the highest value among the actions tried in a state, 0 where none was."""
        row = self.q.get(state)
        return max(row.values()) if row else 0.0

    def update(self, transition: Transition, *, alpha: float = ALPHA, gamma: float = GAMMA) -> None:
        """Learn from one transition.

        Q(s,a) += alpha * (r + gamma * best known Q(s') - Q(s,a)); terminal: no gamma term.
        """
        state, action, target, next_state = transition
        if next_state is not None:
            target += gamma * self.best_known(next_state)
        row = self.q.setdefault(state, {})
        key = self.keys[action]
        value = row.get(key, 0.0)
        row[key] = value + alpha * (target - value)
        self._best.pop(state, None)
        self.update_count += 1

    def content(self) -> dict[str, Any]:
        """Return the table as production's file holds it."""
        return {"q_table": self.q, "epsilon": self.epsilon, "update_count": self.update_count}


class QLearner:
    """Q-learning with experience replay on one table.

    Every new transition is learned once, and `replays` earlier ones again. Which ones follows from
    `seed` and the number of transitions so far, so the same experience gives the same table.
    """

    __slots__ = ("capacity", "decay", "memory", "n", "replays", "seed", "table")

    def __init__(
        self,
        table: QTable,
        *,
        seed: str,
        replays: int = REPLAYS,
        capacity: int = MEMORY,
        epsilon_decay: float = EPSILON_DECAY,
    ) -> None:
        self.table = table
        self.seed = seed
        self.replays = replays
        self.capacity = capacity
        self.decay = epsilon_decay
        self.memory: list[Transition] = []  # a ring once it is full
        self.n = 0  # transitions so far

    def learn(self, transition: Transition) -> None:
        """Learn from a new transition and from `replays` remembered ones."""
        self._update(transition)
        if len(self.memory) < self.capacity:
            self.memory.append(transition)
        else:
            self.memory[self.n % self.capacity] = transition
        self.n += 1
        for i in self.replayed():
            self._update(self.memory[i])

    def replayed(self) -> list[int]:
        """Return the places in memory that follow the newest transition."""
        size = 4 * self.replays
        digest = hashlib.blake2b(f"{self.seed}:{self.n}".encode(), digest_size=size).digest()
        draws = (int.from_bytes(digest[i : i + 4]) for i in range(0, size, 4))
        return [draw % len(self.memory) for draw in draws]

    def _update(self, transition: Transition) -> None:
        table = self.table
        table.update(transition)
        if table.epsilon > EPSILON_MIN:
            table.epsilon *= self.decay


# -- tables and their files ------------------------------------------------------------------------

META_FILE = "meta_strategy_q_table.json"
SIZING_FILE = "position_sizing_q_table.json"
SHIPPED = Path(__file__).parent / "data"
META_KEYS = tuple(map(action_key, META_ACTIONS))
SIZING_KEYS = tuple(map(action_key, SIZING_ACTIONS))


class _TableFile(msgspec.Struct):
    """Production's file format."""

    q_table: dict[str, dict[str, float]]
    epsilon: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
    update_count: Annotated[int, msgspec.Meta(ge=0)]


class QTables:
    """The tables of both agents, read once; frozen unless somebody learns on them.

    Attributes:
        digest: sha256 of both tables' content as loaded.
    """

    __slots__ = ("digest", "meta", "sizing")

    def __init__(self, meta: QTable, sizing: QTable) -> None:
        self.meta = meta
        self.sizing = sizing
        content = {"meta_strategy": meta.content(), "position_sizing": sizing.content()}
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        self.digest = hashlib.sha256(canonical.encode()).hexdigest()

    @classmethod
    def untrained(cls) -> QTables:
        """Return empty tables: always action 0, a weight of 0.5, so never a trade."""
        return cls(QTable(META_KEYS), QTable(SIZING_KEYS))

    @classmethod
    def load(cls, directory: str | Path | None = None) -> QTables:
        """Read both tables from a directory in production's format; None reads the shipped ones.

        Raises:
            PolicyError: a file is missing, unreadable or of another shape.
        """
        if directory is None:
            folder, suffix = SHIPPED, ".gz"
        else:
            folder, suffix = Path(directory), ""
        return cls(
            _read(folder / (META_FILE + suffix), META_KEYS, MetaState._fields),
            _read(folder / (SIZING_FILE + suffix), SIZING_KEYS, SizingState._fields),
        )

    def save(self, directory: str | Path, *, packed: bool = False) -> None:
        """Write both files; `packed` gives the gzip form in which tables are shipped."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        for name, table in ((META_FILE, self.meta), (SIZING_FILE, self.sizing)):
            body = (json.dumps(table.content(), sort_keys=True, indent=0) + "\n").encode()
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(body, 9, mtime=0))
            else:
                (folder / name).write_bytes(body)

    @property
    def trained(self) -> bool:
        """True when both tables have been updated."""
        return self.meta.update_count > 0 and self.sizing.update_count > 0

    def greedy_meta(self, state: str) -> MetaAction:
        """Return the meta agent's best action for a state key."""
        return META_ACTIONS[self.meta.greedy(state)]

    def greedy_sizing(self, state: str) -> SizingAction:
        """Return the sizing agent's best action for a state key."""
        return SIZING_ACTIONS[self.sizing.greedy(state)]


def _read(path: Path, keys: tuple[str, ...], features: tuple[str, ...]) -> QTable:
    """Read one file and refuse what was not made for these actions and features."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise PolicyError(
            f"expected an RL v2 Q-table at {path}, found none: {error.strerror}"
        ) from error
    try:
        body = gzip.decompress(raw) if path.suffix == ".gz" else raw
        file = msgspec.json.decode(body, type=_TableFile)
    except (msgspec.DecodeError, OSError, EOFError, RecursionError, UnicodeDecodeError) as error:
        raise PolicyError(
            f"{path}: expected JSON {{q_table: {{state: {{action: q}}}}, epsilon, update_count}}, "
            f"found: {error}"
        ) from error
    known = set(keys)
    for state, row in file.q_table.items():
        if _feature_names(state) != sorted(features):
            raise PolicyError(
                f"{path}: expected states of {', '.join(features)}, found {state[:120]!r}"
            )
        for action in row.keys() - known:
            raise PolicyError(f"{path}: expected actions like {keys[0]}, found {action[:120]!r}")
    return QTable(keys, file.q_table, file.epsilon, file.update_count)


def _feature_names(state: str) -> list[str]:
    """Return the sorted feature names in a state key, none where it is no key."""
    try:
        return sorted(msgspec.json.decode(state, type=dict[str, float | str]))
    except msgspec.DecodeError:
        return []


# -- one symbol ------------------------------------------------------------------------------------


class V2Choice(NamedTuple):
    """What both agents chose on one signal."""

    strategy: str
    model: str
    weight: float
    size_multiplier: float
    leverage: int
    meta_state: str
    """Table key of the meta agent's state."""
    sizing_state: str
    meta_action: int
    """Index among the 60."""
    sizing_action: int
    """Index among the 40."""
    regime: str
    """The regime in the meta agent's state: what it predicts to last."""
    volatility: float


class V2Reference:
    """RL v2's memory of one symbol: recent closes, equity and outcomes; and its decisions."""

    __slots__ = ("closes", "equity", "outcomes", "tables")

    def __init__(self, tables: QTables) -> None:
        self.tables = tables
        self.closes: deque[float] = deque(maxlen=PRICE_WINDOW)
        self.equity: deque[float] = deque(maxlen=EQUITY_WINDOW)
        self.outcomes: deque[int] = deque(maxlen=OUTCOME_WINDOW)

    def observe_close(self, close: float) -> None:
        """Fold the close of a bar."""
        self.closes.append(close)

    def observe_equity(self, equity: float) -> None:
        """Fold the account's equity at the close of a bar."""
        self.equity.append(equity)

    def record_outcome(self, win: bool) -> None:
        """Fold the outcome of a closed trade."""
        self.outcomes.append(int(win))

    def decide(self, signal: Signal, exposure: float, *, explore: str | None = None) -> V2Choice:
        """Choose how to use a signal.

        Args:
            signal: its confidence, and its regime where it names one, are features.
            exposure: of v2's own account, as a fraction of equity.
            explore: None is greedy; while learning, the text that seeds exploration, such as the
                decision's id.
        """
        closes = list(self.closes)
        detected, volatility, pressure = market_features(closes)
        regime = detected if signal.regime is None else signal.regime
        wins = winrate(self.outcomes)
        equity = list(self.equity)
        confidence = signal.confidence
        meta_state = MetaState(
            regime, volatility, pressure, confidence, wins, account_health(equity)
        ).key()
        sizing_state = SizingState(
            confidence, exposure, wins, volatility, equity_slope(equity)
        ).key()
        meta_table, sizing_table = self.tables.meta, self.tables.sizing
        if explore is None:
            i, k = meta_table.greedy(meta_state), sizing_table.greedy(sizing_state)
        else:
            i = meta_table.choose(meta_state, f"meta:{explore}")
            k = sizing_table.choose(sizing_state, f"sizing:{explore}")
        return V2Choice(
            *META_ACTIONS[i], *SIZING_ACTIONS[k], meta_state, sizing_state, i, k, regime, volatility
        )

    def dump(self) -> tuple[list[float], list[float], list[int]]:
        """Return the memory as plain values; the tables are not part of it."""
        return list(self.closes), list(self.equity), list(self.outcomes)

    def load(self, values: Any) -> None:
        """Restore a dump.

        Raises:
            ValueError: it is not three lists.
        """
        closes, equity, outcomes = values
        self.closes = deque(map(float, closes), PRICE_WINDOW)
        self.equity = deque(map(float, equity), EQUITY_WINDOW)
        self.outcomes = deque(map(int, outcomes), OUTCOME_WINDOW)
