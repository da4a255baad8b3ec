"""What workers call: claim a task, report on it, and end it.

Every call about a task names its attempt. A worker whose task was cancelled, or released and
claimed again, is refused: report() answers STOP, the others False.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import replace
from pathlib import Path

from errors import StorageUnavailable
from models.model_catalog import LoadSpec
from scheduler.events import EventKind
from scheduler.finished_images import FinishedImages
from scheduler.health import Cause
from scheduler.limits import ENDED_TOO_OFTEN, MAX_INTERRUPTIONS
from scheduler.machines import Machine, Run
from scheduler.scheduler import Scheduler
from scheduler.stopping import load_is_needed, may_continue
from storage.state_store import WEIGHTS
from task import Encoded, Memory, Phase, Progress, Task, TaskStatus, Verdict
from timing.speeds import Product, Speeds

log = logging.getLogger(__name__)


class WorkerApi:
    """The worker thread and the encoder thread call it. All methods may raise StorageUnavailable;
    then nothing has changed.

    Args:
        machine: of the worker; None: the one that the server runs on.
    """

    def __init__(self, scheduler: Scheduler, machine: Machine | None = None) -> None:
        self._scheduler = scheduler
        self.machine = machine or scheduler.machine
        self._images = FinishedImages(scheduler, self.machine)
        self._gaps_before_load = 0

    @property
    def stopping(self) -> bool:
        return self._scheduler.stopping

    @property
    def first_spec(self) -> LoadSpec:
        """What to load before anything else."""
        return self._scheduler.allowed.first_spec

    @property
    def has_work(self) -> bool:
        """Whether the worker has something to do now: a task, a load order, its own end."""
        with self._scheduler.lock:
            has_task = self._scheduler.first(self.machine) is not None
            return self.stopping or has_task or self._next_load_order() is not None

    # -- the machine ------------------------------------------------------------------------------

    def calibrate(self, measure: Callable[[], Speeds] | None, mlx: str = "") -> None:
        """Measure the speed of the machine for its first forecasts, if no process has done so.

        Args:
            measure: takes a second or two, on the worker's thread. None: it cannot be measured.
            mlx: version of MLX.
        """
        scheduler = self._scheduler
        if measure is None:
            return
        with suppress(StorageUnavailable), scheduler.health.noting_storage():
            if scheduler.store.timings.speeds(self.machine.name, mlx).keys() >= set(Product):
                return
        speeds = measure()
        with scheduler.lock:
            scheduler.timing.of(self.machine.name).calibrate(speeds)
            scheduler.baselines.improve_waiting()
        found = ", ".join(f"{name} {speed:.3g}" for name, speed in speeds.items())
        log.info("measured FLOP/s of %s: %s", self.machine.name, found)
        with suppress(StorageUnavailable), scheduler.health.noting_storage():
            scheduler.store.timings.keep_speeds(speeds, mlx, self.machine.name)

    def load_started(self, spec: LoadSpec) -> None:
        with self._scheduler.lock:
            self.machine.load_started(spec, self._scheduler.monotonic())
            self._gaps_before_load = self._scheduler.gaps()

    def load_finished(
        self,
        spec: LoadSpec,
        bits: int | None,
        resident: Sequence[str],
        *,
        learn: bool = True,
        memory: Memory | None = None,
    ) -> None:
        """These weights are in memory, quantized to this many bits (None: not quantized).

        Args:
            resident: keys of all that is in memory now, the latest used first.
            learn: whether the time says something about the next load.
            memory: of the machine, now.
        """
        scheduler = self._scheduler
        self._count_tokens(spec)
        with scheduler.lock:
            learn = learn and scheduler.gaps() == self._gaps_before_load
            if scheduler.estimates.learn_bits(spec, bits):
                scheduler.schedule.rebuild()
            seconds = self.machine.load_finished(spec, resident, scheduler.monotonic(), memory)
            self._forget_prompts(resident)
            load_key = scheduler.estimates.load_key(spec)
            if learn:
                scheduler.timing.of(self.machine.name).learn_load(load_key, seconds)
                scheduler.phase_seconds.loaded(spec, seconds)
            scheduler.baselines.improve_waiting()
        scheduler.health.succeeded(Cause.LOAD)
        log.info("%s is loaded after %.1f s", spec.key, seconds)
        with suppress(StorageUnavailable), scheduler.health.noting_storage():
            here = memory if self.machine is scheduler.machine else None
            if here and (taken := here.loaded_bytes.get(spec.key)):
                scheduler.store.state.keep_memory(WEIGHTS + spec.key, taken)
            if learn:
                scheduler.store.timings.keep_load(load_key, seconds, self.machine.name)

    def copies_saved(self) -> None:
        """From now on, weights are loaded from a copy."""
        with self._scheduler.lock:
            self._scheduler.estimates.copies_changed()
            self._scheduler.baselines.improve_waiting()

    def load_reported(self, share: float) -> bool:
        """This share of the weights is in memory, 0 to 1. Returns whether to load on."""
        scheduler = self._scheduler
        with scheduler.lock:
            self.machine.load_reported(share, scheduler.monotonic())
            if run := self.machine.loading_run:
                scheduler.events.publish(EventKind.STEP, run.task.task_id)
            return load_is_needed(scheduler, self.machine)

    def load_failed(self, message: str, resident: Sequence[str], *, fatal: bool) -> None:
        """These weights cannot be loaded.

        Args:
            fatal: the server ends; else only the tasks that need them fail.
        """
        with self._scheduler.lock:
            self.machine.now_resident(resident)
            self._forget_prompts(resident)
            self._scheduler.health.load_failed = fatal
            self._scheduler.health.failed(Cause.LOAD, message)

    def now_resident(self, resident: Sequence[str]) -> None:
        """Weights were unloaded, or could not be loaded: these are in memory, the latest first."""
        with self._scheduler.lock:
            self.machine.now_resident(resident)
            self._forget_prompts(resident)

    def next_load_order(self) -> LoadSpec | None:
        """The next weights that the operator wants loaded; the order is removed."""
        with self._scheduler.lock:
            if ordered := self._next_load_order():
                self.machine.load_orders.remove(ordered)
            return ordered

    # -- tasks ------------------------------------------------------------------------------------

    def claim(self, timeout_s: float | None = None) -> Task | None:
        """The next task, now running; waits for one. None: time is up, a load was ordered, the
        server stops, or the next task is cancelled because its own time is up."""
        scheduler = self._scheduler
        with scheduler.lock:
            scheduler.wake_worker.wait_for(
                lambda: self.stopping or scheduler.first(self.machine) or self._next_load_order(),
                timeout_s,
            )
            if self._next_load_order():
                return None
        with scheduler.changes:
            with scheduler.lock:
                task = scheduler.first(self.machine)
            return self._claim(task) if task else None

    def claim_preempting(self, task_id: str, attempt: int) -> Task | None:
        """The task that preempts this one, which report() has answered with PAUSE; it is paused
        until its next report. None: it continues."""
        scheduler = self._scheduler
        with scheduler.changes:
            with scheduler.lock:
                run = self._run(task_id, attempt)
                task = self._preempting(run, scheduler.monotonic()) if run else None
            return self._claim(task, preempted=run) if task else None

    def claim_offered(self, task_id: str, attempt: int) -> Task | None:
        """The task that was sent to this machine, which has started it as this attempt. None: it
        was taken back, or has ended."""
        scheduler = self._scheduler
        with scheduler.changes:
            with scheduler.lock:
                task = self.machine.offered
                if task is None or (task.task_id, task.attempt + 1) != (task_id, attempt):
                    return None
                if task not in scheduler.schedule or scheduler.paused:
                    return None
                if not self.machine.takes_tasks:
                    return None
            return self._claim(task)

    def inputs_of(self, task_id: str) -> Path:
        """The folder with the input images of a task."""
        return self._scheduler.store.inputs_of(task_id)

    def report(self, task_id: str, attempt: int, progress: Progress) -> Verdict:
        """The task has reached a phase or ended a step, at this moment."""
        scheduler = self._scheduler
        with scheduler.lock:
            run = self._run(task_id, attempt)
            if run is None:
                return Verdict.STOP
            at = scheduler.monotonic()
            self.machine.report(run, progress, at)
            if run.on_gpu:  # else the GPU waits for this call, and it says nothing new
                lanes = scheduler.forecaster.lanes(at)
                scheduler.reported(run, lanes)
                scheduler.baselines.improve_waiting(lanes, self.machine)
            scheduler.events.publish(EventKind.STEP, task_id)
            if not may_continue(scheduler, run):
                return Verdict.STOP
            return Verdict.PAUSE if self._preempting(run, at) else Verdict.CONTINUE

    def store_image(self, task_id: str, attempt: int, encoded: Encoded) -> bool:
        """One of several images is encoded: it can be fetched from now on. The last one goes to
        finish()."""
        stored = self._images.store(task_id, attempt, encoded, last=False)
        self._images.cancel_after(task_id, attempt)
        return stored

    def finish(self, task_id: str, attempt: int, encoded: Encoded) -> bool:
        """The last image is encoded: the task is done."""
        return self._images.store(task_id, attempt, encoded, last=True)

    def fail(self, task_id: str, attempt: int, code: str, message: str) -> bool:
        scheduler = self._scheduler
        with scheduler.changes, scheduler.health.noting_storage():
            with scheduler.lock:
                run = self._run(task_id, attempt)
            return run is not None and scheduler.fail(run.task, code, message)

    def release(self, task_id: str, attempt: int, *, interrupted: bool = False) -> bool:
        """The worker has left the task: it waits again, where it was. One that is cancelled after
        its present image does not wait: it ends with the images that are stored, and with the one
        that is being encoded, if there is one.

        Args:
            interrupted: the worker died, perhaps because of the task; after MAX_INTERRUPTIONS it
                is failed.
        """
        scheduler = self._scheduler
        with scheduler.changes, scheduler.health.noting_storage():
            with scheduler.lock:
                run = self._run(task_id, attempt)
            if run is None:
                return False
            task = run.task
            if run.task.last_image is not None:
                return self._end_after_image(run, interrupted=interrupted)
            if interrupted and task.interruptions + 1 >= MAX_INTERRUPTIONS:
                return scheduler.fail(task, *ENDED_TOO_OFTEN)
            end = scheduler.end_of(task)
            if not scheduler.store.release(task, interrupted=interrupted, run=end):
                return False  # it has finished, this moment
            with scheduler.lock:
                task.interruptions += interrupted
                scheduler.release(run)
            scheduler.events.publish(EventKind.WAITING, task_id)
            log.info("task %s waits again", task_id)
            return True

    def release_all(self) -> None:
        """Whatever still runs waits again: the process ends now."""
        with self._scheduler.lock:
            running = [run.task for run in self.machine.runs.values()]
        for task in reversed(running):
            self.release(task.task_id, task.attempt)

    def left(self, task_id: str) -> None:
        """The worker does not read the input images of a task any more: if it has ended, they are
        removed, unless it has failed."""
        with self._scheduler.changes:  # a failed task may be tried again at this moment
            with self._scheduler.lock:
                ended = self._scheduler.get(task_id) is None
            if ended:
                self._scheduler.store.discard_inputs(task_id, spare=False)

    def preview_made(self, task_id: str) -> None:
        """There is a newer preview of a running task."""
        with self._scheduler.lock:
            if self._scheduler.machines.run(task_id):
                self._scheduler.events.publish(EventKind.PREVIEW, task_id)

    def prune(self) -> None:
        self._scheduler.prune()

    def stop(self, drain_s: float = 0.0) -> None:
        self._scheduler.stop(drain_s)

    # -- private -----------------------------------------------------------------------------------

    def _run(self, task_id: str, attempt: int) -> Run | None:
        """(locked) As Machine.run(). The worker has stopped the task that was cancelled before."""
        run = self.machine.run(task_id, attempt)
        stopping = self.machine.stopping
        if run is None and stopping is not None and stopping.task.task_id == task_id:
            self.machine.stopping = None
            self._scheduler.baselines.improve_waiting()
        return run

    def _count_tokens(self, spec: LoadSpec) -> None:
        """Weights were loaded. If it is the first time, count the waiting prompts, which were
        estimated by their characters: milliseconds for each long one, without a lock."""
        estimates, schedule = self._scheduler.estimates, self._scheduler.schedule
        with self._scheduler.lock:
            if estimates.was_loaded(spec):
                return
            stages = [stage for task in schedule for stage in task.stages]
            prompts = {s.params.prompt for s in stages if s.load_spec.model.name == spec.model.name}
        counted = {prompt: estimates.prompt_tokens(prompt, spec.model) for prompt in prompts}
        if counted:
            with self._scheduler.lock:
                estimates.take_counts(spec.model, counted)
                schedule.rebuild()
                estimates.take_counts(spec.model, {})  # they are in the schedule now

    def _forget_prompts(self, resident: Sequence[str]) -> None:
        """(locked) Of several machines, this one alone is known to have encoded prompts."""
        if self.machine is self._scheduler.machine:
            runs = self.machine.runs.values()
            starting = [run.stage for run in runs if not run.progress.steps_done]
            self._scheduler.schedule.forget_prompts(resident, starting)

    def _preempting(self, run: Run, at: float) -> Task | None:
        """(locked) The task that preempts this one, which has reported at this moment."""
        scheduler = self._scheduler
        if scheduler.stopping or not scheduler.forecaster.preemption.is_due(run, at):
            return None
        return scheduler.first(self.machine)

    def _claim(self, task: Task, preempted: Run | None = None) -> Task | None:
        """(under `changes`)"""
        scheduler = self._scheduler
        if scheduler.stopping:
            return None
        with scheduler.health.noting_storage():
            if scheduler.cancel_overdue(task):
                return None
        started_at = scheduler.now()
        with scheduler.health.accepting():  # else its image could not be stored
            name = self.machine.name
            claimed_on_disk = scheduler.store.claim(task, started_at=started_at, machine=name)
        if not claimed_on_disk:
            raise StorageUnavailable(f"The record of task {task.task_id} does not wait.")
        with scheduler.lock:
            task.status, task.started_at, task.machine = TaskStatus.RUNNING, started_at, name
            if preempted:
                preempted.pause(scheduler.monotonic())
            scheduler.start(task, self.machine)
            task.attempt += 1  # a part of its sort key: after it has left the schedule
            claimed = copy(task)
            claimed.progress = self.machine.runs[task.task_id].progress
        if preempted:
            scheduler.events.publish(EventKind.STEP, preempted.task.task_id)
            log.info("task %s is paused", preempted.task.task_id)
        scheduler.events.publish(EventKind.RUNNING, task.task_id)
        log.info(
            "task %s is running: %s, %d x %d, %d steps",
            task.task_id,
            task.stages[0].load_spec.key,
            task.params.width,
            task.params.height,
            task.params.steps_run,
            extra={"task_id": task.task_id, "machine": self.machine.name},
        )
        return claimed

    def _end_after_image(self, run: Run, *, interrupted: bool) -> bool:
        """(under `changes`) The worker has left a task that is cancelled after its present image.
        Returns whether the task has ended; else its image is being encoded."""
        scheduler, progress = self._scheduler, run.progress
        is_drawn = run.task.last_image is not None and progress.image > run.task.last_image
        if is_drawn and not interrupted and not scheduler.stopping:
            with scheduler.lock:
                encoding = replace(progress, phase=Phase.IMAGE_ENCODING)
                self.machine.report(run, encoding, scheduler.monotonic())
            return False
        return scheduler.cancel(run.task)

    def _next_load_order(self) -> LoadSpec | None:
        on_disk = self._scheduler.downloads.is_on_disk
        return next((spec for spec in self.machine.load_orders if on_disk(spec)), None)
