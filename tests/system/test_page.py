"""Does the live page show in a real browser what an operator must see, on desk and phone?"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from tests.system.browser import Browser
from tests.worker.conftest import daemon, policy_file
from tests.worker.test_api import KEYS, Server, api, client, serve, slowly, stage
from tests.worker.test_service import publish
from worker.status import decode, encode

__all__ = ["api", "client", "daemon", "policy_file", "serve", "stage"]

STATE = "document.getElementById('state').textContent"
TEXT = "document.body.innerText"


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    """One browser for all tests."""
    with Browser(chromium) as found:
        yield found


@pytest.fixture
def url(api: Server) -> str:
    """Where the page is."""
    return f"http://127.0.0.1:{api.port}/"


def shows(browser: Browser, text: str) -> None:
    """Wait until the page shows a text."""
    browser.until(f"{TEXT}.includes({json.dumps(text)})")


def complaints(browser: Browser) -> list[str]:
    """Return what the browser complained about: errors, refused content, failed requests."""
    bad = ("Runtime.exceptionThrown", "Log.entryAdded", "Network.loadingFailed")
    return [str(event) for event in browser.events if event.get("method") in bad]


def requested(browser: Browser) -> set[str]:
    """Return the hosts that the browser asked."""
    urls = [
        event["params"]["request"]["url"]
        for event in browser.events
        if event.get("method") == "Network.requestWillBeSent"
    ]
    return {found.split("/")[2] for found in urls if found.startswith(("http:", "https:", "ws"))}


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
@pytest.mark.parametrize("dark", [False, True])
def test_everything_is_there_and_fits(
    browser: Browser, url: str, client: redis.Redis, daemon, api: Server,
    tmp_path: Path, width: int, height: int, dark: bool,
) -> None:  # fmt: skip
    publish(client, 0, 300)
    daemon(api.url)
    browser.events.clear()
    browser.open(url, width, height, dark=dark)
    browser.until(f"{STATE} === 'Ready'")
    for text in ("Ticks per second", "No registration", "RL v3", "follow signal", "Report"):
        shows(browser, text)
    browser.until("document.querySelectorAll('#decisions tbody tr').length === 50")
    assert browser.value("document.querySelectorAll('#arms tbody tr').length") == 4
    wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert browser.value(wide) == 0
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    roles = {node["role"]["value"] for node in nodes if "role" in node}
    assert {"main", "banner", "heading", "table", "status"} <= roles
    picture = tmp_path / "page.png"
    browser.screenshot(picture)
    assert picture.stat().st_size > 20_000
    if os.environ.get("RLV3_PICTURES"):
        kind = f"{width}-{'dark' if dark else 'light'}"
        (Path(os.environ["RLV3_PICTURES"]) / f"page-{kind}.png").write_bytes(picture.read_bytes())
    assert requested(browser) == {f"127.0.0.1:{api.port}"}
    assert complaints(browser) == []


def test_numbers_are_those_of_the_worker_and_move(
    browser: Browser, url: str, client: redis.Redis, daemon, api: Server
) -> None:
    publish(client, 0, 200)
    daemon(api.url)
    browser.open(url)
    shows(browser, "202 in all")
    publish(client, 200, 300)
    shows(browser, "303 in all")
    equity = api.json("/api/v1/rl/v3/status")["worker"]["equity"]["v3"]
    shows(browser, f"{equity:,.2f}")


def test_a_stopped_and_a_missing_worker_are_named(
    browser: Browser, url: str, client: redis.Redis, daemon, api: Server
) -> None:
    browser.open(url)
    browser.until(f"{STATE} === 'No worker'")
    shows(browser, "no worker has shown itself yet")
    publish(client, 0, 10)
    worker = daemon(api.url)
    browser.until(f"{STATE} === 'Ready'")
    worker.end(signal.SIGTERM)
    browser.until(f"{STATE} === 'Stopped'")
    shows(browser, "the worker was stopped")


def test_a_silent_rl_v2_and_a_bad_verdict_are_said_plainly(
    browser: Browser, url: str, client: redis.Redis, daemon, api: Server
) -> None:
    publish(client, 0, 10)
    worker = daemon(api.url)
    slowly(lambda: client.exists(KEYS.status))
    worker.end(signal.SIGKILL)
    shown = decode(client.hget(KEYS.status, "body"))
    old = encode(_since(shown, time.time() - 3_000))
    browser.open(url)
    found = {
        "registration": "r", "verdict": "REJECT", "why": "the interval lies below zero",
        "mean": -4.2, "low": -7.9, "high": -0.5, "batches": 300, "days": 12.5, "e_value": 31.0,
        "p_value": 0.03, "days_to_decide": None,
    }  # fmt: skip
    client.set(KEYS.own + "verdict", json.dumps(found))
    client.hset(KEYS.status, mapping={"at_ms": int(time.time() * 1_000), "body": old})
    shows(browser, "RL v2 is silent: no decision for 50 min.")
    shows(browser, "Verdict: REJECT. the interval lies below zero")
    shows(browser, "−7.9 to −0.5 bps a day")
    assert browser.value("document.querySelectorAll('#interval circle').length") == 1
    client.set(KEYS.own + "verdict", json.dumps({**found, "verdict": "KEEP SHADOWING",
                                                 "high": 2.0, "days_to_decide": 61.4}))  # fmt: skip
    shows(browser, "KEEP SHADOWING")
    shows(browser, "61")
    browser.until("!document.body.innerText.includes('Verdict: REJECT')")


def _since(status, started_s):
    import msgspec

    return msgspec.structs.replace(status, started_s=started_s)


def test_a_server_that_went_is_said_to_have_gone(browser: Browser, stage: Server, serve) -> None:
    server = serve(stage.url)
    browser.open(f"http://127.0.0.1:{server.port}/")
    browser.until(f"{STATE} === 'No worker'")
    server.process.kill()
    browser.until(f"{STATE} === 'No connection'")


def test_the_description_is_shown_without_any_other_host(
    browser: Browser, url: str, api: Server
) -> None:
    browser.events.clear()
    browser.open(url + "docs")
    shows(browser, "POST /api/v1/rl/v3/predict")
    shows(browser, "volatility number ≥ 0 or null")
    assert requested(browser) == {f"127.0.0.1:{api.port}"}
    assert complaints(browser) == []
