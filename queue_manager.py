"""The rules of the queue: submit, order, position, forecast, cancel, keep and drop.

Tasks that wait or run are in memory and on disk, those that have ended on disk alone. Every change
is made on disk first, then in memory. Two locks, always taken in this order: `_writing` (one change
at a time, held while the disk works) and `_lock` (the memory, held for microseconds), so that
nobody who only asks waits for the disk. One condition wakes the worker: nobody polls with sleep.

Order: urgent tasks first, then normal ones, each first come, first served, but for those that join
others of their model (live_queue.py).
"""

import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from itertools import islice
from math import ceil
from pathlib import Path
from threading import Condition, Lock

from errors import (
    Gone,
    InvalidInput,
    ModelNotAllowed,
    NotReady,
    NotSupported,
    NoWorker,
    QueueFull,
    StorageUnavailable,
    UnknownTask,
)
from events import EventKind, EventLog
from live_queue import LiveQueue
from model_catalog import Weights
from offer import Offer
from queue_state import QueueHealth, Rules, ServerState, Stats
from task import SIDE_STEP, GenerationParams, Phase, Stage, Task, TaskStatus
from task_store import TOMBSTONE_S, StoredTask, TaskStore, Tombstone
from task_view import TaskView, Wait
from timing_model import Spread, TimingModel, Work

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 2
"""A task during which the process ended so many times is failed instead of tried again."""
PRUNE_EVERY_S = 10.0
STATS_SIDES = (512, 768, 1024, 1536)
EXPIRED = "It was kept for its time and has expired."
NO_ROOM = "It made room for newer images."
FETCHED = "The image was fetched and removed."
DELETED = "The task was deleted."


class QueueManager:
    """HTTP threads, the worker thread and the encoder thread call it; all methods may raise
    StorageUnavailable when the disk refuses, and then nothing has changed."""

    def __init__(
        self,
        offer: Offer,
        timing: TimingModel,
        store: TaskStore,
        rules: Rules | None = None,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Goes on where the store's last process ended.

        Args:
            offer: the models that tasks may use; the first of them is loaded at the start.
        """
        self.offer = offer
        self.model = offer.default
        self._store = store
        self._rules = rules or Rules()
        self._monotonic = monotonic
        self._now = now

        self.events = EventLog(now)
        """What happens to tasks; those that wait for something listen here."""
        self._writing = Lock()
        self._lock = Lock()
        self._wake_worker = Condition(self._lock)
        self._spread = Spread(store.outcomes())
        self._own = Weights(self.model, self.model.pipelines[0], offer.quantize)
        self._loaded: dict[str, Weights] = {}
        self._load_orders: list[Weights] = []
        self._live = LiveQueue(
            timing,
            self._spread,
            monotonic,
            self._own,
            in_memory=self._rules.models_in_memory,
            affinity_s=self._rules.affinity_s,
        )
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
        inputs: Mapping[str, bytes] | None = None,
        callback_url: str | None = None,
    ) -> tuple[TaskView, int]:
        """Put a task into the queue; on return it is on disk.

        Args:
            client_key: with the same key comes the same task.
            inputs: the pictures that the params name, as PNG, by InputImage.file.
            callback_url: who is told that the task has ended (webhooks.py).

        Returns:
            The task as it stands, and the number of other tasks that are not finished.

        Raises:
            NoWorker: the server is stopping.
            QueueFull: too many tasks wait, or the wait would be too long.
            Gone: the task of this client_key is no more.
            ModelNotAllowed, NotSupported: the params ask for what the operator does not allow.
        """
        stages = self.offer.stages(params)
        task = Task(secrets.token_hex(8), params, urgent, stages, created_at=self._now())
        with ExitStack() as unless_submitted:
            if inputs:  # before others have to wait for this: it may take long
                unless_submitted.callback(self._store.discard_inputs, task.task_id)
                with self._noting_storage():
                    self._store.keep_inputs(task.task_id, inputs)
            submitted = self._submit(task, client_key, callback_url)
            if submitted[0].task_id == task.task_id:
                unless_submitted.pop_all()
            return submitted

    def _submit(
        self, task: Task, client_key: str | None, callback_url: str | None
    ) -> tuple[TaskView, int]:
        with self._writing, self._noting_storage():
            if client_key and (known := self.submitted_as(client_key)):
                return known
            with self._lock:
                self._check_room(task.stages, task.urgent)
            self._store.insert(
                task.task_id,
                task.params,
                urgent=task.urgent,
                created_at=task.created_at,
                client_key=client_key,
                callback_url=callback_url,
            )
            with self._lock:
                others = len(self._live)
                self._live.add(task)
                self._live.promise(task)
                self._wake_worker.notify_all()
                view = self._live.view(task)
            self.events.publish(EventKind.WAITING, task.task_id)
            return view, others

    def submitted_as(self, client_key: str) -> tuple[TaskView, int] | None:
        """What submit answered with to this key, as it stands; None: the key is new.

        Raises:
            Gone: the task of this client_key is no more.
        """
        with self._noting_storage():
            known = self._store.find_by_key(client_key)
        return (self.status(known), self._unfinished_beside(known)) if known else None

    def estimate(self, params: GenerationParams, *, urgent: bool) -> tuple[Wait, int]:
        """What submit would answer now, and the number of tasks that are not finished."""
        stages = self.offer.stages(params)
        with self._lock:
            return self._live.wait_of_new(stages, urgent=urgent), len(self._live)

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

    @property
    def length(self) -> int:
        """Tasks that are not finished."""
        with self._lock:
            return len(self._live)

    def image(self, task_id: str, index: int = 0) -> tuple[bytes, GenerationParams]:
        """One image of a finished task.

        Raises:
            UnknownTask, NotReady.
            InvalidInput: it has no image of this index.
            Gone: also when the task failed or was cancelled.
        """
        task = self._finished(task_id)
        if index >= task.params.count:
            raise InvalidInput(
                f"index must be a whole number from 0 to {task.params.count - 1} for this task.",
                field="index",
            )
        return self._image_of(task, index), task.params

    def all_images(self, task_id: str) -> tuple[list[bytes], GenerationParams]:
        """All images of a finished task. Raises what image() raises."""
        task = self._finished(task_id)
        return [self._image_of(task, index) for index in range(task.params.count)], task.params

    def fetched(self, task_id: str, index: int | None = None) -> None:
        """An image (None: all of them) was sent and shall go. Once all were, the task goes with
        them: at once, or after the time to fetch them again."""
        with self._writing, self._noting_storage():
            task = self._store.find(task_id)
            if (
                isinstance(task, StoredTask)
                and task.status is TaskStatus.DONE
                and self._store.mark_fetched(task_id, self._now(), index)
                and self._rules.refetch_s <= 0
            ):
                self._drop(task_id, FETCHED)

    def inputs_of(self, task_id: str) -> Path:
        """The folder with the pictures that a task starts from."""
        return self._store.inputs_of(task_id)

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
            if was is TaskStatus.WAITING:  # of a running one the worker may be reading them
                self._store.discard_inputs(task_id)
            self.events.publish(EventKind.CANCELLED, task_id)
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
                loaded=tuple(
                    self._loaded[key] for key in self._live.resident if key in self._loaded
                ),
                loading=self._live.loading,
                quantize=self._live.work.bits(self._latest()),
                last_error=self._last_error,
            )

    def state(self) -> ServerState:
        with self._lock:
            return self._state()

    def stats(self) -> Stats:
        with self._lock:
            tasks_last_hour, busy_share = self._live.last_hour()
            key, timing = self._live.work.load_key(self._own), self._live.timing
            return Stats(
                timing_key=key,
                samples=timing.samples(key),
                load_s=self._live.work.load_s(self._own),
                forecasts=[
                    (side, timing.forecast(self._square(key, side))) for side in STATS_SIDES
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

    @property
    def first_weights(self) -> Weights:
        """What to load before anything is asked for."""
        return self._own

    def order_load(self, weights: Weights) -> None:
        """The operator wants these loaded, between the task that runs and the next one.

        Raises:
            NoWorker: the server is stopping.
        """
        with self._lock:
            if self.stopping or self._load_failed:
                raise NoWorker
            if all(weights.key != ordered.key for ordered in self._load_orders):
                self._load_orders.append(weights)
            self._wake_worker.notify_all()

    def load_started(self, weights: Weights) -> None:
        with self._lock:
            self._live.load_started(weights)

    def load_finished(
        self,
        weights: Weights,
        bits: int | None,
        resident: Sequence[str] | None = None,
        *,
        downloaded: bool = False,
    ) -> None:
        """Weights are ready, quantized to so many bits (None: not quantized).

        Args:
            downloaded: they had to be fetched first, so the time says nothing of the next load.
            resident: keys of all that is in memory now; None: these alone.
        """
        with self._lock:
            now = (weights.key,) if resident is None else resident
            known = {**self._loaded, weights.key: weights}
            self._loaded = {key: known[key] for key in now if key in known}
            seconds = self._live.load_finished(weights, bits, now, downloaded=downloaded)
            key = self._live.work.load_key(weights)
        log.info("%s is ready after %.1f s", weights.key, seconds)
        if downloaded:
            return
        with suppress(StorageUnavailable), self._noting_storage():
            self._store.keep_load(key, seconds)

    def now_resident(self, resident: Sequence[str]) -> None:
        """Weights were unloaded, or could not be loaded: this is in memory, the latest first."""
        with self._lock:
            self._live.now_resident(resident)

    def load_failed(self, message: str, *, fatal: bool) -> None:
        """Weights cannot be loaded.

        Args:
            fatal: the server ends; else only what needs them fails.
        """
        with self._lock:
            self._load_failed = fatal
            self._last_error = message

    @property
    def stopping(self) -> bool:
        return self._drain_until is not None

    def next_load_order(self) -> Weights | None:
        """What the operator wants loaded, the first that was ordered; it is ordered no more."""
        with self._lock:
            return self._load_orders.pop(0) if self._load_orders else None

    def claim(self, timeout_s: float | None = None) -> Task | None:
        """The next task to run, now running; waits for one. None: time is up, a load was ordered,
        or stop() came."""
        with self._lock:
            self._wake_worker.wait_for(
                lambda: self.stopping or self._live.waiting or self._load_orders, timeout_s
            )
            if self._load_orders:
                return None
        with self._writing, self._noting_storage():
            task = self._live.first()
            if self.stopping or task is None:
                return None
            started_at = self._now()
            self._store.claim(task.task_id, started_at=started_at)
            with self._lock:
                self._live.start(task, started_at=started_at)
            self.events.publish(EventKind.RUNNING, task.task_id)
            log.info(
                "task %s is running: %s, %d x %d, %d steps",
                task.task_id,
                task.stages[0].weights.key,
                task.params.width,
                task.params.height,
                task.params.steps_run,
            )
            return task

    def next_image(self, task_id: str, stage: int, index: int) -> bool:
        """The running task has the image before, and turns to this one of a stage.

        Returns:
            Whether it shall go on, as report() does.
        """
        with self._lock:
            task = self._live.get_running(task_id)
            if task is None:
                self._live.gpu_is_free()
                return False
            self._live.next_image(task, stage, index)
            self.events.publish(EventKind.IMAGE, task_id)
            return self._may_go_on(task)

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
            self.events.publish(EventKind.STEP, task_id)
            return self._may_go_on(task)

    def preview_made(self, task_id: str) -> None:
        """There is a newer picture so far of a running task."""
        with self._lock:
            if self._live.get_running(task_id):
                self.events.publish(EventKind.PREVIEW, task_id)

    def _may_go_on(self, task: Task) -> bool:
        if self._drain_until is None:
            return True
        return self._monotonic() + self._live.gpu_remaining_s(task) <= self._drain_until

    def finish(
        self,
        task_id: str,
        images: Sequence[bytes],
        *,
        image_encoding_s: Sequence[float] | None = None,
    ) -> bool:
        """The images are encoded: the task is done, and its timings are learned.

        Args:
            image_encoding_s: seconds that encoding each took; None: since decoding ended.
        """
        # Not under _writing: syncing an image takes milliseconds, for which the worker would wait
        # with its next claim. The store's own guard decides against a cancel at the same moment.
        with self._lock:
            task = self._live.get_running(task_id)
            if task is None:
                return False
            samples = self._live.measured(task)
        if image_encoding_s is not None:
            drawn, encoded = samples[: -len(images)], samples[-len(images) :]
            samples = drawn + [
                (work, replace(measured, image_encoding_s=seconds))
                for (work, measured), seconds in zip(encoded, image_encoding_s, strict=True)
            ]
        with self._noting_storage():
            done = self._store.finish(task_id, images, ended_at=self._now(), samples=samples)
        if not done:
            return False
        with self._lock:
            self._images_bytes += sum(map(len, images))
            for work, measured in samples:
                self._live.timing.learn(work, measured)
            outcome = self._live.finish(task)
        self._store.discard_inputs(task_id)
        self.events.publish(EventKind.DONE, task_id)
        log.info("task %s is done", task_id)
        if outcome is not None:
            with suppress(StorageUnavailable):  # the task is done all the same
                self._store.keep_outcome(outcome)
        self.prune()
        return True

    def left(self, task_id: str) -> None:
        """The worker has nothing more to do with this task: if it has ended, its pictures go."""
        with self._lock:
            ended = task_id not in self._live
        if ended:
            self._store.discard_inputs(task_id)

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
            self.events.publish(EventKind.WAITING, task_id)
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
                self._fail(task, error.code, error.message)  # the operator allows less than before
                continue
            if task.status is TaskStatus.RUNNING:
                if task.attempts >= MAX_ATTEMPTS:
                    self._fail(task, *ENDED_TOO_OFTEN)
                    continue
                self._store.release(task.task_id, count_attempt=True)
                task.status = TaskStatus.WAITING
            self._live.add(task)
            if task.urgent not in levels:  # it ran, or was next: nobody goes ahead of it
                levels.add(task.urgent)
                task.patience_s = 0.0
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
            self._last_error = f"task {task.task_id}: {code}"  # what it says is its client's
            self._live.remove(task)
        self.events.publish(EventKind.FAILED, task.task_id)
        log.warning("task %s failed: %s", task.task_id, message)

    def _drop(self, task_id: str, reason: str) -> None:
        dropped_bytes = self._store.drop(task_id, reason, gone_at=self._now())
        with self._lock:
            self._images_bytes -= dropped_bytes
        self.events.publish(EventKind.REMOVED, task_id)

    def _finished(self, task_id: str) -> StoredTask:
        with self._lock:
            if task_id in self._live:
                raise NotReady
        task = self._find_ended(task_id)
        if task.status is TaskStatus.FAILED:
            raise Gone(f"There is no image: the task failed. {task.error}")
        if task.status is TaskStatus.CANCELLED:
            raise Gone("There is no image: the task was cancelled.")
        return task

    def _image_of(self, task: StoredTask, index: int) -> bytes:
        image = self._store.read_image(task.task_id, index)
        if image is None:
            raise Gone("The image was removed.")
        return image

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

    def _latest(self) -> Weights:
        """The weights used last, or those that will be."""
        known = (self._loaded[key] for key in self._live.resident if key in self._loaded)
        return next(known, self._own)

    def _check_room(self, stages: tuple[Stage, ...], urgent: bool) -> None:
        if self.stopping or self._load_failed:
            raise NoWorker
        if self._live.waiting >= self._rules.max_queue:
            retry_after_s = max(ceil(self._live.next_start_s()), 1)
            raise QueueFull(
                f"{self._rules.max_queue} tasks wait already: try again in {retry_after_s} s.",
                retry_after_s=retry_after_s,
            )
        if self._rules.max_wait_s > 0:
            wait_s = self._live.wait_of_new(stages, urgent=urgent).end_s
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
        if self._live.loading is not None:
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
        steps_done=task.params.steps_run if task.status is TaskStatus.DONE else 0,
        steps_total=task.params.steps_run,
        progress=1.0 if task.status is TaskStatus.DONE else 0.0,
        error_code=task.error_code,
        error=task.error,
        measured=task.measured,
        images_done=len(task.image_sizes),
        image_sizes=task.image_sizes,
    )
