"""Waits on an HTTP thread until a task has the wanted state."""

import time
from collections.abc import Callable
from contextlib import suppress

from api.client_queue import ClientQueue
from api.waiting_places import WaitingPlaces
from errors import TooManyWaiting
from task import Task

LOOK_S = 5.0
"""A waiting request checks this often whether its client is still connected."""


def watch(
    queue: ClientQueue,
    places: WaitingPlaces,
    task_id: str,
    *,
    wait_s: float,
    enough: Callable[[Task, int], bool],
    is_gone: Callable[[], bool] = lambda: False,
) -> tuple[Task, int]:
    """A task and its version: once they are enough, or it has ended, or wait_s are over, or the
    client is gone, or the server stops; at once if no waiting place is free.

    Raises:
        UnknownTask, Gone: also when that comes to pass meanwhile.
    """
    until = time.monotonic() + wait_s
    view, version = _look(queue, task_id)
    if wait_s <= 0 or view.ended or enough(view, version):
        return view, version
    with suppress(TooManyWaiting), places.place():
        while not (view.ended or enough(view, version)):
            remaining_s = until - time.monotonic()
            if remaining_s <= 0 or queue.events.closed or is_gone():
                break
            queue.events.wait(version, min(remaining_s, LOOK_S), {task_id})
            view, version = _look(queue, task_id)
    return view, version


def _look(queue: ClientQueue, task_id: str) -> tuple[Task, int]:
    version = queue.events.version(task_id)  # before the look: what comes in between is news
    return queue.status(task_id), version
