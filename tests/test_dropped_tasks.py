"""Tasks that are dropped from the store: what is left of them, and which go first."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from store_bench import SECRET, Bench, opened

from storage.task_rows import Tombstone
from task import TaskStatus


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    yield from opened(tmp_path / "data")


def test_a_dropped_task_leaves_its_reason_and_nothing_of_what_was_asked(bench: Bench) -> None:
    bench.done("a", client_key="key")
    bench.store.ended.drop("a", "It has expired.")
    found = bench.store.find("a")
    assert isinstance(found, Tombstone)
    assert found == "It has expired."
    row = bench.row("a")
    assert (row["params"], row["measured"], row["image_bytes"]) == (None, None, None)
    assert SECRET not in str(row)
    assert bench.files() == {}
    assert bench.store.ended.images() == (0, 0)
    assert bench.store.find_by_key("key") == "a"
    bench.reopen()
    assert bench.store.find("a") == "It has expired."


@pytest.mark.parametrize("status", [TaskStatus.FAILED, TaskStatus.CANCELLED])
def test_a_task_without_images_can_be_dropped(bench: Bench, status: TaskStatus) -> None:
    bench.in_status(status)
    bench.store.ended.drop("task", "why")
    assert bench.store.find("task") == "why"


def test_a_dropped_task_is_not_dropped_again_by_its_age(bench: Bench) -> None:
    bench.done(ended_at=10.0)
    bench.store.ended.mark_fetched("task", 11.0)
    bench.store.ended.drop("task", "why")
    assert bench.store.ended.ended_before(100.0) == []
    assert bench.store.ended.fetched_before(100.0) == []
    assert bench.store.ended.oldest_images_over(0) == []


def test_a_tombstone_goes_after_its_time_and_then_the_id_is_unknown(bench: Bench) -> None:
    for task_id, ended_at in (("old", 10.0), ("young", 20.0)):
        bench.done(task_id, ended_at=ended_at, client_key=f"key of {task_id}")
        bench.store.ended.drop(task_id, "why")
    bench.done("old but there", ended_at=10.0)
    bench.waiting("waits", created_at=1.0)
    bench.store.ended.remove_tombstones(10.0)
    assert bench.store.find("old") == "why"
    bench.store.ended.remove_tombstones(15.0)
    assert bench.store.find("old") is None
    assert bench.store.find_by_key("key of old") is None
    assert bench.store.find("young") == "why"
    assert bench.status("old but there") is TaskStatus.DONE
    assert bench.status("waits") is TaskStatus.WAITING


def test_of_too_many_tombstones_the_oldest_go(bench: Bench) -> None:
    for number in range(4):
        bench.done(f"task {number}")
        bench.store.ended.drop(f"task {number}", "why", gone_at=50.0)
    bench.done("there")
    bench.store.ended.remove_tombstones(10.0, most=2)
    assert [bench.store.find(f"task {number}") for number in range(4)] == [None, None, "why", "why"]
    assert bench.status("there") is TaskStatus.DONE


def test_of_too_many_tasks_that_ended_without_images_the_oldest_go(bench: Bench) -> None:
    bench.running("with an image")
    bench.add_image("with an image")
    assert bench.cancel("with an image", ended_at=1.0)
    for number in range(4):
        bench.waiting(f"task {number}", callback_url="http://here/")
        assert bench.cancel(f"task {number}", was=TaskStatus.WAITING, ended_at=10.0 - number)
    bench.done("done", ended_at=1.0)
    bench.waiting("waits")
    assert bench.store.ended.drop_over(5, "why", 20.0) == []
    assert set(bench.store.ended.drop_over(2, "why", 20.0)) == {"task 2", "task 3"}
    assert bench.store.find("task 3") == "why"
    assert bench.row("task 3")["params"] is None
    left = ("with an image", "task 0", "task 1", "done", "waits")
    assert all(not isinstance(bench.store.find(task_id), Tombstone) for task_id in left)
    assert bench.store.ended.drop_over(2, "why", 20.0) == [], "the one with an image stays"


def test_the_order_of_submission_goes_on_when_the_latest_row_was_removed(bench: Bench) -> None:
    bench.waiting("first")
    latest = bench.row(bench.done("latest", ended_at=1.0))["number"]
    bench.store.ended.drop("latest", "why")
    bench.store.ended.remove_tombstones(2.0)
    bench.reopen()
    assert bench.row(bench.waiting("next"))["number"] > latest


def test_tasks_are_old_by_their_end_and_only_when_they_have_ended(bench: Bench) -> None:
    bench.waiting("waiting")
    bench.running("running")
    bench.done("done", ended_at=10.0)
    bench.done("younger", ended_at=20.0)
    for status in (TaskStatus.FAILED, TaskStatus.CANCELLED):
        bench.in_status(status, status.value)  # they ended at 1002.5
    assert bench.store.ended.ended_before(10.0) == []
    assert bench.store.ended.ended_before(20.0) == ["done"]
    assert sorted(bench.store.ended.ended_before(2000.0)) == [
        "cancelled",
        "done",
        "failed",
        "younger",
    ]


def test_the_oldest_images_go_until_the_rest_fits_and_the_newest_always_stays(bench: Bench) -> None:
    sizes = {"a": 10, "b": 20, "c": 30, "d": 40}
    for number, (task_id, size) in enumerate(sizes.items()):
        bench.done(task_id, b"x" * size, ended_at=100.0 - number)  # d ended first
    assert bench.store.ended.images() == (4, 100)
    expected = {1000: "", 100: "", 99: "d", 60: "d", 59: "cd", 30: "cd", 29: "bcd", 10: "bcd"}
    for keep_bytes, gone in {**expected, 9: "bcd", 0: "bcd"}.items():
        assert "".join(sorted(bench.store.ended.oldest_images_over(keep_bytes))) == gone, keep_bytes


def test_images_that_ended_at_the_same_time_go_in_the_order_of_submission(bench: Bench) -> None:
    for task_id in "abc":
        bench.done(task_id, b"x" * 10, ended_at=50.0)
    assert sorted(bench.store.ended.oldest_images_over(10)) == ["a", "b"]
