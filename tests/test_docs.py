"""Do the pages under docs/ still say what the code says?"""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest
from typer.main import get_command

import rlv3.cli
import shadow.cli
import worker.cli
from rlv3.features import FEATURES, WARM_BARS
from shadow import records
from worker.keys import ALL_INPUTS, Keys

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_are_what_the_code_says(page: Path, tables: ModuleType) -> None:
    text = page.read_text("utf-8")
    assert text == tables.render(text), "run: python docs/tables.py"


def test_every_feature_has_a_row() -> None:
    text = (ROOT / "docs" / "features.md").read_text("utf-8")
    rows = re.findall(r"^\| (\d+) \| `(\w+)`", text, re.MULTILINE)
    assert rows == [(str(i), feature.name) for i, feature in enumerate(FEATURES)]


@pytest.mark.parametrize("name", ["features.md", "operations.md"])
def test_warm_up_is_as_long_as_the_code_says(name: str) -> None:
    assert f"{WARM_BARS} closed bars" in (ROOT / "docs" / name).read_text("utf-8")


def test_contracts_have_every_record_and_every_field_has_a_meaning() -> None:
    text = (ROOT / "docs" / "contracts.md").read_text("utf-8")
    structs = [records.Decision, records.ArmBar, *get_args(records.Comparison)]
    for struct in structs:
        table = text.partition(f"<!-- table: {struct.__name__} -->")[2].partition("<!-- end")[0]
        rows = dict(re.findall(r"^\| `(\w+)` \|[^|]*\| (.*) \|$", table, re.MULTILINE))
        if struct.__struct_config__.tag:
            del rows["kind"]
        assert tuple(rows) == struct.__struct_fields__, struct.__name__
        assert [name for name, meaning in rows.items() if not meaning.strip()] == []


def test_contracts_name_every_stream_and_key() -> None:
    text = (ROOT / "docs" / "contracts.md").read_text("utf-8")
    keys = Keys("PREFIX")
    single = {name for name, attr in vars(Keys).items() if isinstance(attr, property)} - {"own"}
    names = {*ALL_INPUTS, *(getattr(keys, name) for name in single)}
    names |= {keys.state("<SYMBOL>"), keys.artifact("<sha256>"), keys.dlq("<input event type>")}
    assert [name for name in names if f"`{name}`" not in text] == []


def folders(place: str) -> set[str]:
    """Return the names of the folders in one of ours."""
    return {f.name for f in (ROOT / place).iterdir() if f.is_dir() and f.name != "__pycache__"}


def test_the_layout_names_every_folder() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    layout = set(
        re.findall(
            r"[a-z0-9]+",
            text.partition("## Layout")[2].partition("\n\n    ")[2].partition("\n\n")[0],
        )
    )
    wanted = folders("deploy") | (folders("shadow") - {"data"}) | folders("tests") - {"fixtures"}
    assert wanted - layout == set()


def test_every_file_to_deploy_is_described() -> None:
    text = (ROOT / "deploy" / "README.md").read_text("utf-8")
    described = re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
    files = [f for f in (ROOT / "deploy").rglob("*") if f.is_file() and f.name != "README.md"]
    assert [f.name for f in files if not any(f.match(pattern) for pattern in described)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text("utf-8"))
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    wanted = {
        re.split(r"[<>=;\[ ]", requirement)[0]
        for group in (project["dependencies"], *extras)
        for requirement in group
    }
    text = (ROOT / "docs" / "adr" / "0001-dependencies.md").read_text("utf-8")
    assert set(re.findall(r"^\| (\w[\w-]*) \| (?!where)", text, re.MULTILINE)) == wanted - {
        project["name"]
    }


def test_constraints_pin_every_dependency_exactly() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    pins = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    names = {line.partition("==")[0].lower() for line in pins if not line.startswith("#")}
    assert all(re.fullmatch(r"#.*|[\w.-]+==[\w.]+", line) for line in pins)
    for group in (project["dependencies"], *project["optional-dependencies"].values()):
        for requirement in group:
            name = re.split(r"[<>=;\[ ]", requirement)[0].lower()
            assert name in names | {project["name"]}, name
    assert "setuptools" in names


PROGRAMS = {
    "rlv3": get_command(rlv3.cli.app),
    "rlv3-worker": get_command(worker.cli.app),
    "rlv3-shadow": get_command(shadow.cli.app),
}


def options_of(program: str, *words: str) -> set[str]:
    """Return every option of a command, or of a command's command, but `--help`'s shorthand."""
    command = PROGRAMS[program].commands[words[0]]
    if words[1:] and words[1] in getattr(command, "commands", ()):
        command = command.commands[words[1]]
    return {opt for param in command.params for opt in param.opts}


def test_readme_names_every_command_and_no_other() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    named: dict[str, set[str]] = {program: set() for program in PROGRAMS}
    for cell in re.findall(r"^\| (`rlv3[^|]*) \|", text, re.MULTILINE):
        program, *commands = re.findall(r"[a-z][a-z0-9-]*", cell)
        named[program].update(commands)
    assert named == {program: set(group.commands) for program, group in PROGRAMS.items()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_command_lines_use_options_that_exist(page: Path) -> None:
    wrong = []
    for line in re.findall(
        r"(?:^    |`)((?:rlv3|rlv3-\w+) [^`\n]+)", page.read_text("utf-8"), re.MULTILINE
    ):
        program, command, *rest = line.split()
        if command.rstrip(",") not in PROGRAMS[program].commands:
            continue  # a list of commands; the README's is checked above
        known = options_of(program, command.rstrip(","), *rest) | {"--help"}
        wrong += [f"{line}: {word}" for word in rest if word.startswith("--") and word not in known]
    assert wrong == []


@pytest.mark.parametrize("unit", sorted((ROOT / "deploy" / "systemd").glob("*.service")))
def test_units_start_a_command_with_options_that_exist(unit: Path) -> None:
    line = re.search(r"^ExecStart=\S+/(\S+) (.*)$", unit.read_text("utf-8"), re.MULTILINE)
    assert line is not None
    command, *rest = line[2].split()
    options = {word for word in rest if word.startswith("--")}
    assert options <= options_of(line[1], command)
