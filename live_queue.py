"""The tasks that wait and run, in memory: their order, their progress, the forecast of each.

Arithmetic over a state; no disk, no rules. Not thread-safe: the QueueManager calls it under its
lock.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from model_catalog import Model
from task import GenerationParams, Phase, Progress, Task, TaskStatus
from timing_model import FEATURES, Forecast, Measured, TimingModel, Work
from waiting_line import Features, WaitingLine


@dataclass(frozen=True)
class TaskView:
    """One task as it stands now, with its forecast."""

    task_id: str
    status: TaskStatus
    params: GenerationParams
    urgent: bool
    created_at: float
    started_at: float | None
    ended_at: float | None
    pos: int | None
    """Tasks waiting before it; 0 when it is next or running; None when it has ended."""
    wait_s: float | None
    """Forecast seconds until its image is ready; None when it has ended."""
    phase: Phase | None
    steps_done: int
    steps_total: int
    error_code: str | None
    error: str | None
    measured: Measured | None


class LiveQueue:
    """Args:
    monotonic: the clock, in seconds.
    """

    def __init__(self, model: Model, timing: TimingModel, monotonic: Callable[[], float]) -> None:
        self.model = model
        self.timing = timing
        self.quantize: int | None = None
        """Bits that the loaded weights are quantized to."""
        self.loaded = False
        self._monotonic = monotonic
        self._load_started_at: float | None = None
        self._tasks: dict[str, Task] = {}
        self._line = WaitingLine(FEATURES)
        self._running: dict[str, Task] = {}

    def __len__(self) -> int:
        return len(self._tasks)

    def __contains__(self, task_id: str) -> bool:
        return task_id in self._tasks

    @property
    def waiting(self) -> int:
        return len(self._line)

    @property
    def running(self) -> list[Task]:
        """One on the GPU at most, and those before it whose images are being encoded."""
        return list(self._running.values())

    def get(self, task_id: str) -> Task | None:
        return self._tasks.get(task_id)

    def get_running(self, task_id: str) -> Task | None:
        return self._running.get(task_id)

    def first(self) -> Task | None:
        """The task that runs next."""
        task_id = self._line.first()
        return None if task_id is None else self._tasks[task_id]

    # -- changes --------------------------------------------------------------------------------

    def add(self, task: Task) -> None:
        """A task joins the line behind all others of its level."""
        self._tasks[task.task_id] = task
        features = self.work(task.params).features
        self._line.append(task.task_id, urgent=task.urgent, features=features)

    def start(self, task: Task, *, started_at: float) -> None:
        self._line.remove(task.task_id)
        self._running[task.task_id] = task
        task.status = TaskStatus.RUNNING
        task.attempts += 1
        task.started_at = started_at
        task.progress = Progress(
            Phase.TEXT_ENCODING, self._monotonic(), steps_total=task.params.steps
        )

    def put_back(self, task: Task) -> None:
        """A running task waits again, before all others of its level."""
        del self._running[task.task_id]
        task.status = TaskStatus.WAITING
        task.progress = task.started_at = None
        features = self.work(task.params).features
        self._line.put_back(task.task_id, urgent=task.urgent, features=features)

    def remove(self, task: Task) -> None:
        """A task has ended."""
        self._tasks.pop(task.task_id, None)
        self._running.pop(task.task_id, None)
        if task.task_id in self._line:
            self._line.remove(task.task_id)

    def report(self, task: Task, phase: Phase, steps_done: int, steps_total: int) -> None:
        """A running task has reached a phase or ended a step, at this moment."""
        progress, at = task.progress, self._monotonic()
        assert progress is not None  # start() made it
        if phase is not progress.phase:
            progress.phase_s[progress.phase] = at - progress.phase_started_at
            progress.phase, progress.phase_started_at = phase, at
            progress.step_started_at = at
        if steps_done > progress.steps_done:
            progress.step_s.append(at - progress.step_started_at)
            progress.step_started_at = at
        progress.steps_done, progress.steps_total = steps_done, steps_total

    def load_started(self) -> None:
        self.loaded = False
        self._load_started_at = self._monotonic()

    def load_finished(self, quantize: int | None) -> float:
        """The model is ready; returns the seconds it took to load."""
        seconds = self._monotonic() - (self._load_started_at or self._monotonic())
        self.quantize = quantize
        self.loaded = True
        self.timing.learn_load(self.timing_key, seconds)
        return seconds

    # -- forecasts ------------------------------------------------------------------------------

    @property
    def timing_key(self) -> str:
        """What shares one law of time: forecasts are learned and made per key."""
        return f"{self.model.name}/q{self.quantize}" if self.quantize else self.model.name

    def work(self, params: GenerationParams) -> Work:
        return Work(
            model=self.timing_key,
            parameters_b=self.model.parameters_b,
            tokens=params.tokens,
            steps=params.steps,
            format=params.format,
        )

    def _forecast(self, params: GenerationParams) -> Forecast:
        return self.timing.forecast(self.work(params))

    def wait_of_new_s(self, params: GenerationParams, *, urgent: bool) -> float:
        """Seconds until a task would be done if it were added now."""
        return self._wait_s(self._line.total(urgent_only=urgent), self._forecast(params))

    def _wait_s(self, ahead: Features, own: Forecast) -> float:
        """Seconds until a waiting task is done: the GPU's work ahead of it and its own, then its
        image encoding, which also waits for the encoder to be through with the running tasks."""
        ahead_s = self.timing.gpu_s(self.timing_key, self.model.parameters_b, ahead)
        gpu_done_s = self.next_start_s() + ahead_s + own.gpu_s
        encoder_free_s = max((wait_s for _, wait_s in self._running_waits()), default=0.0)
        return max(gpu_done_s, encoder_free_s) + own.image_encoding_s

    def next_start_s(self) -> float:
        """Seconds until the GPU is free for the first waiting task."""
        running_s = sum(self.gpu_remaining_s(task) for task in self._running.values())
        return self._load_remaining_s() + running_s

    def _load_remaining_s(self) -> float:
        if self.loaded:
            return 0.0
        load_s = self.timing.forecast_load_s(self.timing_key, self.model.parameters_b)
        if self._load_started_at is None:
            return load_s
        return max(load_s - (self._monotonic() - self._load_started_at), 0.0)

    def gpu_remaining_s(self, task: Task) -> float:
        progress = task.progress
        assert progress is not None  # start() made it
        at = self._monotonic()
        return self.timing.remaining_s(
            self._forecast(task.params),
            phase=progress.phase,
            phase_elapsed_s=at - progress.phase_started_at,
            steps_done=progress.steps_done,
            steps_total=progress.steps_total,
            step_s=progress.step_s,
            step_elapsed_s=at - progress.step_started_at,
        )

    def _running_waits(self) -> Iterator[tuple[Task, float]]:
        """The running tasks, first the one that is furthest, with seconds until each is done: one
        on the GPU, those before it at the encoder."""
        gpu_free_s, encoder_free_s = self._load_remaining_s(), 0.0
        for task in self._running.values():
            encoding_s = self._forecast(task.params).image_encoding_s
            if task.progress and task.progress.phase is Phase.IMAGE_ENCODING:
                spent_s = self._monotonic() - task.progress.phase_started_at
                encoding_s = max(encoding_s - spent_s, 0.0)
            gpu_free_s += self.gpu_remaining_s(task)
            encoder_free_s = max(encoder_free_s, gpu_free_s) + encoding_s
            yield task, encoder_free_s

    def view(self, task: Task) -> TaskView:
        if task.task_id in self._running:
            wait_s = next(w for t, w in self._running_waits() if t is task)
            return _view_of_live(task, pos=0, wait_s=wait_s)
        pos, ahead = self._line.ahead_of(task.task_id)
        return _view_of_live(task, pos=pos, wait_s=self._wait_s(ahead, self._forecast(task.params)))

    def views_in_order(self) -> Iterator[TaskView]:
        """All tasks in the order in which they run, in one pass."""
        encoder_free_s = 0.0
        for task, wait_s in self._running_waits():
            encoder_free_s = wait_s
            yield _view_of_live(task, pos=0, wait_s=wait_s)
        gpu_free_s = self.next_start_s()
        for pos, task_id in enumerate(self._line):
            task = self._tasks[task_id]
            forecast = self._forecast(task.params)
            gpu_free_s += forecast.gpu_s
            wait_s = max(gpu_free_s, encoder_free_s) + forecast.image_encoding_s
            yield _view_of_live(task, pos=pos, wait_s=wait_s)

    def measured(self, task: Task) -> Measured:
        """The seconds of a task that ends now."""
        progress = task.progress
        assert progress is not None  # start() made it
        seconds = dict(progress.phase_s)
        seconds[progress.phase] = self._monotonic() - progress.phase_started_at
        return Measured(
            text_encoding_s=seconds.get(Phase.TEXT_ENCODING, 0.0),
            step_s=tuple(progress.step_s),
            decoding_s=seconds.get(Phase.DECODING, 0.0),
            image_encoding_s=seconds.get(Phase.IMAGE_ENCODING, 0.0),
        )


def _view_of_live(task: Task, *, pos: int, wait_s: float) -> TaskView:
    progress = task.progress
    return TaskView(
        task_id=task.task_id,
        status=task.status,
        params=task.params,
        urgent=task.urgent,
        created_at=task.created_at,
        started_at=task.started_at,
        ended_at=None,
        pos=pos,
        wait_s=wait_s,
        phase=progress.phase if progress else None,
        steps_done=progress.steps_done if progress else 0,
        steps_total=progress.steps_total if progress else task.params.steps,
        error_code=None,
        error=None,
        measured=None,
    )
