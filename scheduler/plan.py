"""Which machine each waiting task is expected to run on, and the work ahead of it there.

Each task, in order, goes to the machine on which it is expected to end first (list scheduling;
Graham 1969, "Bounds on multiprocessing timing anomalies").
"""

from collections.abc import Iterator, Sequence
from math import inf

import numpy as np

from scheduler.columns import Floats
from scheduler.estimates import Estimates
from scheduler.machines import Machine, Resident
from scheduler.schedule import Bools, Schedule, Walk
from task import Task

DOWNLOAD_BYTES_PER_S = 25e6
"""At which a machine is expected to download weights that it does not have."""
OFFER_BONUS_S = 1.0
"""A task stays with the machine that it was sent to, unless it ends earlier elsewhere by this."""
_Loads = dict[tuple[str, ...], tuple[float, Resident]]
"""By the weights that a task needs: seconds of downloading and loading them (inf: the machine may
not), and what is in memory then."""


class Plan:
    """Args:
    walks: by machine, its tasks as it will run them.
    own: by machine, which tasks of the schedule are its own, by position. Empty: there is one
        machine, and all are its own.
    """

    def __init__(self, walks: Sequence[Walk], own: Sequence[Bools] = ()) -> None:
        self.walks = walks
        self._is_one, self._own = not own, own
        if self._is_one:
            return
        self._before = [np.concatenate(([0], np.cumsum(chosen))) for chosen in own]
        self._machine = np.argmax(own, axis=0)

    def machine(self, position: int) -> int:
        """The number of the machine of the waiting task at this position."""
        return 0 if self._is_one else int(self._machine[position])

    def own(self, machine: int) -> Bools | slice:
        """Which tasks of the schedule run on this machine: an index for arrays by position."""
        return slice(None) if self._is_one else self._own[machine]

    def index(self, machine: int, position: int) -> int:
        """How many tasks before this position run on this machine: an index for its walk."""
        return position if self._is_one else int(self._before[machine][position])


class Planner:
    """Keeps the plan until a task joins, starts or ends, or something is loaded or learned. A
    running task that takes longer than expected delays the tasks of its own machine, and moves them
    to another one only with the next plan: so most questions cost no walk through the schedule.

    Not thread-safe: its owner holds a lock.
    """

    def __init__(
        self, schedule: Schedule, machines: Sequence[Machine], estimates: Estimates
    ) -> None:
        self._schedule = schedule
        self._machines = machines
        self._estimates = estimates
        self._plan: tuple[object, Plan] | None = None

    def plan(self, free_s: Sequence[float]) -> Plan:
        """Args:
        free_s: by machine, seconds until its GPU has no running task any more.
        """
        residents = [machine.resident_after_runs() for machine in self._machines]
        if len(self._machines) == 1:  # the schedule keeps its walk
            walk = self._schedule.walk(residents[0], self._machines[0].speed)
            if self._plan is None or self._plan[0] is not walk:
                self._plan = walk, Plan([walk])
            return self._plan[1]
        state = (
            self._schedule.version,
            self._estimates.version,
            [
                (resident, machine.speed, *machine.planned_by)
                for machine, resident in zip(self._machines, residents, strict=True)
            ],
        )
        if self._plan is None or self._plan[0] != state:
            self._plan = state, self._computed(free_s, residents)
        return self._plan[1]

    def _computed(self, free_s: Sequence[float], residents: list[Resident]) -> Plan:
        assigned = np.fromiter(self.assigned(free_s, residents), np.intp, len(self._schedule))
        own = [assigned == number for number in range(len(self._machines))]
        walks = [
            self._schedule.walk_of(chosen, resident, machine.speed)
            for chosen, resident, machine in zip(own, residents, self._machines, strict=True)
        ]
        return Plan(walks, own)

    def assigned(self, free_s: Sequence[float], residents: Sequence[Resident]) -> Iterator[int]:
        """By position, the number of the machine on which the task is expected to end first. One
        that no machine may run is given to the one that is free first, for its forecast.

        Args:
            free_s, residents: by machine, when its GPU is free, and what is in memory then.
        """
        machines, residents = self._machines, list(residents)
        free, pace = np.array(free_s), 1.0 / np.array([machine.speed for machine in machines])
        known: dict[tuple[int, Resident], _Loads] = {}
        loads = [known.setdefault(key, {}) for key in enumerate(residents)]  # by machine
        load_s: dict[tuple[str, ...], Floats] = {}  # of each machine, for these weights
        offered = {id(machine.offered): n for n, machine in enumerate(machines) if machine.offered}
        examples: dict[tuple[str, ...], Task] = {}
        declined = {task_id for machine in machines for task_id in machine.declined}
        for position, task in enumerate(self._schedule):
            specs = tuple([stage.load_spec.key for stage in task.stages])
            if task.task_id in declined:
                specs = (*specs, task.task_id)
            if specs not in load_s:
                examples[specs] = task
                each = [self._load_s(n, specs, task, residents, loads) for n in range(len(loads))]
                load_s[specs] = np.array(each)
            work_s = self._schedule.durations(position).gpu_s
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
