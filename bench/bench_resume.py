"""Does a run that is killed and resumed end in the same weights as one that is left alone?

Starts `rlv3 train` as users do, kills it with SIGKILL at a random moment after its first
checkpoint, finishes it with `rlv3 train --resume`, and compares the sha256 of all weights with an
undisturbed run's. Exits 1 unless every trial agrees.

    python bench/bench_resume.py [--trials N] [--steps N] [--env GYM_ID]
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rlv3.cli import ARTIFACT, CHECKPOINT
from rlv3.policy import Policy
from rlv3.snapshot import read_checkpoint

RLV3 = [sys.executable, "-m", "rlv3.cli", "train"]


def weights(folder: Path) -> str:
    """Return the sha256 of all tensors of a run's policy."""
    return str(Policy.load(folder / ARTIFACT).metadata["tensors_sha256"])


def start(*arguments: object) -> subprocess.Popen[bytes]:
    """Start a training run."""
    command = [*RLV3, *(str(argument) for argument in arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def main() -> None:
    """Run the trials and print how many agreed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--steps", type=int, default=122_880)
    parser.add_argument("--env", default=None, help="a Gymnasium environment; else simulated bars")
    arguments = parser.parse_args()
    dice = random.Random(1)
    place = ["--env", arguments.env] if arguments.env else ["--market", "momentum"]
    options = [*place, "--steps", arguments.steps, "--validate-every", 0]
    with tempfile.TemporaryDirectory() as directory:
        alone = Path(directory) / "alone"
        process = start(*options, "--out", alone)
        while not (alone / CHECKPOINT).exists():
            time.sleep(0.01)
        began = time.perf_counter()
        assert process.wait() == 0
        lasts = time.perf_counter() - began
        expected = weights(alone)
        agreed = trials = attempts = 0
        while trials < arguments.trials:
            attempts += 1
            folder = Path(directory) / f"attempt{attempts}"
            process = start(*options, "--out", folder)
            while not (folder / CHECKPOINT).exists():
                time.sleep(0.01)
            time.sleep(dice.uniform(0.0, 0.6 * lasts))
            process.kill()
            process.wait()
            if (folder / ARTIFACT).exists():
                continue  # it was faster: nothing was interrupted
            trials += 1
            steps = read_checkpoint(folder / CHECKPOINT).state["steps"]
            assert start("--resume", folder).wait() == 0
            same = weights(folder) == expected
            agreed += same
            print(f"trial {trials}: resumed at {steps:,} steps, same weights {same}", flush=True)
    print(f"{agreed} of {arguments.trials} killed and resumed runs end in the undisturbed weights")
    sys.exit(agreed < arguments.trials)


if __name__ == "__main__":
    main()
