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
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from threading import Condition, Lock

from allowed import Allowed
from errors import InvalidInput, ModelNotAllowed, NotSupported, NoWorker, StorageUnavailable
from models.model_catalog import LoadSpec, Model
from scheduler.downloads import Downloads, Pending
from scheduler.estimates import Estimates
from scheduler.events import EventKind, EventLog
from scheduler.forecast import Forecaster
from scheduler.health import Health, ServerState
from scheduler.keep_clock import KeepClock
from scheduler.limits import QueueLimits
from scheduler.machines import HOUR_S, Machine, Run
from scheduler.policy import Place, Policy, key
from scheduler.retention import Retention
from scheduler.schedule import Schedule
from storage.task_store import End, TaskStore
from task import Forecast, Reason, Task, TaskStatus
from timing_model import Outcome, Spread, TimingModel

log = logging.getLogger(__name__)

MAX_INTERRUPTIONS = 2
ENDED_TOO_OFTEN = (
    "ended_too_often",
    f"The server ended {MAX_INTERRUPTIONS} times while this task ran, so it is not tried again. "
    "The usual cause is too little memory: ask for a smaller picture, a smaller model or fewer "
    "bits (quantize).",
)
PRUNE_EVERY_S = 10.0
RESERVED_IDS = 1_000_000
"""Of events, noted on disk in advance. Half of them last for longer than PRUNE_EVERY_S."""
CLOCK_CHANGE_S = 1.0
"""A smaller distance between two clocks is not noted."""
STEADY_S, STEADY_SHARE = 1.0, 0.02
"""A forecast that is later than the first one by no more than this is not reported."""


@dataclass(frozen=True)
class _Baseline:
    """What was forecast for a task when its status changed last."""

    at: float
    """Reading of the monotonic clock."""
    forecast: Forecast
    claims: int
    """Claims of all tasks until then."""
    gaps: int
    """How often the process had been stopped until then."""


class Scheduler:
    """Args:
    allowed: the models that tasks may use; the first of them is loaded at the start.
    needs_download: whether a model's weights are not on this machine; any thread may call it.
    gaps: how often the process was stopped so far (RunningClock.gaps); what was measured meanwhile
        is not learned.

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
        monotonic: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
        gaps: Callable[[], int] = lambda: 0,
    ) -> None:
        """Continues where the store's last process ended."""
        self.allowed = allowed
        self.limits = limits or QueueLimits()
        self.store = store
        self.timing = timing
        self.monotonic = monotonic
        self.now = now
        self.gaps = gaps

        self.changes = Lock()
        self.lock = Lock()
        self.wake_worker = Condition(self.lock)
        self.wake_downloads = Condition(self.lock)

        self._reserved_id = store.clocks.reserved_event_id()
        self._noted_offset_s = store.clocks.keep_offset_s()
        self.keep_clock = KeepClock(now, monotonic, self._noted_offset_s)
        self.events = EventLog(now, above=self._reserved_id)
        self.health = Health()
        self.retention = Retention(store, self.limits, self.events, self.keep_clock)
        self.first_spec = LoadSpec(allowed.default, allowed.default.pipelines[0], allowed.quantize)
        self.machine = Machine(first=self.first_spec, models_in_memory=self.limits.models_in_memory)
        self.estimates = Estimates(timing)
        self.schedule = Schedule(self.estimates, key)
        self.schedule.models_in_memory = self.machine.models_in_memory
        self.policy = Policy(self.limits.max_delay_s)
        self.spread = Spread(store.timings.outcomes())
        self.downloads = Downloads(monotonic)
        self.forecaster = Forecaster(
            schedule=self.schedule,
            machines=(self.machine,),
            policy=self.policy,
            estimates=self.estimates,
            timing=timing,
            spread=self.spread,
            downloads=self.downloads,
            monotonic=monotonic,
        )
        self.load_orders: list[LoadSpec] = []
        self.drain_until: float | None = None
        """Reading of the monotonic clock; None: the server is not stopping."""
        self._tasks: dict[str, Task] = {}
        self._sequence = self._claims = 0
        self._baselines: dict[str, _Baseline] = {}
        self._submitted: dict[str, _Baseline] = {}
        self._ends: deque[float] = deque()  # of finished tasks, in the last hour
        self._started_at = monotonic()
        self._needs_download = needs_download
        self._on_disk = {allowed.default.name}  # models whose weights need no download
        self._prune_at = 0.0
        unfinished = store.unfinished()  # a damaged record is found before anything is written
        with suppress(StorageUnavailable):  # the next prune() tries again
            self._note_clocks()
        self._unsettled: list[Callable[[], object]] = []
        """What a start on a disk that refuses has yet to write."""
        self._restore(unfinished)
        with suppress(StorageUnavailable):  # the server starts all the same
            self.check_storage()

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
                self.retention.prune()  # first, for it makes room
                self._note_clocks()
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

    def missing(self, task: Task) -> tuple[LoadSpec, ...]:
        """The weights of a task that have to be downloaded before it can run. The server's own
        model is never among them: the worker fetches it before anything else."""
        missing = []
        for stage in task.stages:
            model = stage.load_spec.model
            if model.name not in self._on_disk and self._needs_download(model):
                missing.append(stage.load_spec)
            else:
                self._on_disk.add(model.name)
        return tuple(missing)

    def is_on_disk(self, spec: LoadSpec) -> bool:
        return spec.model.name in self._on_disk

    # -- tasks in memory (locked) ----------------------------------------------------------------

    def __len__(self) -> int:
        """Tasks that are not finished."""
        return len(self._tasks)

    def get(self, task_id: str) -> Task | None:
        """A task that is not finished (locked)."""
        return self._tasks.get(task_id)

    def run_of(self, task_id: str, attempt: int) -> Run | None:
        """What a worker runs, if that is still the latest attempt (locked)."""
        run = self.machine.runs.get(task_id)
        return run if run is not None and run.task.attempt == attempt else None

    @property
    def waiting(self) -> int:
        """Tasks that wait (locked)."""
        return len(self.schedule) + len(self.downloads)

    def place(self, task: Task) -> Place:
        """Give a task its place in the order, before it joins (locked)."""
        place = self.policy.place(task, self.schedule, self.forecaster.resident_at_start())
        self._sequence += 1
        task.sequence = self._sequence
        task.group = task.sequence if place.group is None else place.group
        return place

    def join(self, task: Task, place: Place) -> None:
        """A task joins the schedule (locked)."""
        self._tasks[task.task_id] = task
        task.waits_for_download = False
        if place.delays_s is not None:
            self.schedule.delay(task, place.delays_s)
        self.schedule.add(task, delay_budget_s=self.policy.max_delay_s)
        self.wake_worker.notify_all()

    def join_downloads(self, task: Task, missing: tuple[LoadSpec, ...]) -> None:
        """A task waits until these weights are on disk (locked)."""
        self._tasks[task.task_id] = task
        task.waits_for_download = True
        self.downloads.add(Pending(task, missing, *self.forecaster.load_and_work_s(task)))
        self.wake_downloads.notify_all()

    def downloaded(self, spec: LoadSpec) -> list[Task]:
        """These weights are on disk (locked). Returns the tasks that joined the schedule."""
        self._on_disk.add(spec.model.name)
        ready = self.downloads.finish(spec.model)
        for task in ready:
            self.join(task, self.place(task))
            self.set_baseline(task)
        self.wake_worker.notify_all()
        return ready

    def start(self, task: Task) -> None:
        """A waiting task is claimed (locked)."""
        self.schedule.remove(task)
        self.machine.start(task, self.monotonic(), self.gaps())
        self._claims += 1
        self.set_baseline(task)

    def release(self, run: Run) -> None:
        """A running task waits again, where it was (locked)."""
        self.machine.end(run, self.monotonic())
        task = run.task
        task.status, task.started_at, task.progress = TaskStatus.WAITING, None, None
        self.schedule.add(task, delay_budget_s=0.0)
        self.wake_worker.notify_all()
        self.set_baseline(task)

    def remove(self, task: Task, *, stopping: bool = False) -> None:
        """A task has ended (locked).

        Args:
            stopping: a worker is still at a step of it.
        """
        del self._tasks[task.task_id]
        self._baselines.pop(task.task_id, None)
        self._submitted.pop(task.task_id, None)
        if run := self.machine.runs.get(task.task_id):
            self.machine.end(run, self.monotonic(), stopping=stopping)
        elif task in self.downloads:
            self.downloads.remove(task)
        else:
            self.schedule.remove(task)

    def finish(self, run: Run) -> Outcome | None:
        """A task is done (locked). Returns how its forecast at submit compares with the truth."""
        at = self.monotonic()
        self._ends.append(at)
        submitted = self._submitted.get(run.task.task_id)
        self.remove(run.task)
        if submitted is None or self.gaps() != submitted.gaps:
            return None
        forecast = submitted.forecast
        outcome = Outcome(run.task.priority, forecast.end_s, forecast.p90_s, at - submitted.at)
        self.spread.learn(outcome)
        return outcome

    def cancel_after_image(self, task: Task) -> bool:
        """Cancel a running task when the image that it is at is stored (under `changes`). Returns
        False if it has to be cancelled now: it waits, is between two images, or its present stage
        finishes no image."""
        with self.lock:
            run = self.machine.runs.get(task.task_id)
            if run is None or run.progress.stage < len(task.stages) - 1:
                return False
            index = run.progress.image
        if not self.store.cancel_after(task, index):  # stored; the next one has not begun
            return False
        with self.lock:
            task.last_image = index
            task.stages = tuple(stage.first_images(index + 1) for stage in task.stages)
            if task.task_id in self.machine.runs:
                self.reported(run)
            return task.ended or task.task_id not in self._tasks or task.images_done <= index

    def cancel(self, task: Task) -> bool:
        """Cancel a task (under `changes`). Returns whether it had not ended before."""
        if not self.store.cancel(task, self.end()):
            return False
        self.cancelled(task)
        return True

    def cancelled(self, task: Task) -> None:
        """The store has cancelled a task (under `changes`)."""
        with self.lock:
            inputs_in_use = self._on_gpu(task)
            if task.task_id in self._tasks:
                self.remove(task, stopping=True)
        if not inputs_in_use:
            self.store.discard_inputs(task.task_id)
        self.events.publish(EventKind.CANCELLED, task.task_id)
        log.info("task %s is cancelled", task.task_id)

    def _on_gpu(self, task: Task) -> bool:
        """Whether a worker may be reading the input images of a task (locked); WorkerApi.left()
        removes them then."""
        run = self.machine.runs.get(task.task_id)
        return run is not None and run.on_gpu

    def order_load(self, spec: LoadSpec) -> None:
        """Raises: NoWorker: the server is stopping."""
        missing = not self.is_on_disk(spec) and self._needs_download(spec.model)
        with self.lock:
            if self.stopping or self.health.load_failed:
                raise NoWorker
            if all(spec.key != ordered.key for ordered in self.load_orders):
                self.load_orders.append(spec)
            if missing:
                self.downloads.order(spec)
            else:
                self._on_disk.add(spec.model.name)
            self.wake_worker.notify_all()
            self.wake_downloads.notify_all()

    def fail(self, task: Task, code: str, message: str) -> bool:
        """A task ends with an error (under `changes`). Returns whether it had not ended before."""
        if not self.store.fail(task, self.end(), code=code, message=message):
            return False
        with self.lock:
            # Only the task's own client gets the message.
            self.health.last_error = f"task {task.task_id}: {code}"
            inputs_in_use = self._on_gpu(task)
            if task.task_id in self._tasks:
                self.remove(task)
        if not inputs_in_use:
            self.store.discard_inputs(task.task_id)
        self.events.publish(EventKind.FAILED, task.task_id)
        log.warning("task %s failed: %s", task.task_id, message)
        return True

    # -- what readers see (locked) ----------------------------------------------------------------

    def snapshot(self, task: Task) -> Task:
        """A copy of a task for readers, with its forecast (locked)."""
        at = self.monotonic()
        snapshot, baseline = self._copy(task, at), self._baselines.get(task.task_id)
        snapshot.forecast = _steady(self.forecaster.of(task), at, baseline, self._claims)
        return snapshot

    def snapshots(
        self, offset: int, limit: int, wanted: Callable[[Task], bool] | None = None
    ) -> tuple[Callable[[], list[Task]], int]:
        """Copies of the unfinished tasks in the order in which they run (locked). The function
        that is returned makes their forecasts; it needs no lock.

        Args, and the number that is returned: as of Forecaster.in_order.
        """
        at, claims = self.monotonic(), self._claims
        entries, length = self.forecaster.in_order(offset, limit, wanted)
        found = [
            (self._copy(task, at), forecast, self._baselines.get(task.task_id))
            for task, forecast in entries
        ]

        def build() -> list[Task]:
            for snapshot, forecast, baseline in found:
                snapshot.forecast = _steady(forecast(), at, baseline, claims)
            return [snapshot for snapshot, _, _ in found]

        return build, length

    def set_baseline(self, task: Task, *, submitted: bool = False) -> None:
        """The status of a task has changed (locked): forecasts from now on are compared with this
        one.

        Args:
            submitted: the forecast's quality is learned when the task is done.
        """
        baseline = _Baseline(self.monotonic(), self.forecaster.of(task), self._claims, self.gaps())
        self._baselines[task.task_id] = baseline
        if submitted:
            self._submitted[task.task_id] = baseline
        if run := self.machine.runs.get(task.task_id):
            run.forecast_is(baseline.forecast.end_s, baseline.at)

    def reported(self, run: Run) -> None:
        """A report on a running task came (locked). A forecast that has become earlier is the one
        that later ones are compared with."""
        at, forecast = self.monotonic(), self.forecaster.of(run.task)
        run.forecast_is(forecast.end_s, at)
        baseline = self._baselines[run.task.task_id]
        if at + forecast.end_s < baseline.at + baseline.forecast.end_s:
            self._baselines[run.task.task_id] = replace(baseline, at=at, forecast=forecast)

    def state(self) -> ServerState:
        """(locked)"""
        if self.health.load_failed or self.health.storage_error is not None:
            return ServerState.FAILED
        if self.stopping:
            return ServerState.DRAINING
        if self.machine.loading is not None:
            return ServerState.LOADING
        busy = self.machine.runs or self.machine.stopping
        return ServerState.BUSY if busy else ServerState.READY

    def last_hour(self) -> tuple[int, float]:
        """Tasks done in the last hour (or since the start), and the share of it in which the GPU
        had a task (locked)."""
        now = self.monotonic()
        since = max(self._started_at, now - HOUR_S)
        while self._ends and self._ends[0] < since:
            self._ends.popleft()
        busy_share = self.machine.busy_s(since, now) / max(now - since, 1e-9)
        return len(self._ends), min(busy_share, 1.0)

    def _copy(self, task: Task, at: float) -> Task:
        snapshot = copy(task)
        if run := self.machine.runs.get(task.task_id):
            snapshot.share_done = run.share_done(at)
        return snapshot

    def end(self) -> End:
        """A task ends now."""
        return End(self.now(), self.keep_clock())

    def _note_clocks(self) -> None:
        """Note for the next start where its KeepClock and its event ids have to begin."""
        offset_s = self.keep_clock.offset_s()
        if abs(offset_s - self._noted_offset_s) >= CLOCK_CHANGE_S:
            self.store.clocks.set_keep_offset_s(offset_s)
            self._noted_offset_s = offset_s
        if self.events.last_id + RESERVED_IDS // 2 > self._reserved_id:
            up_to = self.events.last_id + RESERVED_IDS
            self.store.clocks.reserve_event_ids(up_to)
            self._reserved_id = up_to

    # -- the start --------------------------------------------------------------------------------

    def _restore(self, unfinished: list[Task]) -> None:
        for model, seconds in self.store.timings.loads().items():
            self.timing.learn_load(model, seconds)
        for work, measured in self.store.timings.samples():
            self.timing.learn(work, measured)
        waiting: list[Task] = []
        for task in unfinished:
            self._sequence = max(self._sequence, task.sequence)
            if task.last_image is not None:  # that image is lost, and no other one is wanted
                self._unsettled.append(partial(self.cancel, task))
                continue
            try:
                task.stages = self.allowed.stages(task.params)
            except (ModelNotAllowed, NotSupported, InvalidInput) as error:
                # The operator allows less than before.
                self._unsettled.append(partial(self.fail, task, error.code, error.message))
                continue
            if task.status is TaskStatus.RUNNING:
                if task.interruptions + 1 >= MAX_INTERRUPTIONS:
                    self._unsettled.append(partial(self.fail, task, *ENDED_TOO_OFTEN))
                    continue
                self._unsettled.append(partial(self.store.release, copy(task), interrupted=True))
                task.status, task.started_at = TaskStatus.WAITING, None
                task.interruptions += 1
            if missing := self.missing(task):
                with self.lock:
                    self.join_downloads(task, missing)
                continue
            waiting.append(task)
        with self.lock:
            self._tasks.update((task.task_id, task) for task in waiting)
            self.schedule.add(*waiting, delay_budget_s=self.policy.max_delay_s)
            for priority in {task.priority for task in waiting}:
                # The first one ran, or was the next one: no task may overtake it.
                self.schedule.delay_budgets_s[self.schedule.level(priority)[0]] = 0.0
        if self._tasks:
            log.info("%d tasks from before the start wait", len(self._tasks))


def _steady(forecast: Forecast, at: float, baseline: _Baseline | None, claims: int) -> Forecast:
    """What readers see of a forecast.

    Small increases over the forecast that was made when its status changed last are not reported:
    the countdown continues. Larger ones come with the reason.

    Args:
        claims: of all tasks until now.
    """
    if baseline is None:
        return forecast
    then = baseline.forecast
    late_s = at + forecast.end_s - (baseline.at + then.end_s)
    if late_s <= 0.0:
        return forecast
    if late_s <= max(STEADY_S, STEADY_SHARE * forecast.end_s):
        end_s = max(forecast.end_s - late_s, 0.0)
        return replace(forecast, end_s=end_s, start_s=min(forecast.start_s, end_s))
    reason = Reason.SLOWER
    if forecast.pos > max(then.pos - (claims - baseline.claims), 0):
        reason = Reason.OVERTAKEN
    elif forecast.switches > then.switches:
        reason = Reason.MODEL_SWITCH
    return replace(forecast, reason=reason)
