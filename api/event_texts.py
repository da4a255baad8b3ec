"""The events of the queue as they go over the wire: server-sent events, each built once, however
many listen.
"""

import json
import time
from collections.abc import Callable, Sequence
from threading import Condition

from cachetools import LRUCache, cachedmethod

from api.task_answers import status_answer
from errors import ServerError
from queue_manager import QueueManager
from scheduler.events import ENDS, Event, EventKind

KEPT = 1000
EVENT_FIELDS = {
    "task_id",
    "status",
    "pos",
    "wait_remaining",
    "wait_p90_s",
    "reason",
    "progress",
    "phase",
    "steps_done",
    "steps_total",
    "images_done",
    "last_image",
    "machine",
    "expires_at",
    "version",
    "error",
}
"""Fields of StatusAnswer."""
PASSING = (EventKind.STEP, EventKind.PREVIEW)
RETRY = b"retry: 2000\n\n"
HEARTBEAT = b": \n\n"


class EventTexts:
    """Thread-safe. An event shows its task as it is when the text is first requested."""

    def __init__(self, queue: QueueManager) -> None:
        self._queue = queue
        self._texts: LRUCache[tuple[str, int], bytes] = LRUCache(KEPT)
        self._built = Condition()

    def of(self, event: Event) -> bytes:
        return self._once(event.kind, event.id, lambda: self._data(event))

    def of_task(self, task_id: str, event_id: int) -> bytes:
        """A task as it stands, as if that had just happened."""
        status = self._queue.status(task_id).status
        return _text(status, event_id, self._data(Event(event_id, EventKind(status), task_id, 0.0)))

    def of_queue(self, event_id: int) -> bytes:
        """That the order or the length of the queue has changed."""
        return self._once("queue", event_id, lambda: json.dumps({"length": self._queue.length}))

    @cachedmethod(
        lambda self: self._texts,
        key=lambda self, kind, event_id, data: (kind, event_id),
        condition=lambda self: self._built,
    )
    def _once(self, kind: str, event_id: int, data: Callable[[], str]) -> bytes:
        """The first call builds the text, without the lock; others wait for it."""
        return _text(kind, event_id, data())

    def _data(self, event: Event) -> str:
        version = max(self._queue.events.version(event.task_id), event.id)
        try:
            view = self._queue.status(event.task_id)
        except ServerError:  # it has gone
            return json.dumps({"task_id": event.task_id, "version": version})
        answer = status_answer(view, self._queue.state(), time.time(), version=version)
        return answer.model_dump_json(include=EVENT_FIELDS, exclude_none=True)


def worth_telling(events: Sequence[Event]) -> list[Event]:
    """Without what passes and was followed by another of its kind, or by the end of its task."""
    kept: list[Event] = []
    followed: set[tuple[str, str]] = set()
    for event in reversed(events):
        if event.kind not in PASSING or (event.task_id, event.kind) not in followed:
            kept.append(event)
        followed.add((event.task_id, event.kind))
        if event.kind in ENDS:
            followed.update((event.task_id, kind) for kind in PASSING)
    kept.reverse()
    return kept


def _text(kind: str, event_id: int, data: str) -> bytes:
    return f"id: {event_id}\nevent: {kind}\ndata: {data}\n\n".encode()
