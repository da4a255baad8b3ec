"""The store of tasks: what a crash leaves, damage, and who may open it."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT, clean_environment
from store_bench import REMOVED, SECRET, WORK, Bench, opened, params, set_up

from errors import StorageUnavailable, StoreError
from storage.task_rows import Tombstone
from storage.task_store import TaskStore
from task import TaskStatus


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    yield from opened(tmp_path / "data")


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
