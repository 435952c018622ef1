"""Questions to a store: the documented ones are answered, bad ones are refused in a sentence."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from rlv3.errors import DataError
from rlv3.market import simulate
from rlv3.policy import Policy
from shadow import sql
from shadow.backtest import backtest
from shadow.store import StoreReader

PAGE = Path(__file__).parents[2] / "docs" / "analyst.md"
QUERIES = re.findall(r"^```sql\n(.*?)^```", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def store(make_policy: Callable[..., Policy], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sql") / "store"
    bars = [
        simulate("regime_switching", 200, seed=i, symbol=symbol)
        for i, symbol in enumerate(("AAAUSDT", "BBBUSDT"))
    ]
    backtest(make_policy(seed=2), bars, store_dir=directory)
    return directory


def test_ten_questions_are_documented() -> None:
    assert len(QUERIES) == 10


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.split("FROM")[-1].split()[0])
def test_documented_question_has_an_answer(query: str, store: Path) -> None:
    with sql.connect(store) as connection:
        rows = connection.execute(query).fetchall()
    assert rows
    assert not any(all(value is None for value in row) for row in rows)


def test_every_view_is_documented_and_says_what_it_is(store: Path) -> None:
    text = PAGE.read_text("utf-8")
    with sql.connect(store) as connection:
        found = dict(
            connection.execute(
                "SELECT view_name, comment FROM duckdb_views() WHERE NOT internal"
            ).fetchall()
        )
    for name, (meaning, _) in sql.VIEWS.items():
        assert found[name] == meaning
        assert f"| `{name}` |" in text


def test_differences_are_net_returns_of_v3_minus_those_of_v2(store: Path) -> None:
    query = (
        "SELECT v3_gross, v3_fee, v3_slippage, v2_gross, v2_fee, v2_slippage FROM bars "
        "ORDER BY event_ts_us, symbol"
    )
    with sql.connect(store) as connection:
        rows = connection.execute(query).fetchall()
        d = connection.execute("SELECT d FROM differences ORDER BY event_ts_us, symbol").fetchall()
        by_arm = dict(
            connection.execute("SELECT arm, sum(net) FROM arm_bars GROUP BY 1").fetchall()
        )
    assert [(a - b - c) - (e - f - g) for a, b, c, e, f, g in rows] == [value for (value,) in d]
    assert by_arm["v3"] - by_arm["v2"] == pytest.approx(sum(value for (value,) in d), abs=1e-12)
    assert by_arm["flat"] == 0.0


def test_steps_are_joined_with_the_bar_they_closed(store: Path) -> None:
    with sql.connect(store) as connection:
        steps, bars = connection.execute(
            "SELECT (SELECT count(*) FROM steps), (SELECT count(*) FROM bars)"
        ).fetchall()[0]
    assert steps == bars == 2 * 199


def test_answers_come_as_csv_and_as_json(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    query = (
        "SELECT symbol, count(*) AS n, max(event_time) AS newest FROM bars GROUP BY 1 ORDER BY 1"
    )
    with sql.connect(store) as connection:
        sql.answer(connection, query, "csv")
        rows = list(csv.reader(io.StringIO(capsys.readouterr().out)))
        sql.answer(connection, query, "json")
        lines = capsys.readouterr().out.splitlines()
    assert [row[:2] for row in rows] == [["symbol", "n"], ["AAAUSDT", "199"], ["BBBUSDT", "199"]]
    assert [json.loads(line)["n"] for line in lines] == [199, 199]


def test_a_long_table_says_that_it_was_cut(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with sql.connect(store) as connection:
        sql.answer(connection, "SELECT symbol FROM bars", "table")
    assert "the first 200 rows; --csv prints all" in capsys.readouterr().out


def test_a_query_that_makes_no_sense_is_refused(store: Path) -> None:
    with (
        sql.connect(store) as connection,
        pytest.raises(DataError, match="expected a query that DuckDB understands, found: Parser"),
    ):
        sql.answer(connection, "SELEC 1", "table")


def test_asking_changes_nothing_in_the_store(store: Path) -> None:
    before = StoreReader(store).check()
    with sql.connect(store) as connection, pytest.raises(DataError, match="Can only delete"):
        sql.answer(connection, "DELETE FROM bars", "table")
    assert StoreReader(store).check() == before
