"""Stores the images that workers have drawn, and learns how long they took."""

import logging
from contextlib import suppress
from copy import copy
from dataclasses import replace

from errors import StorageUnavailable
from scheduler.events import EventKind
from scheduler.health import Cause
from scheduler.machines import Machine
from scheduler.scheduler import Scheduler
from task import Encoded, Task
from timing.spread import Outcome
from timing_model import Measured, Work

log = logging.getLogger(__name__)


class FinishedImages:
    """Those of one machine. The encoder thread calls it. All methods may raise StorageUnavailable;
    then nothing has changed."""

    def __init__(self, scheduler: Scheduler, machine: Machine) -> None:
        self._scheduler = scheduler
        self._machine = machine

    def store(self, task_id: str, attempt: int, encoded: Encoded, *, last: bool) -> bool:
        """Returns whether the image is stored; False: it was before, or the attempt is old.

        Args:
            last: the task is done with it.
        """
        # Not under `changes`: syncing an image takes milliseconds, for which the worker would wait
        # with its next claim. The store's own guard decides against a cancel at the same moment.
        scheduler = self._scheduler
        with scheduler.lock:
            run = self._machine.run(task_id, attempt)
            if run is None or encoded.index != run.task.images_done:
                return False  # refused, or stored already
            task = copy(run.task)  # as it runs; it may be released meanwhile
            samples = [self._sample(run.task, stage, m) for stage, m in encoded.measured]
            if scheduler.gaps() != run.gaps_before:
                samples = []  # the process was stopped meanwhile
        with scheduler.health.noting_storage():
            stored = scheduler.store.add_image(
                task,
                encoded.image,
                [measured for _, measured in encoded.measured],
                samples=samples,
                end=scheduler.end_of(task) if last else None,
                machine=self._machine.name,
            )
        if not stored:
            return False
        outcome = None
        timing = scheduler.timing.of(self._machine.name)
        learned = timing.learned(samples)  # takes too long to hold the lock
        with scheduler.lock:
            timing.take(learned)
            run.task.image_sizes += (len(encoded.image),)
            for stage, measured in encoded.measured if samples else ():
                scheduler.phase_seconds.drawn(task.stages[stage].load_spec, measured)
            run.task.measured += tuple(measured for _, measured in encoded.measured)
            first = run.task.images_done == 1
            if last:
                outcome = scheduler.baselines.learn(run.task, run.machine.name, scheduler.now())
                scheduler.remove(run.task, done=True)
            else:
                scheduler.baselines.improve_waiting()
        self._compare_machines()
        scheduler.retention.added(len(encoded.image), first=first)
        scheduler.events.publish(EventKind.DONE if last else EventKind.IMAGE, task_id)
        if last:
            if task.params.inputs:
                scheduler.store.discard_inputs(task_id)
            scheduler.health.succeeded(Cause.TASK)
            self._log_done(task, outcome)
            scheduler.prune()
        if outcome is not None:
            with suppress(StorageUnavailable):  # the task is done all the same
                scheduler.store.timings.keep_outcome(outcome)
        return True

    def cancel_after(self, task_id: str, attempt: int) -> None:
        """An image is stored: cancel the task if it was the last one that its client wants."""
        scheduler = self._scheduler
        with scheduler.lock:
            run = self._machine.run(task_id, attempt)
            last = run.task.last_image if run else None
            if run is None or last is None or run.task.images_done <= last:
                return
        with scheduler.changes, scheduler.health.noting_storage():
            scheduler.cancel(run.task)

    def _log_done(self, task: Task, outcome: Outcome | None) -> None:
        seconds = self._scheduler.now() - task.created_at
        forecast = f"{outcome.forecast_s:.1f} s" if outcome else "none"
        log.info(
            "task %s is done %.1f s after its submit (forecast: %s)",
            task.task_id,
            seconds,
            forecast,
            extra={
                "task_id": task.task_id,
                "seconds": round(seconds, 1),
                "forecast_s": round(outcome.forecast_s, 1) if outcome else None,
            },
        )

    def _compare_machines(self) -> None:
        """The forecast of a task on another machine is that of this one, at the other's speed."""
        scheduler, timing = self._scheduler, self._scheduler.timing
        others = [
            machine for machine in list(scheduler.machines) if machine is not scheduler.machine
        ]
        speeds = [timing.of(other.name).relative_speed(timing) for other in others]
        with scheduler.lock:
            for other, speed in zip(others, speeds, strict=True):
                other.speed = speed

    def _sample(self, task: Task, stage: int, measured: Measured) -> tuple[Work, Measured]:
        work = self._scheduler.estimates.actual_work(task.stages[stage])
        return replace(work, images=1), measured
