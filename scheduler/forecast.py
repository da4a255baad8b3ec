"""When each task will start and end.

A function of the schedule, the machines, the timing model and the time; it changes none of them.
plan.py says which machine a waiting task runs on, and what is ahead of it there.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import exp
from typing import NamedTuple

from models.model_catalog import LoadSpec
from scheduler.estimates import Estimates
from scheduler.lanes import Lane, Lanes, RunForecast
from scheduler.machines import Machine, Run
from scheduler.pending import Pending, PendingTasks
from scheduler.plan import Plan, Planner
from scheduler.policy import Policy
from scheduler.preemption import Preemption
from scheduler.remaining import Remaining
from scheduler.resident import Resident
from scheduler.schedule import Schedule
from task import Forecast, Task
from timing.spread import Spread
from timing_model import PRIOR_P90, Confidence, Durations

P90_SIGMAS = 1.2816
"""The 90 % quantile of the standard normal distribution."""
MOST_COMPARED = 2_000
"""Pairs of a task and a machine that next_tasks() compares; the rest goes by the order alone."""
P90_OF_DOWNLOADS = 1.5
"""A download's 90 % quantile as a multiple of its forecast: download times vary widely."""


class _Start(NamedTuple):
    """Where and when a waiting task is expected to start. Seconds from now."""

    lane: Lane
    start_s: float
    load_s: float = 0.0
    loads: int = 0
    """Number of loads on that machine up to this task, its own included."""
    encoder_free_s: float = 0.0

    def drawn_s(self, durations: Durations) -> float:
        """Seconds until its last image is drawn."""
        return self.start_s + self.load_s + self.lane.work_s(durations)


class Forecaster:
    """Not thread-safe: the scheduler calls it under its lock.

    Args:
        machines: one at least.
        monotonic: the clock, in seconds.
    """

    def __init__(
        self,
        *,
        schedule: Schedule,
        machines: Sequence[Machine],
        policy: Policy,
        estimates: Estimates,
        spread: Spread,
        pending: PendingTasks,
        monotonic: Callable[[], float],
    ) -> None:
        self._schedule = schedule
        self._machines = machines
        self._policy = policy
        self._estimates = estimates
        self.planner = Planner(schedule, machines, estimates)
        self.remaining = Remaining(estimates)
        self.preemption = Preemption(schedule, machines, policy, estimates, self.remaining)
        self._spread = spread
        self._pending = pending
        self._monotonic = monotonic

    def of(self, task: Task, lanes: Lanes | None = None) -> Forecast:
        """Returns the forecast of a waiting or running task.

        Args:
            lanes: lanes(), as of now; None: they are computed.
        """
        lanes = lanes or self.lanes()
        for machine in self._machines:
            if (run := machine.runs.get(task.task_id)) is not None:
                return lanes.of(machine).of(run).forecast
        if task in self._pending:
            return next(f for pending, f in self._pending_forecasts(lanes) if pending is task)
        position = self._schedule.position(task)
        durations = self._schedule.durations(position)
        factor = self._p90_factor(task, durations)
        return _forecast_at(lanes, self.planner.plan(lanes), position, durations, factor)

    def of_new(self, task: Task, missing: tuple[LoadSpec, ...] = ()) -> Forecast:
        """Returns the forecast of a task as if it were submitted now.

        Args:
            missing: the weights that it would have to wait for.
        """
        lanes = self.lanes()
        if missing or task.params.expand:
            pending = self._pending.entry(task, missing, *self.load_and_work_s(task))
            return next(f for other, f in self._pending_forecasts(lanes, pending) if other is task)
        durations = self._estimates.durations(*task.stages)
        place = self._policy.place(task, durations.gpu_s, self.resident_at_start())
        position = place.index
        durations = self._schedule.durations_of(task, position)
        starts_s = self.preemption.starts_s(self._machines[0], lanes.at, task, place)
        if len(starts_s) > position:
            start = _Start(lanes[0], starts_s[position])
        else:
            starts = self._starts(task, position, lanes)
            start = min(starts, key=lambda start: start.drawn_s(durations))
        return _forecast(position, start, durations, self._p90_factor(task, durations))

    def in_order(
        self,
        lanes: Lanes,
        offset: int,
        limit: int,
        wanted: Callable[[Task], bool] | None = None,
    ) -> tuple[list[tuple[Task, Callable[[], Forecast]]], int]:
        """The tasks in the order in which they run, those that wait for a download last.

        Each comes with a function that computes its forecast. It needs no lock.

        Args:
            lanes: lanes(), as of now.
            wanted: which tasks count; None: all.

        Returns:
            Up to `limit` of them after the first `offset`, and how many there are in all.
        """
        running = [
            (run.task, partial(_same, forecast))
            for lane in lanes
            for run, forecast, _ in lane.running
            if wanted is None or wanted(run.task)
        ]
        positions: Sequence[int] = range(len(self._schedule))
        if wanted:
            positions = [place for place, task in enumerate(self._schedule) if wanted(task)]
        entries: list[tuple[Task, Callable[[], Forecast]]] = [*running[offset : offset + limit]]
        first = max(offset - len(running), 0)
        entries += self._waiting_at(positions[first : first + limit - len(entries)], lanes)
        length = len(running) + len(positions)
        if wanted or len(entries) < limit:
            pending = [
                (task, partial(_same, forecast))
                for task, forecast in self._pending_forecasts(lanes)
                if wanted is None or wanted(task)
            ]
            passed = max(offset - length, 0)
            entries += pending[passed : passed + limit - len(entries)]
            return entries, length + len(pending)
        return entries, length + len(self._pending)

    def _waiting_at(
        self, positions: Sequence[int], lanes: Lanes
    ) -> Iterator[tuple[Task, Callable[[], Forecast]]]:
        plan, schedule = self.planner.plan(lanes), self._schedule
        lanes.free_s()  # all are computed: the functions need no lock
        for position in positions:
            task, durations = schedule[position], schedule.durations(position)
            factor = self._p90_factor(task, durations)
            yield task, partial(_forecast_at, lanes, plan, position, durations, factor)

    def next_tasks(self) -> dict[str, Task]:
        """By name of the machine, the waiting task that it runs next, as the plan says. Beyond the
        first MOST_COMPARED, an idle machine takes the first task that it may run."""
        machines, schedule = self._machines, self._schedule
        if len(machines) == 1 and machines[0].allows is None:
            first = schedule.first()
            return {machines[0].name: first} if first and machines[0].takes_tasks else {}
        found: dict[str, Task] = {}
        assigned = self.planner.assigned(self.lanes().free_s())
        most = MOST_COMPARED // len(machines)
        for position, number in zip(range(min(most, len(schedule))), assigned, strict=False):
            if machines[number].can_run(schedule[position]):
                found.setdefault(machines[number].name, schedule[position])
            if len(found) == len(machines):
                return found
        idle = [m for m in machines if m.name not in found and m.takes_tasks and not m.runs]
        for position in range(most, len(schedule) if idle else 0):
            task = schedule[position]
            if machine := next((m for m in idle if m.can_run(task)), None):
                found[machine.name] = task
                idle.remove(machine)
                if not idle:
                    break
        return found

    def continue_plan(self) -> bool:
        """Assign further waiting tasks to machines again. Returns whether more are left
        (Planner.continue_pass)."""
        return self.planner.continue_pass(self.lanes())

    def next_start_s(self) -> float:
        """Seconds until a GPU is free for the first waiting task."""
        free_s = min(self.lanes().free_s())
        return free_s if len(self._schedule) else max(free_s, self._pending.first_ready_s())

    def resident_at_start(self) -> Resident:
        """What is in memory where the first waiting task starts."""
        machine = self._machines[0]
        if len(self._machines) > 1:
            free_s = self.lanes().free_s()
            machine = self._machines[free_s.index(min(free_s))]
        return machine.resident_after_runs()

    def load_and_work_s(self, task: Task) -> tuple[float, float]:
        """Seconds of loading everything that a task needs, and of its own work."""
        specs = {stage.load_spec.key: stage.load_spec for stage in task.stages}.values()
        return self._estimates.loads_s(specs), self._estimates.durations(*task.stages).total_s

    def share_done(self, run: Run) -> float:
        """Share of a running task's time that is over."""
        reported_at = run.reported_at
        return run.shown_share.after(
            run.until(self._monotonic()) - reported_at,
            reported_at - run.claimed_at,
            lambda elapsed_s: self.remaining.left_s(run, reported_at + elapsed_s),
        )

    # -- running tasks --------------------------------------------------------------------------

    def lanes(self, at: float | None = None) -> Lanes:
        """The future of each machine.

        Args:
            at: a reading of the clock, of this moment; None: it is read.
        """
        at = self._monotonic() if at is None else at
        return Lanes(self._machines, at, self._lane)

    def _lane(self, machine: Machine, at: float) -> Lane:
        load_s = gpu_free_s = self.remaining.before_runs_s(machine, at)
        encoder_free_s = 0.0
        running = []
        preempting_s = self.preemption.starts_s(machine, at)
        preempting = range(len(preempting_s))
        preempting_work_s = sum(self._schedule.durations(n).gpu_s for n in preempting)
        last = machine.last_on_gpu
        for run in machine.in_order:
            durations = self._estimates.durations(*run.task.stages)
            encoding_s, gpu_s = self.remaining.encoding_s(run, at), self.remaining.gpu_s(run, at)
            gpu_free_s += gpu_s
            drawn_s = gpu_free_s + (preempting_work_s / machine.speed if run is last else 0.0)
            encoder_free_s = max(encoder_free_s, drawn_s) + encoding_s
            p90_s = encoder_free_s * exp(P90_SIGMAS * durations.sigma)
            preempted = run.pauses > 0 or (run is last and bool(preempting_s))
            forecast = Forecast(
                0, 0.0, encoder_free_s, p90_s, durations.confidence, preempted=preempted
            )
            left_s = encoding_s + (load_s + gpu_s if run.on_gpu else 0.0)
            running.append(RunForecast(run, forecast, left_s))
        pace = self.remaining.pace(machine)
        return Lane(machine, at, gpu_free_s, encoder_free_s, running, preempting_s, pace)

    # -- waiting tasks --------------------------------------------------------------------------

    def _starts(self, task: Task, position: int, lanes: Lanes) -> Iterator[_Start]:
        """Of a task that may join at this position, on each machine."""
        plan = self.planner.plan(lanes)
        for number, lane in enumerate(lanes):
            walk, index = plan.walks[number], plan.index(number, position)
            needed, _ = walk.resident_before(index).loads(task.stages)
            load_s, loads = self._estimates.loads_s(needed), walk.loads_before(index) + len(needed)
            start_s = lane.start_s(walk, index)
            yield _Start(lane, start_s, load_s, loads, lane.encoder_free_s)

    def _pending_forecasts(self, lanes: Lanes, *new: Pending) -> Iterator[tuple[Task, Forecast]]:
        """Of the tasks that wait for a download or their prompt, in the order in which they will
        run; among them perhaps a new one."""
        for wait in self._pending.waits(lambda priority: self._joining_s(priority, lanes), *new):
            known = self._pending.downloads.pace_known or not wait.downloads
            p90_s = wait.end_s * (P90_OF_DOWNLOADS if known else PRIOR_P90)
            confidence = Confidence.LOW if known else Confidence.NONE
            _, end = self._schedule.level(wait.task.priority)
            yield wait.task, Forecast(end + wait.pos, wait.start_s, wait.end_s, p90_s, confidence)

    def _joining_s(self, priority: int, lanes: Lanes) -> float:
        """Seconds until a task would start that joins its level now, as the last one."""
        _, end = self._schedule.level(priority)
        plan = self.planner.plan(lanes)
        return min(
            lane.start_s(plan.walks[number], plan.index(number, end))
            for number, lane in enumerate(lanes)
        )

    def _p90_factor(self, task: Task, durations: Durations) -> float:
        """Returns the 90 % quantile of a forecast as a multiple of it."""
        if durations.confidence is Confidence.NONE:
            return PRIOR_P90
        return self._spread.p90_factor(task.priority)


def _forecast_at(
    lanes: Lanes, plan: Plan, position: int, durations: Durations, p90_factor: float
) -> Forecast:
    """Of the waiting task at this position."""
    number = plan.machine(position)
    lane = lanes[number]
    if position < len(lane.preempting_s):
        start = _Start(lane, lane.preempting_s[position])
        return _forecast(position, start, durations, p90_factor)
    walk, index = plan.walks[number], plan.index(number, position)
    start = _Start(
        lane,
        lane.start_s(walk, index),
        float(walk.load_s[index]),
        walk.loads_before(index + 1),
        lane.encoder_free_s,
    )
    return _forecast(position, start, durations, p90_factor)


def _forecast(position: int, start: _Start, durations: Durations, p90_factor: float) -> Forecast:
    """Of a waiting task. Its image encoding also waits for the encoder to end the running tasks."""
    end_s = max(start.drawn_s(durations), start.encoder_free_s) + durations.image_encoding_s
    return Forecast(
        pos=position,
        start_s=start.start_s,
        end_s=end_s,
        p90_s=p90_factor * end_s,
        confidence=durations.confidence,
        switches=start.loads,
    )


def _same(forecast: Forecast) -> Forecast:
    return forecast
