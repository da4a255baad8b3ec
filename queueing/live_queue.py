"""The tasks that wait and run, in memory: what changes them, and how they are shown.

No disk, no rules. Not thread-safe: the QueueManager calls it under its lock. The line is at any
moment the order in which tasks run (affinity.py says who joins it further ahead), and their
forecasts tell it (wait_forecast.py).
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from models.model_catalog import Weights
from queueing.affinity import Affinity
from queueing.live_state import LiveState, progress_of
from queueing.task_view import Reason, TaskView, Wait
from queueing.wait_forecast import WaitForecast
from task import Phase, Progress, Promise, Stage, Task, TaskStatus, Told
from timing_model import Measured, Outcome, Spread, TimingModel, Work

HOUR_S = 3600.0
STEADY_S, STEADY_PART = 1.0, 0.02
"""A forecast that moved back by no more than this is not told: the countdown goes on."""


class LiveQueue:
    """Args:
    monotonic: the clock, in seconds.
    first: what is loaded before anything else.
    in_memory: weights that memory holds at a time.
    affinity_s: seconds by which a task lets others join ahead of it, in all.
    gaps: how often the process was stopped so far (RunningClock.gaps).
    """

    def __init__(
        self,
        timing: TimingModel,
        spread: Spread,
        monotonic: Callable[[], float],
        first: Weights,
        *,
        in_memory: int = 1,
        affinity_s: float = 0.0,
        gaps: Callable[[], int] = lambda: 0,
    ) -> None:
        self._gaps = gaps
        self._gaps_before_load = 0
        self.state = LiveState(timing, spread, monotonic, first, in_memory)
        affinity = Affinity(self.state, affinity_s)
        self.forecast = WaitForecast(self.state, affinity)
        self._affinity = affinity
        self._monotonic = monotonic
        self._started_at = monotonic()
        self._gpu_spans: deque[tuple[float, float]] = deque()  # end, seconds; of the last hour
        self._ends: deque[float] = deque()  # of finished tasks, in the last hour
        self._tasks: dict[str, Task] = {}

    def __len__(self) -> int:
        return len(self._tasks)

    def __contains__(self, task_id: str) -> bool:
        return task_id in self._tasks

    @property
    def busy(self) -> bool:
        """Whether a task runs, or a cancelled one has not been left yet."""
        return bool(self.state.running) or self.state.leaving is not None

    @property
    def waiting(self) -> int:
        return len(self.state.line) + len(self.state.held)

    @property
    def running(self) -> list[Task]:
        """One on the GPU at most, and those before it whose images are being encoded."""
        return list(self.state.running.values())

    def get(self, task_id: str) -> Task | None:
        return self._tasks.get(task_id)

    def get_running(self, task_id: str) -> Task | None:
        return self.state.running.get(task_id)

    def first(self) -> Task | None:
        """The task that runs next."""
        return self.state.line.first()

    # -- changes --------------------------------------------------------------------------------

    def add(self, task: Task) -> None:
        """A task joins the line of its level: behind all others, or behind those of its model."""
        overtaken = self._affinity.overtaken_by(task.stages, urgent=task.urgent)
        task.patience_s = self._affinity.affinity_s
        self._tasks[task.task_id] = task
        if not overtaken:
            self.state.line.append(task)
            return
        for other, delay_s in overtaken:
            other.patience_s -= delay_s
        self.state.line.insert(task, before=overtaken[-1][0])

    def hold(self, task: Task, missing: tuple[Weights, ...]) -> None:
        """A task waits until these weights are on this machine."""
        self._tasks[task.task_id] = task
        self.state.held.add(task, missing, *self.state.load_and_work_s(task.stages))

    def download_ended(self, weights: Weights) -> list[Task]:
        """Weights are on this machine: the tasks that lacked only these join the line now."""
        ready = self.state.held.end(weights.model)
        for task in ready:
            self.add(task)
        return ready

    def start(self, task: Task, *, started_at: float) -> None:
        self.state.leaving = None
        self.state.line.remove(task)
        self.state.running[task.task_id] = task
        task.status = TaskStatus.RUNNING
        task.attempts += 1
        task.started_at = started_at
        self._use(task.stages[0])
        at = self._monotonic()
        task.progress = Progress(
            Phase.TEXT_ENCODING, at, at, steps_total=task.params.steps_run, step_started_at=at
        )
        task.progress.gaps_before = self._gaps()

    def put_back(self, task: Task) -> None:
        """A running task waits again, before all others of its level."""
        self._leave_gpu(task)
        del self.state.running[task.task_id]
        task.status = TaskStatus.WAITING
        task.progress = task.started_at = None
        self.state.line.insert(task)

    def remove(self, task: Task) -> None:
        """A task has ended."""
        self._leave_gpu(task)
        self._tasks.pop(task.task_id, None)
        self.state.running.pop(task.task_id, None)
        self.state.held.remove(task)
        if task in self.state.line:
            self.state.line.remove(task)

    def cancel(self, task: Task) -> None:
        """A task has ended by its client's wish; the worker leaves it at the end of its step."""
        progress = task.progress
        if progress is not None and progress.phase is not Phase.IMAGE_ENCODING:
            self.state.leaving = task
        self.remove(task)

    def gpu_is_free(self) -> None:
        """The worker has left the cancelled task."""
        self.state.leaving = None

    def finish(self, task: Task) -> Outcome | None:
        """A task is done. Returns how its forecast at submit compares with what came; None where
        there was none, or the process was stopped since."""
        self._ends.append(self._monotonic())
        self.remove(task)
        promise = task.submitted
        if promise is None:
            return None
        actual_s = self._monotonic() - promise.at
        if self._gaps() != promise.gaps_before:
            return None
        outcome = Outcome(task.urgent, promise.wait_s, promise.p90_s, actual_s)
        self.state.spread.learn(outcome)
        return outcome

    def report(self, task: Task, phase: Phase, steps_done: int, steps_total: int) -> None:
        """A running task has reached a phase or ended a step, at this moment."""
        progress, at = progress_of(task), self._monotonic()
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

    def next_image(self, task: Task, stage: int, index: int) -> None:
        """A running task has the picture before, and turns to this one of a stage."""
        progress, at = progress_of(task), self._monotonic()
        progress.measured.append((self._work_of_image(task), self._measured(task)))
        progress.stage, progress.images_done = stage, index
        progress.phase, progress.phase_started_at = Phase.TEXT_ENCODING, at
        progress.step_started_at = at
        progress.phase_s, progress.step_s, progress.steps_done = {}, [], 0
        progress.steps_total = task.stages[stage].params.steps_run
        self._use(task.stages[stage])

    def load_started(self, weights: Weights) -> None:
        self.state.loading = weights
        self.state.load_started_at = self._monotonic()
        self._gaps_before_load = self._gaps()

    def load_finished(
        self,
        weights: Weights,
        bits: int | None,
        resident: Sequence[str],
        *,
        downloaded: bool = False,
    ) -> float | None:
        """Weights are ready; returns the seconds it took to load them, or None where they say
        nothing of the next time: it was downloaded, or the process was stopped meanwhile.

        A task that was claimed before has lost no time of its own by it.

        Args:
            bits: what they are quantized to: what is stored wins over what was asked for.
            resident: keys of all that is in memory now.
        """
        expected = self.state.line.used(self.state.resident, weights.key)
        at = self._monotonic()
        seconds = at - (
            self.state.load_started_at if self.state.load_started_at is not None else at
        )
        if self.state.work.learn_bits(weights, bits):
            self.state.line.lay_out()
        self.now_resident(resident)
        if len(resident) < len(expected):  # memory does not hold as many as the operator allows
            self.state.line.hold(len(resident))
        learns = not downloaded and self._gaps() == self._gaps_before_load
        if learns:
            self.state.timing.learn_load(self.state.work.load_key(weights), seconds)
        for task in self.state.running.values():
            progress = progress_of(task)
            if progress.phase is Phase.TEXT_ENCODING:
                progress.phase_started_at = progress.step_started_at = at
        return seconds if learns else None

    def now_resident(self, resident: Sequence[str]) -> None:
        """Loading has ended, well or not, or weights were unloaded: this is in memory."""
        self.state.loading = self.state.load_started_at = None
        self.state.resident = tuple(resident)

    # -- how they are shown -----------------------------------------------------------------------

    def view(self, task: Task, *, telling: bool = False) -> TaskView:
        """A task as it stands.

        Args:
            telling: its client is told; what was told before is taken into account and kept.
        """
        wait = self.forecast.of(task)
        return self._view(task, self._tell(task, wait) if telling else wait)

    def views_in_order(self, offset: int = 0) -> Iterator[TaskView]:
        """The tasks in the order in which they run, from the offset on, in one pass."""
        return (self._view(task, wait) for task, wait in self.forecast.in_order(offset))

    def measured(self, task: Task) -> list[tuple[Work, Measured]]:
        """The seconds of each image of a task that ends now, and the work that each was."""
        return [*progress_of(task).measured, (self._work_of_image(task), self._measured(task))]

    def was_interrupted(self, task: Task) -> bool:
        """Whether the process was stopped since the task was claimed."""
        return self._gaps() != progress_of(task).gaps_before

    def promise(self, task: Task) -> Wait:
        """The forecast of a task just added; kept, to learn how good it was. Of one that waits for
        a download it would say more of the network."""
        wait = self.forecast.of(task)
        if task not in self.state.held:
            task.submitted = Promise(
                self._monotonic(), wait.end_s, wait.p90_s, gaps_before=self._gaps()
            )
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
            now - progress_of(task).claimed_at
            for task in self.state.running.values()
            if progress_of(task).phase is not Phase.IMAGE_ENCODING
        )
        span_s = max(min(now - self._started_at, HOUR_S), 1e-9)
        return len(self._ends), min(busy_s / span_s, 1.0)

    def _use(self, stage: Stage) -> None:
        if stage.weights.key in self.state.resident:
            self.state.resident = self.state.line.used(self.state.resident, stage.weights.key)

    # -- inside -----------------------------------------------------------------------------------

    def _work_of_image(self, task: Task) -> Work:
        return replace(self.state.work.work(task.stages[progress_of(task).stage]), images=1)

    def _measured(self, task: Task) -> Measured:
        """Of the image that a running task is at."""
        progress = progress_of(task)
        seconds = dict(progress.phase_s)
        seconds[progress.phase] = self._monotonic() - progress.phase_started_at
        return Measured(
            text_encoding_s=seconds.get(Phase.TEXT_ENCODING, 0.0),
            step_s=tuple(progress.step_s),
            decoding_s=seconds.get(Phase.DECODING, 0.0),
            image_encoding_s=seconds.get(Phase.IMAGE_ENCODING, 0.0),
        )

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
            steps_total=progress.steps_total if progress else task.params.steps_run,
            progress=shown,
            error_code=None,
            error=None,
            images_done=_images_done(task),
            held=task in self.state.held,
        )


def _images_done(task: Task) -> int:
    """Images to which nothing more is done than to encode them."""
    progress = task.progress
    last_stage = progress is not None and progress.stage == len(task.stages) - 1
    return progress.images_done if progress and last_stage else 0
