"""Faults of the disk below a running server and at its start, made with means of the system.

The server is the real one over HTTP, in this process, with a generator that draws noise: pictures
of about a megabyte in no time.
"""

import os
import shutil
import sqlite3
import stat
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import (
    GIVE_UP_S,
    FakeGenerator,
    StartServer,
    allow,
    fill_disk,
    until,
)
from PIL import Image

from errors import StorageUnavailable
from server import Server
from settings import Settings
from task import GenerationParams, Report
from workers import encoder

OFFER = allow("noise-flux1")
SIDE = 640
"""Noise of this size is a PNG of about 1.2 MB."""
Mount = Callable[[str], Path]


def noise() -> Image.Image:
    return Image.frombytes("RGB", (SIDE, SIDE), os.urandom(SIDE * SIDE * 3))


class Bench:
    """A server on a data dir, which draws as many pictures as it may."""

    def __init__(self, data_dir: Path, *arguments: str) -> None:
        self._may_draw = threading.Semaphore(0)
        self._stopped = False
        self.drawing = threading.Event()
        arguments = (
            "--model",
            "noise-flux1",
            "--port",
            "0",
            "--data-dir",
            str(data_dir),
            *arguments,
        )
        generator = FakeGenerator(self._draw)
        self.server = Server(Settings.read(arguments, {}), OFFER, generator)
        self.queue = self.server.queue
        self.url = f"http://127.0.0.1:{self.server.port}"
        self.server.start()

    def _draw(self, params: GenerationParams, report: Report) -> Image.Image:
        self.drawing.set()
        assert self._may_draw.acquire(timeout=GIVE_UP_S)
        assert not self._stopped
        return noise()

    def draw(self, pictures: int = 1000) -> None:
        self._may_draw.release(pictures)

    def stop(self) -> None:
        if not self._stopped:
            self.server.stop()
        self._stopped = True  # a real one would have ended, and would draw no more
        self.draw()

    def post(self, **fields: Any) -> requests.Response:
        body = {"prompt": "noise", "width": 64, "height": 64, "format": "PNG", **fields}
        return requests.post(self.url + "/generate", json=body, timeout=60)

    def submit(self, **fields: Any) -> str:
        answer = self.post(**fields)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["task_id"])

    def get(self, path: str, **values: Any) -> requests.Response:
        return requests.get(self.url + path, params=values, timeout=60)

    def delete(self, task_id: str) -> requests.Response:
        return requests.delete(self.url + "/delete", params={"task_id": task_id}, timeout=60)

    def status(self, task_id: str) -> dict[str, Any]:
        answer = self.get("/status", task_id=task_id)
        assert answer.status_code == 200, answer.text
        status: dict[str, Any] = answer.json()
        return status

    def is_gone(self, task_id: str) -> bool:
        return self.get("/status", task_id=task_id).status_code == 410

    def ended(self, task_id: str) -> dict[str, Any]:
        until(lambda: self.status(task_id)["status"] not in ("waiting", "running"))
        return self.status(task_id)

    def done(self) -> str:
        self.draw(1)
        task_id = self.submit()
        assert self.ended(task_id)["status"] == "done"
        self.drawing.clear()
        return task_id

    def assert_failed(self, reason: str) -> None:
        health = self.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "failed")
        assert reason in health.json()["last_error"]

    def assert_refuses_tasks(self) -> None:
        answer = self.post()
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (503, "storage_unavailable"), answer.text
        assert error["message"].startswith("The server cannot store anything now")

    def until_failed(self) -> None:
        until(lambda: self.get("/health").status_code == 503)

    def until_works(self) -> None:
        until(lambda: self.get("/health").status_code == 200)


Start = Callable[..., Bench]


@pytest.fixture
def start(mount: Mount, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts servers that end with the test, and before their disk does."""
    monkeypatch.setattr("checks.EVERY_S", 0.1)
    monkeypatch.setattr("workers.endings.RETRY_S", 0.1)
    monkeypatch.setattr("storage.database.BUSY_S", 0.2)
    started: list[Bench] = []

    def start(data_dir: Path, *arguments: str) -> Bench:
        for earlier in started:
            earlier.stop()
        started[:] = [Bench(data_dir, *arguments)]
        return started[0]

    yield start
    for bench in started:
        bench.stop()


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


# -- a disk that becomes read-only, a data dir that vanishes --------------------------------------


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


# -- a database that another process has locked ---------------------------------------------------


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


# -- files that are missing or damaged ------------------------------------------------------------


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


# -- who may read it ------------------------------------------------------------------------------


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
