"""While the disk works, only the locks of the store's writer are held; while the file of a picture
is written and synced, none."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import GIVE_UP_S, PlayedQueue, allow, params_for

from scheduler.limits import QueueLimits
from storage import file_store
from storage.task_store import TaskStore
from task import Encoded, InputImage, Phase, Task
from timing.corrections import Corrections
from timing.linear import LinearLaw
from timing_model import Measured, TimingModel

PICTURE = InputImage("0123456789abcdef", 64, 64)


class Watched:
    """A queue on disk. Each time that the disk works, `seen` gets what it does and the locks that
    are held."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.store = TaskStore(folder)
        limits = QueueLimits(refetch_s=0.0)
        self.queue = PlayedQueue(
            allow("noise-flux1"), TimingModel(), self.store, limits, monotonic=lambda: self.now
        )
        scheduler, database = self.queue.scheduler, self.store._database
        self.locks: dict[str, Any] = {
            "Scheduler.lock": scheduler.lock,
            "EventLog._lock": scheduler.events._lock,
            "Retention._lock": scheduler.retention._lock,
            "FileStore._input_lock": self.store._files._input_lock,
            "Scheduler.changes": scheduler.changes,
            "Database._write_lock": database._write_lock,
        }
        self.pool = ThreadPoolExecutor(1)
        self.seen: list[tuple[str, set[str]]] = []
        database.connection.set_trace_callback(lambda statement: self.see("writes"))
        database._reader.set_trace_callback(lambda statement: self.see("reads"))
        for name in ("_flush_to_disk", "_sync_folder"):
            self.watch(monkeypatch, name)

    def watch(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        works = getattr(file_store, name)

        def watched(argument: Any) -> None:
            self.see(name)
            works(argument)

        monkeypatch.setattr(file_store, name, watched)

    def see(self, what: str) -> None:
        held = self.pool.submit(self.held).result(GIVE_UP_S)
        self.seen.append((what, held))

    def held(self) -> set[str]:
        """On a thread of its own: an RLock is never held for the thread that has it."""
        held = set()
        for name, lock in self.locks.items():
            if lock.acquire(blocking=False):
                lock.release()
            else:
                held.add(name)
        return held

    def held_during(self, *what: str) -> set[str]:
        return set().union(*(held for seen, held in self.seen if seen in what))

    def running(self, **fields: Any) -> Task:
        self.queue.submit(params_for(**fields), client_key="key", inputs=self.inputs(fields))
        task = self.queue.claim()
        assert task
        return task

    def inputs(self, fields: dict[str, Any]) -> dict[str, bytes]:
        return {PICTURE.file: b"png"} if "init_image" in fields else {}


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    watched = Watched(tmp_path, monkeypatch)
    yield watched
    watched.store._database.connection.set_trace_callback(None)
    watched.store._database._reader.set_trace_callback(None)
    watched.store.close()
    watched.pool.shutdown()


def load(queue: PlayedQueue) -> None:
    queue.load()


def draw(watched: Watched) -> None:
    queue, task = watched.queue, watched.running(count=3, init_image=PICTURE, image_strength=0.5)
    queue.report(task.task_id, Phase.DENOISING, 1, 4)
    for index in range(2):
        queue.worker.store_image(task.task_id, task.attempt, Encoded(b"image", index))
        queue.next_image(task.task_id, 0, index + 1)
    watched.now += 1.0
    assert queue.worker.finish(task.task_id, task.attempt, Encoded(b"image", 2))
    queue.worker.left(task.task_id)
    assert queue.image(task.task_id)[0] == b"image"
    queue.fetched(task.task_id)


def end_otherwise(watched: Watched) -> None:
    queue = watched.queue
    for end in (
        lambda task: queue.fail(task.task_id, "task_failed", "why"),
        lambda task: queue.release(task.task_id) and queue.delete(task.task_id),
        lambda task: queue.delete(task.task_id),
        lambda task: queue.delete(task.task_id, after_current=True),
    ):
        end(watched.running(count=2))
        watched.queue.worker.release_all()


def ask(watched: Watched) -> None:
    queue = watched.queue
    waiting, _ = queue.submit(params_for())
    queue.status(waiting.task_id)
    queue.unfinished(10, 0)
    queue.estimate(params_for())
    queue.health()
    queue.stats()
    watched.now += 100.0
    queue.worker.prune()
    queue.scheduler.check_storage()


@pytest.mark.parametrize("story", [draw, end_otherwise, ask])
def test_no_lock_but_the_writers_is_held_while_the_disk_works(
    watched: Watched, story: Callable[[Watched], None]
) -> None:
    load(watched.queue)
    story(watched)
    writers = {"Scheduler.changes", "Database._write_lock"}
    assert {what for what, _ in watched.seen} >= {"writes"}
    assert watched.held_during("writes", "reads", "_sync_folder", "_flush_to_disk") <= writers
    assert watched.held_during("writes") == writers, "the check sees a lock that is held"


def test_no_lock_at_all_is_held_while_the_file_of_a_picture_is_written_and_synced(
    watched: Watched,
) -> None:
    load(watched.queue)
    draw(watched)
    synced = [what for what, _ in watched.seen if what == "_flush_to_disk"]
    assert len(synced) == 4, "an input image and three images"
    assert watched.held_during("_flush_to_disk") == set()


def test_no_lock_is_held_while_the_laws_of_time_are_fitted(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind, name in ((LinearLaw, "fit"), (Corrections, "__init__"), (Corrections, "at")):
        works = getattr(kind, name)

        def seen(*arguments: Any, name: str = name, works: Any = works, **more: Any) -> Any:
            watched.see(name)
            return works(*arguments, **more)

        monkeypatch.setattr(kind, name, seen)
    queue, measured = watched.queue, Measured(0.5, [1.0] * 4, 0.5, 0.01)
    load(queue)
    for steps in (4, 8, 4):
        queue.submit(params_for(steps=steps))
        task = queue.claim()
        assert task
        queue.submit(params_for(steps=8))
        watched.now += 5.0
        encoded = Encoded(b"image", 0, ((0, measured),))
        assert queue.worker.finish(task.task_id, task.attempt, encoded)
        queue.delete(queue.unfinished(1, 0)[0][0].task_id)
    assert watched.held_during("fit", "__init__") == set()
    assert "at" in {what for what, _ in watched.seen}
