"""The long form of the calibration, as the tables of docs/evaluation.md. `make calibrate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from typing import Annotated

import typer

from shadow.statistics.sequential import Plan
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
        "short": [partial(false_verdicts, name, runs, *FORTNIGHT, seed) for name in PROCESSES],
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
    runs: Annotated[int, typer.Option(help="Simulated runs of each row.")] = 1_000,
    seed: int = 0,
    jobs: Annotated[int, typer.Option(help="Processes side by side.")] = 2,
    parts: Annotated[str, typer.Option(help="Tables; long takes minutes more.")] = (
        "short,edge,peer,slices"
    ),
) -> None:
    """Print how often verdicts are wrong and how often they are found, and fail if too often."""
    every = measurements(runs, seed)
    if unknown := set(parts.split(",")) - set(every):
        raise typer.BadParameter(f"expected some of {','.join(every)}, found {unknown}")
    tasks = {name: every[name] for name in every if name in parts.split(",")}
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
    for name, (batches, plan) in (("short", FORTNIGHT), ("long", HALF_YEAR)):
        if name not in found:
            continue
        yield f"Equal policies, {runs:,} runs, {batches:,} batches of 60 bars, N* {plan.horizon}"
        yield f"(5 % plus chance is {percent(bound(0.05, runs))}):"
        yield ""
        yield from table(
            ("process", "superior", "inferior", "either", "naive t", "batches too short",
             "strict: misses", "strict: width", "clipped"),
            [
                (process, *map(percent, e[:6]), f"{e.strict_width:.2f}", percent(e.clipped, 2))
                for process, e in zip(PROCESSES, found[name], strict=True)
            ],
        )  # fmt: skip
    if "edge" in found:
        yield f"A planted edge, {runs:,} runs, 200 batches, N* 100:"
        yield ""
        yield from table(
            ("z at the horizon", "found", "median stop", "found by one look at the horizon"),
            [
                (f"{z}", percent(e.share), percent(e.stop), percent(e.fixed))
                for z, e in zip(EDGES, found["edge"], strict=True)
            ],
        )
    if "peer" in found:
        yield f"Two equal models, {runs:,} runs, 5,000 trades:"
        yield ""
        yield from table(
            ("autocorrelation", "correlation", "any of three tests", "approved", "ours"),
            [
                (f"{ar}", f"{correlation}", *map(percent, gates))
                for (ar, correlation), gates in zip(WORLDS, found["peer"], strict=True)
            ],
        )
    if "slices" in found:
        yield f"30 equal slices, {runs:,} runs, a look at each of 200 batches, rate 10 %:"
        yield ""
        yield from table(
            ("Benjamini-Hochberg on t-tests", "e-BH"),
            [tuple(map(percent, slices)) for slices in found["slices"]],
        )


def failures(found: dict[str, list], runs: int) -> list[str]:
    """Return a sentence for each promise that is not kept."""
    wrong = []
    for name in ("short", "long"):
        for process, e in zip(PROCESSES, found.get(name, []), strict=name in found):
            for what, share in (("false verdicts", e.either), ("strict misses", e.strict)):
                if share > bound(0.05, runs):
                    wrong.append(f"{name}, {process}: {percent(share)} {what}, expected 5 %")
    for z, e in zip(EDGES, found.get("edge", []), strict="edge" in found):
        if z == 3.6 and (e.share < 0.75 or e.stop >= 0.5):
            wrong.append(f"planted edge: {percent(e.share)} found, stopped at {percent(e.stop)}")
    for (ar, correlation), gates in zip(WORLDS, found.get("peer", []), strict="peer" in found):
        limit = 0.025 if correlation == 0.0 else bound(0.025, runs)
        if gates.ours > limit:
            wrong.append(
                f"equal models, {ar}, {correlation}: {percent(gates.ours)}, limit {percent(limit)}"
            )
    wrong += [
        f"e-BH: {percent(slices.e_values)} of the runs, expected 10 %"
        for slices in found.get("slices", [])
        if slices.e_values > bound(0.10, runs)
    ]
    return wrong


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield a Markdown table and an empty line."""
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


def percent(share: float, digits: int = 1) -> str:
    """Return 1.2 %."""
    return f"{100 * share:.{digits}f} %"


if __name__ == "__main__":
    app()
