"""The log: its lines, its forms, what it must not contain; and the last error of /health."""

import io
import json
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from conftest import PlayedQueue, ServerProcess, allow, params_for
from played_app import PlayedApp

from log_output import TEXT, JsonFormatter, PrintedLines, TextFormatter
from scheduler.health import ERROR_KEPT_S, Cause, Health
from storage.task_store import TaskStore
from timing_model import TimingModel
from version import VERSION, commit


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[PlayedApp]:
    bench = PlayedApp(tmp_path)
    yield bench
    bench.store.close()


def test_each_event_of_a_task_is_a_line_at_info(
    bench: PlayedApp, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    done = bench.submit("alice")
    bench.run()
    failed, third = bench.submit("bob"), bench.submit("alice")
    fourth = bench.submit("alice")
    bench.fail()
    lines = [(record.levelname, record.getMessage()) for record in caplog.records]
    for expected in (
        f"task {done} is submitted by alice: done in about ",
        f"task {done} is running: ",
        f"task {done} is done 8.0 s after its submit (forecast: ",
        f"task {failed} is submitted by bob: done in about ",
        f"task {failed} failed: It broke.",
    ):
        assert [line for level, line in lines if level != "DEBUG" and line.startswith(expected)]
    ends = {line.partition(" s; ")[2] for _, line in lines if "is submitted by" in line}
    assert ends == {"", "1 other task is unfinished", "2 other tasks are unfinished"}
    assert not {done, failed} & {third, fourth}


def test_where_there_are_no_clients_the_line_names_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    store = TaskStore(tmp_path)
    queue = PlayedQueue(allow("noise-flux1"), TimingModel(), store)
    queue.submit(params_for())
    line = next(line for line in caplog.messages if "is submitted" in line)
    assert re.fullmatch(r"task \w+ is submitted: done in about [\d.]+ s", line)
    store.close()


def test_each_request_is_a_line_at_debug_without_its_query(
    bench: PlayedApp, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "mflux-server.requests")
    bench.ask("alice", "GET", "/queue", query_string={"limit": "7"})
    bench.ask("alice", "GET", "/none")
    records = [record for record in caplog.records if record.name == "mflux-server.requests"]
    assert [record.levelname for record in records] == ["DEBUG", "DEBUG"]
    assert records[0].getMessage().startswith("GET /queue 200 ")
    assert "limit" not in records[0].getMessage()
    assert vars(records[0])["client"] == "alice"
    assert records[1].getMessage().startswith("GET /none 404 ")


def record_of(**fields: Any) -> logging.LogRecord:
    return logging.getLogger("x").makeRecord(
        "x", logging.INFO, "file.py", 1, "task %s is done", ("5",), fields.pop("error", None),
        extra=fields,
    )  # fmt: skip


def test_a_json_line_has_time_level_message_and_the_fields_of_the_event() -> None:
    line = json.loads(JsonFormatter().format(record_of(task_id="5", seconds=1.5)))
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "info",
        "logger": "x",
        "message": "task 5 is done",
        "task_id": "5",
        "seconds": 1.5,
    }


def test_an_exception_is_part_of_its_json_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        text = JsonFormatter().format(record_of(error=sys.exc_info()))
    assert "\n" not in text
    assert "ValueError: two\nlines" in json.loads(text)["exception"]


def test_a_message_cannot_make_lines_of_its_own_or_change_a_terminal() -> None:
    record = logging.makeLogRecord(
        {"name": "x", "msg": "prompt: %s", "args": ("a\n2026-01-01 forged\x1b[2Jé\u2028",)}
    )
    line = TextFormatter(TEXT).format(record)
    assert line.endswith(r"x: prompt: a\n2026-01-01 forged\x1b[2Jé\u2028")
    assert line.isprintable()


def test_what_is_printed_becomes_lines_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with redirect_stdout(PrintedLines()):
        print("one", "line")
        print("half a ", end="")
        print("line")
        print("\r 10%|#", end="")
        print("\r 20%|##\n", end="")
    assert [record.getMessage() for record in caplog.records] == [
        "one line",
        "half a line",
        " 10%|#",
        " 20%|##",
    ]
    assert isinstance(sys.stdout, io.TextIOBase)


def log_of(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """The JSON lines of a real server that draws one picture."""
    server = ServerProcess(folder, "--model", "noise-flux1", "--log-format", "json", *arguments)
    server.wait_until_ended(server.submit(prompt="a secret lighthouse")["task_id"])
    assert server.stop() == 0
    return [json.loads(line) for line in server.log]


def test_the_log_of_a_server_is_json_without_prompts(tmp_path: Path) -> None:
    lines = log_of(tmp_path, "--log-level", "debug")
    assert [line for line in lines if line["message"].endswith("is running") or "task_id" in line]
    assert [line for line in lines if line.get("path") == "/generate" and line["status"] == 200]
    assert not [line for line in lines if "lighthouse" in json.dumps(line)]


def test_prompts_are_logged_if_the_operator_wants_it(tmp_path: Path) -> None:
    lines = log_of(tmp_path, "--log-prompts")
    assert [line for line in lines if line["message"].endswith(": a secret lighthouse")]


def test_the_last_error_has_a_time_and_goes_when_a_task_succeeds(bench: PlayedApp) -> None:
    bench.submit("alice")
    failed = bench.fail()
    at = bench.at
    bench.at += 60.0
    health = bench.json("root", "GET", "/health")
    assert health["last_error"] == f"task {failed}: task_failed"
    assert health["last_error_at"] == at
    bench.submit("alice")
    bench.run()
    assert not {"last_error", "last_error_at"} & set(bench.json("root", "GET", "/health"))


@pytest.mark.parametrize("cause", Cause)
def test_an_error_is_over_when_the_same_succeeds_or_after_an_hour(cause: Cause) -> None:
    at = [1000.0]
    health = Health(lambda: at[0])
    health.failed(cause, "It broke.")
    for other in set(Cause) - {cause}:
        health.succeeded(other)
    assert health.last_error
    assert health.last_error.message == "It broke."
    at[0] += ERROR_KEPT_S
    assert (health.last_error is None) == (cause is not Cause.DISK)
    health.failed(cause, "It broke again.")
    health.succeeded(cause)
    assert health.last_error is None


def test_health_has_the_version_for_those_with_a_key(bench: PlayedApp) -> None:
    health = bench.json("alice", "GET", "/health")
    assert health["version"] == VERSION
    assert health.get("commit", "") == commit()
    assert not {"version", "commit"} & set(bench.json("", "GET", "/health"))
