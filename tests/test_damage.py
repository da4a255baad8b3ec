"""Damaged databases and data dirs that cannot be used."""

import random
import shutil
import signal
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import pytest
from conftest import PlayedQueue, StartServer, params_for, until
from crashing import OFFER, log_of, post, refusal
from fake_generator import FakeGenerator

from errors import ServerError, StoreError
from server import Server
from settings import Settings
from storage.task_store import TaskStore
from timing_model import TimingModel


def fill_data_dir(data_dir: Path) -> list[str]:
    """What a killed server leaves: tasks that wait, one that runs, some that are done."""
    store = TaskStore(data_dir)
    queue = PlayedQueue(OFFER, TimingModel(), store)
    ids = [
        queue.submit(params_for(f"{n} " * 200), priority=0, client_key=f"key {n}")[0].task_id
        for n in range(60)
    ]
    for n in range(9):
        task = queue.claim(0)
        assert task
        if n < 8:
            assert queue.finish(task.task_id, [b"image" * 1000])
    store.close()
    return ids


def bytes_for(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def damage(content: bytes) -> bytes:
        assert old in content
        return content.replace(old, new)

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: b"\xff" * 100 + content[100:], id="header"),
        pytest.param(lambda content: content[:100] + b"\xff" * 500 + content[600:], id="schema"),
        pytest.param(
            lambda content: content[:20000] + b"\xa5" * 9000 + content[29000:], id="middle"
        ),
        pytest.param(lambda content: content[:-5000] + b"\x00" * 5000, id="end"),
        pytest.param(lambda content: content[: len(content) // 2], id="cut in half"),
        pytest.param(lambda content: content[:1000], id="cut short"),
        pytest.param(lambda content: b"no database at all\n" * 1000, id="text"),
        pytest.param(bytes_for(b'"prompt":"', b'"prompt":\xff'), id="encoding of params"),
    ],
)
def test_a_damaged_database_is_refused_with_one_sentence(
    start_server: StartServer, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    data_dir = tmp_path / "server"
    fill_data_dir(data_dir)
    database = data_dir / "tasks.sqlite3"
    damaged = damage(database.read_bytes())
    database.write_bytes(damaged)
    log = refusal(start_server("--model", "noise-flux1", wait=False))
    assert f"The data dir {data_dir} cannot be used: " in log
    assert database.read_bytes() == damaged, "it stays as it is, for whoever wants to rescue it"


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(bytes_for(b'"tokens":', b'"toxins":'), id="timing samples"),
        pytest.param(bytes_for(b'"prompt":"50 ', b'"pro\x00pt":"50 '), id="params of one task"),
    ],
)
def test_a_damaged_record_does_not_affect_other_tasks(
    start_server: StartServer, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    data_dir = tmp_path / "server"
    ids = fill_data_dir(data_dir)
    database = data_dir / "tasks.sqlite3"
    database.write_bytes(damage(database.read_bytes()))
    server = start_server("--model", "noise-flux1")
    assert any("damaged" in line for line in server.log)
    assert server.wait_until_ended(ids[-1])["status"] == "done"
    assert server.get("/health").status_code == 200


def test_wherever_bytes_are_overwritten_the_start_is_refused_or_every_task_is_answered(
    tmp_path: Path,
) -> None:
    """In this process, for many places: nothing but the documented errors comes out."""
    pristine = tmp_path / "pristine"
    ids = fill_data_dir(pristine)
    refused = 0
    for seed in range(60):
        places = random.Random(seed)
        data_dir = tmp_path / str(seed)
        shutil.copytree(pristine, data_dir)
        content = bytearray((data_dir / "tasks.sqlite3").read_bytes())
        for _ in range(places.choice((1, 3, 10))):
            length = places.choice((1, 16, 64))
            at = places.randrange(len(content) - length)
            content[at : at + length] = places.randbytes(length)
        (data_dir / "tasks.sqlite3").write_bytes(content)
        arguments = ["--model", "noise-flux1", "--port", "0", "--data-dir", str(data_dir)]
        try:
            server = Server(Settings.read(arguments, {}), OFFER, FakeGenerator())
        except StoreError:
            refused += 1
            continue
        for task_id in ids:
            with suppress(ServerError):
                server.queue.status(task_id)
            with suppress(ServerError):
                server.queue.image_of(server.queue.status(task_id))
        server.queue.health()
        server.stop()
    assert refused > 20


def test_a_database_of_a_newer_version_is_refused_and_left_alone(
    start_server: StartServer, tmp_path: Path
) -> None:
    data_dir = tmp_path / "server"
    fill_data_dir(data_dir)
    database = data_dir / "tasks.sqlite3"
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA user_version = 99")
    content = database.read_bytes()
    log = refusal(start_server("--model", "noise-flux1", wait=False))
    assert "schema version 99" in log
    assert "newer version" in log
    assert database.read_bytes() == content


def test_a_second_server_on_the_same_data_dir_is_refused(
    start_server: StartServer, tmp_path: Path
) -> None:
    first = start_server("--model", "noise-flux1")
    second = start_server("--model", "noise-flux1", wait=False)
    assert f"Another server uses the data dir {tmp_path / 'server'}" in refusal(second)
    assert first.wait_until_ended(first.submit()["task_id"])["status"] == "done"
    first.stop(signal.SIGKILL)
    third = start_server("--model", "noise-flux1")
    assert third.get("/health").status_code == 200


@pytest.mark.parametrize("place", ["file", "file/below", "database/is/a/folder", "/proc/nowhere"])
def test_a_data_dir_that_cannot_be_used_is_refused_with_one_sentence(
    start_server: StartServer, tmp_path: Path, place: str
) -> None:
    if place.startswith("/proc") and sys.platform != "linux":
        pytest.skip("there is no /proc here")
    (tmp_path / "file").write_text("")
    data_dir = tmp_path / place
    if place.startswith("database"):
        (data_dir / "tasks.sqlite3").mkdir(parents=True)
    server = start_server("--model", "noise-flux1", "--data-dir", str(data_dir), wait=False)
    assert f"The data dir {data_dir} cannot be used: " in refusal(server)


def test_health_reports_that_the_data_dir_has_vanished(
    start_server: StartServer, tmp_path: Path
) -> None:
    server = start_server("--model", "noise-flux1")
    server.wait_until_ended(server.submit()["task_id"])
    shutil.rmtree(tmp_path / "server")
    post(server)
    until(lambda: server.get("/health").status_code != 200)
    health = server.get("/health")
    assert (health.status_code, health.json().get("status")) == (503, "failed")
    assert "Traceback" not in log_of(server)
