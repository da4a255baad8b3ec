"""What waits and runs at this moment, and what memory holds: read by the forecast, changed by the
LiveQueue. Not thread-safe: all of it under the QueueCore's lock.
"""

from collections.abc import Callable

from models.model_catalog import Weights
from queueing.held_tasks import HeldTasks
from queueing.work_forecast import WorkForecast
from queueing.work_line import Recent, WorkLine
from task import Phase, Progress, Stage, Task
from timing_model import Live, Spread, TimingModel


class LiveState:
    """Args:
    monotonic: the clock, in seconds.
    first: what is loaded before anything else.
    in_memory: weights that memory holds at a time.
    """

    def __init__(
        self,
        timing: TimingModel,
        spread: Spread,
        monotonic: Callable[[], float],
        first: Weights,
        in_memory: int,
    ) -> None:
        self.timing = timing
        self.work = WorkForecast(timing)
        self.spread = spread
        self.monotonic = monotonic
        self.line = WorkLine(self.work.works, in_memory)
        self.held = HeldTasks(monotonic)
        self.running: dict[str, Task] = {}
        self.leaving: Task | None = None
        """Cancelled, but the worker is still at its step."""
        self.resident: Recent = ()
        """Keys of the loaded weights, the latest used first."""
        self.loading: Weights | None = first
        """What is being loaded, or will be before anything else."""
        self.load_started_at: float | None = None

    def gpu_remaining_s(self, task: Task) -> float:
        """Seconds for which a running task still needs the GPU, loading of its model included."""
        progress, at = progress_of(task), self.monotonic()
        if progress.phase is Phase.IMAGE_ENCODING:
            return 0.0
        forecast = self.timing.forecast(self.work.work(task.stages[progress.stage]))
        recent = self.resident
        if self.loading is not None:
            at = progress.phase_started_at  # loading is on: the task itself has not begun
            recent = self.line.used(recent, self.loading.key)
        needed, _ = self.line.loads(task.stages[progress.stage :], recent)
        live = Live(
            phase=progress.phase,
            phase_elapsed_s=at - progress.phase_started_at,
            steps_done=progress.steps_done,
            steps_total=progress.steps_total,
            step_s=progress.step_s,
            step_elapsed_s=at - progress.step_started_at,
            images_done=progress.images_done,
        )
        later = task.stages[progress.stage + 1 :]
        later_s = sum(self.timing.forecast(self.work.work(after)).gpu_s for after in later)
        load_s = self.work.loads_s(needed)
        return load_s + self.timing.remaining_s(forecast, live) + later_s

    def load_and_work_s(self, stages: tuple[Stage, ...]) -> tuple[float, float]:
        """Seconds of loading all that stages need, and of their own work."""
        weights = {stage.weights.key: stage.weights for stage in stages}.values()
        return self.work.loads_s(weights), self.work.forecast_of(stages).total_s

    def load_remaining_s(self) -> float:
        """Of the loading that is on, or due before anything can run."""
        if self.loading is None:
            return 0.0
        load_s = self.work.load_s(self.loading)
        if self.load_started_at is None:
            return load_s
        return max(load_s - (self.monotonic() - self.load_started_at), 0.0)

    def leaving_s(self) -> float:
        """Until the worker leaves the cancelled task: the rest of its step, or of its decoding."""
        if self.leaving is None:
            return 0.0
        progress = progress_of(self.leaving)
        stage = self.leaving.stages[progress.stage]
        forecast = self.timing.forecast(self.work.work(stage))
        at = self.monotonic()
        if progress.phase is Phase.DECODING:
            return max(forecast.decoding_s - (at - progress.phase_started_at), 0.0)
        first_s = 0.0 if progress.step_s else forecast.first_step_extra_s
        if progress.phase is Phase.TEXT_ENCODING:
            first_s = forecast.text_encoding_s - forecast.step_s
        return max(first_s + forecast.step_s - (at - progress.step_started_at), 0.0)

    def recent_after_running(self) -> Recent:
        """What memory holds when the first waiting task starts."""
        recent = self.resident
        if self.loading is not None:
            recent = self.line.used(recent, self.loading.key)
        for task in self.running.values():
            if progress_of(task).phase is not Phase.IMAGE_ENCODING:
                _, recent = self.line.loads(task.stages[progress_of(task).stage :], recent)
        return recent

    def boundary(
        self, urgent: bool, before: Task | None, behind: Task | None
    ) -> tuple[float, int, Recent]:
        """Loading for the first tasks of the levels up to this one.

        Args:
            before: the task of this level after which we look; None: none.
            behind: the task of this level before which we look; None: the end of the level.

        Returns:
            Its seconds, how often, and what memory holds after the task `before`.
        """
        seconds, loads, recent = 0.0, 0, self.recent_after_running()
        for level in (True,) if urgent else (True, False):
            openers = self.line.openers(urgent=level, behind=behind if level is urgent else None)
            for weights in openers:
                if weights.key not in recent:
                    seconds, loads = seconds + self.work.load_s(weights), loads + 1
                recent = self.line.used(recent, weights.key)
            last = before if level is urgent else self.line.last(urgent=level)
            for key in reversed(self.line.recent(last)):
                recent = self.line.used(recent, key)
        return seconds, loads, recent


def progress_of(task: Task) -> Progress:
    """Of a task that runs."""
    assert task.progress is not None, "LiveQueue.start() made it, and the task runs"
    return task.progress
