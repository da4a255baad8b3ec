"""The order of the waiting tasks. The only module that knows why one task goes before another.

1. Higher priority first. A normal task that urgent ones have overtaken for `max_overtaken_s` counts
   as urgent (ageing).
2. Among tasks of one priority it is the turn of the client that has had the least GPU time
   (fair_share.py); tasks of one client run first come, first served.
3. Affinity: a task whose weights another waiting task, or the machine, already has may join right
   behind that one, so that clients with different models do not make the machine load for each
   task. Each task that it overtakes is delayed by no more than `max_delay_s` in all.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf

import numpy as np

from scheduler.fair_share import FairShare
from scheduler.machines import Resident
from scheduler.schedule import Schedule
from task import Task

Key = tuple[int, bool, float, float, float]
NORMAL, URGENT = 0, 1
FRONT = -1.0
"""Turn of a task that runs before all others of its level. One that an operator has moved to the
front also has a negative group; the one that was moved last has the lowest."""


def key(task: Task) -> Key:
    """Sort key of the schedule: tasks with smaller keys run first.

    In this order: higher level; released tasks, which have run already; the turn; the group; the
    sequence, which counts the tasks that joined the schedule. A task's turn is its tag of
    fair_share.py, its group its sequence, or both are those of the task that it joined by affinity.
    """
    return -level(task), task.attempt == 0, task.turn, task.group, task.sequence


def level(task: Task) -> int:
    """Its priority, or that of urgent tasks once it has been overtaken for too long or was moved to
    the front."""
    return max(task.priority, URGENT) if task.aged or task.group < 0 else task.priority


@dataclass(frozen=True)
class Place:
    """Where a task joins the schedule."""

    index: int
    """Position among the waiting tasks."""
    turn: float
    group: int | None = None
    """Sequence of the task whose group it joins; None: a group of its own."""
    delays_s: np.ndarray | None = None
    """Seconds by which it delays each task that it overtakes by affinity, from `index` on."""
    version: int = -1
    """Of the schedule for which the place was found."""


class Policy:
    """Not thread-safe: the scheduler calls it under its lock. Tasks are those of `schedule`.

    Args:
        max_delay_s: seconds by which others may delay a task by affinity, in all; 0: never.
        max_overtaken_s: GPU seconds of urgent tasks that came later, after which a normal task
            counts as urgent.
    """

    def __init__(
        self, schedule: Schedule, max_delay_s: float = 0.0, max_overtaken_s: float = inf
    ) -> None:
        self.max_delay_s = max_delay_s
        self.max_overtaken_s = max_overtaken_s
        self._schedule = schedule
        self._shares = FairShare()

    def place(self, task: Task, seconds: float, resident: Resident) -> Place:
        """Where a new task runs that joins now.

        Args:
            seconds: forecast GPU seconds of the task.
            resident: what is in memory when the first waiting task starts.
        """
        schedule = self._schedule
        self._sort(self._shares.prepare(task.owner))
        turn = self._shares.preview(seconds, task.owner, task.priority)
        own = schedule.position_of((-task.priority, True, turn, inf, inf))
        begin, _ = schedule.level(task.priority)
        joined = self._by_affinity(task, begin, own, resident)
        return joined or Place(own, turn, version=schedule.version)

    def join(self, task: Task, place: Place, seconds: float) -> None:
        """A task, whose sequence is set, joins the schedule at this place."""
        task.turn = place.turn
        task.group = task.sequence if place.group is None else place.group
        if place.delays_s is not None and place.version == self._schedule.version:
            self._schedule.delay(task, place.delays_s)
        self._schedule.add(task, delay_budget_s=self.max_delay_s)
        self._sort(self._share(task, seconds))

    def restore(self, tasks: Iterable[tuple[Task, float]]) -> None:
        """Tasks and their seconds from before the start join, in the order of their sequences."""
        restored = [task for task, _ in tasks]
        for task, seconds in tasks:
            self._share(task, seconds)
        present = {task.sequence for task in restored}
        for task in restored:
            task.turn = FRONT if task.group not in present else 0.0
        self._give_turns(restored)
        self._schedule.add(*restored, delay_budget_s=self.max_delay_s)
        for first in {level(task) for task in restored}:
            # The first one ran, or was the next one: no task may overtake it.
            self._schedule.delay_budgets_s[self._schedule.level(first)[0]] = 0.0

    def start(self, task: Task, seconds: float) -> None:
        """A waiting task is claimed."""
        self._schedule.remove(task)
        changed = self._shares.start(task.task_id)
        if level(task) >= URGENT:
            changed |= self._age(task, seconds)
        self._sort(changed)

    def release(self, task: Task, used_s: float, left_s: float) -> None:
        """A running task waits again, before the others of its level that have not run yet.

        Args:
            used_s: seconds that it was on the GPU.
            left_s: forecast GPU seconds of what is left of it.
        """
        changed = self._shares.release(task.task_id, used_s, left_s)
        self._schedule.add(task, delay_budget_s=0.0)
        self._sort(changed)

    def end(self, task: Task, seconds: float) -> None:
        """A running task runs no more, after so many seconds on the GPU."""
        self._sort(self._shares.end(task.task_id, seconds))

    @property
    def front_group(self) -> int:
        """The group of a task that is moved to the front now."""
        return min([0, *(task.group for task in self._schedule)]) - 1

    def move_to_front(self, task: Task, *, sequence: int, group: int) -> None:
        """A waiting task runs next, before urgent ones, too; only released tasks run before it.

        Args:
            group: front_group.
        """
        self._schedule.remove(task)
        task.turn, task.sequence, task.group = FRONT, sequence, group
        self._schedule.add(task, delay_budget_s=0.0)
        self._sort(self._shares.raise_level(task.task_id, level(task)))

    def waiting_of(self, name: str) -> list[tuple[str, float]]:
        """The waiting tasks of a client in the order in which they run, with forecast seconds."""
        return self._shares.waiting_of(name)

    def leave(self, task: Task) -> None:
        """A waiting task waits no more."""
        self._schedule.remove(task)
        self._sort(self._shares.leave(task.task_id))

    # -- private ----------------------------------------------------------------------------------

    def _by_affinity(self, task: Task, begin: int, own: int, resident: Resident) -> Place | None:
        """The place behind others with its weights, if that is before its own.

        Args:
            begin: position of the first task of its level.
            own: its own position.
        """
        schedule = self._schedule
        if self.max_delay_s <= 0.0 or begin == own:
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
        if np.any(delays_s > schedule.delay_budgets_s[index:own]):
            return None
        return Place(index, turn, group, delays_s, schedule.version)

    def _share(self, task: Task, seconds: float) -> bool:
        return self._shares.join(task.task_id, seconds, task.owner, level(task))

    def _age(self, started: Task, seconds: float) -> bool:
        """An urgent task was started: those that it has overtaken grow older."""
        changed = False
        begin, end = self._schedule.level(NORMAL)
        for task in [self._schedule[position] for position in range(begin, end)]:
            if task.sequence < started.sequence:
                task.overtaken_s += seconds
                if task.overtaken_s > self.max_overtaken_s:
                    task.aged = True
                    self._shares.raise_level(task.task_id, URGENT)
                    changed = True
        return changed

    def _sort(self, changed: bool) -> None:
        """Order the schedule again if tags or levels have changed."""
        if changed:
            self._give_turns(self._schedule)
            self._schedule.sort()

    def _give_turns(self, tasks: Iterable[Task]) -> None:
        turns = {}
        for task in tasks:
            if task.group == task.sequence:
                task.turn = turns[task.sequence] = self._shares.tag(task.task_id)
        for task in tasks:
            if task.group != task.sequence:
                task.turn = turns.get(task.group, task.turn)
