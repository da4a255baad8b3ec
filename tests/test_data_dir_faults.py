"""Faults of a data dir below a running server: read-only, moved, locked, damaged, readable."""

import os
import shutil
import sqlite3
import stat
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import pytest
from conftest import GIVE_UP_S, until
from faulty_disk import Mount, Start, starting

from errors import StorageUnavailable


@pytest.fixture
def start(mount: Mount, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    yield from starting(monkeypatch)


@contextmanager
def immutable(data_dir: Path) -> Iterator[None]:
    """Nothing in it can be changed, created or removed, not even by root. Without the file that
    SQLite maps into memory: for that, the system would end the process."""
    tool = shutil.which("chattr")
    if tool is None:
        pytest.skip("this test needs chattr")
    database = data_dir / "tasks.sqlite3"
    paths = [data_dir / "images", data_dir / "inputs", database, f"{database}-wal", data_dir]
    made = subprocess.run([tool, "+i", *map(str, paths)], capture_output=True, check=False)
    try:
        if made.returncode != 0:
            pytest.skip("this test must be allowed to make files immutable")
        yield
    finally:
        subprocess.run([tool, "-i", *map(str, paths)], capture_output=True, check=False)


@pytest.fixture
def on_a_disk() -> Iterator[Path]:
    """A folder outside the RAM disk, where open files stay writable whatever their flags."""
    with tempfile.TemporaryDirectory(prefix="mflux-server-") as folder:
        yield Path(folder)


def test_a_data_dir_that_becomes_read_only_is_noticed_and_recovered_from(
    start: Start, on_a_disk: Path
) -> None:
    bench = start(on_a_disk / "data")
    done = bench.done()
    running, waiting = bench.submit(), bench.submit()
    assert bench.drawing.wait(GIVE_UP_S)
    with immutable(on_a_disk / "data"):
        bench.draw(1)
        bench.until_failed()
        bench.assert_refuses_tasks()
        answer = bench.delete(done)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "storage_unavailable")
        assert bench.get("/image", task_id=done, delete="false").status_code == 200
        assert bench.status(running)["status"] == "running"
        assert bench.status(waiting)["status"] == "waiting"
    bench.draw()
    for task_id in (running, waiting):
        assert bench.ended(task_id)["status"] == "done"
    bench.until_works()


def test_a_data_dir_that_is_moved_away_is_noticed_and_nothing_is_accepted_until_it_is_back(
    start: Start, tmp_path: Path
) -> None:
    data_dir, aside = tmp_path / "data", tmp_path / "aside"
    bench = start(data_dir)
    done = bench.done()
    running, waiting = bench.submit(), bench.submit()
    assert bench.drawing.wait(GIVE_UP_S)
    data_dir.rename(aside)
    answer = bench.post()
    assert answer.json()["error"]["code"] == "storage_unavailable"
    bench.assert_failed("was removed or replaced")
    shutil.copytree(aside, data_dir)  # the same content, and yet not what the server writes to
    with pytest.raises(StorageUnavailable):
        bench.queue._scheduler.check_storage()
    bench.assert_refuses_tasks()
    bench.draw()
    assert bench.status(running)["status"] == "running"
    assert bench.status(waiting)["status"] == "waiting"
    assert bench.status(done)["status"] == "done"
    shutil.rmtree(data_dir)
    aside.rename(data_dir)
    for task_id in (running, waiting):
        assert bench.ended(task_id)["status"] == "done"
    bench.until_works()


def test_an_idle_server_notices_that_its_data_dir_was_removed(start: Start, tmp_path: Path) -> None:
    bench = start(tmp_path / "data")
    bench.done()
    shutil.rmtree(tmp_path / "data")
    bench.until_failed()
    bench.assert_failed("was removed or replaced")
    bench.assert_refuses_tasks()


@contextmanager
def locked(data_dir: Path) -> Iterator[None]:
    with closing(sqlite3.connect(data_dir / "tasks.sqlite3", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


def test_while_the_database_is_locked_reads_answer_and_nothing_is_lost(
    start: Start, tmp_path: Path
) -> None:
    bench = start(tmp_path / "data", "--refetch-s", "0")
    done, fetched, deleted = bench.done(), bench.done(), bench.done()
    running, waiting = bench.submit(), bench.submit()
    assert bench.drawing.wait(GIVE_UP_S)
    with locked(tmp_path / "data"):
        assert bench.post().json()["error"]["code"] == "storage_unavailable"
        bench.assert_failed("database is locked")
        bench.assert_refuses_tasks()
        assert bench.status(running)["status"] == "running"
        assert bench.status(waiting)["status"] == "waiting"
        assert bench.status(done)["status"] == "done"
        assert bench.get("/image", task_id=done, delete="false").status_code == 200
        assert bench.get("/image", task_id=fetched).status_code == 200
        answer = bench.delete(waiting)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "storage_unavailable")
        assert bench.delete(deleted).status_code == 200
        for task_id in (fetched, deleted):
            until(partial(bench.is_gone, task_id))
            assert bench.get("/image", task_id=task_id).status_code == 410
            assert bench.delete(task_id).status_code == 410
        assert bench.get("/health").json()["done"] == 1
    bench.draw()
    for task_id in (running, waiting):
        assert bench.ended(task_id)["status"] == "done"
    bench.until_works()
    with closing(sqlite3.connect(tmp_path / "data" / "tasks.sqlite3")) as database:
        gone = database.execute("SELECT task_id FROM tasks WHERE gone IS NOT NULL").fetchall()
    assert {row[0] for row in gone} == {fetched, deleted}


def test_health_and_waiting_tasks_answer_while_a_change_waits_for_the_lock(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change waits for the lock for as long as this test wants; nothing that only asks does."""
    bench = start(tmp_path / "data")
    done = bench.done()
    running, waiting = bench.submit(), bench.submit()
    assert bench.drawing.wait(GIVE_UP_S)
    bench.queue._scheduler.store._database.connection.execute(
        f"PRAGMA busy_timeout = {GIVE_UP_S * 1000}"
    )
    with locked(tmp_path / "data"):
        submit = threading.Thread(target=bench.post, daemon=True)
        submit.start()
        until(bench.queue._scheduler.changes.locked)
        assert bench.get("/health").status_code == 200
        assert bench.status(running)["status"] == "running"
        assert bench.status(waiting)["status"] == "waiting"
        assert bench.status(done)["status"] == "done"
        assert bench.get("/image", task_id=done, delete="false").status_code == 200
        assert bench.get("/queue").json()["length"] == 2
        assert submit.is_alive()
    submit.join(GIVE_UP_S)
    assert bench.get("/queue").json()["length"] == 3


def test_an_image_file_that_is_missing_or_cut_short_is_gone_with_the_reason(
    start: Start, tmp_path: Path
) -> None:
    bench = start(tmp_path / "data")
    missing, short = bench.done(), bench.done()
    images = tmp_path / "data" / "images"
    (images / missing).unlink()
    (images / short).write_bytes(b"cut")
    for task_id, reason in ((missing, "missing"), (short, "damaged")):
        for path in ("/image", "/thumbnail", "/preview"):
            answer = bench.get(path, task_id=task_id)
            assert (answer.status_code, answer.json()["error"]["code"]) == (410, "gone")
            assert reason in answer.json()["error"]["message"]
        assert bench.delete(task_id).status_code == 200
    assert bench.get("/health").status_code == 200


def test_a_damaged_image_file_has_no_thumbnail_and_the_reason_says_so(
    start: Start, tmp_path: Path
) -> None:
    bench = start(tmp_path / "data")
    task_id = bench.done()
    file = tmp_path / "data" / "images" / task_id
    file.write_bytes(b"x" * file.stat().st_size)
    for path in ("/thumbnail", "/preview"):
        answer = bench.get(path, task_id=task_id)
        assert (answer.status_code, answer.json()["error"]["code"]) == (410, "gone")
        assert "damaged" in answer.json()["error"]["message"]


def modes(folder: Path) -> dict[str, int]:
    found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*")}
    return {**found, "": stat.S_IMODE(folder.stat().st_mode)}


def is_private(folder: Path) -> bool:
    return not any(mode & 0o077 for mode in modes(folder).values())


def test_only_the_user_of_the_server_can_read_the_data_dir(start: Start, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        bench = start(tmp_path / "data")
        bench.done()
        assert {"tasks.sqlite3-wal", "tasks.sqlite3-shm", "lock"} <= set(modes(tmp_path / "data"))
        assert is_private(tmp_path / "data"), modes(tmp_path / "data")
    finally:
        os.umask(before)


def test_a_data_dir_of_an_earlier_version_is_closed_to_others_and_keeps_all_it_had(
    start: Start, tmp_path: Path
) -> None:
    data_dir = tmp_path / "data"
    bench = start(data_dir)
    done = bench.done()
    waiting = bench.submit()
    bench.stop()
    for path in (data_dir, *data_dir.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    (data_dir / "inputs" / waiting).mkdir(mode=0o755)
    bench = start(data_dir)
    assert is_private(data_dir), modes(data_dir)
    assert bench.get("/image", task_id=done, delete="false").status_code == 200
    bench.draw()
    assert bench.ended(waiting)["status"] == "done"


def test_a_folder_that_holds_other_things_too_keeps_its_access_rights(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data_dir = tmp_path / "data"
    data_dir.mkdir(mode=0o755)
    data_dir.chmod(0o755)
    (data_dir / "of somebody else").write_text("")
    start(data_dir).done()
    assert stat.S_IMODE(data_dir.stat().st_mode) == 0o755
    assert not modes(data_dir / "images")[""] & 0o077
    assert "other users may list it" in caplog.text
