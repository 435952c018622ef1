"""Does systemd accept the units, and how well are they confined?"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
UNITS = sorted((ROOT / "deploy" / "systemd").glob("*.service"))
EXPOSURE_LIMIT = 2.0
"""systemd calls up to 2.0 "OK" and above 5 "MEDIUM"; a service without confinement has 9.6."""


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_unit_is_valid(unit: Path, systemd_analyze: str, tmp_path: Path) -> None:
    # verify looks for the program, which is installed on the operator's machine alone
    text = re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", unit.read_text("utf-8"), flags=re.M)
    copy = tmp_path / unit.name
    copy.write_text(text, "utf-8")
    done = subprocess.run(
        [systemd_analyze, "verify", "--recursive-errors=no", "--man=no", str(copy)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_unit_is_confined(unit: Path, systemd_analyze: str, tmp_path: Path) -> None:
    shutil.copy(unit, tmp_path)
    done = subprocess.run(
        [systemd_analyze, "security", "--offline=yes", "--no-pager", str(tmp_path / unit.name)],
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert found is not None, done.stderr
    assert float(found[1]) <= EXPOSURE_LIMIT, done.stdout
