"""The long form of the calibration, as the tables of docs/evaluation.md. `make calibrate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from typing import Annotated

import typer

from shadow.sequential import Plan
from tests.calibration.measures import (
    bound,
    equal_models_benchmark,
    false_verdicts,
    peeking_at_slices,
    planted_edge,
)
from tests.calibration.processes import PROCESSES

app = typer.Typer(add_completion=False)

FORTNIGHT = (400, Plan(horizon=200))
HALF_YEAR = (
    4_320,
    Plan(),
)  # hourly batches for 180 days, tightest after 30: the product's defaults
EDGES = (2.5, 3.6, 5.0, 7.0)
WORLDS = tuple(product((0.0, 0.3), (0.0, 0.7)))

Task = Callable[[], object]


def measurements(runs: int, seed: int) -> dict[str, list[Task]]:
    """Return what is measured, table by table."""
    return {
        "short": [partial(false_verdicts, name, 4 * runs, *FORTNIGHT, seed) for name in PROCESSES],
        "long": [partial(false_verdicts, name, runs, *HALF_YEAR, seed) for name in PROCESSES],
        "edge": [partial(planted_edge, z, runs, 200, Plan(horizon=100), seed) for z in EDGES],
        "peer": [
            partial(equal_models_benchmark, runs, seed, ar=ar, correlation=correlation)
            for ar, correlation in WORLDS
        ],
        "slices": [partial(peeking_at_slices, runs, seed)],
    }


@app.command()
def main(
    runs: Annotated[
        int, typer.Option(help="Simulated runs (four times as many in the first).")
    ] = 1_000,
    seed: int = 0,
    jobs: Annotated[int, typer.Option(help="Processes side by side.")] = 2,
) -> None:
    """Print how often verdicts are wrong and how often they are found, and fail if too often."""
    tasks = measurements(runs, seed)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        pending = {name: [pool.submit(task) for task in part] for name, part in tasks.items()}
        found = {name: [future.result() for future in part] for name, part in pending.items()}
    for line in report(found, runs):
        typer.echo(line)
    if wrong := failures(found, runs):
        for line in wrong:
            typer.echo(line, err=True)
        raise typer.Exit(4)


def report(found: dict[str, list], runs: int) -> Iterator[str]:
    """Yield the tables as Markdown."""
    for name, (batches, plan), count in (
        ("short", FORTNIGHT, 4 * runs),
        ("long", HALF_YEAR, runs),
    ):
        yield f"False verdicts, {count:,} runs, {batches:,} batches of 60 bars, N* {plan.horizon}"
        yield f"(5 % plus chance: {bound(0.05, count):.1%})"
        yield ""
        yield from table(
            ("process", "superior", "inferior", "either", "naive t", "batches too short",
             "strict: misses", "strict: width", "clipped"),
            [
                (process, *map(percent, e[:6]), f"{e.strict_width:.2f}",
                 percent(e.clipped))
                for process, e in zip(PROCESSES, found[name], strict=True)
            ],
        )  # fmt: skip
    yield f"Planted edge, {runs:,} runs, 200 batches, N* 100"
    yield ""
    yield from table(
        ("z at the horizon", "found", "median stop", "found by one look at the horizon"),
        [
            (f"{z}", percent(e.share), percent(e.stop), percent(e.fixed))
            for z, e in zip(EDGES, found["edge"], strict=True)
        ],
    )
    yield f"Two equal models, {runs:,} runs, 5,000 trades"
    yield ""
    yield from table(
        ("autocorrelation", "correlation", "any of three tests", "approved", "ours"),
        [
            (f"{ar}", f"{correlation}", *map(percent, gates))
            for (ar, correlation), gates in zip(WORLDS, found["peer"], strict=True)
        ],
    )
    yield f"30 equal slices, a look at each of 200 batches, {runs:,} runs, rate 10 %"
    yield ""
    yield from table(
        ("Benjamini-Hochberg on t-tests", "e-BH"),
        [tuple(map(percent, slices)) for slices in found["slices"]],
    )


def failures(found: dict[str, list], runs: int) -> list[str]:
    """Return a sentence for each promise that is not kept."""
    wrong = []
    for name, count in (("short", 4 * runs), ("long", runs)):
        for process, e in zip(PROCESSES, found[name], strict=True):
            for what, share in (("false verdicts", e.either), ("strict misses", e.strict)):
                if share > bound(0.05, count):
                    wrong.append(f"{name}, {process}: {share:.1%} {what}, expected at most 5 %")
    edge = found["edge"][EDGES.index(3.6)]
    if edge.share < 0.75 or edge.stop >= 0.5:
        wrong.append(f"planted edge: found in {edge.share:.1%}, median stop {edge.stop:.0%}")
    for (ar, correlation), gates in zip(WORLDS, found["peer"], strict=True):
        limit = 0.025 if correlation == 0.0 else bound(0.025, runs)
        if gates.ours > limit:
            wrong.append(f"equal models, {ar}, {correlation}: {gates.ours:.1%}, limit {limit:.1%}")
    if found["slices"][0].e_values > bound(0.10, runs):
        wrong.append(f"e-BH: {found['slices'][0].e_values:.1%}, expected at most 10 %")
    return wrong


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield a Markdown table and an empty line."""
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


def percent(share: float) -> str:
    """Return 1.2 %."""
    return f"{100 * share:.1f} %"


if __name__ == "__main__":
    app()
