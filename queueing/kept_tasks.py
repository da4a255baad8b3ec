"""What has ended: kept for a time, fetched, dropped. All of it is on disk alone.

The changes (mark_fetched, drop, prune) are made under the QueueCore's lock for changes; who only
asks needs none.
"""

import logging
from collections.abc import Callable
from threading import Lock

from errors import Gone, InvalidInput, UnknownTask
from queueing.events import EventKind, EventLog
from queueing.queue_state import Rules
from queueing.task_view import TaskView
from queueing.troubles import Troubles
from storage.stored_task import StoredTask, Tombstone
from storage.task_store import TOMBSTONE_S, TaskStore
from task import GenerationParams, TaskStatus

log = logging.getLogger(__name__)

EXPIRED = "It was kept for its time and has expired."
NO_ROOM = "It made room for newer images."
FETCHED = "The image was fetched and removed."
DELETED = "The task was deleted."


class KeptTasks:
    """All methods may raise StorageUnavailable when the disk refuses, and then nothing has changed.

    Args:
        now: the KeepClock.
    """

    def __init__(
        self,
        store: TaskStore,
        rules: Rules,
        events: EventLog,
        troubles: Troubles,
        now: Callable[[], float],
    ) -> None:
        self._store = store
        self._rules = rules
        self._events = events
        self._troubles = troubles
        self._now = now
        self._lock = Lock()
        self._images, self._images_bytes = store.images()

    @property
    def too_many(self) -> bool:
        """Whether the images take more than the operator allows."""
        return self._images_bytes > self._rules.keep_bytes

    @property
    def images(self) -> tuple[int, int]:
        """How many finished tasks are kept with their images, and the bytes of these."""
        with self._lock:
            return self._images, self._images_bytes

    def find(self, task_id: str) -> StoredTask:
        """Raises: UnknownTask, Gone."""
        found = self._store.find(task_id)
        if found is None:
            raise UnknownTask
        if isinstance(found, Tombstone):
            raise Gone(found)
        if found.fetched_at is not None and found.fetched_at + self._rules.refetch_s <= self._now():
            raise Gone(FETCHED)
        return found

    def view(self, task_id: str) -> TaskView:
        """Raises: UnknownTask, Gone."""
        return _view_of(self.find(task_id))

    def image(self, task_id: str, index: int = 0) -> tuple[bytes, GenerationParams]:
        """One image of a finished task.

        Raises:
            UnknownTask.
            InvalidInput: it has no image of this index.
            Gone: also when the task failed or was cancelled.
        """
        task = self._finished(task_id)
        if index >= task.params.count:
            raise InvalidInput(
                f"index must be a whole number from 0 to {task.params.count - 1} for this task.",
                field="index",
            )
        return self._image_of(task, index), task.params

    def all_images(self, task_id: str) -> tuple[list[bytes], GenerationParams]:
        """All images of a finished task. Raises what image() raises."""
        task = self._finished(task_id)
        return [self._image_of(task, index) for index in range(task.params.count)], task.params

    def added(self, images_bytes: int) -> None:
        """A task is done, with so many bytes of images."""
        with self._lock:
            self._images += 1
            self._images_bytes += images_bytes

    def mark_fetched(self, task_id: str, index: int | None = None) -> None:
        """An image (None: all of them) was sent and shall go. Once all were, the task goes with
        them: at once, or after the time to fetch them again."""
        task = self._store.find(task_id)
        if (
            isinstance(task, StoredTask)
            and task.status is TaskStatus.DONE
            and self._store.mark_fetched(task_id, self._now(), index)
            and self._rules.refetch_s <= 0
        ):
            self.drop(task_id, FETCHED)

    def drop(self, task_id: str, reason: str) -> None:
        dropped_bytes = self._store.drop(task_id, reason, gone_at=self._now())
        with self._lock:
            self._images -= dropped_bytes > 0
            self._images_bytes -= dropped_bytes
        self._events.publish(EventKind.REMOVED, task_id)

    def prune(self) -> None:
        """Drop what was kept long enough, and the oldest images when there are too many."""
        now, rules = self._now(), self._rules
        self._store.clocks.end_future(now)
        for task_id in self._store.fetched_before(now - rules.refetch_s):
            self.drop(task_id, FETCHED)
        for task_id in self._store.ended_before(now - rules.keep_s):
            self.drop(task_id, EXPIRED)
        if self.too_many:
            for task_id in self._store.oldest_images_over(rules.keep_bytes):
                self.drop(task_id, NO_ROOM)
        self._store.remove_tombstones(now - TOMBSTONE_S)

    def _finished(self, task_id: str) -> StoredTask:
        task = self.find(task_id)
        if task.status is TaskStatus.FAILED:
            raise Gone(f"There is no image: the task failed. {task.error}")
        if task.status is TaskStatus.CANCELLED:
            raise Gone("There is no image: the task was cancelled.")
        return task

    def _image_of(self, task: StoredTask, index: int) -> bytes:
        image = self._store.read_image(task.task_id, index)
        if image is None:
            raise Gone("The image's file is missing in the data dir: it was removed from outside.")
        if len(image) != task.image_sizes[index]:
            raise Gone(
                f"The image's file is damaged: it has {len(image)} bytes instead of "
                f"{task.image_sizes[index]}."
            )
        return image


def _view_of(task: StoredTask) -> TaskView:
    return TaskView(
        task_id=task.task_id,
        status=task.status,
        params=task.params,
        urgent=task.urgent,
        created_at=task.created_at,
        started_at=task.started_at,
        ended_at=task.ended_at,
        wait=None,
        phase=None,
        steps_done=task.params.steps_run if task.status is TaskStatus.DONE else 0,
        steps_total=task.params.steps_run,
        progress=1.0 if task.status is TaskStatus.DONE else 0.0,
        error_code=task.error_code,
        error=task.error,
        measured=task.measured,
        images_done=len(task.image_sizes),
        image_sizes=task.image_sizes,
    )
