"""The order of the waiting tasks. The only module that knows why one task goes before another.

Higher priority first, then first come, first served, with one exception (affinity): a task whose
weights another waiting task, or the machine, already has may join right behind that one, so that
clients with different models do not make the machine load for each task. Each task that it
overtakes is delayed by no more than `max_delay_s` in all.
"""

from dataclasses import dataclass
from math import inf

import numpy as np

from scheduler.machines import Resident
from scheduler.schedule import Schedule
from task import Task

Key = tuple[int, bool, float, float]


def key(task: Task) -> Key:
    """Sort key of the schedule: tasks with smaller keys run first.

    In this order: higher priority; released tasks, which have run already; the turn; the sequence,
    which counts the tasks that joined the schedule. A task's turn is its own sequence, or the turn
    of the task that it joined by affinity. A rule that is fair to clients would set the turn.
    """
    return -task.priority, task.attempt == 0, task.turn, task.sequence


@dataclass(frozen=True)
class Place:
    """Where a task joins the schedule."""

    index: int
    """Position among the waiting tasks."""
    turn: float | None = None
    """Turn of the task that it joins; None: its own sequence."""
    delays_s: np.ndarray | None = None
    """Seconds by which it delays each task that it overtakes, from `index` on."""


class Policy:
    """Args:
    max_delay_s: seconds by which others may delay a task by affinity, in all; 0: never.
    """

    def __init__(self, max_delay_s: float = 0.0) -> None:
        self.max_delay_s = max_delay_s

    def place(self, task: Task, schedule: Schedule, resident: Resident) -> Place:
        """Where a new task runs that joins now.

        Args:
            resident: what is in memory when the first waiting task starts.
        """
        begin, end = schedule.level(task.priority)
        last = Place(end)
        if self.max_delay_s <= 0.0 or begin == end:
            return last
        spec = task.stages[0].load_spec.key
        before = schedule.last_with(spec, begin, end)
        if before is not None:
            index, turn = before + 1, schedule[before].turn
        elif begin == 0 and spec in resident.keys:
            index, turn = begin, schedule[begin].turn - 1
        else:
            return last
        if index == end or spec in schedule.walk(resident).resident_before(end).keys:
            return last
        if schedule.position_of((-task.priority, True, turn, inf)) != index:
            return last  # others of this turn, or released tasks, would run before it
        delays_s = schedule.delays_s(task, index, resident)[: end - index]
        budgets_s = schedule.delay_budgets_s[index:end]
        if np.any(delays_s > budgets_s):
            return last
        return Place(index, turn, delays_s)
