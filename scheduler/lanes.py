"""The future of each machine, which the forecasts of its tasks are made of."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from scheduler.machines import Machine, Run
from scheduler.walk import Walk
from task import Forecast
from timing_model import Durations


class RunForecast(NamedTuple):
    """A task that runs, and its forecast."""

    run: Run
    forecast: Forecast
    left_s: float
    """Seconds until it is done; other tasks not counted."""


class Lane(NamedTuple):
    """The future of a machine, in seconds from `at`."""

    machine: Machine
    at: float
    """Reading of the monotonic clock."""
    gpu_free_s: float
    """Seconds until its GPU is free."""
    encoder_free_s: float
    running: list[RunForecast]
    preempting_s: list[float]
    """Seconds until each of the first waiting tasks starts that preempt the running one."""
    pace: float
    """Factor on the forecasts of waiting tasks, by the steps of the running task."""

    def of(self, run: Run) -> RunForecast:
        return next(running for running in self.running if running.run is run)

    def start_s(self, walk: Walk, index: int) -> float:
        """Seconds until a waiting task starts, or loads its weights.

        Args:
            walk: the tasks of this machine; index: how many are before it.
        """
        return self.gpu_free_s + walk.start_at_s(index, self.pace)

    def work_s(self, durations: Durations) -> float:
        """Seconds on the GPU of a waiting task."""
        return self.pace * durations.gpu_s / self.machine.speed


class Lanes(Sequence[Lane]):
    """The future of each machine from one moment on. Each is computed when it is needed first.

    Args:
        at: the moment, a reading of the monotonic clock.
        lane_of: the future of a machine.
    """

    def __init__(
        self, machines: Sequence[Machine], at: float, lane_of: Callable[[Machine, float], Lane]
    ) -> None:
        self.at = at
        self._machines = machines
        self._lane_of = lane_of
        self._lanes: dict[str, Lane] = {}

    def __len__(self) -> int:
        return len(self._machines)

    def __getitem__(self, number: int) -> Lane:  # type: ignore[override]  # no slices
        return self.of(self._machines[number])

    def of(self, machine: Machine) -> Lane:
        lane = self._lanes.get(machine.name)
        if lane is None:
            lane = self._lanes[machine.name] = self._lane_of(machine, self.at)
        return lane

    def free_s(self) -> list[float]:
        """By machine, seconds until its GPU has no running task any more."""
        return [lane.gpu_free_s for lane in self]
