"""The rules of the queue: submit, order, position, forecast, cancel, keep and drop.

Tasks that wait or run are in memory and on disk, those that have ended on disk alone. Every change
is made on disk first, then in memory. Two locks, always taken in this order: `_writing` (one change
at a time, held while the disk works) and `_lock` (the memory, held for microseconds), so that
nobody who only asks waits for the disk. One condition wakes the worker: nobody polls with sleep.

Order: urgent tasks first, then normal ones, each first come, first served.
"""

import logging
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import islice
from math import ceil
from threading import Condition, Lock

from errors import Gone, NotReady, NoWorker, QueueFull, StorageUnavailable, UnknownTask
from live_queue import LiveQueue, TaskView, Wait
from model_catalog import Model
from task import SIDE_STEP, GenerationParams, Phase, Task, TaskStatus
from task_store import TOMBSTONE_S, StoredTask, TaskStore, Tombstone
from timing_model import Forecast, Spread, TimingModel, Work

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 2
"""A task during which the process ended so many times is failed instead of tried again."""
PRUNE_EVERY_S = 10.0
STATS_SIDES = (512, 768, 1024, 1536)
EXPIRED = "It was kept for its time and has expired."
NO_ROOM = "It made room for newer images."
FETCHED = "The image was fetched and removed."
DELETED = "The task was deleted."


class ServerState(StrEnum):
    LOADING = "loading"  # the worker loads the model; tasks are accepted and wait
    READY = "ready"  # nothing runs
    BUSY = "busy"  # a task runs
    DRAINING = "draining"  # the server is stopping; no new tasks
    FAILED = "failed"  # the model could not be loaded, or the disk refuses


@dataclass(frozen=True)
class Rules:
    """What the operator has set."""

    max_queue: int = 1000
    """Tasks that may wait."""
    max_wait_s: float = 0.0
    """Longest forecast wait with which a task is accepted; 0: no limit."""
    keep_s: float = 24 * 3600.0
    keep_bytes: int = 5_000_000_000
    refetch_s: float = 300.0


@dataclass(frozen=True)
class QueueHealth:
    state: ServerState
    waiting: int
    running: int
    quantize: int | None
    """Bits that the loaded weights are quantized to."""
    last_error: str | None


@dataclass(frozen=True)
class Stats:
    """What was learned, and how good the forecasts are."""

    timing_key: str
    """The model and its quantization."""
    samples: int
    """Tasks learned from."""
    load_s: float
    forecasts: list[tuple[int, Forecast]]
    """For square pictures of STATS_SIDES, with the model's default steps."""
    outcomes: int
    """Forecasts at submit that could be compared with what came."""
    median_error: float | None
    """Of |forecast - truth| / truth."""
    share_inside_p90: float | None
    tasks_last_hour: int
    busy_share: float
    """Part of the last hour for which the GPU worked."""


class QueueManager:
    """HTTP threads, the worker thread and the encoder thread call it; all methods may raise
    StorageUnavailable when the disk refuses, and then nothing has changed."""

    def __init__(
        self,
        model: Model,
        timing: TimingModel,
        store: TaskStore,
        rules: Rules | None = None,
        *,
        quantize: int | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Goes on where the store's last process ended.

        Args:
            model: the server's model, for tasks that name none.
            quantize: bits that weights are asked to be quantized to.
        """
        self.model = model
        self._store = store
        self._rules = rules or Rules()
        self._monotonic = monotonic
        self._now = now

        self._writing = Lock()
        self._lock = Lock()
        self._wake_worker = Condition(self._lock)
        self._spread = Spread(store.outcomes())
        self._live = LiveQueue(timing, self._spread, monotonic, model, quantize)
        self._images_bytes = store.images()[1]
        self._prune_at = 0.0
        self._drain_until: float | None = None
        self._load_failed = False
        self._storage_failed = False
        self._last_error: str | None = None
        self._restore()

    # -- clients ------------------------------------------------------------------------------

    def submit(
        self,
        params: GenerationParams,
        *,
        urgent: bool,
        client_key: str | None = None,
        model: Model | None = None,
    ) -> tuple[TaskView, int]:
        """Put a task into the queue; on return it is on disk.

        Args:
            client_key: with the same key comes the same task.

        Returns:
            The task as it stands, and the number of other tasks that are not finished.

        Raises:
            NoWorker: the server is stopping.
            QueueFull: too many tasks wait, or the wait would be too long.
            Gone: the task of this client_key is no more.
        """
        with self._writing, self._noting_storage():
            if client_key and (known := self._store.find_by_key(client_key)):
                return self.status(known), self._unfinished_beside(known)
            with self._lock:
                self._check_room(params, model or self.model, urgent)
            task = Task(
                secrets.token_hex(8), params, urgent, model or self.model, created_at=self._now()
            )
            self._store.insert(
                task.task_id,
                params,
                urgent=urgent,
                created_at=task.created_at,
                client_key=client_key,
            )
            with self._lock:
                others = len(self._live)
                self._live.add(task)
                self._live.promise(task)
                self._wake_worker.notify_all()
                return self._live.view(task), others

    def estimate(self, params: GenerationParams, *, urgent: bool) -> tuple[Wait, int]:
        """What submit would answer now, and the number of tasks that are not finished."""
        with self._lock:
            return self._live.wait_of_new(params, self.model, urgent=urgent), len(self._live)

    def status(self, task_id: str) -> TaskView:
        """One task as it stands.

        Raises:
            UnknownTask, Gone.
        """
        with self._lock:
            task = self._live.get(task_id)
            if task is not None:
                return self._live.view(task, telling=True)
        return _view_of_stored(self._find_ended(task_id))

    def queue(self, limit: int, offset: int) -> tuple[list[TaskView], int]:
        """Tasks that are not finished, in the order in which they run, and how many there are."""
        with self._lock:
            return list(islice(self._live.views_in_order(offset), limit)), len(self._live)

    def image(self, task_id: str) -> tuple[bytes, GenerationParams]:
        """The image of a finished task.

        Raises:
            UnknownTask, NotReady.
            Gone: also when the task failed or was cancelled.
        """
        with self._lock:
            if task_id in self._live:
                raise NotReady
        task = self._find_ended(task_id)
        if task.status is TaskStatus.FAILED:
            raise Gone(f"There is no image: the task failed. {task.error}")
        if task.status is TaskStatus.CANCELLED:
            raise Gone("There is no image: the task was cancelled.")
        image = self._store.read_image(task_id)
        if image is None:
            raise Gone("The image was removed.")
        return image, task.params

    def fetched(self, task_id: str) -> None:
        """The image was sent and shall go: at once, or after the time to fetch it again."""
        with self._writing, self._noting_storage():
            task = self._store.find(task_id)
            if isinstance(task, StoredTask) and task.status is TaskStatus.DONE:
                if self._rules.refetch_s > 0:
                    self._store.mark_fetched(task_id, self._now())
                else:
                    self._drop(task_id, FETCHED)

    def delete(self, task_id: str) -> TaskStatus:
        """Cancel a task that waits or runs, remove one that has ended.

        The worker leaves a running task at its next step.

        Returns:
            The status that the task had.

        Raises:
            UnknownTask, Gone.
        """
        with self._writing, self._noting_storage():
            task = self._live.get(task_id)
            was = task.status if task else None
            if not (task and was and self._store.cancel(task_id, was, ended_at=self._now())):
                was = self._find_ended(task_id).status  # it has ended, perhaps this moment
                self._drop(task_id, DELETED)
                return was
            with self._lock:
                self._live.cancel(task)
            log.info("task %s was cancelled", task_id)
            return was

    def health(self) -> QueueHealth:
        if self._storage_failed:
            with suppress(StorageUnavailable):
                self._probe_storage()
        with self._lock:
            return QueueHealth(
                state=self._state(),
                waiting=self._live.waiting,
                running=len(self._live.running),
                quantize=self._live.quantize,
                last_error=self._last_error,
            )

    def state(self) -> ServerState:
        with self._lock:
            return self._state()

    def stats(self) -> Stats:
        with self._lock:
            tasks_last_hour, busy_share = self._live.last_hour()
            key = self._live.timing_key(self.model)
            return Stats(
                timing_key=key,
                samples=self._live.timing.samples(key),
                load_s=self._live.timing.forecast_load_s(key, self.model.parameters_b),
                forecasts=[
                    (side, self._live.timing.forecast(self._square(key, side)))
                    for side in STATS_SIDES
                ],
                outcomes=self._spread.count,
                median_error=self._spread.median_error(),
                share_inside_p90=self._spread.share_inside_p90(),
                tasks_last_hour=tasks_last_hour,
                busy_share=busy_share,
            )

    def images(self) -> tuple[int, int]:
        """How many images are kept, and their bytes."""
        return self._store.images()

    # -- the worker -----------------------------------------------------------------------------
    # report, finish, fail and release answer False when the task runs no more (it was cancelled).

    def load_started(self, model: Model | None = None) -> None:
        with self._lock:
            self._live.load_started(model or self.model)

    def load_finished(self, quantize: int | None) -> None:
        """The model is ready, its weights quantized to so many bits (None: not quantized)."""
        with self._lock:
            seconds = self._live.load_finished(quantize)
            key = self._live.timing_key(self._live.loaded or self.model)
        log.info("the model is ready after %.1f s", seconds)
        with suppress(StorageUnavailable), self._noting_storage():
            self._store.keep_load(key, seconds)

    def load_failed(self, message: str) -> None:
        with self._lock:
            self._load_failed = True
            self._last_error = message

    @property
    def stopping(self) -> bool:
        return self._drain_until is not None

    def claim(self, timeout_s: float | None = None) -> Task | None:
        """The next task to run, now running; waits for one. None: time is up, or stop() came."""
        with self._lock:
            self._wake_worker.wait_for(lambda: self.stopping or self._live.waiting, timeout_s)
        with self._writing, self._noting_storage():
            task = self._live.first()
            if self.stopping or task is None:
                return None
            started_at = self._now()
            self._store.claim(task.task_id, started_at=started_at)
            with self._lock:
                self._live.start(task, started_at=started_at)
            log.info(
                "task %s is running: %d x %d, %d steps",
                task.task_id,
                task.params.width,
                task.params.height,
                task.params.steps,
            )
            return task

    def report(self, task_id: str, phase: Phase, steps_done: int, steps_total: int) -> bool:
        """The running task has reached a phase or ended a step, at this moment.

        Returns:
            Whether it shall go on; False: it was cancelled, or the server stops.
        """
        with self._lock:
            task = self._live.get_running(task_id)
            if task is None:
                self._live.gpu_is_free()
                return False
            self._live.report(task, phase, steps_done, steps_total)
            if self._drain_until is None:
                return True
            return self._monotonic() + self._live.gpu_remaining_s(task) <= self._drain_until

    def finish(self, task_id: str, image: bytes, *, image_encoding_s: float | None = None) -> bool:
        """The image is encoded: the task is done, and its timings are learned.

        Args:
            image_encoding_s: seconds that encoding took; None: since decoding ended.
        """
        # Not under _writing: syncing an image takes milliseconds, for which the worker would wait
        # with its next claim. The store's own guard decides against a cancel at the same moment.
        with self._lock:
            task = self._live.get_running(task_id)
            if task is None:
                return False
            work = self._live.work(task.params, task.model)
            measured = self._live.measured(task)
            if image_encoding_s is not None:
                measured = replace(measured, image_encoding_s=image_encoding_s)
        with self._noting_storage():
            done = self._store.finish(
                task_id, image, ended_at=self._now(), work=work, measured=measured
            )
        if not done:
            return False
        with self._lock:
            self._images_bytes += len(image)
            self._live.timing.learn(work, measured)
            outcome = self._live.finish(task)
        log.info("task %s is done", task_id)
        if outcome is not None:
            with suppress(StorageUnavailable):  # the task is done all the same
                self._store.keep_outcome(outcome)
        self.prune()
        return True

    def fail(self, task_id: str, code: str, message: str) -> bool:
        with self._writing, self._noting_storage():
            task = self._live.get_running(task_id)
            if task is None:
                with self._lock:
                    self._live.gpu_is_free()
                return False
            self._fail(task, code, message)
            return True

    def release(self, task_id: str, *, count_attempt: bool = False) -> bool:
        """The worker left the running task: it waits again, first of its level.

        Args:
            count_attempt: the task may have been at fault; after MAX_ATTEMPTS it is failed.
        """
        with self._writing, self._noting_storage():
            task = self._live.get_running(task_id)
            if task is None:
                with self._lock:
                    self._live.gpu_is_free()
                return False
            if count_attempt and task.attempts >= MAX_ATTEMPTS:
                self._fail(task, *ENDED_TOO_OFTEN)
                return True
            if not self._store.release(task_id, count_attempt=count_attempt):
                return False  # it has finished, this moment
            with self._lock:
                task.attempts -= 0 if count_attempt else 1
                self._live.put_back(task)
                self._wake_worker.notify_all()
            log.info("task %s waits again", task_id)
            return True

    def release_running(self) -> None:
        """Whatever still runs waits again: the process ends now, and at its own wish."""
        for task in reversed(self._live.running):
            self.release(task.task_id)

    def stop(self, drain_s: float = 0.0) -> None:
        """Accept and hand out no more tasks. The running one may go on for drain_s seconds if it
        is forecast to end by then; else it is told at its next report."""
        with self._lock:
            self._drain_until = self._monotonic() + drain_s
            self._wake_worker.notify_all()

    def prune(self) -> None:
        """Drop what was kept long enough, and the oldest images when there are too many."""
        over = self._images_bytes > self._rules.keep_bytes
        if not over and self._monotonic() < self._prune_at:
            return
        self._prune_at = self._monotonic() + PRUNE_EVERY_S
        now, rules = self._now(), self._rules
        try:
            if self._storage_failed:
                self._probe_storage()
            with self._writing, self._noting_storage():
                for task_id in self._store.fetched_before(now - rules.refetch_s):
                    self._drop(task_id, FETCHED)
                for task_id in self._store.ended_before(now - rules.keep_s):
                    self._drop(task_id, EXPIRED)
                if over:
                    for task_id in self._store.oldest_images_over(rules.keep_bytes):
                        self._drop(task_id, NO_ROOM)
                self._store.remove_tombstones(now - TOMBSTONE_S)
        except StorageUnavailable as error:
            log.warning("pruning is put off: %s", error)

    # -- inside, under _writing -------------------------------------------------------------------

    def _restore(self) -> None:
        for model, seconds in self._store.loads().items():
            self._live.timing.learn_load(model, seconds)
        for work, measured in self._store.samples():
            self._live.timing.learn(work, measured)
        for stored in self._store.unfinished():
            task = Task(
                stored.task_id,
                stored.params,
                stored.urgent,
                self.model,
                stored.created_at,
                status=stored.status,
                attempts=stored.attempts,
            )
            if task.status is TaskStatus.RUNNING:
                if task.attempts >= MAX_ATTEMPTS:
                    self._fail(task, *ENDED_TOO_OFTEN)
                    continue
                self._store.release(task.task_id, count_attempt=True)
                task.status = TaskStatus.WAITING
            self._live.add(task)
        if len(self._live):
            log.info("%d tasks from before the start wait", len(self._live))

    def _probe_storage(self) -> None:
        with self._writing, self._noting_storage():
            self._store.probe()
            self._storage_failed = False
            log.info("the data dir can be written to again")

    def _fail(self, task: Task, code: str, message: str) -> None:
        ended_at = self._now()
        if not self._store.fail(
            task.task_id, task.status, code=code, message=message, ended_at=ended_at
        ):
            return  # it has finished, this moment
        with self._lock:
            self._last_error = f"task {task.task_id}: {message}"
            self._live.remove(task)
        log.warning("task %s failed: %s", task.task_id, message)

    def _drop(self, task_id: str, reason: str) -> None:
        dropped_bytes = self._store.drop(task_id, reason, gone_at=self._now())
        with self._lock:
            self._images_bytes -= dropped_bytes

    def _find_ended(self, task_id: str) -> StoredTask:
        with self._noting_storage():
            found = self._store.find(task_id)
        if found is None:
            raise UnknownTask
        if isinstance(found, Tombstone):
            raise Gone(found)
        if found.fetched_at is not None and found.fetched_at + self._rules.refetch_s <= self._now():
            raise Gone(FETCHED)
        return found

    def _square(self, key: str, side: int) -> Work:
        tokens, steps = (side // SIDE_STEP) ** 2, self.model.default_steps
        return Work(key, self.model.parameters_b, tokens, steps, "JPEG")

    # -- inside, under _lock ----------------------------------------------------------------------

    def _check_room(self, params: GenerationParams, model: Model, urgent: bool) -> None:
        if self.stopping or self._load_failed:
            raise NoWorker
        if self._live.waiting >= self._rules.max_queue:
            retry_after_s = max(ceil(self._live.next_start_s()), 1)
            raise QueueFull(
                f"{self._rules.max_queue} tasks wait already: try again in {retry_after_s} s.",
                retry_after_s=retry_after_s,
            )
        if self._rules.max_wait_s > 0:
            wait_s = self._live.wait_of_new(params, model, urgent=urgent).end_s
            if wait_s > self._rules.max_wait_s:
                retry_after_s = max(ceil(wait_s - self._rules.max_wait_s), 1)
                raise QueueFull(
                    f"This task would wait {wait_s:.0f} s, the server accepts up to "
                    f"{self._rules.max_wait_s:.0f} s: try again in {retry_after_s} s.",
                    retry_after_s=retry_after_s,
                )

    def _unfinished_beside(self, task_id: str) -> int:
        with self._lock:
            return len(self._live) - (task_id in self._live)

    def _state(self) -> ServerState:
        if self._load_failed or self._storage_failed:
            return ServerState.FAILED
        if self.stopping:
            return ServerState.DRAINING
        if self._live.loaded is None:
            return ServerState.LOADING
        return ServerState.BUSY if self._live.busy else ServerState.READY

    @contextmanager
    def _noting_storage(self) -> Iterator[None]:
        """Remember for /health that the disk refused; only _probe_storage forgets it."""
        try:
            yield
        except StorageUnavailable as error:
            if not self._storage_failed:
                log.error("%s", error)
            self._storage_failed = True
            self._last_error = error.message
            raise


ENDED_TOO_OFTEN = (
    "ended_too_often",
    f"The server's worker ended {MAX_ATTEMPTS} times while this task ran; it is not tried again.",
)


def _view_of_stored(task: StoredTask) -> TaskView:
    return TaskView(
        task_id=task.task_id,
        status=task.status,
        params=task.params,
        urgent=task.urgent,
        created_at=task.created_at,
        started_at=task.started_at,
        ended_at=task.ended_at,
        wait=None,
        phase=None,
        steps_done=len(task.measured.step_s) if task.measured else 0,
        steps_total=task.params.steps,
        progress=1.0 if task.status is TaskStatus.DONE else 0.0,
        error_code=task.error_code,
        error=task.error,
        measured=task.measured,
    )
