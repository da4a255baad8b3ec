"""The tasks that wait and run: in memory and on disk, in step.

The scheduler composes the parts of this package and makes the changes that they share. Clients
reach it through queue_manager.py, workers through worker_api.py, the downloads through
download_api.py.

Every change is made on disk first, then in memory. Two locks, always taken in this order:
`changes` (one change at a time; the store's writer) and `lock` (the memory; never held across the
disk). Readers take the second one alone.
"""

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from threading import Condition, Lock

from allowed import Allowed
from clocks import KeepClock
from errors import InvalidInput, ModelNotAllowed, NotSupported, StorageUnavailable
from models.model_catalog import LoadSpec, Model
from monitoring.phase_seconds import PhaseSeconds
from scheduler.baselines import Baselines
from scheduler.deadlines import Deadlines
from scheduler.downloads import Downloads
from scheduler.estimates import Estimates
from scheduler.events import EventKind, EventLog
from scheduler.forecast import Forecaster
from scheduler.health import Cause, Health
from scheduler.lanes import Lanes
from scheduler.limits import QueueLimits
from scheduler.machines import Machine, Machines, Run
from scheduler.pending import EXPANSION_KEY, PendingTasks
from scheduler.policy import Place, Policy, key
from scheduler.restart import ClockNotes, restart
from scheduler.retention import Retention
from scheduler.schedule import Schedule
from storage.ended_tasks import End
from storage.task_store import TaskStore
from task import Forecast, Task, TaskStatus
from timing.spread import Spread
from timing_model import TimingModel

log = logging.getLogger(__name__)

PRUNE_EVERY_S = 10.0


class Scheduler:
    """Owner of all unfinished tasks.

    Args:
        allowed: the models that tasks may use; the first of them is loaded at the start.
        needs_download: whether a model's weights are not on this machine; any thread may call it.
        has_copy: whether the quantized weights of this key are loaded from a copy.
        gaps: how often the process was stopped so far (RunningClock.gaps); what was measured
            meanwhile is not learned.

    All methods may raise StorageUnavailable when the disk refuses; then nothing has changed.
    Methods that end with "(locked)" in their first line are called under `lock`.
    """

    def __init__(
        self,
        allowed: Allowed,
        timing: TimingModel,
        store: TaskStore,
        limits: QueueLimits | None = None,
        *,
        needs_download: Callable[[Model], bool] = lambda model: False,
        has_copy: Callable[[str], bool] = lambda key: False,
        monotonic: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
        gaps: Callable[[], int] = lambda: 0,
    ) -> None:
        """Continues where the store's last process ended."""
        self.allowed = allowed
        self.limits = limits or QueueLimits()
        self.store = store
        self.timing = timing
        self.monotonic, self.now, self.gaps = monotonic, now, gaps
        self.changes, self.lock = Lock(), Lock()
        self.wake_worker, self.wake_downloads = Condition(self.lock), Condition(self.lock)
        self.keep_clock = KeepClock(now, monotonic, store.state.keep_offset_s())
        self.events = EventLog(now, above=store.state.reserved_event_id())
        self._clock_notes = ClockNotes(store.state, self.keep_clock, self.events)
        self.health = Health(now)
        self.retention = Retention(store, self.limits, self.events, self.keep_clock)
        self.machine = Machine(
            first=allowed.first_spec,
            models_in_memory=self.limits.models_in_memory,
            started_at=monotonic(),
            loaded_bytes=store.state.loaded_bytes(),
        )
        self.machine.drained = store.state.is_drained(self.machine.name)
        self.machines = Machines(self.machine, needs_download, self.limits.local_worker)
        self.estimates = Estimates(timing, has_copy)
        self.schedule = Schedule(self.estimates, key)
        self.policy = Policy(self.schedule, self.limits)
        self.spread, self.phase_seconds = Spread(store.timings.outcomes()), PhaseSeconds()
        self.downloads = Downloads(monotonic, self.machines.lack, on_disk=allowed.default)
        self.pending = PendingTasks(self.downloads, monotonic)
        self.forecaster = Forecaster(
            schedule=self.schedule,
            machines=self.machines,
            policy=self.policy,
            estimates=self.estimates,
            spread=self.spread,
            pending=self.pending,
            monotonic=monotonic,
        )
        self.deadlines = Deadlines(self.keep_clock)
        self.paused = store.state.paused()
        self.drain_until: float | None = None
        """Monotonic seconds; None: the server is not stopping."""
        self._tasks: dict[str, Task] = {}
        self._sequence = 0
        self.baselines = Baselines(self.schedule, self.forecaster, self.spread, monotonic, gaps)
        self._prune_at = 0.0
        self._unsettled: list[Callable[[], object]] = []  # what a start has yet to write
        self._continue()

    @property
    def stopping(self) -> bool:
        return self.drain_until is not None

    def stop(self, drain_s: float = 0.0) -> None:
        """Accept and hand out no more tasks. The running one may go on for drain_s seconds if it
        is forecast to end by then; else it is stopped at its next report."""
        with self.lock:
            self.drain_until = self.monotonic() + drain_s
            self.wake_worker.notify_all()
            self.wake_downloads.notify_all()

    def prune(self) -> None:
        """Remove what was kept long enough, and the oldest images when there are too many."""
        if not self.retention.too_many and self.monotonic() < self._prune_at:
            return
        self._prune_at = self.monotonic() + PRUNE_EVERY_S
        try:
            with self.changes, self.health.noting_storage():
                self.retention.prune()  # first, because it makes room
                self._clock_notes.write()
        except StorageUnavailable as error:
            log.warning("pruning is postponed: %s", error)

    def check_storage(self) -> None:
        """Notice a disk that refuses, and one that works again. Tries to write only if it refused
        something before, or seems to be full or read-only.

        Raises:
            StorageUnavailable: it refuses.
        """
        if self.health.storage_error is not None:
            self.prune()  # which makes room
        with self.changes, self.health.noting_storage(probing=True):
            fine = self.store.seems_fine() and self.health.storage_error is None
            if not fine:
                self.store.probe()
            self.settle_restored()
            if not fine:
                self.health.storage_works()

    def settle_restored(self) -> None:
        """Write what became of the tasks that ran when the last process ended (under
        `changes`)."""
        while self._unsettled:
            self._unsettled[0]()
            del self._unsettled[0]

    def __len__(self) -> int:
        """Tasks that are not finished."""
        return len(self._tasks)

    def get(self, task_id: str) -> Task | None:
        """A task that is not finished (locked)."""
        return self._tasks.get(task_id)

    @property
    def unfinished(self) -> list[Task]:
        """In no certain order (locked)."""
        return list(self._tasks.values())

    @property
    def waiting(self) -> int:
        """Tasks that wait (locked)."""
        return len(self.schedule) + len(self.pending)

    def first(self, machine: Machine) -> Task | None:
        """The task that the worker of a machine may claim (locked)."""
        return self.next_tasks().get(machine.name)

    def next_tasks(self) -> dict[str, Task]:
        """By name of the machine, the task that its worker may claim (locked)."""
        return {} if self.paused else self.forecaster.next_tasks()

    def place(self, task: Task) -> Place:
        """Give a task its place in the order, before it joins (locked)."""
        place = self.policy.place(task, self._gpu_s(task), self.forecaster.resident_at_start())
        place.give(task, self.next_sequence())
        return place

    def next_sequence(self) -> int:
        self._sequence += 1
        return self._sequence

    def enter(
        self,
        task: Task,
        missing: tuple[LoadSpec, ...] = (),
        place: Place | None = None,
        *,
        submitted: bool = False,
    ) -> Forecast:
        """A task begins to wait (locked): in the schedule, or before that until these weights are
        on disk and its prompt is written. Returns the forecast that later ones are compared with.

        Args:
            place: in the schedule; None: the task gets one.
            submitted: the quality of the forecast is learned when the task is done.
        """
        if missing or task.params.expand:
            self._wait_for(task, missing)
            submitted = False  # the error depends mostly on the network
        else:
            place = place or self.place(task)
            self._add(task)
            self.policy.join(task, place)
            self.wake_worker.notify_all()
        return self.baselines.begin(task, self._sequence, submitted=submitted)

    def downloaded(self, spec: LoadSpec) -> None:
        """These weights are on disk (under `changes`): the tasks that waited for them join."""
        with self.lock:
            self.downloads.finish(spec.model)
            ready = self.pending.downloaded(spec.model)
            self.machine.missing -= {spec.model.name}
            for task in ready:
                with suppress(ModelNotAllowed, NotSupported, InvalidInput):  # else it stays
                    # The weights show their own bits now.
                    task.stages = self.allowed.stages(task.params, task.images_done)
                self.enter(task)
            self.wake_worker.notify_all()
        for task in ready:
            self.joined_late(task)

    def joined_late(self, task: Task) -> None:
        """Keep the order of a task that has joined after its submit, for the next start (under
        `changes`)."""
        self.events.publish(EventKind.WAITING, task.task_id)
        with suppress(StorageUnavailable), self.health.noting_storage():
            self.store.reorder(task.task_id, sequence=task.sequence, group=task.group)

    def start(self, task: Task, machine: Machine) -> None:
        """A waiting task is claimed (locked)."""
        self.baselines.claimed(task)
        self.policy.start(task, self.schedule.durations(self.schedule.position(task)).gpu_s)
        machine.start(task, self.monotonic(), self.gaps())
        self.reported(machine.runs[task.task_id])

    def release(self, run: Run) -> None:
        """A running task waits again, where it was (locked)."""
        run.machine.end(run, self.monotonic())
        task = run.task
        task.status, task.started_at = TaskStatus.WAITING, None
        task.stages = tuple(stage.after_images(task.images_done) for stage in task.stages)
        self.policy.release(task, run.gpu_s(self.monotonic()), self._gpu_s(task))
        self.deadlines.add(task)
        self.wake_worker.notify_all()
        lanes = self.forecaster.lanes()
        self.baselines.improve(task, self.forecaster.of(task, lanes), lanes.at)
        self.baselines.improve_waiting(lanes)

    def remove(self, task: Task, *, done: bool = False, stopping: bool = False) -> None:
        """A task has ended (locked). Args: stopping: a worker is still at a step of it."""
        del self._tasks[task.task_id]
        self.wake_worker.notify_all()  # a worker elsewhere that draws it is stopped
        self.deadlines.remove(task)
        self.baselines.forget(task)
        if run := self.machines.run(task.task_id):
            run.machine.end(run, self.monotonic(), done=done, stopping=stopping)
            self.policy.end(task, run.gpu_s(self.monotonic()))
        elif task in self.pending:
            self.pending.remove(task)
        else:
            self.policy.leave(task)
        lanes = self.forecaster.lanes()
        self.baselines.expect(lanes)
        self.baselines.improve_waiting(lanes)

    def cancel(self, task: Task, code: str | None = None, reason: str | None = None) -> bool:
        """Cancel a task (under `changes`). Returns whether it had not ended before.

        Args:
            code, reason: why, if its client has not asked for it.
        """
        if not self.store.cancel(task, self.end_of(task), code=code, reason=reason):
            return False
        self._ended(task, EventKind.CANCELLED, stopping=True)
        log.info("task %s is cancelled%s", task.task_id, f": {reason}" if reason else "")
        return True

    def cancel_overdue(self, task: Task) -> bool:
        """Cancel a waiting task if its time is up (under `changes`). Returns whether it is."""
        with self.lock:
            overdue = self.deadlines.overdue(task)
        if overdue:
            self.cancel(task, *overdue)
        return overdue is not None

    def _gpu_s(self, task: Task) -> float:
        """Forecast seconds of what is left of a task, without loading (locked)."""
        return self.estimates.durations(*task.stages).gpu_s

    def fail(self, task: Task, code: str, message: str) -> bool:
        """A task ends with an error (under `changes`). Returns whether it had not ended before."""
        if not self.store.fail(task, self.end_of(task), code=code, message=message):
            return False
        self.store.spare_inputs(task.task_id)
        self.health.failed(Cause.TASK, f"task {task.task_id}: {code}")  # only its client knows why
        self._ended(task, EventKind.FAILED)
        log.warning("task %s failed: %s", task.task_id, message, extra={"task_id": task.task_id})
        return True

    def _ended(self, task: Task, kind: EventKind, *, stopping: bool = False) -> None:
        """On disk a task has ended without all of its images (under `changes`)."""
        with self.lock:
            run = self.machines.run(task.task_id)
            if task.task_id in self._tasks:
                self.remove(task, stopping=stopping)
        if run is None or not run.on_gpu:  # else a worker may be reading them, and left() follows
            self.store.discard_inputs(task.task_id, spare=False)
        self.events.publish(kind, task.task_id)

    def reported(self, run: Run, lanes: Lanes | None = None) -> None:
        """A task was claimed, or a report on it came (locked)."""
        lanes = lanes or self.forecaster.lanes()
        running = lanes.of(run.machine).of(run)
        run.note_forecast(running.left_s, run.until(lanes.at))
        self.baselines.improve(run.task, running.forecast, lanes.at)

    def end_of(self, task: Task) -> End:
        """What the store notes of a task that ends now."""
        with self.lock:
            run = self.machines.run(task.task_id)
            used = (run.gpu_s(self.monotonic()), run.machine.name) if run else ()
        return End(self.now(), self.keep_clock(), *used)

    def _wait_for(self, task: Task, missing: tuple[LoadSpec, ...]) -> None:
        """A task waits for weights and for its prompt (locked)."""
        self._add(task)
        seconds = self.forecaster.load_and_work_s(task)
        self.pending.add(self.pending.entry(task, missing, *seconds))
        self.wake_downloads.notify_all()

    def _add(self, task: Task) -> None:
        """A task that waits is in memory (locked)."""
        self._tasks[task.task_id] = task
        self.deadlines.add(task)

    def _continue(self) -> None:
        """The tasks that waited or ran when the store's last process ended wait again."""
        found = restart(self.store.unfinished(), self.allowed)  # before anything is written
        with suppress(StorageUnavailable):  # the next prune() tries again
            self._clock_notes.write()
            self.store.usage.forget_anonymous(self.now())
        loads = self.store.timings.loads()
        self.pending.expansion_s = loads.get(EXPANSION_KEY, self.pending.expansion_s)
        self.store.timings.teach(self.timing)
        self._unsettled += [
            *(partial(self.cancel, task) for task in found.cancelled),
            *(partial(self.fail, *failed) for failed in found.failed),
            *(partial(self.store.release, task, interrupted=died) for task, died in found.released),
        ]
        missing = {task.task_id: self.downloads.missing(task) for task in found.waiting}
        ready = []
        with self.lock:
            for task in found.waiting:
                self._sequence = max(self._sequence, task.sequence)
                if missing[task.task_id] or task.params.expand:
                    self._wait_for(task, missing[task.task_id])
                else:
                    self._add(task)
                    ready.append(task)
            ready.sort(key=lambda task: task.sequence)
            self.policy.restore([(task, self._gpu_s(task)) for task in ready])
            lanes = self.forecaster.lanes()
            for task, forecast in self.forecaster.in_order(lanes, 0, len(self))[0]:
                self.baselines.set(task, forecast(), self._sequence)
        if self._tasks:
            log.info("%d tasks from before the start wait", len(self._tasks))
        with suppress(StorageUnavailable):  # the server starts all the same
            self.check_storage()
