"""Backups: complete and consistent while tasks are submitted and drawn, and restored elsewhere."""

import base64
import io
import tarfile
import threading
from functools import partial
from pathlib import Path

import pytest
from conftest import GIVE_UP_S, RunServer, ServerProcess, StartServer, until
from holding import Hold
from PIL import Image

from errors import StoreError
from storage.backup import back_up, restore
from storage.task_store import TaskStore


def picture() -> str:
    """A picture as base64."""
    png = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(png, "PNG")
    return base64.b64encode(png.getvalue()).decode()


def more_than(found: list[str], number: int) -> bool:
    return len(found) > number


def test_a_backup_under_load_restores_to_a_server_that_continues(
    start_server: StartServer, tmp_path: Path
) -> None:
    """Tasks with input pictures are submitted, drawn and removed while the backups are made."""
    server = start_server("--model", "noise-flux1")
    first = server.submit(init_image=picture(), image_strength=0.5)["task_id"]
    server.wait_until_ended(first)
    image = server.get("/image", task_id=first, delete="false").content
    ended = threading.Event()
    submitted: list[str] = []

    def load() -> None:
        while not ended.is_set():
            task_id = server.submit(init_image=picture(), image_strength=0.5)["task_id"]
            submitted.append(task_id)
            removed = server.submit(init_image=picture(), image_strength=0.5)["task_id"]
            server.delete(removed)

    loading = threading.Thread(target=load)
    loading.start()
    files = [tmp_path / f"{number}.tar" for number in range(3)]
    try:
        for file in files:
            until(partial(more_than, submitted, len(submitted) + 3))
            back_up(tmp_path / "server", file)
    finally:
        ended.set()
        loading.join(GIVE_UP_S)
    assert server.stop() == 0
    for number, file in enumerate(files):
        folder = tmp_path / f"restored-{number}"
        restore(folder, file)
        assert {path.name for path in folder.iterdir()} <= {
            "tasks.sqlite3", "images", "inputs", "secret", "lock"
        }  # fmt: skip
    moved = ServerProcess(tmp_path / "restored-2", "--model", "noise-flux1")
    try:
        assert moved.get("/image", task_id=first, delete="false").content == image
        for task_id in submitted[:8]:
            end = moved.wait_until_ended(task_id)
            assert end["status"] == "done", end
        assert moved.submit()["task_id"] not in submitted
    finally:
        moved.stop()


def test_waiting_tasks_with_input_pictures_are_in_the_backup(
    start_server: StartServer, run_server: RunServer, hold: Hold, tmp_path: Path
) -> None:
    hold.close()
    server = start_server("--model", "noise-flux1", hold=hold)
    tasks = [server.submit(init_image=picture(), image_strength=0.5)["task_id"] for _ in range(3)]
    server_dir, new_dir, file = (str(tmp_path / name) for name in ("server", "new", "backup.tar"))
    made = run_server("--data-dir", server_dir, "--backup", file)
    assert made.returncode == 0, made.stderr
    hold.open()
    server.stop()
    assert (tmp_path / "backup.tar").stat().st_mode & 0o777 == 0o600
    done = run_server("--data-dir", new_dir, "--restore", file)
    assert done.returncode == 0, done.stderr
    moved = ServerProcess(tmp_path / "new", "--model", "noise-flux1")
    try:
        ends = [moved.wait_until_ended(task_id)["status"] for task_id in tasks]
    finally:
        moved.stop()
    assert ends == ["done"] * 3


def test_nothing_is_overwritten_and_other_archives_are_refused(tmp_path: Path) -> None:
    data_dir, file = tmp_path / "data", tmp_path / "backup.tar"
    with pytest.raises(StoreError, match="no database"):
        back_up(data_dir, file)
    TaskStore(data_dir).close()
    back_up(data_dir, file)
    with pytest.raises(StoreError, match="exists"):
        back_up(data_dir, file)
    with pytest.raises(StoreError, match="has tasks already"):
        restore(data_dir, file)
    other = tmp_path / "other.tar"
    with tarfile.open(other, "w") as archive:
        archive.addfile(tarfile.TarInfo("../evil"))
    with pytest.raises(StoreError, match="no backup"):
        restore(tmp_path / "new", other)
    (tmp_path / "text").write_text("no archive at all")
    with pytest.raises(StoreError, match="cannot be restored"):
        restore(tmp_path / "new", tmp_path / "text")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"lock"}
    restore(tmp_path / "new", file)
    TaskStore(tmp_path / "new").close()


def test_a_backup_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    TaskStore(tmp_path / "data").close()
    before = sorted(path.name for path in (tmp_path / "data").iterdir())
    with pytest.raises(StoreError, match="cannot be written"):
        back_up(tmp_path / "data", tmp_path / "missing" / "backup.tar")
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == before
