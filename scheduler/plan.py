"""Which machine each waiting task is expected to run on, and the work ahead of it there.

Each task, in order, goes to the machine on which it is expected to end first (list scheduling;
Graham 1969, "Bounds on multiprocessing timing anomalies").
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from math import inf

import numpy as np

from scheduler.estimates import Estimates
from scheduler.lanes import Lanes
from scheduler.machines import Machine
from scheduler.resident import Resident
from scheduler.schedule import NOWHERE, Schedule
from scheduler.walk import Walk
from task import Task
from timing.corrections import Floats, Ints

DOWNLOAD_BYTES_PER_S = 25e6
"""At which a machine is expected to download weights that it does not have."""
AT_ONCE = 256
"""First tasks of the schedule that are assigned to machines again after each change."""
PART, PASS_EVERY_S = 500, 5.0
"""Tasks that are assigned while the lock is held once; seconds between the beginnings of passes."""
OFFER_BONUS_S = 1.0
"""A task stays with the machine that it was sent to, unless it ends earlier elsewhere by this."""
_Loads = dict[tuple[str, ...], tuple[float, Resident]]
"""By the weights that a task needs: seconds of downloading and loading them (inf: the machine may
not), and what is in memory then."""


class Plan:
    """An assignment of all waiting tasks to machines.

    Args:
        walks: by machine, its tasks as it will run them.
        machine: by position, the number of the machine of a waiting task. None: there is only one.
        own: by machine, the positions of its tasks.
    """

    def __init__(
        self, walks: Sequence[Walk], machine: Ints | None = None, own: Sequence[Ints] = ()
    ) -> None:
        self.walks = walks
        self._machine, self._own = machine, own

    def machine(self, position: int) -> int:
        """The number of the machine of the waiting task at this position."""
        return 0 if self._machine is None else int(self._machine[position])

    def own(self, machine: int) -> Ints | slice:
        """Which tasks of the schedule run on this machine: an index for arrays by position."""
        return slice(None) if self._machine is None else self._own[machine]

    def index(self, machine: int, position: int) -> int:
        """How many tasks before this position run on this machine: an index for its walk."""
        if self._machine is None:
            return position
        return int(np.searchsorted(self._own[machine], position))


class Planner:
    """Keeps the plan until a task joins, starts or ends, or something is loaded or learned. A
    running task that takes longer than expected delays the tasks of its own machine, and moves them
    to another one only with the next plan: so most questions cost no walk through the schedule.

    With several machines only the first AT_ONCE tasks are assigned again then, and those further
    behind stay where they were: continue_pass() assigns them again, part by part. The schedule
    keeps the number of the machine of each task, so that it moves with the task.

    Not thread-safe: its owner holds a lock.
    """

    def __init__(
        self, schedule: Schedule, machines: Sequence[Machine], estimates: Estimates
    ) -> None:
        self._schedule = schedule
        self._machines = machines
        self._estimates = estimates
        self._plan: tuple[object, Plan] | None = None
        self._numbered: list[Machine] = []
        """The machines that the numbers in the schedule stand for."""
        self._pass: Iterator[int] | None = None
        """The assignments of a pass through the whole schedule that has begun."""
        self._pass_state: object = None
        """What the latest pass was made of."""
        self._pass_position = 0
        self._next_pass_at = 0.0

    def plan(self, lanes: Lanes) -> Plan:
        """Args:
        lanes: as of now.
        """
        if len(self._machines) == 1:  # the schedule keeps its walk
            machine = self._machines[0]
            walk = self._schedule.walk(machine.resident_after_runs(), machine.speed)
            if self._plan is None or self._plan[0] is not walk:
                self._plan = walk, Plan([walk])
            return self._plan[1]
        state = self._state()
        if self._plan is None or self._plan[0] != state:
            self._plan = state, self._computed(lanes.free_s())
        return self._plan[1]

    def continue_pass(self, lanes: Lanes) -> bool:
        """Assign a part of the schedule again, PART tasks at each call. A new pass begins when
        something has changed, PASS_EVERY_S after the one before at the earliest.

        Args:
            lanes: as of now.

        Returns:
            Whether the pass goes on.
        """
        schedule, machines = self._schedule, self._machines
        if len(machines) == 1 or len(schedule) <= AT_ONCE:
            self._pass = None
            return False
        if self._pass is None and lanes.at < self._next_pass_at:
            return False
        self.plan(lanes)  # which numbers the machines
        if self._pass is None:
            state = self._state()
            if state == self._pass_state:
                return False
            self._pass, self._pass_state = self.assigned(lanes.free_s()), state
            self._pass_position, self._next_pass_at = 0, lanes.at + PASS_EVERY_S
            schedule.column("next_machine")[:] = NOWHERE
        part = list(islice(self._pass, PART))
        begin, end = self._pass_position, self._pass_position + len(part)
        schedule.column("next_machine")[begin:end] = part
        self._pass_position = end
        if len(part) == PART:
            return True
        machine, found = schedule.column("machine"), schedule.column("next_machine")
        machine[:] = np.where(found == NOWHERE, machine, found)
        self._pass = self._plan = None
        return False

    def _state(self) -> object:
        """What a plan is made of, besides free_s."""
        machines = [machine.planned_by for machine in self._machines]
        return self._schedule.version, self._estimates.version, machines

    def _computed(self, free_s: Sequence[float]) -> Plan:
        schedule, machines = self._schedule, self._machines
        numbers = schedule.column("machine")
        if self._numbered != machines:
            new = {id(machine): number for number, machine in enumerate(machines)}
            renumbered = [new.get(id(machine), NOWHERE) for machine in self._numbered]
            numbers[:] = np.array([*renumbered, NOWHERE])[numbers.astype(np.intp)]
            self._numbered, self._pass, self._next_pass_at = list(machines), None, 0.0
        first = list(islice(self.assigned(free_s), AT_ONCE))
        numbers[: len(first)] = first
        self._spread(free_s)
        assigned = numbers.astype(np.intp)
        ends = np.cumsum(np.bincount(assigned, minlength=len(machines)))
        own = np.split(np.argsort(assigned, kind="stable"), ends[:-1])
        walks = [
            schedule.walk_of(positions, machine.resident_after_runs(), machine.speed)
            for positions, machine in zip(own, machines, strict=True)
        ]
        return Plan(walks, assigned, own)

    def _spread(self, free_s: Sequence[float]) -> None:
        """Assign the tasks that no pass has seen yet, by their work alone."""
        numbers, work_s = self._schedule.column("machine"), self._schedule.gpu_s()
        unseen = np.flatnonzero(numbers == NOWHERE)
        if not len(unseen):
            return
        seen, pace = numbers != NOWHERE, self._pace()
        own_s = np.bincount(numbers[seen].astype(np.intp), work_s[seen], len(pace)) * pace
        end_s = own_s + np.array(free_s)
        for position in unseen[:AT_ONCE].tolist():
            best = int((end_s + work_s[position] * pace).argmin())
            end_s[best] += work_s[position] * pace[best]
            numbers[position] = best
        rest = unseen[AT_ONCE:]
        numbers[rest] = np.arange(len(rest)) % len(pace)

    def _pace(self) -> Floats:
        return 1.0 / np.array([machine.speed for machine in self._machines])

    def assigned(self, free_s: Sequence[float]) -> Iterator[int]:
        """By position, the number of the machine on which the task is expected to end first. One
        that no machine may run is given to the one that is free first, for its forecast.

        Args:
            free_s: by machine, seconds until its GPU has no running task any more.
        """
        machines = list(self._machines)
        residents = [machine.resident_after_runs() for machine in machines]
        free, pace = np.array(free_s), self._pace()
        known: dict[tuple[int, Resident], _Loads] = {}
        loads = [known.setdefault(key, {}) for key in enumerate(residents)]  # by machine
        load_s: dict[tuple[str, ...], Floats] = {}  # of each machine, for these weights
        offered = {id(machine.offered): n for n, machine in enumerate(machines) if machine.offered}
        examples: dict[tuple[str, ...], Task] = {}
        declined = {task_id for machine in machines for task_id in machine.declined}
        for task, work_s in self._schedule.in_turn():
            specs = tuple([stage.load_spec.key for stage in task.stages])
            if task.task_id in declined:
                specs = (*specs, task.task_id)
            if specs not in load_s:
                examples[specs] = task
                each = [self._load_s(n, specs, task, residents, loads) for n in range(len(loads))]
                load_s[specs] = np.array(each)
            end_s = free + load_s[specs] + work_s * pace
            if (holder := offered.get(id(task))) is not None:
                end_s[holder] -= OFFER_BONUS_S
            best = int(end_s.argmin())
            if end_s[best] == inf:
                best = int(free.argmin())
                free[best] += work_s * pace[best]
                yield best
                continue
            free[best] = end_s[best] + (OFFER_BONUS_S if best == holder else 0.0)
            then = loads[best][specs][1]
            if then != residents[best]:
                residents[best], loads[best] = then, known.setdefault((best, then), {})
                for other, example in examples.items():
                    load_s[other][best] = self._load_s(best, other, example, residents, loads)
            yield best

    def _load_s(
        self,
        number: int,
        specs: tuple[str, ...],
        task: Task,
        residents: Sequence[Resident],
        loads: Sequence[_Loads],
    ) -> float:
        """Seconds of downloading and loading what a task needs; inf: the machine may not run it."""
        if specs not in loads[number]:
            loads[number][specs] = self._loads(number, task, residents[number])
        return loads[number][specs][0]

    def _loads(self, number: int, task: Task, resident: Resident) -> tuple[float, Resident]:
        machine = self._machines[number]
        if not machine.can_run(task):
            return inf, resident
        needed, then = resident.loads(task.stages)
        download_s = machine.download_bytes(task) / DOWNLOAD_BYTES_PER_S
        return self._estimates.loads_s(needed) + download_s, then
