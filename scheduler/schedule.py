"""The waiting tasks in the order in which they run, and the work ahead of each of them.

The order is that of `policy.key`. Many stages are alike: the schedule keeps one number for each
stage of each task, of its kind. `walk` turns them into seconds and prefix sums, with numpy, when
something asks after a change of the order, of what was learned, or of what is in memory.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from math import inf
from typing import Any, NamedTuple

import numpy as np

from scheduler.columns import Columns
from scheduler.estimates import Estimates
from scheduler.fair_share import Share, Waiting
from scheduler.resident import Resident
from scheduler.walk import Kinds, Walk, ends_of
from task import Stage, Task
from timing.corrections import Floats, Ints
from timing_model import Durations

NO_SHARE = Share(0, 0, 0, 0.0, 0.0)
KEYS = ("level", "fresh", "turn", "group", "sequence")
"""The sort key, policy.key."""
COLUMNS = (
    *KEYS, *Share._fields, "stages", "delay_budget_s", "end_at", "machine", "next_machine",
)  # fmt: skip
NOWHERE = -1
"""No machine: the two last columns are the planner's (plan.py)."""
KEY, SHARE = slice(0, len(KEYS)), slice(len(KEYS), len(KEYS) + len(Share._fields))
KINDS_KEPT = 1_000
"""Kinds that no stage has any more are forgotten once there are this many, and more than stages."""


class _State(NamedTuple):
    """What a walk was made of."""

    version: int
    estimates: tuple[int, int]
    resident: Resident
    speed: float


class Schedule:
    """Not thread-safe: its owner holds a lock.

    Args:
        estimates: the work of stages, and what it takes.
        key: sort key of a task; policy.key.
    """

    def __init__(self, estimates: Estimates, key: Callable[[Task], Any]) -> None:
        self.version = 0
        """Changes with the order of the tasks."""
        self.before_change: Callable[[], None] = lambda: None
        """Called before tasks get other positions."""
        self._estimates = estimates
        self._key = key
        self._tasks: list[Task] = []
        self._columns = Columns(COLUMNS)
        self._kinds = Kinds(estimates)
        self._rows = np.zeros(0, np.intp)
        """Kind of each stage of each task."""
        self._prompts = np.zeros(0, np.intp)
        """Number of its prompt."""
        self._walk: tuple[_State, Walk] | None = None
        self._newest_ahead: tuple[int, Floats] = self.version, np.zeros(1)
        self._gpu_s: tuple[object, Floats] = (None, np.zeros(0))

    def __len__(self) -> int:
        return len(self._tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self._tasks)

    def __getitem__(self, position: int) -> Task:
        return self._tasks[position]

    def __contains__(self, task: Task) -> bool:
        position = self.position(task)
        return position < len(self._tasks) and self._tasks[position] is task

    def first(self) -> Task | None:
        """The task that runs next."""
        return self._tasks[0] if self._tasks else None

    def position(self, task: Task) -> int:
        """How many tasks run before this one."""
        if self._tasks and self._tasks[0] is task:
            return 0
        if self._tasks and self._tasks[-1] is task:
            return len(self._tasks) - 1
        return self.position_of(self._key(task))

    def position_of(self, key: Any) -> int:
        """How many tasks run before one with this key would."""
        if self._tasks and self._key(self._tasks[-1]) < key:
            return len(self._tasks)
        return bisect_left(self._tasks, key, key=self._key)

    def column(self, name: str) -> Floats:
        """A value of each task. It is valid until the next change."""
        return self._columns[name]

    @property
    def waiting(self) -> Waiting:
        """What fair_share.py has to know of all tasks."""
        return Waiting(*(self._columns[name] for name in Waiting._fields))

    @property
    def newest_ahead(self) -> Floats:
        """By position, the highest sequence among the tasks before it; one more value: among all.
        Never changed: readers need no lock."""
        if self._newest_ahead[0] != self.version:
            newest_ahead = np.zeros(len(self) + 1)
            np.maximum.accumulate(self._columns["sequence"], out=newest_ahead[1:])
            self._newest_ahead = self.version, newest_ahead
        return self._newest_ahead[1]

    def level(self, priority: int) -> tuple[int, int]:
        """Positions of the tasks of this priority: the first, and the one after the last."""
        begin, end = self._columns["level"].searchsorted((-priority, 1 - priority))
        return int(begin), int(end)

    def last_with(self, spec: str, begin: int, end: int) -> int | None:
        """Position of the last task in this range that uses these weights last."""
        number = self._kinds.spec_numbers.get(spec)
        if number is None:
            return None
        rows = self._rows[begin:end]
        if len(self._rows) != len(self):
            rows = self._rows[self._ends()[begin + 1 : end + 1] - 1]
        if len(rows) and self._kinds.spec[rows[-1]] == number:
            return end - 1
        found = np.flatnonzero(self._kinds.spec[rows] == number)
        return begin + int(found[-1]) if len(found) else None

    def add(self, task: Task, share: Share = NO_SHARE, *, delay_budget_s: float = 0.0) -> None:
        """A task joins, where its key says."""
        self.before_change()
        key = self._key(task)
        position = self.position_of(key)
        kinds, prompts = self._kinds_of(task), self._estimates.prompts
        row, numbers = self._row(position), [prompts.joins(stage) for stage in task.stages]
        self._rows = _inserted(self._rows, row, kinds)
        self._prompts = _inserted(self._prompts, row, numbers)
        self._tasks.insert(position, task)
        self._columns.insert(
            position, (*key, *share, len(kinds), delay_budget_s, inf, NOWHERE, NOWHERE)
        )
        self.version += 1
        if any(map(prompts.is_repeated, numbers)):
            self._find_repeated()
        if len(self._kinds) > max(len(self._rows), KINDS_KEPT):
            self.rebuild()

    def remove(self, task: Task, *, claimed: bool = False) -> Share:
        """Args: claimed: it runs now, and its prompts are encoded.

        Raises: ValueError: the task is not in the schedule; nothing has changed.
        """
        position = self.position(task)
        if position >= len(self._tasks) or self._tasks[position] is not task:
            raise ValueError(f"task {task.task_id} is not where its sort key says")
        self.before_change()
        row, share, kinds = self._row(position), self.share(position), self.kinds(position).tolist()
        self._rows = _deleted(self._rows, row, row + len(task.stages))
        self._prompts = _deleted(self._prompts, row, row + len(task.stages))
        self._columns.delete(position)
        del self._tasks[position]
        self.version += 1
        if position == 0 and self._walk and self._walk[0].version == self.version - 1:
            walk = self._walk[1].without_first()
            state = self._walk[0]._replace(version=self.version, resident=walk.resident)
            self._walk = state, walk
        prompts, changed = self._estimates.prompts, False
        for stage, kind in zip(task.stages, kinds, strict=True):
            if claimed:
                changed |= prompts.starts(stage, self._kinds.works[kind].prompt_tokens)
            changed |= prompts.leaves(stage)
        if changed:
            self._find_repeated()
        return share

    def share(self, position: int) -> Share:
        client, user, number, seconds, tag = self._columns.values(SHARE, position)
        return Share(int(client), int(user), int(number), seconds, tag)

    def set_turns(self, turns: Floats, tags: Floats) -> None:
        """Give the tasks these turns, and the tags that they come from; then sort them."""
        changed = np.flatnonzero(turns != self._columns["turn"])
        for position, turn in zip(changed.tolist(), turns[changed].tolist(), strict=True):
            self._tasks[position].turn = turn
        self._columns["turn"][:] = turns
        self._columns["tag"][:] = tags
        self.sort()

    def set_level(self, position: int) -> None:
        """The level of this task has changed: sort() follows."""
        self._columns.update(KEY, position, self._key(self._tasks[position]))

    def sort(self) -> None:
        """Order the tasks again: their sort keys have changed."""
        keys = [self._columns[name] for name in KEYS]
        order = np.lexsort(keys[::-1])
        if np.array_equal(order, np.arange(len(order))):
            return
        self.before_change()
        rows = self._rows_of(order, self._stages()[order])
        self._rows, self._prompts = self._rows[rows], self._prompts[rows]
        self._tasks = [self._tasks[position] for position in order.tolist()]
        self._columns.take(order)
        self.version += 1
        self._find_repeated()

    def rebuild(self) -> None:
        """Look at the work of all tasks again: timing keys have changed."""
        self._kinds = Kinds(self._estimates)
        rows = [kind for task in self._tasks for kind in self._kinds_of(task)]
        self._rows = np.array(rows, np.intp)
        self.version += 1
        self._find_repeated()

    def forget_prompts(self, resident: Sequence[str], starting: Iterable[Stage]) -> None:
        """Only these weights are in memory. The prompts of these stages, which run and have not
        drawn a step yet, are encoded first."""
        self._estimates.prompts.only(resident, starting)
        self._find_repeated()

    def durations(self, position: int) -> Durations:
        """Of the task at this position, by itself."""
        return self._durations_of(self.kinds(position))

    def kinds(self, position: int) -> Ints:
        """Of the stages of the task at this position."""
        row = self._row(position)
        return self._rows[row : row + len(self._tasks[position].stages)]

    def durations_of(self, task: Task, position: int) -> Durations:
        """Of a task that may join at this position, by itself."""
        row = self._row(position)
        return self._durations_of(self._rows_with(task, position)[row : row + len(task.stages)])

    def walk(self, resident: Resident, speed: float = 1.0) -> Walk:
        """The schedule on a machine that has these weights in memory.

        Args:
            speed: of the machine: work in a second, in seconds of the timing model.
        """
        state = _State(self.version, self._estimates.version, resident, speed)
        if self._walk is None or self._walk[0] != state:
            self._walk = state, self._kinds.walk(self._rows, self._stages(), resident, speed)
        return self._walk[1]

    def walk_of(self, positions: Ints, resident: Resident, speed: float) -> Walk:
        """As walk(), of the tasks at these positions."""
        stages = self._stages()[positions]
        rows = self._rows[self._rows_of(positions, stages)]
        return self._kinds.walk(rows, stages, resident, speed)

    def gpu_s(self) -> Floats:
        """Seconds of the GPU of each task, by itself."""
        state = self.version, self._estimates.version
        if self._gpu_s[0] != state:
            rows_s = self._kinds.seconds()[0][self._rows]
            if len(rows_s) != len(self):
                rows_s = np.add.reduceat(rows_s, self._ends()[:-1])
            self._gpu_s = state, rows_s
        return self._gpu_s[1]

    def in_turn(self) -> Iterator[tuple[Task, float]]:
        """The tasks in the order in which they run, with their seconds of the GPU. The schedule may
        change meanwhile: the next one is that at the next position."""
        for position in count():
            if position >= len(self._tasks):
                return
            yield self._tasks[position], self.gpu_s()[position]

    def image_encoding_s(self) -> Floats:
        """Of each task, seconds of encoding its last image."""
        rows = self._rows
        if len(rows) != len(self):
            rows = rows[self._ends()[1:] - 1]
        return self._kinds.image_encoding_s()[rows]

    def delays_s(self, task: Task, position: int, resident: Resident) -> Floats:
        """Seconds by which a task that joins at this position delays each one behind it: its work,
        its loading, and theirs as far as it leaves them other weights in memory."""
        rows = self._rows_with(task, position)
        stages = _inserted(self._stages(), position, [len(task.stages)])
        now, then = self.walk(resident), self._kinds.walk(rows, stages, resident, 1.0)
        before = now.start_s[position:-1] + now.load_s[position:]
        after = then.start_s[position + 1 : -1] + then.load_s[position + 1 :]
        return np.maximum(after - before, 0.0)

    # -- private ---------------------------------------------------------------------------------

    def _durations_of(self, kinds: Ints) -> Durations:
        works = self._kinds.works
        return self._estimates.durations_of([works[kind] for kind in kinds.tolist()])

    def _row(self, position: int) -> int:
        """Of the first stage of the task at this position."""
        if len(self._rows) == len(self._tasks):
            return position
        return int(self._columns["stages"][:position].sum())

    def _stages(self) -> Ints:
        """The number of stages of each task."""
        return self._columns["stages"].astype(np.intp)

    def _ends(self) -> Ints:
        return ends_of(self._stages())

    def _rows_of(self, positions: Ints, stages: Ints) -> Ints:
        """The rows of the stages of the tasks at these positions, which have so many stages."""
        if len(self._rows) == len(self):
            return positions
        firsts = np.repeat(self._ends()[:-1][positions] - ends_of(stages)[:-1], stages)
        rows: Ints = firsts + np.arange(len(firsts))
        return rows

    def _kinds_of(self, task: Task) -> list[int]:
        return [self._kinds.number(stage) for stage in task.stages]

    def _find_repeated(self) -> None:
        """The order, or what is in memory, has changed: which prompts are repeated now?"""
        rows = self._kinds.repeated(self._rows, self._prompts)
        if not np.array_equal(rows, self._rows):
            self._rows = rows
            self.version += 1

    def _rows_with(self, task: Task, position: int) -> Ints:
        """The kinds of all stages, if a task joins at this position."""
        row, prompts = self._row(position), self._estimates.prompts
        rows: Ints = _inserted(self._rows, row, self._kinds_of(task))
        numbers = [prompts.number(stage) for stage in task.stages]
        if any(numbers):  # others wait with them, or they are in memory
            rows = self._kinds.repeated(rows, _inserted(self._prompts, row, numbers))
        return rows


def _inserted(values: Any, at: int, own: Sequence[float]) -> Any:
    return np.concatenate((values[:at], np.array(own, values.dtype), values[at:]))


def _deleted(values: Any, begin: int, end: int) -> Any:
    if begin == 0:  # a claim: the GPU waits
        return values[end:]
    return np.concatenate((values[:begin], values[end:]))
