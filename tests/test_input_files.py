"""The files of pictures that clients sent: how long the disk has them, without a server."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Lock
from typing import Any

import pytest
from conftest import GIVE_UP_S, PlayedQueue, allow, params_for
from sent_pictures import PNG, inputs_in

from errors import Gone, InputsFull, QueueFull, StorageUnavailable, StoreError
from scheduler.limits import QueueLimits
from storage import file_store
from storage.task_store import TaskStore
from task import GenerationParams, InputImage
from timing_model import TimingModel


def params_with(file: str) -> GenerationParams:
    return params_for(model="noise-flux1", init_image=InputImage(file, 64, 64))


def test_a_disk_that_fills_while_pictures_are_written_keeps_nothing_of_the_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = TaskStore(tmp_path)
    written = []

    def flush(descriptor: int) -> None:
        written.append(descriptor)
        if len(written) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(file_store, "_flush_to_disk", flush)
    inputs = {"one": PNG, "two": PNG, "three": PNG}
    with pytest.raises(StorageUnavailable, match="No space left"):
        store.keep_inputs("a", inputs)
    assert inputs_in(tmp_path) == set()
    store.keep_inputs("a", inputs)
    assert {file.name for file in store.inputs_of("a").iterdir()} == {
        "one.png",
        "two.png",
        "three.png",
    }
    store.close()


def test_a_submit_that_is_refused_keeps_no_pictures(tmp_path: Path) -> None:
    store = TaskStore(tmp_path)
    queue = PlayedQueue(allow("noise-flux1"), TimingModel(), store, QueueLimits(max_queue=1))
    queue.submit(params_with("a"), priority=0, inputs={"a": PNG})
    kept = inputs_in(tmp_path)
    with pytest.raises(QueueFull):
        queue.submit(params_with("a"), priority=0, inputs={"a": PNG})
    assert inputs_in(tmp_path) == kept
    store.close()


@pytest.mark.parametrize("leave", ["done", "cancelled"])
def test_pictures_go_when_their_task_has_ended(tmp_path: Path, leave: str) -> None:
    store = TaskStore(tmp_path)
    queue = PlayedQueue(allow("noise-flux1"), TimingModel(), store)
    task_id = queue.submit(params_with("a"), priority=0, inputs={"a": PNG})[0].task_id
    assert inputs_in(tmp_path) == {task_id}
    if leave == "cancelled":
        queue.delete(task_id)
    else:
        assert queue.claim(0)
        assert inputs_in(tmp_path) == {task_id}
        assert queue.finish(task_id, [PNG])
        queue.worker.left(task_id)
    assert inputs_in(tmp_path) == set()
    store.close()


def queue_in(store: TaskStore, **limits: Any) -> PlayedQueue:
    return PlayedQueue(allow("noise-flux1"), TimingModel(), store, QueueLimits(**limits))


def submitted(queue: PlayedQueue, *, fails: bool = False) -> str:
    """A task with a picture of the size of PNG."""
    task_id = queue.submit(params_with("a"), priority=0, inputs={"a": PNG})[0].task_id
    if fails:
        assert queue.claim(0)
        assert queue.fail(task_id, "task_failed", "no")
        queue.worker.left(task_id)
    return task_id


def test_a_failed_task_keeps_its_pictures_and_is_tried_again_with_them(tmp_path: Path) -> None:
    store = TaskStore(tmp_path)
    task_id = submitted(queue_in(store), fails=True)
    store.close()
    store = TaskStore(tmp_path)
    queue = queue_in(store)
    assert inputs_in(tmp_path) == {task_id}
    queue.control.retry(task_id)
    assert queue.claim(0)
    assert (store.inputs_of(task_id) / "a.png").read_bytes() == PNG
    assert queue.finish(task_id, [PNG])
    queue.worker.left(task_id)
    assert inputs_in(tmp_path) == set()
    removed = submitted(queue, fails=True)
    queue.delete(removed)
    assert inputs_in(tmp_path) == set()
    store.close()


class NotedLock:
    """A lock that says when somebody wants it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self.wanted = Event()

    def __enter__(self) -> None:
        self.wanted.set()
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()


def test_a_task_that_is_tried_again_while_its_worker_leaves_it_has_its_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = TaskStore(tmp_path)
    queue = queue_in(store)
    task_id = submitted(queue)
    assert queue.claim(0)
    queue.fail(task_id, "task_failed", "no")
    changes, retry = NotedLock(), store.retry

    def retry_while_the_worker_leaves(*arguments: Any) -> bool:
        changes.wanted.clear()
        left = worker.submit(queue.worker.left, task_id)
        left.add_done_callback(lambda _: changes.wanted.set())
        assert changes.wanted.wait(GIVE_UP_S)
        return retry(*arguments)

    monkeypatch.setattr(queue.scheduler, "changes", changes)
    monkeypatch.setattr(store, "retry", retry_while_the_worker_leaves)
    with ThreadPoolExecutor(1) as worker:
        queue.control.retry(task_id)
    assert (store.inputs_of(task_id) / "a.png").read_bytes() == PNG
    store.close()


def test_the_pictures_of_failed_tasks_make_room_the_oldest_first(tmp_path: Path) -> None:
    store = TaskStore(tmp_path)
    queue = queue_in(store, input_bytes=3 * len(PNG))
    first, second, third = (submitted(queue, fails=True) for _ in range(3))
    queue.control.retry(second)
    assert inputs_in(tmp_path) == {first, second, third}
    waiting = [submitted(queue)]
    assert inputs_in(tmp_path) == {second, third, *waiting}
    with pytest.raises(Gone, match="make room for others"):
        queue.control.retry(first)
    waiting.append(submitted(queue))
    assert inputs_in(tmp_path) == {second, *waiting}, "one that is tried again needs its own"
    with pytest.raises(InputsFull):
        submitted(queue)
    assert inputs_in(tmp_path) == {second, *waiting}
    store.close()


def test_a_task_that_cannot_be_tried_again_now_keeps_its_pictures_for_later(
    tmp_path: Path,
) -> None:
    store = TaskStore(tmp_path)
    queue = queue_in(store, max_queue=1, input_bytes=3 * len(PNG))
    failed = submitted(queue, fails=True)
    waiting = submitted(queue)
    with pytest.raises(QueueFull):
        queue.control.retry(failed)
    queue.delete(waiting)
    queue.control.retry(failed)
    assert inputs_in(tmp_path) == {failed}
    store.close()


def test_pictures_of_a_running_task_stay_until_the_worker_has_left_it(tmp_path: Path) -> None:
    store = TaskStore(tmp_path)
    queue = PlayedQueue(allow("noise-flux1"), TimingModel(), store)
    task_id = queue.submit(params_with("a"), priority=0, inputs={"a": PNG})[0].task_id
    assert queue.claim(0)
    queue.delete(task_id)
    assert inputs_in(tmp_path) == {task_id}, "the worker may be reading them"
    queue.worker.left(task_id)
    assert inputs_in(tmp_path) == set()
    store.close()


def test_strange_things_among_the_pictures_hinder_no_start(tmp_path: Path) -> None:
    TaskStore(tmp_path).close()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("keep me")
    (tmp_path / "inputs" / "folder").mkdir()
    (tmp_path / "inputs" / "file").touch()
    (tmp_path / "inputs" / "link").symlink_to(elsewhere)
    TaskStore(tmp_path).close()
    assert inputs_in(tmp_path) == set()
    assert (elsewhere / "mine").read_text() == "keep me"
    shutil.rmtree(tmp_path / "inputs")
    (tmp_path / "inputs").touch()
    with pytest.raises(StoreError):
        TaskStore(tmp_path)
