"""The tasks that wait and run, in memory: their order, their progress, the forecast of each.

Arithmetic over a state; no disk, no rules. Not thread-safe: the QueueManager calls it under its
lock.

The time of a waiting task is the sum of what comes before it: what the running task still needs,
the work of those ahead, and loading wherever one task's model differs from the one before it.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import islice

from model_catalog import Family, Model
from task import GenerationParams, Phase, Progress, Promise, Task, TaskStatus, Told
from timing_model import (
    Confidence,
    Forecast,
    Live,
    Measured,
    Outcome,
    Spread,
    TimingModel,
    Work,
)
from work_line import WorkLine, WorkOfKey

HOUR_S = 3600.0
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
class Lanes:
    """When the GPU and the encoder are free of what runs now. Seconds from now."""

    gpu_free_s: float
    encoder_free_s: float
    waits: list[tuple[Task, Wait]]
    """The running tasks, first the one that is furthest."""


@dataclass(frozen=True)
class Ahead:
    """What comes before a waiting task, behind the running ones."""

    pos: int
    works: list[WorkOfKey]
    switch_s: float
    """Loading, because the task before it in its level has another model."""
    boundary_s: float
    """Loading before the first tasks of the levels."""
    boundary_switches: int


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

    @property
    def pos(self) -> int | None:
        return self.wait.pos if self.wait else None

    @property
    def wait_s(self) -> float | None:
        """Seconds until its image is ready."""
        return self.wait.end_s if self.wait else None


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
        self._leaving: Task | None = None
        """Cancelled, but the worker is still at its step."""
        self._line = WorkLine(lambda task: self.work(task.params, task.model))

    def __len__(self) -> int:
        return len(self._tasks)

    def __contains__(self, task_id: str) -> bool:
        return task_id in self._tasks

    @property
    def busy(self) -> bool:
        """Whether a task runs, or a cancelled one has not been left yet."""
        return bool(self._running) or self._leaving is not None

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
        return self._line.first()

    # -- changes --------------------------------------------------------------------------------

    def add(self, task: Task) -> None:
        """A task joins the line behind all others of its level."""
        self._tasks[task.task_id] = task
        self._line.append(task)

    def start(self, task: Task, *, started_at: float) -> None:
        self._leaving = None
        self._line.remove(task)
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
        self._line.put_back(task)

    def remove(self, task: Task) -> None:
        """A task has ended."""
        self._leave_gpu(task)
        self._tasks.pop(task.task_id, None)
        self._running.pop(task.task_id, None)
        if task in self._line:
            self._line.remove(task)

    def cancel(self, task: Task) -> None:
        """A task has ended by its client's wish; the worker leaves it at the end of its step."""
        progress = task.progress
        if progress is not None and progress.phase is not Phase.IMAGE_ENCODING:
            self._leaving = task
        self.remove(task)

    def gpu_is_free(self) -> None:
        """The worker has left the cancelled task."""
        self._leaving = None

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
        if quantize != self.quantize:  # what is stored won over what was asked for
            self.quantize = quantize
            self._line.lay_out()
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
        last = self._line.last(urgent=urgent)
        ahead = Ahead(
            self._line.urgent if urgent else len(self._line),
            self._line.total(urgent_only=urgent),
            self._switch_s(last, model),
            *self._boundary(urgent, first=None if last else model),
        )
        return self._wait(self._forecast(params, model), ahead, urgent=urgent)

    def wait_of(self, task: Task) -> Wait:
        """The forecast of a task that waits or runs."""
        if task.task_id in self._running:
            return next(wait for running, wait in self._lanes().waits if running is task)
        switch_s = self._switch_s(self._line.before(task), task.model)
        ahead = Ahead(*self._line.ahead_of(task), switch_s, *self._boundary(task.urgent))
        return self._wait(self._forecast(task.params, task.model), ahead, urgent=task.urgent)

    def next_start_s(self) -> float:
        """Seconds until the GPU is free for the first waiting task."""
        return self._lanes().gpu_free_s

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

    def views_in_order(self, offset: int = 0) -> Iterator[TaskView]:
        """The tasks in the order in which they run, from the offset on, in one pass."""
        lanes = self._lanes()
        for task, wait in lanes.waits[offset:]:
            yield self._view(task, wait)
        start_s, switches, before = lanes.gpu_free_s, 0, self._model_after_running()
        skipped = max(offset - len(self._running), 0)
        for pos, task in enumerate(islice(self._line, skipped, None), skipped):
            if pos == skipped > 0:  # those passed over are known by their sums
                wait = self.wait_of(task)
                start_s, switches = wait.start_s, wait.switches
                before = (self._line.before(task) or task).model
                switches -= task.model is not before
            switch_s = self._load_s(task.model) if task.model is not before else 0.0
            switches += task.model is not before
            forecast = self._forecast(task.params, task.model)
            gpu_done_s = start_s + switch_s + forecast.gpu_s
            end_s = max(gpu_done_s, lanes.encoder_free_s) + forecast.image_encoding_s
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
        """Tasks done in the last hour (or since the start), and the part of it the GPU worked."""
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

    def _leaving_s(self) -> float:
        """Until the worker leaves the cancelled task: the rest of its step, or of its decoding."""
        if self._leaving is None:
            return 0.0
        progress = _progress_of(self._leaving)
        forecast = self._forecast(self._leaving.params, self._leaving.model)
        at = self._monotonic()
        if progress.phase is Phase.DECODING:
            return max(forecast.decoding_s - (at - progress.phase_started_at), 0.0)
        first_s = 0.0 if progress.step_s else forecast.first_step_extra_s
        if progress.phase is Phase.TEXT_ENCODING:
            first_s = forecast.text_encoding_s - forecast.step_s
        return max(first_s + forecast.step_s - (at - progress.step_started_at), 0.0)

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
            head = self._line.first(urgent=level)
            head_model = head.model if head else (first if level is urgent else None)
            if head_model is None:
                continue
            if head_model is not model:
                seconds, switches = seconds + self._load_s(head_model), switches + 1
            last = self._line.last(urgent=level)
            model = last.model if last else head_model
        return seconds, switches

    def _wait(self, forecast: Forecast, ahead: Ahead, *, urgent: bool) -> Wait:
        """The GPU's work ahead and the task's own, then its image encoding, which also waits for
        the encoder to be through with the running tasks."""
        lanes = self._lanes()
        start_s, switches = lanes.gpu_free_s + ahead.boundary_s, ahead.boundary_switches
        for work in ahead.works:
            start_s += self.timing.gpu_s(work.key, work.model.parameters_b, work.features)
            start_s += work.loads * self._load_s(work.model) if work.loads else 0.0
            switches += work.loads
        gpu_done_s = start_s + ahead.switch_s + forecast.gpu_s
        end_s = max(gpu_done_s, lanes.encoder_free_s) + forecast.image_encoding_s
        return Wait(
            pos=ahead.pos,
            start_s=start_s,
            end_s=end_s,
            p90_s=self._p90_s(end_s, urgent, forecast),
            confidence=forecast.confidence,
            switches=switches + (ahead.switch_s > 0.0),
        )

    def _lanes(self) -> Lanes:
        """GPU and encoder, each one task at a time: the running tasks, first the one that is
        furthest, are one on the GPU, and those before it at the encoder."""
        gpu_free_s, encoder_free_s = self._load_remaining_s() + self._leaving_s(), 0.0
        waits = []
        for task in self._running.values():
            progress, forecast = _progress_of(task), self._forecast(task.params, task.model)
            encoding_s = forecast.image_encoding_s
            if progress.phase is Phase.IMAGE_ENCODING:
                encoding_s = max(encoding_s - (self._monotonic() - progress.phase_started_at), 0.0)
            gpu_free_s += self.gpu_remaining_s(task)
            encoder_free_s = max(encoder_free_s, gpu_free_s) + encoding_s
            p90_s = encoder_free_s * (1.0 + P90_SIGMAS * forecast.sigma)
            waits.append((task, Wait(0, 0.0, encoder_free_s, p90_s, forecast.confidence)))
        return Lanes(gpu_free_s, encoder_free_s, waits)

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
        start_s = min(wait.start_s, end_s)
        return replace(
            wait, start_s=start_s, end_s=end_s, p90_s=max(wait.p90_s, end_s), reason=reason
        )

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
