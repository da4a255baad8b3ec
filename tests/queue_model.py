"""A simple model of the queue, beside the real one under a virtual clock.

The PlayedQueue stands on the real store in a folder of its own. The model is a list of tasks in
the order of submission and knows no SQLite, no threads and no sums of features.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from conftest import PlayedQueue, allow, params_for
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine
from ram_disk import RAM_DISK

from models.prompt_tokens import tokens
from scheduler.limits import QueueLimits
from scheduler.retention import EXPIRED, FETCHED, NO_ROOM
from scheduler.scheduler import PRUNE_EVERY_S
from storage.ended_tasks import TOMBSTONE_S
from storage.task_store import TaskStore
from task import Forecast, GenerationParams, Phase, Task, TaskStatus
from timing.survival import remaining
from timing_model import Measured, TimingModel, Work

OFFER = allow("noise-flux1")
TINY = OFFER.default
RULES = QueueLimits(max_queue=8, keep_s=300.0, keep_bytes=150, refetch_s=50.0)
PAUSES = st.sampled_from([1.0, 9.75, 30.0, 60.0, 400.0, TOMBSTONE_S + 1.0])
WAITING, RUNNING = TaskStatus.WAITING, TaskStatus.RUNNING
DONE, FAILED, CANCELLED = TaskStatus.DONE, TaskStatus.FAILED, TaskStatus.CANCELLED
ENDED = (DONE, FAILED, CANCELLED)


class Clock:
    def __init__(self) -> None:
        self.at = 1_000_000.0

    def __call__(self) -> float:
        return self.at


@dataclass(eq=False)
class ModelTask:
    task_id: str
    params: GenerationParams
    priority: int
    key: str | None
    created_at: float
    number: int
    """In the order of submission, from 1."""
    promised: bool = True
    """Its forecast at submit is known still; a restart forgets it."""
    status: TaskStatus = WAITING
    interruptions: int = 0
    started_at: float | None = None
    marks: list[tuple[Phase, float]] = field(default_factory=list)
    """While it runs: when each phase and each further step began."""
    ended_at: float = 0.0
    images: list[bytes] = field(default_factory=list)
    measured: list[Measured] = field(default_factory=list)
    fetched: int = 0
    """Of its images, from the first one on."""
    fetched_at: float | None = None
    error: str | None = None
    error_code: str | None = None
    gone: str | None = None
    """Why there is nothing to see any more."""
    gone_at: float = 0.0

    @property
    def phase(self) -> Phase:
        return self.marks[-1][0]

    @property
    def work(self) -> Work:
        """Of the images that are not stored."""
        params, left = self.params, self.params.count - len(self.images)
        return Work(
            TINY.name,
            TINY.parameters_b,
            params.tokens,
            params.steps,
            params.format,
            left,
            prompt_tokens=tokens(params.prompt, TINY),
            width=params.width,
        )

    def began(self, phase: Phase) -> float:
        return next(at for marked, at in self.marks if marked is phase)

    @property
    def steps_at(self) -> list[float]:
        """When denoising began, and when each step ended."""
        return [at for phase, at in self.marks if phase is Phase.DENOISING]

    @property
    def steps_done(self) -> int:
        return max(len(self.steps_at) - 1, 0)

    @property
    def step_s(self) -> list[float]:
        return [b - a for a, b in zip(self.steps_at, self.steps_at[1:], strict=False)]

    def end(self, status: TaskStatus, at: float) -> None:
        self.status, self.ended_at, self.marks = status, at, []
        if self.images and self.fetched == len(self.images):
            self.fetched_at = at

    def wait(self, *, interrupted: bool) -> None:
        """It runs no more and waits again, with the images that it has."""
        self.status, self.interruptions = WAITING, self.interruptions + interrupted
        self.started_at, self.marks = None, []

    def fail(self, code: str, message: str, at: float) -> None:
        self.end(FAILED, at)
        self.error_code, self.error = code, message


@dataclass(frozen=True)
class Baseline:
    """What was forecast for a task when it was submitted, or the server started, or earlier than
    that since."""

    at: float
    forecast: Forecast
    newest: int
    """Number of the task that was submitted last."""


def size_of(task: ModelTask) -> int:
    return sum(map(len, task.images))


def near(seconds: float) -> Any:
    return pytest.approx(seconds, rel=1e-6, abs=1e-6)


def some_params(number: int, steps: int, side: int, count: int = 1) -> GenerationParams:
    image_format = "PNG" if number % 3 else "JPEG"
    return params_for(
        f"number {number}",
        seed=number,
        width=side,
        height=side,
        steps=steps,
        format=image_format,
        count=count,
    )


class QueueModel(RuleBasedStateMachine):
    """The queue, and what the model says that it holds."""

    limits = RULES

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.root = TemporaryDirectory(prefix="queue-rules-", dir=RAM_DISK)
        self.folder = Path(self.root.name) / "0"
        self.starts = 0
        self.seen_ids: set[str] = set()
        # the model
        self.tasks: list[ModelTask] = []  # in the order of submission
        self.running: list[ModelTask] = []  # in the order of their claims
        self.forgotten: list[str] = []  # ids whose tombstones were removed
        self.leaving: ModelTask | None = None  # cancelled, but the worker is at its step still
        self.timing = TimingModel()
        self.samples = self.outcomes = 0
        self.start()

    def start(self) -> None:
        """A new process on what the folder holds."""
        self.store = TaskStore(self.folder)
        self.queue = PlayedQueue(
            allow("noise-flux1"),
            TimingModel(),
            self.store,
            self.limits,
            monotonic=self.clock,
            now=self.clock,
        )
        self.prune_at, self.leaving = 0.0, None
        self.baselines: dict[str, Baseline] = {}
        self.newest_claimed = 0
        self.overtaken: set[str] = set()
        for task in self.tasks:
            task.promised = False
        self.begin_to_load()

    def begin_to_load(self) -> None:
        self.queue.worker.load_started(self.queue.scheduler.allowed.first_spec)
        self.loaded, self.load_started_at = False, self.clock()

    def teardown(self) -> None:
        self.store.close()
        self.root.cleanup()

    @property
    def waiting(self) -> list[ModelTask]:
        """In the order in which they run."""
        waiting = [task for task in self.tasks if task.status is WAITING]
        return sorted(waiting, key=lambda task: -task.priority)

    @property
    def unfinished(self) -> int:
        return len(self.waiting) + len(self.running)

    @property
    def kept(self) -> list[ModelTask]:
        """Ended ones whose images are on disk."""
        return [task for task in self.with_images if task.status in ENDED]

    @property
    def with_images(self) -> list[ModelTask]:
        return [task for task in self.tasks if task.images and not task.gone]

    @property
    def on_gpu(self) -> ModelTask | None:
        task = self.running[-1] if self.running else None
        return task if task and task.phase is not Phase.IMAGE_ENCODING else None

    @property
    def encoding(self) -> list[ModelTask]:
        return [task for task in self.running if task.phase is Phase.IMAGE_ENCODING]

    @property
    def may_claim(self) -> bool:
        return self.loaded and not self.on_gpu and not self.leaving

    def reason(self, task: ModelTask) -> str | None:
        """Why the task is gone, if it is."""
        if task.gone is None and task.fetched_at is not None and task.status in ENDED:
            return FETCHED if task.fetched_at + RULES.refetch_s <= self.clock() else None
        return task.gone

    def by_key(self, key: str | None) -> ModelTask | None:
        return next((task for task in self.tasks if key and task.key == key), None)

    def load_remaining_s(self) -> float:
        if self.loaded:
            return 0.0
        load_s = self.timing.load_s(TINY.name, TINY.parameters_b)
        elapsed_s = self.clock() - self.load_started_at
        return remaining(load_s, elapsed_s, self.timing.load_sigma(TINY.name))

    def prune(self) -> None:
        """The tasks that the queue removes when it prunes, which it does every PRUNE_EVERY_S."""
        now = self.clock()
        over = sum(size_of(task) for task in self.with_images) > RULES.keep_bytes
        if not over and now < self.prune_at:
            return
        self.prune_at = now + PRUNE_EVERY_S
        for task in self.kept:
            if task.fetched_at is not None and task.fetched_at < now - RULES.refetch_s:
                task.gone, task.gone_at = FETCHED, self.clock()
        for task in self.tasks:
            if task.status in ENDED and not task.gone and task.ended_at < now - RULES.keep_s:
                task.gone, task.gone_at = EXPIRED, self.clock()
        if over:
            size = 0
            by_age = sorted(self.kept, key=lambda task: (task.ended_at, self.tasks.index(task)))
            for task in reversed(by_age):
                size += size_of(task)
                if size > RULES.keep_bytes and task is not by_age[-1]:
                    task.gone, task.gone_at = NO_ROOM, self.clock()
        for task in list(self.tasks):
            if task.gone and task.gone_at < now - TOMBSTONE_S:
                self.tasks.remove(task)
                self.forgotten.append(task.task_id)

    def set_baseline(self, task: ModelTask) -> None:
        """It begins to wait."""
        forecast = self.forecasts()[task.task_id]
        self.baselines[task.task_id] = Baseline(self.clock(), forecast, len(self.seen_ids))

    def reported(self, task: ModelTask) -> None:
        """When a task is claimed, reported or released, an earlier forecast than the baseline
        replaces it."""
        forecast, baseline = self.forecasts()[task.task_id], self.baselines[task.task_id]
        if self.clock() + forecast.end_s < baseline.at + baseline.forecast.end_s:
            self.baselines[task.task_id] = replace(baseline, at=self.clock(), forecast=forecast)

    def improve_baselines(self) -> None:
        """The same of waiting tasks, when any task may have become faster."""
        for task in self.waiting:
            self.reported(task)

    def ask(self, task_id: str) -> Task:
        return self.queue.status(task_id)

    def forecasts(self) -> dict[str, Forecast]:
        """By task, what is expected now, whatever was said before."""
        forecaster = self.queue.scheduler.forecaster
        in_order, _ = forecaster.in_order(forecaster.lanes(), 0, 1000)
        return {task.task_id: forecast() for task, forecast in in_order}

    def listing(self) -> list[Task]:
        views, length = self.queue.unfinished(1000, 0)
        assert length == len(views) == self.unfinished
        return views
