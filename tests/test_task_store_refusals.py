"""The store of tasks on a disk that refuses."""

import errno
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from store_bench import (
    OUTCOME,
    REMOVED,
    RUNNING,
    WAITING,
    Bench,
    assert_it_can_be_finished_now,
    assert_nothing_is_done,
    files_end_at,
    fill,
    opened,
    params,
)

from errors import StorageUnavailable
from storage.task_store import TaskStore
from task import TaskStatus


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    yield from opened(tmp_path / "data")


CHANGES: dict[str, Callable[[Bench], object]] = {
    "insert": lambda bench: bench.waiting("new"),
    "claim": lambda bench: bench.claim("waiting 0", started_at=9.0),
    "release": lambda bench: bench.release("running"),
    "finish": lambda bench: bench.finish("running"),
    "fail": lambda bench: bench.fail("running"),
    "cancel waiting": lambda bench: bench.cancel("waiting 0", WAITING),
    "cancel running": lambda bench: bench.cancel("running", RUNNING),
    "drop the oldest": lambda bench: bench.store.ended.drop_over(0, "why", 5000.0),
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
