"""Tasks that have ended: kept for a time, fetched, removed. They are on disk alone.

The changes (keep, mark_fetched, drop, prune) are made under the scheduler's `changes` lock; reading
needs no lock.
"""

import logging
from collections.abc import Callable
from threading import Lock

from errors import Gone, InvalidInput, KeepLimit, UnknownTask, WrongStatus
from scheduler.events import EventKind, EventLog
from scheduler.limits import ANONYMOUS_PIN_S, QueueLimits
from storage.ended_tasks import TOMBSTONE_S
from storage.task_rows import Tombstone
from storage.task_store import TaskStore
from task import ANONYMOUS, Task, TaskStatus

log = logging.getLogger(__name__)

EXPIRED = "It was kept for its time and has expired."
NO_ROOM = "It made room for newer images."
NO_RECORD = "It made room for the records of newer tasks."
MOST_WITHOUT_IMAGES = 5_000
"""Failed and cancelled tasks that are kept without images. One that is cancelled costs its client
nothing, and its prompts may take half a megabyte."""
FETCHED = "The image was fetched and removed."
DELETED = "The task was deleted."


class Retention:
    """All methods may raise StorageUnavailable when the disk refuses; then nothing has changed.

    Args:
        now: the KeepClock.
    """

    def __init__(
        self,
        store: TaskStore,
        limits: QueueLimits,
        events: EventLog,
        now: Callable[[], float],
    ) -> None:
        self._store = store
        self._limits = limits
        self._events = events
        self._now = now
        self._lock = Lock()
        self._images, self._images_bytes = store.ended.images()
        self._future_is_possible = True
        """Whether the database may have times in the future, which an earlier process wrote: the
        KeepClock only grows."""

    @property
    def too_many(self) -> bool:
        """Whether the images take more than the operator allows."""
        return self._images_bytes > self._limits.keep_bytes

    @property
    def images(self) -> tuple[int, int]:
        """How many ended tasks are kept with images, and the bytes of these."""
        with self._lock:
            return self._images, self._images_bytes

    def find(self, task_id: str) -> Task:
        """Raises: UnknownTask, Gone."""
        found = self._store.find(task_id)
        if found is None:
            raise UnknownTask
        if isinstance(found, Tombstone):
            raise Gone(found, owner=found.owner)
        found.expires_in_s = self._left_s(found)
        kept_until = (found.fetched_at or 0.0) + self._limits.refetch_s
        if found.fetched_at is not None and kept_until <= self._now():
            raise Gone(FETCHED, owner=found.owner.name)
        return found

    def keep(self, task: Task, kept: bool) -> None:
        """Pin an ended task, or release it: its time begins again.

        Raises:
            WrongStatus: it has not ended, or has no images.
            KeepLimit: its client, or all clients together, may pin no more.
        """
        if not task.ended or not task.images_done:
            raise WrongStatus("Only a task that has ended with pictures can be kept.")
        if kept and not task.kept:
            self._check_room_for(task)
        if kept or task.kept:
            self._store.ended.keep(task.task_id, kept, self._now())

    def kept_by(self, owner: str) -> tuple[int, int]:
        """Returns how many pictures a client has pinned, and how many it may."""
        return self._store.ended.kept(owner)[0], self._limits.max_kept_pictures

    def image(self, task: Task, index: int) -> bytes:
        """One stored image.

        Raises:
            InvalidInput: the task has no image of this index.
            Gone: the image was removed, or the task ended without it.
        """
        if index >= task.params.count:
            raise InvalidInput(
                f"index must be a whole number from 0 to {task.params.count - 1} for this task.",
                field="index",
            )
        if index >= task.images_done:
            raise Gone(_why_without(task))
        image = self._store.read_image(task.task_id, index)
        if image is None:
            raise Gone("The image's file is missing in the data dir: it was removed from outside.")
        if len(image) != task.image_sizes[index]:
            raise Gone(
                f"The image's file is damaged: it has {len(image)} bytes instead of "
                f"{task.image_sizes[index]}."
            )
        return image

    def all_images(self, task: Task) -> list[bytes]:
        """All stored images. Raises what image() raises; Gone if there are none."""
        return [self.image(task, index) for index in range(max(task.images_done, 1))]

    def added(self, image_bytes: int, *, first: bool) -> None:
        """An image of this size was stored, the first one of its task or another one."""
        with self._lock:
            self._images += first
            self._images_bytes += image_bytes

    def mark_fetched(self, task_id: str, index: int | None = None) -> None:
        """An image (None: all) was sent and is removed. Once all of an ended task were, the task
        goes with them: at once, or after the time in which they can be fetched again."""
        all_fetched = self._store.ended.mark_fetched(task_id, self._now(), index)
        if all_fetched and self._limits.refetch_s <= 0:
            self.drop(task_id, FETCHED)

    def drop(self, task_id: str, reason: str) -> None:
        dropped_bytes = self._store.ended.drop(task_id, reason, gone_at=self._now())
        with self._lock:
            self._images -= dropped_bytes > 0
            self._images_bytes -= dropped_bytes
        self._events.publish(EventKind.REMOVED, task_id)

    def prune(self) -> None:
        """Remove what was kept long enough, and the oldest images when there are too many."""
        now, limits = self._now(), self._limits
        if self._future_is_possible:
            self._store.state.end_future(now)
            self._future_is_possible = False
        for task_id in self._store.ended.fetched_before(now - limits.refetch_s):
            self.drop(task_id, FETCHED)
        for task_id in self._store.ended.ended_before(now - limits.keep_s):
            self.drop(task_id, EXPIRED)
        for task_id in self._store.ended.drop_over(MOST_WITHOUT_IMAGES, NO_RECORD, now):
            self._events.publish(EventKind.REMOVED, task_id)
        for task_id in self._store.ended.anonymous_pins_before(now - ANONYMOUS_PIN_S):
            self.drop(task_id, EXPIRED)
        if self.too_many:
            for task_id in self._store.ended.oldest_images_over(limits.keep_bytes):
                self.drop(task_id, NO_ROOM)
        self._store.ended.remove_tombstones(now - TOMBSTONE_S)

    def _left_s(self, task: Task) -> float | None:
        """Seconds until an ended task is removed; None: it does not expire."""
        anonymous = task.owner.name.startswith(ANONYMOUS)
        if task.kept_since is None or (task.kept and not anonymous):
            return None
        until = task.kept_since + (ANONYMOUS_PIN_S if task.kept else self._limits.keep_s)
        if task.fetched_at is not None:
            until = min(until, task.fetched_at + self._limits.refetch_s)
        return until - self._now()

    def _check_room_for(self, task: Task) -> None:
        """Raises: KeepLimit."""
        pictures, most = self.kept_by(task.owner.name)
        if pictures + task.images_done > most:
            raise KeepLimit(
                f"{pictures} pictures are kept for you, and {most} are allowed "
                "(--max-kept-pictures): download some and release them first."
            )
        if self._store.ended.kept()[1] + sum(task.image_sizes) > self._limits.keep_bytes // 2:
            raise KeepLimit(
                "The kept pictures of all clients take half of the space for pictures "
                "(--keep-bytes): download yours instead."
            )


def _why_without(task: Task) -> str:
    if task.status is TaskStatus.FAILED:
        return f"There is no image: the task failed. {task.error}"
    if task.status is TaskStatus.CANCELLED:
        why = f". {task.error}" if task.error else ": the task was cancelled."
        return f"There is no image{why}"
    return "The image was removed."
