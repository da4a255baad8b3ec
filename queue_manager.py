"""The rules of the queue: submit, order, position, forecast, cancel.

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
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from copy import copy
from dataclasses import replace
from itertools import islice
from math import ceil
from pathlib import Path
from threading import Condition, Lock

from errors import (
    InvalidInput,
    ModelLoadError,
    ModelNotAllowed,
    NotReady,
    NotSupported,
    NoWorker,
    QueueFull,
    StorageUnavailable,
)
from events import EventKind, EventLog
from kept_tasks import DELETED, KeptTasks
from live_queue import LiveQueue
from model_catalog import Model, Weights
from offer import Offer
from queue_state import QueueHealth, Rules, ServerState, Stats
from task import SIDE_STEP, GenerationParams, Phase, Stage, Task, TaskStatus
from task_store import TaskStore
from task_view import TaskView, Wait
from timing_model import Spread, TimingModel, Work
from troubles import Troubles

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 2
"""A task during which the process ended so many times is failed instead of tried again."""
PRUNE_EVERY_S = 10.0
STATS_SIDES = (512, 768, 1024, 1536)


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
        needs_download: Callable[[Model], bool] = lambda model: False,
        monotonic: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Goes on where the store's last process ended.

        Args:
            offer: the models that tasks may use; the first of them is loaded at the start.
            needs_download: whether a model's weights are not on this machine; called by any thread.
        """
        self.offer = offer
        self.model = offer.default
        self._store = store
        self._needs_download = needs_download
        self._rules = rules or Rules()
        self._monotonic = monotonic
        self._now = now

        self.events = EventLog(now)
        """What happens to tasks; those that wait for something listen here."""
        self._writing = Lock()
        self._lock = Lock()
        self._wake_worker = Condition(self._lock)
        self._wake_downloads = Condition(self._lock)
        self._spread = Spread(store.outcomes())
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
        )
        self._troubles = Troubles()
        self._kept = KeptTasks(store, self._rules, self.events, self._troubles, now)
        self._prune_at = 0.0
        self._drain_until: float | None = None
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
                with self._troubles.noting_storage():
                    self._store.keep_inputs(task.task_id, inputs)
            submitted = self._submit(task, client_key, callback_url)
            if submitted[0].task_id == task.task_id:
                unless_submitted.pop_all()
            return submitted

    def _submit(
        self, task: Task, client_key: str | None, callback_url: str | None
    ) -> tuple[TaskView, int]:
        with self._writing, self._troubles.noting_storage():
            if client_key and (known := self.submitted_as(client_key)):
                return known
            missing = self._missing(*(stage.weights for stage in task.stages))
            with self._lock:
                self._check_room(task.stages, task.urgent, missing)
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
                self._join(task, missing)
                self._live.promise(task)
                view = self._live.view(task)
            self.events.publish(EventKind.WAITING, task.task_id)
            return view, others

    def submitted_as(self, client_key: str) -> tuple[TaskView, int] | None:
        """What submit answered with to this key, as it stands; None: the key is new.

        Raises:
            Gone: the task of this client_key is no more.
        """
        with self._troubles.noting_storage():
            known = self._store.find_by_key(client_key)
        return (self.status(known), self._unfinished_beside(known)) if known else None

    def estimate(self, params: GenerationParams, *, urgent: bool) -> tuple[Wait, int]:
        """What submit would answer now, and the number of tasks that are not finished."""
        stages = self.offer.stages(params)
        missing = self._missing(*(stage.weights for stage in stages))
        with self._lock:
            wait = self._live.wait_of_new(stages, urgent=urgent, missing=missing)
            return wait, len(self._live)

    def status(self, task_id: str) -> TaskView:
        """One task as it stands.

        Raises:
            UnknownTask, Gone.
        """
        with self._lock:
            task = self._live.get(task_id)
            if task is not None:
                return self._live.view(task, telling=True)
        return self._kept.view(task_id)

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
        self._check_ended(task_id)
        return self._kept.image(task_id, index)

    def all_images(self, task_id: str) -> tuple[list[bytes], GenerationParams]:
        """All images of a finished task. Raises what image() raises."""
        self._check_ended(task_id)
        return self._kept.all_images(task_id)

    def fetched(self, task_id: str, index: int | None = None) -> None:
        """An image (None: all of them) was sent and shall go, as KeptTasks.mark_fetched says."""
        with self._writing, self._troubles.noting_storage():
            self._kept.mark_fetched(task_id, index)

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
        with self._writing, self._troubles.noting_storage():
            task = self._live.get(task_id)
            was = task.status if task else None
            if not (task and was and self._store.cancel(task_id, was, ended_at=self._now())):
                was = self._kept.find(task_id).status  # it has ended, perhaps this moment
                self._kept.drop(task_id, DELETED)
                return was
            with self._lock:
                self._live.cancel(task)
            if was is TaskStatus.WAITING:  # of a running one the worker may be reading them
                self._store.discard_inputs(task_id)
            self.events.publish(EventKind.CANCELLED, task_id)
            log.info("task %s was cancelled", task_id)
            return was

    def health(self) -> QueueHealth:
        if self._troubles.storage_failed:
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
                download=copy(self._live.held.download),
                quantize=self._live.work.bits(self._latest()),
                last_error=self._troubles.last_error,
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
        """The operator wants these loaded, between the task that runs and the next one; what is not
        on this machine is downloaded before.

        Raises:
            NoWorker: the server is stopping.
        """
        self._missing(weights)
        with self._lock:
            if self.stopping or self._troubles.load_failed:
                raise NoWorker
            if all(weights.key != ordered.key for ordered in self._load_orders):
                self._load_orders.append(weights)
            self._wake_worker.notify_all()
            self._wake_downloads.notify_all()

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
        with suppress(StorageUnavailable), self._troubles.noting_storage():
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
            self._troubles.load_failed = fatal
            self._troubles.last_error = message

    @property
    def stopping(self) -> bool:
        return self._drain_until is not None

    def next_load_order(self) -> Weights | None:
        """What the operator wants loaded, the first that was ordered; it is ordered no more."""
        with self._lock:
            ordered = self._next_load_order()
            if ordered:
                self._load_orders.remove(ordered)
            return ordered

    def claim(self, timeout_s: float | None = None) -> Task | None:
        """The next task to run, now running; waits for one. None: time is up, a load was ordered,
        or stop() came."""
        with self._lock:
            self._wake_worker.wait_for(
                lambda: self.stopping or self._live.first() or self._next_load_order(), timeout_s
            )
            if self._next_load_order():
                return None
        with self._writing, self._troubles.noting_storage():
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
        with self._troubles.noting_storage():
            done = self._store.finish(task_id, images, ended_at=self._now(), samples=samples)
        if not done:
            return False
        with self._lock:
            for work, measured in samples:
                self._live.timing.learn(work, measured)
            outcome = self._live.finish(task)
        self._kept.added(sum(map(len, images)))
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
        with self._writing, self._troubles.noting_storage():
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
        with self._writing, self._troubles.noting_storage():
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
            self._wake_downloads.notify_all()

    def prune(self) -> None:
        """Drop what was kept long enough, and the oldest images when there are too many."""
        if not self._kept.too_many and self._monotonic() < self._prune_at:
            return
        self._prune_at = self._monotonic() + PRUNE_EVERY_S
        try:
            if self._troubles.storage_failed:
                self._probe_storage()
            with self._writing, self._troubles.noting_storage():
                self._kept.prune()
        except StorageUnavailable as error:
            log.warning("pruning is put off: %s", error)

    # -- downloads ------------------------------------------------------------------------------

    def next_download(self) -> Weights | None:
        """Weights that a task, or the operator, waits for; waits until there are some. None: stop()
        came."""
        with self._lock:
            self._wake_downloads.wait_for(lambda: self.stopping or self._next_download())
            return None if self.stopping else self._next_download()

    def download_began(self, weights: Weights, bytes_before: int) -> None:
        """Args:
        bytes_before: what an earlier download has left on disk.
        """
        with self._lock:
            self._live.held.begin(weights, bytes_before)

    def download_progress(self, bytes_done: int) -> None:
        """So many bytes of the weights are on disk."""
        with self._lock:
            self._live.held.progress(bytes_done)

    def download_ended(self, weights: Weights, error: str | None) -> None:
        """Weights are on this machine, and the tasks that waited for them join the line; or they
        cannot be had, and those tasks fail."""
        with self._writing, self._troubles.noting_storage():
            if error is not None:
                with self._lock:
                    self._troubles.last_error = error
                    self._load_orders = [o for o in self._load_orders if o.key != weights.key]
                    lost = self._live.held.needing(weights.model)
                for task in lost:
                    self._fail(task, ModelLoadError.code, error)
                with self._lock:
                    self._live.held.download = None
                return
            with self._lock:
                self._here.add(weights.model.name)
                ready = self._live.download_ended(weights)
                self._wake_worker.notify_all()
        log.info("the weights of %s are here", weights.model.name)
        for task in ready:
            self.events.publish(EventKind.WAITING, task.task_id)

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
            if missing := self._missing(*(stage.weights for stage in task.stages)):
                self._live.hold(task, missing)
                continue
            self._live.add(task)
            if task.urgent not in levels:  # it ran, or was next: nobody goes ahead of it
                levels.add(task.urgent)
                task.patience_s = 0.0
        if len(self._live):
            log.info("%d tasks from before the start wait", len(self._live))

    def _probe_storage(self) -> None:
        with self._writing, self._troubles.noting_storage():
            self._store.probe()
            self._troubles.storage_works()

    def _fail(self, task: Task, code: str, message: str) -> None:
        ended_at = self._now()
        if not self._store.fail(
            task.task_id, task.status, code=code, message=message, ended_at=ended_at
        ):
            return  # it has finished, this moment
        with self._lock:
            self._troubles.last_error = f"task {task.task_id}: {message}"
            self._live.remove(task)
        self.events.publish(EventKind.FAILED, task.task_id)
        log.warning("task %s failed: %s", task.task_id, message)

    def _square(self, key: str, side: int) -> Work:
        tokens, steps = (side // SIDE_STEP) ** 2, self.model.default_steps
        return Work(key, self.model.parameters_b, tokens, steps, "JPEG")

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

    # -- inside, under _lock ----------------------------------------------------------------------

    def _latest(self) -> Weights:
        """The weights used last, or those that will be."""
        known = (self._loaded[key] for key in self._live.resident if key in self._loaded)
        return next(known, self._own)

    def _join(self, task: Task, missing: tuple[Weights, ...]) -> None:
        if missing:
            self._live.hold(task, missing)
            self._wake_downloads.notify_all()
        else:
            self._live.add(task)
            self._wake_worker.notify_all()

    def _next_load_order(self) -> Weights | None:
        return next((w for w in self._load_orders if w.model.name in self._here), None)

    def _next_download(self) -> Weights | None:
        ordered = (w for w in self._load_orders if w.model.name not in self._here)
        return self._live.held.next_missing() or next(ordered, None)

    def _check_room(
        self, stages: tuple[Stage, ...], urgent: bool, missing: tuple[Weights, ...]
    ) -> None:
        if self.stopping or self._troubles.load_failed:
            raise NoWorker
        if self._live.waiting >= self._rules.max_queue:
            retry_after_s = max(ceil(self._live.next_start_s()), 1)
            raise QueueFull(
                f"{self._rules.max_queue} tasks wait already: try again in {retry_after_s} s.",
                retry_after_s=retry_after_s,
            )
        if self._rules.max_wait_s > 0:
            wait_s = self._live.wait_of_new(stages, urgent=urgent, missing=missing).end_s
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
        if self._troubles.load_failed or self._troubles.storage_failed:
            return ServerState.FAILED
        if self.stopping:
            return ServerState.DRAINING
        if self._live.loading is not None:
            return ServerState.LOADING
        return ServerState.BUSY if self._live.busy else ServerState.READY

    def _check_ended(self, task_id: str) -> None:
        with self._lock:
            if task_id in self._live:
                raise NotReady


ENDED_TOO_OFTEN = (
    "ended_too_often",
    f"The server's worker ended {MAX_ATTEMPTS} times while this task ran; it is not tried again.",
)
