"""Faults of the disk below a running server and at its start, made with means of the system."""

import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import GIVE_UP_S, StartServer
from faulty_disk import SIDE, Mount, Start, starting
from small_disk import fill_disk

from errors import StorageUnavailable
from workers import encoder


@pytest.fixture
def start(mount: Mount, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    yield from starting(monkeypatch)


# -- a full disk ----------------------------------------------------------------------------------


def test_health_is_failed_steadily_until_there_is_room_and_no_picture_is_lost(
    start: Start, mount: Mount
) -> None:
    disk = mount("size=8m")
    bench = start(disk / "data")
    running, waiting = bench.submit(), bench.submit()
    assert bench.drawing.wait(GIVE_UP_S)
    filler = fill_disk(disk, spare_bytes=300_000)  # the database finds room, a picture does not
    bench.draw(1)
    bench.until_failed()
    for _ in range(20):
        with pytest.raises(StorageUnavailable):
            bench.queue._scheduler.check_storage()
        bench.assert_failed("No space left on device")
        bench.assert_refuses_tasks()
        assert bench.status(running)["status"] == "running"
        assert bench.status(waiting)["status"] in ("waiting", "running")
    filler.unlink()
    bench.draw()
    for task_id in (running, waiting):
        assert bench.ended(task_id)["status"] == "done"
        assert len(bench.get("/image", task_id=task_id).content) > SIDE * SIDE * 3
    bench.until_works()
    assert bench.ended(bench.submit())["status"] == "done"


def test_room_for_a_picture_alone_is_not_enough_to_accept_tasks(start: Start, mount: Mount) -> None:
    disk = mount("size=8m")
    bench = start(disk / "data")
    running = bench.submit()
    assert bench.drawing.wait(GIVE_UP_S)
    filler = fill_disk(disk, spare_bytes=300_000)
    bench.draw(1)
    bench.until_failed()
    with filler.open("rb+") as file:
        file.truncate(filler.stat().st_size - 1_300_000)
    assert bench.ended(running)["status"] == "done"
    with pytest.raises(StorageUnavailable):
        bench.queue._scheduler.check_storage()
    bench.assert_refuses_tasks()


def test_a_picture_that_finds_no_room_for_long_fails_its_task_with_the_reason(
    start: Start, mount: Mount, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder, "STORE_FOR_S", 0.0)
    disk = mount("size=8m")
    bench = start(disk / "data")
    running, following, waiting = bench.submit(), bench.submit(), bench.submit()
    assert bench.drawing.wait(GIVE_UP_S)
    filler = fill_disk(disk, spare_bytes=300_000)
    bench.draw(1)
    status = bench.ended(running)
    assert (status["status"], status["error"]["code"]) == ("failed", "storage_unavailable")
    assert "No space left on device" in status["error"]["message"]
    bench.assert_failed("No space left on device")
    assert bench.status(waiting)["status"] == "waiting", "it does not run into the same fault"
    filler.unlink()
    bench.draw()
    assert bench.ended(following)["status"] == "done"
    assert bench.ended(waiting)["status"] == "done"


def test_deleting_a_picture_makes_room_on_a_full_disk(start: Start, mount: Mount) -> None:
    disk = mount("size=8m")
    bench = start(disk / "data")
    first, second = bench.done(), bench.done()
    running = bench.submit()
    assert bench.drawing.wait(GIVE_UP_S)
    fill_disk(disk)
    bench.draw(1)
    bench.until_failed()
    assert bench.get("/image", task_id=second, delete="false").status_code == 200
    for task_id in (first, second):
        answer = bench.delete(task_id)
        assert (answer.status_code, answer.json().get("was")) == (200, "done")
        assert bench.get("/status", task_id=task_id).status_code == 410
    assert bench.ended(running)["status"] == "done"


# -- a start on a disk that refuses ---------------------------------------------------------------


@contextmanager
def full(disk: Path) -> Iterator[None]:
    filler = fill_disk(disk)
    try:
        yield
    finally:
        filler.unlink()


@contextmanager
def read_only(disk: Path) -> Iterator[None]:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [(full, "No space left on device"), (read_only, "Read-only file system")],
)
def test_a_start_on_a_disk_that_refuses_serves_what_is_there_and_recovers(
    start: Start,
    mount: Mount,
    fault: Callable[[Path], Any],
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    disk = mount("size=8m")
    bench = start(disk / "data")
    done = bench.done()
    image = bench.get("/image", task_id=done, delete="false").content
    running, waiting = bench.submit(), bench.submit()
    assert bench.drawing.wait(GIVE_UP_S)
    bench.stop()
    with fault(disk):
        bench = start(disk / "data")
        bench.assert_failed(reason)
        assert reason in caplog.text
        bench.assert_refuses_tasks()
        assert {bench.status(task_id)["status"] for task_id in (running, waiting)} == {"waiting"}
        assert bench.status(done)["status"] == "done"
        assert bench.get("/image", task_id=done, delete="false").content == image
        assert bench.get("/health").json()["done"] == 1
        if fault is read_only:
            answer = bench.delete(done)
            assert (answer.status_code, answer.json()["error"]["code"]) == (
                503,
                "storage_unavailable",
            )
            assert bench.get("/image", task_id=done, delete="false").content == image
        else:
            assert bench.delete(done).status_code == 200
            assert bench.get("/status", task_id=done).status_code == 410
        assert not bench.drawing.is_set(), "nothing is drawn that could not be stored"
    bench.draw()
    bench.until_works()
    for task_id in (running, waiting, bench.submit()):
        assert bench.ended(task_id)["status"] == "done"


def test_a_start_on_a_full_disk_counts_the_attempts_of_tasks_that_ran(
    start: Start, mount: Mount
) -> None:
    """A task during which the process ended twice is failed also if the disk was full meanwhile."""
    disk = mount("size=8m")
    bench = start(disk / "data")
    bench.done()
    running = bench.submit()
    assert bench.drawing.wait(GIVE_UP_S)
    bench.stop()
    with closing(sqlite3.connect(disk / "data" / "tasks.sqlite3")) as database, database:
        database.execute(
            "UPDATE tasks SET status = 'running', attempt = 2, interruptions = 1 WHERE task_id = ?",
            (running,),
        )
    with full(disk):
        bench = start(disk / "data")
        bench.assert_failed("No space left on device")
    bench.until_works()
    status = bench.ended(running)
    assert (status["status"], status["error"]["code"]) == ("failed", "ended_too_often")


# -- a full temp dir ------------------------------------------------------------------------------


def test_a_server_starts_with_a_full_temp_dir_and_ends_every_task(
    start_server: StartServer, mount: Mount
) -> None:
    disk = mount("size=1m")
    fill_disk(disk)
    server = start_server("--model", "noise-flux1", environment={"TMPDIR": str(disk)})
    status = server.wait_until_ended(server.submit()["task_id"])
    # Without a GPU, MLX compiles in the temp dir.
    assert status["status"] == "done" or "compil" in status["error"]["message"]
    assert server.get("/health").status_code == 200
