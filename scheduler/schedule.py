"""The waiting tasks in the order in which they run, and the work ahead of each of them.

The order is that of `policy.key`. Many stages are alike: the schedule keeps one number for each
stage of each task, of its kind. `walk` turns them into seconds and prefix sums, with numpy, when
something asks after a change of the order, of what was learned, or of what is in memory.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import Any, NamedTuple

import numpy as np

from models.model_catalog import LoadSpec
from scheduler.columns import Columns, Floats
from scheduler.estimates import Estimates
from scheduler.fair_share import Share, Waiting
from scheduler.kinds import Kinds
from scheduler.machines import Resident
from task import Task
from timing_model import Durations

Ints = np.ndarray[Any, np.dtype[np.intp]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]
NEVER = np.iinfo(np.intp).min
NO_SHARE = Share(0, 0, 0, 0.0, 0.0)
KEYS = ("level", "fresh", "turn", "group", "sequence")
"""The sort key, policy.key."""
COLUMNS = (*KEYS, *Share._fields, "stages", "delay_budget_s", "end_at")
KEY, SHARE = slice(0, len(KEYS)), slice(len(KEYS), len(KEYS) + len(Share._fields))
KINDS_KEPT = 1_000
"""Kinds that no stage has any more are forgotten once there are this many, and more than stages."""


@dataclass(frozen=True)
class Walk:
    """Tasks of the schedule as one machine would run them. Never changed: readers need no lock."""

    start_s: Floats
    """Seconds of work and loading before each task; one more value: of all of them."""
    rows_load_s: Floats
    """Seconds of loading for each stage; 0 if its weights are in memory."""
    rows_spec: Ints
    """Index of the load spec of each stage."""
    rows_loads: Bools
    """Whether weights are loaded for each stage."""
    ends: Ints
    """Stages before each task; one more value: of all of them."""
    specs: Sequence[LoadSpec]
    resident: Resident
    """Before the first task."""

    @cached_property
    def load_s(self) -> Floats:
        """Seconds of loading for each task itself."""
        if len(self.rows_load_s) == len(self.ends) - 1:
            return self.rows_load_s
        load_s: Floats = np.add.reduceat(self.rows_load_s, self.ends[:-1])
        return load_s

    @cached_property
    def loads(self) -> Ints:
        """How often weights are loaded before each task; one more value: for all of them."""
        loads: Ints = _before_each(self.rows_loads, self.ends)
        return loads

    def without_first(self) -> "Walk":
        """The walk of the tasks behind the first one."""
        row = int(self.ends[1])
        return Walk(
            start_s=self.start_s[1:] - self.start_s[1],
            rows_load_s=self.rows_load_s[row:],
            rows_spec=self.rows_spec[row:],
            rows_loads=self.rows_loads[row:],
            ends=self.ends[1:] - row,
            specs=self.specs,
            resident=self.resident_before(1),
        )

    def resident_before(self, index: int) -> Resident:
        """What is in memory when this one of the tasks starts."""
        used: list[str] = []
        rest, most = self.rows_spec[: self.ends[index]], self.resident.most
        while len(rest) and len(used) < most:
            used.append(self.specs[rest[-1]].key)
            rest = rest[rest != rest[-1]]
        return self.resident.of(tuple(dict.fromkeys((*used, *self.resident.keys))))


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
        self._rows = np.zeros(0, np.intp)  # kind of each stage of each task
        self._walk: tuple[_State, Walk] | None = None
        self._newest_ahead: tuple[int, Floats] = self.version, np.zeros(1)
        self._durations: tuple[object, dict[tuple[int, ...], Durations]] = (None, {})

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
        begin, end = np.searchsorted(self._columns["level"], (-priority, 1 - priority))
        return int(begin), int(end)

    def last_with(self, spec: str, begin: int, end: int) -> int | None:
        """Position of the last task in this range that uses these weights last."""
        number = self._kinds.spec_numbers.get(spec)
        if number is None:
            return None
        rows = self._rows[begin:end]
        if len(self._rows) != len(self):
            rows = self._rows[self._ends()[begin + 1 : end + 1] - 1]
        found = np.flatnonzero(self._kinds.spec[rows] == number)
        return begin + int(found[-1]) if len(found) else None

    def add(self, task: Task, share: Share = NO_SHARE, *, delay_budget_s: float = 0.0) -> None:
        """A task joins, where its key says."""
        self.before_change()
        key = self._key(task)
        position = self.position_of(key)
        kinds = self._kinds_of(task)
        if position == len(self):
            self._rows = np.append(self._rows, kinds)
        else:
            self._rows = _inserted(self._rows, self._row(position), kinds)
        self._tasks.insert(position, task)
        self._columns.insert(position, (*key, *share, len(kinds), delay_budget_s, inf))
        for stage in task.stages:
            self._estimates.joined(stage)
        self.version += 1
        if len(self._kinds) > max(len(self._rows), KINDS_KEPT):
            self.rebuild()

    def remove(self, task: Task) -> Share:
        """Raises: ValueError: the task is not in the schedule; nothing has changed."""
        position = self.position(task)
        if position >= len(self._tasks) or self._tasks[position] is not task:
            raise ValueError(f"task {task.task_id} is not where its sort key says")
        self.before_change()
        row, share = self._row(position), self.share(position)
        self._rows = _deleted(self._rows, row, row + len(task.stages))
        self._columns.delete(position)
        del self._tasks[position]
        self.version += 1
        if position == 0 and self._walk and self._walk[0].version == self.version - 1:
            state, walk = self._walk
            after = state._replace(version=self.version, resident=walk.resident_before(1))
            self._walk = after, walk.without_first()
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
        begins = self._ends()[:-1]
        self._tasks = [self._tasks[position] for position in order.tolist()]
        self._columns.take(order)
        firsts = np.repeat(begins[order] - self._ends()[:-1], self._stages())
        self._rows = self._rows[firsts + np.arange(len(self._rows))]
        self.version += 1

    def rebuild(self) -> None:
        """Look at the work of all tasks again: timing keys have changed."""
        self._kinds = Kinds(self._estimates)
        rows = [kind for task in self._tasks for kind in self._kinds_of(task)]
        self._rows = np.array(rows, np.intp)
        self._durations = None, {}
        self.version += 1

    def durations(self, position: int) -> Durations:
        """Of the task at this position, by itself."""
        version = self._estimates.version
        if self._durations[0] != version:
            self._durations = version, {}
        row = self._row(position)
        kinds = tuple(self._rows[row : row + len(self._tasks[position].stages)].tolist())
        known = self._durations[1].get(kinds)
        if known is None:
            known = self._estimates.durations(*self._tasks[position].stages)
            self._durations[1][kinds] = known
        return known

    def walk(self, resident: Resident, speed: float = 1.0) -> Walk:
        """The schedule on a machine that has these weights in memory.

        Args:
            speed: of the machine: work in a second, in seconds of the timing model.
        """
        state = _State(self.version, self._estimates.version, resident, speed)
        if self._walk is None or self._walk[0] != state:
            self._walk = state, self._computed(self._rows, self._stages(), resident, speed)
        return self._walk[1]

    def walk_of(self, chosen: Bools, resident: Resident, speed: float) -> Walk:
        """As walk(), of some of the tasks: by position, whether it is one of them."""
        stages = self._stages()
        rows = self._rows[np.repeat(chosen, stages)]
        return self._computed(rows, stages[chosen], resident, speed)

    def image_encoding_s(self) -> Floats:
        """Of each task, seconds of encoding its last image."""
        rows = self._rows
        if len(rows) != len(self):
            rows = rows[self._ends()[1:] - 1]
        return self._kinds.image_encoding_s()[rows]

    def delays_s(self, task: Task, position: int, resident: Resident) -> Floats:
        """Seconds by which a task that joins at this position delays each one behind it: its work,
        its loading, and theirs as far as it leaves them other weights in memory."""
        rows = _inserted(self._rows, self._row(position), self._kinds_of(task))
        stages = _inserted(self._stages(), position, [len(task.stages)])
        now, then = self.walk(resident), self._computed(rows, stages, resident, 1.0)
        before = now.start_s[position:-1] + now.load_s[position:]
        after = then.start_s[position + 1 : -1] + then.load_s[position + 1 :]
        return np.maximum(after - before, 0.0)

    # -- private ---------------------------------------------------------------------------------

    def _row(self, position: int) -> int:
        """Of the first stage of the task at this position."""
        if len(self._rows) == len(self._tasks):
            return position
        return int(self._columns["stages"][:position].sum())

    def _stages(self) -> Ints:
        """The number of stages of each task."""
        return self._columns["stages"].astype(np.intp)

    def _ends(self) -> Ints:
        return _ends(self._stages())

    def _kinds_of(self, task: Task) -> list[int]:
        return [self._kinds.number(stage) for stage in task.stages]

    def _computed(self, rows: Ints, stages: Ints, resident: Resident, speed: float) -> Walk:
        gpu_s, load_s = self._kinds.seconds()
        spec = self._kinds.spec[rows]
        loads = self._loads(spec, resident)
        rows_load_s = load_s[rows] * loads
        ends = _ends(stages)
        return Walk(
            start_s=_before_each(gpu_s[rows] / speed + rows_load_s, ends),
            rows_load_s=rows_load_s,
            rows_spec=spec,
            rows_loads=loads,
            ends=ends,
            specs=self._kinds.specs,
            resident=resident,
        )

    def _loads(self, spec: Ints, resident: Resident) -> Any:
        """Whether weights have to be loaded for each row: memory holds those used last.

        The stack distance of a row is the number of other specs used since its own was used last
        (Mattson et al. 1970, "Evaluation techniques for storage hierarchies"); they are in memory
        if it is smaller than what memory holds, and if all these fit together.
        """
        numbers = [self._kinds.spec_numbers.get(key) for key in resident.keys]
        if resident.most == 1:
            before_first = -1 if not numbers or numbers[0] is None else numbers[0]
            return spec != np.concatenate(([before_first], spec[:-1]))[: len(spec)]
        before = np.full(len(self._kinds.specs), NEVER, np.intp)
        for age, number in enumerate(numbers):
            if number is not None:
                before[number] = -1 - age
        position = np.arange(len(spec))
        last_use = np.empty((len(before), len(spec)), np.intp)
        for number, used_before in enumerate(before):
            uses = np.where(spec == number, position, NEVER)
            latest = np.maximum.accumulate(np.concatenate(([used_before], uses)))
            last_use[number] = latest[:-1]
        own = last_use[spec, position]
        sizes = resident.sizes
        bytes_of = np.array([sizes.of(spec) for spec in self._kinds.specs])
        since = last_use > own
        others_since, others_bytes = since.sum(axis=0), bytes_of @ since
        for age, (key, number) in enumerate(zip(resident.keys, numbers, strict=True)):
            if number is None:
                foreign_since = own < -1 - age
                others_since = others_since + foreign_since
                others_bytes = others_bytes + sizes.of_key(key) * foreign_since
        too_large = (others_since > 0) & (others_bytes + bytes_of[spec] > sizes.room_bytes)
        return (own == NEVER) | (others_since >= resident.most) | too_large


def _inserted(values: Any, at: int, own: Sequence[float]) -> Any:
    return np.concatenate((values[:at], np.array(own, values.dtype), values[at:]))


def _deleted(values: Any, begin: int, end: int) -> Any:
    if begin == 0:  # a claim: the GPU waits
        return values[end:]
    return np.concatenate((values[:begin], values[end:]))


def _ends(stages: Ints) -> Ints:
    """Stages before each task, and of all."""
    ends = np.zeros(len(stages) + 1, np.intp)
    np.cumsum(stages, out=ends[1:])
    return ends


def _before_each(rows: Any, ends: Ints) -> Any:
    """The sum of these values before each task, and of all."""
    sums = np.zeros(len(rows) + 1, np.intp if rows.dtype == bool else rows.dtype)
    np.cumsum(rows, out=sums[1:])
    return sums if len(sums) == len(ends) else sums[ends]
