"""From which size on does CUDA train faster than the processor? For `choose_device`.

Whole training, rollouts included, with 32 environments and 8,192 steps an update; processor (the
compiled update, a thread for each network) and CUDA take turns. Figures are medians over rounds.

    python bench/bench_device.py [--rounds N] [--sizes WIDTHxBATCH ...]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.bench_training import RECIPE, ours
from rlv3.agent import CUDA_PAYS_FLOP, minibatch_flop

SIZES = (
    "128x64", "128x512", "256x64", "256x512", "256x1024", "256x2048", "512x64", "512x256",
    "512x512", "512x2048", "1024x512",
)  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="hidden width x minibatch")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("expected a CUDA device that torch can use, found none")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for size in arguments.sizes:
        width, batch = map(int, size.split("x"))
        config = replace(
            RECIPE, hidden_dim=width, batch_size=batch, buffer_size=8_192, n_envs=32, n_epochs=4
        )
        runs = {device: ours(replace(config, device=device), 2) for device in ("cpu", "cuda")}
        rates: dict[str, list[float]] = {device: [] for device in runs}
        for run in runs.values():
            run(1)  # warm
        for _ in range(arguments.rounds):
            for device, run in runs.items():
                rates[device].append(config.buffer_size / run(1))
        cpu, cuda = (statistics.median(rates[device]) for device in ("cpu", "cuda"))
        flop = minibatch_flop(config)
        auto = "CUDA" if flop >= CUDA_PAYS_FLOP else "CPU"
        print(
            f"  width {width:5d}, minibatch {batch:5d}, {flop / 1e9:6.2f} GFLOP: CPU {cpu:8,.0f} "
            f"steps/s, CUDA {cuda:8,.0f}, {cuda / cpu:5.2f} times; auto takes {auto}"
        )


if __name__ == "__main__":
    main()
