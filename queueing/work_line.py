"""The tasks that wait, with the sums of their work ahead of each.

Lays the work of tasks out in the columns of a WaitingLine: for each timing key the features of its
tasks, and one more column that counts the tasks before which its model has to be loaded, because
it is none of those in memory at that moment.

Memory holds the weights used last, so what a task finds there follows from the tasks before it: in
its own level, as far as they have used as many weights as memory holds; the first few of a level
("openers") also depend on what comes before the level, which LiveQueue knows.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from operator import itemgetter

from models.model_catalog import Weights
from queueing.waiting_line import Features, WaitingLine
from task import Stage, Task
from timing_model import FEATURES, TASKS_FEATURE, Work

COLUMNS = FEATURES + 1

Recent = tuple[str, ...]
"""Keys of weights in memory, the latest first."""


@dataclass(frozen=True)
class WorkOfKey:
    """Sums over tasks of one timing key."""

    key: str
    weights: Weights
    """Those of one of the tasks."""
    features: Features
    loads: int
    """How often the model has to be loaded between them."""


class WorkLine:
    """Not thread-safe.

    Args:
        works_of: the work of a task, one for each of its stages. When it changes, lay_out() has to
            be called.
        in_memory: weights that memory holds at a time.
    """

    def __init__(self, works_of: Callable[[Task], list[Work]], in_memory: int = 1) -> None:
        self._works_of = works_of
        self._in_memory = in_memory
        self._tasks: dict[str, Task] = {}
        self._recent: dict[str, Recent] = {}  # what its level has left in memory after a task
        self._opened: dict[str, list[Weights]] = {}  # by the first tasks of the levels
        self._keys: dict[str, tuple[int, Weights]] = {}  # timing key: its first column, weights
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

    def insert(self, task: Task, before: Task | None = None) -> None:
        """Join the line before another task of this level, or before all of them."""
        after = before or self.first(urgent=task.urgent)
        features = self._columns_of(task, self.before(before) if before else None)
        self._tasks[task.task_id] = task
        self._line.insert(
            task.task_id,
            urgent=task.urgent,
            features=features,
            before=before.task_id if before else None,
        )
        self._refresh(after, before=task)

    def remove(self, task: Task) -> None:
        before, after = map(self._task, self._line.neighbours(task.task_id))
        self._line.remove(task.task_id)
        del self._tasks[task.task_id]
        del self._recent[task.task_id]
        self._opened.pop(task.task_id, None)
        self._refresh(after, before=before)

    def ahead_of(self, task: Task) -> tuple[int, list[WorkOfKey]]:
        """How many tasks run before this one, and their work."""
        pos, sums = self._line.ahead_of(task.task_id)
        return pos, self._by_key(sums)

    def total(self, *, urgent_only: bool) -> list[WorkOfKey]:
        """The work of all tasks, or of the urgent ones."""
        return self._by_key(self._line.total(urgent_only=urgent_only))

    def recent(self, task: Task | None) -> Recent:
        """What the tasks of a level have left in memory up to and with this one."""
        return self._recent[task.task_id] if task else ()

    def openers(self, *, urgent: bool, behind: Task | None) -> list[Weights]:
        """Weights that a level's first tasks use for the first time, while memory may still hold
        what was there before; only those before the task `behind`, if there is one."""
        found = sorted(
            (
                (self._line.slot(task_id), opened)
                for task_id, opened in self._opened.items()
                if self._tasks[task_id].urgent is urgent
            ),
            key=itemgetter(0),
        )
        end = self._line.slot(behind.task_id) if behind else float("inf")
        return [weights for slot, opened in found if slot < end for weights in opened]

    def loads(self, stages: Iterable[Stage], recent: Recent) -> tuple[list[Weights], Recent]:
        """What has to be loaded for stages when memory holds these, and what it holds then."""
        loads = []
        for stage in stages:
            if stage.weights.key not in recent:
                loads.append(stage.weights)
            recent = self.used(recent, stage.weights.key)
        return loads, recent

    def used(self, recent: Recent, key: str) -> Recent:
        """What memory holds once these weights were used."""
        return (key, *(other for other in recent if other != key))[: self._in_memory]

    def _task(self, task_id: str | None) -> Task | None:
        return None if task_id is None else self._tasks[task_id]

    def _refresh(self, task: Task | None, *, before: Task | None) -> None:
        """Count anew what is loaded for a task that has another one before it, and for those behind
        it, as far as they find other weights in memory than before."""
        while task is not None:
            left = self._recent[task.task_id]
            self._line.replace(task.task_id, self._columns_of(task, before))
            if self._recent[task.task_id] == left:
                return
            before, task = task, self._task(self._line.neighbours(task.task_id)[1])

    def _columns_of(self, task: Task, before: Task | None) -> Features:
        works = self._works_of(task)
        known = len(self._keys)
        for work, stage in zip(works, task.stages, strict=True):
            column, _ = self._keys.get(work.model, (len(self._keys) * COLUMNS, None))
            self._keys[work.model] = (column, stage.weights)
        if len(self._keys) > known:
            self.lay_out()
        values = [0.0] * (len(self._keys) * COLUMNS)
        recent = self.recent(before)
        opened: list[Weights] = []
        for work, stage in zip(works, task.stages, strict=True):
            column = self._keys[work.model][0]
            for offset, feature in enumerate(work.features):
                values[column + offset] += feature
            if stage.weights.key not in recent:
                if len(recent) >= self._in_memory:
                    values[column + FEATURES] += 1.0
                else:  # LiveQueue counts it
                    opened.append(stage.weights)
            recent = self.used(recent, stage.weights.key)
        self._recent[task.task_id] = recent
        self._opened.pop(task.task_id, None)
        if opened:
            self._opened[task.task_id] = opened
        return tuple(values)

    def hold(self, in_memory: int) -> None:
        """Memory holds so many weights at a time, it has turned out."""
        self._in_memory = max(in_memory, 1)
        self.lay_out()

    def lay_out(self) -> None:
        """Anew, because there are other timing keys than before. Rare, O(n)."""
        tasks = list(self)
        self._line = WaitingLine(len(self._keys) * COLUMNS)
        for task in tasks:
            features = self._columns_of(task, self.last(urgent=task.urgent))
            self._line.append(task.task_id, urgent=task.urgent, features=features)

    def _by_key(self, sums: Features) -> list[WorkOfKey]:
        works = []
        for key, (column, weights) in self._keys.items():
            features = sums[column : column + FEATURES]
            if round(features[TASKS_FEATURE]) > 0:
                works.append(WorkOfKey(key, weights, features, round(sums[column + FEATURES])))
        return works
