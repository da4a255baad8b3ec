"""The forecasts with which later ones are compared: steadiness, reasons, and how good they were.

Not thread-safe: the scheduler calls it under its lock.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from task import Forecast, Reason, Task
from timing_model import Outcome

STEADY_S, STEADY_SHARE = 1.0, 0.02
"""A forecast that is later than the first one by no more than this is not reported."""


@dataclass(frozen=True)
class Baseline:
    """What was forecast for a task when its status changed last."""

    at: float
    """Reading of the monotonic clock."""
    forecast: Forecast
    claims: int
    """Claims of all tasks until then."""
    gaps: int
    """How often the process had been stopped until then."""


class Baselines:
    """Args:
    monotonic: the clock, in seconds.
    gaps: how often the process was stopped so far.
    """

    def __init__(self, monotonic: Callable[[], float], gaps: Callable[[], int]) -> None:
        self.claims = 0
        """Of all tasks so far."""
        self._monotonic = monotonic
        self._gaps = gaps
        self._latest: dict[str, Baseline] = {}
        self._submitted: dict[str, Baseline] = {}

    def set(self, task: Task, forecast: Forecast, *, submitted: bool = False) -> None:
        """The status of a task has changed: later forecasts are compared with this one.

        Args:
            submitted: outcome() compares it with the truth.
        """
        baseline = Baseline(self._monotonic(), forecast, self.claims, self._gaps())
        self._latest[task.task_id] = baseline
        if submitted:
            self._submitted[task.task_id] = baseline

    def improve(self, task: Task, forecast: Forecast) -> None:
        """A forecast that has become earlier is the one that later ones are compared with."""
        baseline, at = self._latest[task.task_id], self._monotonic()
        if at + forecast.end_s < baseline.at + baseline.forecast.end_s:
            self._latest[task.task_id] = Baseline(at, forecast, baseline.claims, baseline.gaps)

    def forget(self, task: Task) -> None:
        """A task has ended."""
        self._latest.pop(task.task_id, None)
        self._submitted.pop(task.task_id, None)

    def outcome(self, task: Task) -> Outcome | None:
        """How the forecast at submit compares with the truth, of a task that is done now. None: it
        was not made by this process, or the process was stopped meanwhile."""
        submitted = self._submitted.get(task.task_id)
        if submitted is None or self._gaps() != submitted.gaps:
            return None
        forecast, actual_s = submitted.forecast, self._monotonic() - submitted.at
        return Outcome(task.priority, forecast.end_s, forecast.p90_s, actual_s)

    def steady(self, task: Task) -> Callable[[Forecast], Forecast]:
        """What readers see of a forecast of this task, as a function of the forecast as of now. The
        function needs no lock."""
        baseline = self._latest.get(task.task_id)
        return partial(_steady, at=self._monotonic(), baseline=baseline, claims=self.claims)


def _steady(forecast: Forecast, *, at: float, baseline: Baseline | None, claims: int) -> Forecast:
    """Small increases over the baseline are not reported: the countdown continues. Larger ones come
    with the reason."""
    if baseline is None:
        return forecast
    then = baseline.forecast
    late_s = at + forecast.end_s - (baseline.at + then.end_s)
    if late_s <= 0.0:
        return forecast
    if late_s <= max(STEADY_S, STEADY_SHARE * forecast.end_s):
        end_s = max(forecast.end_s - late_s, 0.0)
        return replace(forecast, end_s=end_s, start_s=min(forecast.start_s, end_s))
    reason = Reason.SLOWER
    if forecast.pos > max(then.pos - (claims - baseline.claims), 0):
        reason = Reason.OVERTAKEN
    elif forecast.switches > then.switches:
        reason = Reason.MODEL_SWITCH
    return replace(forecast, reason=reason)
