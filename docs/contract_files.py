"""Write docs/schemas from the code's types: run `python docs/contract_files.py`.

JSON Schemas (2020-12) of what we write and of what every input is decoded to, and an AsyncAPI 3
document of every stream. `tests/test_contracts.py` fails when a file is not what this would write.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec

from rlv3 import events
from shadow import codec, records
from worker.keys import ALL_INPUTS, INPUTS, Keys

DOCS = Path(__file__).resolve().parent
SCHEMAS = DOCS / "schemas"
DIALECT = "https://json-schema.org/draft/2020-12/schema"
KEYS = Keys()

_spec = importlib.util.spec_from_file_location("tables", DOCS / "tables.py")
assert _spec is not None
assert _spec.loader is not None
tables = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tables)

TEXT = {"type": "string"}
ENVELOPE = {
    "title": "Envelope",
    "description": "Fields of an entry, all text: EventBus v2's envelope.",
    "type": "object",
    "properties": {
        "event_type": TEXT,
        "payload": TEXT | {"description": "One JSON object (msgpack with --codec msgpack)."},
        "trace_id": TEXT,
        "correlation_id": TEXT,
        "timestamp": TEXT | {"description": "When it was committed: naive UTC ISO 8601."},
        "source": {"const": "rl-v3-shadow"},
    },
    "required": ["event_type", "payload", "trace_id", "correlation_id", "timestamp", "source"],
    "additionalProperties": False,
}
DEAD_LETTER = {
    "$schema": DIALECT,
    "title": "DeadLetter",
    "description": "An entry that could not be decoded, and why.",
    "type": "object",
    "properties": {
        "dlq_reason": TEXT,
        "dlq_error": TEXT | {"description": "What was expected and what was found."},
        "dlq_source_stream": TEXT,
        "dlq_source_id": TEXT,
        "dlq_at": TEXT | {"format": "date-time"},
        "trace_id": TEXT | {"description": "The entry's, verbatim; empty where none was read."},
        "correlation_id": TEXT,
        "original_sha256": TEXT | {"pattern": "^[0-9a-f]{64}$"},
        "original_bytes": {"type": "integer", "minimum": 0},
        "truncated": {"type": "boolean"},
        "original": {"type": "object", "additionalProperties": TEXT},
    },
    "required": [
        "dlq_reason", "dlq_error", "dlq_source_stream", "dlq_source_id", "dlq_at",
        "original_sha256", "original_bytes", "truncated", "original",
    ],
}  # fmt: skip


def schema(kind: Any, title: str, *structs: type[msgspec.Struct]) -> dict[str, Any]:
    """Return the JSON Schema of a type, its fields described as in the tables of the pages."""
    found: dict[str, Any] = msgspec.json.schema(kind)
    for struct in structs:
        definition = found["$defs"][struct.__name__]
        for name, (_, meaning) in tables.described(struct).items():
            if meaning and "$ref" not in definition["properties"][name]:
                definition["properties"][name]["description"] = meaning
    return {"$schema": DIALECT, "title": title, **found}


def decoded(event_type: str) -> list[type[msgspec.Struct]]:
    """Return what entries of an input become."""
    hints = get_type_hints(codec.READERS[event_type], vars(codec) | vars(events))
    kinds = get_args(hints["return"]) or (hints["return"],)
    return [kind for kind in kinds if kind is not events.Ignored]


def vocabulary() -> dict[str, Any]:
    """Return the schemas of what inputs are decoded to."""
    kinds = sorted(
        {kind for name in codec.READERS for kind in decoded(name)}, key=lambda kind: kind.__name__
    )
    _, definitions = msgspec.json.schema_components(kinds, ref_template="#/$defs/{name}")
    return {"$schema": DIALECT, "title": "What inputs are decoded to", "$defs": definitions}


def asyncapi() -> dict[str, Any]:
    """Return the AsyncAPI document of every stream read and written."""
    written = {
        "rl_v3.decision": (KEYS.decisions, "rl_v3.decision.json"),
        "rl_v3.comparison": (KEYS.comparisons, "rl_v3.comparison.json"),
        "dead_letter": (KEYS.dlq("{event_type}"), "dead_letter.json"),
    }
    channels: dict[str, Any] = {}
    operations: dict[str, Any] = {}
    messages: dict[str, Any] = {}
    for name in ALL_INPUTS:
        place = name.replace(".", "_")
        kinds = " or ".join(kind.__name__ for kind in decoded(name))
        messages[place] = {
            "name": name,
            "summary": f"Any of the publishers' shapes; becomes {kinds}.",
            "payload": {"type": "object", "additionalProperties": TEXT},
            "x-decoded": [
                {"$ref": f"vocabulary.json#/$defs/{kind.__name__}"} for kind in decoded(name)
            ],
        }
        channels[place] = {
            "address": KEYS.stream(name),
            "description": "Read by default." if name in INPUTS else "Read with --inputs.",
            "messages": {place: {"$ref": f"#/components/messages/{place}"}},
        }
        operations[f"read_{place}"] = {
            "action": "receive", "channel": {"$ref": f"#/channels/{place}"},
        }  # fmt: skip
    for name, (address, file) in written.items():
        place = name.replace(".", "_")
        messages[place] = {
            "name": name,
            "contentType": "application/json",
            "headers": {"$ref": "#/components/schemas/Envelope"},
            "payload": {"$ref": file},
        }
        channels[place] = {
            "address": address,
            "messages": {place: {"$ref": f"#/components/messages/{place}"}},
        }
        operations[f"append_{place}"] = {
            "action": "send", "channel": {"$ref": f"#/channels/{place}"},
        }  # fmt: skip
    channels["dead_letter"]["parameters"] = {
        "event_type": {"description": "Input stream.", "enum": [*ALL_INPUTS]}
    }
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "RL v3 shadow",
            "version": str(records.SCHEMA_VERSION),
            "description": "Streams of Redis under the prefix `quantum`. The worker reads and "
            "appends; nothing else of it reaches the bus, and it never trades.",
        },
        "servers": {"redis": {"host": "{host}", "protocol": "redis",
                              "variables": {"host": {"default": "localhost:6379"}}}},
        "defaultContentType": "application/json",
        "channels": channels,
        "operations": operations,
        "components": {"messages": messages, "schemas": {"Envelope": ENVELOPE}},
    }  # fmt: skip


def files() -> dict[str, str]:
    """Return file name -> text of everything under docs/schemas."""
    rows = get_args(records.Comparison)
    contents = {
        "rl_v3.decision.json": schema(records.Decision, "rl_v3.decision", records.Decision),
        "rl_v3.comparison.json": schema(
            records.Comparison, "rl_v3.comparison", records.ArmBar, *rows
        ),
        "dead_letter.json": DEAD_LETTER,
        "vocabulary.json": vocabulary(),
        "asyncapi.json": asyncapi(),
    }
    return {
        name: json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        for name, content in contents.items()
    }


if __name__ == "__main__":
    SCHEMAS.mkdir(exist_ok=True)
    for name, text in files().items():
        (SCHEMAS / name).write_text(text, "utf-8")
