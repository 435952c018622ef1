"""Names of streams and keys under a prefix. The only place that spells them.

Our own streams alone are named in `shadow.records`: the fold beneath writes them.
"""

from __future__ import annotations

from typing import NamedTuple

from shadow.records import COMPARISONS, DECISIONS, REPLAY

INPUTS: tuple[str, ...] = (
    "market.tick",
    "signal.generated",
    "ai.signal_generated",
    "rl_v2.decision",
    "market.klines",
    "trade.closed",
    "position.closed",
)
"""Default input streams in rank order: entries with equal ids are folded in this order."""

OPTIONAL_INPUTS: tuple[str, ...] = (
    "ai.decision.made",
    "trade.intent",
    "sizing.decided",
    "strategy.selected",
    "exchange.normalized",
    "rl.decision",
    "custom",
)
"""More streams that `--inputs` may add; their rank follows the default ones."""

ALL_INPUTS = (*INPUTS, *OPTIONAL_INPUTS)
"""Every input of the trading system, in rank order."""

READABLE = (*ALL_INPUTS, REPLAY)
"""Everything that a worker may read, in rank order."""

OTHERS: tuple[str, ...] = (
    *ALL_INPUTS,
    "account.balance",
    "ai.signal.generated",
    "apply.plan",
    "apply.plan.manual",
    "apply.result",
    "exchange.raw",
    "execution.result",
    "exit.intent",
    "harvest.intent",
    "market.regime.changed",
    "market.regime_changed",
    "marketstate",
    "meta.regime",
    "portfolio.state",
    "position.snapshot",
    "regime.changed",
    "rl.reward_received",
    "rl.strategy_selected",
    "rl_v3.training.completed",
    "rl_v3.training.started",
    "shadow.intent",
    "trade.executed",
    "trade.execution.res",
)
"""Every stream of the trading system: none of them is ours to append to."""

OTHERS_KEYS: tuple[str, ...] = (
    "governor:state",
    "kill",
    "market:BTCUSDT:bybit",
    "marketstate:BTCUSDT",
    "mode",
    "position:BTCUSDT",
    "rl:policy:BTCUSDT",
    "svc:ai_engine:heartbeat",
    "ticker:BTCUSDT",
)
"""Keys of the trading system that are no streams, one of each kind, without the prefix."""


class Keys(NamedTuple):
    """All key names of one installation."""

    prefix: str = "quantum"

    def stream(self, event_type: str) -> str:
        """Key of an EventBus v2 stream."""
        return f"{self.prefix}:stream:{event_type}"

    def dlq(self, event_type: str) -> str:
        """Key of our dead letters about an input stream."""
        return f"{self.prefix}:dlq:{event_type}"

    def other(self, name: str) -> str:
        """A key of the trading system, as `OTHERS_KEYS` names it."""
        return f"{self.prefix}:{name}"

    @property
    def decisions(self) -> str:
        """Our decision stream."""
        return self.stream(DECISIONS)

    @property
    def comparisons(self) -> str:
        """Our comparison stream."""
        return self.stream(COMPARISONS)

    @property
    def replay(self) -> str:
        """Stream of the entries that `dlq replay` sent in again."""
        return self.stream(REPLAY)

    @property
    def own(self) -> str:
        """Prefix of everything else that is ours."""
        return f"{self.prefix}:rl_v3_shadow:"

    @property
    def meta(self) -> str:
        """Hash: epoch, cursors, counters, policy digest in force."""
        return self.own + "meta"

    @property
    def symbols(self) -> str:
        """Set of symbols that have a state hash."""
        return self.own + "symbols"

    def state(self, symbol: str) -> str:
        """Hash of a symbol's state cells; "" is the pipeline's own state."""
        return self.own + "state:" + symbol

    def artifact(self, digest: str) -> str:
        """Bytes of a policy artifact."""
        return self.own + "artifact:" + digest

    @property
    def collected(self) -> str:
        """Hash: stream key -> id up to which the collector's store is durable."""
        return self.own + "collected"

    @property
    def verdict(self) -> str:
        """JSON of the collector's newest statistics; see `shadow.evaluation.streaming.State`."""
        return self.own + "verdict"

    @property
    def status(self) -> str:
        """Hash: what the worker shows of itself (`at_ms`, `body`), for the HTTP process."""
        return self.own + "status"

    @property
    def heartbeat(self) -> str:
        """Liveness key of production's convention."""
        return f"{self.prefix}:svc:rl_v3_shadow:heartbeat"
