"""Do the packages still depend on each other the way the design says?

The import graph is read from the source with `ast`, imports inside functions included, so that a
lazy import cannot hide. Imports under `if TYPE_CHECKING:` do not run and are left out.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import rlv3
from shadow import records

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("rlv3", "shadow", "worker")  # an import may only point to an earlier one, or its own
HEAVY = {"torch", "gymnasium"}
LIGHT_ENTRIES = ("worker.service", "worker.cli", "worker.api", "worker.demo", "shadow.cli")
"""Programs that must run where torch is not installed."""

LAZY = {f"rlv3.{name}": f"rlv3.{home}" for name, home in rlv3._HOMES.items()}

PUBLIC = {
    "RLv3Config", "RLv3Manager", "TradingEnvV3", "PPOBuffer", "PPOAgent", "PPOTrainer",
    "PolicyNetwork", "ValueNetwork", "build_feature_vector", "compute_reward",
}  # fmt: skip


@cache
def sources() -> dict[str, ast.Module]:
    """Return module name -> syntax tree for every module of the three packages."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = ast.parse(path.read_text("utf-8"))
    return found


def _running(node: ast.AST) -> Iterator[ast.AST]:
    """Walk the nodes that can run: everything but the body of `if TYPE_CHECKING:`."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield from _running(child)


@cache
def imports(module: str) -> frozenset[str]:
    """Return the dotted names that a module imports; `from a import b` counts as `a` and `a.b`.

    A public name of `rlv3` counts as the module that it is lazily loaded from.
    """
    names: set[str] = set()
    for node in _running(sources()[module]):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import, write the whole name"
            assert node.module is not None
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(LAZY.get(name, name) for name in names)


def test_what_is_ours_on_the_bus_is_named_once() -> None:
    """Streams and ids that several modules need have one home, the lowest of them."""
    named = {records.DECISIONS, records.COMPARISONS, records.REPLAY}
    found = {
        (name, node.value)
        for name, tree in sources().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in named
    }
    assert found == {("shadow.records", name) for name in named}


def top_level(module: str) -> set[str]:
    """Return the packages that a module imports."""
    return {name.partition(".")[0] for name in imports(module)}


def chain_to(entry: str, forbidden: set[str]) -> list[str] | None:
    """Return the shortest chain of our modules from `entry` to one that imports `forbidden`."""
    paths = {entry: [entry]}
    queue = [entry]
    for module in queue:
        if top_level(module) & forbidden:
            return paths[module]
        for name in sorted(imports(module)):
            if name in sources() and name not in paths:
                paths[name] = [*paths[module], name]
                queue.append(name)
    return None


def test_imports_point_one_way() -> None:
    wrong = [
        f"{module} imports {target}"
        for module in sources()
        for target in top_level(module) & set(PACKAGES)
        if PACKAGES.index(target) > PACKAGES.index(module.partition(".")[0])
    ]
    assert wrong == []


LAYERS = ("shadow", "shadow.statistics", "shadow.evaluation", "shadow.reporting")
"""Fold and store, statistics, what is measured, how it is told: each knows earlier ones only."""
PROGRAMS = {"shadow.cli", "shadow.demo_store"}


def layer(module: str) -> int:
    """Return the place of a module of shadow among the layers."""
    parent = module.rpartition(".")[0]
    return LAYERS.index(module if module in LAYERS else parent)


def shadow_imports(module: str) -> set[str]:
    """Return the modules of shadow that a module imports."""
    return {name for name in imports(module) if name in sources() and name.startswith("shadow")}


def test_layers_of_shadow_know_earlier_ones_only() -> None:
    shadow = {module for module in sources() if module.startswith("shadow")} - PROGRAMS
    wrong = [
        f"{module} imports {target}"
        for module in sorted(shadow)
        for target in shadow_imports(module)
        if layer(target) > layer(module)
    ]
    assert wrong == []


def test_statistics_know_nothing_of_what_is_compared() -> None:
    modules = [module for module in sources() if module.startswith("shadow.statistics.")]
    assert len(modules) >= 4
    outside = {target for module in modules for target in shadow_imports(module)} - set(modules)
    assert outside == set()


def test_redis_is_imported_by_the_worker_alone() -> None:
    wrong = [
        module
        for module in sources()
        if not module.startswith("worker") and top_level(module) & {"redis", "hiredis"}
    ]
    assert wrong == []


def test_shadow_imports_neither_torch_nor_gymnasium() -> None:
    shadow = [module for module in sources() if module.partition(".")[0] == "shadow"]
    assert {module: chain_to(module, HEAVY) for module in shadow} == dict.fromkeys(shadow)


@pytest.mark.parametrize("entry", LIGHT_ENTRIES)
def test_serving_path_imports_neither_torch_nor_gymnasium(entry: str) -> None:
    assert chain_to(entry, HEAVY) is None


@pytest.mark.parametrize("entry", ["worker.service", "shadow.statistics.sequential", "rlv3.policy"])
def test_path_of_a_tick_imports_no_scipy(entry: str) -> None:
    assert chain_to(entry, {"scipy"}) is None


def test_worker_does_not_load_scipy() -> None:
    assert chain_to("worker.service", {"scipy"}) is None


HTTP = {"fastapi", "starlette", "uvicorn", "prometheus_client", "pydantic"}


def test_nothing_of_http_is_on_the_path_of_the_worker() -> None:
    assert chain_to("worker.service", HTTP) is None


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("rlv3", {"torch", "gymnasium", "redis"}),
        ("rlv3.cli", {"torch", "gymnasium", "redis"}),
        ("rlv3.policy", {"torch", "gymnasium", "redis"}),
        ("shadow.cli", {"torch", "gymnasium", "redis"}),
        ("worker.cli", {"torch", "gymnasium", *HTTP}),
        ("worker.service", {"torch", "gymnasium", "scipy", "duckdb", *HTTP}),
        ("worker.collector", {"torch", "gymnasium", "scipy"}),
        ("worker.api", {"torch", "gymnasium", "duckdb"}),
    ],
)
def test_import_loads_nothing_it_does_not_need(module: str, unwanted: set[str]) -> None:
    program = f"import sys, {module}; print(*({unwanted!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_public_names_come_from_the_top_of_rlv3() -> None:
    assert set(rlv3.__all__) >= PUBLIC
    for name in rlv3.__all__:
        assert getattr(rlv3, name).__module__.startswith("rlv3")


def _constants(tree: ast.Module) -> Iterator[ast.Constant]:
    """Yield the string constants that are no docstrings (a bare string is one, wherever it is)."""
    docs = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node


def test_key_names_are_spelt_in_one_module() -> None:
    spelt = re.compile(r":(stream|dlq|svc|rl_v3_shadow):|^quantum:")
    wrong = [
        f"{module}:{node.lineno} {node.value!r}"
        for module, tree in sources().items()
        if module != "worker.keys"
        for node in _constants(tree)
        if spelt.search(str(node.value))
    ]
    assert wrong == []


def test_no_exception_is_swallowed_blindly() -> None:
    wrong = []
    for module, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                caught = "" if node.type is None else ast.unparse(node.type)
                blind = not caught or re.search(r"\b(Base)?Exception\b", caught)
                if blind and ast.unparse(node.body[-1]) != "raise":
                    wrong.append(f"{module}:{node.lineno} except {caught}")
    assert wrong == []


def test_nothing_is_printed_past_the_console() -> None:
    wrong = [
        f"{module}:{node.lineno}"
        for module, tree in sources().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert wrong == []


def test_pickle_is_never_loaded() -> None:
    wrong = [m for m in sources() if top_level(m) & {"pickle", "cloudpickle", "joblib", "shelve"}]
    assert wrong == []


def test_environment_is_read_at_the_door() -> None:
    doors = {"worker.config", "worker.cli", "shadow.cli", "rlv3.cli", "worker.embedded"}
    wrong = [
        f"{module}:{node.lineno}"
        for module, tree in sources().items()
        if module not in doors
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
    ]
    assert wrong == []


PURE = (
    "rlv3.events", "rlv3.features", "rlv3.portfolio", "rlv3.reward", "shadow.codec", "shadow.drift",
    "shadow.pipeline", "shadow.symbol", "shadow.arms", "shadow.pairing", "shadow.mapping",
    "shadow.records", "shadow.statistics.sequential", "shadow.statistics.inference",
    "shadow.statistics.multiplicity", "shadow.statistics.agreement",
)  # fmt: skip


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_have_no_clock_no_logging_and_no_global_randomness(module: str) -> None:
    unwanted = {"time", "random", "secrets", "uuid", "logging", "structlog", "socket", "asyncio"}
    assert top_level(module) & unwanted == set()
    calls = {
        ast.unparse(node.func) for node in ast.walk(sources()[module]) if isinstance(node, ast.Call)
    }
    clocks = {"datetime.now", "datetime.utcnow", "open", "np.random.default_rng"}
    assert calls & clocks == set()
