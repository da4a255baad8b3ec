"""The store of tasks on its disk: reopening, and complete images before their task is done."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from forking import ROOT, clean_environment
from memory_stores import memory_store
from store_bench import (
    MEASURED,
    RUNNING,
    WORK,
    Bench,
    answers,
    assert_it_can_be_finished_now,
    assert_nothing_is_done,
    ended,
    files_end_at,
    fill,
    opened,
    params,
)

from errors import StorageUnavailable
from storage import file_store
from task import Task


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    yield from opened(tmp_path / "data")


# -- reopening -------------------------------------------------------------------------------------


def test_unfinished_tasks_are_in_the_order_of_submission(bench: Bench) -> None:
    """The scheduler orders them (scheduler/policy.py)."""
    filled = fill(bench)
    waiting = [f"waiting {number}" for number in range(5)]
    assert filled["unfinished"] == [*waiting, "running", "running urgently"]
    bench.release("running", interrupted=True)
    assert bench.claim("waiting 2", started_at=1.0)
    assert answers(bench)["unfinished"] == filled["unfinished"]


def test_a_closed_store_opens_with_all_its_data(bench: Bench) -> None:
    before, rows = fill(bench), bench.everything()
    for _ in range(2):
        bench.reopen()
        assert answers(bench) == before
        assert bench.everything() == rows


def test_a_store_that_was_not_closed_opens_with_all_its_data(bench: Bench, tmp_path: Path) -> None:
    before, rows = fill(bench), bench.everything()
    snapshot = tmp_path / "as the disk was"  # shared memory does not survive the process
    shutil.copytree(bench.folder, snapshot, ignore=shutil.ignore_patterns("*-shm"))
    assert (snapshot / "tasks.sqlite3-wal").stat().st_size > 0
    restarted = Bench(snapshot)
    try:
        assert answers(restarted) == before
        assert restarted.everything() == rows
    finally:
        restarted.store.close()


def test_every_change_but_a_claim_is_written_through_to_the_disk(bench: Bench) -> None:
    connection = bench.store._database.connection

    def pragma(name: str) -> Any:
        return connection.execute(f"PRAGMA {name}").fetchone()[0]

    assert pragma("journal_mode") == "wal"
    assert pragma("fullfsync") == pragma("checkpoint_fullfsync") == 1
    assert pragma("synchronous") == 2  # FULL
    statements: list[str] = []
    connection.set_trace_callback(statements.append)
    fill(bench)
    connection.set_trace_callback(None)
    level, claims, committed = "FULL", False, []
    for statement in statements:
        if statement.startswith("PRAGMA synchronous = "):
            level = statement.split()[-1]
        claims |= "attempt = attempt + 1" in statement
        if statement == "COMMIT":
            committed.append((claims, level))
            claims = False
    assert set(committed) == {(True, "NORMAL"), (False, "FULL")}


def test_a_store_without_a_data_dir_leaves_no_folder(tmp_path: Path) -> None:
    """Not even one that is never closed."""
    for end in ("store.close()", "pass"):
        code = f"from storage.task_store import TaskStore; store = TaskStore(None); {end}"
        environment = {**clean_environment(), "TMPDIR": str(tmp_path)}
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
        assert not list(tmp_path.iterdir()), end


def test_a_store_in_memory_does_the_same() -> None:
    store = memory_store()
    tasks = {}
    for task_id in ("done", "cancelled"):
        store.insert(Task(task_id, params(), 0, 1.0))
        found = store.find(task_id)
        assert isinstance(found, Task)
        assert store.claim(found, started_at=1.5)
        tasks[task_id] = replace(found, status=RUNNING, attempt=1)
    add_image = partial(store.add_image, samples=[(WORK, MEASURED)], end=ended(2.0))
    assert store.cancel(tasks["cancelled"], ended(2.0))
    assert add_image(tasks["done"], b"image", [MEASURED])
    assert not add_image(tasks["cancelled"], b"image", [MEASURED])
    assert store.read_image("done") == b"image"
    assert store.read_image("cancelled") is None
    assert store.ended.images() == (1, 5)
    store.ended.drop("done", "why")
    assert store.read_image("done") is None
    assert store.find("done") == "why"
    store.close()


# -- an image is complete on disk before its task is done ------------------------------------------


def test_the_image_is_synced_and_renamed_and_its_folder_synced_before_the_task_is_done(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, seen = b"x" * 100_000, []
    flush, sync_folder = file_store._flush_to_disk, file_store._sync_folder

    def see_flush(descriptor: int) -> None:
        flush(descriptor)
        assert os.fstat(descriptor).st_size == len(image)
        seen.append("file synced")

    def see_sync(folder: Path) -> None:
        assert bench.files() == {"task": image}
        sync_folder(folder)
        seen.append("folder synced")

    def see_statement(statement: str) -> None:
        if statement == "COMMIT":
            seen.append("committed")

    bench.running()
    monkeypatch.setattr(file_store, "_flush_to_disk", see_flush)
    monkeypatch.setattr(file_store, "_sync_folder", see_sync)
    bench.store._database.connection.set_trace_callback(see_statement)
    assert bench.finish("task", image)
    assert seen == ["file synced", "folder synced", "committed"]


def test_an_image_that_finds_no_room_leaves_its_task_running_and_no_file(bench: Bench) -> None:
    bench.running()
    with files_end_at(200_000), pytest.raises(StorageUnavailable, match="cannot be written"):
        bench.finish("task", b"x" * 300_000)
    assert_nothing_is_done(bench)
    assert_it_can_be_finished_now(bench)


def test_an_image_that_cannot_be_synced_leaves_its_task_running_and_no_file(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.running()
    with monkeypatch.context() as patch:
        full = OSError(errno.ENOSPC, "No space left on device")
        patch.setattr(file_store, "_flush_to_disk", lambda descriptor: raise_(full))
        with pytest.raises(StorageUnavailable, match="No space left"):
            bench.finish("task")
    assert_nothing_is_done(bench)
    assert_it_can_be_finished_now(bench)


def test_an_image_whose_folder_cannot_be_synced_leaves_its_task_running_and_no_file(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.running()
    with monkeypatch.context() as patch:
        broken = OSError(errno.EIO, "Input/output error")
        patch.setattr(file_store, "_sync_folder", lambda folder: raise_(broken))
        with pytest.raises(StorageUnavailable, match="Input/output error"):
            bench.finish("task")
    assert_nothing_is_done(bench)
    assert_it_can_be_finished_now(bench)


def test_an_image_that_cannot_be_renamed_leaves_its_task_running_and_no_draft(bench: Bench) -> None:
    bench.running()
    in_the_way = bench.images / "task"
    in_the_way.mkdir()
    with pytest.raises(StorageUnavailable):
        bench.finish("task")
    assert [path.name for path in bench.images.iterdir()] == ["task"]
    in_the_way.rmdir()
    assert_nothing_is_done(bench)
    assert_it_can_be_finished_now(bench)


def test_an_image_without_a_folder_leaves_its_task_running(bench: Bench) -> None:
    bench.running()
    with bench.no_images_folder(), pytest.raises(StorageUnavailable):
        bench.finish("task")
    assert_nothing_is_done(bench)
    assert_it_can_be_finished_now(bench)


def test_a_database_that_refuses_after_the_image_was_written_leaves_no_file(bench: Bench) -> None:
    bench.running()
    with bench.read_only(), pytest.raises(StorageUnavailable):
        bench.finish("task")
    assert_nothing_is_done(bench)
    assert_it_can_be_finished_now(bench)


def raise_(error: Exception) -> None:
    raise error
