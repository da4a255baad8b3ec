"""Events of tasks, for requests that wait for one.

The latest events are kept, so that a listener that was away for a moment misses none. Their ids
only grow, also across restarts and when the clock is set back: they start at the milliseconds of
the start, or above all ids that were reserved on disk before.

The worker publishes between two steps, so publishing only stores the event. A separate thread
("events", started with the first listener) wakes the listeners of its task, a few at a time:
hundreds of threads that wake at once would make the worker and /status wait for the interpreter.
So the number of listeners woken per second is bounded; a listener that wakes gets all events since.
"""

import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import StrEnum
from itertools import count
from threading import Condition
from threading import Event as Flag

from supervision import SupervisedThread

KEPT = 10_000
"""Largest number of kept events, and of tasks whose latest event is known."""
AT_ONCE = 4
"""Number of listeners that are woken together."""
PAUSE_S = 0.01
"""After that: several times what it costs to wake them and to send them something."""


class EventKind(StrEnum):
    WAITING = "waiting"  # submitted, or released
    RUNNING = "running"  # claimed
    STEP = "step"  # a phase was reached or a step has ended
    IMAGE = "image"  # one of several images is stored
    PREVIEW = "preview"  # there is a newer preview
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    REMOVED = "removed"  # the record of an ended task was removed


ENDS = frozenset({EventKind.DONE, EventKind.FAILED, EventKind.CANCELLED})


@dataclass(frozen=True)
class Event:
    id: int
    kind: EventKind
    task_id: str
    at: float
    """Unix seconds."""


class EventLog:
    """Any thread may publish and wait.

    Args:
        above: the ids are higher than this one.
    """

    def __init__(
        self,
        now: Callable[[], float] = time.time,
        *,
        above: int = 0,
        pause_s: float = PAUSE_S,
    ) -> None:
        self._now = now
        self._pause_s = pause_s
        self._lock = Condition()
        """Protects the attributes below; notified when there are events for listeners."""
        self._events: deque[Event] = deque()
        self._last_id = self._forgotten = max(int(now() * 1000), above + 1)
        self._latest: OrderedDict[str, int] = OrderedDict()  # by task, the latest at the end
        self._latest_forgotten = self._last_id
        self._listeners: dict[int, tuple[Flag, Collection[str] | None]] = {}
        self._numbers = count()
        self._news: set[str] = set()
        self.counts: Counter[EventKind] = Counter()
        """Events of each kind since the start."""
        self._closed = False
        self._waker: SupervisedThread | None = None

    @property
    def last_id(self) -> int:
        """Of the latest event; a listener that starts here gets the events from now on."""
        return self._last_id

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def listeners(self) -> int:
        """Number of waiting listeners."""
        return len(self._listeners)

    def version(self, task_id: str) -> int:
        """The id of the latest event of a task, or of the start of the server; never decreases."""
        with self._lock:
            return self._version(task_id)

    def reaches_back(self, after: int) -> bool:
        """Whether all events that came after this id are still kept."""
        return self._forgotten <= after <= self._last_id

    def publish(self, kind: EventKind, task_id: str) -> None:
        with self._lock:
            self._last_id += 1
            self.counts[kind] += 1
            self._events.append(Event(self._last_id, kind, task_id, self._now()))
            self._latest[task_id] = self._last_id
            self._latest.move_to_end(task_id)
            if len(self._events) > KEPT:
                self._forgotten = self._events.popleft().id
            if len(self._latest) > KEPT:
                self._latest_forgotten = self._latest.popitem(last=False)[1]
            if self._listeners:
                self._news.add(task_id)
                self._lock.notify()

    def wait(
        self, after: int, timeout_s: float, task_ids: Collection[str] | None = None
    ) -> list[Event]:
        """Waits for events after this id and returns them; none if the time is over or the
        server stops.

        Args:
            task_ids: only those of these tasks; None: all.
        """
        until = time.monotonic() + timeout_s
        flag, number = Flag(), next(self._numbers)
        with self._lock:
            found = self._after(after, task_ids)
            if found or self._closed or timeout_s <= 0:
                return found
            if self._waker is None:
                waker = SupervisedThread("events", self._wake_listeners, self._wake_all)
                waker.start()
                self._waker = waker
            self._listeners[number] = flag, task_ids
        try:
            while not found and not self._closed and flag.wait(until - time.monotonic()):
                flag.clear()
                with self._lock:
                    found = self._after(after, task_ids)
        finally:
            with self._lock:
                del self._listeners[number]
        return found

    def close(self) -> None:
        """The server stops: all listeners return."""
        with self._lock:
            self._closed = True
            self._lock.notify()
        self._wake_all()

    def _wake_all(self) -> None:
        with self._lock:
            for flag, _ in self._listeners.values():
                flag.set()

    def _wake_listeners(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._news or self._closed)
                if self._closed:
                    return
                news, self._news = self._news, set()
                concerned = [
                    flag
                    for flag, task_ids in self._listeners.values()
                    if task_ids is None or not news.isdisjoint(task_ids)
                ]
            for start in range(0, len(concerned), AT_ONCE):
                for flag in concerned[start : start + AT_ONCE]:
                    flag.set()
                time.sleep(self._pause_s)

    def _version(self, task_id: str) -> int:
        return self._latest.get(task_id, self._latest_forgotten)

    def _after(self, after: int, task_ids: Collection[str] | None) -> list[Event]:
        if task_ids is not None and all(self._version(task_id) <= after for task_id in task_ids):
            return []
        found: list[Event] = []
        for event in reversed(self._events):  # new events are at the end
            if event.id <= after:
                break
            if task_ids is None or event.task_id in task_ids:
                found.append(event)
        found.reverse()
        return found
