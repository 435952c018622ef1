"""Picture the top of a report, as the README shows it.

python -m tests.system.picture out/demo-store/report.html docs/report.png
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.system.browser import Browser

WIDTH, HEIGHT = 1_120, 1_250


def main(page: Path, picture: Path) -> None:
    """Write a PNG of what a reader sees first."""
    with Browser("chromium") as browser:
        browser.open(page.resolve().as_uri(), WIDTH, HEIGHT)
        browser.screenshot(picture, HEIGHT)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
