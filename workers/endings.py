"""Ends the attempts of tasks: failed or released, as soon as the disk takes it."""

import logging
import time
from collections.abc import Callable
from threading import Event

from errors import ModelLoadError, ServerError, StorageUnavailable, without_folders
from task import Task
from workers.protocols import TaskSource

log = logging.getLogger(__name__)

RETRY_S = 1.0
"""Pause before the disk is tried again."""


class Endings:
    """The worker thread and the encoder thread call it."""

    def __init__(self, source: TaskSource) -> None:
        self._source = source
        self._stopping = Event()
        self._until = 0.0

    def stop(self, drain_s: float = 0.0) -> None:
        """The server stops: after drain_s seconds nothing is tried twice."""
        self._until = time.monotonic() + drain_s
        self._stopping.set()

    def pause(self) -> bool:
        """Wait for RETRY_S, at most until it is too late to try again. Returns whether it is."""
        if not self._stopping.wait(RETRY_S):
            return False
        left_s = self._until - time.monotonic()
        time.sleep(max(min(RETRY_S, left_s), 0.0))
        return left_s <= 0.0

    def insist(self, change: Callable[[], object]) -> None:
        """Try until the disk takes the change, or the server stops and its time to drain is over: a
        full disk loses no work."""
        while True:
            try:
                change()
            except StorageUnavailable:
                if self.pause():
                    return
            else:
                return

    def fail(self, task: Task, error: Exception) -> None:
        """A task ends with this error."""
        if isinstance(error, ServerError):
            code, message = error.code, error.message
        elif isinstance(error, ModelLoadError):
            code, message = error.code, without_folders(str(error))
        else:
            code, message = "task_failed", without_folders(f"{type(error).__name__}: {error}")
        self.insist(lambda: self._source.fail(task.task_id, task.attempt, code, message))

    def release(self, task: Task, *, interrupted: bool = False) -> None:
        """A task waits again. Args: interrupted: a thread died with it."""
        self.insist(
            lambda: self._source.release(task.task_id, task.attempt, interrupted=interrupted)
        )
