"""The rules of the queue: submit, order, position, forecast, cancel, prune.

One lock guards everything here and one condition wakes the worker: nobody polls with sleep. HTTP
threads and the worker thread call the public methods; each takes the lock once and returns plain
values. Only `_move` changes a task's status.

Order: urgent tasks first, then normal ones, each first come, first served.
"""

import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain
from math import ceil
from threading import Condition, Lock

from errors import Gone, NotReady, NoWorker, QueueFull, UnknownTask
from model_catalog import Model
from task import TRANSITIONS, GenerationParams, Phase, Progress, Task, TaskStatus
from timing_model import Forecast, Measured, TimingModel, Work

log = logging.getLogger(__name__)

GONE_REMEMBERED = 10_000
"""Ids of tasks that are no more, remembered to answer 410 instead of 404."""


class ServerState(StrEnum):
    LOADING = "loading"  # the worker loads the model; tasks are accepted and wait
    READY = "ready"  # nothing runs
    BUSY = "busy"  # a task runs
    DRAINING = "draining"  # the server is stopping; no new tasks
    FAILED = "failed"  # the model could not be loaded; the server ends


@dataclass(frozen=True)
class TaskView:
    """One task as it stands now, with its forecast."""

    task_id: str
    status: TaskStatus
    params: GenerationParams
    urgent: bool
    created_at: float
    started_at: float | None
    ended_at: float | None
    pos: int | None
    """Tasks waiting before it; 0 when it is next or running; None when it has ended."""
    wait_s: float | None
    """Forecast seconds until its image is ready; None when it has ended."""
    phase: Phase | None
    steps_done: int
    steps_total: int
    error: str | None
    measured: Measured | None


@dataclass(frozen=True)
class QueueCounts:
    state: ServerState
    waiting: int
    running: int
    done: int
    images_bytes: int
    quantize: int | None
    """Bits that the loaded weights are quantized to."""


class QueueManager:
    def __init__(
        self,
        model: Model,
        timing: TimingModel,
        *,
        max_queue: int = 1000,
        keep_s: float = 24 * 3600,
        keep_bytes: int = 500_000_000,
        monotonic: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.model = model
        self._timing = timing
        self._quantize: int | None = None
        self._max_queue = max_queue
        self._keep_s = keep_s
        self._keep_bytes = keep_bytes
        self._monotonic = monotonic
        self._now = now

        self._lock = Lock()
        self._wake_worker = Condition(self._lock)
        self._tasks: dict[str, Task] = {}
        self._urgent: OrderedDict[str, Task] = OrderedDict()
        self._normal: OrderedDict[str, Task] = OrderedDict()
        self._running: OrderedDict[str, Task] = OrderedDict()
        self._ended: OrderedDict[str, Task] = OrderedDict()
        self._gone: OrderedDict[str, str] = OrderedDict()
        self._images_bytes = 0
        self._stopping = False
        self._failed = False
        self._load_started_at: float | None = None
        self._loaded = False

    # -- clients ------------------------------------------------------------------------------

    def submit(self, params: GenerationParams, *, urgent: bool) -> tuple[TaskView, int]:
        """Put a task into the queue.

        Returns:
            The task as it stands, and the number of other tasks that are not finished.

        Raises:
            NoWorker: the server is stopping.
            QueueFull: max_queue tasks wait already.
        """
        with self._lock:
            if self._stopping or self._failed:
                raise NoWorker
            others = len(self._urgent) + len(self._normal) + len(self._running)
            if len(self._urgent) + len(self._normal) >= self._max_queue:
                retry_after_s = max(ceil(self._next_start_s()), 1)
                raise QueueFull(
                    f"{self._max_queue} tasks wait already: try again in {retry_after_s} s.",
                    retry_after_s=retry_after_s,
                )
            task = Task(self._new_task_id(), params, urgent, created_at=self._now())
            self._tasks[task.task_id] = task
            (self._urgent if urgent else self._normal)[task.task_id] = task
            self._wake_worker.notify_all()
            return self._view(task), others

    def status(self, task_id: str) -> TaskView:
        """One task as it stands.

        Raises:
            UnknownTask, Gone.
        """
        with self._lock:
            return self._view(self._find(task_id))

    def queue(self) -> list[TaskView]:
        """Every task that is not finished, in the order in which they run, in one pass."""
        with self._lock:
            return list(self._views_in_order())

    def image(self, task_id: str) -> tuple[bytes, GenerationParams]:
        """The image of a finished task.

        Raises:
            UnknownTask, Gone: also when the task failed or was cancelled.
            NotReady.
        """
        with self._lock:
            task = self._find(task_id)
            if task.status is TaskStatus.FAILED:
                raise Gone(f"There is no image: the task failed. {task.error}")
            if task.status is TaskStatus.CANCELLED:
                raise Gone("There is no image: the task was cancelled.")
            if task.image is None:
                raise NotReady
            return task.image, task.params

    def forget(self, task_id: str, reason: str) -> None:
        """Remove a finished task; it is answered with 410 and the reason from now on."""
        with self._lock:
            if task_id in self._ended:
                self._drop(task_id, reason)

    def delete(self, task_id: str) -> TaskStatus:
        """Cancel a task that waits or runs, remove one that has ended.

        The worker leaves a running task at its next step.

        Returns:
            The status that the task had.

        Raises:
            UnknownTask, Gone.
        """
        with self._lock:
            task = self._find(task_id)
            was = task.status
            if was.final:
                self._drop(task_id, "The task was deleted.")
            else:
                self._move(task, TaskStatus.CANCELLED)
            return was

    def counts(self) -> QueueCounts:
        with self._lock:
            done = sum(task.status is TaskStatus.DONE for task in self._ended.values())
            return QueueCounts(
                state=self._state(),
                waiting=len(self._urgent) + len(self._normal),
                running=len(self._running),
                done=done,
                images_bytes=self._images_bytes,
                quantize=self._quantize,
            )

    # -- the worker -----------------------------------------------------------------------------
    # report, finish, fail and release answer False when the task runs no more (it was cancelled).

    def load_started(self) -> None:
        with self._lock:
            self._load_started_at = self._monotonic()

    def load_finished(self, quantize: int | None) -> None:
        """The model is ready, its weights quantized to so many bits (None: not quantized)."""
        with self._lock:
            self._quantize = quantize
            if self._load_started_at is not None:
                seconds = self._monotonic() - self._load_started_at
                self._timing.learn_load(self._timing_key, seconds)
            self._loaded = True

    def load_failed(self) -> None:
        with self._lock:
            self._failed = True

    def claim(self, timeout_s: float | None = None) -> Task | None:
        """The next task to run, now running; waits for one. None: time is up, or stop() came."""
        with self._lock:
            self._wake_worker.wait_for(
                lambda: self._stopping or self._urgent or self._normal, timeout_s
            )
            if self._stopping or not (self._urgent or self._normal):
                return None
            level = self._urgent or self._normal
            task = next(iter(level.values()))
            self._move(task, TaskStatus.RUNNING)
            task.started_at = self._now()
            at = self._monotonic()
            task.progress = Progress(
                Phase.TEXT_ENCODING, at, steps_total=task.params.steps, step_started_at=at
            )
            return task

    def report(self, task_id: str, phase: Phase, steps_done: int, steps_total: int) -> bool:
        """The running task has reached a phase or ended a step, at this moment.

        Returns:
            Whether it shall go on; False: it was cancelled, or the server stops.
        """
        with self._lock:
            task = self._running.get(task_id)
            if task is None or task.progress is None:
                return False
            progress, at = task.progress, self._monotonic()
            if phase is not progress.phase:
                progress.phase_s[progress.phase] = at - progress.phase_started_at
                progress.phase, progress.phase_started_at = phase, at
                progress.step_started_at = at
            if steps_done > progress.steps_done:
                progress.step_s.append(at - progress.step_started_at)
                progress.step_started_at = at
            progress.steps_done, progress.steps_total = steps_done, steps_total
            return not self._stopping

    def finish(self, task_id: str, image: bytes) -> bool:
        """The image is encoded: the task is done, and its timings are learned."""
        with self._lock:
            task = self._running.get(task_id)
            if task is None or task.progress is None:
                return False
            progress = task.progress
            progress.phase_s[progress.phase] = self._monotonic() - progress.phase_started_at
            self._timing.learn(self._work(task.params), _measured(progress))
            task.image = image
            self._images_bytes += len(image)
            self._move(task, TaskStatus.DONE)
            self._prune()
            return True

    def fail(self, task_id: str, message: str) -> bool:
        with self._lock:
            task = self._running.get(task_id)
            if task is None:
                return False
            task.error = message
            self._move(task, TaskStatus.FAILED)
            self._prune()
            return True

    def release(self, task_id: str) -> bool:
        """The worker left the running task at a step: it waits again, first of its level."""
        with self._lock:
            task = self._running.get(task_id)
            if task is None:
                return False
            self._move(task, TaskStatus.WAITING)
            return True

    def stop(self) -> None:
        """Accept and hand out no more tasks; the running one is told at its next report."""
        with self._lock:
            self._stopping = True
            self._wake_worker.notify_all()

    # -- inside, under the lock -----------------------------------------------------------------

    def _move(self, task: Task, to: TaskStatus) -> None:
        """The only place where a status changes."""
        if to not in TRANSITIONS[task.status]:
            raise RuntimeError(f"task {task.task_id} cannot go from {task.status} to {to}")
        level = self._urgent if task.urgent else self._normal
        (self._running if task.status is TaskStatus.RUNNING else level).pop(task.task_id)
        task.status = to
        if to is TaskStatus.RUNNING:
            self._running[task.task_id] = task
        elif to is TaskStatus.WAITING:
            task.progress = None
            level[task.task_id] = task
            level.move_to_end(task.task_id, last=False)
        else:
            task.ended_at = self._now()
            self._ended[task.task_id] = task
        log.info("task %s is %s", task.task_id, to)

    def _find(self, task_id: str) -> Task:
        task = self._tasks.get(task_id)
        if task is not None:
            return task
        if task_id in self._gone:
            raise Gone(self._gone[task_id])
        raise UnknownTask

    def _new_task_id(self) -> str:
        while True:
            task_id = secrets.token_hex(8)
            if task_id not in self._tasks and task_id not in self._gone:
                return task_id

    def _drop(self, task_id: str, reason: str) -> None:
        task = self._ended.pop(task_id)
        del self._tasks[task_id]
        self._images_bytes -= len(task.image or b"")
        self._gone[task_id] = reason
        if len(self._gone) > GONE_REMEMBERED:
            self._gone.popitem(last=False)

    def _prune(self) -> None:
        """Drop what has been kept long enough, and the oldest images over keep_bytes."""
        oldest_kept = self._now() - self._keep_s
        for task in list(self._ended.values()):
            too_old = (task.ended_at or 0.0) < oldest_kept
            if not too_old and self._images_bytes <= self._keep_bytes:
                break
            if too_old or task.image is not None:
                self._drop(task.task_id, "The image was kept for its time and has expired.")

    def _state(self) -> ServerState:
        if self._failed:
            return ServerState.FAILED
        if self._stopping:
            return ServerState.DRAINING
        if not self._loaded:
            return ServerState.LOADING
        return ServerState.BUSY if self._running else ServerState.READY

    @property
    def _timing_key(self) -> str:
        """What shares one law of time: forecasts are learned and made per key."""
        return f"{self.model.name}/q{self._quantize}" if self._quantize else self.model.name

    def _work(self, params: GenerationParams) -> Work:
        return Work(
            model=self._timing_key,
            parameters_b=self.model.parameters_b,
            tokens=params.tokens,
            steps=params.steps,
            format=params.format,
        )

    def _forecast(self, task: Task) -> Forecast:
        return self._timing.forecast(self._work(task.params))

    def _load_remaining_s(self) -> float:
        if self._loaded:
            return 0.0
        load_s = self._timing.forecast_load_s(self._timing_key, self.model.parameters_b)
        if self._load_started_at is None:
            return load_s
        return max(load_s - (self._monotonic() - self._load_started_at), 0.0)

    def _next_start_s(self) -> float:
        """Seconds until the GPU is free for the first waiting task."""
        running_s = sum(self._gpu_remaining_s(task) for task in self._running.values())
        return self._load_remaining_s() + running_s

    def _gpu_remaining_s(self, task: Task) -> float:
        progress = task.progress
        assert progress is not None  # claim made it
        at = self._monotonic()
        return self._timing.remaining_s(
            self._forecast(task),
            phase=progress.phase,
            phase_elapsed_s=at - progress.phase_started_at,
            steps_done=progress.steps_done,
            steps_total=progress.steps_total,
            step_s=progress.step_s,
            step_elapsed_s=at - progress.step_started_at,
        )

    def _views_in_order(self) -> Iterator[TaskView]:
        """Two lanes, each one task at a time: the GPU, and the encoder, which follows it."""
        gpu_free_s, encoder_free_s = self._load_remaining_s(), 0.0
        for task in self._running.values():
            gpu_free_s += self._gpu_remaining_s(task)
            encoder_free_s = max(encoder_free_s, gpu_free_s) + self._encoding_remaining_s(task)
            yield _view_of(task, pos=0, wait_s=encoder_free_s)
        for pos, task in enumerate(chain(self._urgent.values(), self._normal.values())):
            forecast = self._forecast(task)
            gpu_free_s += forecast.gpu_s
            encoder_free_s = max(encoder_free_s, gpu_free_s) + forecast.image_encoding_s
            yield _view_of(task, pos=pos, wait_s=encoder_free_s)

    def _encoding_remaining_s(self, task: Task) -> float:
        progress, encoding_s = task.progress, self._forecast(task).image_encoding_s
        if progress is None or progress.phase is not Phase.IMAGE_ENCODING:
            return encoding_s
        return max(encoding_s - (self._monotonic() - progress.phase_started_at), 0.0)

    def _view(self, task: Task) -> TaskView:
        if task.status.final:
            return _view_of(task, pos=None, wait_s=None)
        return next(view for view in self._views_in_order() if view.task_id == task.task_id)


def _view_of(task: Task, *, pos: int | None, wait_s: float | None) -> TaskView:
    progress = task.progress
    return TaskView(
        task_id=task.task_id,
        status=task.status,
        params=task.params,
        urgent=task.urgent,
        created_at=task.created_at,
        started_at=task.started_at,
        ended_at=task.ended_at,
        pos=pos,
        wait_s=wait_s,
        phase=progress.phase if progress and not task.status.final else None,
        steps_done=progress.steps_done if progress else 0,
        steps_total=progress.steps_total if progress else task.params.steps,
        error=task.error,
        measured=_measured(progress) if progress and task.status is TaskStatus.DONE else None,
    )


def _measured(progress: Progress) -> Measured:
    return Measured(
        text_encoding_s=progress.phase_s.get(Phase.TEXT_ENCODING, 0.0),
        step_s=tuple(progress.step_s),
        decoding_s=progress.phase_s.get(Phase.DECODING, 0.0),
        image_encoding_s=progress.phase_s.get(Phase.IMAGE_ENCODING, 0.0),
    )
