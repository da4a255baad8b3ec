"""Workers name the attempt of a task: a stale one is refused. Images are stored one by one."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import PlayedQueue, allow, params_for

from errors import NotReady
from storage.task_store import TaskStore
from task import Encoded, Phase, Progress, Task, TaskStatus, Verdict
from timing_model import TimingModel


def start(folder: Path) -> PlayedQueue:
    queue = PlayedQueue(allow("noise-flux1"), TimingModel(), TaskStore(folder))
    queue.load()
    return queue


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[PlayedQueue]:
    queue = start(tmp_path)
    yield queue
    queue.scheduler.store.close()


def claim_new(queue: PlayedQueue, count: int = 3) -> Task:
    queue.submit(params_for(count=count))
    task = queue.claim()
    assert task is not None
    return task


def begin(queue: PlayedQueue, task: Task, index: int) -> Verdict:
    progress = Progress(Phase.TEXT_ENCODING, 0, 4, image=index)
    return queue.worker.report(task.task_id, task.attempt, progress)


def store(queue: PlayedQueue, task: Task, index: int) -> bool:
    encoded = Encoded(f"image {index}".encode(), index)
    return queue.worker.store_image(task.task_id, task.attempt, encoded)


def images(queue: PlayedQueue, task: Task) -> list[bytes]:
    done = queue.status(task.task_id).images_done
    return [queue.image(task.task_id, index)[0] for index in range(done)]


def test_a_stale_worker_is_refused_and_its_image_is_not_stored(queue: PlayedQueue) -> None:
    stale = claim_new(queue, count=2)
    assert queue.worker.release(stale.task_id, stale.attempt, interrupted=True)
    fresh = queue.claim()
    assert fresh is not None
    assert (fresh.task_id, fresh.attempt) == (stale.task_id, stale.attempt + 1)
    task_id, attempt = stale.task_id, stale.attempt
    for index in range(2):
        assert begin(queue, stale, index) is Verdict.STOP
        assert not queue.worker.store_image(task_id, attempt, Encoded(b"by A", index))
        assert not queue.worker.finish(task_id, attempt, Encoded(b"by A", index))
        assert not queue.worker.fail(task_id, attempt, "task_failed", "by A")
        assert not queue.worker.release(task_id, attempt)
        assert not queue.worker.release(task_id, attempt, interrupted=True)
        assert queue.status(task_id).status is TaskStatus.RUNNING
        assert begin(queue, fresh, index) is Verdict.CONTINUE
        last = queue.worker.finish if index else queue.worker.store_image
        assert last(task_id, fresh.attempt, Encoded(b"by B", index))
    assert images(queue, fresh) == [b"by B", b"by B"]
    assert queue.status(task_id).status is TaskStatus.DONE


def test_an_image_can_be_fetched_while_the_next_one_is_drawn_and_is_stored_once(
    queue: PlayedQueue,
) -> None:
    task = claim_new(queue)
    assert store(queue, task, 0)
    assert begin(queue, task, 1) is Verdict.CONTINUE
    assert images(queue, task) == [b"image 0"]
    with pytest.raises(NotReady):
        queue.image(task.task_id, 1)
    assert not store(queue, task, 0), "it is stored already"
    assert not store(queue, task, 2), "the one before is missing"
    assert images(queue, task) == [b"image 0"]


def test_a_cancelled_task_keeps_the_images_that_are_stored(queue: PlayedQueue) -> None:
    task = claim_new(queue)
    assert store(queue, task, 0)
    assert queue.delete(task.task_id) is TaskStatus.RUNNING
    assert begin(queue, task, 1) is Verdict.STOP
    assert not store(queue, task, 1)
    assert queue.status(task.task_id).status is TaskStatus.CANCELLED
    assert images(queue, task) == [b"image 0"]


@pytest.mark.parametrize("encoder_is_late", [True, False])
def test_a_task_ends_after_its_present_image_however_late_that_is_encoded(
    queue: PlayedQueue, encoder_is_late: bool
) -> None:
    task = claim_new(queue)
    assert store(queue, task, 0)
    assert begin(queue, task, 1) is Verdict.CONTINUE
    assert queue.delete(task.task_id, after_current=True) is TaskStatus.RUNNING
    assert queue.status(task.task_id).status is TaskStatus.RUNNING
    if not encoder_is_late:
        assert store(queue, task, 1)
    assert begin(queue, task, 2) is Verdict.STOP
    assert not queue.worker.release(task.task_id, task.attempt)
    assert queue.claim() is None, "it does not wait again"
    if encoder_is_late:
        assert queue.status(task.task_id).status is TaskStatus.RUNNING
        assert store(queue, task, 1)
    assert queue.status(task.task_id).status is TaskStatus.CANCELLED
    assert images(queue, task) == [b"image 0", b"image 1"]


def test_a_task_between_two_images_ends_at_once_when_it_has_to_end_after_the_present_one(
    queue: PlayedQueue,
) -> None:
    task = claim_new(queue)
    assert store(queue, task, 0)
    queue.delete(task.task_id, after_current=True)
    assert queue.status(task.task_id).status is TaskStatus.CANCELLED
    assert images(queue, task) == [b"image 0"]


def test_cancelling_only_what_is_unfinished_removes_no_finished_image(queue: PlayedQueue) -> None:
    task = claim_new(queue)
    assert queue.finish(task.task_id, [b"image 0", b"image 1", b"image 2"])
    assert queue.delete(task.task_id, only_unfinished=True) is TaskStatus.DONE
    assert images(queue, task) == [b"image 0", b"image 1", b"image 2"]
    running = claim_new(queue)
    assert queue.delete(running.task_id, only_unfinished=True) is TaskStatus.RUNNING
    assert queue.delete(running.task_id, only_unfinished=True) is TaskStatus.CANCELLED
    assert queue.status(running.task_id).status is TaskStatus.CANCELLED


def test_a_worker_that_dies_at_the_last_image_that_is_wanted_ends_the_task(
    queue: PlayedQueue,
) -> None:
    task = claim_new(queue)
    assert store(queue, task, 0)
    assert begin(queue, task, 1) is Verdict.CONTINUE
    queue.delete(task.task_id, after_current=True)
    assert queue.worker.release(task.task_id, task.attempt, interrupted=True)
    assert queue.status(task.task_id).status is TaskStatus.CANCELLED
    assert images(queue, task) == [b"image 0"]


def test_a_restart_in_the_middle_keeps_what_was_stored_and_only_the_rest_is_drawn(
    queue: PlayedQueue, tmp_path: Path
) -> None:
    task = claim_new(queue)
    assert store(queue, task, 0)
    queue.scheduler.store.close()
    (tmp_path / "images" / f"{task.task_id}.1").write_bytes(b"of the next one, half")
    again = start(tmp_path)
    assert images(again, task) == [b"image 0"]
    claimed = again.claim()
    assert claimed is not None
    assert (claimed.task_id, claimed.images_done, claimed.attempt) == (task.task_id, 1, 2)
    assert begin(again, claimed, 1) is Verdict.CONTINUE
    assert store(again, claimed, 1)
    assert again.worker.finish(task.task_id, 2, Encoded(b"image 2", 2))
    assert images(again, task) == [b"image 0", b"image 1", b"image 2"]
    again.scheduler.store.close()


def test_a_restart_draws_an_image_again_whose_file_is_lost(
    queue: PlayedQueue, tmp_path: Path
) -> None:
    task = claim_new(queue)
    assert store(queue, task, 0)
    assert store(queue, task, 1)
    queue.scheduler.store.close()
    (tmp_path / "images" / f"{task.task_id}.1").unlink()
    again = start(tmp_path)
    claimed = again.claim()
    assert claimed is not None
    assert claimed.images_done == 1
    again.scheduler.store.close()


def test_images_that_were_fetched_while_the_task_ran_go_only_when_all_were(
    queue: PlayedQueue,
) -> None:
    task = claim_new(queue)
    assert store(queue, task, 0)
    queue.fetched(task.task_id)
    queue.release(task.task_id)
    queue.fetched(task.task_id)
    assert queue.status(task.task_id).fetched_at is None
    again = queue.claim()
    assert again is not None
    assert store(queue, again, 1)
    assert queue.worker.finish(task.task_id, again.attempt, Encoded(b"image 2", 2))
    assert queue.status(task.task_id).fetched_at is None
    for index in (1, 2):
        queue.fetched(task.task_id, index)
    assert queue.status(task.task_id).fetched_at is not None


def test_a_cancelled_task_whose_images_were_all_fetched_counts_as_fetched(
    queue: PlayedQueue,
) -> None:
    task = claim_new(queue)
    assert store(queue, task, 0)
    queue.fetched(task.task_id)
    queue.delete(task.task_id)
    assert queue.status(task.task_id).fetched_at is not None
