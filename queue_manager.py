"""What the HTTP routes call: submit, estimate, status, list, cancel, fetch.

A facade. The order of tasks is decided in scheduler/policy.py, forecasts are computed in
scheduler/forecast.py, and ended tasks are handled in scheduler/retention.py.
"""

import logging
import secrets
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack

from allowed import Allowed
from errors import Gone, NotReady, UnknownTask
from models.model_catalog import Model
from monitoring.accounts import Account, accounts_of
from monitoring.machine_status import MachineStatus, download_of, machines_of
from monitoring.queue_metrics import QueueMetrics
from monitoring.stats import Stats, stats_of
from scheduler.admission import check_admission, reserve_inputs
from scheduler.events import EventKind, EventLog
from scheduler.health import QueueHealth, ServerState
from scheduler.limits import NO_LIMITS, ClientLimits
from scheduler.queue_control import QueueControl
from scheduler.retention import DELETED
from scheduler.scheduler import Scheduler
from scheduler.stopping import Stopping, stopping
from task import ANYBODY, Forecast, GenerationParams, Owner, Phase, Task, TaskStatus

log = logging.getLogger(__name__)
prompt_log = logging.getLogger("mflux-server.prompts")


class QueueManager:
    """Thread-safe. Returned tasks are snapshots. All methods may raise StorageUnavailable; then
    nothing has changed."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.events: EventLog = scheduler.events
        self.allowed: Allowed = scheduler.allowed
        self.keep_clock = scheduler.keep_clock
        self.control = QueueControl(scheduler)
        self.metrics = QueueMetrics(scheduler)
        self.newest_done = scheduler.store.ended.newest_done
        self.kept_ids = scheduler.store.ended.kept_ids
        self.kept_by = scheduler.retention.kept_by

    def submit(
        self,
        params: GenerationParams,
        *,
        priority: int = 0,
        owner: Owner = ANYBODY,
        client_key: str | None = None,
        inputs: Mapping[str, bytes] | None = None,
        callback_url: str | None = None,
        limits: ClientLimits = NO_LIMITS,
    ) -> tuple[Task, int]:
        """Puts a task into the queue. It is on disk when this returns.

        Args:
            client_key: idempotency key: the same key gives the same task (submitted_as()).
            inputs: the input images that the params name, as PNG, by InputImage.file.
            callback_url: called when the task has ended (webhooks.py).
            limits: of the client.

        Returns:
            The task, and the number of other tasks that are not finished.

        Raises:
            NoWorker: the server is stopping.
            QueueFull: too many tasks wait, or the wait would be too long.
            ClientLimit: too many tasks of this client wait.
            InputsFull, InputsTooLarge: the input images exceed what the operator allows.
            ModelNotAllowed, NotSupported: the params need what the operator does not allow.
        """
        task = self._new_task(params, priority, owner)
        store = self._scheduler.store
        with ExitStack() as unless_submitted:
            if inputs:  # before the lock is taken, because it may take long
                reserve_inputs(self._scheduler, task.task_id, sum(map(len, inputs.values())))
                unless_submitted.callback(store.discard_inputs, task.task_id)
                with self._scheduler.health.accepting():
                    store.keep_inputs(task.task_id, inputs)
            submitted = self._submit(task, client_key, callback_url, limits)
            if submitted[0].task_id == task.task_id:
                unless_submitted.pop_all()
            return submitted

    def submitted_as(self, client_key: str) -> tuple[Task, int] | None:
        """Returns the task of this key, and the number of other unfinished tasks.

        Returns:
            None if the key is free: it is new, or its task failed, was cancelled or was removed.
        """
        known = self._scheduler.store.find_by_key(client_key)
        if known is None:
            return None
        try:
            task = self.status(known)
        except (Gone, UnknownTask):
            return None
        if task.status in (TaskStatus.FAILED, TaskStatus.CANCELLED):
            return None
        return task, self.length - (not task.ended)

    def estimate(
        self, params: GenerationParams, *, priority: int = 0, owner: Owner = ANYBODY
    ) -> tuple[Forecast, int]:
        """Returns the task that submit() would return now, and the number of unfinished tasks."""
        task = self._new_task(params, priority, owner)
        missing = self._scheduler.downloads.missing(task)
        with self._scheduler.lock:
            return self._scheduler.forecaster.of_new(task, missing), len(self._scheduler)

    def status(self, task_id: str) -> Task:
        """Returns a task. Raises UnknownTask, Gone."""
        with self._scheduler.lock:
            task = self._scheduler.get(task_id)
            if task is not None:
                return self._snapshot(task)
        return self._scheduler.retention.find(task_id)

    def asked(self, owner: str, task_ids: Collection[str] | None = None) -> None:
        """A client has asked for these of its tasks (None: for all), which keeps those with
        keep_alive_s alive."""
        with self._scheduler.lock:
            self._scheduler.deadlines.asked(owner, task_ids)

    def unfinished(
        self, limit: int, offset: int, wanted: Callable[[Task], bool] | None = None
    ) -> tuple[list[Task], int]:
        """Returns unfinished tasks in the order in which they run, and their total number.

        Args:
            wanted: selects tasks; None: all.
        """
        scheduler = self._scheduler
        with scheduler.lock:
            lanes = scheduler.forecaster.lanes()
            entries, length = scheduler.forecaster.in_order(lanes, offset, limit, wanted)
            baselines = scheduler.baselines
            steadiness = baselines.steadiness(lanes.at)
            found = [(self._copy(task), baselines.of(task), make) for task, make in entries]
        for snapshot, baseline, make in found:
            snapshot.forecast = steadiness.seen(snapshot, baseline, make())
        return [snapshot for snapshot, _, _ in found], length

    @property
    def length(self) -> int:
        """Returns the number of unfinished tasks."""
        with self._scheduler.lock:
            return len(self._scheduler)

    def image_of(self, task: Task, index: int = 0) -> tuple[bytes, GenerationParams]:
        """One stored image, also of a running or cancelled task.

        Raises:
            NotReady: it is not generated yet.
            InvalidInput: the task has no image of this index.
            Gone: the image was removed, or the task ended without it.
        """
        if not task.ended and task.images_done <= index < task.params.count:
            raise NotReady
        return self._scheduler.retention.image(task, index), task.params

    def all_images_of(self, task: Task) -> tuple[list[bytes], GenerationParams]:
        """All images of an ended task. Raises what image_of() raises."""
        if not task.ended:
            raise NotReady
        return self._scheduler.retention.all_images(task), task.params

    def fetched(self, task_id: str, index: int | None = None) -> None:
        """Marks an image (None: all) as fetched; Retention.mark_fetched says when it is removed."""
        with self._scheduler.changes, self._scheduler.health.noting_storage():
            self._scheduler.retention.mark_fetched(task_id, index)

    def keep(self, task_id: str, kept: bool) -> Task:
        """Pins an ended task, or releases it; returns it. Raises what Retention.keep raises."""
        with self._scheduler.changes, self._scheduler.health.noting_storage():
            self._scheduler.retention.keep(self.status(task_id), kept)
        return self.status(task_id)

    def delete(
        self, task_id: str, *, after_current: bool = False, only_unfinished: bool = False
    ) -> TaskStatus:
        """Cancels a waiting or running task; removes an ended one.

        The worker stops a running task at its next step. Stored images can still be fetched.

        Args:
            after_current: cancel a running task after its current image is stored; do nothing if
                the task has ended.
            only_unfinished: do nothing if the task has ended.

        Returns:
            The status that the task had before.

        Raises:
            UnknownTask, Gone.
        """
        scheduler = self._scheduler
        with scheduler.changes, scheduler.health.noting_storage():
            scheduler.settle_restored()
            with scheduler.lock:
                task = scheduler.get(task_id)
                was = task.status if task else None
            if task and was:
                if after_current and self.control.cancel_after_image(task):
                    return was
                if scheduler.cancel(task):
                    return was
            was = scheduler.retention.find(task_id).status  # the task has ended, perhaps just now
            if not (after_current or only_unfinished):
                scheduler.retention.drop(task_id, DELETED)
            return was

    def stopping(self, task_id: str) -> Stopping | None:
        """What a task that was cancelled still keeps the GPU busy with; None: with nothing."""
        with self._scheduler.lock:
            return stopping(self._scheduler, task_id)

    def fetch_ahead(self, params: GenerationParams) -> str | None:
        """Starts the download of the weights that a task with these params would need.

        Returns:
            The error of a recent failed download; then it is not tried again yet. Else None.
        """
        missing = self._scheduler.downloads.missing(self._new_task(params))
        with self._scheduler.lock:
            downloads = self._scheduler.downloads
            for spec in missing:
                if failure := downloads.failure(spec.model):
                    return failure
                downloads.order(spec)
            self._scheduler.wake_downloads.notify_all()
            return None

    def health(self) -> QueueHealth:
        scheduler = self._scheduler
        with scheduler.lock:
            machine = scheduler.machine
            return QueueHealth(
                state=self._state(),
                paused=scheduler.paused,
                waiting=scheduler.waiting,
                running=sum(len(other.runs) for other in scheduler.machines),
                loaded=machine.loaded,
                loading=machine.loading,
                download=scheduler.downloads.current,
                quantize=scheduler.estimates.bits(
                    machine.loaded[0] if machine.loaded else scheduler.allowed.first_spec
                ),
                last_error=scheduler.health.last_error,
                broker_away_since=scheduler.health.broker_away_since,
                machines=sum(other.takes_tasks for other in scheduler.machines),
            )

    def state(self) -> ServerState:
        with self._scheduler.lock:
            return self._state()

    def stats(self) -> Stats:
        return stats_of(self._scheduler)

    def machines(self) -> list[MachineStatus]:
        """All that draw, and those that have left lately."""
        return machines_of(self._scheduler)

    def accounts(self) -> dict[str, Account]:
        """By name, the clients that have tasks or have used the GPU."""
        return accounts_of(self._scheduler)

    def download_for(self, task_id: str) -> tuple[Model, int] | None:
        """Whose weights the machine of a running task downloads for it, and how many bytes of them
        it has; None: it does not."""
        with self._scheduler.lock:
            run = self._scheduler.machines.run(task_id)
            loads = run is not None and run.progress.phase is Phase.LOADING
            return download_of(run.machine) if run and loads else None

    def images(self) -> tuple[int, int]:
        """Returns the number of finished tasks with images, and the bytes of these images."""
        return self._scheduler.retention.images

    # -- private -----------------------------------------------------------------------------------

    def _copy(self, task: Task) -> Task:
        """(locked)"""
        snapshot = task.__copy__()  # called for up to 1,000 tasks: copy() takes twice as long
        if task.status is TaskStatus.WAITING:
            pending = self._scheduler.pending
            snapshot.waits_for_download = pending.lacks_weights(task.task_id)
            snapshot.waits_for_prompt = pending.lacks_prompt(task.task_id)
        elif run := self._scheduler.machines.run(task.task_id):
            snapshot.progress = run.shown
            if run.progress.phase is Phase.LOADING:
                snapshot.load_share = run.machine.load_share
            snapshot.share_done = self._scheduler.forecaster.share_done(run)
        return snapshot

    def _snapshot(self, task: Task) -> Task:
        """A copy of an unfinished task, with its forecast (locked)."""
        snapshot, scheduler = self._copy(task), self._scheduler
        lanes = scheduler.forecaster.lanes()
        forecast, baseline = scheduler.forecaster.of(task, lanes), scheduler.baselines.of(task)
        steadiness = scheduler.baselines.steadiness(lanes.at)
        snapshot.forecast = steadiness.seen(snapshot, baseline, forecast)
        return snapshot

    def _state(self) -> ServerState:
        """(locked)"""
        scheduler = self._scheduler
        return scheduler.health.state(scheduler.machine, stopping=scheduler.stopping)

    def _new_task(
        self, params: GenerationParams, priority: int = 0, owner: Owner = ANYBODY
    ) -> Task:
        task_id, now = secrets.token_hex(8), self._scheduler.now()
        stages = self.allowed.stages(params)
        start_by = self.keep_clock() + params.max_age_s if params.max_age_s else None
        return Task(task_id, params, priority, now, owner, stages=stages, start_by=start_by)

    def _submit(
        self,
        task: Task,
        client_key: str | None,
        callback_url: str | None,
        limits: ClientLimits,
    ) -> tuple[Task, int]:
        scheduler = self._scheduler
        with scheduler.changes:
            if client_key and (known := self.submitted_as(client_key)):
                return known
            missing = scheduler.downloads.missing(task)
            with scheduler.lock:
                check_admission(scheduler, task, missing, limits)
                place = scheduler.place(task)
            with scheduler.health.accepting():
                if client_key:
                    scheduler.store.free_key(client_key)
                scheduler.store.insert(task, client_key=client_key, callback_url=callback_url)
            with scheduler.lock:
                others = len(scheduler)
                forecast = scheduler.enter(task, missing, place, submitted=True)
                snapshot = self._copy(task)
                snapshot.forecast = forecast
            self.events.publish(EventKind.WAITING, task.task_id)
            _log_submitted(snapshot, others)
            return snapshot, others


def _log_submitted(task: Task, others: int) -> None:
    who, forecast = task.owner.name, task.forecast
    unfinished = "1 other task is" if others == 1 else f"{others} other tasks are"
    log.info(
        "task %s is submitted%s: done in about %.1f s%s",
        task.task_id,
        f" by {who}" if who else "",
        forecast.end_s if forecast else 0.0,
        f"; {unfinished} unfinished" if others else "",
        extra={"task_id": task.task_id, "client": who, "priority": task.priority},
    )
    prompt_log.info("the prompt of task %s: %s", task.task_id, task.params.prompt)
