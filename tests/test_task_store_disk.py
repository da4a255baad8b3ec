"""The store of tasks on its disk: reopening, crashes, damage, and a disk that refuses."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, clean_environment
from store_bench import (
    MEASURED,
    OUTCOME,
    REMOVED,
    RUNNING,
    SECRET,
    WAITING,
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
    set_up,
)

from errors import StorageUnavailable, StoreError
from storage import file_store
from storage.task_rows import Tombstone
from storage.task_store import TaskStore
from task import Task, TaskStatus


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


def test_a_store_in_memory_does_the_same() -> None:
    store = TaskStore(None)
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


# -- what a crash leaves ---------------------------------------------------------------------------


def test_files_without_a_done_task_are_removed_at_the_next_start(bench: Bench) -> None:
    bench.done("done", b"kept")
    bench.running("running")
    bench.waiting("waiting")
    bench.store.ended.drop(bench.done("dropped"), "why")
    bench.in_status(TaskStatus.CANCELLED, "cancelled")
    strays = ["half.part", "running.part", "running", "waiting", "dropped", "cancelled", "unknown"]
    for name in strays:
        (bench.images / name).write_bytes(b"stray")
    bench.reopen()
    assert bench.files() == {"done": b"kept"}
    assert bench.status("running") is TaskStatus.RUNNING
    assert bench.store.read_image("running") is None
    assert bench.claim("waiting", started_at=1.0)


def test_a_done_task_without_its_file_is_gone_at_the_next_start(bench: Bench) -> None:
    bench.done("lost", b"lost")
    bench.done("kept", b"kept")
    (bench.images / "lost").unlink()
    assert bench.store.read_image("lost") is None
    bench.reopen()
    found = bench.store.find("lost")
    assert isinstance(found, Tombstone)
    assert found == REMOVED
    assert bench.store.ended.images() == (1, 4)
    assert bench.store.read_image("kept") == b"kept"


def test_the_images_folder_comes_back_at_the_next_start(bench: Bench) -> None:
    bench.done()
    shutil.rmtree(bench.images)
    bench.reopen()
    assert bench.store.find("task") == REMOVED
    bench.done("next")
    assert bench.store.read_image("next") == b"image"


# -- who may open it -------------------------------------------------------------------------------


def test_a_second_store_on_the_same_folder_is_refused(bench: Bench) -> None:
    bench.waiting()
    for _ in range(2):
        with pytest.raises(StoreError, match="Another server uses the data dir"):
            TaskStore(bench.folder)
    assert bench.status() is TaskStatus.WAITING
    bench.reopen()
    assert bench.status() is TaskStatus.WAITING


def test_the_folder_of_a_killed_process_is_free_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from storage.task_store import TaskStore;"
        "store = TaskStore(Path(sys.argv[1])); print('open', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        env=clean_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        with pytest.raises(StoreError, match="Another server"):
            TaskStore(tmp_path)
        process.send_signal(signal.SIGKILL)
        process.wait()
        TaskStore(tmp_path).close()


def test_a_folder_that_is_not_there_is_made_with_all_above_it(tmp_path: Path) -> None:
    TaskStore(tmp_path / "a" / "b" / "c").close()
    assert (tmp_path / "a" / "b" / "c" / "tasks.sqlite3").is_file()


@pytest.mark.parametrize("name", ["", "images", "tasks.sqlite3", "lock"])
def test_what_stands_in_the_way_is_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    data_dir = tmp_path / "data"
    in_the_way = data_dir / name if name else data_dir
    in_the_way.parent.mkdir(exist_ok=True)
    if name in ("tasks.sqlite3", "lock"):
        in_the_way.mkdir()
    else:
        in_the_way.write_text("a file")
    with pytest.raises(StoreError, match="cannot be used"):
        TaskStore(data_dir)
    in_the_way.rmdir() if in_the_way.is_dir() else in_the_way.unlink()
    TaskStore(data_dir).close()  # the refused one left the folder free


# -- damage ----------------------------------------------------------------------------------------


def scribble(path: Path) -> None:
    path.write_bytes(b"this is no database " * 1000)


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def overwrite_pages(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[3 * 4096 : -4096] = b"\xa5" * len(content[3 * 4096 : -4096])
    path.write_bytes(content)


def lose_a_table(path: Path) -> None:
    set_up(path, "DROP TABLE tasks")


@pytest.mark.parametrize("damage", [scribble, cut_in_half, overwrite_pages, lose_a_table])
def test_a_damaged_database_is_refused_and_left_where_it_is(
    bench: Bench, damage: Callable[[Path], None]
) -> None:
    for number in range(50):
        bench.waiting(str(number), params=params("x" * 3000))
    image = bench.images / bench.done("done")
    bench.store.close()
    damage(bench.database)
    content = bench.database.read_bytes()
    for _ in range(2):
        with pytest.raises(StoreError, match=r"cannot be used: .*\."):
            TaskStore(bench.folder)
    if damage is not lose_a_table:
        assert bench.database.read_bytes() == content
    assert image.read_bytes() == b"image"
    bench.database.rename(bench.folder / "damaged")
    bench.store = TaskStore(bench.folder)  # moved away, it is in nobody's way
    assert bench.store.unfinished() == []


def test_a_damaged_row_does_not_affect_other_tasks(bench: Bench) -> None:
    damaged, sound = bench.waiting("damaged"), bench.waiting("sound")
    change = "UPDATE tasks SET params = replace(params, '\"', char(0)) WHERE task_id = 'damaged'"
    set_up(bench.database, change)
    assert [task.task_id for task in bench.store.unfinished()] == [sound]
    assert bench.store.find(damaged) == Tombstone("The record of the task is damaged.")
    assert bench.store.find(sound)


def test_a_damaged_sample_is_passed_over(bench: Bench) -> None:
    for task_id in "abc":
        bench.done(task_id)
    set_up(bench.database, "UPDATE samples SET work = 'x' WHERE number = 2")
    assert [work for work, _ in bench.store.timings.samples()] == [WORK, WORK]


def test_text_that_cannot_be_read_is_refused_without_quoting_it(bench: Bench) -> None:
    bench.waiting()
    set_up(bench.database, "UPDATE tasks SET params = CAST(x'ff' || params AS TEXT)")
    with pytest.raises(StorageUnavailable, match="refuses") as caught:
        bench.store.find("task")
    assert SECRET not in str(caught.value)


# -- a disk that refuses ---------------------------------------------------------------------------


CHANGES: dict[str, Callable[[Bench], object]] = {
    "insert": lambda bench: bench.waiting("new"),
    "claim": lambda bench: bench.claim("waiting 0", started_at=9.0),
    "release": lambda bench: bench.release("running"),
    "finish": lambda bench: bench.finish("running"),
    "fail": lambda bench: bench.fail("running"),
    "cancel waiting": lambda bench: bench.cancel("waiting 0", WAITING),
    "cancel running": lambda bench: bench.cancel("running", RUNNING),
    "drop": lambda bench: bench.store.ended.drop("failed", "why"),
    "remove tombstones": lambda bench: bench.store.ended.remove_tombstones(5000.0),
    "keep outcome": lambda bench: bench.store.timings.keep_outcome(OUTCOME),
    "keep load": lambda bench: bench.store.timings.keep_load("noise-flux1", 9.0),
    "probe": lambda bench: bench.store.probe(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_the_disk_refuses_changes_nothing_and_works_when_it_takes_it_again(
    bench: Bench, change: str
) -> None:
    fill(bench)
    before = bench.everything()
    for _ in range(2):
        with bench.read_only(), pytest.raises(StorageUnavailable, match="refuses"):
            CHANGES[change](bench)
        assert bench.everything() == before
        assert not bench.store._database.connection.in_transaction
    CHANGES[change](bench)
    assert (bench.everything() == before) is (change == "probe")


def test_a_full_database_refuses_new_tasks_and_takes_them_when_it_may_grow_again(
    bench: Bench,
) -> None:
    fill(bench)
    before = bench.everything()
    with bench.full():
        for _ in range(3):
            with pytest.raises(StorageUnavailable, match="full"):
                bench.waiting("long", params=params("x" * 50_000))
        assert bench.everything() == before
        assert bench.store.find("long") is None
        assert bench.claim("waiting 1", started_at=9.0)  # what needs no room goes on
        assert bench.store.read_image("done") == b"a picture"
    bench.waiting("long", params=params("x" * 50_000))
    bench.reopen()
    assert bench.task("long").params.prompt == "x" * 50_000


def test_on_a_full_disk_what_was_accepted_stays_and_the_rest_is_refused(bench: Bench) -> None:
    accepted: list[str] = []

    def submit_for_ever() -> None:
        while True:
            accepted.append(bench.waiting(str(len(accepted)), params=params("x" * 5000)))

    with files_end_at(400_000), pytest.raises(StorageUnavailable):
        submit_for_ever()
    assert accepted
    assert [task.task_id for task in bench.store.unfinished()] == accepted
    more = bench.waiting("more", params=params("x" * 5000))
    bench.reopen()
    assert [task.task_id for task in bench.store.unfinished()] == [*accepted, more]


def test_a_store_opens_on_a_full_disk_and_its_probe_says_so(bench: Bench) -> None:
    for number in range(30):
        bench.done(str(number), params=params("x" * 20_000))
    shutil.rmtree(bench.images)  # so that the start has much to write
    bench.store.close()
    try:
        with files_end_at(40_000):
            bench.store = TaskStore(bench.folder)
            with pytest.raises(StorageUnavailable):
                bench.store.probe()
            assert bench.store.find("29") == REMOVED
            bench.store.close()
    finally:
        bench.store = TaskStore(bench.folder)
    assert bench.store.ended.images() == (0, 0)
    assert bench.store.find("29") == REMOVED


def test_a_closed_store_says_that_it_cannot(bench: Bench) -> None:
    bench.waiting()
    bench.store.close()
    for call in (CHANGES["insert"], CHANGES["probe"], lambda bench: bench.store.find("task")):
        with pytest.raises(StorageUnavailable):
            call(bench)
    bench.store = TaskStore(bench.folder)
    assert bench.status() is TaskStatus.WAITING


def test_images_that_cannot_be_reached_are_storage_unavailable_and_come_back(bench: Bench) -> None:
    bench.done()
    with bench.no_images_folder():
        with pytest.raises(StorageUnavailable, match="cannot be read"):
            bench.store.read_image("task")
        with pytest.raises(StorageUnavailable, match="cannot be removed"):
            bench.store.ended.drop("task", "why")
        assert bench.status() is TaskStatus.DONE
    assert bench.store.read_image("task") == b"image"


def test_a_probe_reports_that_images_cannot_be_written(bench: Bench) -> None:
    bench.store.probe()
    with bench.no_images_folder(), pytest.raises(StorageUnavailable):
        bench.store.probe()
    bench.store.probe()
    assert bench.files() == {}


def test_a_probe_reports_that_there_is_no_space_for_an_image_of_the_size_refused_last(
    bench: Bench,
) -> None:
    bench.running()
    with files_end_at(200_000):
        with pytest.raises(StorageUnavailable):
            bench.finish("task", b"x" * 300_000)
        for _ in range(2):
            with pytest.raises(StorageUnavailable):
                bench.store.probe()
    bench.store.probe()
    assert_nothing_is_done(bench)
    assert_it_can_be_finished_now(bench)


def test_input_images_that_cannot_be_removed_leave_room_for_others(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bench.store.reserve_inputs("old", 100, 100)
    bench.store.keep_inputs("old", {"0" * 16: b"x" * 100})
    assert not bench.store.reserve_inputs("new", 100, 100)

    def refuse(folder: Path) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    bench.store.discard_inputs("old")
    assert bench.store.reserve_inputs("new", 100, 100)
