"""Changes on request, to tasks, the queue and its machines."""

import logging
from contextlib import ExitStack

from errors import Gone, ModelNotAllowed, NoWorker, WrongStatus
from models.model_catalog import LoadSpec
from scheduler.admission import check_admission
from scheduler.events import EventKind
from scheduler.limits import MAX_INTERRUPTIONS, NO_LIMITS, ClientLimits
from scheduler.scheduler import Scheduler
from task import Task, TaskStatus
from timing_model import LOCAL

log = logging.getLogger(__name__)


class QueueControl:
    """Thread-safe. All methods may raise StorageUnavailable; then nothing has changed."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

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

    def drain(self, name: str, drained: bool) -> None:
        """Give a machine no more tasks, or give it tasks again (False). The running task goes on.
        Survives a restart.

        Raises:
            UnknownMachine: there is none.
        """
        scheduler = self._scheduler
        with scheduler.changes, scheduler.health.noting_storage():
            with scheduler.lock:
                machine = scheduler.machines.named(name)
            scheduler.store.state.set_drained(name, drained)
            with scheduler.lock:
                machine.drained = drained
                scheduler.wake_worker.notify_all()

    def order_load(self, spec: LoadSpec, name: str = LOCAL) -> bool:
        """Load these weights on a machine, after the task that it draws. Missing weights are
        downloaded first. Returns whether they are in its memory already.

        Raises:
            NoWorker: the server is stopping.
            UnknownMachine: there is none.
            ModelNotAllowed: its worker may not load them.
        """
        scheduler = self._scheduler
        missing = name == LOCAL and scheduler.downloads.is_missing(spec)
        with scheduler.lock:
            if scheduler.stopping or scheduler.health.load_failed:
                raise NoWorker
            machine = scheduler.machines.named(name)
            if machine.about and spec.model.name not in machine.about.models:
                raise ModelNotAllowed(f"The worker of {name!r} may not load {spec.model.name!r}.")
            if spec.key in machine.resident.keys:
                return True
            if all(spec.key != ordered.key for ordered in machine.load_orders):
                machine.load_orders.append(spec)
            if missing:
                scheduler.downloads.order(spec)
            scheduler.wake_worker.notify_all()
            scheduler.wake_downloads.notify_all()
            return False

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
                scheduler.baselines.begin(task, sequence)  # nothing is learned from its forecast
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
            task.stages = scheduler.allowed.stages(task.params, task.images_done)
            missing = scheduler.downloads.missing(task)
            with scheduler.lock:
                check_admission(scheduler, task, missing, limits)
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
                scheduler.enter(task, missing, place)
        scheduler.events.publish(EventKind.WAITING, task_id)
        log.info("task %s is tried again", task_id)

    def cancel_overdue(self) -> None:
        """Cancel the waiting tasks whose time is up."""
        scheduler = self._scheduler
        with scheduler.lock:
            tasks = scheduler.deadlines.all_overdue()
        for task in tasks:
            with scheduler.changes, scheduler.health.noting_storage():
                scheduler.cancel_overdue(task)

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


def _waits_again(task: Task, interruptions: int) -> None:
    """What the store has changed."""
    task.status, task.retried_after = TaskStatus.WAITING, task.attempt
    task.interruptions = interruptions
    task.started_at = task.ended_at = task.fetched_at = task.last_image = task.start_by = None
    task.error_code = task.error = None
    task.kept = False
