"""How were RL v2's shipped Q-tables trained, and what do they do on markets they never saw?

RL v2 plays its own paper account over synthetic worlds: a signal says the sign of the 15-bar
return, both agents judge it at the next open, the account holds the target exposure until the next
signal. The order of things is the live one: close observed, signal judged, filled at that price.

An episode is the life of a position. Every decision that holds it is one transition, rewarded for
what the position did until the next decision, costs included. It is terminal when the position
closes there (flat, or the other side); otherwise the next state's best known value follows. A
decision to stay flat ends at once with reward 0, and the sizing agent, whose choice was not used,
learns nothing from it.

The win rate stands still while v2 is flat, so a greedy v2 that has lost several trades stops and
stays out for long. That is v2's state, not a defect of the tables.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer
from numpy.typing import NDArray
from rich.progress import track
from rich.table import Table

from rlv3.console import err, out, run
from rlv3.events import EntryRef, Signal
from rlv3.features import WARM_BARS
from rlv3.market import WORLDS, Bars, simulate
from rlv3.portfolio import Account
from shadow.history import SIGNAL_CONFIDENCE, SIGNAL_WINDOW
from shadow.mapping import BASE_FRACTION, v2_target
from shadow.rl_v2 import (
    EPSILON_MIN,
    META_FILE,
    REWARD_WINDOW,
    SHIPPED,
    SIZING_FILE,
    QLearner,
    QTable,
    QTables,
    Transition,
    V2Choice,
    V2Reference,
    market_features,
    meta_reward,
    sizing_reward,
)

SEED = 20_260_101
EPISODES = 2_400
EPISODE_BARS = 1_000
CURRICULUM = (
    "regime_switching", "regime_switching", "momentum",
    "regime_switching", "momentum", "random_walk",
)  # fmt: skip
"""Worlds in turn. Half are the default world; the random walk teaches when to stay out."""
EPSILON_START, EPSILON_DECAY = 0.3, 0.99997
"""Slower than production's, where exploration of all states is over after 2,300 updates."""
DECIMALS = 5  # of shipped Q-values
HALF_SPREAD = 1e-4  # where neither quotes nor trade sides are known
UNSEEN_SEED = 7
UNSEEN_SERIES = 20


# -- playing ---------------------------------------------------------------------------------------


def signal_directions(close: NDArray[np.float64]) -> list[int]:
    """Return the signal that is spoken at the open of each bar: +1, -1, or 0 for none.

    It is the sign of the return over the last 15 closed bars, spoken whenever it changes and after
    15 bars of silence, as `shadow.history` publishes it.
    """
    closes = close.tolist()
    spoken = [0] * len(closes)
    said = silent = 0
    for t in range(1, len(closes)):
        silent += 1
        if t <= SIGNAL_WINDOW:
            continue
        change = closes[t - 1] - closes[t - 1 - SIGNAL_WINDOW]
        sign = (change > 0.0) - (change < 0.0) or said
        if sign and (sign != said or silent >= SIGNAL_WINDOW):
            said, silent = sign, 0
            spoken[t] = sign
    return spoken


class Score(NamedTuple):
    """What v2 did with one series."""

    bars: int
    decisions: int
    known: int
    """Decisions in states that both tables know."""
    entries: int
    flat: int
    """Decisions to hold nothing."""
    profit: float
    """Net of costs, as a fraction of the initial balance."""


class Holding:
    """A decision in force that holds a position: where it began and how far the account fell."""

    __slots__ = ("choice", "drawdown", "equity", "peak", "size")

    def __init__(self, choice: V2Choice, size: float, equity: float) -> None:
        self.choice = choice
        self.size = size  # fraction of equity
        self.equity = self.peak = equity
        self.drawdown = 0.0

    def mark(self, equity: float) -> None:
        """Follow the account's equity."""
        self.peak = max(self.peak, equity)
        self.drawdown = max(self.drawdown, self.peak - equity)


class Pupils:
    """Both agents while they learn, and the profits that the meta agent's Sharpe term looks at."""

    def __init__(self, tables: QTables, seed: int) -> None:
        self.meta = QLearner(tables.meta, seed=f"meta:{seed}", epsilon_decay=EPSILON_DECAY)
        self.sizing = QLearner(tables.sizing, seed=f"sizing:{seed}", epsilon_decay=EPSILON_DECAY)
        self.recent: deque[float] = deque(maxlen=REWARD_WINDOW)

    def stayed_flat(self, choice: V2Choice) -> None:
        """Learn that nothing came of holding nothing."""
        self.meta.learn(Transition(choice.meta_state, choice.meta_action, 0.0, None))

    def held(
        self, holding: Holding, equity: float, regime: str, successor: V2Choice | None
    ) -> None:
        """Learn from a decision that was in force; no successor: the position closed.

        Profit and drawdown are in percent of the position's notional for the meta agent. The sizing
        agent sees the profit in percent of the base notional, so that the size it chose shows.
        """
        choice = holding.choice
        notional = holding.size * holding.equity
        pnl_pct = 100.0 * (equity - holding.equity) / notional
        drawdown_pct = 100.0 * holding.drawdown / notional
        self.recent.append(pnl_pct)
        reward = meta_reward(
            pnl_pct, drawdown_pct, self.recent, regime, choice.regime, SIGNAL_CONFIDENCE
        )
        following = None if successor is None else successor.meta_state
        self.meta.learn(Transition(choice.meta_state, choice.meta_action, reward, following))
        scaled = pnl_pct * holding.size / BASE_FRACTION
        reward = sizing_reward(scaled, choice.leverage, holding.size, choice.volatility)
        following = None if successor is None else successor.sizing_state
        self.sizing.learn(Transition(choice.sizing_state, choice.sizing_action, reward, following))


class Player:
    """V2's account on one series; greedy, or exploring and learning when there are pupils."""

    def __init__(self, tables: QTables, pupils: Pupils | None = None) -> None:
        self.reference = V2Reference(tables)
        self.account = Account()
        self.pupils = pupils
        self.holding: Holding | None = None
        self.target = 0.0
        self.choices: list[V2Choice] = []
        self.bars = 0
        self.entries = 0
        self.flat = 0

    def on_price(self, price: float) -> None:
        """Mark the account."""
        self.account.mark_to(price, HALF_SPREAD)
        if self.holding is not None:
            self.holding.mark(self.account.equity)

    def on_close(self, price: float) -> None:
        """Mark the account and observe the closed bar."""
        self.on_price(price)
        self.bars += 1
        self.reference.observe_close(price)
        self.reference.observe_equity(self.account.equity)

    def on_signal(self, signal: Signal, price: float, seed: str) -> None:
        """Judge a signal and trade to its target at the price."""
        account = self.account
        explore = None if self.pupils is None else seed
        choice = self.reference.decide(signal, abs(account.exposure), explore=explore)
        self.choices.append(choice)
        target = v2_target(
            signal.direction, signal.confidence, choice.weight, choice.size_multiplier
        ).target
        realised = account.realised
        closes = self.target != 0.0 and target * self.target <= 0.0
        equity = account.equity
        if closes:  # the exit's costs are the old position's, also where one trade turns it round
            exit_notional = abs(account.quantity) * price
            equity -= exit_notional * (account.costs.fee_rate + HALF_SPREAD)
        self._learn(choice, equity, flat=target == 0.0, closed=closes)
        if target == 0.0:
            self.flat += 1
            self.holding = None
        else:
            self.entries += closes or self.target == 0.0
            self.holding = Holding(choice, abs(target), equity)
        if target != self.target:
            account.rebalance(target, price, HALF_SPREAD)
            if self.holding is not None:
                self.holding.mark(account.equity)
        self.target = target
        if account.realised != realised:
            self.reference.record_outcome(account.realised > realised)

    def _learn(self, choice: V2Choice, equity: float, *, flat: bool, closed: bool) -> None:
        if self.pupils is None:
            return
        if self.holding is not None:
            regime, _, _ = market_features(list(self.reference.closes))
            successor = None if closed else choice
            self.pupils.held(self.holding, equity, regime, successor)
        if flat:
            self.pupils.stayed_flat(choice)

    def score(self) -> Score:
        """Return what it did."""
        tables = self.reference.tables
        known = sum(
            c.meta_state in tables.meta.q and c.sizing_state in tables.sizing.q
            for c in self.choices
        )
        profit = self.account.equity / self.account.initial - 1.0
        return Score(self.bars, len(self.choices), known, self.entries, self.flat, profit)


def play(bars: Bars, tables: QTables, *, pupils: Pupils | None = None, seed: str = "") -> Player:
    """Let v2 trade a series from a fresh account, with fills at the price of the signal.

    Args:
        pupils: None plays greedily and learns nothing.
        seed: of the exploration.
    """
    player = Player(tables, pupils)
    prices = zip(bars.end_us.tolist(), bars.open.tolist(), bars.close.tolist(), strict=True)
    spoken = signal_directions(bars.close)
    for t, (end_us, open_, close) in enumerate(prices):
        player.on_price(open_)
        if spoken[t] and t >= WARM_BARS:
            start_us = end_us - bars.step_seconds * 1_000_000
            ref = EntryRef("", "signal.generated", "", start_us // 1_000)
            signal = Signal(ref, bars.symbol, start_us, spoken[t], SIGNAL_CONFIDENCE)
            player.on_signal(signal, open_, f"{seed}:{t}")
        player.on_close(close)
    return player


# -- training --------------------------------------------------------------------------------------


def train(episodes: Iterable[int] = range(EPISODES), *, seed: int = SEED) -> QTables:
    """Train both tables from nothing; the same arguments give the same tables.

    Args:
        episodes: numbers of the episodes, which with `seed` fix their prices and exploration.
    """
    tables = QTables.untrained()
    tables.meta.epsilon = tables.sizing.epsilon = EPSILON_START
    pupils = Pupils(tables, seed)
    for episode in episodes:
        world = CURRICULUM[episode % len(CURRICULUM)]
        bars = simulate(world, EPISODE_BARS, seed=[seed, episode])
        play(bars, tables, pupils=pupils, seed=f"{seed}:{episode}")
    return QTables(_shortened(tables.meta), _shortened(tables.sizing))


def _shortened(table: QTable) -> QTable:
    """Return the table with rounded values, so that its file is small, and done exploring."""
    q = {
        state: {action: round(value, DECIMALS) for action, value in row.items()}
        for state, row in table.q.items()
    }
    return QTable(table.keys, q, EPSILON_MIN, table.update_count)


def unseen(world: str, tables: QTables, series: int = UNSEEN_SERIES) -> list[Score]:
    """Return what the tables do, greedy, on series of a world that training did not use."""
    return [
        play(simulate(world, EPISODE_BARS, seed=[UNSEEN_SEED, i]), tables).score()
        for i in range(series)
    ]


def _show(tables: QTables) -> None:
    table = Table(
        "world, unseen", "known states", "entries / 1,000 bars", "flat", "bp / 1,000 bars"
    )
    for world in WORLDS:
        scores = unseen(world, tables)
        bars, decisions, known, entries, flat = (
            sum(column) for column in list(zip(*scores, strict=True))[:5]
        )
        profits = np.array([score.profit for score in scores]) * 1e4
        error = profits.std(ddof=1) / len(profits) ** 0.5
        table.add_row(
            world, f"{known / decisions:.1%}", f"{1_000 * entries / bars:.1f}",
            f"{flat / decisions:.0%}", f"{profits.mean():+.1f} ± {error:.1f}",
        )  # fmt: skip
    out.print(table)


def command(
    out_dir: Annotated[
        Path, typer.Option("--out", help="Directory for the two gzipped tables.")
    ] = SHIPPED,
    episodes: Annotated[
        int, typer.Option(min=1, help="Series of 1,000 bars to learn from.")
    ] = EPISODES,
    seed: Annotated[int, typer.Option(help="Of prices, exploration and replay.")] = SEED,
) -> None:
    """Train RL v2's reference tables on synthetic markets; the same options give the same bytes."""
    tables = train(track(range(episodes), "RL v2's tables", console=err, transient=True), seed=seed)
    tables.save(out_dir, packed=True)
    for name in (META_FILE, SIZING_FILE):
        path = out_dir / f"{name}.gz"
        out.print(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path}", soft_wrap=True)
    out.print(f"digest {tables.digest}")
    _show(tables)


def main() -> None:
    """Run the command."""
    app = typer.Typer(add_completion=False)
    app.command()(command)
    run(app)


if __name__ == "__main__":
    main()
