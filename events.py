"""What happens to tasks, as it happens: for those who wait for something without asking again.

The latest events are kept, so that a listener who was away for a moment misses nothing. Their ids
grow for ever, also over a restart of the server: they start at the time of the start.
"""

import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import StrEnum
from threading import Condition

KEPT = 10_000


class EventKind(StrEnum):
    WAITING = "waiting"  # submitted, or released
    RUNNING = "running"  # claimed
    STEP = "step"  # a phase was reached or a step has ended
    IMAGE = "image"  # one of several images is drawn
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    REMOVED = "removed"  # the record of an ended task has gone


@dataclass(frozen=True)
class Event:
    id: int
    kind: EventKind
    task_id: str
    at: float
    """Unix seconds."""


class EventLog:
    """Any thread may publish and wait."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._events: deque[Event] = deque(maxlen=KEPT)
        self._last_id = int(now() * 1000)
        self._published = Condition()
        self._closed = False

    @property
    def last_id(self) -> int:
        """Of the latest event; a listener who starts here gets what comes from now on."""
        return self._last_id

    @property
    def closed(self) -> bool:
        return self._closed

    def publish(self, kind: EventKind, task_id: str) -> None:
        with self._published:
            self._last_id += 1
            self._events.append(Event(self._last_id, kind, task_id, self._now()))
            self._published.notify_all()

    def wait(
        self, after: int, timeout_s: float, task_ids: Collection[str] | None = None
    ) -> list[Event]:
        """Events that came after this id, as soon as there is one; none when time is up or the
        server stops.

        Args:
            task_ids: only those of these tasks; None: all.
        """
        found: list[Event] = []

        def look() -> bool:
            nonlocal found
            found = self._after(after, task_ids)
            return bool(found) or self._closed

        with self._published:
            self._published.wait_for(look, timeout_s)
        return found

    def close(self) -> None:
        """The server stops: nobody waits any longer."""
        with self._published:
            self._closed = True
            self._published.notify_all()

    def _after(self, after: int, task_ids: Collection[str] | None) -> list[Event]:
        found: list[Event] = []
        for event in reversed(self._events):  # what is new is at the end
            if event.id <= after:
                break
            if task_ids is None or event.task_id in task_ids:
                found.append(event)
        found.reverse()
        return found
