"""Do the benchmarks still fit what they measure?"""

from __future__ import annotations

from pathlib import Path

from bench.bench_report import Maker
from shadow.reporting.report import read_report


def test_the_benchmarks_store_has_every_column_and_can_be_reported(tmp_path: Path) -> None:
    Maker(tmp_path, 2_000, 5, 2).make()
    report = read_report(tmp_path)
    assert sum(group.pairs for group in report.pairs) > 1_900
