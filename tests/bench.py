"""The parts of a scheduler without disk, for tests of the order and of the forecasts."""

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from typing import Any

from conftest import allow, params_for

from models.model_catalog import LoadSpec, Model
from scheduler.downloads import Downloads
from scheduler.estimates import Estimates
from scheduler.forecast import Forecaster
from scheduler.limits import QueueLimits
from scheduler.machines import Machine, Run
from scheduler.pending import PendingTasks
from scheduler.policy import Policy, key
from scheduler.schedule import Schedule
from task import Forecast, Phase, Progress, Stage, Task
from timing.spread import Spread
from timing_model import Measured, TimingModel

ALLOWED = allow("schnell", "flux2-klein-4b", "flux2-klein-base-4b", "z-image", "seedvr2-3b")
MODELS = ALLOWED.models[:4]
SCHNELL, KLEIN, BASE, Z_IMAGE = MODELS
UPSCALER = ALLOWED.models[4]


def spec_of(model: Model) -> LoadSpec:
    return LoadSpec(model, model.pipelines[0], None)


def learned() -> TimingModel:
    """A copy: learning takes longer than most tests."""
    return deepcopy(_learned())


@cache
def _learned() -> TimingModel:
    """Models with different laws and loading times: 7 s, 14 s, ..."""
    timing = TimingModel()
    estimates = Estimates(timing)
    for number, model in enumerate((*MODELS, UPSCALER), 1):
        for side, steps in 2 * ((512, 4), (1024, 10), (1536, 1)):
            x = side * side / 1024**2
            params = params_for(width=side, height=side, steps=steps, format="JPEG")
            measured = Measured(0.5, [number * (0.2 + x)] * steps, x, 0.01)
            timing.learn(estimates.work(Stage(spec_of(model), params)), measured)
        timing.learn_load(estimates.load_key(spec_of(model)), 7.0 * number)
    return timing


class Bench:
    """Schedule, machines and forecaster under a clock that the test moves."""

    def __init__(
        self, *, machines: int = 1, models_in_memory: int = 1, max_delay_s: float = 0.0
    ) -> None:
        self.at = 0.0
        self.timing = learned()
        self.estimates = Estimates(self.timing)
        self.schedule = Schedule(self.estimates, key)
        self.machines = [
            Machine(f"m{n}", models_in_memory=models_in_memory, speed=1.0 + 0.5 * n)
            for n in range(machines)
        ]
        self.machine = self.machines[0]
        self.policy = Policy(self.schedule, QueueLimits(max_delay_s=max_delay_s))
        self.downloads = Downloads(self.clock)
        self.pending = PendingTasks(self.downloads, self.clock)
        self.spread = Spread()
        self.forecaster = Forecaster(
            schedule=self.schedule,
            machines=self.machines,
            policy=self.policy,
            estimates=self.estimates,
            spread=self.spread,
            pending=self.pending,
            monotonic=self.clock,
        )
        self.joined = 0

    def clock(self) -> float:
        return self.at

    def task(
        self,
        task_id: str,
        model: Model = SCHNELL,
        *,
        priority: int = 0,
        side: int = 512,
        upscale: float | None = None,
        **changes: Any,
    ) -> Task:
        params = params_for(
            model=model.name,
            upscale=upscale,
            upscaler=UPSCALER.name if upscale else None,
            **{"width": side, "height": side, "format": "JPEG", **changes},
        )
        return Task(task_id, params, priority, created_at=0.0, stages=ALLOWED.stages(params))

    def load(self, model: Model = SCHNELL, resident: tuple[Model, ...] = ()) -> None:
        """A model is loaded at once; memory holds these models, the latest used first."""
        self.machine.load_started(spec_of(model), self.at)
        keys = [spec_of(other).key for other in resident or (model,)]
        self.machine.load_finished(spec_of(model), keys, self.at)

    def join(self, task: Task) -> Forecast:
        """Returns the forecast from before it joined."""
        promised = self.forecaster.of_new(task)
        place = self.policy.place(task, self.gpu_s(task), self.forecaster.resident_at_start())
        self.joined += 1
        place.give(task, self.joined)
        self.policy.join(task, place)
        assert self.schedule.position(task) == place.index
        return promised

    def gpu_s(self, task: Task) -> float:
        return self.estimates.durations(*task.stages).gpu_s

    def release(self, run: Run) -> None:
        """A running task waits again."""
        self.machine.end(run, self.at)
        self.policy.release(run.task, run.gpu_s(self.at), self.gpu_s(run.task))

    def start(self, task: Task, machine: Machine | None = None) -> Run:
        """A waiting task is claimed."""
        machine = machine or self.machine
        self.policy.start(task, self.gpu_s(task))
        task.attempt += 1
        machine.start(task, self.at)
        return machine.runs[task.task_id]

    def report(self, run: Run, phase: Phase, steps_done: int = 0, *at: int) -> None:
        """Args:
        at: stage and image.
        """
        stage, image = at or (0, 0)
        total = run.task.stages[stage].params.steps_run
        progress = Progress(phase, steps_done, total, stage, image)
        self.machine.report(run, progress, self.at)

    def ids(self) -> list[str]:
        return [task.task_id for task in self.schedule]

    def in_order(
        self, offset: int = 0, limit: int = 1000, wanted: Callable[[Task], bool] | None = None
    ) -> list[tuple[Task, Forecast]]:
        """All tasks, the running ones first, and their forecasts."""
        found, _ = self.forecaster.in_order(self.forecaster.lanes(), offset, limit, wanted)
        return [(task, forecast()) for task, forecast in found]

    def end_s(self, task: Task) -> float:
        return self.forecaster.of(task).end_s
