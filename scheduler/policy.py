"""The order of the waiting tasks. The only module that knows why one task goes before another.

1. Higher priority first. A normal task that urgent ones have overtaken for `max_overtaken_s` counts
   as urgent (ageing).
2. Among tasks of one priority it is the turn of the client that has had the least GPU time
   (fair_share.py); tasks of one client run first come, first served.
3. Affinity: a task whose weights another waiting task, or the machine, already has may join right
   behind that one, so that clients with different models do not make the machine load for each
   task. Each task that it overtakes is delayed by no more than `max_delay_s` in all.
4. Preemption: between two steps the first waiting task may pause the running one and be drawn
   before the rest of it. All of this must hold:
   - it is urgent and the running one is not, or its client is far below its share: its level is no
     lower, and the client of the running task has had more GPU seconds per weight than its own
     client, by PAYS times what the task will add to that;
   - it uses the load spec with which the running task is being drawn, and no other one;
   - it pays: without it the waiting task would wait LEAST_LEFT_S at least, and PAYS times as long
     as it delays the running one;
   - no task is paused already, and the running one was paused less than MOST_PAUSES times.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from scheduler.fair_share import FairShare
from scheduler.limits import QueueLimits
from scheduler.machines import Run
from scheduler.resident import Resident
from scheduler.schedule import Schedule
from task import Task

Key = tuple[int, bool, float, float, float]
NORMAL, URGENT = 0, 1
PAYS = 2.0
LEAST_LEFT_S = 5.0
MOST_PAUSES = 3
FRONT = -1.0
"""Turn of a task that runs before all others of its level. One that an operator has moved to the
front also has a negative group; the one that was moved last has the lowest."""


def key(task: Task) -> Key:
    """Sort key of the schedule: tasks with smaller keys run first.

    In this order: higher level; released tasks, which have run already; the turn; the group; the
    sequence, which counts the tasks that joined the schedule. A task's turn is its tag of
    fair_share.py, its group its sequence, or both are those of the task that it joined by affinity.
    """
    return -level(task), task.attempt == task.retried_after, task.turn, task.group, task.sequence


def level(task: Task) -> int:
    """Its priority, or that of urgent tasks once it has been overtaken for too long or was moved to
    the front."""
    return max(task.priority, URGENT) if task.aged or task.group < 0 else task.priority


def preemption_pays(work_s: float, left_s: float) -> bool:
    """Whether a task of work_s GPU seconds may preempt one of which left_s are left."""
    return left_s >= max(LEAST_LEFT_S, PAYS * work_s)


@dataclass(frozen=True)
class Place:
    """Where a task joins the schedule."""

    index: int
    """Position among the waiting tasks."""
    seconds: float
    """Forecast GPU seconds of the task."""
    turn: float
    group: int | None = None
    """Sequence of the task whose group it joins; None: a group of its own."""
    delays_s: np.ndarray | None = None
    """Seconds by which it delays each task that it overtakes by affinity, from `index` on."""
    version: int = -1
    """Of the schedule for which the place was found."""

    def give(self, task: Task, sequence: int) -> None:
        """A task gets this place, before it joins."""
        task.sequence, task.turn = sequence, self.turn
        task.group = sequence if self.group is None else self.group


class Policy:
    """Not thread-safe: the scheduler calls it under its lock. Tasks are those of `schedule`."""

    def __init__(self, schedule: Schedule, limits: QueueLimits) -> None:
        self.limits = limits
        self._schedule = schedule
        self._shares = FairShare()
        self._stale = False
        """Whether tags have changed while tasks of only one user waited."""

    def place(self, task: Task, seconds: float, resident: Resident) -> Place:
        """Where a new task runs that joins now.

        Args:
            seconds: forecast GPU seconds of the task.
            resident: what is in memory when the first waiting task starts.
        """
        schedule, shares = self._schedule, self._shares
        changed = shares.reweigh(task.owner)
        alone = shares.waits_alone(task.owner)
        if changed or (self._stale and not alone):
            self._give_turns()
        turn = shares.preview(task.owner, lambda: schedule.waiting, task.priority)
        begin, end = schedule.level(task.priority)
        if alone:
            own, turn = end, max(turn, schedule[end - 1].turn if end > begin else turn)
        else:
            own = schedule.position_of((-task.priority, True, turn, inf, inf))
        joined = self._by_affinity(task, seconds, begin, own, resident)
        return joined or Place(own, seconds, turn, version=schedule.version)

    def join(self, task: Task, place: Place) -> None:
        """A task joins the schedule at the place that it was given."""
        if place.delays_s is not None and place.version == self._schedule.version:
            begin, budgets_s = place.index, self._schedule.column("delay_budget_s")
            budgets_s[begin : begin + len(place.delays_s)] -= place.delays_s
        share, changed = self._shares.join(place.seconds, task.owner, level(task))
        self._schedule.add(task, share, delay_budget_s=self.limits.max_delay_s)
        self._tags_changed(changed or self._stale)

    def restore(self, tasks: Sequence[tuple[Task, float]]) -> None:
        """Tasks and their seconds from before the start join, in the order of their sequences."""
        present = {task.sequence for task, _ in tasks}
        for task, seconds in tasks:
            task.turn = 0.0 if task.group in present else FRONT
            share, _ = self._shares.join(seconds, task.owner, level(task))
            self._schedule.add(task, share, delay_budget_s=self.limits.max_delay_s)
        self._give_turns()
        for first in {level(task) for task, _ in tasks}:
            # The first one ran, or was the next one: no task may overtake it.
            self._schedule.column("delay_budget_s")[self._schedule.level(first)[0]] = 0.0

    def start(self, task: Task, seconds: float) -> None:
        """A waiting task is claimed."""
        share = self._schedule.remove(task, claimed=True)
        self._tags_changed(self._shares.start(task.task_id, share, level(task)))
        if level(task) >= URGENT:
            self._age(task, seconds)

    def release(self, task: Task, used_s: float, left_s: float) -> None:
        """A running task waits again, before the others of its level that have not run yet.

        Args:
            used_s: seconds that it was on the GPU.
            left_s: forecast GPU seconds of what is left of it.
        """
        share = self._shares.release(task.task_id, used_s, left_s, level(task))
        self._schedule.add(task, share)
        self._tags_changed()

    def end(self, task: Task, seconds: float) -> None:
        """A running task has ended, after so many seconds on the GPU."""
        self._tags_changed(self._shares.end(task.task_id, seconds))

    @property
    def front_group(self) -> int:
        """The group of a task that is moved to the front now."""
        return int(self._schedule.column("group").min(initial=0.0)) - 1

    def move_to_front(self, task: Task, *, sequence: int, group: int) -> None:
        """A waiting task runs next, before urgent ones, too; only released tasks run before it.

        Args:
            group: front_group.
        """
        share, was = self._schedule.remove(task), level(task)
        task.turn, task.sequence, task.group = FRONT, sequence, group
        self._shares.change_level(share, was, level(task))
        self._schedule.add(task, share)
        self._tags_changed()

    def waiting_of(self, name: str) -> list[tuple[str, float]]:
        """The waiting tasks of a client in the order in which they run, with forecast seconds."""
        client, seconds = self._schedule.column("client"), self._schedule.column("seconds")
        own = np.flatnonzero(client == self._shares.number_of(name)).tolist()
        return [(self._schedule[position].task_id, float(seconds[position])) for position in own]

    def leave(self, task: Task) -> None:
        """A waiting task has ended."""
        share = self._schedule.remove(task)
        self._tags_changed(self._shares.leave(share, level(task)))

    def may_preempt(self, task: Task, run: Run) -> bool:
        """Whether a waiting task may preempt a running one, at some time."""
        running, spec = run.task, run.stage.load_spec
        if not self.limits.preempt or level(task) < level(running) or spec.model.makes:
            return False
        if task.owner.name == running.owner.name and not level(task) >= URGENT > level(running):
            return False
        return all(stage.load_spec.same_as(spec) for stage in task.stages)

    def preempts_after_s(self, task: Task, run: Run, work_s: float, tag: float) -> float:
        """GPU seconds that a running task must have had before this waiting one may preempt it, if
        that pays (preemption_pays); inf: it may not.

        Args:
            work_s: forecast GPU seconds of the waiting task.
            tag: its tag; its turn, if it has not joined yet.
        """
        running = run.task
        if not self.may_preempt(task, run):
            return inf
        if level(task) >= URGENT > level(running):
            return 0.0
        had = max(tag, self._shares.had(task.owner))  # tags may be older than the latest measured
        ahead = PAYS * work_s / task.owner.weight
        return self._shares.had_after_s(running.task_id, had + ahead)

    # -- private ----------------------------------------------------------------------------------

    def _by_affinity(
        self, task: Task, seconds: float, begin: int, own: int, resident: Resident
    ) -> Place | None:
        """The place behind others with its weights, if that is before its own.

        Args:
            seconds: forecast GPU seconds of the task.
            begin: position of the first task of its level.
            own: its own position.
        """
        schedule = self._schedule
        if self.limits.max_delay_s <= 0.0 or begin == own:
            return None
        spec = task.stages[0].load_spec.key
        before = schedule.last_with(spec, begin, own)
        if before is not None:
            index, turn = before + 1, schedule[before].turn
            group = schedule[before].group
        elif begin == 0 and spec in resident.keys:
            index, turn, group = begin, FRONT, 0
        else:
            return None
        if index == own or spec in schedule.walk(resident).resident_before(own).keys:
            return None
        if schedule.position_of((-task.priority, True, turn, group, inf)) != index:
            return None  # others of this group, or released tasks, would run before it
        delays_s = schedule.delays_s(task, index, resident)[: own - index]
        if np.any(delays_s > schedule.column("delay_budget_s")[index:own]):
            return None
        return Place(index, seconds, turn, group, delays_s, schedule.version)

    def _age(self, started: Task, seconds: float) -> None:
        """An urgent task was started: those that it has overtaken grow older."""
        schedule = self._schedule
        begin, end = schedule.level(NORMAL)
        overtaken = np.flatnonzero(schedule.column("sequence")[begin:end] < started.sequence)
        changed = False
        for position in (begin + overtaken).tolist():
            task = schedule[position]
            task.overtaken_s += seconds
            if task.overtaken_s > self.limits.max_overtaken_s:
                task.aged = changed = True
                self._shares.change_level(schedule.share(position), NORMAL, URGENT)
                schedule.set_level(position)
        if changed:
            schedule.sort()
            self._tags_changed()

    def _tags_changed(self, changed: bool = True) -> None:
        """Order the schedule again, if tasks of several users wait."""
        if changed and self._shares.several_wait:
            self._give_turns()
        elif changed:
            self._stale = True

    def _give_turns(self) -> None:
        """Each task gets its turn, and the schedule is ordered by them: that of its tag, or of the
        first task of its group if that still waits."""
        schedule, self._stale = self._schedule, False
        tags, turns = self._shares.tags(schedule.waiting), schedule.column("turn").copy()
        group, sequence = schedule.column("group"), schedule.column("sequence")
        is_first = group == sequence
        turns[is_first] = tags[is_first]
        if not is_first.all():
            firsts = np.flatnonzero(is_first)
            firsts = firsts[np.argsort(sequence[firsts])]
            others = np.flatnonzero(~is_first & np.isin(group, sequence[firsts]))
            found = np.searchsorted(sequence[firsts], group[others])
            turns[others] = tags[firsts[found]]
        schedule.set_turns(turns, tags)
