"""The forecasts that later ones are compared with: steadiness, reasons, accuracy.

Not thread-safe: the scheduler calls it under its lock.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from scheduler.forecast import Forecaster
from scheduler.lanes import Lane, Lanes
from scheduler.machines import Machine
from scheduler.plan import Plan
from scheduler.schedule import Schedule
from task import Forecast, Reason, Task, TaskStatus
from timing.corrections import Floats
from timing.spread import Outcome, Spread
from timing_model import Confidence

STEADY_S, STEADY_SHARE = 1.0, 0.02
"""A forecast that is later than the first one by no more than this is not reported."""

EXPECTED = 12
"""Number of tasks, those that run and the first waiting ones, whose outcomes are predicted."""
ROUNDING_S = 1e-6


class Baseline(NamedTuple):
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
    submitted: Forecast | None = None
    """The forecast at submit, whose quality is learned when the task is done; None: it is not."""
    overtaken: bool = False
    """Whether a task that joined later was claimed before it."""


class Steadiness(NamedTuple):
    """What readers see of forecasts, compared with earlier ones. It needs no lock."""

    at: float
    """When the forecasts were made: monotonic seconds."""
    newest_ahead: Floats
    """By position, the highest sequence among the waiting tasks before it."""
    ends_at: Floats
    """By position, the earliest end that was forecast so far, in monotonic seconds."""
    newest_claimed: int

    def seen(self, task: Task, baseline: Baseline, forecast: Forecast) -> Forecast:
        """Small increases over the baseline are not reported: the countdown continues. Larger ones
        come with the reason."""
        end_at, in_schedule = baseline.end_at, _in_schedule(task)
        if in_schedule:
            end_at = min(end_at, float(self.ends_at[forecast.pos]))
        late_s = self.at + forecast.end_s - end_at
        if late_s <= ROUNDING_S:
            return forecast
        if late_s <= max(STEADY_S, STEADY_SHARE * forecast.end_s):
            end_s = max(forecast.end_s - late_s, 0.0)
            return forecast._replace(end_s=end_s, start_s=min(forecast.start_s, end_s))
        reason = Reason.SLOWER
        if self._was_overtaken(in_schedule, baseline, forecast):
            reason = Reason.OVERTAKEN
        elif forecast.switches > baseline.forecast.switches:
            reason = Reason.MODEL_SWITCH
        return forecast._replace(reason=reason)

    def _was_overtaken(self, in_schedule: bool, baseline: Baseline, forecast: Forecast) -> bool:
        """Whether a task that joined later runs, or has run, before this one."""
        if not in_schedule:  # its sequence is not known yet, or it runs
            later = forecast.preempted or forecast.pos > baseline.forecast.pos
            return later or baseline.overtaken
        newest = max(int(self.newest_ahead[forecast.pos]), self.newest_claimed)
        return newest > baseline.newest


class Baselines:
    """The baselines of all unfinished tasks.

    Args:
        schedule: the waiting tasks. It calls settle() before they get other positions.
        monotonic: the clock, in seconds.
        gaps: how often the process was stopped so far.
    """

    def __init__(
        self,
        schedule: Schedule,
        forecaster: Forecaster,
        spread: Spread,
        monotonic: Callable[[], float],
        gaps: Callable[[], int],
    ) -> None:
        self._schedule = schedule
        self._forecaster, self._planner = forecaster, forecaster.planner
        self._spread = spread
        self._monotonic = monotonic
        self._gaps = gaps
        self._latest: dict[str, Baseline] = {}
        self._newest_claimed = 0
        self._plan: Plan | None = None
        self._earliest: list[Lane] = []
        """Of each machine of the plan, the lane that was free first since the latest settle()."""
        self._image_encoding_s = np.zeros(0)
        self._settled = 0
        self._ends_at: tuple[object, Floats] = (None, np.zeros(0))
        schedule.before_change = self.settle

    def begin(self, task: Task, newest: int, *, submitted: bool = False) -> Forecast:
        """A task begins to wait, or has got another place: later forecasts are compared with the
        one of now, which this returns.

        Args:
            newest: highest sequence of all tasks so far.
            submitted: learn() compares the forecast with the truth.
        """
        lanes = self._forecaster.lanes()
        self.expect(lanes)
        forecast = self._forecaster.of(task, lanes)
        self.set(task, forecast, newest, submitted=submitted)
        return forecast

    def set(self, task: Task, forecast: Forecast, newest: int, *, submitted: bool = False) -> None:
        """As begin(), with a forecast of now that is known already."""
        at, learned = self._monotonic(), forecast if submitted else None
        end_at = at + forecast.end_s
        baseline = Baseline(at, forecast, newest, self._gaps(), end_at, learned)
        self._latest[task.task_id] = baseline

    def claimed(self, task: Task) -> None:
        """A task is about to leave the schedule for a machine."""
        self.settle()
        baseline, position = self._latest[task.task_id], self._schedule.position(task)
        self._latest[task.task_id] = baseline._replace(
            end_at=min(baseline.end_at, float(self._schedule.column("end_at")[position])),
            overtaken=baseline.overtaken or self._newest_claimed > baseline.newest,
        )
        self._newest_claimed = max(self._newest_claimed, task.sequence)

    def improve(self, task: Task, forecast: Forecast, at: float) -> None:
        """An earlier forecast, made at this moment, becomes the baseline."""
        baseline, end_at = self._latest[task.task_id], at + forecast.end_s
        if end_at < baseline.end_at:
            self._latest[task.task_id] = baseline._replace(forecast=forecast, end_at=end_at)

    def improve_waiting(self, lanes: Lanes | None = None, only: Machine | None = None) -> None:
        """The waiting tasks may end earlier than before: then later ends are compared with these.

        As long as plan and pace stay, the ends of all tasks of a machine move together: only its
        earliest lane is kept, and the ends are computed from it when they are needed.

        Args:
            lanes: as of now; None: they are computed.
            only: the one machine whose tasks have changed; None: it may be any of them.
        """
        if not len(self._schedule):
            return
        lanes = lanes or self._forecaster.lanes()
        plan = self._planner.plan(lanes)
        if plan is not self._plan or not self._earliest or self._pace_differs(lanes, only):
            self.settle()
            self._plan, self._earliest = plan, list(lanes)
            self._image_encoding_s = self._schedule.image_encoding_s()
        else:
            for number, known in enumerate(self._earliest):
                if only in (None, known.machine):
                    self._earliest[number] = min(lanes[number], known, key=_free_at)
        if len(lanes) == 1 and lanes[0].preempting_s:  # these start at moments of their own
            self.settle()

    def _pace_differs(self, lanes: Lanes, only: Machine | None) -> bool:
        """Whether a machine has another pace than when the plan was made. Args: as above; the plan
        is the same, and therefore the machines are."""
        return any(
            lanes[number].pace != known.pace
            for number, known in enumerate(self._earliest)
            if only in (None, known.machine)
        )

    def settle(self) -> None:
        """Write the earliest ends of the waiting tasks into the schedule."""
        if self._plan is None or not self._earliest:
            return
        ends_at = self._schedule.column("end_at")
        own_ends_at = self._forecast_ends_at(self._plan, self._earliest, self._image_encoding_s)
        np.minimum(ends_at, own_ends_at, out=ends_at)
        self._earliest = []
        self._settled += 1

    def forget(self, task: Task) -> None:
        """A task has ended."""
        self._latest.pop(task.task_id, None)

    def learn(self, task: Task, machine: str, ended_at: float) -> Outcome | None:
        """Learn how the forecast at submit compares with the true duration of a finished task.
        Returns None if it was not made by this process, or was a guess, or the process was stopped
        meanwhile: nothing is learned then.

        Args:
            ended_at: unix seconds.
        """
        baseline = self._latest[task.task_id]
        forecast = self._to_learn(baseline)
        if forecast is None:
            return None
        times = forecast.end_s, forecast.p90_s, self._monotonic() - baseline.at
        outcome = Outcome(task.priority, *times, task.params.model, machine, ended_at)
        self._spread.learn(outcome)
        return outcome

    def expect(self, lanes: Lanes) -> None:
        """Predict the outcomes of the first EXPECTED tasks: whether each is forecast to take longer
        than its p90 at submit. Those that will not be learned are left out.

        Args:
            lanes: as of now.
        """
        plan, image_encoding_s = self._planner.plan(lanes), self._schedule.image_encoding_s()
        ends_at = self._forecast_ends_at(plan, lanes, image_encoding_s)[:EXPECTED].tolist()
        running = [
            (r.run.task, lanes.at + r.forecast.end_s) for lane in lanes for r in lane.running
        ]
        late = defaultdict[int, list[bool]](list)
        for task, end_at in [*running, *zip(self._schedule, ends_at, strict=False)][:EXPECTED]:
            baseline = self._latest.get(task.task_id)
            if baseline and (submitted := self._to_learn(baseline)):
                late[task.priority].append(end_at > baseline.at + submitted.p90_s)
        self._spread.expect(dict(late))

    def _to_learn(self, baseline: Baseline) -> Forecast | None:
        """The forecast at submit, if its outcome is to be learned: it was made by this process and
        is no guess, and the process was not stopped since."""
        forecast = baseline.submitted
        if forecast is None or self._gaps() != baseline.gaps:
            return None
        return None if forecast.confidence is Confidence.NONE else forecast

    def of(self, task: Task) -> Baseline:
        return self._latest[task.task_id]

    def steadiness(self, at: float) -> Steadiness:
        """Makes what readers see of the forecasts of this moment."""
        newest_ahead, ends_at = self._schedule.newest_ahead, self._earliest_ends()
        return Steadiness(at, newest_ahead, ends_at, self._newest_claimed)

    def _forecast_ends_at(
        self, plan: Plan, lanes: Sequence[Lane], image_encoding_s: Floats
    ) -> Floats:
        """Of each task of the schedule, the end as it is forecast, in monotonic seconds.

        Args:
            lanes: of each machine of the plan.
            image_encoding_s: of each task of the schedule.
        """
        drawn_at = np.empty(len(image_encoding_s))
        for number, lane in enumerate(lanes):
            starts_s = plan.walks[number].starts_s(lane.pace)
            own_at = lane.at + lane.gpu_free_s + starts_s[1:]
            drawn_at[plan.own(number)] = np.maximum(own_at, lane.at + lane.encoder_free_s)
        first = lanes[0]
        for position, start_s in enumerate(first.preempting_s):
            work_s = first.work_s(self._schedule.durations(position))
            drawn_at[position] = first.at + start_s + work_s
        ends_at: Floats = drawn_at + image_encoding_s
        return ends_at

    def _earliest_ends(self) -> Floats:
        """Of each task of the schedule, the earliest end that was forecast by improve_waiting(), a
        reading of the clock. Never changed: readers need no lock."""
        self.settle()
        state = self._schedule.version, self._settled
        if self._ends_at[0] != state:
            self._ends_at = state, self._schedule.column("end_at").copy()
        return self._ends_at[1]


def _in_schedule(task: Task) -> bool:
    pending = task.waits_for_download or task.waits_for_prompt
    return task.status is TaskStatus.WAITING and not pending


def _free_at(lane: Lane) -> float:
    return lane.at + lane.gpu_free_s
