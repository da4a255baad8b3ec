"""Changes that are made to tasks and to the queue on request: pause, clear, move, retry."""

import logging
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass

from errors import Gone, WrongStatus
from scheduler.admission import Admission
from scheduler.events import EventKind
from scheduler.limits import MAX_INTERRUPTIONS, NO_LIMITS, ClientLimits
from scheduler.scheduler import Scheduler
from storage.usage_store import Usage
from task import Task, TaskStatus

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Account:
    """What a client has in the queue, and what it has had."""

    name: str
    waiting: int = 0
    running: int = 0
    gpu_s: float = 0.0
    """GPU seconds of its ended tasks, in all."""
    today_s: float = 0.0
    """The same since midnight, UTC."""


class QueueControl:
    """Thread-safe. All methods may raise StorageUnavailable; then nothing has changed."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._admission = Admission(scheduler)

    @property
    def paused(self) -> bool:
        """Whether no task is started."""
        return self._scheduler.paused

    def pause(self, paused: bool) -> None:
        """Start no more tasks, or start them again (False). The running task goes on. Survives a
        restart."""
        scheduler = self._scheduler
        with scheduler.changes, scheduler.health.noting_storage():
            scheduler.store.state.set_paused(paused)
            with scheduler.lock:
                scheduler.paused = paused
                scheduler.wake_worker.notify_all()

    def clear(self, owner: str | None = None) -> int:
        """Cancel all waiting tasks (owner: of this client); returns how many there were."""
        scheduler, cancelled = self._scheduler, 0
        with scheduler.lock:
            tasks = [task for task in scheduler.unfinished if owner in (None, task.owner.name)]
        for task in reversed(tasks):  # leaving at the end changes no other place
            with scheduler.changes, scheduler.health.noting_storage():
                if task.status is TaskStatus.WAITING:
                    cancelled += scheduler.cancel(task)
        return cancelled

    def move_to_front(self, task_id: str) -> None:
        """A waiting task runs next.

        Raises:
            UnknownTask, Gone.
            WrongStatus: it does not wait, or waits for a download or its prompt.
        """
        scheduler = self._scheduler
        with scheduler.changes, scheduler.health.noting_storage():
            with scheduler.lock:
                task = scheduler.get(task_id)
                waits = task is not None and task in scheduler.schedule
                sequence, group = scheduler.next_sequence(), scheduler.policy.front_group
            if task is None:
                scheduler.retention.find(task_id)
            if task is None or not waits:
                raise WrongStatus("Only a task that waits for the GPU can be moved.")
            scheduler.store.reorder(task_id, sequence=sequence, group=group)
            with scheduler.lock:
                scheduler.policy.move_to_front(task, sequence=sequence, group=group)
                scheduler.baselines.forget(task)  # nothing can be learned from its forecast
                scheduler.set_baseline(task)
        scheduler.events.publish(EventKind.WAITING, task_id)

    def retry(self, task_id: str, limits: ClientLimits = NO_LIMITS) -> None:
        """A failed task waits again, as if it were submitted now. It has its stored images, and is
        not pinned any more. If the server or a worker has died during it before, it fails when that
        happens once more.

        Args:
            limits: of its client.

        Raises:
            UnknownTask.
            WrongStatus: it has not failed.
            Gone: it was removed, or its input images were.
            ModelNotAllowed, NotSupported: the operator does not allow its params any more.
            NoWorker, QueueFull, ClientLimit: it cannot be accepted now.
        """
        scheduler = self._scheduler
        with scheduler.changes, scheduler.health.accepting():
            task = scheduler.retention.find(task_id)
            if task.status is not TaskStatus.FAILED:
                raise WrongStatus("Only a failed task can be tried again.")
            stages = scheduler.allowed.stages(task.params)
            task.stages = tuple(stage.after_images(task.images_done) for stage in stages)
            missing = scheduler.downloads.missing(task)
            with scheduler.lock:
                self._admission.check(task, missing, limits)
                place = scheduler.place(task)
            interruptions = min(task.interruptions, MAX_INTERRUPTIONS - 1)
            if task.params.inputs and not scheduler.store.reuse_inputs(task_id):
                raise Gone("Its input images had to make room for others: submit it again.")
            with ExitStack() as unless_retried:
                unless_retried.callback(scheduler.store.spare_inputs, task_id)
                if not scheduler.store.retry(task, interruptions):
                    raise WrongStatus("Only a failed task can be tried again.")
                unless_retried.pop_all()
            _waits_again(task, interruptions)
            with scheduler.lock:
                if missing or task.params.expand:
                    scheduler.join_downloads(task, missing)
                else:
                    scheduler.join(task, place)
                scheduler.set_baseline(task)
        scheduler.events.publish(EventKind.WAITING, task_id)
        log.info("task %s is tried again", task_id)

    def cancel_overdue(self) -> None:
        """Cancel the waiting tasks whose time is up."""
        scheduler = self._scheduler
        with scheduler.lock:
            tasks = scheduler.deadlines.all_overdue()
        for task in tasks:
            with scheduler.changes, scheduler.health.noting_storage():
                with scheduler.lock:
                    overdue = scheduler.deadlines.overdue(task)
                if overdue:
                    scheduler.cancel(task, *overdue)

    def cancel_after_image(self, task: Task) -> bool:
        """Cancel a running task when the image that it is at is stored (under `changes`). Returns
        False if it has to be cancelled now: it waits, is between two images, or its present stage
        finishes no image."""
        scheduler = self._scheduler
        with scheduler.lock:
            run = scheduler.machines.run(task.task_id)
            if run is None or run.progress.stage < len(task.stages) - 1:
                return False
            index = run.progress.image
        if not scheduler.store.cancel_after(task, index):  # stored; the next one has not begun
            return False
        with scheduler.lock:
            task.last_image = index
            task.stages = tuple(stage.first_images(index + 1) for stage in task.stages)
            if scheduler.machines.run(task.task_id):
                scheduler.reported(run)
            has_ended = task.ended or scheduler.get(task.task_id) is None
            return has_ended or task.images_done <= index

    def accounts(self) -> dict[str, Account]:
        """By name, the clients that have tasks or have used the GPU."""
        scheduler = self._scheduler
        usage = scheduler.store.usage.by_client(scheduler.now())
        with scheduler.lock:
            tasks = [(task.owner.name, task.status) for task in scheduler.unfinished]
        waiting = Counter(name for name, status in tasks if status is TaskStatus.WAITING)
        running = Counter(name for name, status in tasks if status is TaskStatus.RUNNING)
        accounts = {}
        for name in {*usage, *waiting, *running}:
            used = usage.get(name, Usage())
            accounts[name] = Account(name, waiting[name], running[name], used.gpu_s, used.today_s)
        return accounts


def _waits_again(task: Task, interruptions: int) -> None:
    """What the store has changed."""
    task.status, task.retried_after = TaskStatus.WAITING, task.attempt
    task.interruptions = interruptions
    task.started_at = task.ended_at = task.fetched_at = task.last_image = task.start_by = None
    task.error_code = task.error = None
    task.kept = False
