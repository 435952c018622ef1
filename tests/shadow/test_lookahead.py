"""What is said about the past does not change when the future is cut off."""

from __future__ import annotations

import pytest

from tests.calibration.lookahead import SYSTEMS, Found, cut, leaks, peek, search, worlds


def test_two_hundred_random_cuts_change_nothing_before_them_and_a_planted_peek_is_caught() -> None:
    found = search(200, seed=0)
    assert found == {
        system.name: Found(cuts=50, changed=0, planted=5, caught=5) for system in SYSTEMS
    }


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_every_system_says_something_before_the_cut(system: object) -> None:
    bars = worlds(0)
    said = system.run(bars)  # type: ignore[attr-defined]
    assert sum(time <= int(bars[0].end_us[55]) for time, _ in said) >= 13


def test_peeking_changes_bars_up_to_four_before_a_cut_and_no_earlier_one() -> None:
    bars = worlds(1)
    whole, short = peek(bars)[0], peek(cut(bars, 50))[0]
    differs = whole.close[:50] != short.close
    assert differs[46:].all()
    assert not differs[:46].any()


def test_a_system_that_reads_the_end_of_its_input_is_caught() -> None:
    bars = worlds(2)

    def last_close(found: list) -> list[tuple[int, object]]:
        return [(int(found[0].end_us[0]), float(found[0].close[-1]))]

    assert leaks(last_close, bars, 50) == 1
