"""What becomes of the tasks that waited or ran when the last process ended, and what it has noted
for the clocks and events of this one."""

from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass, field

from allowed import Allowed
from clocks import KeepClock
from errors import InvalidInput, ModelNotAllowed, NotSupported
from scheduler.events import EventLog
from scheduler.limits import ENDED_TOO_OFTEN, MAX_INTERRUPTIONS
from storage.state_store import StateStore
from task import Task, TaskStatus
from timing_model import LOCAL

RESERVED_IDS = 1_000_000
"""Event ids reserved on disk in advance. Half of them last longer than PRUNE_EVERY_S."""
CLOCK_CHANGE_S = 1.0
"""Smaller differences between two clocks are not stored."""


@dataclass(frozen=True)
class Restarted:
    waiting: list[Task] = field(default_factory=list)
    """They wait again. In the order of their submits."""
    released: list[tuple[Task, bool]] = field(default_factory=list)
    """Those of them that ran, as they are stored, and whether this counts as an interruption."""
    cancelled: list[Task] = field(default_factory=list)
    failed: list[tuple[Task, str, str]] = field(default_factory=list)
    """With code and message."""


def restart(unfinished: Iterable[Task], allowed: Allowed) -> Restarted:
    """Gives the waiting ones their stages."""
    found = Restarted()
    for task in unfinished:
        # A worker elsewhere has not died with the server.
        died = task.status is TaskStatus.RUNNING and task.machine == LOCAL
        if task.last_image is not None:  # that image is lost, and no other one is wanted
            found.cancelled.append(task)
            continue
        try:
            stages = allowed.stages(task.params, task.images_done)
        except (ModelNotAllowed, NotSupported, InvalidInput) as error:
            # The operator allows less than before.
            found.failed.append((task, error.code, error.message))
            continue
        if died and task.interruptions + 1 >= MAX_INTERRUPTIONS:
            found.failed.append((task, *ENDED_TOO_OFTEN))
            continue
        task.stages = stages
        if task.status is TaskStatus.RUNNING:
            found.released.append((copy(task), died))
            task.status, task.started_at = TaskStatus.WAITING, None
            task.interruptions += died
        found.waiting.append(task)
    return found


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
