"""Write the tables of docs/*.md that repeat what the code says: run `python docs/tables.py`.

A table lies between `<!-- table: NAME -->` and `<!-- end -->`; `tests/test_docs.py` fails when one
is not what this program would write.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable
from pathlib import Path

import msgspec

from rlv3.features import FEATURES, MARKET
from shadow import records
from shadow.evaluation.gates import MEASURES, read_gates

DOCS = Path(__file__).resolve().parent
BLOCK = re.compile(r"(<!-- table: ([\w.]+) -->\n).*?(<!-- end -->)", re.DOTALL)

JSON_TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}

MEANINGS = {
    "action": "Index in the action table",
    "action_name": "Its name",
    "action_probs": "Probability of each of the six actions, 0 where masked",
    "action_table": "Names of the actions by index",
    "arms": "What each arm did in the bar; see below",
    "base_direction": "Side that RL v2 judged: +1 buy, -1 sell, 0 none",
    "bus_regime": "Last regime that production published; recorded, never used",
    "close": "Last price",
    "closed_side": "Side of the closed position: +1 long, -1 short",
    "correlation_id": "As for trace_id, verbatim",
    "decision_id": "Id of the decision",
    "decision_kind": "meta_strategy, position_sizing or combined",
    "direction": "Side after mapping: +1, -1, or 0 below the threshold",
    "effective_confidence": "signal_confidence × weight, within 0..1",
    "empty_after": "Bars without a tick between this one and the tick that closed it",
    "entropy": "Of action_probs, in nats",
    "entry_price": "As production reported it",
    "event_ts": "Event time, ISO 8601 with offset",
    "event_ts_us": "Event time, UTC epoch µs",
    "exit_price": "As production reported it",
    "feature_digest": "sha256 of the feature table",
    "fee": "Exchange fees paid",
    "high": "Highest price",
    "leverage": "As RL v2 chose it; recorded, not applied",
    "low": "Lowest price",
    "missing_mask": "Bit i = feature i missing",
    "model": "Model that RL v2 chose",
    "model_sha256": "sha256 of the artifact",
    "multiplier_assumed": "True when no sizing decision was known and 1.0 was taken",
    "open": "First price",
    "opponent": "Who RL v2 was: local_reference, q_table, static_policy or ai_engine_sizing",
    "opponent_digest": "Digest of the Q-tables that decided, null where not known",
    "pnl_pct": "Profit in percent, as production reported it",
    "pnl_usd": "Profit in dollars, null where production does not compute it",
    "policy_digest": "sha256 of the artifact in force",
    "reason": "Why production closed",
    "record_id": "Hash of what makes the record unique; the same for ever",
    "restarted": "The silence was too long: the symbol is cold again",
    "ruined": "The account fell to the ruin limit; it no longer trades",
    "run_id": "Which run wrote it; see the run record",
    "schema_version": "1",
    "signal_confidence": "Of the signal that RL v2 judged, 0..1",
    "size_multiplier": "RL v2's sizing",
    "slippage": "Half-spread paid",
    "source_correlation_id": "Correlation id of the source envelope, verbatim",
    "source_entry_id": "Entry id there",
    "source_event_type": "Logical name of the source stream",
    "source_stream": "Full key of the stream that it came from",
    "source_trace_id": "Trace id of the source event, verbatim",
    "strategy": "Strategy that RL v2 chose",
    "suggested_tp_pct": "0.06 × tp_zone_multiplier",
    "symbol": "Upper case, no separators",
    "tables_digest": "Digest of the reference Q-tables, null without a reference",
    "tp_zone_multiplier": "1 + value / 20, within 0.5..1.5",
    "trace_id": "Of the source event; on rl_v3.decision the decision id where that is empty",
    "v2_decision_id": "Id of RL v2's decision",
    "v2_direction": "Side of RL v2's target, null when it gave none",
    "v2_exposure": "Exposure of the v2 arm then",
    "v3_action": "Index in the action table",
    "v3_action_name": "Its name",
    "v3_confidence": "Probability of v3's action",
    "v3_decision_id": "Id of v3's decision",
    "v3_event_type": "What v3 decided on: a tick or a signal stream",
    "v3_exposure": "Exposure of the v3 arm then",
    "v3_kind": "step or advisory",
    "v3_target": "Target exposure in force after v3's decision",
    "value": "Value estimate of the state, in units of the reward",
    "volume": "Traded volume, null where not known",
    "warm": "Every market feature had its history",
    "weight": "Weight that RL v2 gives the signal",
}
"""Meaning of fields that carry no docstring of their own; a docstring wins."""


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a Markdown table."""
    head = list(header)
    lines = [head, ["---"] * len(head), *rows]
    return "".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |\n" for line in lines
    )


def features() -> str:
    """Return the feature table of `rlv3.features`."""
    return table(
        ("index", "name", "unit", "formula", "source", "if unknown", "bars needed", "normalised"),
        (
            (i, f"`{f.name}`", f.unit, f.formula.replace("*", "×"), f.source, f"{f.unknown:g}",
             f.history, "yes" if i in MARKET else "no")
            for i, f in enumerate(FEATURES)
        ),
    )  # fmt: skip


def gate_table() -> str:
    """Return the default gates of `shadow/evaluation/gates.toml`."""
    rows = (
        (
            gate.name,
            f"`{gate.measure}`",
            f"≥ {gate.at_least:g}" if gate.at_least is not None else f"≤ {gate.at_most:g}",
            {"invalid": "INVALID", "reject": "REJECT", "keep": "KEEP SHADOWING"}[gate.otherwise],
            "yes" if gate.optional else "",
        )
        for gate in read_gates()
    )
    return table(("gate", "measure", "bound", "otherwise", "may be unmeasured"), rows)


def measure_table() -> str:
    """Return what gates may look at."""
    rows = ((f"`{name}`", meaning) for name, meaning in MEASURES.items())
    return table(("measure", "meaning"), rows)


def json_type(annotation: str) -> str:
    """Return how a field's annotation looks in JSON."""
    parts = annotation.split(" | ")
    if "None" in parts:
        return json_type(" | ".join(p for p in parts if p != "None")) + " or null"
    if annotation.startswith("tuple["):
        return "array of " + json_type(annotation[6:-1].removesuffix(", ...")) + "s"
    struct = hasattr(records, annotation)
    return "object" if struct or annotation.startswith("dict[") else JSON_TYPES[annotation]


def described(record: type[msgspec.Struct]) -> dict[str, tuple[str, str]]:
    """Return name -> JSON type and meaning of every field of a record, from its source."""
    body = ast.parse(inspect.getsource(record)).body[0]
    assert isinstance(body, ast.ClassDef)
    found: dict[str, list[str]] = {}
    last = ""
    for node in body.body[1:]:
        if isinstance(node, ast.AnnAssign):
            last = ast.unparse(node.target)
            found[last] = [json_type(ast.unparse(node.annotation)), MEANINGS.get(last, "")]
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            found[last][1] = " ".join(str(node.value.value).split()).rstrip(".")
    return {name: (kind, meaning) for name, (kind, meaning) in found.items()}


def fields(record: type[msgspec.Struct]) -> str:
    """Return the table of a record's fields."""
    tag = record.__struct_config__.tag
    first = [("`kind`", "string", f"`{tag}`")] if tag else []
    rows = [*first, *((f"`{name}`", *rest) for name, rest in described(record).items())]
    return table(("field", "type", "meaning"), rows)


def render(text: str) -> str:
    """Return a page with all its tables written anew."""

    def block(match: re.Match[str]) -> str:
        name = match[2]
        own = {"features": features, "gates": gate_table, "measures": measure_table}
        body = own[name]() if name in own else fields(getattr(records, name))
        return match[1] + body + match[3]

    return BLOCK.sub(block, text)


if __name__ == "__main__":
    for page in DOCS.glob("*.md"):
        page.write_text(render(page.read_text("utf-8")), "utf-8")
