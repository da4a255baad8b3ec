"""The clock of retention, and its state for the next start."""

from collections.abc import Callable

from scheduler.events import EventLog
from storage.state_store import StateStore

RESERVED_IDS = 1_000_000
"""Event ids reserved on disk in advance. Half of them last longer than PRUNE_EVERY_S."""
CLOCK_CHANGE_S = 1.0
"""Smaller differences between two clocks are not stored."""


class KeepClock:
    """Seconds that the wall clock cannot change while the server runs.

    They begin as unix seconds and follow the monotonic clock. When the wall clock is set forward or
    back, the distance to it changes instead. The next start takes over this distance.

    Args:
        offset_s: seconds from the wall clock to this one at the start.
    """

    def __init__(
        self, now: Callable[[], float], monotonic: Callable[[], float], offset_s: float = 0.0
    ) -> None:
        self._now, self._monotonic = now, monotonic
        self._start = now() + offset_s - monotonic()

    def __call__(self) -> float:
        return self._start + self._monotonic()

    def offset_s(self) -> float:
        return self() - self._now()


class ClockNotes:
    """Notes on disk where the KeepClock and the event ids of the next start have to begin."""

    def __init__(self, store: StateStore, keep_clock: KeepClock, events: EventLog) -> None:
        self._store = store
        self._keep_clock = keep_clock
        self._events = events
        self._offset_s = store.keep_offset_s()
        self._reserved_id = store.reserved_event_id()

    def write(self) -> None:
        """Write what has changed (under `changes`). StorageUnavailable: the disk refuses."""
        offset_s = self._keep_clock.offset_s()
        if abs(offset_s - self._offset_s) >= CLOCK_CHANGE_S:
            self._store.set_keep_offset_s(offset_s)
            self._offset_s = offset_s
        if self._events.last_id + RESERVED_IDS // 2 > self._reserved_id:
            up_to = self._events.last_id + RESERVED_IDS
            self._store.reserve_event_ids(up_to)
            self._reserved_id = up_to
