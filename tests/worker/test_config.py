"""Do flags beat the environment and the file, and is every mistake named?"""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from rlv3.errors import ConfigError
from shadow.records import REPLAY, LedgerRow, Output
from worker import logs
from worker.config import WorkerConfig, load_config
from worker.keys import INPUTS, OPTIONAL_INPUTS


def test_defaults_are_the_dataclass() -> None:
    assert load_config({}, {}) == WorkerConfig()
    assert WorkerConfig().inputs == (*INPUTS, REPLAY)
    assert (WorkerConfig().max_event_age, WorkerConfig().conflate_after) == (120.0, 1000.0)


def test_flag_beats_environment_beats_file(tmp_path: Path) -> None:
    file = tmp_path / "worker.toml"
    file.write_text('prefix = "file"\nstart = "oldest"\ncodec = "msgpack"\nmax_batch = 7\n')
    environ = {"RLV3_PREFIX": "environment", "RLV3_START": "new", "RLV3_CONFIG": str(file)}
    config = load_config({"prefix": "flag", "start": None}, environ)
    assert (config.prefix, config.start, config.codec) == ("flag", "new", "msgpack")
    assert config.max_batch == 7
    assert load_config({}, environ | {"RLV3_PREFIX": ""}).prefix == "file"


@pytest.mark.parametrize(
    ("flags", "environ", "source", "sink"),
    [
        ({}, {}, "redis://localhost:6379/0", "redis://localhost:6379/0"),
        ({}, {"REDIS_URL": "redis://a:1/2"}, "redis://a:1/2", "redis://a:1/2"),
        ({}, {"REDIS_HOST": "h"}, "redis://h:6379/0", "redis://h:6379/0"),
        (
            {},
            {"REDIS_PORT": "7000", "REDIS_DB": "3", "REDIS_PASSWORD": "p@/s"},
            "redis://:p%40%2Fs@localhost:7000/3",
            "redis://:p%40%2Fs@localhost:7000/3",
        ),
        ({}, {"REDIS_URL": "redis://a/0", "REDIS_HOST": "h"}, "redis://a/0", "redis://a/0"),
        ({"redis_url": "redis://f/0"}, {"REDIS_URL": "redis://a/0"}, "redis://f/0", "redis://f/0"),
        ({"sink_url": "unix:///s"}, {"REDIS_URL": "redis://a/0"}, "redis://a/0", "unix:///s"),
        (
            {},
            {"RLV3_SOURCE_URL": "redis://o/0", "REDIS_URL": "redis://a/0"},
            "redis://o/0",
            "redis://a/0",
        ),
    ],
)
def test_where_redis_is(
    flags: dict[str, str], environ: dict[str, str], source: str, sink: str
) -> None:
    config = load_config(flags, environ)
    assert (config.source_url, config.sink_url) == (source, sink)


def test_lists_switches_and_off() -> None:
    config = load_config(
        {
            "inputs": "trade.intent, ai.decision.made",
            "tick_sources": "market-publisher,other",
            "max_event_age": "off",
            "conflate_after": "250",
            "allow_untrained": True,
        },
        {"RLV3_LATENCY_MS": "0", "LOGLEVEL": "warn"},
    )
    assert config.inputs == (*INPUTS, "ai.decision.made", "trade.intent", REPLAY)  # in rank order
    assert config.tick_sources == {"market-publisher", "other"}
    assert (config.max_event_age, config.conflate_after) == (None, 250.0)
    assert (config.allow_untrained, config.latency_ms, config.log_level) == (True, 0, "WARNING")
    assert load_config({"inputs": "all"}, {}).inputs == (*INPUTS, *OPTIONAL_INPUTS, REPLAY)


def test_live_mode_of_production_is_not_read() -> None:
    live = {"QT_RL_V3_ENABLED": "true", "QT_RL_V3_SHADOW_MODE": "false", "RL_V3_MODE": "PRIMARY"}
    assert load_config({}, live) == WorkerConfig()


@pytest.mark.parametrize(
    ("flags", "environ", "sentence"),
    [
        ({"start": "middle"}, {}, "--start must be one of new, oldest, was 'middle'"),
        ({"on_gap": "x"}, {}, "--on-gap must be one of resume-oldest, resume-latest, fail"),
        ({}, {"RLV3_MAX_EVENT_AGE": "-1"}, "RLV3_MAX_EVENT_AGE must be seconds > 0 or off"),
        ({"conflate_after": "nan"}, {}, "--conflate-after must be milliseconds > 0 or off"),
        ({}, {"REDIS_PORT": "x"}, "REDIS_PORT must be a whole number 0 to 65535, was 'x'"),
        ({}, {"REDIS_URL": "http://u:pw@h"}, "REDIS_URL must start with redis://.* was 'h'"),
        ({"redis_url": "h:1"}, {}, "--redis-url must start with redis://"),
        ({}, {"LOG_LEVEL": "LOUD"}, "LOG_LEVEL must be one of DEBUG, INFO"),
        ({"inputs": "market.tock"}, {}, "--inputs must be all or among .*, was 'market.tock'"),
        ({"tick_sources": " ,"}, {}, "--tick-sources must name at least one"),
        ({"prefix": "a b"}, {}, "--prefix must be 1 to 64 letters"),
        ({"max_batch": "0"}, {}, "--max-batch must be a whole number 1 to 64, was '0'"),
        ({"max_batch": "65"}, {}, "--max-batch must be a whole number 1 to 64, was '65'"),
        ({}, {"RLV3_ALLOW_UNTRAINED": "maybe"}, "RLV3_ALLOW_UNTRAINED must be one of 1, true"),
        ({}, {"RLV3_CONFIG": "/nowhere"}, "expected a TOML file at /nowhere"),
    ],
)
def test_mistakes_are_named(flags: dict[str, Any], environ: dict[str, str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        load_config(flags, environ)
    assert caught.value.exit_code == 2
    assert "pw" not in str(caught.value)


def test_unknown_and_wrong_settings_of_a_file_are_named(tmp_path: Path) -> None:
    file = tmp_path / "worker.toml"
    file.write_text("prefx = 'a'\n")
    with pytest.raises(ConfigError, match=r"in .*worker\.toml, found prefx"):
        load_config({}, {}, file)
    file.write_text("inputs = [1]\n")
    with pytest.raises(ConfigError, match=r"inputs in .*worker\.toml must be a list of names"):
        load_config({}, {}, file)


def test_log_lines_have_the_shape_of_production() -> None:
    out = StringIO()
    log = logs.configure("INFO", out)
    log.debug("UNSEEN", msg="")
    log.info("SOMETHING_HAPPENED", msg="text", symbol="BTCUSDT", entries=3)
    (line,) = out.getvalue().splitlines()
    stamp = line[8 : line.index("Z")]
    assert line == (
        f'{{"ts": "{stamp}Z", "level": "INFO", "service": "rl_v3_shadow", '
        '"event": "SOMETHING_HAPPENED", "correlation_id": "", "msg": "text", '
        '"symbol": "BTCUSDT", "extra": {"entries": 3}}'
    )
    assert len(stamp) == len("2026-01-01T00:00:00.000000")


def test_dead_letters_are_logged_once_a_minute_and_stream() -> None:
    out = StringIO()
    lines = logs.DeadLetterLines(logs.configure("INFO", out))
    for second, stream in ((0.0, "a"), (1.0, "a"), (2.0, "b"), (59.0, "a"), (60.0, "a")):
        letter = {
            "dlq_reason": "missing_symbol", "dlq_error": "expected a symbol, found none",
            "dlq_source_stream": f"quantum:stream:{stream}", "dlq_source_id": f"{second:.0f}-0",
        }  # fmt: skip
        lines.note(Output(f"dlq:{stream}", json.dumps(letter).encode(), "t-1", "c-1"), second)
    found = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [(line["event"], line["level"]) for line in found] == [
        ("ENTRY_DEAD_LETTERED", "WARNING")
    ] * 3
    # the two at 1 s and 59 s are counted with the one at 60 s
    assert [(line["extra"]["entry_id"], line["extra"]["letters"]) for line in found] == [
        ("0-0", 1), ("2-0", 1), ("60-0", 3),
    ]  # fmt: skip
    assert {(line["correlation_id"], line["extra"]["trace_id"]) for line in found} == {
        ("c-1", "t-1")
    }


def test_rows_that_compare_nothing_are_not_logged() -> None:
    out = StringIO()
    row = LedgerRow("id", "run", "", 0, "minute", {}, (), "digest")
    logs.log_comparison(logs.configure("DEBUG", out), row)
    assert out.getvalue() == ""
