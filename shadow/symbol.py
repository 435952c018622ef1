"""The state of one symbol: everything its next decision or pairing depends on, and its bytes.

State is kept in named cells, so that a commit writes only what changed:
  open    changes with every tick: open bar, drawdowns, ring counters, open v2 decisions
  arms    changes with orders, fills and bars: accounts, targets, the standing decision
  closed  changes when a bar closes: windows and indicators, RL v2's own memory
  guard   changes with prices, where there are risk limits: v3 as it would have traded
  d0…d63  the last ticks, to recognise duplicates
  m0…m63, a0…a63   candidates of the pairing
Each cell is one version byte, a CRC-32 and msgpack.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from typing import Any

import msgpack
import msgspec

from rlv3.features import MarketState
from rlv3.portfolio import Costs
from shadow.arms import Arm
from shadow.pairing import RING, Pairing
from shadow.records import ArmBar
from shadow.risk import RiskGuard
from shadow.rl_v2 import V2Reference

CELL_VERSION = 1
_pack = msgspec.msgpack.Encoder().encode  # the same bytes in half the time
_head = struct.Struct(">BI").pack
_TICK_CELLS = tuple(f"d{slot}" for slot in range(RING))


SeenTick = tuple[int, float, float | None]
"""Time, price and volume: what makes two ticks of a symbol the same one."""


class StateError(ValueError):
    """A state cell is damaged or of an unknown version: the symbol restarts cold and flat."""


def pack(values: Any) -> bytes:
    """Encode plain values as a cell."""
    body = _pack(values)
    return _head(CELL_VERSION, zlib.crc32(body)) + body


def unpack(cell: bytes) -> Any:
    """Decode a cell.

    Raises:
        StateError: unknown version, wrong checksum, or not msgpack.
    """
    if len(cell) < 5 or cell[0] != CELL_VERSION:
        raise StateError(f"expected a state cell of version {CELL_VERSION}, found {cell[:1]!r}")
    body = cell[5:]
    if zlib.crc32(body) != int.from_bytes(cell[1:5], "big"):
        raise StateError("expected a state cell with a matching checksum, found a damaged one")
    try:
        return msgpack.unpackb(body, strict_map_key=False)
    except (ValueError, msgpack.UnpackException) as error:
        raise StateError(f"expected msgpack in a state cell, found {error}") from error


class SymbolState:
    """Market, arms, pairing and RL v2's memory of one symbol."""

    __slots__ = (
        "_known", "_recent", "arms_dirty", "bus_regime", "closed_dirty", "dirty_ticks",
        "follow_signal", "gap", "guard", "guard_dirty", "last_confidence", "last_direction",
        "market", "marks", "n_recent", "now_us", "open_dirty", "owed", "pairing", "reference",
        "regime", "standing_id", "symbol", "v2", "v2_bus", "v2_digest", "v2_multiplier", "v3",
    )  # fmt: skip

    def __init__(
        self,
        symbol: str,
        step_seconds: int,
        initial_balance: float,
        costs: Costs,
        reference: V2Reference | None,
        guard: RiskGuard | None = None,
    ) -> None:
        self.symbol = symbol
        self.market = MarketState(step_seconds)
        self.v3 = Arm(initial_balance, costs)
        self.v2 = Arm(initial_balance, costs)
        self.follow_signal = Arm(initial_balance, costs)
        self.reference = reference
        self.guard = guard
        self.pairing = Pairing()
        self._recent: list[SeenTick | None] = [None] * RING
        self._known: set[SeenTick] = set()
        self.n_recent = 0
        self.now_us = -1  # newest event time of any of its events
        self.standing_id: str | None = None
        self.owed = False  # a stale tick closed a bar: its step is decided at the next fresh tick
        self.gap = False
        self.regime: str | None = None  # known before the open bar began
        self.bus_regime: str | None = None
        self.last_direction: int | None = None  # side of the last signal
        self.last_confidence = 0.0
        self.v2_bus = False  # the v2 arm follows the bus until the run ends
        self.v2_digest: str | None = None
        self.v2_multiplier: float | None = None
        self.marks = (0, 0, 0)  # what of `Pipeline.marks` was applied here
        self.open_dirty = self.arms_dirty = self.closed_dirty = self.guard_dirty = False
        self.dirty_ticks: dict[str, SeenTick] = {}

    def seen(self, tick: SeenTick) -> bool:
        """Return True when the same tick is among the last 64 folded ones."""
        return tick in self._known

    def remember(self, tick: SeenTick) -> None:
        """Keep a folded tick for `seen`."""
        slot = self.n_recent % RING
        old = self._recent[slot]
        if old is not None:
            self._known.discard(old)
        self._recent[slot] = tick
        self._known.add(tick)
        self.dirty_ticks[_TICK_CELLS[slot]] = tick
        self.n_recent += 1

    def forget_market(self) -> None:
        """Make the indicators cold, after a hole in the prices; the open bar goes on."""
        market = self.market
        market.load(market.dump_open(), MarketState(market.bar_us // 1_000_000).dump_closed())
        self.regime = None
        self.closed_dirty = True

    def arms(self) -> tuple[Arm, Arm, Arm]:
        """Return the arms that trade, in the order of `records.ARMS`."""
        return self.v3, self.v2, self.follow_signal

    def bars(self) -> dict[str, ArmBar]:
        """Close the bar of every arm; the flat arm holds its capital by definition."""
        self.arms_dirty = True
        initial = self.v3.account.initial
        return {
            "v3": self.v3.bar(),
            "v2": self.v2.bar(),
            "follow_signal": self.follow_signal.bar(),
            "flat": ArmBar(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, initial, False),
        }

    # -- bytes -----------------------------------------------------------------------------------

    def take_cells(self) -> dict[str, bytes]:
        """Return the cells that changed since the last call."""
        cells: dict[str, bytes] = {}
        if self.open_dirty:
            ticks = self.v3.dump_tick(), self.v2.dump_tick(), self.follow_signal.dump_tick()
            cells["open"] = pack(
                (
                    self.market.dump_open(), ticks, self.pairing.dump(), self.n_recent,
                    self.now_us, self.owed, self.gap, self.marks,
                )
            )  # fmt: skip
        if self.arms_dirty:
            cells["arms"] = pack(
                (
                    [arm.dump() for arm in self.arms()],
                    self.standing_id,
                    self.last_direction,
                    self.last_confidence,
                    self.v2_bus,
                    self.v2_digest,
                    self.v2_multiplier,
                    self.bus_regime,
                )
            )
        if self.closed_dirty:
            memory = None if self.reference is None else self.reference.dump()
            cells["closed"] = pack((self.market.dump_closed(), self.regime, memory))
        if self.guard is not None and self.guard_dirty:
            cells["guard"] = pack(self.guard.dump())
        candidates = self.pairing.dirty
        for name, tick in self.dirty_ticks.items():
            cells[name] = pack(tick)
        for name, candidate in candidates.items():
            cells[name] = pack(candidate)
        self.open_dirty = self.arms_dirty = self.closed_dirty = self.guard_dirty = False
        self.dirty_ticks.clear()
        candidates.clear()
        return cells

    def load(self, cells: Mapping[str, bytes]) -> None:
        """Restore the state from its cells.

        Raises:
            StateError: a cell is missing or damaged.
        """
        for name in ("open", "arms", "closed"):
            if name not in cells:
                raise StateError(f"expected cell {name} of symbol {self.symbol}, found none")
        slots = {name: unpack(cell) for name, cell in cells.items() if name[0] in "dma"
                 and name[1:].isdigit()}  # fmt: skip
        try:
            opened, ticks, pairing, self.n_recent, self.now_us, self.owed, self.gap, *later = (
                unpack(cells["open"])
            )
            if later:  # absent in states of before there were marks
                gaps, price_gaps, swaps = later[0]
                self.marks = gaps, price_gaps, swaps
            arms, *facts = unpack(cells["arms"])
            closed, self.regime, memory = unpack(cells["closed"])
            self.market.load(opened, closed)
            mark = self.market.close
            for arm, values, tick in zip(self.arms(), arms, ticks, strict=True):
                arm.load(values, tick, mark)
            (
                self.standing_id, self.last_direction, self.last_confidence, self.v2_bus,
                self.v2_digest, self.v2_multiplier, self.bus_regime,
            ) = facts  # fmt: skip
            if self.reference is not None and memory is not None:
                self.reference.load(memory)
            if self.guard is not None and "guard" in cells:  # absent where limits are new
                self.guard.load(unpack(cells["guard"]), mark)
            self.pairing.load(pairing, {k: v for k, v in slots.items() if k[0] in "ma"})
        except (ValueError, TypeError, IndexError) as error:
            raise StateError(f"state of symbol {self.symbol} does not fit: {error}") from error
        for name, value in slots.items():
            if name[0] == "d":
                self._recent[int(name[1:])] = (value[0], value[1], value[2])
        self._known = {tick for tick in self._recent if tick is not None}

    def mark_all_dirty(self) -> None:
        """Make the next `take_cells` return everything."""
        self.open_dirty = self.arms_dirty = self.closed_dirty = self.guard_dirty = True
        self.dirty_ticks.update(
            {_TICK_CELLS[i]: tick for i, tick in enumerate(self._recent) if tick is not None}
        )
        for prefix, ring in (("m", self.pairing.main), ("a", self.pairing.advisory)):
            self.pairing.dirty.update(
                {f"{prefix}{i}": c for i, c in enumerate(ring) if c is not None}
            )
