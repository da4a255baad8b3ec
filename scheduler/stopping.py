"""When running tasks and loads are stopped, and how long that takes.

All functions are called under the scheduler's lock.
"""

from typing import NamedTuple

from models.model_catalog import LoadSpec
from scheduler.machines import Machine, Run
from scheduler.scheduler import Scheduler
from task import Phase


class Stopping(NamedTuple):
    """What a cancelled task still keeps the GPU busy with."""

    phase: Phase
    seconds: float
    """Until it ends: the present step or phase, or the present image if that is still wanted."""


def may_continue(scheduler: Scheduler, run: Run) -> bool:
    """Whether a task that has just reported goes on: not if it is drawn as far as its client wants
    it, or if the server stops before it is likely to end."""
    if run.task.last_image is not None and run.progress.image > run.task.last_image:
        return False
    if scheduler.drain_until is None:
        return True
    at = scheduler.monotonic()
    return at + scheduler.forecaster.remaining.until_drawn_s(run, at) <= scheduler.drain_until


def load_is_needed(scheduler: Scheduler, machine: Machine) -> bool:
    """Whether what a machine loads is still needed: for a running task that may go on; without
    one, unless the server stops, if no task was cancelled whose load this is, or another one waits
    for these weights."""
    if (run := machine.loading_run) is not None:
        return may_continue(scheduler, run)
    if scheduler.stopping or machine.loading is None:
        return False
    return machine.stopping is None or is_awaited(scheduler, machine.loading)


def is_awaited(scheduler: Scheduler, spec: LoadSpec) -> bool:
    """Whether a waiting task needs these weights."""
    return any(
        stage.load_spec.key == spec.key for task in scheduler.schedule for stage in task.stages
    )


def stopping(scheduler: Scheduler, task_id: str) -> Stopping | None:
    """What a cancelled task still keeps its GPU busy with; None: with nothing."""
    remaining, at = scheduler.forecaster.remaining, scheduler.monotonic()
    run = scheduler.machines.run(task_id)
    if run is not None and run.task.last_image is not None and run.on_gpu:
        return Stopping(run.progress.phase, remaining.until_image_s(run, at))
    for machine in scheduler.machines:
        run = machine.stopping
        if run is None or run.task.task_id != task_id:
            continue
        phase = run.progress.phase
        if phase is not Phase.LOADING:
            return Stopping(phase, remaining.phase_s(run, at))
        if machine.loading is not None and not is_awaited(scheduler, machine.loading):
            return Stopping(phase, remaining.load_part_s(machine, at))
    return None
