"""Maps callers to their tasks, because progress and interrupt of AUTOMATIC1111 name no task."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Lock

from api.client_queue import OwnQueue
from errors import Gone, UnknownTask
from task import Task

Caller = tuple[str, ...]


class Callers:
    """Thread-safe."""

    def __init__(self, own_queue: OwnQueue) -> None:
        self._own_queue = own_queue
        self._lock = Lock()
        self._tasks: dict[Caller, list[str]] = {}
        self._interrupted: set[str] = set()

    @contextmanager
    def waiting(self, caller: Caller, task_id: str) -> Iterator[None]:
        with self._lock:
            self._tasks.setdefault(caller, []).append(task_id)
        try:
            yield
        finally:
            with self._lock:
                self._tasks[caller].remove(task_id)
                if not self._tasks[caller]:
                    del self._tasks[caller]
                self._interrupted.discard(task_id)

    def present(self, caller: Caller) -> Task | None:
        """Returns the running task of this caller, or its first waiting one."""
        with self._lock:
            task_ids = list(self._tasks.get(caller, ()))
        views = [view for task_id in task_ids if (view := self._unfinished(task_id))]
        return min(views, key=_end_s, default=None)

    def interrupt(self, caller: Caller) -> None:
        """Stops the current task of this caller, and no other one."""
        view = self.present(caller)
        if view is None:
            return
        with self._lock:
            if view.task_id not in self._tasks.get(caller, ()):
                return  # its call has just ended
            self._interrupted.add(view.task_id)
        with suppress(Gone, UnknownTask):
            self._own_queue().delete(view.task_id, only_unfinished=True)

    def was_interrupted(self, task_id: str) -> bool:
        with self._lock:
            return task_id in self._interrupted

    def _unfinished(self, task_id: str) -> Task | None:
        try:
            view = self._own_queue().status(task_id)
        except (UnknownTask, Gone):
            return None
        return None if view.ended else view


def _end_s(task: Task) -> float:
    return task.forecast.end_s if task.forecast else 0.0
