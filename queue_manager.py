"""The rules of the queue as clients meet them: submit, order, position, forecast, cancel.

Order: urgent tasks first, then normal ones, each first come, first served, but for those that join
others of their model (affinity.py).

The queue is one object in three rooms: this one, work_source.py for the worker, and below both
queue_core.py with the locks.
"""

import logging
import secrets
from collections.abc import Mapping
from contextlib import ExitStack
from copy import copy
from itertools import islice
from math import ceil

from errors import (
    Gone,
    InputsFull,
    InputsTooLarge,
    NotReady,
    NoWorker,
    QueueFull,
    UnknownTask,
)
from models.model_catalog import Weights
from queueing.events import EventKind
from queueing.kept_tasks import DELETED
from queueing.queue_state import QueueHealth, ServerState, Stats
from queueing.task_view import TaskView, Wait
from queueing.work_source import WorkSource
from task import SIDE_STEP, GenerationParams, Stage, Task, TaskStatus
from timing_model import Work

log = logging.getLogger(__name__)

STATS_SIDES = (512, 768, 1024, 1536)


class QueueManager(WorkSource):
    """What HTTP threads call, on top of what the worker does."""

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
            client_key: with the same key comes the same task, as submitted_as() says.
            inputs: the pictures that the params name, as PNG, by InputImage.file.
            callback_url: who is told that the task has ended (webhooks.py).

        Returns:
            The task as it stands, and the number of other tasks that are not finished.

        Raises:
            NoWorker: the server is stopping.
            QueueFull: too many tasks wait, or the wait would be too long.
            InputsFull, InputsTooLarge: the pictures exceed what the operator allows.
            ModelNotAllowed, NotSupported: the params ask for what the operator does not allow.
        """
        stages = self.offer.stages(params)
        task = Task(secrets.token_hex(8), params, urgent, stages, created_at=self._now())
        with ExitStack() as unless_submitted:
            if inputs:  # before others have to wait for this: it may take long
                self._reserve_inputs(task.task_id, sum(map(len, inputs.values())))
                unless_submitted.callback(self._store.discard_inputs, task.task_id)
                with self._troubles.accepting():
                    self._store.keep_inputs(task.task_id, inputs)
            submitted = self._submit(task, client_key, callback_url)
            if submitted[0].task_id == task.task_id:
                unless_submitted.pop_all()
            return submitted

    def _reserve_inputs(self, task_id: str, size_bytes: int) -> None:
        limit = self._rules.input_bytes
        if size_bytes > limit:
            raise InputsTooLarge(
                f"The pictures of this task take {size_bytes} bytes; the server keeps up to "
                f"{limit} for all tasks (--input-bytes)."
            )
        if not self._store.reserve_inputs(task_id, size_bytes, limit):
            with self._lock:
                retry_after_s = max(ceil(self._live.forecast.next_start_s()), 1)
            raise InputsFull(
                f"The pictures of waiting tasks take the {limit} bytes that the operator allows: "
                f"try again in {retry_after_s} s.",
                retry_after_s=retry_after_s,
            )

    def _submit(
        self, task: Task, client_key: str | None, callback_url: str | None
    ) -> tuple[TaskView, int]:
        with self._writing:
            if client_key and (known := self.submitted_as(client_key)):
                return known
            missing = self._missing(*(stage.weights for stage in task.stages))
            with self._lock:
                self._check_room(task.stages, task.urgent, missing)
            with self._troubles.accepting():
                if client_key:
                    self._store.free_key(client_key)
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
        """The unfinished or finished task of this key, and the number of other unfinished tasks.

        Returns:
            None when the key is free: it is new, or its task failed, was cancelled, or is gone.
        """
        known = self._store.find_by_key(client_key)
        if known is None:
            return None
        try:
            view = self.status(known)
        except (Gone, UnknownTask):
            return None
        if view.status in (TaskStatus.FAILED, TaskStatus.CANCELLED):
            return None
        return view, self._unfinished_beside(known)

    def estimate(self, params: GenerationParams, *, urgent: bool) -> tuple[Wait, int]:
        """What submit would answer now, and the number of tasks that are not finished."""
        stages = self.offer.stages(params)
        missing = self._missing(*(stage.weights for stage in stages))
        with self._lock:
            wait = self._live.forecast.of_new(stages, urgent=urgent, missing=missing)
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

    def delete(self, task_id: str) -> TaskStatus:
        """Cancel a task that waits or runs, remove one that has ended.

        The worker leaves a running task at its next step.

        Returns:
            The status that the task had.

        Raises:
            UnknownTask, Gone.
        """
        with self._writing, self._troubles.noting_storage():
            self._settle_restored()
            task = self._live.get(task_id)
            was = task.status if task else None
            ended = {"ended_at": self._now(), "kept_since": self.keep_clock()}
            if not (task and was and self._store.cancel(task_id, was, **ended)):
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

    def fetch_ahead(self, params: GenerationParams) -> str | None:
        """Have the weights downloaded that a task with these would lack, without a task.

        Returns:
            Why they could not be had a moment ago; then they are not tried again yet.
        """
        missing = self._missing(*(stage.weights for stage in self.offer.stages(params)))
        with self._lock:
            held = self._live.state.held
            for weights in missing:
                if failure := held.failure(weights.model):
                    return failure
                held.order(weights)
            self._wake_downloads.notify_all()
            return None

    def order_load(self, weights: Weights) -> None:
        """The operator wants these loaded, between the task that runs and the next one; what is not
        on this machine is downloaded before.

        Raises:
            NoWorker: the server is stopping.
        """
        missing = self._missing(weights)
        with self._lock:
            if self.stopping or self._troubles.load_failed:
                raise NoWorker
            if all(weights.key != ordered.key for ordered in self._load_orders):
                self._load_orders.append(weights)
            for lacking in missing:
                self._live.state.held.order(lacking)
            self._wake_worker.notify_all()
            self._wake_downloads.notify_all()

    def health(self) -> QueueHealth:
        with self._lock:
            return QueueHealth(
                state=self._state(),
                waiting=self._live.waiting,
                running=len(self._live.running),
                loaded=tuple(
                    self._loaded[key] for key in self._live.state.resident if key in self._loaded
                ),
                loading=self._live.state.loading,
                download=copy(self._live.state.held.download),
                quantize=self._live.state.work.bits(self._latest()),
                last_error=self._troubles.storage_error or self._troubles.last_error,
            )

    def state(self) -> ServerState:
        with self._lock:
            return self._state()

    def stats(self) -> Stats:
        with self._lock:
            tasks_last_hour, busy_share = self._live.last_hour()
            key, timing = self._live.state.work.load_key(self._own), self._live.state.timing
            return Stats(
                timing_key=key,
                samples=timing.samples(key),
                load_s=self._live.state.work.load_s(self._own),
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
        """How many finished tasks are kept with their images, and the bytes of these."""
        return self._kept.images

    # -- inside, under _lock ----------------------------------------------------------------------

    def _square(self, key: str, side: int) -> Work:
        tokens, steps = (side // SIDE_STEP) ** 2, self.model.default_steps
        return Work(key, self.model.parameters_b, tokens, steps, "JPEG")

    def _latest(self) -> Weights:
        """The weights used last, or those that will be."""
        known = (self._loaded[key] for key in self._live.state.resident if key in self._loaded)
        return next(known, self._own)

    def _join(self, task: Task, missing: tuple[Weights, ...]) -> None:
        if missing:
            self._live.hold(task, missing)
            self._wake_downloads.notify_all()
        else:
            self._live.add(task)
            self._wake_worker.notify_all()

    def _check_room(
        self, stages: tuple[Stage, ...], urgent: bool, missing: tuple[Weights, ...]
    ) -> None:
        if self.stopping or self._troubles.load_failed:
            raise NoWorker
        if self._live.waiting >= self._rules.max_queue:
            retry_after_s = max(ceil(self._live.forecast.next_start_s()), 1)
            raise QueueFull(
                f"{self._rules.max_queue} tasks wait already: try again in {retry_after_s} s.",
                retry_after_s=retry_after_s,
            )
        if self._rules.max_wait_s > 0:
            wait_s = self._live.forecast.of_new(stages, urgent=urgent, missing=missing).end_s
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
        if self._troubles.load_failed or self._troubles.storage_error is not None:
            return ServerState.FAILED
        if self.stopping:
            return ServerState.DRAINING
        if self._live.state.loading is not None:
            return ServerState.LOADING
        return ServerState.BUSY if self._live.busy else ServerState.READY

    def _check_ended(self, task_id: str) -> None:
        with self._lock:
            if task_id in self._live:
                raise NotReady
