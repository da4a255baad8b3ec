"""The work and the loading ahead of each waiting task, on one machine: prefix sums, with numpy.

Many stages are alike: they have the same work and the same weights. `Kinds` numbers the kinds of
stages, and a schedule is one number for each stage of each task.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from models.model_catalog import LoadSpec
from scheduler.estimates import Estimates
from scheduler.resident import Resident
from task import Stage
from timing.corrections import Bools, Floats, Ints
from timing_model import Work

NEVER = np.iinfo(np.intp).min
REPEATED = 1
"""Added to the number of a kind: its prompt is in memory."""


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
    def _loading_s(self) -> Floats:
        """Seconds of loading before each task, and of all."""
        found: Floats = _before_each(self.rows_load_s, self.ends)
        return found

    def starts_s(self, pace: float) -> Floats:
        """As start_s, if all work takes this many times as long."""
        if pace == 1.0:
            return self.start_s
        found: Floats = pace * (self.start_s - self._loading_s) + self._loading_s
        return found

    def start_at_s(self, index: int, pace: float) -> float:
        """Of one of the tasks, as starts_s()."""
        loading_s = 0.0 if pace == 1.0 else float(self._loading_s[index])
        return pace * (float(self.start_s[index]) - loading_s) + loading_s

    def loads_before(self, index: int) -> int:
        """How often weights are loaded before this one of the tasks."""
        return int(np.count_nonzero(self.rows_loads[: self.ends[index]]))

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


class Kinds:
    """Kinds of stages: those with the same work and the same weights are alike. Each has two
    numbers: an even one if its prompt is new, and the next one if its prompt is in memory.

    The seconds of all kinds of one timing key are computed together, and again only when that key
    has learned something.
    """

    def __init__(self, estimates: Estimates) -> None:
        self._estimates = estimates
        self._numbers: dict[tuple[Work, str], int] = {}
        self.works: list[Work] = []
        """Of each kind."""
        self._by_key: dict[str, list[int]] = {}
        """Kinds of each timing key."""
        self._gpu_s: Floats = np.zeros(0)
        self._tokens = np.zeros(0, np.intp)  # of the prompts
        self._as_of: dict[str, tuple[int, int]] = {}  # by timing key: what _gpu_s was made of
        self._seconds: tuple[object, Floats, Floats] | None = None
        self._image_encoding: tuple[object, Floats] | None = None
        self.specs: list[LoadSpec] = []
        self.spec_numbers: dict[str, int] = {}
        """Index in `specs`, by key."""
        self.spec = np.zeros(0, np.intp)
        """Of each kind, the index in `specs`."""

    def __len__(self) -> int:
        return len(self._numbers)

    def number(self, stage: Stage) -> int:
        """Of the kind of a stage whose prompt is new."""
        spec, work = stage.load_spec, self._estimates.work(stage)
        number = self._numbers.setdefault((work, spec.key), 2 * len(self))
        if number == len(self.spec):
            if spec.key not in self.spec_numbers:
                self.spec_numbers[spec.key] = len(self.specs)
                self.specs.append(spec)
            self.works += work, replace(work, prompt_cached=True)
            self._by_key.setdefault(work.model, []).extend((number, number + REPEATED))
            self._gpu_s = np.append(self._gpu_s, [0.0, 0.0])
            self._tokens = np.append(self._tokens, 2 * [work.prompt_tokens])
            self.spec = np.append(self.spec, 2 * [self.spec_numbers[spec.key]])
            self._seconds = self._image_encoding = None
        return number

    def repeated(self, rows: Ints, prompts: Ints) -> Ints:
        """The kinds of these stages, in the order in which they run.

        Args:
            rows: their kinds, whether or not their prompts are new.
            prompts: the numbers of their prompts.
        """
        repeated = self._estimates.prompts.repeated(prompts, self._tokens[rows])
        found: Ints = (rows & ~REPEATED) + REPEATED * repeated
        return found

    def image_encoding_s(self) -> Floats:
        """Of each kind, seconds of encoding the last image."""
        version = self._estimates.version
        if self._image_encoding is None or self._image_encoding[0] != version:
            seconds = [self._estimates.timing.image_encoding_s(work) for work, _ in self._numbers]
            self._image_encoding = version, np.repeat(seconds, 2)
        return self._image_encoding[1]

    def seconds(self) -> tuple[Floats, Floats]:
        """Of each kind, seconds of the GPU and of loading its weights."""
        version = self._estimates.version
        if self._seconds is None or self._seconds[0] != version:
            for key, numbers in self._by_key.items():
                as_of = (self._estimates.timing.version_of(key), len(numbers))
                if self._as_of.get(key) != as_of:
                    works = [self.works[number] for number in numbers]
                    self._gpu_s[numbers] = self._estimates.timing.gpu_s(works)
                    self._as_of[key] = as_of
            load_s = np.array([self._estimates.load_s(spec) for spec in self.specs])
            own_load_s = load_s[self.spec] if len(self) else np.zeros(0)
            self._seconds = version, self._gpu_s, own_load_s
        return self._seconds[1:]

    def walk(self, rows: Ints, stages: Ints, resident: Resident, speed: float) -> Walk:
        """The tasks of these stages on a machine with these weights in memory.

        Args:
            rows: the kind of each stage of each task.
            stages: how many stages each task has.
            speed: of the machine.
        """
        gpu_s, load_s = self.seconds()
        spec = self.spec[rows]
        loads = self._loads(spec, resident)
        rows_load_s = load_s[rows] * loads
        ends = ends_of(stages) if len(rows) != len(stages) else np.arange(len(rows) + 1)
        return Walk(
            start_s=_before_each(gpu_s[rows] / speed + rows_load_s, ends),
            rows_load_s=rows_load_s,
            rows_spec=spec,
            rows_loads=loads,
            ends=ends,
            specs=self.specs,
            resident=resident,
        )

    def _loads(self, spec: Ints, resident: Resident) -> Any:
        """Whether weights have to be loaded for each row: memory holds those used last.

        The stack distance of a row is the number of other specs used since its own was used last
        (Mattson et al. 1970, "Evaluation techniques for storage hierarchies"); they are in memory
        if it is smaller than what memory holds, and if all these fit together.
        """
        numbers = [self.spec_numbers.get(key) for key in resident.keys]
        if resident.most == 1:
            before_first = -1 if not numbers or numbers[0] is None else numbers[0]
            return spec != np.concatenate(([before_first], spec[:-1]))[: len(spec)]
        before = np.full(len(self.specs), NEVER, np.intp)
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
        bytes_of = np.array([sizes.of(spec) for spec in self.specs])
        since = last_use > own
        others_since, others_bytes = since.sum(axis=0), bytes_of @ since
        for age, (key, number) in enumerate(zip(resident.keys, numbers, strict=True)):
            if number is None:
                foreign_since = own < -1 - age
                others_since = others_since + foreign_since
                others_bytes = others_bytes + sizes.of_key(key) * foreign_since
        too_large = (others_since > 0) & (others_bytes + bytes_of[spec] > sizes.room_bytes)
        return (own == NEVER) | (others_since >= resident.most) | too_large


def ends_of(stages: Ints) -> Ints:
    """Stages before each task, and of all."""
    ends = np.zeros(len(stages) + 1, np.intp)
    np.cumsum(stages, out=ends[1:])
    return ends


def _before_each(rows: Any, ends: Ints) -> Any:
    """The sum of these values before each task, and of all."""
    sums = np.zeros(len(rows) + 1)
    np.cumsum(rows, out=sums[1:])
    return sums if len(sums) == len(ends) else sums[ends]
