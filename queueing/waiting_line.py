"""The tasks that wait, in the order in which they run, with position and sums ahead in O(log n).

Urgent tasks come first, each level first come, first served. The time ahead of a task is linear in
the features of the tasks ahead (see timing_model.py), so the line keeps sums of features and not
of seconds: what the forecast learns meanwhile changes nothing here.

Each level is a Fenwick tree (Fenwick 1994, "A new data structure for cumulative frequency tables")
over slots; a task that leaves empties its slot, and the level is rebuilt when most are empty.
"""

from array import array
from collections.abc import Iterator, Sequence
from itertools import chain

Features = tuple[float, ...]


class WaitingLine:
    """Not thread-safe: its owner holds a lock.

    Args:
        width: number of features of each task.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._urgent = _Level(width)
        self._normal = _Level(width)

    def __len__(self) -> int:
        return len(self._urgent) + len(self._normal)

    @property
    def urgent(self) -> int:
        """How many of them are urgent."""
        return len(self._urgent)

    def __contains__(self, task_id: str) -> bool:
        return task_id in self._urgent or task_id in self._normal

    def __iter__(self) -> Iterator[str]:
        return chain(self._urgent, self._normal)

    def append(self, task_id: str, *, urgent: bool, features: Features) -> None:
        """Join the line behind all others of this level."""
        self._level(urgent).append(task_id, features)

    def insert(self, task_id: str, *, urgent: bool, features: Features, before: str | None) -> None:
        """Join the line before another of this level; O(n).

        Args:
            before: None: before all others.
        """
        self._level(urgent).insert(task_id, features, before)

    def remove(self, task_id: str) -> None:
        self._level(task_id in self._urgent).remove(task_id)

    def first(self, *, urgent: bool | None = None) -> str | None:
        """The task that runs next, of all or of one level."""
        if urgent is None:
            return self._urgent.first or self._normal.first
        return self._level(urgent).first

    def last(self, *, urgent: bool) -> str | None:
        """The last task of a level."""
        return self._level(urgent).last

    def neighbours(self, task_id: str) -> tuple[str | None, str | None]:
        """The tasks right before and right behind this one in its level."""
        return self._level(task_id in self._urgent).neighbours(task_id)

    def slot(self, task_id: str) -> int:
        """A number that grows along the level, until one joins it that is not the last."""
        return self._level(task_id in self._urgent).slot(task_id)

    def replace(self, task_id: str, features: Features) -> None:
        """Give a task other features; it keeps its place."""
        self._level(task_id in self._urgent).replace(task_id, features)

    def ahead_of(self, task_id: str) -> tuple[int, Features]:
        """How many tasks run before this one, and the sums of their features."""
        if task_id in self._urgent:
            return self._urgent.ahead_of(task_id)
        count, sums = self._normal.ahead_of(task_id)
        urgent = self._urgent.total()
        return count + len(self._urgent), tuple(a + b for a, b in zip(sums, urgent, strict=True))

    def total(self, *, urgent_only: bool = False) -> Features:
        """The sums of the features of all tasks, or of the urgent ones."""
        urgent = self._urgent.total()
        if urgent_only:
            return urgent
        return tuple(a + b for a, b in zip(urgent, self._normal.total(), strict=True))

    def _level(self, urgent: bool) -> "_Level":
        return self._urgent if urgent else self._normal


class _Level:
    def __init__(self, width: int) -> None:
        self._stride = width + 1  # the count is one more sum
        self._clear()

    def _clear(self) -> None:
        self._slots: dict[str, int] = {}
        self._features: dict[str, Features] = {}
        self._before: dict[str, str | None] = {}
        self._after: dict[str, str | None] = {}
        self.first: str | None = None
        self.last: str | None = None
        self._tree = array("d", [0.0] * self._stride)  # slots count from 1
        self._used = 0

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, task_id: str) -> bool:
        return task_id in self._slots

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)  # a dict keeps the order of insertion, which is that of slots

    def append(self, task_id: str, features: Features) -> None:
        if self._used > 2 * len(self._slots) + 64:
            self._rebuild(list(self._features.items()))
        self._used += 1
        self._slots[task_id] = self._used
        self._features[task_id] = features
        self._before[task_id], self._after[task_id] = self.last, None
        if self.last is None:
            self.first = task_id
        else:
            self._after[self.last] = task_id
        self.last = task_id
        node = [1.0, *features]
        covered = 1
        while covered < self._used & -self._used:
            self._add_node(node, self._used - covered)
            covered <<= 1
        self._tree.extend(node)

    def insert(self, task_id: str, features: Features, before: str | None) -> None:
        tasks = list(self._features.items())
        position = 0 if before is None else list(self._features).index(before)
        self._rebuild([*tasks[:position], (task_id, features), *tasks[position:]])

    def remove(self, task_id: str) -> None:
        self._change(task_id, [-1.0, *(-value for value in self._features.pop(task_id))])
        del self._slots[task_id]
        before, after = self._before.pop(task_id), self._after.pop(task_id)
        if before is None:
            self.first = after
        else:
            self._after[before] = after
        if after is None:
            self.last = before
        else:
            self._before[after] = before

    def neighbours(self, task_id: str) -> tuple[str | None, str | None]:
        return self._before[task_id], self._after[task_id]

    def slot(self, task_id: str) -> int:
        return self._slots[task_id]

    def replace(self, task_id: str, features: Features) -> None:
        old, self._features[task_id] = self._features[task_id], features
        if old == features:
            return
        self._change(task_id, [0.0, *(b - a for a, b in zip(old, features, strict=True))])

    def ahead_of(self, task_id: str) -> tuple[int, Features]:
        count, *sums = self._sums_up_to(self._slots[task_id] - 1)
        return round(count), tuple(sums)

    def total(self) -> Features:
        return tuple(self._sums_up_to(self._used)[1:])

    def _change(self, task_id: str, by: Sequence[float]) -> None:
        slot = self._slots[task_id]
        while slot <= self._used:
            start = slot * self._stride
            for offset, value in enumerate(by):
                self._tree[start + offset] += value
            slot += slot & -slot

    def _sums_up_to(self, slot: int) -> list[float]:
        sums = [0.0] * self._stride
        while slot > 0:
            self._add_node(sums, slot)
            slot &= slot - 1
        return sums

    def _add_node(self, sums: list[float], slot: int) -> None:
        start = slot * self._stride
        for offset in range(self._stride):
            sums[offset] += self._tree[start + offset]

    def _rebuild(self, tasks: list[tuple[str, Features]]) -> None:
        self._clear()
        for task_id, features in tasks:
            self.append(task_id, features)
