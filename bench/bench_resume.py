"""Does a run that is killed and resumed end in the same weights as one that is left alone?

Starts `rlv3 train` as users do, kills it with SIGKILL at a random moment after its first
checkpoint, finishes it with `rlv3 train --resume`, and compares the sha256 of all weights with an
undisturbed run's. Exits 1 unless every trial agrees.

    python bench/bench_resume.py [--trials N] [--steps N] [--env GYM_ID]
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rlv3.cli import ARTIFACT, CHECKPOINT
from rlv3.policy import Policy

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
    parser.add_argument("--steps", type=int, default=40_960)
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
        agreed = 0
        for trial in range(arguments.trials):
            folder = Path(directory) / f"trial{trial}"
            process = start(*options, "--out", folder)
            while not (folder / CHECKPOINT).exists():
                time.sleep(0.01)
            time.sleep(dice.uniform(0.0, 0.8 * lasts))
            process.kill()
            killed = process.wait() != 0
            status = json.loads((folder / "run.json").read_text())["status"]
            if killed:
                code = start("--resume", folder).wait()
                assert code == 0 or status == "finished"
            same = weights(folder) == expected
            agreed += same
            print(f"trial {trial + 1}: killed {killed}, was {status}, same weights {same}")
    print(f"{agreed} of {arguments.trials} killed and resumed runs end in the undisturbed weights")
    sys.exit(agreed < arguments.trials)


if __name__ == "__main__":
    main()
