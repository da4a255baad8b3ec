"""When waiting tasks preempt the running one. policy.py has the rules.

A function of schedule, machines, timing model and time; it changes none of them. Not thread-safe:
the scheduler calls it under its lock.
"""

from collections.abc import Iterator, Sequence
from math import inf

from scheduler.estimates import Estimates
from scheduler.machines import Machine, Run
from scheduler.policy import MOST_PAUSES, Place, Policy, preemption_pays
from scheduler.remaining import Remaining
from scheduler.schedule import Schedule
from task import Phase, Task


class Preemption:
    """Only on the server's own machine, while it is the only one: with several, a waiting task
    takes the next free one, and a worker elsewhere does not wait for an answer to its reports."""

    def __init__(
        self,
        schedule: Schedule,
        machines: Sequence[Machine],
        policy: Policy,
        estimates: Estimates,
        remaining: Remaining,
    ) -> None:
        self._schedule = schedule
        self._machines = machines
        self._policy = policy
        self._estimates = estimates
        self._remaining = remaining

    def is_due(self, run: Run, at: float) -> bool:
        """Whether the first waiting task preempts this one, which has reported at this moment."""
        if run.progress.phase is not Phase.DENOISING or run.progress.steps_done == 0:
            return False
        if run.machine.paused or not self._is_possible(run):
            return False
        left_s = self._remaining.gpu_s(run, at)
        return self._starts_s(run, at, 0.0, left_s, self._first(run))[:1] == [0.0]

    def starts_s(
        self, machine: Machine, at: float, new: Task | None = None, place: Place | None = None
    ) -> list[float]:
        """Seconds until each of the first waiting tasks starts that preempt the running one.

        Args:
            at: now, a reading of the monotonic clock.
            new: a task that counts as if it waited at this place.
        """
        run = machine.last_on_gpu
        if run is None or not self._is_possible(run, new, place):
            return []
        left_s, start_s = self._remaining.gpu_s(run, at), 0.0
        for other in machine.runs.values():
            start_s += self._remaining.gpu_s(other, at) if other is not run else 0.0
        start_s += self._remaining.before_runs_s(machine, at)
        if run.paused_at is None:
            after_s = self._remaining.after_next_step_s(run, at)
            if after_s is None:
                return []
            start_s, left_s = start_s + left_s - after_s, after_s
        return self._starts_s(run, at, start_s, left_s, self._first(run, new, place))

    def _is_possible(self, run: Run, new: Task | None = None, place: Place | None = None) -> bool:
        """Whether the first waiting task may preempt this one at all."""
        if not self._policy.limits.preempt or len(self._machines) > 1 or run.machine.about:
            return False
        first = next(self._first(run, new, place), None)
        return first is not None and self._policy.preempts_after_s(first[0], run, *first[1:]) < inf

    def _first(
        self, run: Run, new: Task | None = None, place: Place | None = None
    ) -> Iterator[tuple[Task, float, float]]:
        """The first waiting tasks, up to the new one: each with its GPU seconds and its tag, or
        the turn of the new one."""
        for position, task in enumerate(self._schedule):
            if new and place and position == place.index:
                break
            work_s = self._schedule.durations(position).gpu_s / run.machine.speed
            yield task, work_s, self._policy.tag(position)
        if new and place:
            work_s = self._estimates.durations(*new.stages).gpu_s
            yield new, work_s / run.machine.speed, place.turn

    def _starts_s(
        self,
        run: Run,
        at: float,
        start_s: float,
        left_s: float,
        waiting: Iterator[tuple[Task, float, float]],
    ) -> list[float]:
        """Args:
        start_s: seconds until the running task is between two steps.
        left_s: GPU seconds that are left of it then.
        """
        starts_s: list[float] = []
        used_s = run.gpu_s(at) + (start_s if run.paused_at is None else 0.0)
        for (task, work_s, tag), _ in zip(waiting, range(run.pauses, MOST_PAUSES), strict=False):
            wait_s = max(self._policy.preempts_after_s(task, run, work_s, tag) - used_s, 0.0)
            if not preemption_pays(work_s, left_s - wait_s):
                break
            start_s, left_s, used_s = start_s + wait_s, left_s - wait_s, used_s + wait_s
            starts_s.append(start_s)
            start_s += work_s
        return starts_s
