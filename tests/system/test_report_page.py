"""The report in a real browser: it renders, asks the network for nothing, and prints.

Pictures stay in `out/test-system/` for people to look at.
"""

from __future__ import annotations

import json
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest

from rlv3.market import simulate
from rlv3.policy import Policy, shipped_policy
from shadow.backtest import backtest
from shadow.evaluation.register import Terms, register, run_of
from shadow.pipeline import Settings
from shadow.reporting import render
from shadow.reporting.report import read_report
from shadow.rl_v2 import QTables

PICTURES = Path(__file__).resolve().parents[2] / "out" / "test-system"
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-extensions",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars", "--no-pdf-header-footer", "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip
"""The browser's own errands (updates, accounts) find no host."""
START = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a small registered backtest."""
    folder = tmp_path_factory.mktemp("page")
    policy = Policy.load(shipped_policy())
    frozen = run_of(policy, Settings(latency_ms=0), QTables.load())
    terms = Terms(symbols=("BTCUSDT", "ETHUSDT"), start_us=round(START.timestamp() * 1e6))
    register(folder / "store", terms, now=START, frozen=frozen)
    bars = [simulate("regime_switching", 1_500, seed=i, symbol=s) for i, s in enumerate(terms[0])]
    backtest(policy, bars, store_dir=folder / "store")
    return render.write(read_report(folder / "store"), folder, datetime.now(UTC)).html


def browse(chromium: str, page: Path, *options: object, timeout_s: float = 120.0) -> str:
    command = [chromium, *QUIET, f"--user-data-dir={page.parent / 'profile'}", *map(str, options)]
    done = subprocess.run(
        [*command, page.as_uri()], capture_output=True, text=True, timeout=timeout_s, check=True
    )
    return done.stdout


def requested(chromium: str, page: Path) -> list[str]:
    """Return every address that the page asked for; requests of the browser have no origin."""
    log = page.with_suffix(".netlog.json")
    browse(chromium, page, f"--log-net-log={log}", "--dump-dom")
    text = log.read_text()
    events = json.loads(text if text.rstrip().endswith("}") else text.rstrip().rstrip(",") + "]}")
    found = {
        event["params"]["url"]
        for event in events["events"]
        if isinstance(event.get("params"), dict)
        and "url" in event["params"]
        and event["params"].get("initiator") not in (None, "not an origin")
    }
    return sorted(url for url in found if not url.startswith("file:"))


def picture(chromium: str, page: Path, name: str, *options: object) -> bytes:
    PICTURES.mkdir(parents=True, exist_ok=True)
    path = PICTURES / f"{name}.png"
    path.unlink(missing_ok=True)
    browse(chromium, page, "--window-size=1150,6000", f"--screenshot={path}", *options)
    return path.read_bytes()


def test_page_renders_with_its_sections_in_order(chromium: str, page: Path) -> None:
    dom = browse(chromium, page, "--dump-dom")
    assert re.findall(r'<h2 id="([a-z]+)"', dom) == list(render.SECTIONS)[1:]
    assert dom.index('id="verdict"') < dom.index('<h2 id="effect"')
    assert "KEEP SHADOWING" in dom
    assert len(page.read_bytes()) < 1_000_000


def test_no_request_leaves_the_page(chromium: str, page: Path, tmp_path: Path) -> None:
    assert requested(chromium, page) == []
    leaky = tmp_path / "leaky.html"
    leaky.write_text('<img src="http://127.0.0.1:9/pixel.png">')
    assert requested(chromium, leaky) == ["http://127.0.0.1:9/pixel.png"]


def test_page_is_drawn_in_light_and_dark(chromium: str, page: Path) -> None:
    light = picture(chromium, page, "report-light")
    dark = picture(chromium, page, "report-dark", "--blink-settings=preferredColorScheme=0")
    assert light.startswith(b"\x89PNG")
    assert min(len(light), len(dark)) > 100_000
    assert light != dark


def test_page_prints(chromium: str, page: Path) -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    path = PICTURES / "report.pdf"
    browse(chromium, page, f"--print-to-pdf={path}")
    content = path.read_bytes()
    assert content.startswith(b"%PDF")
    assert 4 <= content.count(b"/Type /Page\n") <= 40
