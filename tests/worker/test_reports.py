"""Is there a report again once what kept it from being built is over?"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from rlv3.errors import DataError
from worker import logs, reports
from worker.reports import Reports


def test_a_program_that_cannot_be_started_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def main() -> None:
        kept = Reports(tmp_path / "store", logs.configure("INFO"))
        try:
            monkeypatch.setenv("PATH", str(tmp_path))  # no `nice` here
            for _ in range(2):  # the reason is told again without another try
                with pytest.raises(DataError, match=r"to start .*, found: .*file.*nice"):
                    await kept.current()
            assert capsys.readouterr().out.count("REPORT_FAILED") == 1
            monkeypatch.undo()
            monkeypatch.setattr(reports, "FRESH_S", 0.0)
            with pytest.raises(DataError, match="expected a store"):  # what the program says
                await kept.current()
        finally:
            await kept.close()

    asyncio.run(main())
