"""Batches that are cancelled while a worker draws them, in the scheduler."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import PlayedQueue, allow, params_for

from scheduler.limits import QueueLimits
from storage.task_store import TaskStore
from task import Encoded, InputImage, Phase, Task, TaskStatus
from timing_model import TimingModel


class Played:
    """A queue on disk whose worker the test plays; again() restarts it after a kill -9."""

    def __init__(self, folder: Path, *models: str) -> None:
        self.folder = folder
        self.allowed = allow(*models or ("noise-flux1",))
        self.now = 0.0
        self.queue = self._open()

    def _open(self) -> PlayedQueue:
        self.store = TaskStore(self.folder)
        queue = PlayedQueue(
            self.allowed, TimingModel(), self.store, QueueLimits(), monotonic=lambda: self.now
        )
        queue.load()
        return queue

    def again(self) -> None:
        self.store.close()
        self.queue = self._open()

    def running(self, count: int, **fields: Any) -> Task:
        self.queue.submit(params_for(count=count, seed=5, **fields))
        task = self.queue.claim()
        assert task
        return task

    def store_image(self, task: Task) -> bool:
        index = self.queue.status(task.task_id).images_done
        encoded = Encoded(b"image", index)
        return self.queue.worker.store_image(task.task_id, task.attempt, encoded)


@pytest.fixture
def played(tmp_path: Path) -> Iterator[Played]:
    played = Played(tmp_path)
    yield played
    played.store.close()


def _state(played: Played, task: Task) -> tuple[TaskStatus, int]:
    task = played.queue.status(task.task_id)
    return task.status, task.images_done


@pytest.mark.parametrize("images", [0, 2])
def test_after_a_kill_9_a_task_that_was_to_end_is_cancelled_with_its_images(
    played: Played, images: int
) -> None:
    task = played.running(count=5)
    for number in range(images):
        assert played.store_image(task)
        played.queue.next_image(task.task_id, 0, number + 1)
    played.queue.delete(task.task_id, after_current=True)
    played.again()
    assert _state(played, task) == (TaskStatus.CANCELLED, images)
    assert played.queue.claim() is None
    assert [played.queue.image(task.task_id, index)[0] for index in range(images)] == [
        b"image"
    ] * images


@pytest.mark.parametrize("interrupted", [True, False])
def test_a_task_that_was_to_end_does_not_wait_again_when_its_worker_leaves_it(
    played: Played, interrupted: bool
) -> None:
    task = played.running(count=3)
    played.queue.delete(task.task_id, after_current=True)
    assert played.queue.release(task.task_id, interrupted=interrupted)
    assert _state(played, task) == (TaskStatus.CANCELLED, 0)
    assert played.queue.claim() is None


def test_the_last_image_is_stored_though_the_worker_has_left_before(played: Played) -> None:
    task = played.running(count=3)
    played.queue.delete(task.task_id, after_current=True)
    assert not played.queue.next_image(task.task_id, 0, 1), "the worker has to stop"
    played.queue.release(task.task_id)
    status = played.queue.status(task.task_id)
    assert (status.status, status.phase) == (TaskStatus.RUNNING, Phase.IMAGE_ENCODING)
    other = played.running(count=1)
    assert other.status is TaskStatus.RUNNING, "the GPU is free for the next task"
    assert played.store_image(task)
    assert _state(played, task) == (TaskStatus.CANCELLED, 1)


def test_a_batch_whose_images_are_still_to_be_upscaled_is_cancelled_at_once(
    tmp_path: Path,
) -> None:
    played = Played(tmp_path, "noise-flux1", "noise-seedvr2")
    task = played.running(count=3, upscale=2.0, upscaler="noise-seedvr2")
    played.queue.next_image(task.task_id, 0, 1)
    status = played.queue.status(task.task_id)
    assert status.progress is not None
    assert (status.images_done, status.progress.image, status.progress.stage) == (0, 1, 0)
    played.queue.delete(task.task_id, after_current=True)
    assert _state(played, task) == (TaskStatus.CANCELLED, 0)
    other = played.running(count=3, upscale=2.0, upscaler="noise-seedvr2")
    for stage, index in ((0, 1), (0, 2), (1, 0)):
        played.queue.next_image(other.task_id, stage, index)
    played.queue.delete(other.task_id, after_current=True)
    assert played.store_image(other)
    assert _state(played, other) == (TaskStatus.CANCELLED, 1)
    played.store.close()


def test_an_encoder_that_dies_with_the_last_image_leaves_a_cancelled_task(played: Played) -> None:
    task = played.running(count=3)
    played.queue.delete(task.task_id, after_current=True)
    played.queue.next_image(task.task_id, 0, 1)
    played.queue.release(task.task_id)
    played.queue.release(task.task_id, interrupted=True)
    assert _state(played, task) == (TaskStatus.CANCELLED, 0)


def test_a_task_whose_present_image_is_stored_already_is_cancelled_at_once(
    played: Played,
) -> None:
    task = played.running(count=3)
    assert played.store_image(task)  # and the worker has not reported the next one yet
    played.queue.delete(task.task_id, after_current=True)
    assert _state(played, task) == (TaskStatus.CANCELLED, 1)


def test_input_images_go_once_the_worker_has_left(played: Played) -> None:
    picture = InputImage("0123456789abcdef", 64, 64)
    params = params_for(count=3, init_image=picture, image_strength=0.5)
    submitted, _ = played.queue.submit(params, inputs={picture.file: b"png"})
    task = played.queue.claim()
    assert task
    folder = played.store.inputs_of(submitted.task_id)
    played.queue.delete(task.task_id, after_current=True)
    assert [path.name for path in folder.iterdir()] == [f"{picture.file}.png"]
    assert played.store_image(task)
    played.queue.worker.left(task.task_id)
    assert not folder.exists()
