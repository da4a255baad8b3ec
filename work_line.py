"""The tasks that wait, with the sums of their work ahead of each.

Lays the work of tasks out in the columns of a WaitingLine: for each timing key the features of its
tasks, and one more column that counts the tasks before which their model has to be loaded, because
the task before, in the same level, has another one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from model_catalog import Model
from task import Task
from timing_model import FEATURES, TASKS_FEATURE, Work
from waiting_line import Features, WaitingLine

COLUMNS = FEATURES + 1


@dataclass(frozen=True)
class WorkOfKey:
    """Sums over tasks of one timing key."""

    key: str
    model: Model
    features: Features
    loads: int
    """How often the model has to be loaded between them."""


class WorkLine:
    """Not thread-safe.

    Args:
        work_of: the work of a task. When it changes, lay_out() has to be called.
    """

    def __init__(self, work_of: Callable[[Task], Work]) -> None:
        self._work_of = work_of
        self._tasks: dict[str, Task] = {}
        self._keys: dict[str, tuple[int, Model]] = {}  # timing key: its first column, its model
        self._line = WaitingLine(0)

    def __len__(self) -> int:
        return len(self._line)

    def __contains__(self, task: Task) -> bool:
        return task.task_id in self._tasks

    def __iter__(self) -> Iterator[Task]:
        return (self._tasks[task_id] for task_id in self._line)

    @property
    def urgent(self) -> int:
        """How many of them are urgent."""
        return self._line.urgent

    def first(self, *, urgent: bool | None = None) -> Task | None:
        """The task that runs next, of all or of one level."""
        return self._task(self._line.first(urgent=urgent))

    def last(self, *, urgent: bool) -> Task | None:
        """The last task of a level."""
        return self._task(self._line.last(urgent=urgent))

    def before(self, task: Task) -> Task | None:
        """The task right before this one, in its level."""
        return self._task(self._line.neighbours(task.task_id)[0])

    def append(self, task: Task) -> None:
        """Join the line behind all others of this level."""
        features = self._columns_of(task, self.last(urgent=task.urgent))
        self._tasks[task.task_id] = task
        self._line.append(task.task_id, urgent=task.urgent, features=features)

    def put_back(self, task: Task) -> None:
        """Join the line before all others of this level."""
        after = self.first(urgent=task.urgent)
        features = self._columns_of(task, None)
        self._tasks[task.task_id] = task
        self._line.put_back(task.task_id, urgent=task.urgent, features=features)
        self._refresh(after, before=task)

    def remove(self, task: Task) -> None:
        before, after = map(self._task, self._line.neighbours(task.task_id))
        self._line.remove(task.task_id)
        del self._tasks[task.task_id]
        self._refresh(after, before=before)

    def ahead_of(self, task: Task) -> tuple[int, list[WorkOfKey]]:
        """How many tasks run before this one, and their work."""
        pos, sums = self._line.ahead_of(task.task_id)
        return pos, self._by_key(sums)

    def total(self, *, urgent_only: bool) -> list[WorkOfKey]:
        """The work of all tasks, or of the urgent ones."""
        return self._by_key(self._line.total(urgent_only=urgent_only))

    def _task(self, task_id: str | None) -> Task | None:
        return None if task_id is None else self._tasks[task_id]

    def _refresh(self, task: Task | None, *, before: Task | None) -> None:
        if task is not None:
            self._line.replace(task.task_id, self._columns_of(task, before))

    def _columns_of(self, task: Task, before: Task | None) -> Features:
        work = self._work_of(task)
        if work.model not in self._keys:
            self._keys[work.model] = (len(self._keys) * COLUMNS, task.model)
            self.lay_out()
        column = self._keys[work.model][0]
        switch = before is not None and before.model is not task.model
        values = [0.0] * (len(self._keys) * COLUMNS)
        values[column : column + COLUMNS] = [*work.features, float(switch)]
        return tuple(values)

    def lay_out(self) -> None:
        """Anew, because there are other timing keys than before. Rare, O(n)."""
        tasks = list(self)
        self._line = WaitingLine(len(self._keys) * COLUMNS)
        for task in tasks:
            features = self._columns_of(task, self.last(urgent=task.urgent))
            self._line.append(task.task_id, urgent=task.urgent, features=features)

    def _by_key(self, sums: Features) -> list[WorkOfKey]:
        works = []
        for key, (column, model) in self._keys.items():
            features = sums[column : column + FEATURES]
            if round(features[TASKS_FEATURE]) > 0:
                works.append(WorkOfKey(key, model, features, round(sums[column + FEATURES])))
        return works
