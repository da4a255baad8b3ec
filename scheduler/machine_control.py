"""The machines as an operator sees them, and draining them."""

import logging
from dataclasses import dataclass, replace
from enum import StrEnum

from errors import ModelNotAllowed, UnknownMachine
from models.model_catalog import LoadSpec, Model
from models.model_rules import SIDE_STEP
from scheduler.machines import About, Machine
from scheduler.scheduler import Scheduler
from task import Phase
from timing_model import Work

log = logging.getLogger(__name__)

SPEED_SIDE = 1024
"""Pixels of the square images whose seconds are compared."""


class MachineState(StrEnum):
    IDLE = "idle"  # it waits for a task
    LOADING = "loading"  # it loads weights
    RUNNING = "running"  # it draws
    STOPPING = "stopping"  # its worker begins no more tasks
    LOST = "lost"  # its worker has left, or is silent


@dataclass(frozen=True)
class MachineStatus:
    name: str
    state: MachineState
    drained: bool
    resident: tuple[str, ...]
    loading: str | None
    download: tuple[Model, int] | None
    """Whose weights it downloads, and how many bytes of them it has."""
    missing: tuple[str, ...]
    running: tuple[str, ...]
    """Ids of its tasks."""
    next_task: str | None
    """Id of the task that was sent to it, and waits there."""
    tasks_last_hour: int
    busy_share: float
    """Share of the last hour in which its GPU had a task, 0 to 1."""
    image_s: dict[str, float]
    """By timing key, seconds of an image of SPEED_SIDE pixels, where it has drawn some."""
    last_error: str | None
    about: About | None
    """None: it is the server's own."""
    images_today: int = 0
    """Images of the tasks that it has ended since midnight, UTC. Set by machines() only."""


class MachineControl:
    """Thread-safe."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        local = scheduler.machine
        local.drained = scheduler.store.state.is_drained(local.name)

    def machines(self) -> list[MachineStatus]:
        """All that draw, and those that have left lately."""
        scheduler = self._scheduler
        today = scheduler.store.usage.images_today(scheduler.now())
        with scheduler.lock:
            here = scheduler.machines.drawing
            lost = scheduler.machines.lost.values()
            found = [*map(self._status, here), *(self._status(m, lost=True) for m in lost)]
        return [replace(status, images_today=today.get(status.name, 0)) for status in found]

    def drain(self, name: str, drained: bool) -> MachineStatus:
        """Give a machine no more tasks, or again (False). What it draws goes on. Survives a
        restart.

        Raises:
            UnknownMachine: there is none.
            StorageUnavailable: nothing has changed.
        """
        scheduler = self._scheduler
        with scheduler.changes, scheduler.health.noting_storage():
            with scheduler.lock:
                machine = self._named(name)
            scheduler.store.state.set_drained(name, drained)
            with scheduler.lock:
                machine.drained = drained
                scheduler.wake_worker.notify_all()
                return self._status(machine, lost=machine not in scheduler.machines)

    def order_load(self, name: str, spec: LoadSpec) -> bool:
        """Load these weights on a machine of a worker, after the task that it draws. Returns
        whether they are there already.

        Raises:
            UnknownMachine: there is none.
            ModelNotAllowed: its worker may not load them.
        """
        scheduler = self._scheduler
        with scheduler.lock:
            machine = next((m for m in scheduler.machines if m.name == name and m.about), None)
            if machine is None or machine.about is None:
                raise UnknownMachine
            if spec.model.name not in machine.about.models:
                raise ModelNotAllowed(f"The worker of {name!r} may not load {spec.model.name!r}.")
            if spec.key in machine.resident.keys:
                return True
            machine.ordered = spec
            scheduler.wake_worker.notify_all()
            return False

    def download_for(self, task_id: str) -> tuple[Model, int] | None:
        """Whose weights the machine of a running task downloads for it, and how many bytes of them
        it has; None: it does not."""
        with self._scheduler.lock:
            run = self._scheduler.machines.run(task_id)
            loads = run is not None and run.progress.phase is Phase.LOADING
            return _download(run.machine) if run and loads else None

    def _named(self, name: str) -> Machine:
        machines = self._scheduler.machines
        known = {machine.name: machine for machine in machines} | machines.lost
        if name not in known:
            raise UnknownMachine
        return known[name]

    def _status(self, machine: Machine, *, lost: bool = False) -> MachineStatus:
        tasks_last_hour, busy_share = machine.last_hour(self._scheduler.monotonic())
        return MachineStatus(
            name=machine.name,
            state=MachineState.LOST if lost else _state(machine),
            drained=machine.drained,
            resident=machine.resident.keys,
            loading=machine.loading.key if machine.loading else None,
            download=_download(machine),
            missing=tuple(sorted(machine.missing)),
            running=tuple(machine.runs),
            next_task=machine.offered.task_id if machine.offered else None,
            tasks_last_hour=tasks_last_hour,
            busy_share=busy_share,
            image_s=self._image_s(machine),
            last_error=machine.last_error,
            about=machine.about,
        )

    def _image_s(self, machine: Machine) -> dict[str, float]:
        timing = self._scheduler.timing.of(machine.name)
        tokens = (SPEED_SIDE // SIDE_STEP) ** 2
        found = {}
        for model in self._scheduler.allowed.models:
            for key in timing.keys_of(model.name):
                work = Work(key, model.parameters_b, tokens, model.default_steps, "JPEG")
                found[key] = timing.durations(work).gpu_s
        return found


def _download(machine: Machine) -> tuple[Model, int] | None:
    if machine.loading is None or machine.downloaded_bytes is None:
        return None
    return machine.loading.model, machine.downloaded_bytes


def _state(machine: Machine) -> MachineState:
    if not machine.available:
        return MachineState.STOPPING
    if machine.loading is not None:
        return MachineState.LOADING
    return MachineState.RUNNING if machine.runs or machine.stopping else MachineState.IDLE
