"""What the queue's two sides share: the tasks in memory, the store, the locks, and the start.

Tasks that wait or run are in memory and on disk, those that have ended on disk alone. Every change
is made on disk first, then in memory. Two locks, always taken in this order: `_writing` (one change
at a time, held while the disk works) and `_lock` (the memory, held for microseconds), so that
nobody who only asks waits for the disk. Conditions wake the worker and the downloads: nobody polls
with sleep.
"""

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from threading import Condition, Lock

from errors import (
    InvalidInput,
    ModelNotAllowed,
    NotSupported,
    StorageUnavailable,
)
from models.model_catalog import Model, Weights
from offer import Offer
from queueing.events import EventKind, EventLog
from queueing.keep_clock import KeepClock
from queueing.kept_tasks import KeptTasks
from queueing.live_queue import LiveQueue
from queueing.queue_state import Rules
from queueing.troubles import Troubles
from storage.task_store import TaskStore
from task import Task, TaskStatus
from timing_model import Spread, TimingModel

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 2
"""A task during which the process ended so many times is failed instead of tried again."""
ENDED_TOO_OFTEN = (
    "ended_too_often",
    f"The server ended {MAX_ATTEMPTS} times while this task ran, so it is not tried again. The "
    "usual cause is too little memory: ask for a smaller picture, a smaller model or fewer bits "
    "(quantize).",
)
PRUNE_EVERY_S = 10.0
RESERVED_IDS = 1_000_000
"""Of events, noted on disk in advance. Half of them last for longer than PRUNE_EVERY_S."""
CLOCK_CHANGE_S = 1.0
"""A smaller distance between two clocks is not noted."""


class QueueCore:
    """All methods may raise StorageUnavailable when the disk refuses; then nothing has changed."""

    def __init__(
        self,
        offer: Offer,
        timing: TimingModel,
        store: TaskStore,
        rules: Rules | None = None,
        *,
        needs_download: Callable[[Model], bool] = lambda model: False,
        monotonic: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
        gaps: Callable[[], int] = lambda: 0,
    ) -> None:
        """Goes on where the store's last process ended.

        Args:
            offer: the models that tasks may use; the first of them is loaded at the start.
            needs_download: whether a model's weights are not on this machine; called by any thread.
            gaps: how often the process was stopped so far: what was measured meanwhile is not
                learned.
        """
        self.offer = offer
        self.model = offer.default
        self._store = store
        self._needs_download = needs_download
        self._rules = rules or Rules()
        self._monotonic = monotonic
        self._now = now

        self._reserved_id = store.clocks.reserved_event_id()
        self._noted_offset_s = store.clocks.keep_offset_s()
        self.keep_clock = KeepClock(now, monotonic, self._noted_offset_s)
        self.events = EventLog(now, above=self._reserved_id)
        """What happens to tasks; those that wait for something listen here."""
        self._writing = Lock()
        self._lock = Lock()
        self._wake_worker = Condition(self._lock)
        self._wake_downloads = Condition(self._lock)
        self._spread = Spread(store.timings.outcomes())
        self._own = Weights(self.model, self.model.pipelines[0], offer.quantize)
        self._loaded: dict[str, Weights] = {}
        self._load_orders: list[Weights] = []
        self._here = {self.model.name}  # of these the weights need no download
        self._live = LiveQueue(
            timing,
            self._spread,
            monotonic,
            self._own,
            in_memory=self._rules.models_in_memory,
            affinity_s=self._rules.affinity_s,
            gaps=gaps,
        )
        self._troubles = Troubles()
        self._kept = KeptTasks(store, self._rules, self.events, self._troubles, self.keep_clock)
        self._prune_at = 0.0
        self._drain_until: float | None = None
        with suppress(StorageUnavailable):  # the next prune() tries again
            self._note_clocks()
        self._unsettled: list[Callable[[], object]] = []
        """What a start on a disk that refuses has yet to write."""
        self._restore()
        with suppress(StorageUnavailable):  # the server starts all the same
            self.check_storage()

    @property
    def stopping(self) -> bool:
        return self._drain_until is not None

    def stop(self, drain_s: float = 0.0) -> None:
        """Accept and hand out no more tasks. The running one may go on for drain_s seconds if it
        is forecast to end by then; else it is told at its next report."""
        with self._lock:
            self._drain_until = self._monotonic() + drain_s
            self._wake_worker.notify_all()
            self._wake_downloads.notify_all()

    def prune(self) -> None:
        """Drop what was kept long enough, and the oldest images when there are too many."""
        if not self._kept.too_many and self._monotonic() < self._prune_at:
            return
        self._prune_at = self._monotonic() + PRUNE_EVERY_S
        try:
            with self._writing, self._troubles.noting_storage():
                self._kept.prune()  # first, for it makes room
                self._note_clocks()
        except StorageUnavailable as error:
            log.warning("pruning is put off: %s", error)

    def check_storage(self) -> None:
        """Notice a disk that refuses, and one that works again. Tries to write only if it refused
        something before, or seems to be full or read-only.

        Raises:
            StorageUnavailable: it refuses.
        """
        if self._troubles.storage_error is not None:
            self.prune()  # which makes room
        with self._writing, self._troubles.noting_storage(probing=True):
            fine = self._store.seems_fine() and self._troubles.storage_error is None
            if not fine:
                self._store.probe()
            self._settle_restored()
            if not fine:
                self._troubles.storage_works()

    # -- inside, under _writing -------------------------------------------------------------------

    def _note_clocks(self) -> None:
        """Note for the next start where its KeepClock and its event ids have to begin."""
        offset_s = self.keep_clock.offset_s()
        if abs(offset_s - self._noted_offset_s) >= CLOCK_CHANGE_S:
            self._store.clocks.set_keep_offset_s(offset_s)
            self._noted_offset_s = offset_s
        if self.events.last_id + RESERVED_IDS // 2 > self._reserved_id:
            up_to = self.events.last_id + RESERVED_IDS
            self._store.clocks.reserve_event_ids(up_to)
            self._reserved_id = up_to

    def _restore(self) -> None:
        for model, seconds in self._store.timings.loads().items():
            self._live.state.timing.learn_load(model, seconds)
        for work, measured in self._store.timings.samples():
            self._live.state.timing.learn(work, measured)
        levels: set[bool] = set()
        for stored in self._store.unfinished():
            task = Task(
                stored.task_id,
                stored.params,
                stored.urgent,
                (),
                stored.created_at,
                status=stored.status,
                attempts=stored.attempts,
            )
            try:
                task.stages = self.offer.stages(stored.params)
            except (ModelNotAllowed, NotSupported, InvalidInput) as error:
                # The operator allows less than before.
                self._unsettled.append(partial(self._fail, task, error.code, error.message))
                continue
            if task.status is TaskStatus.RUNNING:
                if task.attempts >= MAX_ATTEMPTS:
                    self._unsettled.append(partial(self._fail, task, *ENDED_TOO_OFTEN))
                    continue
                self._unsettled.append(
                    partial(self._store.release, task.task_id, count_attempt=True)
                )
                task.status = TaskStatus.WAITING
            if missing := self._missing(*(stage.weights for stage in task.stages)):
                self._live.hold(task, missing)
                continue
            self._live.add(task)
            if task.urgent not in levels:  # it ran, or was next: nobody goes ahead of it
                levels.add(task.urgent)
                task.patience_s = 0.0
        if len(self._live):
            log.info("%d tasks from before the start wait", len(self._live))

    def _settle_restored(self) -> None:
        """Write what became of the tasks that ran when the last process ended."""
        while self._unsettled:
            self._unsettled[0]()
            del self._unsettled[0]

    def _fail(self, task: Task, code: str, message: str) -> None:
        if not self._store.fail(
            task.task_id,
            task.status,
            code=code,
            message=message,
            ended_at=self._now(),
            kept_since=self.keep_clock(),
        ):
            return  # it has finished, this moment
        with self._lock:
            # What went wrong is told to its own client alone.
            self._troubles.last_error = f"task {task.task_id}: {code}"
            self._live.remove(task)
        self.events.publish(EventKind.FAILED, task.task_id)
        log.warning("task %s failed: %s", task.task_id, message)

    def _missing(self, *wanted: Weights) -> tuple[Weights, ...]:
        """Those of them that have to be downloaded before. What the server starts with is never
        among them: the worker itself fetches that, before anything else."""
        missing = []
        for weights in wanted:
            model = weights.model
            if model.name not in self._here and self._needs_download(model):
                missing.append(weights)
            else:
                self._here.add(model.name)
        return tuple(missing)
