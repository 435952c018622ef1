"""The small form of `make calibrate`: fewer runs, the same measures and the same bounds."""

from __future__ import annotations

import numpy as np
import pytest

from shadow.statistics.sequential import Plan, looks
from tests.calibration.measures import (
    bound,
    equal_models_benchmark,
    false_verdicts,
    peeking_at_slices,
    planted_edge,
)
from tests.calibration.processes import (
    PROCESSES,
    Garch,
    Linear,
    Sparse,
    Switching,
    equal_models,
    simulate,
)


def test_bound_by_hand() -> None:
    # 1.645 sqrt(0.05 * 0.95 / 1000) = 0.01134
    assert bound(0.05, 1_000) == pytest.approx(0.06134, abs=1e-5)


@pytest.mark.parametrize("process", PROCESSES)
def test_equal_policies_are_rarely_called_different(process: str) -> None:
    found = false_verdicts(process, 1_000, 100, Plan(horizon=50), seed=1)
    assert found.either <= bound(0.05, 1_000)
    assert found.superior <= bound(0.025, 1_000)
    assert found.inferior <= bound(0.025, 1_000)
    assert found.strict <= bound(0.05, 1_000)
    # the same looks with a t-test: the simulation is not too tame to tell
    assert found.naive > bound(0.05, 1_000)


def test_warning_of_short_batches_is_not_set_off_by_volatility_that_comes_and_goes() -> None:
    y = simulate(Garch(500), 400, 60, np.random.default_rng(4))
    seen = looks(y, Plan())
    assert seen.correlated[:, -1].mean() <= bound(0.05, 500)
    assert (np.abs(seen.lag1[:, -1]) > 2.0 / np.sqrt(400)).mean() > 0.10


def test_planted_edge_is_found_in_time() -> None:
    found = planted_edge(3.6, 1_000, 200, Plan(horizon=100), seed=1)
    assert found.share >= 0.75
    assert found.stop < 0.5
    # N(3.6, 1) beyond 1.96: 95 %
    assert found.fixed == pytest.approx(0.95, abs=0.03)


@pytest.mark.parametrize("ar", [0.0, 0.3])
def test_equal_models_pass_the_peers_gate_and_not_ours(ar: float) -> None:
    found = equal_models_benchmark(200, 1, ar=ar, correlation=0.0)
    assert found.ours <= bound(0.025, 200)
    assert found.approved > 0.10
    assert found.significant > found.approved


def test_slices_of_equal_policies_stay_equal() -> None:
    found = peeking_at_slices(60, 1, batches=120)
    assert found.e_values <= bound(0.10, 60)
    assert found.naive > 2 * found.e_values


def test_processes_are_what_they_are_called() -> None:
    rng = np.random.default_rng(2)
    assert Garch(50)(20_000, rng).var() == pytest.approx(1.0, rel=0.15)
    y = Linear(50, ar=0.5)(4_000, rng)
    assert np.corrcoef(y[1:].ravel(), y[:-1].ravel())[0, 1] == pytest.approx(0.5, abs=0.03)
    y = Linear(50, ma=-0.3)(4_000, rng)
    # the lag-1 correlation is ma divided by 1 + ma squared
    assert np.corrcoef(y[1:].ravel(), y[:-1].ravel())[0, 1] == pytest.approx(-0.275, abs=0.03)
    assert (Sparse(50)(4_000, rng) != 0.0).mean() == pytest.approx(0.01, rel=0.05)
    # half of the time with variance 1, half with 16
    assert Switching(50)(20_000, rng).var() == pytest.approx(8.5, rel=0.1)


def test_equal_models_have_the_moments_of_the_benchmark() -> None:
    trades = equal_models(200, 2_000, np.random.default_rng(3), ar=0.3, correlation=0.7)
    for pnl in trades:
        assert pnl.mean() == pytest.approx(5.0, abs=1.0)
        assert pnl.std() == pytest.approx(120.0, rel=0.02)
        assert np.corrcoef(pnl[:, 1:].ravel(), pnl[:, :-1].ravel())[0, 1] == pytest.approx(
            0.3, abs=0.02
        )
    assert np.corrcoef(trades.champion.ravel(), trades.challenger.ravel())[0, 1] == pytest.approx(
        0.7, abs=0.02
    )
