"""Programs that a plain clone lacks. `make test-system` installs them first; one that is still
missing fails its tests and never skips them.
"""

from __future__ import annotations

import shutil

import pytest


def program(name: str) -> str:
    """Return the path of a program that tools.sh installs."""
    path = shutil.which(name)
    if path is None:
        pytest.fail(f"expected {name} on PATH (tests/system/tools.sh installs it), found none")
    return path


@pytest.fixture(scope="session")
def systemd_analyze() -> str:
    """Path of systemd-analyze."""
    return program("systemd-analyze")


@pytest.fixture(scope="session")
def redis_sentinel() -> str:
    """Path of redis-sentinel."""
    return program("redis-sentinel")


@pytest.fixture(scope="session")
def promtool() -> str:
    """Path of promtool."""
    return program("promtool")


@pytest.fixture(scope="session")
def prometheus() -> str:
    """Path of prometheus."""
    return program("prometheus")


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of Chromium; run it as root with --headless --no-sandbox."""
    return program("chromium")
