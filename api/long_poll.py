"""Waiting for one task on an HTTP thread, until it is as wanted."""

import time
from collections.abc import Callable
from contextlib import suppress

from api.waiting_places import WaitingPlaces
from errors import TooManyWaiting
from queue_manager import QueueManager
from queueing.task_view import TaskView

LOOK_S = 5.0
"""A waiting request looks up this often, whether its client is still there."""


def watch(
    queue: QueueManager,
    places: WaitingPlaces,
    task_id: str,
    *,
    wait_s: float,
    enough: Callable[[TaskView, int], bool],
    is_gone: Callable[[], bool] = lambda: False,
) -> tuple[TaskView, int]:
    """A task and its version: once they are enough, or it has ended, or wait_s are over, or the
    client is gone, or the server stops; at once if no waiting place is free.

    Raises:
        UnknownTask, Gone: also when that comes to pass meanwhile.
    """
    until = time.monotonic() + wait_s
    view, version = _look(queue, task_id)
    if wait_s <= 0 or view.wait is None or enough(view, version):
        return view, version
    with suppress(TooManyWaiting), places.place():
        while not (view.wait is None or enough(view, version)):
            remaining_s = until - time.monotonic()
            if remaining_s <= 0 or queue.events.closed or is_gone():
                break
            queue.events.wait(version, min(remaining_s, LOOK_S), {task_id})
            view, version = _look(queue, task_id)
    return view, version


def _look(queue: QueueManager, task_id: str) -> tuple[TaskView, int]:
    version = queue.events.version(task_id)  # before the look: what comes in between is news
    return queue.status(task_id), version
