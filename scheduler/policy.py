"""The order of the waiting tasks. The only module that knows why one task goes before another.

Higher priority first, then first come, first served, with one exception (affinity): a task whose
weights another waiting task, or the machine, already has may join right behind that one, so that
clients with different models do not make the machine load for each task. Each task that it
overtakes is delayed by no more than `max_delay_s` in all.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scheduler.schedule import Schedule
from task import Task

Key = tuple[int, int, int]


def key(task: Task) -> Key:
    """Sort key of the schedule: tasks with smaller keys run first.

    `sequence` counts the tasks that joined the schedule; `group` is the sequence of the task that
    this one joined by affinity, or its own. A released task keeps both, so it runs next again.
    """
    return -task.priority, task.group, task.sequence


@dataclass(frozen=True)
class Place:
    """Where a task joins the schedule."""

    index: int
    """Position among the waiting tasks."""
    group: int | None = None
    """Group that it joins; None: one of its own."""
    delays_s: np.ndarray | None = None
    """Seconds by which it delays each task that it overtakes, from `index` on."""


class Policy:
    """Args:
    max_delay_s: seconds by which others may delay a task by affinity, in all; 0: never.
    """

    def __init__(self, max_delay_s: float = 0.0) -> None:
        self.max_delay_s = max_delay_s

    def place(self, task: Task, schedule: Schedule, resident: Sequence[str]) -> Place:
        """Where a task that joins now runs.

        Args:
            resident: keys of the weights in memory when the first waiting task starts, the latest
                used first.
        """
        begin, end = schedule.level(task.priority)
        last = Place(end)
        if self.max_delay_s <= 0.0 or begin == end:
            return last
        spec = task.stages[0].load_spec.key
        before = schedule.last_with(spec, begin, end)
        if before is not None:
            place = Place(before + 1, schedule[before].group)
        elif begin == 0 and spec in resident:
            place = Place(begin, schedule[begin].group - 1)
        else:
            return last
        if place.index == end or spec in schedule.walk(resident).resident_before(end):
            return last
        if before is not None and before + 1 < end and schedule[before + 1].group == place.group:
            return last  # the group continues with other weights
        delays_s = schedule.delays_s(task, place.index, resident)[: end - place.index]
        budgets_s = schedule.delay_budgets_s[place.index : end]
        if np.any(delays_s > budgets_s):
            return last
        return Place(place.index, place.group, delays_s)
