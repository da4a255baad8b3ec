"""The machines as an operator sees them."""

from dataclasses import dataclass, replace
from enum import StrEnum

from models.model_catalog import Model
from models.model_rules import SIDE_STEP
from scheduler.machines import About, Machine
from scheduler.scheduler import Scheduler
from timing_model import Work

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
    """Images of the tasks that it has ended since midnight, UTC."""


def machines_of(scheduler: Scheduler) -> list[MachineStatus]:
    """All that draw, and those that have left lately."""
    today = scheduler.store.usage.images_today(scheduler.now())
    with scheduler.lock:
        here = scheduler.machines.drawing
        lost = scheduler.machines.lost.values()
        found = [_status(scheduler, m) for m in here]
        found += [_status(scheduler, m, lost=True) for m in lost]
    return [replace(status, images_today=today.get(status.name, 0)) for status in found]


def download_of(machine: Machine) -> tuple[Model, int] | None:
    """Whose weights it downloads, and how many bytes of them it has."""
    if machine.loading is None or machine.downloaded_bytes is None:
        return None
    return machine.loading.model, machine.downloaded_bytes


def _status(scheduler: Scheduler, machine: Machine, *, lost: bool = False) -> MachineStatus:
    tasks_last_hour, busy_share = machine.last_hour(scheduler.monotonic())
    return MachineStatus(
        name=machine.name,
        state=MachineState.LOST if lost else _state(machine),
        drained=machine.drained,
        resident=machine.resident.keys,
        loading=machine.loading.key if machine.loading else None,
        download=download_of(machine),
        missing=tuple(sorted(machine.missing)),
        running=tuple(machine.runs),
        next_task=machine.offered.task_id if machine.offered else None,
        tasks_last_hour=tasks_last_hour,
        busy_share=busy_share,
        image_s=_image_s(scheduler, machine),
        last_error=machine.last_error,
        about=machine.about,
    )


def _image_s(scheduler: Scheduler, machine: Machine) -> dict[str, float]:
    timing = scheduler.timing.of(machine.name)
    tokens = (SPEED_SIDE // SIDE_STEP) ** 2
    found = {}
    for model in scheduler.allowed.models:
        for key in timing.keys_of(model.name):
            work = Work(key, model.parameters_b, tokens, model.default_steps, "JPEG")
            found[key] = timing.durations(work).gpu_s
    return found


def _state(machine: Machine) -> MachineState:
    if not machine.available:
        return MachineState.STOPPING
    if machine.loading is not None:
        return MachineState.LOADING
    return MachineState.RUNNING if machine.runs or machine.stopping else MachineState.IDLE
