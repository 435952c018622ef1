"""Advantages by hand and in closed form; a buffer that says how full it is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlv3.buffer import PPOBuffer, gae


def row(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def flags(*values: int) -> np.ndarray:
    return np.array(values, dtype=bool)


def test_gae_by_hand() -> None:
    # gamma 0.5, lambda 0.5: delta = r + 0.5 V' - V, A = delta + 0.25 A'
    # delta: 1 + 1 - 1 = 1;  2 + 1.5 - 2 = 1.5;  3 + 2 - 3 = 2
    # A: 2;  1.5 + 0.5 = 2;  1 + 0.5 = 1.5
    found = gae(row(1, 2, 3), row(1, 2, 3), row(2, 3, 4), flags(0, 0, 0), flags(0, 0, 1), 0.5, 0.5)
    assert found.dtype == np.float32
    assert found.tolist() == [1.5, 2.0, 2.0]


def test_termination_stops_the_bootstrap_and_truncation_keeps_it() -> None:
    rewards, values, following = row(1, 1, 1), row(2, 2, 2), row(8, 4, 8)
    ended = flags(0, 1, 0)
    # terminated: delta = 1 - 2 = -1; truncated: 1 + 0.5 * 4 - 2 = 1; the trace is cut in both
    died = gae(rewards, values, following, flags(0, 1, 0), ended, 0.5, 0.5)
    stopped = gae(rewards, values, following, flags(0, 0, 0), ended, 0.5, 0.5)
    # the last: 1 + 4 - 2 = 3; the first: 3 + 0.25 * (-1 or 1)
    assert died.tolist() == [2.75, -1.0, 3.0]
    assert stopped.tolist() == [3.25, 1.0, 3.0]


def test_gae_of_several_environments_is_that_of_each() -> None:
    rng = np.random.default_rng(0)
    shape = (20, 3)
    rewards, values, following = (rng.normal(size=shape).astype(np.float32) for _ in range(3))
    terminated = rng.random(shape) < 0.1
    ended = terminated | (rng.random(shape) < 0.1)
    together = gae(rewards, values, following, terminated, ended, 0.99, 0.95)
    for n in range(3):
        alone = gae(
            rewards[:, n], values[:, n], following[:, n], terminated[:, n], ended[:, n], 0.99, 0.95
        )
        assert np.array_equal(together[:, n], alone)


arrays = st.integers(1, 40).flatmap(
    lambda n: st.tuples(
        *(st.lists(st.floats(-10, 10, width=32), min_size=n, max_size=n) for _ in range(2))
    )
)


@settings(max_examples=60, deadline=None)
@given(arrays, st.floats(0.0, 1.0), st.floats(-10, 10, width=32))
def test_lambda_zero_and_one_are_the_closed_forms(
    columns: tuple[list[float], list[float]], gamma: float, last: float
) -> None:
    rewards, values = (row(*c) for c in columns)
    n = len(rewards)
    following = np.append(values[1:], np.float32(last))
    ended = np.arange(n) == n - 1
    never = np.zeros(n, dtype=bool)
    one_step = rewards + gamma * following.astype(np.float64) - values
    found = gae(rewards, values, following, never, ended, gamma, 0.0)
    assert found == pytest.approx(one_step, abs=1e-3)
    outcome, monte_carlo = float(last), np.empty(n)
    for t in range(n - 1, -1, -1):
        outcome = float(rewards[t]) + gamma * outcome
        monte_carlo[t] = outcome
    found = gae(rewards, values, following, never, ended, gamma, 1.0)
    assert found + values == pytest.approx(monte_carlo, abs=1e-2)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="expected arrays of one shape"):
        gae(row(1, 2), row(1, 2), row(1), flags(0, 0), flags(0, 1), 0.9, 0.9)


def fill(buffer: PPOBuffer, n: int, reward: float = 1.0) -> None:
    for k in range(n):
        buffer.store(np.full(2, k, dtype=np.float32), k % 6, reward, 0.5, -0.1)


def test_get_says_how_full_the_buffer_is() -> None:
    buffer = PPOBuffer(size=10, state_dim=2)
    fill(buffer, 4)
    with pytest.raises(RuntimeError, match="expected a full buffer of 10 steps, found 4"):
        buffer.get()
    assert buffer.ptr == 4
    fill(buffer, 6)
    with pytest.raises(RuntimeError, match="finish_path"):
        buffer.get()
    with pytest.raises(ValueError, match="buffer is full: it holds 10 steps"):
        fill(buffer, 1)
    buffer.finish_path()
    assert len(buffer.get().actions) == 10
    assert buffer.ptr == 0
    fill(buffer, 10)  # and again
    buffer.finish_path()
    buffer.get()


def test_paths_are_separate_and_the_last_value_is_used() -> None:
    buffer = PPOBuffer(size=4, state_dim=2, gamma=0.5, lambda_gae=1.0)
    fill(buffer, 2)
    buffer.finish_path(0.0)  # terminated: returns 1 + 0.5, 1
    fill(buffer, 2)
    buffer.finish_path(8.0)  # truncated: returns 1 + 0.5 * 5, 1 + 0.5 * 8
    buffer.finish_path()  # nothing since: no effect
    rollout = buffer.get()
    assert rollout.returns.tolist() == pytest.approx([1.5, 1.0, 3.5, 5.0])
    assert rollout.advantages.tolist() == pytest.approx([1.0, 0.5, 3.0, 4.5])
    assert rollout.masks.all()
    assert rollout.obs[1].tolist() == [1.0, 1.0]
