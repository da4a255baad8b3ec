"""The stream of events that one client of /events gets."""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import errors
from api.client_queue import ClientQueue
from api.event_texts import HEARTBEAT, RETRY, EventTexts, worth_telling
from scheduler.events import ENDS, EventKind
from task import TaskStatus

HEARTBEAT_S = 15.0
LOOK_S = 5.0
"""A stream checks this often whether its client is connected and its tasks have moved up."""
QUEUE_EVERY_S = 1.0
KNOWN_TASKS = 1_000
"""A stream remembers of so many tasks whose they are."""
MOVES = frozenset({EventKind.WAITING, EventKind.RUNNING, *ENDS})
"""What changes the order or the length of the queue."""


class EventStream:
    """What one client gets.

    Args:
        task_ids: the tasks it names; empty: all.
        last_id: the latest event it knows; None: it knows nothing.

    Raises:
        UnknownTask, Gone.
    """

    def __init__(
        self,
        queue: ClientQueue,
        texts: EventTexts,
        task_ids: frozenset[str],
        last_id: int | None,
        *,
        is_gone: Callable[[], bool],
        half_closed: Callable[[], bool],
    ) -> None:
        self._queue, self._texts = queue, texts
        self._is_gone, self._half_closed = is_gone, half_closed
        self._missed_some = last_id is not None and not queue.events.reaches_back(last_id)
        self._starts = last_id is None or self._missed_some
        self._after = queue.events.last_id if last_id is None or self._missed_some else last_id
        self._named = task_ids
        self._open = {task_id for task_id in task_ids if self._is_open(task_id)}
        self._positions: dict[str, int | None] = {}
        self._known: dict[str, bool] = {}
        self._sent_at = self._queue_sent_at = 0.0

    @property
    def is_over(self) -> bool:
        """Whether the client knows all already."""
        return bool(self._named) and not self._open and not self._starts

    def __iter__(self) -> Iterator[bytes]:
        yield RETRY
        if self._starts:
            yield from self._beginning()
        events, queue_changed, look_at, beats = self._queue.events, False, 0.0, False
        while not (events.closed or (self._named and not self._open)):
            if time.monotonic() >= look_at:
                look_at = time.monotonic() + LOOK_S
                if self._is_gone():
                    return
                self._queue.asked(self._open if self._named else None)
                beats = self._half_closed()  # a client that has gone answers it with a reset
            wait_s = LOOK_S
            if queue_changed:
                wait_s = max(self._queue_sent_at + QUEUE_EVERY_S - time.monotonic(), 0.0)
            found = events.wait(self._after, wait_s, self._open if self._named else None)
            if found:
                self._after = found[-1].id
                queue_changed |= not self._named and any(e.kind in MOVES for e in found)
                found = [event for event in found if self._knows(event.task_id)]
                self._open -= {e.task_id for e in found if e.kind in {*ENDS, EventKind.REMOVED}}
            text = b"".join(map(self._texts.of, worth_telling(found)))
            now = time.monotonic()
            if queue_changed and now >= self._queue_sent_at + QUEUE_EVERY_S:
                queue_changed, self._queue_sent_at = False, now
                text += self._texts.of_queue(self._after)
            if not found:
                text += b"".join(self._moved_up())
            if text or beats or now >= self._sent_at + HEARTBEAT_S:
                self._sent_at, beats = now, False
                yield text or HEARTBEAT

    def _beginning(self) -> Iterator[bytes]:
        if self._missed_some or not self._named:
            self._queue_sent_at = time.monotonic()
            yield self._texts.of_queue(self._after)
        for task_id in sorted(self._named):
            yield self._texts.of_task(task_id, self._after)

    def _moved_up(self) -> Iterator[bytes]:
        """The waiting tasks whose position has changed, though nothing happened to themselves."""
        for task_id in self._open:
            with suppress(errors.ServerError):  # it has gone, which is an event
                view = self._queue.status(task_id)
                was, self._positions[task_id] = self._positions.get(task_id), view.pos
                if view.status is TaskStatus.WAITING and view.pos != was:
                    yield self._texts.of_task(task_id, self._after)

    def _knows(self, task_id: str) -> bool:
        """Whether a task belongs to this client. An event that follows soon asks again."""
        if self._named or self._queue.sees_all:
            return True
        if task_id not in self._known:
            if len(self._known) >= KNOWN_TASKS:
                self._known.clear()
            self._known[task_id] = self._queue.knows(task_id)
        return self._known[task_id]

    def _is_open(self, task_id: str) -> bool:
        """Whether there is more to come of a task."""
        version = self._queue.events.version(task_id)
        ended = self._queue.status(task_id).ended
        return not ended or (not self._starts and version > self._after)
