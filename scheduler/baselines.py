"""The forecasts that later ones are compared with: steadiness, reasons, accuracy.

Not thread-safe: the scheduler calls it under its lock.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from scheduler.columns import Floats
from scheduler.forecast import Forecaster, Lane
from scheduler.plan import Plan
from scheduler.schedule import Schedule
from task import Forecast, Reason, Task, TaskStatus
from timing.spread import Outcome
from timing_model import Confidence

STEADY_S, STEADY_SHARE = 1.0, 0.02
"""A forecast that is later than the first one by no more than this is not reported."""

ROUNDING_S = 1e-6


@dataclass(frozen=True)
class Baseline:
    """The forecast of a task when it was submitted, or the server started; or a later one that was
    earlier."""

    at: float
    """Monotonic seconds."""
    forecast: Forecast
    newest: int
    """Highest sequence of all tasks until then."""
    gaps: int
    """How often the process had been stopped until then."""
    end_at: float
    """Monotonic seconds at which it was to end."""
    overtaken: bool = False
    """Whether a task that joined later was claimed before it."""


class Baselines:
    """Args:
    schedule: the waiting tasks. It calls settle() before they get other positions.
    monotonic: the clock, in seconds.
    gaps: how often the process was stopped so far.
    """

    def __init__(
        self,
        schedule: Schedule,
        forecaster: Forecaster,
        monotonic: Callable[[], float],
        gaps: Callable[[], int],
    ) -> None:
        self._schedule = schedule
        self._forecaster = forecaster
        self._monotonic = monotonic
        self._gaps = gaps
        self._latest: dict[str, Baseline] = {}
        self._submitted: dict[str, Baseline] = {}
        self._newest_claimed = 0
        self._plan: Plan | None = None
        self._earliest: list[Lane] = []
        """Of each machine of the plan, the lane that was free first since the latest settle()."""
        self._image_encoding_s = np.zeros(0)
        self._settled = 0
        self._ends_at: tuple[object, Floats] = (None, np.zeros(0))
        schedule.before_change = self.settle

    def set(self, task: Task, forecast: Forecast, newest: int, *, submitted: bool = False) -> None:
        """A task begins to wait: later forecasts are compared with this one.

        Args:
            newest: highest sequence of all tasks so far.
            submitted: outcome() compares it with the truth.
        """
        at = self._monotonic()
        baseline = Baseline(at, forecast, newest, self._gaps(), at + forecast.end_s)
        self._latest[task.task_id] = baseline
        if submitted:
            self._submitted[task.task_id] = baseline

    def claimed(self, task: Task) -> None:
        """A task is about to leave the schedule for a machine."""
        self.settle()
        baseline, position = self._latest[task.task_id], self._schedule.position(task)
        self._latest[task.task_id] = replace(
            baseline,
            end_at=min(baseline.end_at, float(self._schedule.column("end_at")[position])),
            overtaken=baseline.overtaken or self._newest_claimed > baseline.newest,
        )
        self._newest_claimed = max(self._newest_claimed, task.sequence)

    def improve(self, task: Task, forecast: Forecast, at: float) -> None:
        """An earlier forecast, made at this moment, becomes the baseline."""
        baseline, end_at = self._latest[task.task_id], at + forecast.end_s
        if end_at < baseline.end_at:
            self._latest[task.task_id] = replace(baseline, forecast=forecast, end_at=end_at)

    def improve_waiting(self, lanes: list[Lane]) -> None:
        """The waiting tasks may end earlier than before: then later ends are compared with these.

        As long as the plan stays, the ends of all tasks of a machine move together: only its
        earliest lane is kept, and the ends are computed from it when they are needed.
        """
        plan = self._forecaster.plan(lanes)
        if plan is not self._plan or not self._earliest:
            self.settle()
            self._plan, self._earliest = plan, lanes
            self._image_encoding_s = self._schedule.image_encoding_s()
        else:
            both = zip(self._earliest, lanes, strict=True)
            self._earliest = [min(lane, known, key=_free_at) for known, lane in both]
        if lanes[0].preempting_s:  # these start at moments of their own
            self.settle()

    def settle(self) -> None:
        """Write the earliest ends of the waiting tasks into the schedule."""
        if self._plan is None or not self._earliest:
            return
        ends_at = self._schedule.column("end_at")
        drawn_at = np.empty(len(ends_at))
        for number, lane in enumerate(self._earliest):
            own_at = lane.at + lane.gpu_free_s + self._plan.walks[number].start_s[1:]
            encoder_free_at = lane.at + lane.encoder_free_s
            drawn_at[self._plan.own(number)] = np.maximum(own_at, encoder_free_at)
        first = self._earliest[0]
        for position, start_s in enumerate(first.preempting_s):
            work_s = self._schedule.durations(position).gpu_s / first.machine.speed
            drawn_at[position] = first.at + start_s + work_s
        np.minimum(ends_at, drawn_at + self._image_encoding_s, out=ends_at)
        self._earliest = []
        self._settled += 1

    def forget(self, task: Task) -> None:
        """A task has ended."""
        self._latest.pop(task.task_id, None)
        self._submitted.pop(task.task_id, None)

    def outcome(self, task: Task, machine: str, ended_at: float) -> Outcome | None:
        """Compares the forecast at submit with the true duration of a finished task. None: it
        was not made by this process, or was a guess, or the process was stopped meanwhile.

        Args:
            ended_at: unix seconds.
        """
        submitted = self._submitted.get(task.task_id)
        if submitted is None or self._gaps() != submitted.gaps:
            return None
        if submitted.forecast.confidence is Confidence.NONE:
            return None
        forecast, actual_s = submitted.forecast, self._monotonic() - submitted.at
        times = forecast.end_s, forecast.p90_s, actual_s
        return Outcome(task.priority, *times, task.params.model, machine, ended_at)

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
        ends_at = self._earliest_ends() if in_schedule else None
        newest_claimed = self._newest_claimed

        def was_overtaken(forecast: Forecast) -> bool:
            """Whether a task that joined later runs, or has run, before this one."""
            if newest_ahead is None:  # its sequence is not known yet, or it runs
                later = forecast.preempted or forecast.pos > baseline.forecast.pos
                return later or baseline.overtaken
            return max(int(newest_ahead[forecast.pos]), newest_claimed) > baseline.newest

        def seen(forecast: Forecast) -> Forecast:
            end_at = baseline.end_at
            if ends_at is not None:
                end_at = min(end_at, float(ends_at[forecast.pos]))
            late_s = at + forecast.end_s - end_at
            if late_s <= ROUNDING_S:
                return forecast
            if late_s <= max(STEADY_S, STEADY_SHARE * forecast.end_s):
                end_s = max(forecast.end_s - late_s, 0.0)
                return replace(forecast, end_s=end_s, start_s=min(forecast.start_s, end_s))
            reason = Reason.SLOWER
            if was_overtaken(forecast):
                reason = Reason.OVERTAKEN
            elif forecast.switches > baseline.forecast.switches:
                reason = Reason.MODEL_SWITCH
            return replace(forecast, reason=reason)

        return seen

    def _earliest_ends(self) -> Floats:
        """Of each task of the schedule, the earliest end that was forecast by improve_waiting(), a
        reading of the clock. Never changed: readers need no lock."""
        self.settle()
        state = self._schedule.version, self._settled
        if self._ends_at[0] != state:
            self._ends_at = state, self._schedule.column("end_at").copy()
        return self._ends_at[1]


def _free_at(lane: Lane) -> float:
    return lane.at + lane.gpu_free_s
