"""Do the files under docs/schemas say what the code writes, and are older entries still read?

`fixtures/contract_v<N>.json` holds entries as version N published them, one of each kind. It is
never written anew: a change that cannot read them needs a new version, a file for it, a migration.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import msgspec
import pytest

from rlv3.market import simulate
from rlv3.policy import Policy, shipped_policy
from shadow.history import entries
from shadow.pipeline import Pipeline, Settings
from shadow.records import (
    SCHEMA_VERSION,
    Comparison,
    Decision,
    Entry,
    decode_comparison,
    decode_decision,
)
from shadow.rl_v2 import QTables
from worker.keys import ALL_INPUTS, OTHERS, Keys

ROOT = Path(__file__).resolve().parents[1]
SCHEMAS = ROOT / "docs" / "schemas"
FIXTURES = Path(__file__).parent / "fixtures"
KEYS = Keys()
KINDS = {"decision", "pair", "unpaired", "bar", "outcome", "ledger", "run"}


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    path = ROOT / "docs" / "contract_files.py"
    spec = importlib.util.spec_from_file_location("contract_files", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def validator(name: str) -> jsonschema.protocols.Validator:
    content = json.loads((SCHEMAS / f"{name}.json").read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(content)
    return jsonschema.Draft202012Validator(content)


def test_files_are_what_the_code_says(generator: ModuleType) -> None:
    found = {path.name: path.read_text("utf-8") for path in SCHEMAS.iterdir()}
    assert found == generator.files(), "run: python docs/contract_files.py"


@pytest.fixture(scope="module")
def outputs() -> list[tuple[str, dict[str, Any]]]:
    """Event type and payload of everything that a short run writes, dead letters included."""
    bars = simulate("regime_switching", 60, symbol="BTCUSDT", seed=3)
    history = list(entries([bars], stream=KEYS.stream, ticks_per_bar=2))
    last = history[-1]
    for number, (event_type, body) in enumerate(AFTERWARDS):
        fields = {b"payload": body.encode()}
        entry_id = f"{last.id_ms + 1 + number}-0"
        history.append(Entry(KEYS.stream(event_type), event_type, entry_id, fields))
    pipeline = Pipeline(Policy.load(shipped_policy()), QTables.load(None), Settings(), ALL_INPUTS)
    commits = [pipeline.begin({})]
    rest = history
    while rest:
        commits.append(pipeline.run(rest, now_ms=rest[0].id_ms + 5.0))
        rest = rest[commits[-1].taken :]
    commits.append(pipeline.stop())
    return [(o.event_type, json.loads(o.payload)) for commit in commits for o in commit.outputs]


AFTERWARDS = (
    ("market.tick", '{"symbol": "BTCUSDT", "price": -1}'),
    ("market.tick", "no JSON"),
    ("trade.closed", '{"symbol": "BTCUSDT", "side": "LONG", "exit_price": "1", "pnl_percent": 2}'),
)


def test_everything_written_satisfies_its_schema(outputs: list[tuple[str, Any]]) -> None:
    checks = {
        "rl_v3.decision": validator("rl_v3.decision"),
        "rl_v3.comparison": validator("rl_v3.comparison"),
        "dlq:market.tick": validator("dead_letter"),
    }
    assert {event_type for event_type, _ in outputs} == set(checks)
    for event_type, payload in outputs:
        checks[event_type].validate(payload)
    kinds = {payload["kind"] for name, payload in outputs if name == "rl_v3.comparison"}
    assert kinds >= KINDS - {"unpaired"}


def test_schemas_refuse_what_is_missing_or_of_another_type(outputs: list[tuple[str, Any]]) -> None:
    decision = next(payload for name, payload in outputs if name == "rl_v3.decision")
    check = validator("rl_v3.decision")
    later = {"risk_allowed", "risk_reason"}  # decisions of before do without
    assert later < decision.keys()
    for name in decision:
        without = {k: v for k, v in decision.items() if k != name}
        assert check.is_valid(without) is (name in later), name
    assert not check.is_valid(decision | {"action": "LONG"})


def references(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "$ref":
                yield value
            else:
                yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def test_asyncapi_names_every_stream_and_its_references_lead_somewhere() -> None:
    document = json.loads((SCHEMAS / "asyncapi.json").read_text("utf-8"))
    assert document["asyncapi"] == "3.0.0"
    received = {KEYS.stream(name) for name in ALL_INPUTS}
    sent = {KEYS.decisions, KEYS.comparisons, KEYS.dlq("{event_type}")}
    found: dict[str, set[str]] = {"receive": set(), "send": set()}
    for operation in document["operations"].values():
        place = operation["channel"]["$ref"].rpartition("/")[2]
        found[operation["action"]].add(document["channels"][place]["address"])
    assert found == {"receive": received, "send": sent}
    assert sent & {KEYS.stream(name) for name in OTHERS} == set()
    for reference in set(references(document)):
        file, _, pointer = reference.partition("#")
        node = json.loads((SCHEMAS / file).read_text("utf-8")) if file else document
        for step in filter(None, pointer.split("/")):
            node = node[step]


VERSIONS = range(1, SCHEMA_VERSION + 1)


def published(version: int) -> list[tuple[str, dict[str, Any]]]:
    """Return (event type, payload) of what a version published."""
    text = (FIXTURES / f"contract_v{version}.json").read_text("utf-8")
    return [(row["event_type"], row["payload"]) for row in json.loads(text)]


@pytest.mark.parametrize("version", VERSIONS)
def test_entries_of_every_version_are_read(version: int) -> None:
    rows = published(version)
    kinds = {payload["kind"] for name, payload in rows if name == "rl_v3.comparison"}
    assert kinds == KINDS
    assert {payload["schema_version"] for _, payload in rows} == {version}
    for event_type, payload in rows:
        text = json.dumps(payload).encode()
        row: Decision | Comparison = (
            decode_decision(text) if event_type == "rl_v3.decision" else decode_comparison(text)
        )
        again = json.loads(msgspec.json.encode(row))
        # nothing that was published is lost in the reading; later versions may add to it
        assert {name: again[name] for name in payload} == payload


@pytest.mark.parametrize("version", VERSIONS)
def test_a_field_never_goes_or_changes_its_type(version: int) -> None:
    """What a reader of that version relies on is still published: its entries fit the schemas but
    for fields that came later."""
    for event_type, payload in published(version):
        for error in validator(event_type).iter_errors(payload):
            causes = [error, *(error.context or ())]
            assert all(cause.validator in ("required", "anyOf", "const") for cause in causes)
