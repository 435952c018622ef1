"""What the worker is measured against: consumers of the same ticks that write a decision for each.

`loop` has the shape of what production runs today: ten entries per XREADGROUP, torch for one
observation, one XADD and one XACK per entry. `faststream` is FastStream's Redis stream subscriber
with its publisher, and no inference at all.

    python bench/worker_peers.py loop|faststream URL
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import redis
import redis.asyncio

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.load import TICK
from worker.keys import Keys

OUTPUT = Keys().stream("peer.decision")
GROUP = "quantum:group:peer:market.tick"
COUNT = 10


async def loop(url: str) -> None:
    """Consume until killed, as today's subscriber does."""
    import torch

    from rlv3.features import build_feature_vector
    from rlv3.networks import PolicyNetwork, ValueNetwork

    policy, value = PolicyNetwork(), ValueNetwork()
    link = redis.asyncio.Redis.from_url(url)
    stream = Keys().stream(TICK)
    await link.xgroup_create(stream, GROUP, "0", mkstream=True)
    while True:
        found = await link.xreadgroup(GROUP, "peer", {stream: ">"}, count=COUNT, block=1_000)
        for _, entries in found or ():
            for entry_id, fields in entries:
                tick = json.loads(fields[b"payload"])
                obs = build_feature_vector({"price": tick["price"], "volume": tick["volume"]})
                with torch.no_grad():
                    row = torch.from_numpy(obs)[None]
                    probs = torch.softmax(policy(row), dim=-1)[0]
                    worth = float(value(row))
                action = int(probs.argmax())
                await link.xadd(OUTPUT, _decision(tick, action, float(probs[action]), worth))
                await link.xack(stream, GROUP, entry_id)


def _decision(tick: dict[str, Any], action: int, confidence: float, value: float) -> Any:
    payload = {
        "symbol": tick["symbol"], "timestamp": tick["timestamp"], "action": action,
        "confidence": confidence, "value": value, "source": "RL_V3_PPO", "shadow_mode": True,
        "trace_id": "", "raw_obs": {"price": tick["price"]},
    }  # fmt: skip
    return {"event_type": "peer.decision", "payload": json.dumps(payload), "source": "peer"}


async def faststream(url: str) -> None:
    """Consume until killed through FastStream."""
    from faststream import FastStream
    from faststream.redis import RedisBroker, StreamSub

    key = Keys().stream(TICK)
    async with redis.asyncio.Redis.from_url(url) as link:
        await link.xgroup_create(key, GROUP, "0", mkstream=True)  # it would begin at the end
    broker = RedisBroker(url, logger=None)

    @broker.subscriber(stream=StreamSub(key, group=GROUP, consumer="peer"))
    async def on_tick(body: dict[str, Any]) -> None:
        tick = json.loads(body["payload"])
        await broker.publish(_decision(tick, 0, 1.0, 0.0), stream=OUTPUT)

    await FastStream(broker, logger=None).run()


if __name__ == "__main__":
    asyncio.run({"loop": loop, "faststream": faststream}[sys.argv[1]](sys.argv[2]))
