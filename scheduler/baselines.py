"""The forecasts that later ones are compared with: steadiness, reasons, accuracy.

Not thread-safe: the scheduler calls it under its lock.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from scheduler.schedule import Schedule
from task import Forecast, Reason, Task, TaskStatus
from timing.spread import Outcome
from timing_model import Confidence

STEADY_S, STEADY_SHARE = 1.0, 0.02
"""A forecast that is later than the first one by no more than this is not reported."""


@dataclass(frozen=True)
class Baseline:
    """The forecast of a task when its status changed last, or the server started."""

    at: float
    """Monotonic seconds."""
    forecast: Forecast
    newest: int
    """Highest sequence of all tasks until then."""
    gaps: int
    """How often the process had been stopped until then."""


class Baselines:
    """Args:
    schedule: the waiting tasks.
    monotonic: the clock, in seconds.
    gaps: how often the process was stopped so far.
    """

    def __init__(
        self, schedule: Schedule, monotonic: Callable[[], float], gaps: Callable[[], int]
    ) -> None:
        self._schedule = schedule
        self._monotonic = monotonic
        self._gaps = gaps
        self._latest: dict[str, Baseline] = {}
        self._submitted: dict[str, Baseline] = {}
        self._newest_claimed = 0

    def set(self, task: Task, forecast: Forecast, newest: int, *, submitted: bool = False) -> None:
        """The status of a task has changed: later forecasts are compared with this one.

        Args:
            newest: highest sequence of all tasks so far.
            submitted: outcome() compares it with the truth.
        """
        baseline = Baseline(self._monotonic(), forecast, newest, self._gaps())
        self._latest[task.task_id] = baseline
        if submitted:
            self._submitted[task.task_id] = baseline

    def claimed(self, task: Task) -> None:
        self._newest_claimed = max(self._newest_claimed, task.sequence)

    def improve(self, task: Task, forecast: Forecast) -> None:
        """An earlier forecast becomes the baseline."""
        baseline, at = self._latest[task.task_id], self._monotonic()
        if at + forecast.end_s < baseline.at + baseline.forecast.end_s:
            self._latest[task.task_id] = Baseline(at, forecast, baseline.newest, baseline.gaps)

    def forget(self, task: Task) -> None:
        """A task has ended."""
        self._latest.pop(task.task_id, None)
        self._submitted.pop(task.task_id, None)

    def outcome(self, task: Task) -> Outcome | None:
        """Compares the forecast at submit with the true duration of a finished task. None: it
        was not made by this process, or was a guess, or the process was stopped meanwhile."""
        submitted = self._submitted.get(task.task_id)
        if submitted is None or self._gaps() != submitted.gaps:
            return None
        if submitted.forecast.confidence is Confidence.NONE:
            return None
        forecast, actual_s = submitted.forecast, self._monotonic() - submitted.at
        return Outcome(task.priority, forecast.end_s, forecast.p90_s, actual_s)

    def steady(self, task: Task) -> Callable[[Forecast], Forecast]:
        """Returns a function from the forecast of this task as of now to what readers see of it.
        The function needs no lock.

        Small increases over the baseline are not reported: the countdown continues. Larger ones
        come with the reason.
        """
        baseline, at = self._latest[task.task_id], self._monotonic()
        pending = task.waits_for_download or task.waits_for_prompt
        in_schedule = task.status is TaskStatus.WAITING and not pending
        newest_ahead = self._schedule.newest_ahead if in_schedule else None
        newest_claimed = self._newest_claimed

        def was_overtaken(forecast: Forecast) -> bool:
            """Whether a task that joined later runs, or has run, before this one."""
            if newest_ahead is None:  # its sequence is not known yet, or it runs
                return forecast.preempted or forecast.pos > baseline.forecast.pos
            return max(int(newest_ahead[forecast.pos]), newest_claimed) > baseline.newest

        def seen(forecast: Forecast) -> Forecast:
            then = baseline.forecast
            late_s = at + forecast.end_s - (baseline.at + then.end_s)
            if late_s <= 0.0:
                return forecast
            if late_s <= max(STEADY_S, STEADY_SHARE * forecast.end_s):
                end_s = max(forecast.end_s - late_s, 0.0)
                return replace(forecast, end_s=end_s, start_s=min(forecast.start_s, end_s))
            reason = Reason.SLOWER
            if was_overtaken(forecast):
                reason = Reason.OVERTAKEN
            elif forecast.switches > then.switches:
                reason = Reason.MODEL_SWITCH
            return replace(forecast, reason=reason)

        return seen
