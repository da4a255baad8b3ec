"""When waiting tasks preempt the running one. policy.py has the rules.

A function of schedule, machines, timing model and time; it changes none of them. Not thread-safe:
the scheduler calls it under its lock.
"""

from collections.abc import Iterator, Sequence

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
        if any(other.paused_at is not None for other in run.machine.runs.values()):
            return False
        if not (waiting := self._waiting(run)):
            return False
        left_s = self._remaining.gpu_s(run, at)
        return self._starts_s(run, at, 0.0, left_s, waiting)[:1] == [0.0]

    def starts_s(
        self, machine: Machine, at: float, new: Task | None = None, place: Place | None = None
    ) -> list[float]:
        """Seconds until each of the first waiting tasks starts that preempt the running one.

        Args:
            at: now, a reading of the monotonic clock.
            new: a task that counts as if it waited at this place.
        """
        run = machine.last_on_gpu
        if run is None or not (waiting := self._waiting(run, new, place)):
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
        return self._starts_s(run, at, start_s, left_s, waiting)

    def _waiting(
        self, run: Run, new: Task | None = None, place: Place | None = None
    ) -> Iterator[tuple[float, float]] | None:
        """Of the first waiting tasks, up to the new one: GPU seconds, and those that this one must
        have had before it is preempted. None: the first may not preempt it at all."""
        if not self._policy.limits.preempt or len(self._machines) > 1 or run.machine.about:
            return None
        first = new if place and place.index == 0 else self._schedule.first()
        if first is None or not self._policy.may_preempt(first, run):
            return None
        return self._first(run, new, place)

    def _first(
        self, run: Run, new: Task | None, place: Place | None
    ) -> Iterator[tuple[float, float]]:
        for position, task in enumerate(self._schedule):
            if place and position == place.index:
                break
            work_s = self._schedule.durations(position).gpu_s / run.machine.speed
            tag = self._schedule.share(position).tag
            yield work_s, self._policy.preempts_after_s(task, run, work_s, tag)
        if new and place:
            work_s = self._estimates.durations(*new.stages).gpu_s / run.machine.speed
            yield work_s, self._policy.preempts_after_s(new, run, work_s, place.turn)

    def _starts_s(
        self,
        run: Run,
        at: float,
        start_s: float,
        left_s: float,
        waiting: Iterator[tuple[float, float]],
    ) -> list[float]:
        """Args:
        start_s: seconds until the running task is between two steps.
        left_s: GPU seconds that are left of it then.
        waiting: as of _waiting().
        """
        starts_s: list[float] = []
        used_s = run.gpu_s(at) + (start_s if run.paused_at is None else 0.0)
        for _, (work_s, after_s) in zip(range(run.pauses, MOST_PAUSES), waiting, strict=False):
            wait_s = max(after_s - used_s, 0.0)
            if not preemption_pays(work_s, left_s - wait_s):
                break
            start_s, left_s, used_s = start_s + wait_s, left_s - wait_s, used_s + wait_s
            starts_s.append(start_s)
            start_s += work_s
        return starts_s
