"""The tasks that wait and run, in memory: their order, their progress, the forecast of each.

Arithmetic over a state; no disk, no rules. Not thread-safe: the QueueManager calls it under its
lock.

The time of a waiting task is the sum of what comes before it: what the running task still needs,
the work of those ahead, and loading wherever one task's model differs from the one before it. All
of it is linear, so the WaitingLine sums it: for each timing key the features of its tasks, and one
more column that counts the tasks before which its model has to be loaded.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

from model_catalog import Family, Model
from task import GenerationParams, Phase, Progress, Promise, Task, TaskStatus, Told
from timing_model import (
    FEATURES,
    Confidence,
    Forecast,
    Live,
    Measured,
    Outcome,
    Spread,
    TimingModel,
    Work,
)
from waiting_line import Features, WaitingLine

HOUR_S = 3600.0
COLUMNS = FEATURES + 1
"""Of each timing key: its features, and how often its model has to be loaded."""
P90_SIGMAS = 1.2816
"""The 90 % quantile of the standard normal distribution."""
P90_WITHOUT_KNOWLEDGE = 3.0
STEADY_S, STEADY_PART = 1.0, 0.02
"""A forecast that moved back by no more than this is not told: the countdown goes on."""


class Reason(StrEnum):
    """Why a task is done later than the latest answer said."""

    OVERTAKEN = "overtaken"
    MODEL_SWITCH = "model_switch"
    SLOWER = "slower_than_expected"


@dataclass(frozen=True)
class Wait:
    """When a task is expected to be done. Seconds from now."""

    pos: int
    """Tasks waiting before it; 0 when it is next or running."""
    start_s: float
    """Until the worker turns to it; 0 when it runs."""
    end_s: float
    """Until its image is ready: as likely later as earlier."""
    p90_s: float
    """Until its image is ready, nine times out of ten."""
    confidence: Confidence
    switches: int = 0
    reason: Reason | None = None


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
    wait: Wait | None
    """None when it has ended."""
    phase: Phase | None
    steps_done: int
    steps_total: int
    progress: float
    """Part of its time that is over, 0 to 1."""
    error_code: str | None
    error: str | None
    measured: Measured | None


class LiveQueue:
    """Args:
    monotonic: the clock, in seconds.
    """

    def __init__(
        self,
        timing: TimingModel,
        spread: Spread,
        monotonic: Callable[[], float],
        model: Model,
        quantize: int | None,
    ) -> None:
        self.timing = timing
        self.spread = spread
        self.quantize = quantize
        """Bits that the weights are quantized to; as asked for, until the model is loaded."""
        self.loaded: Model | None = None
        self._loading = model
        """The model that is or was loaded last."""
        self._load_started_at: float | None = None
        self._monotonic = monotonic
        self._started_at = monotonic()
        self._gpu_spans: deque[tuple[float, float]] = deque()  # end, seconds; of the last hour
        self._ends: deque[float] = deque()  # of finished tasks, in the last hour
        self._tasks: dict[str, Task] = {}
        self._running: dict[str, Task] = {}
        self._keys: dict[str, tuple[int, Model]] = {}  # timing key: its first column, its model
        self._line = WaitingLine(0)

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
        return self._task(self._line.first())

    # -- changes --------------------------------------------------------------------------------

    def add(self, task: Task) -> None:
        """A task joins the line behind all others of its level."""
        self._tasks[task.task_id] = task
        features = self._columns_of(task, self._task(self._line.last(urgent=task.urgent)))
        self._line.append(task.task_id, urgent=task.urgent, features=features)

    def start(self, task: Task, *, started_at: float) -> None:
        self._leave_line(task)
        self._running[task.task_id] = task
        task.status = TaskStatus.RUNNING
        task.attempts += 1
        task.started_at = started_at
        at = self._monotonic()
        task.progress = Progress(
            Phase.TEXT_ENCODING, at, at, steps_total=task.params.steps, step_started_at=at
        )

    def put_back(self, task: Task) -> None:
        """A running task waits again, before all others of its level."""
        self._leave_gpu(task)
        del self._running[task.task_id]
        task.status = TaskStatus.WAITING
        task.progress = task.started_at = None
        after = self._task(self._line.first(urgent=task.urgent))
        features = self._columns_of(task, None)
        self._line.put_back(task.task_id, urgent=task.urgent, features=features)
        if after is not None:
            self._line.replace(after.task_id, self._columns_of(after, task))

    def remove(self, task: Task) -> None:
        """A task has ended."""
        self._leave_gpu(task)
        self._tasks.pop(task.task_id, None)
        self._running.pop(task.task_id, None)
        if task.task_id in self._line:
            self._leave_line(task)

    def finish(self, task: Task) -> Outcome | None:
        """A task is done. Returns how its forecast at submit compares with what came."""
        self._ends.append(self._monotonic())
        self.remove(task)
        promise = task.submitted
        if promise is None:
            return None
        actual_s = self._monotonic() - promise.at
        outcome = Outcome(task.urgent, promise.wait_s, promise.p90_s, actual_s)
        self.spread.learn(outcome)
        return outcome

    def report(self, task: Task, phase: Phase, steps_done: int, steps_total: int) -> None:
        """A running task has reached a phase or ended a step, at this moment."""
        progress, at = _progress_of(task), self._monotonic()
        if phase is Phase.IMAGE_ENCODING:
            self._leave_gpu(task)
        if phase is not progress.phase:
            progress.phase_s[progress.phase] = at - progress.phase_started_at
            progress.phase, progress.phase_started_at = phase, at
            progress.step_started_at = at
        if steps_done > progress.steps_done:
            progress.step_s.append(at - progress.step_started_at)
            progress.step_started_at = at
        progress.steps_done, progress.steps_total = steps_done, steps_total

    def load_started(self, model: Model) -> None:
        self.loaded = None
        self._loading = model
        self._load_started_at = self._monotonic()

    def load_finished(self, quantize: int | None) -> float:
        """The model is ready; returns the seconds it took to load.

        A task that was claimed before has lost no time of its own by it.
        """
        at = self._monotonic()
        seconds = at - (self._load_started_at if self._load_started_at is not None else at)
        self.quantize = quantize
        self.loaded = self._loading
        self.timing.learn_load(self.timing_key(self.loaded), seconds)
        for task in self._running.values():
            progress = _progress_of(task)
            if progress.phase is Phase.TEXT_ENCODING:
                progress.phase_started_at = progress.step_started_at = at
        return seconds

    # -- forecasts ------------------------------------------------------------------------------

    def timing_key(self, model: Model, params: GenerationParams | None = None) -> str:
        """What shares one law of time: the model, its quantization, and whether guidance makes
        each step run twice (FLUX.2 does above 1)."""
        key = f"{model.name}/q{self.quantize}" if self.quantize else model.name
        if params is not None and model.family is Family.FLUX2_KLEIN and (params.guidance or 0) > 1:
            key += "/guided"
        return key

    def work(self, params: GenerationParams, model: Model) -> Work:
        return Work(
            model=self.timing_key(model, params),
            parameters_b=model.parameters_b,
            tokens=params.tokens,
            steps=params.steps,
            format=params.format,
        )

    def wait_of_new(self, params: GenerationParams, model: Model, *, urgent: bool) -> Wait:
        """The forecast of a task that would be submitted now."""
        before = self._task(self._line.last(urgent=urgent))
        ahead = self._line.total(urgent_only=urgent)
        pos = len(self._line) if not urgent else self._line.urgent
        switch = self._switch_s(before, model)
        boundary = self._boundary(urgent, first=None if before else model)
        return self._wait(params, model, urgent, pos, ahead, switch, boundary)

    def wait_of(self, task: Task) -> Wait:
        """The forecast of a task that waits or runs."""
        if task.task_id in self._running:
            return next(wait for running, wait in self._running_waits() if running is task)
        pos, ahead = self._line.ahead_of(task.task_id)
        before = self._task(self._line.neighbours(task.task_id)[0])
        switch = self._switch_s(before, task.model)
        boundary = self._boundary(task.urgent)
        return self._wait(task.params, task.model, task.urgent, pos, ahead, switch, boundary)

    def next_start_s(self) -> float:
        """Seconds until the GPU is free for the first waiting task."""
        running_s = sum(self.gpu_remaining_s(task) for task in self._running.values())
        return self._load_remaining_s() + running_s

    def gpu_remaining_s(self, task: Task) -> float:
        """Seconds for which a running task still needs the GPU, loading of its model included."""
        progress, at = _progress_of(task), self._monotonic()
        if progress.phase is Phase.IMAGE_ENCODING:
            return 0.0
        forecast = self._forecast(task.params, task.model)
        switch_s = 0.0
        if self.loaded is None:
            at = progress.phase_started_at  # loading is on: the task itself has not begun
        elif task.model is not self.loaded:
            switch_s = self._load_s(task.model)
        live = Live(
            phase=progress.phase,
            phase_elapsed_s=at - progress.phase_started_at,
            steps_done=progress.steps_done,
            steps_total=progress.steps_total,
            step_s=progress.step_s,
            step_elapsed_s=at - progress.step_started_at,
        )
        return switch_s + self.timing.remaining_s(forecast, live)

    def view(self, task: Task, *, telling: bool = False) -> TaskView:
        """A task as it stands.

        Args:
            telling: its client is told; what was told before is taken into account and kept.
        """
        wait = self.wait_of(task)
        return self._view(task, self._tell(task, wait) if telling else wait)

    def views_in_order(self) -> Iterator[TaskView]:
        """All tasks in the order in which they run, in one pass."""
        encoder_free_s = 0.0
        for task, wait in self._running_waits():
            encoder_free_s = wait.end_s
            yield self._view(task, wait)
        start_s, before = self.next_start_s(), self._model_after_running()
        switches = 0
        for pos, task_id in enumerate(self._line):
            task = self._tasks[task_id]
            switch_s = self._load_s(task.model) if task.model is not before else 0.0
            switches += task.model is not before
            forecast = self._forecast(task.params, task.model)
            gpu_done_s = start_s + switch_s + forecast.gpu_s
            end_s = max(gpu_done_s, encoder_free_s) + forecast.image_encoding_s
            wait = Wait(
                pos=pos,
                start_s=start_s,
                end_s=end_s,
                p90_s=self._p90_s(end_s, task.urgent, forecast),
                confidence=forecast.confidence,
                switches=switches,
            )
            yield self._view(task, wait)
            start_s, before = gpu_done_s, task.model

    def measured(self, task: Task) -> Measured:
        """The seconds of a task that ends now."""
        progress = _progress_of(task)
        seconds = dict(progress.phase_s)
        seconds[progress.phase] = self._monotonic() - progress.phase_started_at
        return Measured(
            text_encoding_s=seconds.get(Phase.TEXT_ENCODING, 0.0),
            step_s=tuple(progress.step_s),
            decoding_s=seconds.get(Phase.DECODING, 0.0),
            image_encoding_s=seconds.get(Phase.IMAGE_ENCODING, 0.0),
        )

    def promise(self, task: Task) -> Wait:
        """The forecast of a task just added; kept, to learn how good it was."""
        wait = self.wait_of(task)
        task.submitted = Promise(self._monotonic(), wait.end_s, wait.p90_s)
        return self._tell(task, wait)

    def last_hour(self) -> tuple[int, float]:
        """Tasks done in the last hour, or since the start, and the GPU's busy share of that time."""
        now = self._monotonic()
        while self._ends and self._ends[0] < now - HOUR_S:
            self._ends.popleft()
        while self._gpu_spans and self._gpu_spans[0][0] < now - HOUR_S:
            self._gpu_spans.popleft()
        busy_s = sum(seconds for _, seconds in self._gpu_spans)
        busy_s += sum(
            now - _progress_of(task).claimed_at
            for task in self._running.values()
            if _progress_of(task).phase is not Phase.IMAGE_ENCODING
        )
        span_s = max(min(now - self._started_at, HOUR_S), 1e-9)
        return len(self._ends), min(busy_s / span_s, 1.0)

    # -- inside -----------------------------------------------------------------------------------

    def _task(self, task_id: str | None) -> Task | None:
        return None if task_id is None else self._tasks[task_id]

    def _forecast(self, params: GenerationParams, model: Model) -> Forecast:
        return self.timing.forecast(self.work(params, model))

    def _load_s(self, model: Model) -> float:
        return self.timing.forecast_load_s(self.timing_key(model), model.parameters_b)

    def _load_remaining_s(self) -> float:
        """Of the loading that is on, or due before anything can run."""
        if self.loaded is not None:
            return 0.0
        load_s = self._load_s(self._loading)
        if self._load_started_at is None:
            return load_s
        return max(load_s - (self._monotonic() - self._load_started_at), 0.0)

    def _model_after_running(self) -> Model:
        """The model that is loaded when the first waiting task starts."""
        tasks = list(self._running.values())
        return tasks[-1].model if tasks else self._loading

    def _switch_s(self, before: Task | None, model: Model) -> float:
        """Loading that is due because the task before, in its level, has another model."""
        return 0.0 if before is None or before.model is model else self._load_s(model)

    def _boundary(self, urgent: bool, first: Model | None = None) -> tuple[float, int]:
        """Seconds and number of the model switches between the levels, up to one of them.

        Args:
            first: the model of a task that would be the first of that level.
        """
        seconds, switches = 0.0, 0
        model = self._model_after_running()
        for level in (True,) if urgent else (True, False):
            head = self._task(self._line.first(urgent=level))
            head_model = head.model if head else (first if level is urgent else None)
            if head_model is None:
                continue
            if head_model is not model:
                seconds, switches = seconds + self._load_s(head_model), switches + 1
            last = self._task(self._line.last(urgent=level))
            model = last.model if last else head_model
        return seconds, switches

    def _wait(
        self,
        params: GenerationParams,
        model: Model,
        urgent: bool,
        pos: int,
        ahead: Features,
        switch_s: float,
        boundary: tuple[float, int],
    ) -> Wait:
        """The GPU's work ahead and the task's own, then its image encoding, which also waits for
        the encoder to be through with the running tasks."""
        forecast = self._forecast(params, model)
        ahead_s, switches = self._seconds(ahead)
        start_s = self.next_start_s() + boundary[0] + ahead_s
        gpu_done_s = start_s + switch_s + forecast.gpu_s
        encoder_free_s = max((wait.end_s for _, wait in self._running_waits()), default=0.0)
        end_s = max(gpu_done_s, encoder_free_s) + forecast.image_encoding_s
        return Wait(
            pos=pos,
            start_s=start_s,
            end_s=end_s,
            p90_s=self._p90_s(end_s, urgent, forecast),
            confidence=forecast.confidence,
            switches=switches + boundary[1] + (switch_s > 0.0),
        )

    def _seconds(self, sums: Features) -> tuple[float, int]:
        """GPU seconds and number of model switches of tasks, from the sums of their columns."""
        seconds, switches = 0.0, 0
        for key, (column, model) in self._keys.items():
            features = sums[column : column + FEATURES]
            if features[-3] <= 0.0:  # the column that counts tasks
                continue
            loads = round(sums[column + FEATURES])
            seconds += self.timing.gpu_s(key, model.parameters_b, features)
            seconds += loads * self._load_s(model) if loads else 0.0
            switches += loads
        return seconds, switches

    def _running_waits(self) -> Iterator[tuple[Task, Wait]]:
        """The running tasks, first the one that is furthest: one on the GPU, those before it at
        the encoder."""
        gpu_free_s, encoder_free_s = self._load_remaining_s(), 0.0
        for task in self._running.values():
            progress, forecast = _progress_of(task), self._forecast(task.params, task.model)
            encoding_s = forecast.image_encoding_s
            if progress.phase is Phase.IMAGE_ENCODING:
                encoding_s = max(encoding_s - (self._monotonic() - progress.phase_started_at), 0.0)
            gpu_free_s += self.gpu_remaining_s(task)
            encoder_free_s = max(encoder_free_s, gpu_free_s) + encoding_s
            p90_s = encoder_free_s * (1.0 + P90_SIGMAS * forecast.sigma)
            yield task, Wait(0, 0.0, encoder_free_s, p90_s, forecast.confidence)

    def _p90_s(self, wait_s: float, urgent: bool, forecast: Forecast) -> float:
        if forecast.confidence is Confidence.NONE:
            return P90_WITHOUT_KNOWLEDGE * wait_s
        return self.spread.p90_s(wait_s, urgent=urgent)

    def _tell(self, task: Task, wait: Wait) -> Wait:
        """What the client is told: the forecast, but a countdown that goes back only by more than
        a trifle, and then with the reason."""
        now, told = self._monotonic(), task.told
        end_at, reason = now + wait.end_s, None
        if told is not None and end_at > told.end_at:
            if end_at - told.end_at <= max(STEADY_S, STEADY_PART * wait.end_s):
                end_at = told.end_at
            elif wait.pos > told.pos:
                reason = Reason.OVERTAKEN
            elif wait.switches > told.switches:
                reason = Reason.MODEL_SWITCH
            else:
                reason = Reason.SLOWER
        task.told = Told(end_at, wait.pos, wait.switches)
        end_s = max(end_at - now, 0.0)
        return replace(wait, end_s=end_s, p90_s=max(wait.p90_s, end_s), reason=reason)

    def _columns_of(self, task: Task, before: Task | None) -> Features:
        """The task's features in the columns of its key, and whether its model has to be loaded
        because the task before it, in its level, has another one."""
        work = self.work(task.params, task.model)
        if work.model not in self._keys:
            self._keys[work.model] = (len(self._keys) * COLUMNS, task.model)
            self._widen_line()
        column = self._keys[work.model][0]
        switch = before is not None and before.model is not task.model
        values = [0.0] * (len(self._keys) * COLUMNS)
        values[column : column + COLUMNS] = [*work.features, float(switch)]
        return tuple(values)

    def _widen_line(self) -> None:
        """A new timing key needs columns: build the line anew. Rare, O(n)."""
        tasks = [self._tasks[task_id] for task_id in self._line]
        self._line = WaitingLine(len(self._keys) * COLUMNS)
        for task in tasks:
            before = self._task(self._line.last(urgent=task.urgent))
            features = self._columns_of(task, before)
            self._line.append(task.task_id, urgent=task.urgent, features=features)

    def _leave_line(self, task: Task) -> None:
        before, after = map(self._task, self._line.neighbours(task.task_id))
        self._line.remove(task.task_id)
        if after is not None:
            self._line.replace(after.task_id, self._columns_of(after, before))

    def _leave_gpu(self, task: Task) -> None:
        """Books the time that a task had the GPU; once."""
        progress = task.progress
        if progress is not None and progress.phase is not Phase.IMAGE_ENCODING:
            at = self._monotonic()
            self._gpu_spans.append((at, at - progress.claimed_at))

    def _view(self, task: Task, wait: Wait) -> TaskView:
        progress = task.progress
        shown = 0.0
        if progress is not None:
            spent_s = self._monotonic() - progress.claimed_at
            shown = spent_s / max(spent_s + wait.end_s, 1e-9)
            shown = progress.shown = min(max(shown, progress.shown), 0.999)
        return TaskView(
            task_id=task.task_id,
            status=task.status,
            params=task.params,
            urgent=task.urgent,
            created_at=task.created_at,
            started_at=task.started_at,
            ended_at=None,
            wait=wait,
            phase=progress.phase if progress else None,
            steps_done=progress.steps_done if progress else 0,
            steps_total=progress.steps_total if progress else task.params.steps,
            progress=shown,
            error_code=None,
            error=None,
            measured=None,
        )


def _progress_of(task: Task) -> Progress:
    assert task.progress is not None, "start() made it, and the task runs"
    return task.progress
